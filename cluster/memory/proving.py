"""The lane of reads that pages in memory cover: one proof under way, what arrives meanwhile shares the next one."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from .pages import Page

Told = Callable[[Collection[Page]], None]
"""Is told, once, those of the pages that are not proven."""


class Cancellable(Protocol):
    """What is under way."""

    def cancel(self) -> None:
        """Give it up: nobody is told of it any more."""


@dataclass(slots=True, eq=False)
class _Proof:
    """One proof under way, and whom to tell. `holds`: whether the next one waits for it."""

    pages: list[Page]
    tell: Told
    began_s: float
    holds: bool = True
    running: Cancellable | None = None


class ProofLane:
    """Merges pages that are to be proven, at most `batch_pages` at a time unless one message alone has more.

    `parallel` proofs are under way at a time. One that takes longer than `stall_s` (a replica is paused, say) no longer
    holds up the next, as long as fewer than `max_batches` are under way.
    """

    def __init__(
        self,
        prove: Callable[[list[Page], Told], Cancellable],
        *,
        parallel: int,
        batch_pages: int,
        max_batches: int,
        stall_s: float,
    ) -> None:
        """`prove` begins a proof, and tells once those of the pages that are not proven; it raises nothing."""
        self._prove = prove
        self._parallel = parallel
        self._batch_pages = batch_pages
        self._max_batches = max_batches
        self._stall_s = stall_s
        self._queue: deque[tuple[list[Page], Told]] = deque()
        self._running: set[_Proof] = set()
        self._holding = 0  # of them, those that hold up the next one
        self._timer: asyncio.TimerHandle | None = None  # while something waits
        self._stopped = False

    def prove(self, pages: list[Page], tell: Told) -> None:
        """Have pages proven to be current after this call. `tell` is given those of them, or more, for which that was
        not possible, maybe before this returns; all when the lane stops."""
        if self._stopped:
            tell(pages)
        elif not self._queue and self._may_start():
            self._start(pages, tell)
        else:
            self._queue.append((pages, tell))
            if self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(self._stall_s, self._let_others_pass)

    def stop(self) -> None:
        """Give up all proofs; whoever waits is told that nothing is proven."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
        proofs = list(self._running)
        for proof in proofs:
            self._land(proof)
            if proof.running is not None:
                proof.running.cancel()
        for pages, tell in [*((proof.pages, proof.tell) for proof in proofs), *self._queue]:
            tell(pages)
        self._queue.clear()

    def _may_start(self) -> bool:
        return self._holding < self._parallel and len(self._running) < self._max_batches

    def _start(self, pages: list[Page], tell: Told) -> None:
        proof = _Proof(pages, tell, asyncio.get_running_loop().time())
        self._running.add(proof)
        self._holding += 1
        proof.running = self._prove(pages, partial(self._landed, proof))

    def _landed(self, proof: _Proof, unproven: Collection[Page]) -> None:
        self._land(proof)
        self._start_waiting()  # first: replicas work on the next proof while this one is made use of
        proof.tell(unproven)

    def _land(self, proof: _Proof) -> None:
        self._running.discard(proof)
        self._release(proof)

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
            if len(batch) == 1:
                self._start(*batch[0])
            else:
                pages = list(dict.fromkeys(page for glimpse in batch for page in glimpse[0]))  # each once
                self._start(pages, partial(_tell, [tell for _, tell in batch]))


def _tell(tells: list[Told], unproven: Collection[Page]) -> None:
    for tell in tells:
        tell(unproven)
