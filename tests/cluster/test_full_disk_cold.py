"""A full disk of a cold node while the sink runs: the run fails cleanly, nothing is lost, the next one succeeds."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from random import Random

from read_answers import keys_of, values_of
from small_disk import LimitedFiles, SmallDisk, small_disk
from storage_cluster import POLICY, StorageCluster, start_cold_group, wait_for
from timetier.cluster.client.scripts import PageQueries, PageQuery, PageResult, WriteRequest, read_pages, write
from timetier.cluster.client.view import View
from timetier.cluster.cold.service import ColdService
from timetier.cluster.cold.sink_calls import SinkSettings
from timetier.cluster.cold.sink_script import SinkReport, TableSink, sink
from timetier.cluster.cold.sinking import chosen_cut_offs
from timetier.cluster.drive import drive
from timetier.cluster.keys import item_key, timeline_key
from timetier.cluster.messages import PUT

MIB = 1 << 20
OWNERS = [b"owner-%d" % number for number in range(8)]
ITEMS = 40
STEP = POLICY.window // 100
SETTINGS = SinkSettings(block_rows=16, file_bytes=MIB, orphan_grace_s=0, piece_bytes=256 << 10, back_off_s=0.01)


class Tiers:
    """A storage group with items that no compression makes smaller, and a cold group with one small disk."""

    def __init__(self, storage: StorageCluster) -> None:
        self.storage = storage
        self.view = View(storage.topology, now=time.monotonic, random=Random(1))
        self.cold: list[ColdService] = []
        self.expected: dict[bytes, dict[bytes, bytes]] = {}

    async def start_cold(self, folder: Path, disk: SmallDisk) -> None:
        files = {1: LimitedFiles(disk)} if not disk.mounted else None
        self.cold = await start_cold_group(self.storage, folder, files)

    async def fill(self) -> None:
        random = Random(3)
        for owner in OWNERS:
            items = {item_key(at * STEP): random.randbytes(10_000) for at in range(ITEMS)}
            timeline = timeline_key(b"t", owner, self.storage.topology.buckets)
            request = WriteRequest(timeline, bytes((PUT,)) * ITEMS, list(items), list(items.values()))
            assert await drive(write(self.view, [request], 10), self.storage.client) == [1]
            self.expected[timeline] = items

    async def check(self) -> None:
        for timeline, items in self.expected.items():
            query = PageQuery(timeline, b"", ITEMS)
            (page,) = (await drive(read_pages(self.view, PageQueries.of([query]), 10), self.storage.client)).rows()
            assert isinstance(page, PageResult), page
            assert dict(zip(keys_of(page.items), values_of(page.items), strict=True)) == items

    async def sink(self, run: str) -> SinkReport:
        cut_offs = chosen_cut_offs(POLICY, 0, before=ITEMS * STEP, by_event_time=True)
        script = sink(self.view, [TableSink(b"t", POLICY, cut_offs)], run=run, now_us=0, settings=SETTINGS)
        return await drive(script, self.storage.client)

    def evicted(self) -> list[int]:
        return [int(s.counters.totals.get("rows_evicted", 0)) for s in self.storage.services.values()]


def half_written(folder: Path) -> list[Path]:
    return list(folder.rglob("*.part"))


def test_a_sink_that_meets_a_full_cold_disk_fails_cleanly_and_the_next_run_moves_everything(tmp_path: Path) -> None:
    async def body() -> None:
        with small_disk(tmp_path / "cold-0-1" / "disk-0", 16 * MIB) as disk:
            async with StorageCluster(tmp_path) as storage:
                tiers = Tiers(storage)
                await tiers.start_cold(tmp_path, disk)
                await tiers.fill()
                disk.fill(MIB // 2)
                report = await tiers.sink("first")
                assert report.errors
                assert any("disk is full" in error and "cold-0-1" in error for error in report.errors), report.errors
                await tiers.check()
                evicted = tiers.evicted()
                assert max(evicted) < len(OWNERS) * ITEMS, "what is not in three places stays in the storage tier"
                assert not half_written(tmp_path), "it takes no room"

                disk.make_room()
                report = await tiers.sink("second")
                assert report.errors == []
                await wait_for(lambda: min(tiers.evicted()) == len(OWNERS) * ITEMS, "eviction on all replicas")
                await tiers.check()
                report = await tiers.sink("third")
                assert (report.errors, report.rows) == ([], 0)
                files = [sorted(p.name for p in (tmp_path / f"cold-0-{r}").rglob("*.arrow")) for r in range(3)]
                assert files[0] == files[1] == files[2], "files of the run that failed are gone"
                await tiers.check()
                for node in tiers.cold:
                    await node.stop()

    asyncio.run(asyncio.wait_for(body(), 60))
