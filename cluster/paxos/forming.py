"""The next entry's value: which of the requests that wait go into it, and which are answered without one (*pure*)."""

from __future__ import annotations

from ..messages import CONFLICT, INVALID, NO_BALLOT, OK, STALE, UNKNOWN, WIPE, Value
from .acceptor import Acceptor
from .answers import Answers
from .core import Core
from .timeline import CATCH_UP, Proposal, Timeline, Waiter

MAX_IDS_PER_ENTRY = 256


class Forming(Answers):
    """Makes one entry of the requests that wait for a timeline."""

    def __init__(self, core: Core, acceptor: Acceptor) -> None:
        super().__init__(core)
        self.acceptor = acceptor

    def _form(self, timeline: Timeline, now: float) -> Value | None:
        """The next entry's value from what waits, or None. Ids, versions and conditions are checked here, at each
        proposal: between arrival and now an entry by someone else may have applied the same request."""
        taken: list[Waiter] = []
        items = size = 0
        settings = self.core.settings
        for waiter in self._eligible(timeline, now):
            if waiter.if_version > timeline.chosen:
                continue  # whether it conflicts is for a majority to say
            alone = waiter.if_version >= 0
            if taken and (
                alone
                or len(taken) >= MAX_IDS_PER_ENTRY
                or items + len(waiter.keys) > settings.entry_items
                or size + waiter.size > settings.entry_bytes
            ):
                break
            taken.append(waiter)
            items += len(waiter.keys)
            size += waiter.size
            if alone:
                break
        if not taken:
            return None
        self.core.counters.add("entries_proposed")
        self.core.counters.add("requests_proposed", len(taken))
        kinds, keys, values = _merge(taken)
        ids = [waiter.request_id for waiter in taken]
        return Value(self.core.life, self.core.wall_us(), ids, kinds, keys, values)

    def _eligible(self, timeline: Timeline, now: float) -> list[Waiter]:
        """Waiting requests that may enter entry chosen+1, in order; the others are answered and dropped.

        One with a condition on a version that we have not is among them until a majority has none of it either.
        """
        ids = self.core.ids_of(timeline)
        eligible = []
        for waiter in list(timeline.waiting.values()):
            applied = ids.get(waiter.request_id)
            if applied is not None:
                self._drop(timeline, waiter, OK, applied)
            elif waiter.seen < timeline.chosen - self.core.settings.request_id_entries:
                # With an attempt of our own out, "surely not applied" would be a guess.
                self._drop(timeline, waiter, UNKNOWN if waiter.sent else STALE, timeline.chosen)
            elif max(waiter.seen, waiter.if_version) > timeline.chosen and not waiter.asked_peers:
                # The sender has seen a version that we have not: learn it before judging the request.
                waiter.asked_peers = True
                self._catch_up_first(timeline, now)
                return []
            elif 0 <= waiter.if_version < timeline.chosen or (waiter.if_version > timeline.chosen and waiter.confirmed):
                self._drop(timeline, waiter, CONFLICT, timeline.chosen)
            elif not waiter.keys:
                self._drop(timeline, waiter, INVALID, timeline.chosen)
            else:
                eligible.append(waiter)
        return eligible

    def _catch_up_first(self, timeline: Timeline, now: float) -> None:
        proposal = Proposal(timeline.chosen + 1, NO_BALLOT, CATCH_UP, now + self.core.settings.accept_timeout_s)
        timeline.proposal = proposal
        for peer in self.core.peers:
            timeline.asked_until = 0.0  # this question goes to every peer
            self.acceptor.fetch(timeline, peer, now)
        self.core.wake_at(proposal.due, timeline)


def _merge(waiters: list[Waiter]) -> tuple[bytes, list[bytes], list[bytes]]:
    """Mutations of several requests as one entry: of one key the later wins, a WIPE drops all before it."""
    first = waiters[0]
    if len(waiters) == 1 == len(first.keys):
        return first.kinds, first.keys, first.values
    merged: dict[bytes, tuple[int, bytes]] = {}
    for waiter in waiters:
        for kind, key, value in zip(waiter.kinds, waiter.keys, waiter.values, strict=True):
            if kind == WIPE:
                merged.clear()
            else:
                merged.pop(key, None)
            merged[key] = (kind, value)
    return bytes(kind for kind, _ in merged.values()), list(merged), [value for _, value in merged.values()]
