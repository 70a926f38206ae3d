"""A whole cluster of real services in one process, of any number of groups, and the Router's durable state."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Self

import msgspec
from read_answers import keys_of
from storage_cluster import topology, wait_for
from timetier.actors.router_state import RouterState
from timetier.cluster.backup.restoring import RestoreSettings
from timetier.cluster.carriers.memory import MemoryCarrier, MemoryNetwork
from timetier.cluster.client.scripts import PageQueries, PageQuery, PageResult, WriteRequest, read_pages, write
from timetier.cluster.client.view import View
from timetier.cluster.cold.service import ColdService
from timetier.cluster.cold.sink_calls import SinkSettings
from timetier.cluster.cold.sink_report import SinkReport
from timetier.cluster.cold.sink_run import TableSink
from timetier.cluster.cold.sink_script import sink
from timetier.cluster.cold.sinking import CutOffs
from timetier.cluster.config import StorageConfig, load_config
from timetier.cluster.counters import Counters
from timetier.cluster.drive import drive
from timetier.cluster.identity import open_identity
from timetier.cluster.keys import split_timeline, timeline_key
from timetier.cluster.messages import DELETE, PUT, WIPE
from timetier.cluster.storage.service import StorageService
from timetier.cluster.topology import Restoring, TablePolicy, Topology
from timetier.cluster.verifying import VerifyReport, verify

BUCKETS = 128
POLICY = TablePolicy(per_second=1, cold_after=1_000, window=100)
KEPT = TablePolicy(per_second=1, cold_after=1_000, window=100, retention=2_000)
TABLES = {"t": POLICY, "u": POLICY, "kept": KEPT}
SINK = SinkSettings(block_rows=16, file_bytes=1 << 14, orphan_grace_s=0, call_timeout_s=5)
QUICK = RestoreSettings(patience_s=10.0, message_bytes=1 << 14, waiting_bytes=1 << 16, file_bytes=1 << 14)

Items = dict[bytes, bytes]
"""Value by item key."""

Pages = dict[bytes, tuple[int, list[tuple[bytes, bytes, int, int]]]]
"""Of each timeline its version, and its items newest first: key, value, version, written."""


class Cluster:
    """Use as an async context manager. `restoring` survives in the Router's state, as it does in a real cluster."""

    def __init__(
        self,
        folder: Path,
        *,
        name: str = "a",
        groups: int = 1,
        cold_groups: int = 1,
        disks: int = 1,
        buckets: int = BUCKETS,
        tables: Mapping[str, TablePolicy] = TABLES,
    ) -> None:
        self.folder = folder
        self.network = MemoryNetwork()
        self.client: MemoryCarrier = self.network.carrier("client")
        self.topology: Topology = topology(
            cluster_id=f"cluster-{name}",
            storage_groups=groups,
            cold_groups=cold_groups,
            cold_disks=disks,
            buckets=buckets,
            cache_nodes=0,
            tables=dict(tables),
        )
        self.storage: dict[str, StorageService] = {}
        self.cold: dict[str, ColdService] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self.router = RouterState.open(folder, "n", load_config(None, data_dir=folder))
        self.view: View

    async def __aenter__(self) -> Self:
        self.view = View(self.topology, now=asyncio.get_running_loop().time, random=Random(self.topology.cluster_id))
        for group in range(self.topology.storage_groups):
            for replica in range(3):
                await self.start_storage(group, replica)
        for group in range(self.topology.cold_groups):
            for replica in range(3):
                await self._start_cold(group, replica)
        await self.ready()
        return self

    async def __aexit__(self, *exc: object) -> None:
        for name in list(self.storage):
            await self.stop_storage(name)
        for node in self.cold.values():
            await node.stop()

    async def ready(self) -> None:
        await wait_for(lambda: all(s.status()["state"] == "voting" for s in self.storage.values()), "all to vote", 30)

    async def start_storage(self, group: int, replica: int, *, lost: bool = False) -> None:
        name = f"storage-{group}-{replica}"
        folder = self.folder / name
        identity = open_identity(folder, self.topology.cluster_id, name, may_format=not lost, may_learn=lost)
        service = StorageService(
            name=name,
            group=group,
            replica=replica,
            folder=folder,
            identity=identity,
            topology=self.topology,
            carrier=self.network.carrier(name),
            config=StorageConfig(engine_cache_mb=8, engine_write_buffer_mb=4),
            counters=Counters(),
            seed=replica,
        )
        await service.start()
        identity.mark_formatted()
        service.allow_votes()
        self.network.register(name, service.handle)
        self.storage[name] = service

    async def stop_storage(self, name: str) -> None:
        service = self.storage.pop(name)
        self.network.kill(name)
        await service.stop()
        service._identity.close()

    async def _start_cold(self, group: int, replica: int) -> None:
        name = f"cold-{group}-{replica}"
        node = ColdService(
            name,
            group,
            replica,
            self.folder / name,
            self.topology,
            self.network.carrier(name),
            disks=self.topology.cold_disks,
            read_threads=1,
            counters=Counters(),
        )
        await node.start()
        self.network.register(name, node.handle)
        self.cold[name] = node

    # ------------------------------------------------------------ the Router

    async def set_restoring(self, restore: str, phase: str) -> None:
        """As the Router does it: durably, then everybody is told."""
        self.router.set_restoring(restore, phase)
        restoring: Restoring | None = self.router.topology().restoring
        self.topology = msgspec.structs.replace(self.topology, restoring=restoring, epoch=self.topology.epoch + 1)
        self.view.update(self.topology)
        for storage in self.storage.values():
            storage.update(self.topology)
        for cold in self.cold.values():
            cold.update(self.topology)

    # ------------------------------------------------------------ clients

    def key(self, table: str, owner: bytes) -> bytes:
        return timeline_key(table.encode(), owner, self.topology.buckets)

    async def put(self, timeline: bytes, items: Mapping[bytes, bytes | None], *, if_version: int = -1) -> int:
        """Write items (None deletes) in one entry; its version. Raises what the store refuses it for."""
        kinds = bytes(DELETE if value is None else PUT for value in items.values())
        return await self._write(timeline, kinds, list(items), [value or b"" for value in items.values()], if_version)

    async def wipe(self, timeline: bytes) -> int:
        return await self._write(timeline, bytes((WIPE,)), [b""], [b""], -1)

    async def _write(self, timeline: bytes, kinds: bytes, keys: list[bytes], values: list[bytes], v: int) -> int:
        request = WriteRequest(timeline, kinds, keys, values, if_version=v)
        (outcome,) = await drive(write(self.view, [request], 10), self.client)
        if not isinstance(outcome, int):
            raise outcome
        return outcome

    async def pages(self, timelines: Sequence[bytes], limit: int = 7) -> Pages:
        """Every item of timelines, in pages."""
        found: Pages = {timeline: (-1, []) for timeline in timelines}
        waiting = dict.fromkeys(timelines, b"")
        while waiting:
            queries = PageQueries.of([PageQuery(timeline, before, limit) for timeline, before in waiting.items()])
            answers = (await drive(read_pages(self.view, queries, 10), self.client)).rows()
            following: dict[bytes, bytes] = {}
            for timeline, page in zip(waiting, answers, strict=True):
                assert isinstance(page, PageResult), page
                keys = keys_of(page.items)
                version, rows = found[timeline]
                assert version in (-1, page.version)
                rows += [
                    (key, item.value, item.version, item.written_us) for key, item in zip(keys, page.items, strict=True)
                ]
                found[timeline] = page.version, rows
                if page.more:
                    following[timeline] = keys[-1]
            waiting = following
        return found

    async def sink(self, table: str, before: int, run: str, *, now_us: int = 0) -> SinkReport:
        """Run the sink by event time."""
        cut_offs = CutOffs(before, 1 << 62)
        task = TableSink(table.encode(), self.topology.tables[table], cut_offs)
        report = await drive(sink(self.view, [task], run=run, now_us=now_us, settings=SINK), self.client)
        assert report.errors == [], report.errors
        return report

    async def verify(self) -> VerifyReport:
        """Compare all replicas by digest."""
        return await drive(verify(self.view.routing), self.client)

    def evicted(self) -> int:
        return int(min(s.counters.totals.get("rows_evicted", 0) for s in self.storage.values()))


def named(timeline: bytes) -> str:
    """A timeline in words."""
    _, table, owner = split_timeline(timeline)
    return f"{table.decode()}/{owner!r}"
