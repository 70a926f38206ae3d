"""The rejoin of a replica that has lost its data, as a script: fence, copy, verify (see `paxos/learning.py`).

It goes on while the group reads and writes, at a bounded rate, and where it stopped after a restart. Whatever does
not answer is asked again: the rejoin waits, and says in `progress` what for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from ..effects import Call, CallFailed, Script, Sleep
from ..keys import bucket_of, system_timeline
from ..messages import (
    NO_LIFE,
    AcceptedList,
    AskAccepted,
    AskDigests,
    AskLives,
    Digests,
    Failure,
    Lives,
    Message,
    Settle,
    pack_i64,
    unpack_i64,
)
from ..paxos.digests import DIGEST_BYTES
from ..paxos.learning import DONE, Position
from ..paxos.replica import Replica

T = TypeVar("T")

CALL_S = 10.0
ASK_S = 2.0
RETRY_S = 0.5
POLL_S = 0.02
STUCK_S = 5.0
SETTLE_ROUNDS = 100
VERIFY_ATTEMPTS = 10  # questions to a peer that does not answer, before the other one's word is enough


@dataclass(slots=True)
class Progress:
    """What `status` shows. `phase`: `asking`, `fencing`, `copying`, `verifying`. `buckets_done`: of `buckets`, in this
    phase and with this `peer`. `mended`: timelines whose digest differed, and that were copied again."""

    phase: str = "asking"
    peer: int = -1
    timelines: int = 0
    bytes: int = 0
    buckets_done: int = 0
    buckets: int = 0
    verified: int = 0
    mended: int = 0
    reason: str = ""


class Step(Protocol):
    """Lets the replica do something, as one step of its node. Raises when that life has ended."""

    def __call__(self, work: Callable[[Replica], T]) -> T: ...


def ask_lives(nodes: dict[int, str], progress: Progress) -> Script[list[Lives]]:
    """Who the peers are, and which lives they have noted, as soon as all of them vote.

    Only all of them together know what the votes of a lost replica have helped to decide.
    """
    while True:
        answers = yield [Call(node, AskLives(), ASK_S) for node in nodes.values()]
        missing = ""
        noted = [life for answer in answers if isinstance(answer, Lives) for life in answer.noted]
        for (peer, node), answer in zip(nodes.items(), answers, strict=True):
            if not isinstance(answer, Lives) or not answer.votes:
                missing = f"{node}: {answer.reason}" if isinstance(answer, CallFailed) else node
            elif answer.life < max([life for life in noted if life[0] == peer], default=NO_LIFE):
                missing = f"{node}: what answers is a life of it that is over"
        if not missing:
            progress.reason = ""
            return list(answers)
        progress.reason = f"waiting for both peers to vote, because only together they know all: {missing}"
        yield Sleep(RETRY_S)


class Rejoin:
    """One rejoin. `nodes`: peers by replica number. `bytes_per_s`: how fast it copies at the most."""

    def __init__(
        self, step: Step, clock: Callable[[], float], nodes: dict[int, str], bytes_per_s: float, progress: Progress
    ) -> None:
        self._step = step
        self._clock = clock
        self._nodes = nodes
        self._bytes_per_s = bytes_per_s
        self.progress = progress

    def script(self) -> Script[None]:
        """Ends when the replica has everything, verified; it is then for the node to make it durable, and to vote."""
        self.progress.buckets = self._step(lambda replica: len(replica.owned))
        yield from self._wait_until_fenced()
        for peer in self._nodes:
            yield from self._copy(peer)
        verified = 0
        while not verified:
            for peer in self._nodes:
                verified += yield from self._verify(peer)

    # ---- fence

    def _wait_until_fenced(self) -> Script[None]:
        """Until every peer has noted this life durably, and so refuses what earlier ones have sent."""
        self.progress.phase = "fencing"
        while missing := set(self._nodes) - self._step(lambda replica: set(replica.confirmed)):
            self.progress.reason = f"waiting for {', '.join(self._nodes[peer] for peer in sorted(missing))}"
            yield Sleep(POLL_S)
        self.progress.reason = ""

    # ---- copy

    def _copy(self, peer: int) -> Script[None]:
        life = self._step(lambda replica: replica.core.life)
        position = self._step(lambda replica: replica.learning.position(peer))
        self._begin("copying", peer)
        while position.bucket != DONE:
            self._note_bucket(position.bucket)
            answer = yield from self._ask(peer, AskAccepted(life, position.bucket, position.cursor))
            if not isinstance(answer, AcceptedList) or not self._is_of_its_life(peer, answer):
                yield Sleep(RETRY_S)
                continue
            before = self._received()
            self._step(lambda replica, answer=answer: replica.learning.take(answer))  # type: ignore[misc]
            if not (yield from self._advance(peer)):
                continue
            position = Position(answer.next_bucket, answer.next_cursor)
            self._step(lambda replica, to=position: replica.learning.note_position(peer, to))  # type: ignore[misc]
            self.progress.timelines += len(answer.timelines)
            copied = self._received() - before
            self.progress.bytes += copied
            yield Sleep(copied / self._bytes_per_s)
        self.progress.buckets_done = self.progress.buckets

    def _advance(self, peer: int) -> Script[bool]:
        """Get what was taken note of. False if nothing comes any more: a peer that restarts may have forgotten that its
        last entry was chosen, and then what it has is to be asked anew."""
        left, moved_at = (-1, -1), self._clock()
        while now_left := self._step(lambda replica: replica.learning.advance(peer, self._clock())):
            received = self._received()
            if (now_left, received) != left:
                left, moved_at = (now_left, received), self._clock()
            elif self._clock() >= moved_at + STUCK_S:
                return False
            yield Sleep(POLL_S)
        return True

    def _is_of_its_life(self, peer: int, answer: AcceptedList | Digests) -> bool:
        """Whether the peer that was fenced has answered, and not an old process of it."""
        known = self._step(lambda replica: replica.core.lives.get(peer))
        if answer.life != known:
            self.progress.reason = f"{self._nodes[peer]}: life {answer.life} answers, {known} is known"
        return answer.life == known

    def _received(self) -> int:
        return self._step(lambda replica: replica.core.counters.totals.get("catch_up_bytes", 0))

    # ---- verify

    def _verify(self, peer: int) -> Script[bool]:
        """Compare everything with a peer and mend what differs. False if the peer does not answer any more."""
        self._begin("verifying", peer)
        question = AskDigests(0, b"")
        failures = 0
        while question.bucket != DONE:
            self._note_bucket(question.bucket)
            answer = yield from self._ask(peer, question)
            if not isinstance(answer, Digests) or not self._is_of_its_life(peer, answer):
                failures += 1
                if failures >= VERIFY_ATTEMPTS:
                    return False
                yield Sleep(RETRY_S)
                continue
            failures = 0
            self.progress.verified += len(answer.timelines)
            question = AskDigests(answer.next_bucket, answer.next_cursor)
            asked_before = False
            rounds = 0
            while again := self._compare(peer, answer):
                yield Sleep(POLL_S)
                # As of the version that was told, where this replica is by then: of a timeline that is written all the
                # time the present one is always ahead. Every other time of the present one, should that be gone.
                asked_before = not asked_before
                told = dict(zip(answer.timelines, unpack_i64(answer.versions), strict=True))
                rounds += 1
                if not rounds % SETTLE_ROUNDS:
                    # It may have forgotten in a restart that its last entry was chosen, which this replica knows.
                    entries = pack_i64([told[key] + 1 for key in again])
                    yield from self._ask(peer, Settle(again, entries, int(1000 * ASK_S)))
                at = [told[key] if asked_before else -1 for key in again]
                found = yield from self._ask(peer, AskDigests(0, b"", again, pack_i64(at)))
                if isinstance(found, Digests) and self._is_of_its_life(peer, found):
                    answer = found
                else:
                    failures += 1
                    if failures >= VERIFY_ATTEMPTS:
                        return False
                    yield Sleep(RETRY_S)
        self.progress.buckets_done = self.progress.buckets
        return True

    def _compare(self, peer: int, answer: Digests) -> list[bytes]:
        """Timelines that are not proven equal yet. What is missing here is fetched, what differs is copied again."""
        versions, systems = unpack_i64(answer.versions), unpack_i64(answer.systems)
        left = []
        for index, key in enumerate(answer.timelines):
            theirs = answer.digests[DIGEST_BYTES * index : DIGEST_BYTES * (index + 1)]
            if not self._is_equal(peer, key, versions[index], systems[index], theirs):
                left.append(key)
        return left

    def _is_equal(self, peer: int, key: bytes, version: int, system_version: int, theirs: bytes) -> bool:
        def compare(replica: Replica) -> bool:
            now = self._clock()
            behind = replica.note_behind(now, peer, key, version)
            behind |= replica.note_behind(now, peer, system_timeline(bucket_of(key)), system_version)
            system = replica.core.timeline(system_timeline(bucket_of(key)))
            if version < 0 or behind or system.chosen != system_version:
                return False
            timeline = replica.core.timeline(key)
            mine, _ = replica.digests.of(timeline, version)
            if mine is not None and mine != theirs and now >= timeline.asked_until:
                replica.catch_up.mend(timeline, peer, now)
                self.progress.mended += 1
            return mine == theirs

        return self._step(compare)

    # ---- asking

    def _ask(self, peer: int, message: Message) -> Script[Message | None]:
        (answer,) = yield [Call(self._nodes[peer], message, CALL_S)]
        if isinstance(answer, CallFailed):
            self.progress.reason = f"{answer.node}: {answer.reason}"
            return None
        if isinstance(answer, Failure):
            self.progress.reason = f"{self._nodes[peer]}: {answer.message}"
            return None
        self.progress.reason = ""
        found: Message = answer
        return found

    def _begin(self, phase: str, peer: int) -> None:
        self.progress.phase, self.progress.peer, self.progress.buckets_done = phase, peer, 0

    def _note_bucket(self, bucket: int) -> None:
        owned = self._step(lambda replica: replica.owned)
        self.progress.buckets_done = sum(1 for one in owned if one < bucket)
