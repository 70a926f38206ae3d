"""What a replica missed while it was away, as a script: it compares itself with a peer and fetches what it lacks.

It goes on while the replica votes and answers, so it goes at a pace: a few hundred entries are under way at a time,
some ten milliseconds of work at either end, and the next are asked for when those have come. Asked for all at once,
the answers would keep the node from everything else for seconds.
"""

from __future__ import annotations

from collections.abc import Callable

from ..effects import Call, CallFailed, Script, Sleep
from ..errors import ProtocolError, Unavailable
from ..messages import AskChosen, ChosenList, Failure, Message, unpack_i64
from ..paxos.replica import Replica
from .learning import Step

CALL_S = 5.0
COMPARED_AT_ONCE = 200
ENTRIES_UNDER_WAY = 400
ENTRIES_AN_ANSWER = 256  # at most; what a longer timeline lacks follows by itself
POLL_S = 0.004


def catch_up(step: Step, clock: Callable[[], float], peer: int, node: str) -> Script[int]:
    """Compare with replica `peer` at `node` and fetch what it has more of. How many timelines were behind.

    What does not come within the time of a fetch is left for the next comparison. Raises Unavailable, ProtocolError.
    """
    window = _Window(step, clock, peer)
    behind = 0
    question = AskChosen(0, b"")
    while question.bucket >= 0:
        (answer,) = yield [Call(node, question, CALL_S)]
        pairs, question = _pairs(node, answer)
        for start in range(0, len(pairs), COMPARED_AT_ONCE):
            missing = _missing(step, pairs[start : start + COMPARED_AT_ONCE])
            behind += len(missing)
            for name, chosen, entries in missing:
                yield from window.fetch(name, chosen, entries)
            yield Sleep(0)
    yield from window.drain(0)
    return behind


def _pairs(node: str, answer: Message | CallFailed) -> tuple[list[tuple[bytes, int]], AskChosen]:
    """Timelines of a peer's answer with its chosen versions, and the question that goes on from there."""
    if isinstance(answer, CallFailed):
        raise Unavailable(f"{node}: {answer.reason}")
    if not isinstance(answer, ChosenList):
        told = answer.message if isinstance(answer, Failure) else f"it answered with a {type(answer).__name__}"
        raise Unavailable(f"{node}: {told}")
    chosen = unpack_i64(answer.chosen)
    if len(chosen) != len(answer.timelines):
        raise ProtocolError(f"{node} answered {len(chosen)} versions of {len(answer.timelines)} timelines")
    return list(zip(answer.timelines, chosen, strict=True)), AskChosen(answer.next_bucket, answer.next_cursor)


def _missing(step: Step, pairs: list[tuple[bytes, int]]) -> list[tuple[bytes, int, int]]:
    """(timeline, version of the peer, entries that this replica lacks) of those that are behind."""

    def compare(replica: Replica) -> list[tuple[bytes, int, int]]:
        found = [(name, chosen, chosen - replica.core.timeline(name).chosen) for name, chosen in pairs]
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
            if timeline.chosen >= chosen or self._clock() >= timeline.asked_until:
                del self._under_way[name]
                self._entries -= weight
