"""Helpers for tests of cold nodes and their disks: a group over real files, and disks that fail or hang on demand."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from cold_model import cold_file, topology
from timetier.cluster.carriers.memory import MemoryNetwork
from timetier.cluster.cold.block import checksum, read_index
from timetier.cluster.cold.files import SystemFiles
from timetier.cluster.cold.service import ColdService
from timetier.cluster.counters import Counters
from timetier.cluster.messages import BlockRead, FileWrite, FileWritten, Message

DISKS = 2


class FaultyFiles(SystemFiles):
    """Files of the operating system, some of whose folders fail or hang. `fault`: errno by folder, None for none."""

    def __init__(self) -> None:
        self.fault: dict[Path, int] = {}
        self.hanging: dict[Path, threading.Event] = {}

    def check(self, path: Path) -> None:
        """Raises OSError, or waits, when something is wrong with the path's folder."""
        for folder in (path, *path.parents):
            if folder in self.hanging:
                self.hanging[folder].wait()
            if folder in self.fault:
                number = self.fault[folder]
                raise OSError(number, f"injected {errno.errorcode[number]}")

    @contextlib.contextmanager
    def open(self, path: Path, *, write: bool = False, create: bool = False, empty: bool = False) -> Iterator[Any]:
        self.check(path)
        with super().open(path, write=write, create=create, empty=empty) as opened:
            yield _FaultyFile(self, path, opened)

    def list_files(self, folder: Path) -> list[str]:
        self.check(folder)
        return super().list_files(folder)


class _FaultyFile:
    def __init__(self, files: FaultyFiles, path: Path, opened: Any) -> None:
        self._files, self._path, self._opened = files, path, opened

    def __getattr__(self, name: str) -> Any:
        self._files.check(self._path)
        return getattr(self._opened, name)


class Group:
    """Three cold nodes of `DISKS` disks each, and a client. `settings`: more arguments of the services."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = folder
        self.network = MemoryNetwork()
        self.client = self.network.carrier("client")
        self.files = [FaultyFiles() for _ in range(3)]
        self.nodes: dict[int, ColdService] = {}
        self.settings = settings
        self.contents: dict[str, bytes] = {}

    async def start(self, *replicas: int, **settings: Any) -> None:
        """Start nodes, all by default."""
        for replica in replicas or range(3):
            name = f"cold-0-{replica}"
            node = ColdService(
                name,
                0,
                replica,
                self.folder / name,
                topology(disks=DISKS),
                self.network.carrier(name),
                **{
                    "disks": DISKS,
                    "read_threads": 2,
                    "counters": Counters(),
                    "files": self.files[replica],
                    **self.settings,
                    **settings,
                },
            )
            await node.start()
            self.network.register(name, node.handle)
            self.nodes[replica] = node

    async def stop(self, *replicas: int) -> None:
        """Stop nodes, all that run by default."""
        for replica in replicas or tuple(self.nodes):
            self.network.kill(f"cold-0-{replica}")
            await self.nodes.pop(replica).stop()

    async def call(self, replica: int, message: Message) -> Message:
        """A node's answer."""
        return await self.client.call(f"cold-0-{replica}", message, 10.0)

    async def write(self, file: str, disk: int, *, to: Iterable[int] = (), **content: int) -> bytes:
        """Have a file on one disk of all nodes that run, or of those named; its bytes."""
        data = self.contents[file] = cold_file(file, **content)
        for replica in tuple(to) or tuple(self.nodes):
            answer = await self.call(replica, FileWrite(file, disk, 0, data, True, checksum(data)))
            assert answer == FileWritten(len(data), checksum(data)), answer
        return data

    def block(self, file: str, at: int = 0) -> BlockRead:
        """A read of a block of a file."""
        entry = read_index(self.contents[file]).blocks[at]
        return BlockRead(file, entry.offset, entry.length, entry.crc)

    def place(self, replica: int, disk: int) -> Path:
        """Folder of a disk."""
        return self.nodes[replica].keeper.disk(disk).folder if replica in self.nodes else self.default(replica, disk)

    def default(self, replica: int, disk: int) -> Path:
        """Folder of a disk below the node's data folder."""
        return self.folder / f"cold-0-{replica}" / f"disk-{disk}"

    def disk(self, replica: int, disk: int) -> dict[str, Any]:
        """What `status` says of a disk."""
        found: dict[str, Any] = self.nodes[replica].status()["disks"][disk]
        return found

    async def until(self, condition: Callable[[], bool], what: str, seconds: float = 15.0) -> None:
        """Wait for a condition."""
        deadline = asyncio.get_running_loop().time() + seconds
        while not condition():
            told = [node.status()["disks"] for node in self.nodes.values()]
            assert asyncio.get_running_loop().time() < deadline, f"{what}: not in time: {told}"
            await asyncio.sleep(0.005)


def run(folder: Path, test: Callable[[Group], Awaitable[None]], **settings: Any) -> None:
    """Run a test with three nodes."""

    async def body() -> None:
        group = Group(folder, **settings)
        await group.start()
        try:
            await asyncio.wait_for(test(group), 60)
        finally:
            for files in group.files:
                for hanging in files.hanging.values():
                    hanging.set()
            await group.stop()

    asyncio.run(body())
