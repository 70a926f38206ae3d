"""Comparing and mending replicas that are real storage services over RocksDB."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from random import Random

from storage_cluster import BUCKETS, POLICY, StorageCluster, wait_for
from timetier.cluster.client.scripts import WriteRequest, write
from timetier.cluster.client.view import View
from timetier.cluster.cold.link import FORMAT, Block, Link, encode_link
from timetier.cluster.comparing import BEHIND, DIFFERS
from timetier.cluster.config import StorageConfig
from timetier.cluster.drive import drive
from timetier.cluster.keys import item_key, split_timeline, system_timeline, timeline_hash, timeline_key
from timetier.cluster.messages import DELETE, PUT, pack_i64
from timetier.cluster.paxos.rows import log_key, meta_key, prefix_end, rows_prefix, version_of
from timetier.cluster.routing import Routing
from timetier.cluster.storage.engine import RocksEngine
from timetier.cluster.verifying import VerifyReport, VerifySettings, verify

TIMELINES = [timeline_key(b"t", b"owner-%d" % number, BUCKETS) for number in range(60)]
VICTIM = TIMELINES[7]
EACH = 8
CONFIG = StorageConfig(engine_cache_mb=8, engine_write_buffer_mb=4, catch_up_interval_s=0.2)


class Writer:
    """Writes through the client's own script."""

    def __init__(self, cluster: StorageCluster) -> None:
        self.cluster = cluster
        self.view = View(cluster.topology, now=asyncio.get_running_loop().time, random=Random(5))

    async def write(self, timeline: bytes, kinds: bytes, keys: list[bytes], values: list[bytes]) -> int:
        (version,) = await drive(
            write(self.view, [WriteRequest(timeline, kinds, keys, values)], 10), self.cluster.client
        )
        assert isinstance(version, int), version
        return version

    async def put(self, timeline: bytes, at: int, value: bytes) -> int:
        return await self.write(timeline, bytes((PUT,)), [item_key(at)], [value])

    async def fill(self) -> None:
        """Some versions of some items in every timeline, deletions too."""
        for at in range(EACH):
            await asyncio.gather(*(self.put(t, at % 5, b"%d of " % at + t[-8:]) for t in TIMELINES))
        await asyncio.gather(*(self.write(t, bytes((DELETE,)), [item_key(2)], [b""]) for t in TIMELINES[::3]))


async def compare(cluster: StorageCluster, *, mend: bool = False, patience_s: float = 2.0) -> VerifyReport:
    settings = VerifySettings(patience_s=patience_s)
    return await drive(verify(Routing(cluster.topology), settings=settings, mend=mend), cluster.client)


async def behind_its_back(cluster: StorageCluster, number: int, change: Callable[[RocksEngine], None]) -> None:
    """Stop a replica, change its database, start it again."""
    await cluster.stop(number)
    engine = RocksEngine(cluster.folder / f"storage-0-{number}" / "engine", create=False, cache_mb=8, write_buffer_mb=4)
    change(engine)
    engine.close()
    await cluster.start(number)
    await cluster.ready()


def rows_of(engine: RocksEngine, timeline: bytes) -> list[tuple[bytes, bytes]]:
    prefix = rows_prefix(timeline)
    return list(engine.scan(prefix, prefix_end(prefix)))


def newest_row(engine: RocksEngine, timeline: bytes) -> tuple[bytes, bytes]:
    return max(rows_of(engine, timeline), key=lambda row: version_of(row[0]))


def flip(timeline: bytes) -> Callable[[RocksEngine], None]:
    """Another value in the newest row of a timeline."""

    def change(engine: RocksEngine) -> None:
        name, row = newest_row(engine, timeline)
        engine.put(name, row[:-1] + bytes((row[-1] ^ 1,)))

    return change


def lose_row(timeline: bytes) -> Callable[[RocksEngine], None]:
    def change(engine: RocksEngine) -> None:
        engine.delete(newest_row(engine, timeline)[0])

    return change


def lose_timeline(timeline: bytes) -> Callable[[RocksEngine], None]:
    """As if it had never been written."""

    def change(engine: RocksEngine) -> None:
        log = engine.scan(log_key(timeline, 0), log_key(timeline, 1 << 62))
        for name in [meta_key(timeline), *(name for name, _ in [*log, *rows_of(engine, timeline)])]:
            engine.delete(name)

    return change


@contextlib.asynccontextmanager
async def writing(writer: Writer, timelines: list[bytes]) -> AsyncIterator[list[int]]:
    """Writes without a pause while the body runs. Yields the versions that were written."""
    versions: list[int] = []

    async def work(timeline: bytes) -> None:
        at = 100
        while True:
            versions.append(await writer.put(timeline, at, b"meanwhile %d" % at))
            at += 1

    tasks = [asyncio.create_task(work(timeline)) for timeline in timelines]
    try:
        yield versions
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def test_equal_replicas_are_found_equal_while_writes_go_on(tmp_path: Path) -> None:
    async def body() -> None:
        async with StorageCluster(tmp_path, CONFIG) as cluster:
            writer = Writer(cluster)
            await writer.fill()
            async with writing(writer, TIMELINES[:6]) as versions:
                for _ in range(3):
                    versions.clear()
                    report = await compare(cluster)
                    assert report.ok, report
                    assert report.timelines == report.equal == len(TIMELINES)
                    await wait_for(lambda: len(versions) > 10, "writes that go on")

    asyncio.run(asyncio.wait_for(body(), 60))


def test_what_was_changed_or_lost_in_one_replica_is_named_and_mended(tmp_path: Path) -> None:
    async def body() -> None:
        async with StorageCluster(tmp_path, CONFIG) as cluster:
            writer = Writer(cluster)
            await writer.fill()
            damage = {TIMELINES[1]: flip, TIMELINES[2]: lose_row, TIMELINES[3]: flip}

            def change(engine: RocksEngine) -> None:
                for timeline, make in damage.items():
                    make(timeline)(engine)

            await behind_its_back(cluster, 0, change)
            report = await compare(cluster)
            assert {d.timeline: (d.kind, d.outliers) for d in report.differences} == dict.fromkeys(
                damage, (DIFFERS, (0,))
            )
            assert not report.ok

            async with writing(writer, TIMELINES[10:14]) as versions:
                mended = await compare(cluster, mend=True)
                assert mended.ok, mended
                assert mended.mended == len(damage)
                await wait_for(lambda: bool(versions), "writes that went on")
            assert (await compare(cluster)).ok

    asyncio.run(asyncio.wait_for(body(), 60))


def test_a_timeline_that_is_written_all_the_time_is_mended_too(tmp_path: Path) -> None:
    async def body() -> None:
        async with StorageCluster(tmp_path, CONFIG) as cluster:
            writer = Writer(cluster)
            await writer.fill()
            await behind_its_back(cluster, 1, flip(VICTIM))
            async with writing(writer, [VICTIM]) as versions:
                report = await compare(cluster)
                assert [(d.timeline, d.kind, d.outliers) for d in report.differences] == [(VICTIM, DIFFERS, (1,))]
                before = len(versions)
                mended = await compare(cluster, mend=True)
                assert mended.ok, mended
                await wait_for(lambda: len(versions) > before, "writes that went on")
            assert (await compare(cluster)).ok

    asyncio.run(asyncio.wait_for(body(), 60))


def test_a_timeline_that_one_replica_lacks_is_found_and_fetched(tmp_path: Path) -> None:
    """The replica fetches it by itself when it compares how far it is; until then it is behind, never equal."""

    async def body() -> None:
        async with StorageCluster(tmp_path, CONFIG) as cluster:
            writer = Writer(cluster)
            await writer.fill()
            await behind_its_back(cluster, 2, lose_timeline(VICTIM))
            first = await compare(cluster)
            assert first.ok or [(d.timeline, d.kind, d.outliers) for d in first.differences] == [(VICTIM, BEHIND, (2,))]
            assert (await compare(cluster, mend=True)).ok
            replicas = [service._life.replica for service in cluster.services.values()]
            assert len({replica.core.timeline(VICTIM).chosen for replica in replicas if replica is not None}) == 1

    asyncio.run(asyncio.wait_for(body(), 60))


def test_where_all_three_differ_they_are_left_alone(tmp_path: Path) -> None:
    async def body() -> None:
        async with StorageCluster(tmp_path, CONFIG) as cluster:
            await Writer(cluster).fill()
            await behind_its_back(cluster, 0, flip(VICTIM))
            await behind_its_back(cluster, 1, lose_row(VICTIM))
            before = await compare(cluster)
            report = await compare(cluster, mend=True)
            for found in (before, report):
                (difference,) = found.differences
                assert (difference.timeline, difference.kind) == (VICTIM, DIFFERS)
                assert (difference.outliers, difference.mended) == ((), None)
                assert "all replicas differ" in difference.in_words()
            assert before.differences[0].told == report.differences[0].told, "nothing was touched"

    asyncio.run(asyncio.wait_for(body(), 60))


def test_a_replica_that_is_down_is_said_and_is_no_success(tmp_path: Path) -> None:
    async def body() -> None:
        async with StorageCluster(tmp_path, CONFIG) as cluster:
            await Writer(cluster).fill()
            await cluster.stop(1)
            for mend in (False, True):
                report = await compare(cluster, mend=mend, patience_s=0.3)
                assert not report.ok
                assert [(n.replica, n.node) for n in report.not_compared] == [(1, "storage-0-1")]
                assert report.equal == report.timelines == len(TIMELINES)

    asyncio.run(asyncio.wait_for(body(), 60))


def test_rows_that_only_some_replicas_have_evicted_yet_are_no_difference(tmp_path: Path) -> None:
    async def body() -> None:
        async with StorageCluster(tmp_path, CONFIG) as cluster:
            writer = Writer(cluster)
            await writer.fill()
            bucket = int.from_bytes(VICTIM[:4], "big")
            slow = cluster.services[2]._life.replica
            assert slow is not None
            slow.run_chores = lambda now: False  # type: ignore[method-assign]
            version = await writer.put(VICTIM, 50, b"stays")
            link = link_of(VICTIM, version - 1)
            await writer.write(system_timeline(bucket), bytes((PUT,)), [link.key], [encode_link(link)])
            services = cluster.services
            await wait_for(lambda: services[0].counters.totals.get("rows_evicted", 0) > 0, "eviction on a replica")
            await wait_for(lambda: services[1].counters.totals.get("rows_evicted", 0) > 0, "eviction on a replica")
            assert services[2].counters.totals.get("rows_evicted", 0) == 0
            report = await compare(cluster)
            assert report.ok, report

    asyncio.run(asyncio.wait_for(body(), 60))


def link_of(timeline: bytes, version: int) -> Link:
    """A link that covers everything of a timeline up to a version."""
    bucket, table, owner = split_timeline(timeline)
    owners, versions = timeline_hash(table, owner).to_bytes(8, "little"), pack_i64([version])
    low, high = item_key(0), item_key(POLICY.window)
    block = Block("file.arrow", 0, 10, 0, 4, low, high, owner, owner)
    before = (1 << 62, 1 << 62)
    return Link(FORMAT, bucket, table, 0, POLICY.window, 1, *before, owners, versions, 4, 100, "run", [block])


def test_a_wiped_replica_is_not_compared_while_it_learns_and_equal_when_it_votes_again(tmp_path: Path) -> None:
    async def body() -> None:
        async with StorageCluster(tmp_path, CONFIG) as cluster:
            writer = Writer(cluster)
            await writer.fill()
            await cluster.stop(2)
            shutil.rmtree(tmp_path / "storage-0-2")
            await cluster.stop(1)  # without it the other can't learn all that there is to know
            await cluster.start(2, may_format=False, may_learn=True)
            report = await compare(cluster, mend=True, patience_s=0.3)
            assert not report.ok
            assert {n.replica for n in report.not_compared} == {1, 2}
            await cluster.start(1)
            async with writing(writer, TIMELINES[:3]) as versions:
                await cluster.ready()
                report = await compare(cluster)
                assert report.ok, report
                await wait_for(lambda: bool(versions), "writes that went on")
            assert report.equal == len(TIMELINES)

    asyncio.run(asyncio.wait_for(body(), 60))
