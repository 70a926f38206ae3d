"""A cluster for tests of the sink: storage as a model (`cold_model.py`), real cold nodes, and what they must hold.

Runs are scripts, so a test can end one anywhere, hold it, or have what it has sent arrive later.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from cold_model import POLICY, TABLE, StorageModel, is_data, topology, view_of, visible
from timetier.cluster.carriers.base import CallError, Carrier
from timetier.cluster.carriers.memory import MemoryNetwork
from timetier.cluster.cold.block import DecodedBlock, decode_block, verify
from timetier.cluster.cold.files import SystemFiles
from timetier.cluster.cold.link import Block
from timetier.cluster.cold.service import ColdService
from timetier.cluster.cold.sink_calls import SinkSettings
from timetier.cluster.cold.sink_script import SinkReport, TableSink, sink
from timetier.cluster.cold.sinking import CutOffs
from timetier.cluster.counters import Counters
from timetier.cluster.drive import drive
from timetier.cluster.effects import Call, CallFailed, Script, Sleep
from timetier.cluster.keys import MAX_TIMESTAMP, bucket_of, is_system
from timetier.cluster.messages import Message, Write

SETTINGS = SinkSettings(
    block_rows=8, file_bytes=4_000, orphan_grace_s=0, scan_bytes=300, piece_bytes=1_000, attempts=2, back_off_s=0.001
)
CUT = CutOffs(1_000, MAX_TIMESTAMP)


class Crashed(Exception):
    """The process of the sink ended."""


class World:
    """A cluster: storage as a model, cold nodes as they are, and what must be found in them."""

    def __init__(self, folder: Path, *, groups: int = 1, files: SystemFiles | None = None) -> None:
        """`files`: of the cold nodes."""
        self.folder = folder
        self.file_access = files
        self.shape = topology(groups=groups)
        self.storage = StorageModel(self.shape)
        self.network = MemoryNetwork()
        self.cold: dict[str, ColdService] = {}
        self.expected: dict[bytes, dict[bytes, tuple[int, bytes]]] = {}
        self.runs = itertools.count(1)

    async def start(self) -> None:
        for group in range(self.shape.storage_groups):
            for node in (self.shape.storage_node(group, replica) for replica in range(3)):
                self.network.register(node, self.storage.handle)
            for replica in range(3):
                name = self.shape.cold_node(group, replica)
                carrier = self.network.carrier(name)
                node_folder = self.folder / name
                self.cold[name] = ColdService(
                    name,
                    group,
                    replica,
                    node_folder,
                    self.shape,
                    carrier,
                    disks=2,
                    read_threads=1,
                    counters=Counters(),
                    files=self.file_access,
                )
                await self.cold[name].start()
                self.network.register(name, self.cold[name].handle)

    async def stop(self) -> None:
        for node in self.cold.values():
            await node.stop()

    def load(self, owners: int, each: int, *, start: int = 0, step: int = 7) -> None:
        for owner in range(owners):
            for at in range(each):
                self.storage.put(b"owner-%d" % owner, start + at * step, b"value %d" % at, 1, b"%d" % (at % 3))
        self.remember()

    def remember(self) -> None:
        """What is visible at this moment must be so from now on."""
        self.expected = self.visible()

    def visible(self) -> dict[bytes, dict[bytes, tuple[int, bytes]]]:
        return {
            key: visible(
                stored,
                key,
                self.storage.links(bucket_of(key)),
                self.read,
                self.storage.horizon(bucket_of(key), TABLE),
            )
            for key, stored in sorted(self.storage.timelines.items())
            if is_data(key)
        }

    def read(self, block: Block) -> DecodedBlock:
        copies = [path.read_bytes() for path in self.files(block.file)]
        assert len(copies) == 3, f"{len(copies)} copies of {block.file}"
        assert len(set(copies)) == 1, "the copies differ"
        data = copies[0][block.offset : block.offset + block.length]
        verify(data, block.crc)
        return decode_block(data)

    def files(self, pattern: str = "*.arrow") -> list[Path]:
        return sorted(self.folder.glob(f"cold-*/disk-*/{pattern}"))

    def hot_rows(self) -> int:
        return sum(len(s.rows) for key, s in self.storage.timelines.items() if is_data(key))

    def script(self, **options: Any) -> Script[SinkReport]:
        number = next(self.runs)
        policy = options.pop("policy", POLICY)
        task = TableSink(TABLE, policy, options.pop("cut_offs", CUT), options.pop("patience", None))
        settled = {"run": f"run-{number}", "now_us": 10_000_000_000, "settings": SETTINGS, **options}
        return sink(view_of(self.shape, number), [task], **settled)

    async def run(self, **options: Any) -> SinkReport:
        return await drive(self.script(**options), self.network.carrier("sink"))

    def check(self) -> None:
        assert self.visible() == self.expected


class UnsyncedFiles(SystemFiles):
    """Files for tests in which processes end and machines do not: nothing waits for a disk."""

    def sync_folder(self, folder: Path) -> None:
        """A name is there as long as the machine runs."""


class Stepper:
    """A run that goes on effect by effect. `report`: once it has ended."""

    def __init__(self, script: Script[SinkReport], carrier: Carrier) -> None:
        self.report: SinkReport | None = None
        self.effect: list[Call] | Sleep = next(script)
        self._script = script
        self._carrier = carrier

    async def perform(self) -> list[Message | CallFailed] | float:
        """Carry out the present effect; whoever made it need not live to see the results."""
        if isinstance(self.effect, Sleep):
            return 0.0
        results: list[Message | CallFailed] = []
        for call in self.effect:
            try:
                results.append(await self._carrier.call(call.node, call.message, call.timeout_s))
            except CallError as error:
                results.append(CallFailed(call.node, error.message, error.sent))
        return results

    async def step(self) -> None:
        """Carry out the present effect and go on to the next."""
        results = await self.perform()
        try:
            self.effect = self._script.send(results)
        except StopIteration as stop:
            self.report = stop.value

    async def finish(self) -> SinkReport:
        """Go on to the end."""
        while self.report is None:
            await self.step()
        return self.report

    def crash(self) -> None:
        """End the run where it is."""
        self._script.close()


def with_world(folder: Path, test: Callable[[World], Awaitable[None]], groups: int = 1) -> None:
    async def body() -> None:
        world = World(folder, groups=groups)
        await world.start()
        try:
            await asyncio.wait_for(test(world), 60)
        finally:
            await world.stop()

    asyncio.run(body())


def crash_after(script: Script[SinkReport], steps: int) -> Script[SinkReport]:
    """The script, ended after so many effects: the last of them was carried out, but its results were never seen."""
    effect = next(script)
    for _ in range(steps):
        result = yield effect
        steps -= 1
        if not steps:
            break
        try:
            effect = script.send(result)
        except StopIteration as stop:
            report: SinkReport = stop.value
            return report
    script.close()
    raise Crashed


def is_link_write(message: Message) -> bool:
    """Whether this is a write of links."""
    return isinstance(message, Write) and is_system(message.timelines[0])


async def answers(carrier: Carrier, effect: list[Call] | Sleep) -> list[Message]:
    """Results of a script's calls."""
    assert isinstance(effect, list)
    return [await carrier.call(call.node, call.message, call.timeout_s) for call in effect]
