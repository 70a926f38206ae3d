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

from ..errors import InvalidRequest
from ..messages import (
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
from .acceptor import Acceptor
from .core import FLIGHT, MAX_ENTRY, Core, Proposal, Timeline

MAX_FLIGHTS = 1_024
MAX_ENTRIES_KEPT = 50_000  # of flights that are decided, or that peers have sent: 5 MB
ID_BYTES = 16

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
        self._step: list[tuple[Timeline, Proposal, Ballot, int]] = []
        self._number = 0
        self._flights: OrderedDict[int, Flight] = OrderedDict()  # that are not decided
        self._decided: OrderedDict[int, list[tuple[bytes, int]]] = OrderedDict()  # (timeline, entry) of each
        self._entries_kept = 0

    def add(self, timeline: Timeline, proposal: Proposal, batch: int) -> None:
        """Have a proposal of round 0 leave at the end of this step; engine batch `batch` holds the own acceptance."""
        self._step.append((timeline, proposal, timeline.ballot, batch))

    def close(self) -> list[OwnVote]:
        """End a step: what was added goes to the outbox. Own votes for it, to be counted when durable."""
        if not self._step:
            return []
        step, self._step = self._step, []
        self.core.counters.add("fast_accepts", len(step))
        alike: dict[tuple[bool, Ballot], list[tuple[Timeline, Proposal, Ballot, int]]] = {}
        for one in step:
            alike.setdefault((one[1].entry == 1, one[2]), []).append(one)
        votes: list[OwnVote] = []
        for (first_of_all, before), members in alike.items():
            for part in self._parts(members):
                # What an earlier life may have sent for a first entry no memory can tell: so it is durable first.
                after = part[-1][3] if first_of_all else 0
                if len(part) < self.core.settings.flight_entries:
                    votes += self._send_single(*part[0], after)
                else:
                    votes.append(self._send_flight([one[:2] for one in part], before, part[-1][3], after))
        return votes

    def _parts(
        self, members: list[tuple[Timeline, Proposal, Ballot, int]]
    ) -> Iterator[list[tuple[Timeline, Proposal, Ballot, int]]]:
        """Members of a flight, cut so that each message is of bounded size."""
        limit = self.core.settings.message_bytes
        part: list[tuple[Timeline, Proposal, Ballot, int]] = []
        size = 0
        for one in members:
            weight = one[0].open_bytes + 2 * len(one[0].key) + 64
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
        self._decided[flight.number] = [(timeline.key, proposal.entry) for timeline, proposal in flight.members]
        self._entries_kept += len(flight.members)
        while self._entries_kept > MAX_ENTRIES_KEPT:
            self._entries_kept -= len(self._decided.popitem(last=False)[1])

    def on_unheard(self, sender: int, message: Unheard) -> None:
        """Tell a peer of each entry of a decided flight that it did not hear of."""
        if message.life == self.core.life:
            for key, entry in self._decided.get(message.number, ()):
                self.core.send(sender, Chosen(key, entry, (0, self.core.life)))


class Arrivals:
    """The acceptor's end: flights of peers."""

    def __init__(self, core: Core, acceptor: Acceptor) -> None:
        self.core = core
        self.acceptor = acceptor
        self._heard: OrderedDict[tuple[Life, int], tuple[list[bytes], list[int]]] = OrderedDict()
        self._entries_kept = 0

    def on_accepts(self, sender: int, message: Accepts, now: float) -> None:
        """Accept all that nothing stands against; the others have their own answers."""
        core, acceptor = self.core, self.acceptor
        ballot, before, life = (0, message.life), message.before, message.life
        entries = unpack_i64(message.entries)
        core.load(message.timelines)
        others: list[int] = []
        after = 0
        for index, (key, entry, value) in enumerate(zip(message.timelines, entries, values_of(message), strict=True)):
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
            else:
                others.append(index)
                acceptor.on_accept(timeline, sender, Accept(key, entry, ballot, before, value), now)
        self._note(message, entries)
        core.send(sender, AcceptedAll(message.number, life, pack_u32(others)), after)

    def _note(self, message: Accepts, entries: list[int]) -> None:
        if (message.life, message.number) not in self._heard:
            self._heard[message.life, message.number] = (message.timelines, entries)
            self._entries_kept += len(entries)
            while self._entries_kept > MAX_ENTRIES_KEPT:
                self._entries_kept -= len(self._heard.popitem(last=False)[1][1])

    def on_chosen_all(self, sender: int, message: ChosenAll, now: float) -> None:
        """Apply what was accepted of a flight, fetch what was not."""
        heard = self._heard.pop((message.life, message.number), None)
        if heard is None:
            self.core.send(sender, Unheard(message.number, message.life))
            return
        self._entries_kept -= len(heard[1])
        ballot = (0, message.life)
        for key, entry in zip(*heard, strict=True):
            timeline = self.core.timeline(key)
            if timeline.accepted == ballot and entry == timeline.chosen + 1:
                self.acceptor.choose(timeline)
            elif entry > timeline.chosen:
                self.acceptor.fetch(timeline, sender, now)


def values_of(message: Accepts) -> Iterator[Value]:
    """The value of each timeline."""
    ids, kinds, keys, values = message.request_ids, message.kinds, message.keys, message.values
    id_low = low = 0
    for written, id_count, count in zip(
        unpack_i64(message.written), unpack_u32(message.id_counts), unpack_u32(message.counts), strict=True
    ):
        id_high, high = id_low + ID_BYTES * id_count, low + count
        if id_count == 1:
            request_ids = [ids[id_low:id_high]]
        else:
            request_ids = [ids[at : at + ID_BYTES] for at in range(id_low, id_high, ID_BYTES)]
        yield Value(message.life, written, request_ids, kinds[low:high], keys[low:high], values[low:high])
        id_low, low = id_high, high


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
    ballot = (0, message.life)
    rows = zip(message.timelines, unpack_i64(message.entries), values_of(message), strict=True)
    return [Accept(key, entry, ballot, message.before, value) for key, entry, value in rows]
