"""Scripts under asyncio."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from timetier.cluster.carriers.base import Carrier
from timetier.cluster.carriers.memory import MemoryNetwork
from timetier.cluster.drive import drive
from timetier.cluster.effects import Call, CallFailed, Script, Sleep
from timetier.cluster.errors import InvalidRequest, TooLarge
from timetier.cluster.messages import MAX_FRAME_BYTES, BlockBytes, Failure, FileList, Message, Ping


class Echo:
    """Answers when `together` calls have come."""

    def __init__(self, together: int = 1) -> None:
        self.together = together
        self.arrived = 0
        self.all_here = asyncio.Event()
        self.cancelled = 0

    async def handle(self, message: Message) -> Message | None:
        if isinstance(message, FileList):
            raise InvalidRequest("cursor: wrong")
        self.arrived += 1
        if self.arrived >= self.together:
            self.all_here.set()
        await self.all_here.wait()
        return message


def carrier(echo: Echo) -> Carrier:
    net = MemoryNetwork()
    for name in ("a", "b", "c"):
        net.register(name, echo.handle)
    return net.carrier("client")


def calls(*nodes: str, timeout_s: float = 5.0) -> list[Call]:
    return [Call(node, BlockBytes(node.encode()), timeout_s) for node in nodes]


def test_calls_of_one_list_are_made_in_parallel_and_answered_in_order() -> None:
    def script() -> Script[Any]:
        one = yield calls("a")
        three = yield calls("c", "a", "b")
        none = yield []
        return one, three, none

    async def body() -> None:
        first, later = Echo(), Echo(together=3)
        assert await drive(script_of_one(), carrier(first)) == [BlockBytes(b"a")]
        # None of the three would be answered if they were not under way together.
        assert await drive(script_of_three(), carrier(later)) == [BlockBytes(b"c"), BlockBytes(b"a"), BlockBytes(b"b")]
        one, three, none = await drive(script(), carrier(Echo()))
        assert (len(one), len(three), none) == (1, 3, [])

    def script_of_one() -> Script[Any]:
        return (yield calls("a"))

    def script_of_three() -> Script[Any]:
        return (yield calls("c", "a", "b"))

    asyncio.run(body())


def test_calls_without_an_answer_and_failures_are_results_like_others() -> None:
    def script() -> Script[Any]:
        return (yield [*calls("nobody", "a"), Call("b", FileList(""), 5.0)])

    def late() -> Script[Any]:
        return (yield calls("a", timeout_s=0.02))

    async def body() -> None:
        failed, answered, refused = await drive(script(), carrier(Echo()))
        assert failed == CallFailed("nobody", "nobody does not run", False)
        assert answered == BlockBytes(b"a")
        assert refused == Failure("InvalidRequest", "cursor: wrong", {})
        (failed,) = await drive(late(), carrier(Echo(together=2)))
        assert (failed.node, failed.sent) == ("a", True)

    asyncio.run(body())


def test_a_sleep_lasts_and_gives_the_time() -> None:
    def script() -> Script[tuple[float, float]]:
        before_s = yield Sleep(0.0)
        after_s = yield Sleep(0.03)
        return before_s, after_s

    async def body() -> None:
        before_s, after_s = await drive(script(), carrier(Echo()))
        assert after_s - before_s >= 0.03
        assert 0 <= asyncio.get_running_loop().time() - after_s < 5

    asyncio.run(body())


def test_a_script_can_finish_or_fail_without_any_effect() -> None:
    def done() -> Script[int]:
        if False:
            yield []
        return 3

    def broken() -> Script[int]:
        yield calls("a")
        raise InvalidRequest("owner: missing")

    async def body() -> None:
        assert await drive(done(), carrier(Echo())) == 3
        with pytest.raises(InvalidRequest, match="owner"):
            await drive(broken(), carrier(Echo()))

    asyncio.run(body())


@pytest.mark.parametrize("position", [0, 1])
def test_an_error_that_is_no_missing_answer_is_raised_inside_the_script(position: int) -> None:
    def script(catch: bool) -> Script[Any]:
        batch = calls("a", "b")
        batch[position] = Call("c", BlockBytes(bytes(MAX_FRAME_BYTES + 1)), 5.0)
        try:
            yield batch
        except TooLarge as error:
            if not catch:
                raise
            return error.limit, (yield [Call("a", Ping(), 5.0)])

    async def body() -> None:
        assert await drive(script(True), carrier(Echo())) == (MAX_FRAME_BYTES, [Ping()])
        with pytest.raises(TooLarge):
            await drive(script(False), carrier(Echo()))
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(body())


@pytest.mark.parametrize("nodes", [["a"], ["a", "b", "c"]])
def test_cancelling_the_driver_closes_the_script_and_gives_up_its_calls(nodes: list[str]) -> None:
    closed: list[str] = []

    def script() -> Script[Any]:
        try:
            yield calls(*nodes)
        finally:
            closed.append("yes")

    async def body() -> None:
        echo = Echo(together=99)
        driver = asyncio.create_task(drive(script(), carrier(echo)))
        async with asyncio.timeout(5):
            while echo.arrived < len(nodes):  # noqa: ASYNC110
                await asyncio.sleep(0)
        driver.cancel()
        await asyncio.wait({driver}, timeout=2)  # sooner than the calls' own deadline
        assert driver.cancelled()
        assert closed == ["yes"]
        echo.all_here.set()
        async with asyncio.timeout(5):
            while len(asyncio.all_tasks()) > 1:  # noqa: ASYNC110
                await asyncio.sleep(0)

    asyncio.run(body())
