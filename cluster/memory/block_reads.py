"""Reading cold blocks, each from whichever of its replicas has good bytes (*pure*, scripts of `effects.py`).

A reader wants the rows of one owner, which are a small part of most blocks. So a cold node is asked for these alone: it
reads and checks the whole block, and answers with a small one (`DecodedBlock.part_of`). Fewer bytes travel, and the
reader's event loop has less to decode. An answer with the whole block is as good.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import google_crc32c

from ..cold.block import DecodedBlock, decode_block
from ..cold.block_cache import BlockCache
from ..cold.disk import DISK_REASON
from ..counters import Counters
from ..effects import Call, CallFailed, Script, Sleep
from ..errors import Corrupt, Unavailable
from ..messages import BlockBytes, BlockRead, Failure, LinkRef, Message
from ..routing import Routing
from ..suspicion import Suspicion
from .hot_cold import StartOver
from .shared_reads import NO_TURN

MAX_PARALLEL_BLOCKS = 4
_LARGE_BYTES = 256 << 10  # a block that takes a while to decode
_MISSING = "missing"  # `reason` of a cold node's Corrupt: it has no such file


@dataclass(slots=True)
class _Attempt:
    """The search for one good copy. `dead`, `away`, `missing`, `damaged`: copies tried without success since the start.

    `away`: on a disk that its node has taken out, or is filling; perhaps the node has no such file either.
    """

    ref: LinkRef
    owner: bytes
    order: list[str]
    tried: int = 0
    dead: int = 0
    away: int = 0
    missing: int = 0
    damaged: int = 0
    block: DecodedBlock | None = None

    @property
    def node(self) -> str:
        return self.order[self.tried]

    def question(self, left_s: float) -> BlockRead:
        ref = self.ref
        left_ms = max(1, int(left_s * 1_000))
        return BlockRead(ref.file, ref.offset, ref.length, ref.crc, self.owner, ref.format, left_ms)


class BlockReader:
    """Gets what blocks have of an owner, decoded, from memory or from the cold tier."""

    def __init__(
        self,
        routing: Routing,
        blocks: BlockCache[DecodedBlock],
        suspicion: Suspicion,
        counters: Counters,
        *,
        clock: Callable[[], float],
        attempt_timeout_s: float,
        back_off_s: float,
    ) -> None:
        self.routing = routing
        self._blocks = blocks
        self._suspicion = suspicion
        self._counters = counters
        self._clock = clock
        self._attempt_timeout_s = attempt_timeout_s
        self._back_off_s = back_off_s

    def kept(self, ref: LinkRef, owner: bytes) -> DecodedBlock | None:
        """A block with the owner's rows if it is in memory; it may have those of others, too."""
        block = self._blocks.get(ref.file, ref.offset, owner)
        return block if block is not None else self._blocks.get(ref.file, ref.offset)

    def read(
        self, refs: list[LinkRef], owner: bytes, deadline: float, wanted: Callable[[], bool] = lambda: True
    ) -> Script[list[DecodedBlock]]:
        """Blocks of `refs`, with the rows of `owner` at least, in their order, at most MAX_PARALLEL_BLOCKS at a time.

        `wanted`: whether anybody still waits for them. Raises StartOver when a file is gone from all replicas, Corrupt
        when every copy is damaged, Unavailable at the deadline (monotonic seconds), or when nobody waits.
        """
        blocks = []
        for first in range(0, len(refs), MAX_PARALLEL_BLOCKS):
            blocks += yield from self._read_some(refs[first : first + MAX_PARALLEL_BLOCKS], owner, deadline, wanted)
        return blocks

    def _read_some(
        self, refs: list[LinkRef], owner: bytes, deadline: float, wanted: Callable[[], bool]
    ) -> Script[list[DecodedBlock]]:
        attempts = [self._attempt(ref, owner) for ref in refs]
        timeout_s, pause_s = self._attempt_timeout_s, self._back_off_s
        while True:
            open_attempts = [attempt for attempt in attempts if attempt.block is None]
            if not open_attempts:
                return [attempt.block for attempt in attempts if attempt.block is not None]
            left_s = deadline - self._clock()
            if left_s <= 0:
                first = open_attempts[0].ref
                raise Unavailable(f"no replica gave the block of {first.file} at {first.offset} in time")
            if not wanted():
                self._counters.add("abandoned_block_reads", len(open_attempts))
                raise Unavailable("nobody waits for these blocks any more")
            replies = yield [Call(a.node, a.question(left_s), min(timeout_s, left_s)) for a in open_attempts]
            rested = False
            for attempt, reply in zip(open_attempts, replies, strict=True):
                self._take(attempt, reply)
                if attempt.block is not None and attempt.block.nbytes > _LARGE_BYTES:
                    yield Sleep(0.0)  # to decode one took a while: others have their turn before the next step
                if attempt.block is None and attempt.tried == len(attempt.order):
                    self._start_over(attempt)
                    rested = True
            if rested:
                yield Sleep(pause_s)
                pause_s, timeout_s = pause_s * 2, timeout_s * 2

    def _attempt(self, ref: LinkRef, owner: bytes) -> _Attempt:
        order = self._suspicion.last(self.routing.cold_order(ref.bucket, ref.window_start))
        return _Attempt(ref, owner, order, block=self.kept(ref, owner))

    def _take(self, attempt: _Attempt, reply: Message | CallFailed) -> None:
        """Note what one replica brought; without a good block, the next one is up."""
        node, ref = attempt.node, attempt.ref
        self._counters.add("cold_reads")
        attempt.tried += 1
        if isinstance(reply, BlockBytes):
            self._suspicion.trust(node)
            kept = self.kept(ref, attempt.owner)  # by another script that shared the same read
            block = kept if kept is not None else self._decode(ref, reply)
            if block is not None:
                attempt.block = block
                self._blocks.put(ref.file, ref.offset, block, attempt.owner if reply.part else b"")
            else:
                attempt.damaged += 1
        elif isinstance(reply, Failure) and reply.kind == Corrupt.__name__:
            self._suspicion.trust(node)
            if reply.fields.get("reason") == _MISSING:
                attempt.missing += 1
            else:
                self._counters.add("crc_failures")
                attempt.damaged += 1
        elif isinstance(reply, Failure) and reply.fields.get("reason") == DISK_REASON:
            self._suspicion.trust(node)  # its other disks are well
            attempt.away += 1
        else:
            attempt.dead += 1
            if not (isinstance(reply, CallFailed) and reply.reason == NO_TURN):
                self._suspicion.blame(node, reply)

    def _decode(self, ref: LinkRef, answer: BlockBytes) -> DecodedBlock | None:
        """The block, or None if the bytes are not those that the link names, or that the node has made of them."""
        length, crc = (len(answer.data), answer.crc) if answer.part else (ref.length, ref.crc)
        if len(answer.data) != length or google_crc32c.value(answer.data) != crc:
            self._counters.add("crc_failures")
            return None
        try:
            return decode_block(answer.data, ref.format)
        except Corrupt as error:  # as it was written, so every replica has the same
            raise Corrupt(
                f"the block of {ref.file} at offset {ref.offset} can't be decoded: {error.message}",
                file=ref.file,
                offset=ref.offset,
            ) from None

    @staticmethod
    def _start_over(attempt: _Attempt) -> None:
        """All replicas were tried: give up if none of them can help, else ask all of them again."""
        if not attempt.dead:
            if attempt.missing and attempt.away:
                # Most likely a later generation has replaced it. If not, it is on the disk that is out: not lost.
                raise StartOver(f"{attempt.ref.file} is on no disk that can be read, but a link names it")
            if attempt.missing:
                # A later generation has replaced it.
                ref = attempt.ref
                reason = f"the block of {ref.file} at offset {ref.offset} is on no cold node, but a link names it"
                raise StartOver(reason, file=ref.file, offset=ref.offset)
            if not attempt.away:
                raise damaged(attempt.ref)
        attempt.tried = attempt.dead = attempt.away = attempt.missing = attempt.damaged = 0


def damaged(ref: LinkRef) -> Corrupt:
    """The error of a block without a good copy."""
    return Corrupt(
        f"the block of {ref.file} at offset {ref.offset} ({ref.length} bytes) is damaged on every replica",
        file=ref.file,
        offset=ref.offset,
    )
