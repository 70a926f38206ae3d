"""Who makes a log durable: the event loop itself while the disk is quick, else a thread.

To hand a flush to a thread, and its end back, takes a good part of all processor time of a write: the thread is woken,
then the loop, and the two fight for the interpreter. So a flush is done in place as long as half of them take less than
`in_place_s`: for that time the node answers nobody. From a disk that is slower all is done by the thread, and the node
answers what needs no disk meanwhile. Now and then such a disk is tried in place again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

IN_PLACE_S = 0.001
FLUSHES_BY_THREAD = 256  # before a slow disk is tried again
_STALLS = 100  # a single flush that takes so many times what is allowed leaves the next ones to the thread
_STEP = 1 / 32

Done = Callable[[BaseException | None], None]
"""Is told, once, that a flush has ended, and of the error if it failed."""


class Flusher:
    """Flushes of one node, one at a time. All methods are called on its event loop.

    `busy`: a flush is under way in the thread. `in_place`: flushes that needed no thread.
    """

    def __init__(self, name: str, clock: Callable[[], float], in_place_s: float = IN_PLACE_S) -> None:
        """`in_place_s`: what every other flush may take in place; 0 leaves all to the thread. `clock`: seconds."""
        self.busy = False
        self.in_place = 0
        self._now = clock
        self._limit_s = in_place_s
        self._median_s = in_place_s / 2
        self._by_thread = 0  # so many of the next flushes
        self._at_work = 0  # what the thread has to do
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=f"{name}-flush")

    def flush(self, sync: Callable[[], None], done: Done) -> None:
        """Flush. `done` may be told before this returns."""
        assert not self.busy, "one flush at a time"
        if self._limit_s and not self._by_thread and not self._at_work:
            self._flush_in_place(sync, done)
            return
        self._by_thread = max(0, self._by_thread - 1)
        self.busy = True
        self._hand_over(sync).add_done_callback(lambda ended: self._ended(ended, done))

    async def after(self, work: Callable[[], None]) -> None:
        """Do something in the flusher's thread, when a flush under way has ended."""
        await self._hand_over(work)

    def shutdown(self) -> None:
        """Let go of the thread."""
        self._executor.shutdown()

    def _flush_in_place(self, sync: Callable[[], None], done: Done) -> None:
        began = self._now()
        try:
            sync()
        except Exception as error:
            done(error)
            return
        took = self._now() - began
        step = 1 + _STEP if took > self._median_s else 1 - _STEP
        self._median_s = max(self._median_s * step, self._limit_s / 100)
        if self._median_s > self._limit_s or took > _STALLS * self._limit_s:
            self._by_thread = FLUSHES_BY_THREAD
            self._median_s = self._limit_s  # the next try decides
        self.in_place += 1
        done(None)

    def _hand_over(self, work: Callable[[], None]) -> asyncio.Future[None]:
        self._at_work += 1
        future = asyncio.get_running_loop().run_in_executor(self._executor, work)
        future.add_done_callback(self._worked)
        return future

    def _worked(self, _: asyncio.Future[None]) -> None:
        self._at_work -= 1

    def _ended(self, ended: asyncio.Future[None], done: Done) -> None:
        self.busy = False
        if not ended.cancelled():
            done(ended.exception())
