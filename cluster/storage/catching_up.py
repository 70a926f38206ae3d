"""What a replica missed while it was away, as a script: it compares itself with a peer and fetches what it lacks.

It goes on while the replica votes and answers, so it goes at a pace: a few hundred entries are under way at a time,
some ten milliseconds of work at either end, and the next are asked for when those have come. Asked for all at once,
the answers would keep the node from everything else for seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ..effects import Call, CallFailed, Script, Sleep
from ..errors import ProtocolError, Unavailable
from ..messages import AskChanged, AskChosen, ChangedList, ChosenList, Failure, unpack_i64
from ..paxos.replica import Replica
from .learning import Step

L = TypeVar("L", ChangedList, ChosenList)

CALL_S = 5.0
COMPARED_AT_ONCE = 200
ENTRIES_UNDER_WAY = 400
ENTRIES_AN_ANSWER = 256  # at most; what a longer timeline lacks follows by itself
POLL_S = 0.004


def catch_up(step: Step, clock: Callable[[], float], peer: int, node: str) -> Script[int]:
    """Compare with replica `peer` at `node` and fetch what it has more of. How many timelines were behind.

    It costs what has changed at the peer since the last time (`paxos/journal.py`), and all timelines only where its
    journal does not reach back so far. What does not come within the time of a fetch is left for the next comparison.
    Raises Unavailable, ProtocolError.
    """
    window = _Window(step, clock, peer)
    question = step(lambda replica: replica.core.journal.question(peer))
    behind = 0
    while True:
        answer = yield from _ask(node, question, ChangedList)
        if answer.whole:
            behind += yield from _take(step, window, _pairs(node, answer))
        else:
            behind += yield from _compare_all(step, window, node)
        question = AskChanged(question.replica, answer.reached, question.safe)
        if not answer.more:
            break
    yield from window.drain(0)
    if not window.overdue:
        step(lambda replica: replica.core.journal.compared(peer, answer.reached))
    return behind


def _compare_all(step: Step, window: _Window, node: str) -> Script[int]:
    """Compare all timelines. How many were behind."""
    behind = 0
    question = AskChosen(0, b"")
    while question.bucket >= 0:
        answer = yield from _ask(node, question, ChosenList)
        behind += yield from _take(step, window, _pairs(node, answer))
        question = AskChosen(answer.next_bucket, answer.next_cursor)
    return behind


def _take(step: Step, window: _Window, pairs: list[tuple[bytes, int]]) -> Script[int]:
    """Fetch what is behind the versions of a peer. How many timelines are."""
    behind = 0
    for start in range(0, len(pairs), COMPARED_AT_ONCE):
        missing = _missing(step, pairs[start : start + COMPARED_AT_ONCE])
        behind += len(missing)
        for name, chosen, entries in missing:
            yield from window.fetch(name, chosen, entries)
        yield Sleep(0)
    return behind


def _ask(node: str, question: AskChanged | AskChosen, want: type[L]) -> Script[L]:
    """A peer's answer. Raises Unavailable."""
    (answer,) = yield [Call(node, question, CALL_S)]
    if isinstance(answer, CallFailed):
        raise Unavailable(f"{node}: {answer.reason}")
    if not isinstance(answer, want):
        told = answer.message if isinstance(answer, Failure) else f"it answered with a {type(answer).__name__}"
        raise Unavailable(f"{node}: {told}")
    return answer


def _pairs(node: str, answer: ChangedList | ChosenList) -> list[tuple[bytes, int]]:
    """Timelines of a peer's answer with its chosen versions. Raises ProtocolError."""
    chosen = unpack_i64(answer.chosen)
    if len(chosen) != len(answer.timelines):
        raise ProtocolError(f"{node} answered {len(chosen)} versions of {len(answer.timelines)} timelines")
    return list(zip(answer.timelines, chosen, strict=True))


def _missing(step: Step, pairs: list[tuple[bytes, int]]) -> list[tuple[bytes, int, int]]:
    """(timeline, version of the peer, entries that this replica lacks) of those that are behind."""

    def compare(replica: Replica) -> list[tuple[bytes, int, int]]:
        own = replica.core.chosen_of([name for name, _ in pairs])
        replica.core.counters.add("catch_up_compared", len(pairs))
        ahead = [pair for pair, chosen in zip(pairs, own, strict=True) if pair[1] > chosen]
        found = [(name, chosen, chosen - replica.core.timeline(name).chosen) for name, chosen in ahead]
        return [row for row in found if row[2] > 0]

    return step(compare)


class _Window:
    """The timelines that are being fetched: by name, the version to reach and the entries that are to come."""

    def __init__(self, step: Step, clock: Callable[[], float], peer: int) -> None:
        self._step = step
        self._clock = clock
        self._peer = peer
        self._under_way: dict[bytes, tuple[int, int]] = {}
        self._entries = 0
        self.overdue = 0  # timelines that did not come in time

    def fetch(self, name: bytes, chosen: int, entries: int) -> Script[None]:
        """Ask for a timeline, once there is room."""
        weight = min(entries, ENTRIES_AN_ANSWER)
        yield from self.drain(ENTRIES_UNDER_WAY - weight)
        self._step(lambda replica: replica.note_behind(self._clock(), self._peer, name, chosen))
        self._under_way[name] = (chosen, weight)
        self._entries += weight

    def drain(self, entries: int) -> Script[None]:
        """Wait until no more than so many entries are under way."""
        while self._entries > entries:
            self._step(self._settle)
            if self._entries > entries:
                yield Sleep(POLL_S)

    def _settle(self, replica: Replica) -> None:
        """Forget what has come, and what is overdue."""
        for name, (chosen, weight) in list(self._under_way.items()):
            timeline = replica.core.timeline(name)
            has_come = timeline.chosen >= chosen
            if has_come or self._clock() >= timeline.asked_until:
                self.overdue += not has_come
                del self._under_way[name]
                self._entries -= weight
