"""Bounded queues in front of the threads that do a cold node's disk I/O: one for each disk.

A disk that hangs holds its own threads for as long as it likes, and nobody else's. How long the work of a disk has
been under way is counted in ticks of whoever looks on, not by a clock: a process that stands still, and its disks
with it, does not take them for hanging when it goes on.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from ..errors import Unavailable
from ..gate import overloaded

MAX_QUEUED_BYTES = 128 << 20  # of pieces to be written, over all disks
CLOSE_S = 5.0  # that work under way may take when a node stops
T = TypeVar("T")


class _Run:
    """One piece of work that a thread does. `ticks`: seen since it began, or since it has told that it goes on."""

    __slots__ = ("ticks",)

    def __init__(self) -> None:
        self.ticks = 0


_here = threading.local()


def goes_on() -> None:
    """Long work that consists of many reads or writes tells between two of them that it does not hang."""
    run: _Run | None = getattr(_here, "run", None)
    if run is not None:
        run.ticks = 0


class DiskLane:
    """A bounded queue in front of some threads: at most `limit` pieces of work run and wait at once, with at most
    `most_bytes` (or one piece)."""

    def __init__(self, name: str, threads: int, limit: int, most_bytes: int = MAX_QUEUED_BYTES) -> None:
        self.waiting = 0
        self.nbytes = 0
        self._make_pool: Callable[[], ThreadPoolExecutor] = lambda: ThreadPoolExecutor(threads, name)
        self._pool = self._make_pool()
        self._limit = limit
        self._most_bytes = most_bytes
        self._running: set[_Run] = set()
        self._answers: set[asyncio.Future[Any]] = set()

    async def run(self, work: Callable[[], T], nbytes: int = 0) -> T:
        """Result of `work` in a thread, which holds `nbytes` meanwhile. Raises Unavailable when too much waits."""
        if self.waiting >= self._limit or (self.nbytes and self.nbytes + nbytes > self._most_bytes):
            raise overloaded(f"{self.waiting} requests of {self.nbytes} bytes wait for this disk")
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()
        self.waiting += 1
        self.nbytes += nbytes
        self._answers.add(answer)
        try:
            done = loop.run_in_executor(self._pool, lambda: self._do(work))
            done.add_done_callback(lambda done: _pass_on(done, answer))
            return await answer
        finally:
            self._answers.discard(answer)
            self.waiting -= 1
            self.nbytes -= nbytes

    def _do(self, work: Callable[[], T]) -> T:
        run = _here.run = _Run()
        running = self._running
        running.add(run)
        try:
            return work()
        finally:
            running.discard(run)

    def tick(self) -> int:
        """Count one tick for all work under way; the most that one piece of it has seen."""
        runs = tuple(self._running)
        for run in runs:
            run.ticks += 1
        return max((run.ticks for run in runs), default=0)

    def release(self, reason: Unavailable) -> None:
        """Answer whoever waits, drop what has not begun, and go on with other threads: these may hang for ever."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._pool = self._make_pool()
        self._running = set()
        for answer in tuple(self._answers):
            if not answer.done():
                answer.set_exception(reason)

    async def close(self) -> None:
        """Wait for the work that is under way, for some seconds; what waits is dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._answers:
            await asyncio.wait(tuple(self._answers), timeout=CLOSE_S)


def _pass_on(done: asyncio.Future[T], answer: asyncio.Future[T]) -> None:
    """Have the answer be what a thread has found, unless it was given already."""
    if done.cancelled():
        answer.cancel()
    elif (error := done.exception()) is not None:
        if not answer.done():
            answer.set_exception(error)
    elif not answer.done():
        answer.set_result(done.result())


class DiskLanes:
    """A lane for each disk, by ordinal, and one for work that is not for one disk."""

    def __init__(self, name: str, disks: int, threads: int, limit: int) -> None:
        """`threads`, `limit`: of each lane."""
        ordinals = (*range(disks), None)
        self._lanes = {n: DiskLane(f"{name}-{n}", threads, limit, MAX_QUEUED_BYTES // disks) for n in ordinals}

    @property
    def waiting(self) -> int:
        """Pieces of work that run or wait."""
        return sum(lane.waiting for lane in self._lanes.values())

    async def run(self, work: Callable[[], T], nbytes: int = 0, *, disk: int | None = None) -> T:
        """As `DiskLane.run`, for a disk."""
        return await self._lanes[disk].run(work, nbytes)

    def tick(self, disk: int) -> int:
        """As `DiskLane.tick`, for a disk."""
        return self._lanes[disk].tick()

    def of(self, disk: int) -> DiskLane:
        """The lane of a disk."""
        return self._lanes[disk]

    def release(self, disk: int, reason: Unavailable) -> None:
        """As `DiskLane.release`, for a disk."""
        self._lanes[disk].release(reason)

    async def close(self) -> None:
        """As `DiskLane.close`, for all."""
        await asyncio.gather(*(lane.close() for lane in self._lanes.values()))
