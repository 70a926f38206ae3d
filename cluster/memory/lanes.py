"""Merging of reads: what arrives while a batch is under way forms the next batch."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from ..config import CacheConfig
from .requests import Read

_FETCH_BYTES = 32 << 20  # what the answers to one fetch may hold
_HEAVY_BYTES = 16 << 20  # what a job that reads blocks or one large page may hold
_MAX_LOOKED_AT = 4  # batches' worth of queued reads that are looked at for one batch


@dataclass(frozen=True, slots=True)
class ReadLimits:
    """Limits of a cache node's lanes.

    `batch_reads`: reads of the fast lane that one version check proves at the most. `fetch_reads`: the same of a fetch
    from the storage tier. `fetched_bytes`: what fetches and block reads under way may hold together; it bounds their
    numbers. `stall_s`: a batch that takes longer no longer holds up the next one. `block_reads`: under way at a time at
    the cold nodes, of all pages.
    """

    batch_reads: int = 4_096
    fetch_reads: int = 64
    fetched_bytes: int = 512 << 20
    stall_s: float = 0.02
    block_reads: int = 32

    @property
    def max_fetches(self) -> int:
        """Fetches at a time at the most: half of the bytes are theirs."""
        return max(1, self.fetched_bytes // 2 // _FETCH_BYTES)

    @property
    def max_heavy_jobs(self) -> int:
        """Jobs that read blocks or one large page at a time at the most: the other half is theirs."""
        return max(1, self.fetched_bytes // 2 // _HEAVY_BYTES)


def limits_of(config: CacheConfig) -> ReadLimits:
    """The limits from the configuration."""
    return ReadLimits(
        batch_reads=config.batch_reads,
        fetch_reads=config.fetch_reads,
        fetched_bytes=config.max_fetched_mb << 20,
        stall_s=config.stall_ms / 1_000,
        block_reads=config.block_reads,
    )


class ReadLane:
    """A queue of reads of which `parallel` batches are under way at a time.

    A batch that takes longer than `stall_s` (a replica is paused, say) no longer holds up the next one, as long as
    fewer than `max_batches` are under way. `one_per_timeline`: a timeline is in one batch at a time, so that what
    one fetch brings is there for the reads that came meanwhile.
    """

    def __init__(
        self,
        run: Callable[[list[Read]], Awaitable[None]],
        *,
        parallel: int,
        batch_reads: int,
        max_batches: int,
        stall_s: float,
        one_per_timeline: bool,
    ) -> None:
        """`run` answers a batch, or passes it on; it raises nothing."""
        self._run = run
        self._parallel = parallel
        self._batch_reads = batch_reads
        self._max_batches = max_batches
        self._stall_s = stall_s
        self._one_per_timeline = one_per_timeline
        self._queue: deque[Read] = deque()
        self._busy: set[bytes] = set()
        self._holding = 0  # batches that hold up the next one
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._queue)

    def put(self, reads: Iterable[Read]) -> None:
        """Queue reads; they start at once if nothing holds them up."""
        self._queue.extend(reads)
        self._pump()

    async def stop(self) -> None:
        """Give up the batches under way and what is queued."""
        self._queue.clear()
        self._max_batches = 0
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _pump(self) -> None:
        while self._queue and self._holding < self._parallel and len(self._tasks) < self._max_batches:
            batch = self._take()
            if not batch:
                return
            self._holding += 1
            timelines = {read.timeline for read in batch} if self._one_per_timeline else set()
            self._busy |= timelines
            task = asyncio.create_task(self._carry_out(batch, timelines))
            self._tasks.add(task)
            task.add_done_callback(self._finished)

    def _take(self) -> list[Read]:
        queue = self._queue
        if not self._one_per_timeline:
            return [queue.popleft() for _ in range(min(self._batch_reads, len(queue)))]
        batch: list[Read] = []
        passed: list[Read] = []
        for _ in range(min(self._batch_reads * _MAX_LOOKED_AT, len(queue))):
            read = queue.popleft()
            (passed if read.timeline in self._busy else batch).append(read)
            if len(batch) == self._batch_reads:
                break
        queue.extendleft(reversed(passed))
        return batch

    async def _carry_out(self, batch: list[Read], timelines: set[bytes]) -> None:
        holds = True

        def let_others_pass() -> None:
            nonlocal holds
            if holds:
                holds = False
                self._holding -= 1
            self._pump()

        timer = asyncio.get_running_loop().call_later(self._stall_s, let_others_pass)
        try:
            await self._run(batch)
        finally:
            timer.cancel()
            self._busy -= timelines
            let_others_pass()

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._pump()  # for a queue that waits for the number of batches to fall
