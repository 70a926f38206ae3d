"""Full disks, on real small disks: writes are refused clearly, reads go on, writes come back, nothing is lost."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from small_disk import ENGINE_NEEDS_BYTES, SmallDisk, engines_on, small_disk
from storage_cluster import BUCKETS, StorageCluster, topology, wait_for
from timetier.cluster.client.scripts import ItemQueries, ItemQuery, ItemResult, WriteRequest, read_items, write
from timetier.cluster.client.view import ClientSettings, View
from timetier.cluster.config import StorageConfig
from timetier.cluster.drive import drive
from timetier.cluster.errors import OutcomeUnknown, TimeTierError, Unavailable
from timetier.cluster.keys import item_key, priority, timeline_key
from timetier.cluster.messages import PUT

MIB = 1 << 20
DISK_BYTES = 64 * MIB
RESERVE_BYTES = 16 * MIB
VALUE_BYTES = 100_000
CONFIG = StorageConfig(
    engine_cache_mb=8, engine_write_buffer_mb=2, disk_reserve_mb=RESERVE_BYTES // MIB, catch_up_interval_s=0.5
)


@contextlib.contextmanager
def disks(folder: Path, *replicas: int) -> Iterator[dict[int, SmallDisk]]:
    """A small disk for each of these replicas."""
    with contextlib.ExitStack() as stack:
        yield {n: stack.enter_context(small_disk(folder / f"storage-0-{n}", DISK_BYTES)) for n in replicas}


def cluster_on(
    folder: Path, found: dict[int, SmallDisk], *, free_bytes: Callable[[Path], int] | None = None
) -> StorageCluster:
    """A group, some of whose replicas have small disks."""
    by_name = {disk.folder.name: disk for disk in found.values()}
    engines = engines_on(by_name, CONFIG.engine_cache_mb, CONFIG.engine_write_buffer_mb)
    return StorageCluster(folder, CONFIG, free_bytes=free_bytes or measure_by(found), open_engine=engines)


def measure_by(found: dict[int, SmallDisk]) -> Callable[[Path], int]:
    """Free bytes of a replica's folder; replicas without a small disk have plenty."""
    by_name = {disk.folder.name: disk for disk in found.values()}
    return lambda folder: by_name[folder.name].free() if folder.name in by_name else 1 << 40


def blind(_folder: Path) -> int:
    """Room enough, says a look that came before somebody else filled the disk."""
    return 1 << 40


class Writer:
    """A client that remembers what was acknowledged, and what may have been applied."""

    def __init__(self, cluster: StorageCluster) -> None:
        self.cluster = cluster
        settings = ClientSettings(attempt_timeout_s=1.0)
        self.view = View(topology(), now=time.monotonic, random=Random(1), settings=settings)
        self.acknowledged: dict[bytes, bytes] = {}
        self.unknown: dict[bytes, bytes] = {}
        self.number = 0
        self.random = Random(2)

    def owner(self, first: int | None = None) -> bytes:
        """A timeline that was never written, of which replica `first` comes first."""
        while True:
            self.number += 1
            timeline = timeline_key(b"t", b"owner-%d" % self.number, BUCKETS)
            if first is None or priority(timeline, 3)[0] == first:
                return timeline

    async def write(self, *, first: int | None = None, timeout_s: float = 10.0) -> int | TimeTierError:
        timeline = self.owner(first)
        value = self.random.randbytes(VALUE_BYTES)  # else the engine would compress it to nothing
        request = WriteRequest(timeline, bytes((PUT,)), [item_key(1)], [value])
        (result,) = await drive(write(self.view, [request], timeout_s), self.cluster.client)
        if isinstance(result, int):
            self.acknowledged[timeline] = value
        elif isinstance(result, OutcomeUnknown):
            self.unknown[timeline] = value
        return result

    async def check(self) -> None:
        """What was acknowledged is there, what is unknown is there whole or not at all; all of it can be read."""
        expected = self.acknowledged | self.unknown
        queries = [ItemQuery(timeline, item_key(1)) for timeline in expected]
        results: list[Any] = []
        for start in range(0, len(queries), 50):
            part = ItemQueries.of(queries[start : start + 50])
            results += (await drive(read_items(self.view, part, 10), self.cluster.client)).rows()
        for (timeline, value), result in zip(expected.items(), results, strict=True):
            assert isinstance(result, ItemResult), (timeline, result)
            assert result.item or timeline in self.unknown, f"{timeline!r} was acknowledged"
            assert not result.item or result.item.value == value


def run(body: Awaitable[None]) -> None:
    asyncio.run(asyncio.wait_for(body, 60))


async def until_full(cluster: StorageCluster, *replicas: int) -> None:
    full = lambda: all("no writes" in cluster.services[n].status()["reason"] for n in replicas)  # noqa: E731
    await wait_for(full, "full disks to be noticed")


async def until_voting(cluster: StorageCluster) -> None:
    def voting() -> bool:
        return all(
            (s := service.status())["state"] == "voting" and not s["reason"] for service in cluster.services.values()
        )

    await wait_for(voting, "all replicas to vote and to have room", 20)


def test_one_full_replica_costs_its_group_nothing_and_catches_up_when_there_is_room(tmp_path: Path) -> None:
    async def body() -> None:
        with disks(tmp_path, 0) as found:
            async with cluster_on(tmp_path, found) as cluster:
                writer = Writer(cluster)
                for first in range(3):
                    assert await writer.write(first=first) == 1
                found[0].fill(RESERVE_BYTES // 4)
                await until_full(cluster, 0)
                before = {n: dict(cluster.services[n].counters.totals) for n in (1, 2)}
                slowest = 0.0
                for number in range(30):
                    began = time.monotonic()
                    assert await writer.write(first=number % 3) == 1
                    slowest = max(slowest, time.monotonic() - began)
                assert slowest < 1.0, "nobody waited for the full one"
                for number, then in before.items():
                    resends = cluster.services[number].counters.totals.get("resends", 0) - then.get("resends", 0)
                    assert resends == 0, "a majority never waited for the third"
                await writer.check()
                found[0].make_room()
                await until_voting(cluster)
                replica = cluster.services[0]._life.replica
                assert replica is not None
                await wait_for(
                    lambda: all(replica.core.timeline(key).chosen == 1 for key in writer.acknowledged),
                    "catching up",
                    20,
                )
                assert await writer.write(first=0) == 1
                await writer.check()

    run(body())


def test_on_full_disks_writes_are_refused_reads_go_on_and_writes_come_back(tmp_path: Path) -> None:
    async def body() -> None:
        with disks(tmp_path, 0, 1, 2) as found:
            async with cluster_on(tmp_path, found) as cluster:
                writer = Writer(cluster)
                for _ in range(10):
                    assert await writer.write() == 1
                for disk in found.values():
                    disk.fill(RESERVE_BYTES + 4 * MIB)
                refusals: list[TimeTierError] = []

                async def keep_writing() -> None:  # from many sides, so that some are on their way when it is full
                    while True:
                        result = await writer.write(timeout_s=2.0)
                        if isinstance(result, TimeTierError):
                            refusals.append(result)
                            return

                await asyncio.gather(*(keep_writing() for _ in range(20)))
                await until_full(cluster, 0, 1, 2)
                began = time.monotonic()
                result = await writer.write(timeout_s=1.0)
                assert time.monotonic() - began < 1.5
                assert type(result) is Unavailable
                assert "disk" in str(result)
                assert "disk_reserve_mb" in str(result)
                assert "not applied" in str(result)
                assert result.retry_after_s is not None
                await writer.check()  # timelines with an open entry too: there is room to settle it
                assert all(disk.free() > 0 for disk in found.values())
                waiting = asyncio.create_task(writer.write(timeout_s=15.0))
                for disk in found.values():
                    disk.make_room()
                assert await waiting == 1, "a write that waits is taken as soon as there is room"
                await until_voting(cluster)
                assert await writer.write() == 1
                await writer.check()
                assert all(service.status()["boot"] == 1 for service in cluster.services.values())

    run(body())


def test_a_timeline_whose_last_write_met_full_disks_can_be_read_all_the_same(tmp_path: Path) -> None:
    """Its entry is open: one replica has accepted it. With another one down only a Prepare tells what became of it."""

    async def body() -> None:
        with disks(tmp_path, 0, 1, 2) as found:
            async with cluster_on(tmp_path, found) as cluster:
                writer = Writer(cluster)
                assert await writer.write(first=0) == 1
                for number in (1, 2):
                    found[number].fill(RESERVE_BYTES * 3 // 4)
                await until_full(cluster, 1, 2)
                while not writer.unknown:
                    cluster.services[0]._disk._full_peers.clear()  # as if they had not told it yet
                    await writer.write(first=0, timeout_s=1.5)
                found[0].fill(RESERVE_BYTES * 3 // 4)
                await until_full(cluster, 0, 1, 2)
                await writer.check()
                await cluster.stop(2)
                await writer.check()

    run(body())


def test_a_disk_that_somebody_else_fills_to_the_last_byte_ends_a_life_and_nothing_else(tmp_path: Path) -> None:
    async def body() -> None:
        with disks(tmp_path, 0) as found:
            async with cluster_on(tmp_path, found, free_bytes=blind) as cluster:
                writer = Writer(cluster)
                for number in range(40):
                    assert await writer.write(first=number % 3) == 1
                found[0].fill()
                for number in range(10):
                    result = await writer.write(first=number % 3)
                    assert isinstance(result, int), result
                await wait_for(lambda: cluster.services[0].status()["state"] == "failed", "the life to end")
                await writer.check()
                failed = cluster.services[0].status()
                assert "space" in failed["reason"]
                found[0].make_room()
                await until_voting(cluster)
                assert cluster.services[0].status()["boot"] > 1
                assert cluster.services[0].counters.totals.get("rejoins", 0) == 0, "a full disk is no lost disk"
                assert await writer.write(first=0) in (1, 2)
                await writer.check()

    run(body())


def test_a_group_whose_engines_all_failed_for_room_serves_again_with_all_that_was_acknowledged(tmp_path: Path) -> None:
    async def body() -> None:
        with disks(tmp_path, 0, 1, 2) as found:
            async with cluster_on(tmp_path, found, free_bytes=blind) as cluster:
                writer = Writer(cluster)
                for _ in range(40):
                    assert await writer.write() == 1
                for disk in found.values():
                    disk.fill()
                results = await asyncio.gather(*(writer.write(timeout_s=1.5) for _ in range(30)))
                assert all(isinstance(result, Unavailable | OutcomeUnknown) for result in results[3:])
                await wait_for(
                    lambda: all(s.status()["state"] == "failed" for s in cluster.services.values()), "the lives to end"
                )
                for disk in found.values():
                    disk.make_room()
                await until_voting(cluster)
                await writer.check()
                assert await writer.write() == 1
                assert all(s.counters.totals.get("rejoins", 0) == 0 for s in cluster.services.values())

    run(body())


def test_a_node_that_starts_on_a_full_disk_takes_nothing_for_damaged_and_starts_when_there_is_room(
    tmp_path: Path,
) -> None:
    async def body() -> None:
        with disks(tmp_path, 0) as found:
            async with cluster_on(tmp_path, found, free_bytes=blind) as cluster:
                writer = Writer(cluster)
                for number in range(40):
                    assert await writer.write(first=number % 3) == 1
                service = cluster.services.pop(0)
                cluster.network.kill(service.name)
                service._identity.begin_life()  # as after a crash: nothing was closed, so opening has to write
                found[0].fill()
                engine, service._life.engine = service._life.engine, None
                assert engine is not None
                engine.abandon()
                await service.stop()
                service._identity.close()
                with pytest.raises((Unavailable, OSError), match="space"):
                    await cluster.start(0)
                found[0].make_room()
                found[0].fill(ENGINE_NEEDS_BYTES // 2)  # enough for a life to begin, not for its engine
                with pytest.raises(Unavailable, match="space"):
                    await cluster.start(0)
                found[0].make_room()
                await cluster.start(0)
                await until_voting(cluster)
                assert await writer.write(first=0) == 1
                await writer.check()

    run(body())
