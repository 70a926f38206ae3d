"""Flights: the round-0 Accepts of one step as one message, for all their timelines (*pure*).

In a healthy group nearly every entry is decided in round 0 by the life that proposed the entry before. The entries that
such a life proposes in one step share all but their values: ballot, timers, and the fsync of each replica. So they
travel together, and are answered together:

    proposer                                  each peer
    Accepts 7: columns of timelines   ->      writes them all, one fsync
                                      <-      AcceptedAll 7, but for those at `others`
    ChosenAll 7                       ->      applies them all

That changes how much is said at once, and nothing of what it means: each timeline's entry is decided by itself. A peer
takes a timeline on the short way only if nothing stands against it; any other goes the way of a single `Accept`, has
an answer of its own, and is listed in `others`. Whatever gets lost is repeated by single messages. A peer that did not
hear of a flight, and is told that it was chosen, says so (`Unheard`) and is told of each entry.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from typing import NamedTuple

from ..errors import InvalidRequest
from ..keys import is_system
from ..messages import (
    DELETE,
    NO_BALLOT,
    Accept,
    AcceptedAll,
    Accepts,
    Ballot,
    Chosen,
    ChosenAll,
    Life,
    Unheard,
    Value,
    pack_i64,
    pack_u32,
    unpack_i64,
    unpack_u32,
)
from .acceptances import Acceptances
from .acceptor import Acceptor
from .core import MAX_ENTRY, Core
from .rows import SHORT_ITEM
from .timeline import FLIGHT, Proposal, Timeline

MAX_FLIGHTS = 1_024
MAX_ENTRIES_KEPT = 50_000  # of flights that are decided, or that peers have sent: 5 MB
ID_BYTES = 16

Leaving = tuple[Timeline, Proposal, Ballot, int]
"""A proposal of round 0: with the ballot at which the entry before was chosen, and the engine batch that holds the own
acceptance."""

OwnVote = tuple[int, bytes, int, Ballot, str]
"""(engine batch, timeline, entry, ballot, phase) of a vote of this replica that waits to be durable. For a whole flight
the phase is FLIGHT and the entry its number."""


@dataclass(slots=True)
class Flight:
    """Entries of one step. `votes`: of replicas that have accepted all of them, with the incarnation that gave each.

    `message`: as it was sent, to be repeated word for word, since a proposal may go on with a higher ballot and another
    value. `open`: entries that are still under way with it. `mixed`: some have votes of their own, which count together
    with these.
    """

    number: int
    members: list[tuple[Timeline, Proposal]]
    message: Accepts
    open: int
    votes: dict[int, int] = field(default_factory=dict)
    mixed: bool = False


class Departures:
    """The proposer's end: flights of this life."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self._step: list[Leaving] = []
        self._number = 0
        self._flights: OrderedDict[int, Flight] = OrderedDict()  # that are not decided
        self._decided: OrderedDict[int, tuple[list[bytes], bytes]] = OrderedDict()  # timelines and entries of each
        self._entries_kept = 0

    def add(self, timeline: Timeline, proposal: Proposal, batch: int) -> None:
        """Have a proposal of round 0 leave at the end of this step; engine batch `batch` holds the own acceptance."""
        self._step.append((timeline, proposal, timeline.ballot, batch))

    def add_all(self, leaving: list[Leaving]) -> None:
        """The same for many."""
        self._step += leaving

    @property
    def is_waiting(self) -> bool:
        """Whether anything waits for the end of the step."""
        return bool(self._step)

    def close(self) -> list[OwnVote]:
        """End a step: what was added goes to the outbox. Own votes for it, to be counted when durable."""
        if not self._step:
            return []
        step, self._step = self._step, []
        self.core.counters.add("fast_accepts", len(step))
        alike: dict[tuple[bool, Ballot], list[Leaving]] = {}
        for like, members in groupby(step, lambda one: (one[1].entry == 1, one[2])):
            alike.setdefault(like, []).extend(members)
        votes: list[OwnVote] = []
        for (first_of_all, before), together in alike.items():
            for part in self._parts(together):
                # What an earlier life may have sent for a first entry no memory can tell: so it is durable first.
                after = part[-1][3] if first_of_all else 0
                if len(part) < self.core.settings.flight_entries:
                    votes += self._send_single(*part[0], after)
                else:
                    votes.append(self._send_flight([one[:2] for one in part], before, part[-1][3], after))
        return votes

    def _parts(self, members: list[Leaving]) -> Iterator[list[Leaving]]:
        """Members of a flight, cut so that each message is of bounded size."""
        limit = self.core.settings.message_bytes
        weights = [one[0].open_bytes + 2 * len(one[0].key) + 64 for one in members]
        if sum(weights) <= limit:
            yield members
            return
        part: list[Leaving] = []
        size = 0
        for one, weight in zip(members, weights, strict=True):
            size += weight
            if part and size > limit:
                yield part
                part, size = [], weight
            part.append(one)
        yield part

    def _send_single(
        self, timeline: Timeline, proposal: Proposal, before: Ballot, batch: int, after: int
    ) -> list[OwnVote]:
        assert proposal.value is not None
        accept = Accept(timeline.key, proposal.entry, proposal.ballot, before, proposal.value)
        self.core.broadcast(accept, after)
        self.core.wake_at(proposal.due, timeline)
        return [(batch, timeline.key, proposal.entry, proposal.ballot, proposal.phase)]

    def _send_flight(self, members: list[tuple[Timeline, Proposal]], before: Ballot, batch: int, after: int) -> OwnVote:
        self._number += 1
        message = self._message(members, before)
        flight = self._flights[self._number] = Flight(self._number, members, message, len(members))
        if len(self._flights) > MAX_FLIGHTS:
            self._flights.popitem(last=False)[1].mixed = True  # its entries are repeated one by one
        for _, proposal in members:
            proposal.flight = flight
        timelines = [timeline for timeline, _ in members]
        self.core.wake_all_at(min([proposal.due for _, proposal in members]), timelines)
        self.core.broadcast(message, after)
        self.core.counters.add("flights")
        return batch, b"", flight.number, members[0][1].ballot, FLIGHT

    def send_again(self, flight: Flight, peer: int) -> None:
        """Repeat a flight to one peer."""
        first_of_all = flight.members[0][1].entry == 1
        after = max([timeline.dirty for timeline, _ in flight.members]) if first_of_all else 0
        self.core.send(peer, flight.message, after)

    def _message(self, members: list[tuple[Timeline, Proposal]], before: Ballot) -> Accepts:
        values = [proposal.value for _, proposal in members if proposal.value is not None]
        return Accepts(
            self._number,
            self.core.life,
            before,
            [timeline.key for timeline, _ in members],
            pack_i64([proposal.entry for _, proposal in members]),
            pack_i64([value.written for value in values]),
            pack_u32([len(value.request_ids) for value in values]),
            b"".join([request_id for value in values for request_id in value.request_ids]),
            pack_u32([len(value.keys) for value in values]),
            b"".join([value.kinds for value in values]),
            [key for value in values for key in value.keys],
            [content for value in values for content in value.values],
        )

    def find(self, number: int) -> Flight | None:
        """A flight that is not decided."""
        return self._flights.get(number)

    def leave(self, proposal: Proposal) -> None:
        """A proposal ends, or goes on by itself. A flight that all have left holds no values any longer."""
        flight, proposal.flight = proposal.flight, None
        if flight is not None:
            flight.open -= 1
            if not flight.open:
                self._flights.pop(flight.number, None)

    def decide(self, flight: Flight) -> None:
        """A majority has accepted the whole flight. What was in it is remembered for a while, for `Unheard`."""
        del self._flights[flight.number]
        self._decided[flight.number] = flight.message.timelines, flight.message.entries
        self._entries_kept += len(flight.members)
        while self._entries_kept > MAX_ENTRIES_KEPT:
            self._entries_kept -= len(self._decided.popitem(last=False)[1][0])

    def on_unheard(self, sender: int, message: Unheard) -> None:
        """Tell a peer of each entry of a decided flight that it did not hear of."""
        if message.life == self.core.life:
            keys, entries = self._decided.get(message.number, ([], b""))
            for key, entry in zip(keys, unpack_i64(entries), strict=True):
                self.core.send(sender, Chosen(key, entry, (0, self.core.life)))


class Arrivals:
    """The acceptor's end: flights of peers."""

    def __init__(self, core: Core, acceptor: Acceptor) -> None:
        self.core = core
        self.acceptor = acceptor
        self._heard: OrderedDict[tuple[Life, int], _Heard] = OrderedDict()
        self._entries_kept = 0

    def on_accepts(self, sender: int, message: Accepts, now: float) -> None:
        """Accept all that nothing stands against; the others have their own answers."""
        core, acceptor = self.core, self.acceptor
        ballot, before, life = (0, message.life), message.before, message.life
        columns = _Columns(message)
        found = core.find_all(message.timelines)
        rest, after = self._accept_usual(columns, found, ballot)
        others: list[int] = []
        for index in rest:
            key, entry, value = message.timelines[index], columns.entries[index], columns.value(index)
            try:
                timeline = core.owned_timeline(key)
            except InvalidRequest:
                core.counters.add("malformed_peer_messages")
                others.append(index)
                continue
            if timeline.accepted == before != NO_BALLOT and entry == timeline.chosen + 2:
                acceptor.choose(timeline)
            is_next = entry == timeline.chosen + 1
            nothing_against = is_next and timeline.promised == NO_BALLOT == timeline.accepted
            if nothing_against and acceptor.claim_holds(timeline, entry, ballot, life):
                after = acceptor.accept(timeline, ballot, value)
            elif is_next and timeline.accepted == ballot and not timeline.learned:
                after = max(after, timeline.dirty)  # the flight was repeated
            elif entry == timeline.chosen and timeline.ballot == ballot:
                after = max(after, timeline.dirty)  # it was repeated late: it is chosen at this very ballot
            else:
                others.append(index)
                acceptor.on_accept(timeline, sender, Accept(key, entry, ballot, before, value), now)
        self._note(message, _Heard(message.timelines, columns.entries, found))
        core.send(sender, AcceptedAll(message.number, life, pack_u32(others)), after)

    def _accept_usual(self, columns: _Columns, found: list[Timeline | None], ballot: Ballot) -> tuple[list[int], int]:
        """Accept what is as nearly all is: one item, for a timeline in memory whose last entry was of the same life and
        that has nothing open. Indices of the others, and the engine batch. Nothing is read from the engine meanwhile.
        """
        core, message, life = self.core, columns.message, ballot[1]
        acceptances = Acceptances(core, ballot)
        others: list[int] = []
        ids, kinds, keys, values = message.request_ids, message.kinds, message.keys, message.values
        rows = zip(
            found,
            columns.entries,
            columns.written,
            columns.counts,
            columns.lows,
            columns.id_counts,
            columns.id_lows,
            strict=False,  # `lows` have one more, the end
        )
        for index, (timeline, entry, written, items, low, id_count, id_low) in enumerate(rows):
            if (
                timeline is not None
                and entry == timeline.chosen + 1 > 1
                and timeline.promised is NO_BALLOT
                and timeline.accepted is NO_BALLOT
                and timeline.origin == life
                and items == 1 == id_count
                and kinds[low] <= DELETE
                and len(keys[low]) <= SHORT_ITEM
                and not is_system(timeline.key)
            ):
                request_id = ids[id_low : id_low + ID_BYTES]
                acceptances.add(timeline, written, request_id, kinds[low], keys[low], values[low])
            else:
                others.append(index)
        return others, acceptances.close()

    def _note(self, message: Accepts, heard: _Heard) -> None:
        if (message.life, message.number) not in self._heard:
            self._heard[message.life, message.number] = heard
            self._entries_kept += len(heard.entries)
            while self._entries_kept > MAX_ENTRIES_KEPT:
                self._entries_kept -= len(self._heard.popitem(last=False)[1].entries)

    def on_chosen_all(self, sender: int, message: ChosenAll, now: float) -> None:
        """Apply what was accepted of a flight, fetch what was not."""
        heard = self._heard.pop((message.life, message.number), None)
        if heard is None:
            self.core.send(sender, Unheard(message.number, message.life))
            return
        self._entries_kept -= len(heard.entries)
        ballot, find = (0, message.life), self.core.timeline
        rows = zip(heard.found, heard.timelines, heard.entries, strict=True)
        members = [(timeline or find(key), entry) for timeline, key, entry in rows]
        for known, entry in self.acceptor.choose_all(members, ballot):
            timeline = find(known.key)  # it may have left memory and come back since
            if timeline.accepted == ballot and entry == timeline.chosen + 1:
                self.acceptor.choose(timeline)
            elif entry > timeline.chosen:
                self.acceptor.fetch(timeline, sender, now)


class _Heard(NamedTuple):
    """A flight of a peer: its timelines and their entries, and what was found of them in memory."""

    timelines: list[bytes]
    entries: list[int]
    found: list[Timeline | None]


class _Columns:
    """The columns of an `Accepts`, unpacked. `lows`, `id_lows`: where those of each timeline begin in the flat ones."""

    def __init__(self, message: Accepts) -> None:
        self.message = message
        self.entries, self.written = unpack_i64(message.entries), unpack_i64(message.written)
        self.counts, self.id_counts = unpack_u32(message.counts), unpack_u32(message.id_counts)
        self.lows = list(accumulate(self.counts, initial=0))
        self.id_lows = [ID_BYTES * low for low in accumulate(self.id_counts, initial=0)]

    def value(self, index: int) -> Value:
        """The value of one timeline."""
        message, ids = self.message, self.message.request_ids
        low, high = self.lows[index], self.lows[index + 1]
        request_ids = [ids[at : at + ID_BYTES] for at in range(self.id_lows[index], self.id_lows[index + 1], ID_BYTES)]
        return Value(
            message.life,
            self.written[index],
            request_ids,
            message.kinds[low:high],
            message.keys[low:high],
            message.values[low:high],
        )


def is_sound(message: Accepts) -> bool:
    """Whether the columns of a message fit one another, and its life can be one."""
    count = len(message.timelines)
    if min(message.life) < 0 or max(message.life) >= MAX_ENTRY:
        return False
    if not 8 * count == len(message.entries) == len(message.written):
        return False
    if not 4 * count == len(message.id_counts) == len(message.counts):
        return False
    items = sum(unpack_u32(message.counts))
    ids = sum(unpack_u32(message.id_counts))
    return items == len(message.kinds) == len(message.keys) == len(message.values) and (
        len(message.request_ids) == ID_BYTES * ids
    )


def singles(message: Accepts) -> list[Accept]:
    """The same as a list of single messages."""
    ballot, columns = (0, message.life), _Columns(message)
    return [
        Accept(key, columns.entries[index], ballot, message.before, columns.value(index))
        for index, key in enumerate(message.timelines)
    ]
