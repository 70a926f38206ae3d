"""What a read of sunk items costs: disk reads, messages, and on which cold node."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from random import Random

from read_answers import keys_of, travelled
from storage_cluster import POLICY, StorageCluster, topology, wait_for
from timetier.cluster.client.scripts import WriteRequest, write
from timetier.cluster.client.view import View
from timetier.cluster.cold.files import SystemFiles, _SystemFile
from timetier.cluster.cold.service import ColdService
from timetier.cluster.cold.sink_calls import SinkSettings
from timetier.cluster.cold.sink_script import TableSink, sink
from timetier.cluster.cold.sinking import chosen_cut_offs
from timetier.cluster.counters import Counters
from timetier.cluster.drive import drive
from timetier.cluster.keys import bucket_of, item_key, timeline_key
from timetier.cluster.memory.service import CacheService
from timetier.cluster.messages import PUT, FoundItems, Message, Pages, ReadItems, ReadPages, pack_u32
from timetier.cluster.routing import Routing
from timetier.cluster.suspicion import Suspicion

OWNERS = [b"owner-%d" % number for number in range(150)]
PER_WINDOW = 20
WINDOWS = 2
STEP = POLICY.window // PER_WINDOW
COLD = [f"cold-0-{replica}" for replica in range(3)]


def item(at: int) -> bytes:
    return item_key(at * STEP + 1)


class CountingFiles(SystemFiles):
    """The files of one cold node; `reads` counts what is read of them, by node."""

    def __init__(self, reads: Counter[str], node: str) -> None:
        self._reads = reads
        self._node = node

    @contextmanager
    def open(
        self, path: Path, *, write: bool = False, create: bool = False, empty: bool = False
    ) -> Iterator[_SystemFile]:
        with super().open(path, write=write, create=create, empty=empty) as opened:
            original = opened.read

            def read(length: int, offset: int) -> bytes:
                self._reads[self._node] += 1
                return original(length, offset)

            opened.read = read  # type: ignore[method-assign]
            yield opened


class Tiers:
    """All three tiers in one process; `reads`: of the disks by cold node; `messages`: by kind, to any node."""

    def __init__(self, storage: StorageCluster) -> None:
        self.storage = storage
        self.network = storage.network
        self.view = View(storage.topology, now=asyncio.get_running_loop().time, random=Random(1))
        self.reads: Counter[str] = Counter()
        self.messages: Counter[str] = Counter()
        self.cold: list[ColdService] = []
        self.cache: CacheService

    def key(self, owner: bytes) -> bytes:
        return timeline_key(b"t", owner, self.storage.topology.buckets)

    def counted(self, handle: Callable[[Message], Awaitable[Message | None]]) -> Callable[[Message], Awaitable[object]]:
        async def counting(message: Message) -> Message | None:
            self.messages[type(message).__name__] += 1
            return await handle(message)

        return counting

    async def start(self, folder: Path, cold_cache_bytes: int) -> None:
        for replica, name in enumerate(COLD):
            node = ColdService(
                name,
                0,
                replica,
                folder / name,
                self.storage.topology,
                self.network.carrier(name),
                disks=1,
                read_threads=2,
                block_cache_bytes=cold_cache_bytes,
                counters=Counters(),
                files=CountingFiles(self.reads, name),
            )
            await node.start()
            self.network.register(name, self.counted(node.handle))  # type: ignore[arg-type]
            self.cold.append(node)
        for service in self.storage.services.values():
            self.network.register(service.name, self.counted(service.handle))  # type: ignore[arg-type]

    async def fill(self) -> None:
        """Write all items, sink them, and wait until the storage tier holds none."""
        requests = [
            WriteRequest(
                self.key(owner),
                bytes((PUT,)) * PER_WINDOW * WINDOWS,
                [item(at) for at in range(PER_WINDOW * WINDOWS)],
                [b"%d of " % at + owner for at in range(PER_WINDOW * WINDOWS)],
            )
            for owner in OWNERS
        ]
        versions = await drive(write(self.view, requests, 20), self.storage.client)
        assert all(isinstance(version, int) for version in versions), versions
        rows = len(OWNERS) * PER_WINDOW * WINDOWS
        sunk = runs = 0
        while sunk < rows:  # a replica that has not heard yet that an entry was chosen leaves it for the next run
            sunk += await self.sink(f"run-{runs}")
            runs += 1
            assert runs < 50, f"{sunk} of {rows} rows sank"
            await asyncio.sleep(0.01)
        evicted = [service.counters for service in self.storage.services.values()]
        await wait_for(lambda: all(c.totals.get("rows_evicted") == rows for c in evicted), "eviction")

    async def sink(self, run: str) -> int:
        cut_offs = chosen_cut_offs(POLICY, 0, before=WINDOWS * POLICY.window, by_event_time=True)
        task = TableSink(b"t", POLICY, cut_offs)
        script = sink(self.view, [task], run=run, now_us=0, settings=SinkSettings(orphan_grace_s=0))
        report = await drive(script, self.storage.client)
        assert report.errors == []
        return report.rows

    def open_cache(self, *, block_cache_bytes: int = 0) -> None:
        """A cache node that knows nothing yet."""
        self.cache = CacheService(
            "cache-0-0",
            0,
            self.storage.topology,
            self.network.carrier("cache-0-0"),
            budget_bytes=1 << 20,
            block_cache_bytes=block_cache_bytes,
        )
        self.reads.clear()
        self.messages.clear()

    async def get(self, owner: bytes, at: int) -> bytes:
        answer = await self.cache.handle(ReadItems(1, [self.key(owner)], [item(at)], 10_000))
        assert isinstance(answer, FoundItems), answer
        (found,) = travelled(answer).items
        assert found is not None, (owner, at)
        return found.value

    async def page(self, owner: bytes, before: bytes, limit: int) -> list[bytes]:
        answer = await self.cache.handle(ReadPages(1, [self.key(owner)], [before], pack_u32([limit]), 10_000))
        assert isinstance(answer, Pages) and answer.outcomes == b"\x00"
        (items,) = travelled(answer).items
        return keys_of(reversed(items))


@asynccontextmanager
async def tiers_in(folder: Path, cold_cache_bytes: int) -> AsyncIterator[Tiers]:
    async with StorageCluster(folder) as storage:
        tiers = Tiers(storage)
        await tiers.start(folder, cold_cache_bytes)
        await tiers.fill()
        try:
            yield tiers
        finally:
            for node in tiers.cold:
                await node.stop()


def run(folder: Path, body: Callable[[Tiers], Awaitable[None]], *, cold_cache_bytes: int = 0) -> None:
    async def scenario() -> None:
        async with tiers_in(folder, cold_cache_bytes) as tiers:
            await body(tiers)

    asyncio.run(asyncio.wait_for(scenario(), 90))


def test_a_cold_read_costs_one_disk_read_and_one_message_to_a_cold_node(tmp_path: Path) -> None:
    async def body(tiers: Tiers) -> None:
        tiers.open_cache()
        for number, owner in enumerate(OWNERS[:30]):
            at = number % (PER_WINDOW * WINDOWS)
            tiers.reads.clear()
            tiers.messages.clear()
            assert await tiers.get(owner, at) == b"%d of " % at + owner
            assert tiers.reads.total() == 1, "one positioned read"
            assert tiers.messages["BlockRead"] == 1
            asked = sum(tiers.messages[kind] for kind in ("Check", "AskVersions", "AskSame", "BlockRead"))
            assert asked == 3, f"two replicas are asked beside: {tiers.messages}"

    run(tmp_path, body)


def test_a_page_of_cold_items_costs_one_disk_read_for_each_window_that_it_reaches_into(tmp_path: Path) -> None:
    async def body(tiers: Tiers) -> None:
        tiers.open_cache()
        end = PER_WINDOW * WINDOWS
        for owner, before, limit, windows in [
            (OWNERS[0], item(end), PER_WINDOW, 1),
            (OWNERS[1], item(end - 5), PER_WINDOW, 2),
            (OWNERS[2], item(PER_WINDOW), 7, 1),
            (OWNERS[3], item(end), 2 * PER_WINDOW, 2),
        ]:
            tiers.reads.clear()
            keys = await tiers.page(owner, before, limit)
            assert len(keys) == limit and keys[0] < before
            assert tiers.reads.total() == windows

    run(tmp_path, body)


def test_a_block_that_was_read_serves_all_its_owners_without_another_disk_read(tmp_path: Path) -> None:
    async def body(tiers: Tiers) -> None:
        tiers.open_cache(block_cache_bytes=64 << 20)
        for owner in OWNERS:
            for at in (3, 7):
                assert await tiers.get(owner, at) == b"%d of " % at + owner
        buckets = {bucket_of(tiers.key(owner)) for owner in OWNERS}
        assert tiers.reads.total() <= WINDOWS * len(buckets), "each block once"
        assert len(OWNERS) > 2 * len(buckets) - 64, "buckets hold several owners"

    run(tmp_path, body, cold_cache_bytes=16 << 20)


def test_pages_of_one_owner_come_from_one_message_to_a_cold_node(tmp_path: Path) -> None:
    async def body(tiers: Tiers) -> None:
        tiers.open_cache(block_cache_bytes=64 << 20)
        end = PER_WINDOW
        for owner in OWNERS[:5]:
            tiers.messages.clear()
            for first in range(0, end, 4):
                keys = await tiers.page(owner, item(end - first), 4)
                assert keys == [item(at) for at in range(end - first - 1, end - first - 5, -1)]
            assert tiers.messages["BlockRead"] == 1

    run(tmp_path, body)


def test_equal_blocks_that_are_asked_for_at_once_are_read_once(tmp_path: Path) -> None:
    async def body(tiers: Tiers) -> None:
        shared: dict[int, list[bytes]] = {}
        for owner in OWNERS:
            shared.setdefault(bucket_of(tiers.key(owner)), []).append(owner)
        owners = max(shared.values(), key=len)
        assert len(owners) >= 4
        tiers.open_cache(block_cache_bytes=64 << 20)
        found = await asyncio.gather(*[tiers.get(owner, 3) for owner in owners])
        assert found == [b"3 of " + owner for owner in owners]
        assert tiers.reads.total() == 1

    run(tmp_path, body)


def test_cold_reads_are_spread_evenly_and_a_dead_nodes_share_falls_evenly_on_the_others(tmp_path: Path) -> None:
    async def body(tiers: Tiers) -> None:
        tiers.open_cache()
        for owner in OWNERS:
            for window in range(WINDOWS):
                await tiers.get(owner, window * PER_WINDOW)
        alive = {node: tiers.reads[node] for node in COLD}
        total = sum(alive.values())
        assert total >= len(OWNERS) * WINDOWS
        assert all(0.23 * total < count < 0.44 * total for count in alive.values()), alive

        tiers.network.kill(COLD[0])
        tiers.open_cache()
        for owner in OWNERS:
            for window in range(WINDOWS):
                await tiers.get(owner, window * PER_WINDOW)
        rest = {node: tiers.reads[node] for node in COLD[1:]}
        assert tiers.reads[COLD[0]] == 0
        assert all(0.38 * sum(rest.values()) < count < 0.62 * sum(rest.values()) for count in rest.values()), rest

    run(tmp_path, body)


def test_each_cold_node_is_first_for_a_third_of_the_blocks_and_two_share_what_a_suspected_one_leaves() -> None:
    routing = Routing(topology(buckets=1_024))
    blocks = [(bucket, window * POLICY.window) for bucket in range(1_024) for window in range(-3, 9)]
    first = Counter(routing.cold_order(*block)[0] for block in blocks)
    assert all(abs(first[node] / len(blocks) - 1 / 3) < 0.02 for node in COLD), first

    suspicion = Suspicion(lambda: 0.0, first_s=1.0, longest_s=8.0)
    suspicion.suspect(COLD[1])
    then = Counter(suspicion.last(routing.cold_order(*block))[0] for block in blocks)
    assert then[COLD[1]] == 0
    assert all(abs(then[node] / len(blocks) - 1 / 2) < 0.02 for node in (COLD[0], COLD[2])), then
