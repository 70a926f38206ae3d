"""All three tiers in one process, for tests without Ray: nodes of each tier, a cache node, and a client."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Self

from client_model import FixedSource
from storage_cluster import DAY_US, StorageCluster, start_cold_group, topology, wait_for
from timetier.cluster.client.store import AsyncStore, AsyncTable
from timetier.cluster.cold.service import ColdService
from timetier.cluster.cold.sink_calls import SinkSettings
from timetier.cluster.cold.sink_script import SinkReport, TableSink, sink
from timetier.cluster.cold.sinking import chosen_cut_offs
from timetier.cluster.drive import drive
from timetier.cluster.memory.service import CacheService
from timetier.cluster.messages import AskChosen, ChosenList
from timetier.cluster.topology import TablePolicy, Topology

NOW_US = 1_700_000_000_000_000
POLICY = TablePolicy(per_second=1_000_000, cold_after=30 * DAY_US, window=90 * DAY_US, retention=3_650 * DAY_US)
SINK = SinkSettings(block_rows=64, file_bytes=1 << 20, orphan_grace_s=0, call_timeout_s=5, min_block_bytes=0)


class ThreeTiers:
    """One group of each tier. Use as an async context manager. `table`: of the policy above, in microseconds."""

    def __init__(self, folder: Path, shape: Topology | None = None) -> None:
        self.folder = folder
        self.storage = StorageCluster(folder)
        self.storage.topology = shape or topology(tables={"t": POLICY})
        self.cold: list[ColdService] = []
        self.cache = CacheService(
            "cache-0-0",
            0,
            self.storage.topology,
            self.storage.network.carrier("cache-0-0"),
            budget_bytes=8 << 20,
            wall_us=lambda: NOW_US,
        )
        self.store: AsyncStore
        self.table: AsyncTable

    async def __aenter__(self) -> Self:
        await self.storage.__aenter__()
        self.cold = await start_cold_group(self.storage, self.folder)
        await self.cache.start()
        self.storage.network.register("cache-0-0", self.cache.handle)
        self.store = AsyncStore(self.storage.network.carrier("user"), self.storage.topology, FixedSource())
        self.table = self.store.table("t")
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.store.close()
        await self.cache.stop()
        for node in self.cold:
            await node.stop()
        await self.storage.__aexit__(*exc)

    async def agree(self) -> None:
        """Wait until every replica knows of every entry that it was chosen: the sink passes by what is open."""
        async with asyncio.timeout(20):
            while True:
                asked = [self.storage.client.call(f"storage-0-{r}", AskChosen(0, b""), 5) for r in range(3)]
                told = await asyncio.gather(*asked)
                if all(isinstance(one, ChosenList) and one == told[0] for one in told):
                    return
                await asyncio.sleep(0.02)

    async def sink(self, before: int, run: str = "run", now_us: int = NOW_US) -> SinkReport:
        """Sink everything with a timestamp < `before`, whenever it was written; `now_us`: for the horizon."""
        await self.agree()
        cut_offs = chosen_cut_offs(POLICY, now_us, before=before, by_event_time=True)
        tasks = [TableSink(b"t", POLICY, cut_offs)]
        script = sink(self.store.view, tasks, run=run, now_us=now_us, settings=SINK)
        report = await drive(script, self.storage.client)
        assert report.errors == [], report.errors
        assert report.skipped_timelines == 0
        return report

    def evicted(self) -> int:
        """Rows that the replica with the fewest has evicted."""
        return min(int(s.counters.totals.get("rows_evicted", 0)) for s in self.storage.services.values())

    async def sink_and_evict(self, before: int, run: str = "run", now_us: int = NOW_US) -> SinkReport:
        """The same, and wait until every replica has evicted the rows."""
        done = self.evicted()
        report = await self.sink(before, run, now_us)
        await wait_for(lambda: self.evicted() >= done + report.rows, "eviction on all replicas")
        return report

    async def stop_chores(self) -> None:
        """No replica evicts or purges any more."""
        for service in self.storage.services.values():
            chores = [t for t in service._tasks if getattr(t.get_coro(), "__name__", "") == "_do_chores"]
            assert chores, "the task that does chores has another name"
            for task in chores:
                task.cancel()
            await asyncio.gather(*chores, return_exceptions=True)

    def cold_files(self, replica: int) -> list[Path]:
        """Files of one cold node."""
        return sorted((self.folder / f"cold-0-{replica}").rglob("*.arrow"))
