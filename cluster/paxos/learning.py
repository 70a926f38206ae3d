"""Rejoin of a replica that has lost its data: what it copies so that it may vote again (*pure*).

Such a replica could break promises that it no longer knows. It comes back under a new incarnation (DESIGN section 3):

1. every other replica notes that incarnation durably and from then on refuses all messages and votes of earlier ones;
2. the learner asks each of them, timeline by timeline, how far it has chosen, and what it has promised and accepted
   for the entry after. It catches up to that version, takes the highest promise as its own, and keeps the highest
   accepted value as *knowledge*: it tells of it in promises like of an acceptance of its own, but it is no vote;
3. it compares digests with them; 4. it votes.

Why that is enough: whatever an earlier vote of the lost replica has helped to decide was counted by a proposer, and
its majority had another member, which still has the acceptance or promise on disk. That member is one of those asked,
and it was asked after it began to refuse the old votes. A value that is known at ballot b was proposed at b, so telling
of it where nobody else has accepted above b leads a later proposer to a value that Paxos allows it. Counted as a vote,
it could make a majority that never was.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

import msgspec

from ..errors import ProtocolError
from ..keys import bucket_of, bucket_prefix
from ..messages import NO_BALLOT, AcceptedList, AskAccepted, Ballot, Value, pack_i64, unpack_i64
from .acceptor import Acceptor
from .core import Core
from .rows import LEARNING_KEY
from .timeline import Timeline

TIMELINES_PER_ANSWER = 500
BYTES_PER_ANSWER = 4 << 20
FETCHES_AT_ONCE = 64  # a peer answers each with up to `Settings.transfer_bytes`
DONE = -1  # bucket of a position behind the last one


class Position(msgspec.Struct, array_like=True):
    """Where copying from one peer goes on; bucket `DONE` at the end."""

    bucket: int = 0
    cursor: bytes = b""


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What one peer had of one timeline when it was asked."""

    timeline: bytes
    chosen: int
    promised: Ballot
    accepted: Ballot
    value: Value | None


class Learning:
    """Both ends of a rejoin, for all timelines of one replica."""

    def __init__(self, core: Core, acceptor: Acceptor) -> None:
        self.core = core
        self.acceptor = acceptor
        self._wanted: list[_Wanted] = []

    # ---- the end that has

    def accepted_list(self, message: AskAccepted, owned: Set[int]) -> tuple[AcceptedList, int]:
        """Answer, and the engine batch that must be durable before it leaves."""
        self.core.mark_all()
        answer = AcceptedList([], b"", [], [], [], DONE, b"", self.core.life)
        chosen: list[int] = []
        size = after = 0
        start = b"M" + (message.cursor or bucket_prefix(max(message.bucket, 0)))
        for name, _ in self.core.engine.scan(start, b"N"):
            key = name[1:]
            if bucket_of(key) not in owned:
                continue
            if len(chosen) >= TIMELINES_PER_ANSWER or size >= BYTES_PER_ANSWER:
                answer.next_bucket, answer.next_cursor = bucket_of(key), key
                break
            timeline = self.core.timeline(key)
            value = self.acceptor.accepted_value(timeline)
            answer.timelines.append(key)
            chosen.append(timeline.chosen)
            answer.promised.append(timeline.promised)
            answer.accepted.append(timeline.accepted)
            answer.values.append(value)
            size += 100 + (0 if value is None else sum(map(len, value.values)) + sum(map(len, value.keys)))
            after = max(after, timeline.dirty)
        answer.chosen = pack_i64(chosen)
        return answer, after

    # ---- the end that lacks

    def position(self, peer: int) -> Position:
        """Where copying from a peer goes on, also after a restart."""
        return self._positions().get(peer, Position())

    def take(self, answer: AcceptedList) -> None:
        """Take note of what a peer has; `advance` fetches it. Raises ProtocolError when its columns don't fit."""
        chosen = unpack_i64(answer.chosen)
        columns = (chosen, answer.promised, answer.accepted, answer.values)
        if {len(column) for column in columns} != {len(answer.timelines)}:
            raise ProtocolError("an AcceptedList whose columns are not of one length")
        if any((a == NO_BALLOT) != (v is None) for a, v in zip(answer.accepted, answer.values, strict=True)):
            raise ProtocolError("an AcceptedList with an accepted ballot and no value, or the other way round")
        self._wanted = [_Wanted(*row) for row in zip(answer.timelines, *columns, strict=True)]

    def advance(self, peer: int, now: float) -> int:
        """Fetch what is missing from `peer`, adopt what has come; call it until it says that nothing is left."""
        left = []
        fetching = 0
        for wanted in self._wanted:
            timeline = self.core.timeline(wanted.timeline)
            if timeline.chosen >= wanted.chosen:
                self._adopt(timeline, wanted)
                continue
            left.append(wanted)
            if fetching < FETCHES_AT_ONCE:
                self.acceptor.fetch(timeline, peer, now)
                fetching += 1
        self._wanted = left
        return len(left)

    def _adopt(self, timeline: Timeline, wanted: _Wanted) -> None:
        """Make the peer's promise this replica's own, and its accepted value knowledge."""
        assert timeline.proposal is None, "a learner proposes nothing"
        if timeline.chosen > wanted.chosen:
            return  # decided meanwhile, without any vote of the lost life
        if wanted.accepted > timeline.accepted and wanted.value is not None:
            self.acceptor.learn(timeline, wanted.accepted, wanted.value)
        promised = max(wanted.promised, wanted.accepted)
        if promised > timeline.promised:
            self.acceptor.promise(timeline, promised)

    def note_position(self, peer: int, position: Position) -> None:
        """Everything up to here was adopted from a peer. The engine keeps order: if this is on disk, that is too."""
        positions = self._positions()
        positions[peer] = position
        self.core.engine.put(LEARNING_KEY, _encoder.encode(positions))

    def forget_positions(self) -> None:
        """The rejoin is over."""
        self.core.engine.delete(LEARNING_KEY)

    def _positions(self) -> dict[int, Position]:
        row = self.core.engine.get(LEARNING_KEY)
        return _decoder.decode(row) if row is not None else {}


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(dict[int, Position])
