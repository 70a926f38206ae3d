"""How long a read takes when nodes, or the way to a whole machine, fall silent in its middle."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from client_model import FixedSource, ModelStore, make_topology
from timetier.cluster.carriers.base import Address
from timetier.cluster.client.store import AsyncStore
from timetier.cluster.client.view import ClientSettings
from timetier.cluster.keys import timeline_key
from timetier.cluster.messages import Message, ReadItems, ReadPages, Write
from timetier.cluster.topology import Topology

ALICE = timeline_key(b"moments", b"alice", 1024)
SETTINGS = ClientSettings(timeout_s=5.0, attempt_timeout_s=0.5, quiet_s=0.05)


def three_machines() -> Topology:
    """A cache, a storage and a cold node on each of three machines."""
    plain = make_topology(caches=3)
    addresses = {name: Address(name, host=f"machine {name[-1]}") for name in plain.node_names()}
    return msgspec.structs.replace(plain, addresses=addresses)


def silence(model: ModelStore, topology: Topology, machine: str) -> None:
    """Let the way to a machine swallow everything, with all connections open."""
    for name, address in topology.addresses.items():
        if address.host == machine:
            model.network.hold("client", name)


@pytest.mark.parametrize("caches", [1, 3])
@pytest.mark.parametrize("reads", [1, 40])
def test_a_read_gives_a_node_that_is_gone_up_long_before_its_time_is_over(caches: int, reads: int) -> None:
    async def scenario() -> float:
        topology = make_topology(caches=caches)
        model = ModelStore(topology)
        async with AsyncStore(model.network.carrier("client"), topology, FixedSource(), settings=SETTINGS) as store:
            table = store.table("moments")
            await table.put("alice", 1, b"v")
            model.network.hold("client", store.view.routing.cache_order(ALICE)[0])
            began = asyncio.get_running_loop().time()
            items = await table.get_many([("alice", 1)] * reads)
            assert [item.value for item in items if item is not None] == [b"v"] * reads
            return asyncio.get_running_loop().time() - began

    assert asyncio.run(scenario()) < 0.3


def test_the_second_attempt_of_a_read_is_not_at_a_node_behind_the_same_link() -> None:
    async def scenario() -> tuple[float, list[str]]:
        topology = three_machines()
        model = ModelStore(topology)
        async with AsyncStore(model.network.carrier("client"), topology, FixedSource(), settings=SETTINGS) as store:
            table = store.table("moments")
            await table.put("alice", 1, b"v")
            caches = store.view.routing.cache_order(ALICE)
            storage = store.view.routing.storage_order(ALICE)
            for name in caches[1:]:  # so that storage nodes are next, the one of the silent machine among them
                model.network.kill(name)
            first = topology.addresses[caches[0]].host
            silence(model, topology, first)
            began = asyncio.get_running_loop().time()
            assert (await table.timeline("alice")).items
            took_s = asyncio.get_running_loop().time() - began
            asked = [node for node, message in model.log if isinstance(message, ReadPages)]
            assert asked[-1] == next(name for name in storage if topology.addresses[name].host != first)
            return took_s, asked

    took_s, asked = asyncio.run(scenario())
    assert took_s < 0.3, "one node was found to be silent, not two"
    assert len(asked) == 1


def test_a_node_that_is_there_but_slow_keeps_its_read() -> None:
    async def scenario() -> list[str]:
        topology = make_topology(caches=2)
        model = ModelStore(topology)
        async with AsyncStore(model.network.carrier("client"), topology, FixedSource(), settings=SETTINGS) as store:
            table = store.table("moments")
            await table.put("alice", 1, b"v")

            async def fault(node: str, message: Message) -> Message | None:
                if isinstance(message, ReadItems):
                    await asyncio.sleep(0.3)
                return None

            model.fault = fault
            assert await table.get("alice", 1) is not None
            return [node for node, message in model.log if isinstance(message, ReadItems)]

    assert len(asyncio.run(scenario())) == 1


def test_a_write_is_not_given_up_early() -> None:
    """It would be of unknown fate, and a second replica would have to take the timeline over."""

    async def scenario() -> list[str]:
        topology = make_topology()
        model = ModelStore(topology)
        async with AsyncStore(model.network.carrier("client"), topology, FixedSource(), settings=SETTINGS) as store:
            first = store.view.routing.storage_order(ALICE)[0]
            model.network.hold("client", first)
            asyncio.get_running_loop().call_later(0.3, model.network.heal)
            assert await store.table("moments").put("alice", 1, b"v") == 1
            return [node for node, message in model.log if isinstance(message, Write)]

    assert len(asyncio.run(scenario())) == 1
