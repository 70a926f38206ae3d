"""A storage group of which a script holds back, releases and makes up single messages between replicas."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from replica_group import Group, key_of, write_message
from timetier.cluster.cold.link import FORMAT, Link, encode_link
from timetier.cluster.keys import bucket_of, item_key, priority, system_timeline
from timetier.cluster.messages import (
    DELTA,
    NO_BALLOT,
    OK,
    PUT,
    Accept,
    Ballot,
    Check,
    Checked,
    PeerBatch,
    PeerMessage,
    State,
    Value,
    Write,
    pack_i64,
    pack_u32,
)
from timetier.cluster.paxos.core import Settings

ALICE = key_of("alice")
BUCKET = bucket_of(ALICE)
SYSTEM = system_timeline(BUCKET)
FIRST, SECOND, THIRD = priority(ALICE, 3)
SMALL = Settings(request_id_entries=8, log_keep_entries=8)
WRONG_BUCKET = bytes((ALICE[0], ALICE[1], ALICE[2], ALICE[3] ^ 1)) + ALICE[4:]
NO_KEYS = [b"", b"\0", ALICE[:4], ALICE[:5], ALICE[:-1], ALICE + b"x", WRONG_BUCKET]


def rid(number: int) -> bytes:
    return number.to_bytes(16, "big")


class Scripted(Group):
    """A group of which a script holds back single messages between replicas, to release them when it likes."""

    def __init__(self, seed: int, settings: Settings | None = None) -> None:
        self.holds: Callable[[int, int, PeerMessage], bool] = lambda _s, _t, _m: False
        self.held: list[tuple[int, int, PeerBatch]] = []
        super().__init__(seed, settings=settings)

    def deliver(self, source: int, target: int, batch: PeerBatch) -> None:
        held = [message for message in batch.messages if self.holds(source, target, message)]
        free = [message for message in batch.messages if not self.holds(source, target, message)]
        self.held += [(source, target, self._batch(batch, [message])) for message in held]
        super().deliver(source, target, self._batch(batch, free))

    @staticmethod
    def _batch(batch: PeerBatch, messages: list[PeerMessage]) -> PeerBatch:
        return PeerBatch(batch.life, batch.incarnation_seen, batch.boot_seen, messages, batch.past)

    def release(self) -> None:
        self.holds = lambda _s, _t, _m: False
        held, self.held = self.held, []
        for source, target, batch in held:
            super().deliver(source, target, batch)

    def inject(self, source: int, target: int, *messages: PeerMessage) -> None:
        """Have a replica take messages from another, now."""
        life = self.replica(target).core.life
        batch = PeerBatch(self.replica(source).core.life, life[1], life[2], list(messages))
        self.replica(target).peer(self.now, source, batch)
        self.pump(target)

    def cut_off(self, number: int) -> None:
        self.cut = {frozenset((number, other)) for other in range(3) if other != number}

    def put_many(self, number: int, first: int, last: int, value: bytes = b"x") -> None:
        """Entries first .. last, one item each with its entry as timestamp."""
        for entry in range(first, last + 1):
            assert self.put(number, ALICE, rid(entry), [(entry, b"", value)], seen=entry - 1) == (OK, entry)

    def chosen(self, number: int, timeline: bytes = ALICE) -> int:
        return self.replica(number).core.timeline(timeline).chosen

    def shown(self, number: int) -> dict[bytes, bytes]:
        message = Check([ALICE], pack_i64([-1]), bytes((DELTA,)), [b""], pack_u32([10_000]))
        answer = self.call(number, message)
        assert isinstance(answer, Checked)
        return {k: v for kind, k, v in zip(answer.kinds, answer.keys, answer.values, strict=True) if kind == PUT}


def state_of(version: int, *, needs_system: int = 0) -> State:
    rows = [item_key(1) + version.to_bytes(8, "big")]
    return State(ALICE, version, NO_BALLOT, (-1, 0, 0), 0, needs_system, [], b"", b"", rows, [bytes(9) + b"old"])


def link_message(system_version: int, value: bytes | None = None, key: bytes | None = None) -> Write:
    empty = np.array([], dtype="<u8").tobytes()
    link = Link(FORMAT, BUCKET, b"t", 0, 100, 1, 0, 0, empty, empty, 0, 0, "run", [])
    message = write_message(SYSTEM, rid(1000 + system_version), [(0, b"", b"")], seen=system_version)
    message.keys = [key if key is not None else link.key]
    message.values = [value if value is not None else encode_link(link)]
    return message


def open_accept(group: Scripted, number: int, ballot: Ballot, value: bytes, *, entry: int = 2) -> None:
    """Have a replica accept one item at a ballot for an entry, as from the ballot's owner."""
    content = Value(ballot[1], 0, [value * 16], bytes((PUT,)), [item_key(ord(value))], [value])
    before = group.replica(number).core.timeline(ALICE).ballot
    group.inject(ballot[1][0], number, Accept(ALICE, entry, ballot, before, content))
