"""A storage group in one thread: pure replicas, engines in memory, a network that a seed makes unreliable."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from memory_engine import MemoryEngine
from timetier.cluster.counters import Counters
from timetier.cluster.keys import item_key, timeline_key
from timetier.cluster.messages import (
    OK,
    PUT,
    AskVersions,
    Message,
    PeerBatch,
    Settle,
    Settled,
    Versions,
    Write,
    Written,
    decode,
    encode,
    pack_i64,
    pack_u32,
    unpack_i64,
)
from timetier.cluster.paxos.core import Settings
from timetier.cluster.paxos.replica import VOTING, Replica
from timetier.cluster.storage.version_cache import HEADER_BYTES, ROW_BYTES, Owner, VersionCache

BUCKETS = 64
DIGEST_SEED = 5


def key_of(owner: str) -> bytes:
    return timeline_key(b"t", owner.encode(), BUCKETS)


def write_message(
    timeline: bytes,
    request_id: bytes,
    items: list[tuple[int, bytes, bytes]],
    *,
    seen: int = 0,
    if_version: int = -1,
    kinds: bytes | None = None,
    timeout_ms: int = 2000,
) -> Write:
    """One request with items (timestamp, id, value)."""
    return Write(
        1,
        [timeline],
        [request_id],
        pack_i64([seen]),
        pack_i64([if_version]),
        pack_u32([len(items)]),
        kinds if kinds is not None else bytes((PUT,)) * len(items),
        [item_key(t, i) for t, i, _ in items],
        [v for _, _, v in items],
        timeout_ms,
    )


@dataclass
class Member:
    """`memory`: of its version cache; a crash of the process leaves it as it is."""

    engine: MemoryEngine
    memory: bytearray = field(default_factory=lambda: bytearray(HEADER_BYTES + 8 * ROW_BYTES))
    replica: Replica | None = None
    boot: int = 0
    sync_at: float | None = None


@dataclass(order=True)
class Event:
    at: float
    number: int
    kind: str = field(compare=False)
    args: tuple[Any, ...] = field(compare=False)


class Group:
    """Three replicas. `run_until` moves time on; `call` sends a request and returns the answer when there is one."""

    def __init__(self, seed: int, *, replicas: int = 3, settings: Settings | None = None) -> None:
        self.random = random.Random(seed)
        self.settings = settings or Settings()
        self.replicas = replicas
        self.now = 0.0
        self.loss = 0.0
        self.double = 0.0
        self.delay_s = 0.001
        self.cut: set[frozenset[int]] = set()
        self.paused: dict[int, list[tuple[int, bytes]]] = {}  # who processes nothing for a while, and what waits there
        self.events: list[Event] = []
        self.number = 0
        self.answers: dict[int, Message] = {}
        self.tokens = 0
        self.members = [Member(MemoryEngine()) for _ in range(replicas)]
        for number in range(replicas):
            self.start(number)
        self.run_until(lambda: all(m.replica and m.replica.state == VOTING for m in self.members))

    # ---- members

    def start(self, number: int) -> None:
        member = self.members[number]
        member.boot += 1
        member.sync_at = None
        member.replica = Replica(
            replica=number,
            replicas=self.replicas,
            life=(number, 1, member.boot),
            buckets=BUCKETS,
            owned=range(BUCKETS),
            engine=member.engine,
            settings=self.settings,
            rng=random.Random(self.random.random()),
            wall_us=lambda: int(self.now * 1e6) + 1_000_000,
            counters=Counters(),
            past=range(1, member.boot),
            versions=VersionCache(member.memory, Owner(b"%d" % number, member.boot, member.boot - 1, DIGEST_SEED)),
        )
        self.pump(number)

    def crash(self, number: int) -> None:
        member = self.members[number]
        member.replica = None
        self.paused.pop(number, None)
        member.engine.crash(keep=self.random.randint(0, member.engine.unsynced))

    def pause(self, number: int) -> None:
        """The process stands still: neither messages nor time nor its disk reach it."""
        self.paused.setdefault(number, [])

    def resume(self, number: int) -> None:
        """All that came meanwhile comes at once."""
        for source, frame in self.paused.pop(number, []):
            self._on_peer(source, number, frame)

    def votes(self, number: int) -> bool:
        """Whether a replica takes requests."""
        replica = self.members[number].replica
        return replica is not None and replica.state == VOTING and number not in self.paused

    def replica(self, number: int) -> Replica:
        found = self.members[number].replica
        assert found is not None
        return found

    # ---- time

    def at(self, delay_s: float, kind: str, *args: Any) -> None:
        self.number += 1
        self.events.append(Event(self.now + delay_s, self.number, kind, args))

    def run_until(self, condition: Any, limit_s: float = 30.0) -> None:
        end = self.now + limit_s
        while not condition():
            assert self.now < end, "the group did not get there in time"
            self.step()

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.step()

    def step(self) -> None:
        """The next event, or the next millisecond."""
        self.events.sort()
        if self.events and self.events[0].at <= self.now + 0.001:
            event = self.events.pop(0)
            self.now = max(self.now, event.at)
            getattr(self, "_on_" + event.kind)(*event.args)
        else:
            self.now += 0.001
        for number, member in enumerate(self.members):
            replica = member.replica
            if replica is None or number in self.paused:
                continue
            if member.sync_at is not None and member.sync_at <= self.now:
                member.sync_at = None
                replica.durable(self.now, member.engine.sync())
                self.pump(number)
            if replica.next_due() <= self.now or replica.chores.pending:
                replica.run_chores(self.now)
                self.pump(number)

    def pump(self, number: int) -> None:
        member = self.members[number]
        replica = member.replica
        if replica is None:
            return
        replica.tick(self.now)
        output = replica.take(self.now)
        for token, answer in output.replies:
            self.at(self._delay(), "answer", token, encode(answer))
        for peer, batch in output.peers:
            self.deliver(number, peer, batch)
        member.engine.commit()
        if replica.waits_for_disk and member.sync_at is None:
            member.sync_at = self.now + self.random.uniform(0.0001, 0.002)

    def _delay(self) -> float:
        return self.random.uniform(0.0, 2 * self.delay_s)

    # ---- network

    def deliver(self, source: int, target: int, batch: PeerBatch) -> None:
        frame = encode(batch)
        if frozenset((source, target)) in self.cut or self.random.random() < self.loss:
            return
        self.at(self._delay(), "peer", source, target, frame)
        if self.random.random() < self.double:
            self.at(self._delay() * 20, "peer", source, target, frame)

    def _on_peer(self, source: int, target: int, frame: bytes) -> None:
        replica = self.members[target].replica
        message = decode(frame)
        assert isinstance(message, PeerBatch)
        if replica is not None and target in self.paused:
            self.paused[target].append((source, frame))
        elif replica is not None:
            replica.peer(self.now, source, message)
            self.pump(target)

    def _on_answer(self, token: int, frame: bytes) -> None:
        self.answers[token] = decode(frame)

    # ---- requests

    def send(self, number: int, message: Message) -> int:
        """Give a request to a replica; the token finds its answer in `answers`."""
        self.tokens += 1
        token = self.tokens
        replica = self.members[number].replica
        if replica is None or not self.votes(number):
            return -1
        if isinstance(message, Write):
            replica.write(self.now, token, message)
        elif isinstance(message, Settle):
            replica.settle(self.now, token, message)
        else:
            replica.ask(self.now, token, message)  # type: ignore[arg-type]
        self.pump(number)
        return token

    def call(self, number: int, message: Message) -> Message:
        token = self.send(number, message)
        assert token > 0, f"replica {number} takes no requests"
        self.run_until(lambda: token in self.answers)
        return self.answers.pop(token)

    def put(self, number: int, timeline: bytes, request_id: bytes, items: Any, **more: Any) -> tuple[int, int]:
        """(outcome, version) of one write request."""
        answer = self.call(number, write_message(timeline, request_id, items, **more))
        assert isinstance(answer, Written)
        return answer.outcomes[0], unpack_i64(answer.versions)[0]

    def version(self, timeline: bytes, asked: tuple[int, int] = (0, 1)) -> int:
        """Version by the strong-read rule, settling through the first replica asked where votes do not tell."""
        while True:
            answers: dict[int, tuple[int, Any]] = {}
            for number in (*asked, *(n for n in range(self.replicas) if n not in asked)):
                if not self.votes(number):
                    continue
                found = self.call(number, AskVersions([timeline]))
                assert isinstance(found, Versions)
                ballot = found.opens[0].ballot if found.opens else None
                answers[number] = (unpack_i64(found.chosen)[0], ballot)
                if len(answers) >= self.replicas // 2 + 1:
                    top = max(chosen for chosen, _ in answers.values())
                    opens = [b for chosen, b in answers.values() if chosen == top and b is not None]
                    if not opens:
                        return top
                    if any(opens.count(b) >= self.replicas // 2 + 1 for b in opens):
                        return top + 1
            settled = self.call(asked[0], Settle([timeline], pack_i64([top + 1]), 2000))
            assert isinstance(settled, Settled)
            if settled.outcomes[0] == OK:
                return unpack_i64(settled.versions)[0]
