"""The Ray carrier with a real actor."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import ray
from timetier.actors.local_ray import LocalRay
from timetier.actors.ray_carrier import MAX_WAITING_SENDS, RayCarrier
from timetier.cluster.carriers.base import Address, CallError, answer_frame
from timetier.cluster.errors import InvalidRequest
from timetier.cluster.messages import (
    BlockBytes,
    Failure,
    FileList,
    FileRemove,
    Files,
    Message,
    Ping,
    Pong,
    encode,
    raise_failure,
)

# Ray's workers need not have this folder on their path.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # type: ignore[no-untyped-call]


class Node:
    """Notes the names of FileRemove, lists them for FileList; a cursor is a command."""

    def __init__(self) -> None:
        self.names: list[str] = []

    async def call(self, frame: bytes) -> bytes:
        return await answer_frame(self.handle, frame)

    async def handle(self, message: Message) -> Message | None:
        match message:
            case FileRemove(names):
                self.names += names
                return None
            case FileList("never"):
                await asyncio.Event().wait()
            case FileList("refuse"):
                raise InvalidRequest("cursor: refused")
            case FileList("die"):
                os._exit(1)
            case FileList(_):
                return Files(self.names, b"", b"", False)
            case BlockBytes(data):
                return BlockBytes(data[::-1])
        return Pong()


def run(namespace: str, test: Callable[[RayCarrier], Awaitable[None]]) -> None:
    async def body() -> None:
        carrier = RayCarrier(namespace)
        try:
            await asyncio.wait_for(test(carrier), 60)
        finally:
            await carrier.close()

    asyncio.run(body())


def start_node(namespace: str, name: str) -> Any:
    """A named actor, which lives as long as the handle is kept."""
    return ray.remote(num_cpus=0)(Node).options(name=name, namespace=namespace).remote()


def test_calls_sends_and_failures_travel_over_ray(ray_session: None, namespace: str) -> None:
    actor = start_node(namespace, "the-actor")

    async def test(carrier: RayCarrier) -> None:
        carrier.update({"storage-0-0": Address("storage-0-0", actor="the-actor")})
        assert await carrier.call("storage-0-0", Ping(), 30) == Pong()
        assert await carrier.call("storage-0-0", BlockBytes(b"ab" * 100_000), 30) == BlockBytes(b"ba" * 100_000)

        assert all(carrier.send("storage-0-0", FileRemove([f"{i}"])) for i in range(50))
        names: list[str] = []
        while len(names) < 50:
            listed = await carrier.call("storage-0-0", FileList(""), 30)
            assert isinstance(listed, Files)
            names = listed.names
        assert names == [f"{i}" for i in range(50)]

        refused = await carrier.call("storage-0-0", FileList("refuse"), 30)
        assert isinstance(refused, Failure)
        with pytest.raises(InvalidRequest, match="refused"):
            raise_failure(refused)

        started_s = time.monotonic()
        with pytest.raises(CallError) as failed:
            await carrier.call("storage-0-0", FileList("never"), 0.3)
        assert failed.value.sent
        assert time.monotonic() - started_s < 5
        assert await carrier.call("storage-0-0", Ping(), 30) == Pong()

    run(namespace, test)
    ray.kill(actor)


def test_a_dead_actor_fails_calls_as_perhaps_executed_and_its_successor_is_found(
    ray_session: None, namespace: str
) -> None:
    first = start_node(namespace, "cold-0-0")

    async def test(carrier: RayCarrier) -> None:
        assert await carrier.call("cold-0-0", Ping(), 30) == Pong()
        waiting = asyncio.create_task(carrier.call("cold-0-0", FileList("never"), 30))
        await carrier.call("cold-0-0", Ping(), 30)
        with pytest.raises(CallError) as failed:
            await carrier.call("cold-0-0", FileList("die"), 30)
        assert failed.value.sent
        with pytest.raises(CallError) as failed:
            await waiting
        assert failed.value.sent

        ray.kill(first)
        while failed.value.sent:  # until Ray has freed the name, from when on surely nobody sees a call
            with pytest.raises(CallError) as failed:
                await carrier.call("cold-0-0", Ping(), 30)
        successor = start_node(namespace, "cold-0-0")
        assert await carrier.call("cold-0-0", Ping(), 30) == Pong()
        ray.kill(successor)

    run(namespace, test)


def test_a_missing_actor_is_surely_not_reached_and_sends_to_it_are_bounded(ray_session: None, namespace: str) -> None:
    async def test(carrier: RayCarrier) -> None:
        with pytest.raises(CallError) as failed:
            await carrier.call("nobody", Ping(), 30)
        assert not failed.value.sent

        taken = [carrier.send("nobody", Ping()) for _ in range(MAX_WAITING_SENDS + 10)]
        assert taken.count(False) == 10
        while carrier.counters.read()["dropped_frames"] < MAX_WAITING_SENDS + 10:  # run() has a deadline
            with pytest.raises(CallError):
                await carrier.call("nobody", Ping(), 30)

        await carrier.close()
        assert not carrier.send("nobody", Ping())
        with pytest.raises(CallError) as failed:
            await carrier.call("nobody", Ping(), 30)
        assert not failed.value.sent

    run(namespace, test)


BEHIND_RAY_CLIENT = """
import asyncio, sys
import ray
from timetier.actors.ray_session import connect_ray
from timetier.actors.ray_carrier import RayCarrier
from timetier.cluster.carriers.base import CallError
from timetier.cluster.messages import BlockBytes, FileList, FileRemove

async def main():
    carrier = RayCarrier(sys.argv[2])
    assert await carrier.call("cache-0-0", BlockBytes(b"ab" * 100_000), 60) == BlockBytes(b"ba" * 100_000)
    assert all(carrier.send("cache-0-0", FileRemove([str(i)])) for i in range(20))
    names = []
    while len(names) < 20:
        names = (await carrier.call("cache-0-0", FileList(""), 60)).names
    assert names == [str(i) for i in range(20)], names
    for node, cursor, timeout_s, sent in (("cache-0-0", "never", 0.5, True), ("nobody", "", 30, False)):
        try:
            await carrier.call(node, FileList(cursor), timeout_s)
        except CallError as error:
            assert error.sent == sent, error
        else:
            raise AssertionError("an answer came from nowhere")
    try:
        await carrier.call("cache-0-0", FileList("die"), 30)
    except CallError as error:
        assert error.sent, error
    await carrier.close()

connect_ray(sys.argv[1])
asyncio.run(asyncio.wait_for(main(), 90))
ray.shutdown()
print("done")
"""


def test_the_same_holds_behind_a_ray_client(ray_session: None, local_ray: LocalRay, namespace: str) -> None:
    actor = start_node(namespace, "cache-0-0")
    ray.get(actor.call.remote(encode(Ping())))
    client = [sys.executable, "-c", BEHIND_RAY_CLIENT, local_ray.client_address, namespace]
    ran = subprocess.run(client, capture_output=True, text=True, timeout=250, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.split()[-1] == "done"
