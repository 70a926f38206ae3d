"""What a storage node reads when it starts, and for its status, does not grow with its data."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import pytest
from storage_cluster import StorageCluster, wait_for
from timetier.cluster.config import StorageConfig
from timetier.cluster.keys import item_key, priority, timeline_key
from timetier.cluster.messages import OK
from timetier.cluster.storage.engine import DurableEngine, RocksEngine


class CountingRocks(RocksEngine):
    """RocksDB that counts the rows that are read. `engines`: those that were opened, by folder, the last one last."""

    engines: ClassVar[dict[str, list[CountingRocks]]] = {}

    def __init__(self, folder: Path, *, create: bool) -> None:
        super().__init__(folder, create=create, cache_mb=8, write_buffer_mb=4)
        self.rows_read = 0
        self.engines.setdefault(folder.parent.name, []).append(self)

    def get(self, key: bytes) -> bytes | None:
        self.rows_read += 1
        return super().get(key)

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        self.rows_read += len(keys)
        return super().get_many(keys)

    def scan(self, low: bytes, high: bytes, *, reverse: bool = False) -> Iterator[tuple[bytes, bytes]]:
        return self._counted(super().scan(low, high, reverse=reverse))

    def _counted(self, rows: Iterator[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, bytes]]:
        for row in rows:
            self.rows_read += 1
            yield row


def open_engine(folder: Path, create: bool) -> DurableEngine:
    return CountingRocks(folder, create=create)


def rows_read_by_a_restart(folder: Path, timelines: int) -> tuple[int, int]:
    """Rows that a replica reads until it votes and has compared itself with both peers; rows read for its status."""

    async def work() -> tuple[int, int]:
        config = StorageConfig(engine_cache_mb=8, engine_write_buffer_mb=4, catch_up_interval_s=0.2)
        async with StorageCluster(folder, config, open_engine=open_engine) as cluster:
            for number in range(timelines):
                timeline = timeline_key(b"t", b"owner-%d" % number, cluster.topology.buckets)
                first = priority(timeline, 3)[0]
                request = number.to_bytes(16, "big")
                assert await cluster.put(first, timeline, request, [(item_key(number), b"v")]) == (OK, 1)
            service = cluster.services[2]
            rounds = service.status()["catch_up"]["rounds"]
            await wait_for(lambda: service.status()["catch_up"]["rounds"] >= rounds + 2, "comparisons")
            await cluster.stop(2)
            service = await cluster.start(2)
            await cluster.ready()
            await wait_for(lambda: service.status()["catch_up"]["rounds"] >= 2, "comparisons after the restart")
            engine = CountingRocks.engines["storage-0-2"][-1]
            read = engine.rows_read
            for _ in range(5):
                service.status()
            return read, engine.rows_read - read

    return asyncio.run(work())


def test_a_restart_and_the_status_read_as_many_rows_however_many_timelines_there_are(tmp_path: Path) -> None:
    few, for_status = rows_read_by_a_restart(tmp_path / "few", 20)
    many, for_status_of_many = rows_read_by_a_restart(tmp_path / "many", 1_000)
    assert (for_status, for_status_of_many) == (0, 0)
    assert many <= few + 200, "rows of the journal that were not trimmed yet"


@pytest.fixture(autouse=True)
def forget_engines() -> Iterator[None]:
    yield
    CountingRocks.engines.clear()
