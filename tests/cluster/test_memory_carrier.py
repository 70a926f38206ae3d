"""The network in memory, and what its faults look like to callers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

import pytest
from timetier.cluster.carriers.base import CallError
from timetier.cluster.carriers.memory import MemoryCarrier, MemoryNetwork
from timetier.cluster.errors import VersionConflict
from timetier.cluster.messages import BlockBytes, FileList, FileRemove, Files, Message, Ping, Pong, raise_failure


class Node:
    """Notes the names of FileRemove; the cursor of FileList is a command."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.gate = asyncio.Event()
        self.waiting = 0
        self.cancelled = 0

    async def handle(self, message: Message) -> Message | None:
        match message:
            case FileRemove(names):
                self.names += names
                return None
            case FileList("conflict"):
                raise VersionConflict("another version", version=7)
            case FileList("wait"):
                self.waiting += 1
                try:
                    await self.gate.wait()
                except asyncio.CancelledError:
                    self.cancelled += 1
                    raise
                return Files(self.names, b"", b"", False)
        return Pong()


def network() -> tuple[MemoryNetwork, Node, MemoryCarrier]:
    """A network with the nodes `a` and `b`, and the carrier of `a`."""
    net, node = MemoryNetwork(), Node()
    net.register("b", node.handle)
    return net, node, net.carrier("a")


def run(body: Awaitable[None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await body

    asyncio.run(bounded())


async def waiting_call(node: Node, carrier: MemoryCarrier) -> asyncio.Task[Message]:
    """A call whose handler waits at the gate."""
    call = asyncio.create_task(carrier.call("b", FileList("wait"), 10))
    async with asyncio.timeout(5):
        while not node.waiting:  # noqa: ASYNC110
            await asyncio.sleep(0)
    return call


def test_calls_sends_and_failures_arrive_as_copies_and_in_order() -> None:
    async def body() -> None:
        _, node, carrier = network()
        for i in range(100):
            assert carrier.send("b", FileRemove([str(i)]))
        assert await carrier.call("b", Ping(), 5) == Pong()
        assert node.names == [str(i) for i in range(100)]
        assert await carrier.call("b", FileRemove(["x"]), 5) == Pong()
        with pytest.raises(VersionConflict) as conflict:
            raise_failure(await carrier.call("b", FileList("conflict"), 5))
        assert conflict.value.version == 7

        node.gate.set()
        found = await carrier.call("b", FileList("wait"), 5)
        assert isinstance(found, Files)
        assert found.names == node.names
        assert found.names is not node.names  # it went through a frame

    run(body())


def test_a_frame_that_no_peer_could_decode_is_refused_as_on_a_socket() -> None:
    async def body() -> None:
        _, _, carrier = network()
        with pytest.raises(CallError) as ended:
            await carrier.call("b", BlockBytes("not bytes"), 5)  # type: ignore[arg-type]
        assert ended.value.sent

    run(body())


def test_a_cut_fails_calls_in_flight_and_refuses_others_until_it_heals() -> None:
    async def body() -> None:
        net, node, carrier = network()
        call = await waiting_call(node, carrier)
        net.cut("b", "a")
        with pytest.raises(CallError) as lost:
            await call
        assert lost.value.sent
        with pytest.raises(CallError) as refused:
            await carrier.call("b", Ping(), 5)
        assert not refused.value.sent
        assert not carrier.send("b", Ping())
        assert await net.carrier("c").call("b", Ping(), 5) == Pong()
        net.heal()
        assert await carrier.call("b", Ping(), 5) == Pong()

    run(body())


def test_held_messages_are_delivered_in_order_when_it_heals_and_callers_see_their_deadline() -> None:
    async def body() -> None:
        net, node, carrier = network()
        call = await waiting_call(node, carrier)
        net.hold("a", "b")
        for i in range(10):
            assert carrier.send("b", FileRemove([str(i)]))
        with pytest.raises(CallError) as late:
            await carrier.call("b", FileRemove(["late"]), 0.02)
        assert late.value.sent
        node.gate.set()  # the answer is held, too
        done, _ = await asyncio.wait({call}, timeout=0.02)
        assert not done
        assert node.names == []
        net.heal()
        assert isinstance(await call, Files)
        assert await carrier.call("b", Ping(), 5) == Pong()
        assert node.names == [*map(str, range(10)), "late"]

    run(body())


def test_a_killed_node_stops_in_mid_air_and_is_back_when_registered() -> None:
    async def body() -> None:
        net, node, carrier = network()
        call = await waiting_call(node, carrier)
        net.kill("b")
        with pytest.raises(CallError) as lost:
            await call
        assert lost.value.sent
        with pytest.raises(CallError) as refused:
            await carrier.call("b", Ping(), 5)
        assert not refused.value.sent
        await asyncio.sleep(0)
        assert node.cancelled == 1

        successor = Node()
        net.register("b", successor.handle)
        assert carrier.send("b", FileRemove(["x"]))
        assert await carrier.call("b", Ping(), 5) == Pong()
        assert (node.names, successor.names) == ([], ["x"])

    run(body())


def test_a_closed_carrier_ends_its_calls_and_makes_no_more() -> None:
    async def body() -> None:
        net, node, carrier = network()
        call = await waiting_call(node, carrier)
        await carrier.close()
        with pytest.raises(CallError) as closed:
            await call
        assert closed.value.sent
        with pytest.raises(CallError) as refused:
            await carrier.call("b", Ping(), 5)
        assert not refused.value.sent
        assert not carrier.send("b", Ping())
        assert await net.carrier("c").call("b", Ping(), 5) == Pong()

    run(body())
