"""The sink against real storage services over RocksDB and real cold nodes: items stay readable across the tiers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from random import Random

from read_answers import keys_of
from storage_cluster import POLICY, StorageCluster, start_cold_group, wait_for
from timetier.cluster.client.scripts import PageQueries, PageQuery, PageResult, WriteRequest, read_pages, write
from timetier.cluster.client.view import View
from timetier.cluster.cold.service import ColdService
from timetier.cluster.cold.sink_calls import SinkSettings, read_links
from timetier.cluster.cold.sink_script import SinkReport, TableSink, sink
from timetier.cluster.cold.sinking import chosen_cut_offs
from timetier.cluster.drive import drive
from timetier.cluster.keys import item_key, timeline_key
from timetier.cluster.messages import DELETE, PUT

OWNERS = [b"owner-%d" % number for number in range(12)]
EACH = 25
STEP = POLICY.window // 10
SETTINGS = SinkSettings(block_rows=16, file_bytes=1 << 16, orphan_grace_s=0, call_timeout_s=5)


class Tiers:
    """A storage group, its cold group, and a client."""

    def __init__(self, storage: StorageCluster) -> None:
        self.storage = storage
        self.view = View(storage.topology, now=asyncio.get_running_loop().time, random=Random(1))
        self.cold: list[ColdService] = []
        self.expected: dict[bytes, dict[bytes, bytes]] = {owner: {} for owner in OWNERS}

    async def start_cold(self, folder: Path) -> None:
        self.cold = await start_cold_group(self.storage, folder)

    def key(self, owner: bytes) -> bytes:
        return timeline_key(b"t", owner, self.storage.topology.buckets)

    async def write(self, owner: bytes, items: dict[bytes, bytes | None]) -> None:
        kinds = bytes(DELETE if value is None else PUT for value in items.values())
        request = WriteRequest(self.key(owner), kinds, list(items), [value or b"" for value in items.values()])
        (version,) = await drive(write(self.view, [request], 10), self.storage.client)
        assert isinstance(version, int), version
        for key, value in items.items():
            if value is None:
                self.expected[owner].pop(key, None)
            else:
                self.expected[owner][key] = value

    async def check(self) -> None:
        """Every timeline, read in pages from the newest to the oldest, is what was written."""
        for owner, expected in self.expected.items():
            found: dict[bytes, bytes] = {}
            before, more = b"", True
            while more:
                query = PageQuery(self.key(owner), before, 7)
                (page,) = (await drive(read_pages(self.view, PageQueries.of([query]), 10), self.storage.client)).rows()
                assert isinstance(page, PageResult), page
                keys = keys_of(page.items)
                found.update(zip(keys, [item.value for item in page.items], strict=True))
                before, more = (keys[-1] if keys else b""), page.more
            assert found == expected, owner

    async def sink(self, before: int, run: str) -> SinkReport:
        cut_offs = chosen_cut_offs(POLICY, 0, before=before, by_event_time=True)
        script = sink(self.view, [TableSink(b"t", POLICY, cut_offs)], run=run, now_us=0, settings=SETTINGS)
        return await drive(script, self.storage.client)

    def evicted(self) -> list[int]:
        return [int(s.counters.totals.get("rows_evicted", 0)) for s in self.storage.services.values()]


def test_items_stay_readable_while_they_sink_change_and_sink_again(tmp_path: Path) -> None:
    async def body() -> None:
        async with StorageCluster(tmp_path) as storage:
            tiers = Tiers(storage)
            await tiers.start_cold(tmp_path)
            for owner in OWNERS:
                await tiers.write(owner, {item_key(at * STEP): b"%d of " % at + owner for at in range(EACH)})
            await tiers.check()

            report = await tiers.sink(20 * STEP, "first")
            assert report.errors == []
            assert (report.rows, report.skipped_timelines, report.fenced_buckets) == (20 * len(OWNERS), 0, 0)
            await wait_for(lambda: tiers.evicted() == [20 * len(OWNERS)] * 3, "eviction on all replicas")
            await tiers.check()

            await tiers.write(OWNERS[0], {item_key(3 * STEP): b"late", item_key(4 * STEP): None})
            await tiers.write(OWNERS[1], {item_key(5 * STEP + 1): b"between"})
            await tiers.check()
            report = await tiers.sink(22 * STEP, "second")
            assert report.errors == []
            assert report.rows == 2 * len(OWNERS) + 3
            await wait_for(lambda: min(tiers.evicted()) >= 22 * len(OWNERS) + 3, "eviction on all replicas")
            await tiers.check()

            again = await tiers.sink(22 * STEP, "third")
            assert (again.errors, again.rows) == ([], 0)
            await tiers.check()
            files = [sorted(p.name for p in (tmp_path / f"cold-0-{r}").rglob("*.arrow")) for r in range(3)]
            assert files[0] == files[1] == files[2]
            assert await live_files(tiers) == set(files[0])
            for node in tiers.cold:
                await node.stop()

    asyncio.run(asyncio.wait_for(body(), 90))


async def live_files(tiers: Tiers) -> set[str]:
    """Files that links name, read the way the removal of orphans reads them."""
    found: set[str] = set()
    for bucket in range(tiers.storage.topology.buckets):
        links = await drive(read_links(tiers.view, bucket, 0, SETTINGS), tiers.storage.client)
        found.update(block.file for link in links for block in link.blocks)
    return found


def test_two_runs_at_once_do_no_harm_to_real_services(tmp_path: Path) -> None:
    async def body() -> None:
        async with StorageCluster(tmp_path) as storage:
            tiers = Tiers(storage)
            await tiers.start_cold(tmp_path)
            for owner in OWNERS:
                await tiers.write(owner, {item_key(at * STEP): b"%d" % at for at in range(EACH)})
            first, second = await asyncio.gather(tiers.sink(20 * STEP, "a"), tiers.sink(20 * STEP, "b"))
            stopped, other = sorted((first, second), key=lambda report: not report.fenced)
            assert stopped.errors == [f"this run has stopped: fenced by run {other.run}, epoch 2"]
            assert (other.errors, other.epoch) == ([], 2)
            await tiers.check()
            last = await tiers.sink(20 * STEP, "c")
            assert last.errors == []
            assert first.rows + second.rows + last.rows >= 20 * len(OWNERS)
            await wait_for(lambda: tiers.evicted() == [20 * len(OWNERS)] * 3, "eviction on all replicas")
            await tiers.check()
            for node in tiers.cold:
                await node.stop()

    asyncio.run(asyncio.wait_for(body(), 90))
