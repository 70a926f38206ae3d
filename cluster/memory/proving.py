"""The lane of reads that pages in memory cover: one proof under way, what arrives meanwhile shares the next one."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass

from .pages import Page

_Glimpse = tuple[list[Page], asyncio.Future[Collection[Page]]]


@dataclass(slots=True, eq=False)
class _Proof:
    """One proof under way. `holds`: whether the next one waits for it."""

    began_s: float
    holds: bool = True


class ProofLane:
    """Merges pages that are to be proven, at most `batch_pages` at a time unless one message alone has more.

    `parallel` proofs are under way at a time. One that takes longer than `stall_s` (a replica is paused, say) no longer
    holds up the next, as long as fewer than `max_batches` are under way.
    """

    def __init__(
        self,
        prove: Callable[[list[Page]], Awaitable[Collection[Page]]],
        *,
        parallel: int,
        batch_pages: int,
        max_batches: int,
        stall_s: float,
    ) -> None:
        """`prove` gives those of the pages that are not proven; it raises nothing but cancellation."""
        self._prove = prove
        self._parallel = parallel
        self._batch_pages = batch_pages
        self._max_batches = max_batches
        self._stall_s = stall_s
        self._queue: deque[_Glimpse] = deque()
        self._running: set[_Proof] = set()
        self._holding = 0  # of them, those that hold up the next one
        self._timer: asyncio.TimerHandle | None = None  # while something waits
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopped = False

    async def unproven(self, pages: list[Page]) -> Collection[Page]:
        """Those of the pages, or more, that could not be proven to be current after this call; all of them when the
        lane has stopped."""
        if self._stopped:
            return pages
        if not self._queue and self._may_start():
            return await self._run(self._take_off(), pages)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Collection[Page]] = loop.create_future()
        self._queue.append((pages, future))
        if self._timer is None:
            self._timer = loop.call_later(self._stall_s, self._let_others_pass)
        return await future

    async def stop(self) -> None:
        """Give up the proofs that are shared; whoever waits takes nothing for proven."""
        self._stopped = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._timer is not None:
            self._timer.cancel()
        while self._queue:
            _tell([self._queue.popleft()], None)

    def _may_start(self) -> bool:
        return self._holding < self._parallel and len(self._running) < self._max_batches

    def _take_off(self) -> _Proof:
        proof = _Proof(asyncio.get_running_loop().time())
        self._running.add(proof)
        self._holding += 1
        return proof

    async def _run(self, proof: _Proof, pages: list[Page]) -> Collection[Page]:
        try:
            return await self._prove(pages)
        finally:
            self._running.discard(proof)
            self._release(proof)
            self._start_waiting()

    def _release(self, proof: _Proof) -> None:
        if proof.holds:
            proof.holds = False
            self._holding -= 1

    def _let_others_pass(self) -> None:
        """Proofs that take long hold up nobody any more."""
        loop = asyncio.get_running_loop()
        self._timer = None
        for proof in self._running:
            if loop.time() - proof.began_s >= self._stall_s:
                self._release(proof)
        self._start_waiting()
        if self._queue and not self._stopped:
            self._timer = loop.call_later(self._stall_s / 4, self._let_others_pass)

    def _start_waiting(self) -> None:
        while self._queue and self._may_start() and not self._stopped:
            batch = [self._queue.popleft()]
            size = len(batch[0][0])
            while self._queue and size + len(self._queue[0][0]) <= self._batch_pages:
                batch.append(self._queue.popleft())
                size += len(batch[-1][0])
            task = asyncio.get_running_loop().create_task(self._share(self._take_off(), batch))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _share(self, proof: _Proof, batch: list[_Glimpse]) -> None:
        """Prove what several messages have brought, each page once."""
        pages = list(dict.fromkeys(page for glimpse in batch for page in glimpse[0]))
        unproven: Collection[Page] | None = None
        try:
            unproven = await self._run(proof, pages)
        finally:
            _tell(batch, unproven)


def _tell(batch: list[_Glimpse], unproven: Collection[Page] | None) -> None:
    """What came out of it; None: nothing is proven."""
    for pages, future in batch:
        if not future.done():
            future.set_result(pages if unproven is None else unproven)
