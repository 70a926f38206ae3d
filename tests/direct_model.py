"""A small node behind the direct carrier, and what its tests need to talk to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from timetier.cluster.carriers.base import Address
from timetier.cluster.carriers.direct import DirectCarrier, DirectServer, host_id
from timetier.cluster.carriers.handshake import ClientHandshake
from timetier.cluster.errors import VersionConflict
from timetier.cluster.messages import (
    BlockBytes,
    FileList,
    FileRemove,
    Files,
    Message,
    Ping,
    Pong,
    encode,
)

SECRET = b"0123456789abcdef0123456789abcdef"
NODE = "storage-0-0"
PING = encode(Ping())


class Node:
    """Notes the names of FileRemove in order of arrival; the cursor of FileList is a command."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.gates: dict[str, asyncio.Event] = {}
        self.waiting = 0

    async def handle(self, message: Message) -> Message | None:
        match message:
            case FileRemove(names):
                self.names += names
                return None
            case FileList("conflict"):
                raise VersionConflict("another version", version=7)
            case FileList("large"):
                return BlockBytes(bytes(500_000))
            case FileList(gate) if gate:
                self.waiting += 1
                await self.gates.setdefault(gate, asyncio.Event()).wait()
                self.waiting -= 1
                return Files([gate], b"", b"", False)
            case BlockBytes(data):
                return BlockBytes(data[::-1])
        return Pong()


@asynccontextmanager
async def serve(node: Node, listen: dict[str, Any], **settings: Any) -> AsyncIterator[DirectServer]:
    server = DirectServer(node.handle, SECRET, name=NODE, **{**listen, **settings})
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@asynccontextmanager
async def connect(address: Address, secret: bytes = SECRET, **settings: Any) -> AsyncIterator[DirectCarrier]:
    carrier = DirectCarrier(secret, host_id=host_id(), **settings)
    carrier.update({NODE: address})
    try:
        yield carrier
    finally:
        await carrier.close()


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Wait for a condition that no event tells of."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def run(body: Awaitable[None], timeout_s: float = 60.0) -> None:
    """Run a test and see that it leaves no task behind."""

    async def bounded() -> None:
        async with asyncio.timeout(timeout_s):
            await body
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left

    asyncio.run(bounded())


async def raw(address: Address) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if address.unix_path:
        return await asyncio.open_unix_connection(address.unix_path)
    return await asyncio.open_connection(address.tcp_host, address.tcp_port)


async def greeted(address: Address, name: str = NODE) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A raw connection after a good handshake."""
    reader, writer = await raw(address)
    handshake = ClientHandshake(SECRET, name, bytes(32))
    writer.write(handshake.receive(await reader.readexactly(37)))
    handshake.receive(await reader.readexactly(32))
    assert handshake.done
    return reader, writer


async def is_closed(reader: asyncio.StreamReader) -> bool:
    """Read to the end of the connection."""
    try:
        await reader.read()
    except ConnectionError:
        return True
    return reader.at_eof()


def figure(server: DirectServer | DirectCarrier, name: str) -> float:
    return server.counters.read().get(name, 0)
