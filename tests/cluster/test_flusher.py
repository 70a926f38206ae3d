"""Who makes a log durable: the event loop while the disk is quick, a thread when it is not."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from timetier.cluster.errors import Unavailable
from timetier.cluster.storage.flusher import FLUSHES_BY_THREAD, Flusher

LIMIT_S = 0.001


class Disk:
    """Flushes that take `takes_s` by its clock, and the threads that did them."""

    def __init__(self) -> None:
        self.now = 0.0
        self.takes_s = 0.0001
        self.threads: list[int] = []

    def clock(self) -> float:
        return self.now

    def sync(self) -> None:
        self.threads.append(threading.get_ident())
        self.now += self.takes_s


async def flush(flusher: Flusher, sync: Callable[[], None]) -> None:
    ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def done(error: BaseException | None) -> None:
        if error is None:
            ended.set_result(None)
        else:
            ended.set_exception(error)

    flusher.flush(sync, done)
    await ended


def run(body: Callable[[Flusher, Disk], Coroutine[Any, Any, None]], *, limit_s: float = LIMIT_S) -> None:
    async def main() -> None:
        disk = Disk()
        flusher = Flusher("n", disk.clock, limit_s)
        try:
            await body(flusher, disk)
        finally:
            flusher.shutdown()

    asyncio.run(main())


def test_a_quick_disk_is_flushed_in_place() -> None:
    async def body(flusher: Flusher, disk: Disk) -> None:
        for _ in range(2 * FLUSHES_BY_THREAD):
            await flush(flusher, disk.sync)
        assert set(disk.threads) == {threading.get_ident()}

    run(body)


def test_a_disk_that_gets_slow_is_left_to_the_thread_and_tried_again_in_place() -> None:
    async def body(flusher: Flusher, disk: Disk) -> None:
        here = threading.get_ident()
        disk.takes_s = 200 * LIMIT_S
        await flush(flusher, disk.sync)
        for _ in range(FLUSHES_BY_THREAD):
            await flush(flusher, disk.sync)
        assert disk.threads[0] == here
        assert here not in disk.threads[1:]
        await flush(flusher, disk.sync)  # the next try, which finds it slow still
        await flush(flusher, disk.sync)
        assert disk.threads[-2] == here != disk.threads[-1]
        disk.takes_s = LIMIT_S / 10
        for _ in range(FLUSHES_BY_THREAD + 10):
            await flush(flusher, disk.sync)
        assert disk.threads[-10:] == [here] * 10

    run(body)


def test_a_disk_whose_flushes_all_take_longer_than_the_limit_is_left_to_the_thread_soon() -> None:
    async def body(flusher: Flusher, disk: Disk) -> None:
        disk.takes_s = 3 * LIMIT_S
        for _ in range(30):
            await flush(flusher, disk.sync)
        assert disk.threads[0] == threading.get_ident() != disk.threads[-1]

    run(body)


def test_slow_flushes_among_as_many_quick_ones_change_nothing() -> None:
    async def body(flusher: Flusher, disk: Disk) -> None:
        for takes_s in (LIMIT_S / 10, 10 * LIMIT_S) * 50:
            disk.takes_s = takes_s
            await flush(flusher, disk.sync)
        assert set(disk.threads) == {threading.get_ident()}

    run(body)


@pytest.mark.parametrize("limit_s", [0.0, LIMIT_S])
def test_an_error_of_a_flush_is_told_and_the_next_flush_is_tried(limit_s: float) -> None:
    async def body(flusher: Flusher, disk: Disk) -> None:
        def refuse() -> None:
            raise Unavailable("no space left")

        with pytest.raises(Unavailable, match="no space left"):
            await flush(flusher, refuse)
        assert not flusher.busy
        await flush(flusher, disk.sync)

    run(body, limit_s=limit_s)


def test_what_comes_after_a_flush_waits_for_it_and_nothing_is_flushed_in_place_meanwhile() -> None:
    async def body(flusher: Flusher, disk: Disk) -> None:
        gate = threading.Event()
        order: list[str] = []

        def work() -> None:
            assert gate.wait(10)
            order.append("work")

        def sync() -> None:
            disk.sync()
            order.append("flush")

        working = asyncio.create_task(flusher.after(work))
        await asyncio.sleep(0)
        flushing = asyncio.create_task(flush(flusher, sync))
        await asyncio.sleep(0)
        assert flusher.busy
        gate.set()
        await asyncio.gather(working, flushing)
        assert order == ["work", "flush"]
        assert threading.get_ident() not in disk.threads

    run(body)
