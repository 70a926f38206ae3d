"""All three tiers in one process behind the synchronous face of a store, for tests that read cold data as Arrow does.

The nodes run on the event loop of a thread, over the in-memory carrier; the test, Arrow's threads and DuckDB's call
from outside, as in an application.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from random import Random
from typing import Any

from client_model import FixedSource
from storage_cluster import StorageCluster, start_cold_group
from timetier.cluster.client.faces import LoopThread, Store, Table
from timetier.cluster.client.store import AsyncStore
from timetier.cluster.client.view import View
from timetier.cluster.cold.service import ColdService
from timetier.cluster.cold.sink_calls import SinkSettings
from timetier.cluster.cold.sink_script import SinkReport, TableSink, sink
from timetier.cluster.cold.sinking import chosen_cut_offs
from timetier.cluster.drive import drive
from timetier.cluster.memory.service import CacheService
from timetier.cluster.topology import TablePolicy

Row = tuple[bytes, int, bytes, bytes]
"""owner, timestamp, id, value"""

NOW_US = 1_700_000_000_000_000
SMALL_BLOCKS = SinkSettings(block_rows=32, file_bytes=1 << 15, orphan_grace_s=0)


class OpenTiers:
    """A storage group, its cold group, a cache node, and a client of each face."""

    def __init__(self, storage: StorageCluster, cold: list[ColdService], cache: CacheService, random: Random) -> None:
        self.storage = storage
        self.cold = cold
        self.cache = cache
        self.network = storage.network
        self.client = AsyncStore(self.network.carrier("reader"), storage.topology, FixedSource(), random=random)
        self.view = View(storage.topology, now=asyncio.get_running_loop().time, random=random)
        self.runs = 0

    async def sink(
        self,
        table: str = "t",
        *,
        before: int = 1 << 62,
        now_us: int = NOW_US,
        settings: SinkSettings = SMALL_BLOCKS,
    ) -> SinkReport:
        """Sink what is older than `before`, by event time alone."""
        self.runs += 1
        policy = self.view.routing.policy(table)
        task = TableSink(table.encode(), policy, chosen_cut_offs(policy, 0, before=before, by_event_time=True))
        script = sink(self.view, [task], run=f"run-{self.runs:04d}", now_us=now_us, settings=settings)
        report = await drive(script, self.storage.client)
        assert report.errors == [], report.errors
        return report

    def files(self, replica: int = 0) -> list[Path]:
        """The cold files of one node."""
        return sorted((self.storage.folder / f"cold-0-{replica}").rglob("*.arrow"))


@asynccontextmanager
async def open_tiers(
    folder: Path, *, tables: dict[str, TablePolicy] | None = None, seed: int = 1
) -> AsyncIterator[OpenTiers]:
    """The tiers, on the running event loop."""
    storage = StorageCluster(folder)
    if tables is not None:
        storage.topology = _with_tables(storage.topology, tables)
    async with storage:
        cold = await start_cold_group(storage, folder)
        cache = CacheService(
            "cache-0-0", 0, storage.topology, storage.network.carrier("cache-0-0"), budget_bytes=8 << 20
        )
        await cache.start()
        storage.network.register("cache-0-0", cache.handle)
        tiers = OpenTiers(storage, cold, cache, Random(seed))
        try:
            yield tiers
        finally:
            await tiers.client.close()
            await cache.stop()
            for node in cold:
                await node.stop()


def _with_tables(topology: Any, tables: dict[str, TablePolicy]) -> Any:
    import msgspec

    return msgspec.structs.replace(topology, tables=tables)


class TiersInThread:
    """`OpenTiers` on the loop of a thread, with the synchronous store in front."""

    def __init__(self, tiers: OpenTiers, thread: LoopThread) -> None:
        self.tiers = tiers
        self.thread = thread
        self.store = Store(tiers.client, thread)

    def table(self, name: str = "t") -> Table:
        return self.store.table(name)

    def sink(self, table: str = "t", **more: Any) -> SinkReport:
        return self.thread.run(self.tiers.sink(table, **more))

    def sink_all(self, rows: int, table: str = "t", **more: Any) -> None:
        """Sink until `rows` have sunk: a replica may not have heard yet that an entry was chosen."""
        sunk, ends = 0, time.monotonic() + 20
        while sunk < rows:
            assert time.monotonic() < ends, f"{sunk} of {rows} rows sank"
            sunk += self.sink(table, **more).rows

    def wait_for(self, condition: Callable[[], bool], what: str, timeout_s: float = 15.0) -> None:
        """Wait until a condition holds."""

        async def wait() -> None:
            ends = asyncio.get_running_loop().time() + timeout_s
            while not condition():
                assert asyncio.get_running_loop().time() < ends, f"timed out waiting for: {what}"
                await asyncio.sleep(0.01)

        self.thread.run(wait())

    def evicted(self) -> list[int]:
        """Rows that each storage node has evicted."""
        return [int(s.counters.totals.get("rows_evicted", 0)) for s in self.tiers.storage.services.values()]


@contextmanager
def tiers_in_thread(folder: Path, **more: Any) -> Iterator[TiersInThread]:
    """The tiers for a test that is no coroutine."""
    thread = LoopThread()
    stack = contextlib.AsyncExitStack()
    try:
        tiers = thread.run(stack.enter_async_context(open_tiers(folder, **more)))
        yield TiersInThread(tiers, thread)
    finally:
        thread.run(stack.aclose())
        thread.stop()
