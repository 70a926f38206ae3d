"""A storage group of real services over RocksDB, joined by the in-memory carrier, for tests without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

from timetier.cluster.carriers.memory import MemoryCarrier, MemoryNetwork
from timetier.cluster.cold.files import SystemFiles
from timetier.cluster.cold.service import ColdService
from timetier.cluster.config import StorageConfig
from timetier.cluster.counters import Counters
from timetier.cluster.identity import Identity, open_identity
from timetier.cluster.messages import PUT, Write, Written, pack_i64, pack_u32, unpack_i64
from timetier.cluster.storage.flusher import IN_PLACE_S
from timetier.cluster.storage.home import OpenEngine
from timetier.cluster.storage.service import StorageService, free_bytes
from timetier.cluster.storage.version_home import VersionHome
from timetier.cluster.topology import TablePolicy, Topology

BUCKETS = 64
DAY_US = 86_400_000_000
POLICY = TablePolicy(per_second=1_000_000, cold_after=30 * DAY_US, window=365 * DAY_US)


def topology(**changes: object) -> Topology:
    fields: dict[str, object] = {
        "cluster_id": "test-cluster",
        "namespace": "test",
        "epoch": 1,
        "buckets": BUCKETS,
        "storage_groups": 1,
        "storage_replicas": 3,
        "cold_groups": 1,
        "cold_replicas": 3,
        "cold_disks": 1,
        "cache_nodes": 1,
        "tables": {"t": POLICY},
        "default_table": None,
        "addresses": {},
        "secret": "00" * 32,
    }
    return Topology(**{**fields, **changes})  # type: ignore[arg-type]


async def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 15.0) -> None:
    """Wait until a condition holds; fail with its name at the deadline."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, f"timed out waiting for: {what}"
        await asyncio.sleep(0.01)


class StorageCluster:
    """Three `StorageService`s by name `storage-0-R`. Use as an async context manager."""

    def __init__(
        self,
        folder: Path,
        config: StorageConfig | None = None,
        *,
        free_bytes: Callable[[Path], int] = free_bytes,
        open_engine: OpenEngine | None = None,
        flush_in_place_s: float = IN_PLACE_S,
    ) -> None:
        self.folder = folder
        self.flush_in_place_s = flush_in_place_s
        self.open_engine = open_engine
        self.free_bytes = free_bytes
        self.config = config or StorageConfig(engine_cache_mb=8, engine_write_buffer_mb=4)
        self.network = MemoryNetwork()
        self.topology = topology()
        self.services: dict[int, StorageService] = {}
        self.client: MemoryCarrier = self.network.carrier("client")

    async def __aenter__(self) -> Self:
        for number in range(3):
            await self.start(number)
        await self.ready()
        return self

    async def __aexit__(self, *exc: object) -> None:
        for number in list(self.services):
            await self.stop(number)

    async def start(self, number: int, *, may_format: bool = True, may_learn: bool = False) -> StorageService:
        name = f"storage-0-{number}"
        identity = open_identity(self.folder / name, "test-cluster", name, may_format=may_format, may_learn=may_learn)
        service = StorageService(
            name=name,
            group=0,
            replica=number,
            folder=self.folder / name,
            identity=identity,
            topology=self.topology,
            carrier=self.network.carrier(name),
            config=self.config,
            counters=Counters(),
            seed=number,
            free_bytes=self.free_bytes,
            open_engine=self.open_engine,
            versions=self.memory_of(identity),
            flush_in_place_s=self.flush_in_place_s,
        )
        try:
            await service.start()
        except Exception:
            identity.close()
            raise
        identity.mark_formatted()
        service.allow_votes()
        self.network.register(name, service.handle)
        self.services[number] = service
        return service

    def memory_of(self, identity: Identity) -> VersionHome | None:
        """Where a node's version cache lies; None for memory that is gone with it."""
        return None

    async def stop(self, number: int) -> None:
        service = self.services.pop(number)
        self.network.kill(service.name)
        await service.stop()
        service._identity.close()

    async def ready(self) -> None:
        await wait_for(
            lambda: all(s.status()["state"] == "voting" for s in self.services.values()), "all replicas to vote"
        )

    async def put(
        self, number: int, timeline: bytes, request_id: bytes, items: list[tuple[bytes, bytes]], *, seen: int = 0
    ) -> tuple[int, int]:
        """(outcome, version) of one write of (item key, value) pairs."""
        message = Write(
            1,
            [timeline],
            [request_id],
            pack_i64([seen]),
            pack_i64([-1]),
            pack_u32([len(items)]),
            bytes((PUT,)) * len(items),
            [key for key, _ in items],
            [value for _, value in items],
            3000,
        )
        answer = await self.client.call(f"storage-0-{number}", message, 5.0)
        assert isinstance(answer, Written), answer
        return answer.outcomes[0], unpack_i64(answer.versions)[0]


async def start_cold_group(
    cluster: StorageCluster, folder: Path, files: Mapping[int, SystemFiles] | None = None
) -> list[ColdService]:
    """Three cold nodes with one disk each beside a storage group. `files`: of those that have others, by replica."""
    nodes = []
    for replica in range(3):
        name = f"cold-0-{replica}"
        node = ColdService(
            name,
            0,
            replica,
            folder / name,
            cluster.topology,
            cluster.network.carrier(name),
            disks=1,
            read_threads=1,
            counters=Counters(),
            files=(files or {}).get(replica),
        )
        await node.start()
        cluster.network.register(name, node.handle)
        nodes.append(node)
    return nodes
