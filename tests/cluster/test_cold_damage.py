"""Damage to cold files under load: every read through a cache node and a client is right, or says which block is gone.

Real services over real files: a storage group, a cache node that keeps nothing, three cold nodes, readers that go on
all the time. Bits flip, files are cut, deleted and swapped, on one node and on two; a node is down; the sink runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
from storage_cluster import POLICY, StorageCluster, wait_for
from timetier.cluster.client.store import AsyncStore, AsyncTable
from timetier.cluster.client.view import ClientSettings, View
from timetier.cluster.cold.block import read_index
from timetier.cluster.cold.scrub_round import ScrubSettings
from timetier.cluster.cold.service import ColdService
from timetier.cluster.cold.sink_calls import SinkSettings
from timetier.cluster.cold.sink_script import SinkReport, TableSink, sink
from timetier.cluster.cold.sinking import chosen_cut_offs
from timetier.cluster.counters import Counters
from timetier.cluster.drive import drive
from timetier.cluster.errors import Corrupt
from timetier.cluster.memory.service import CacheService
from timetier.cluster.messages import Pong, ScrubNow
from timetier.cluster.topology import Topology

OWNERS = [f"owner-{number:02}" for number in range(20)]
WINDOWS = 3
EACH = 12  # items of an owner in a window
STEP = POLICY.window // EACH
SETTINGS = SinkSettings(block_rows=32, file_bytes=1 << 13, orphan_grace_s=0, call_timeout_s=5)
PATIENT = ClientSettings(timeout_s=30.0, attempt_timeout_s=10.0)


class Source:
    """A Router that has nothing new to tell."""

    async def fetch(self, known_epoch: int, timeout_s: float) -> Topology | None:
        await asyncio.sleep(timeout_s)
        return None


class Tiers:
    """All tiers, a client, and what it must read: value by owner and timestamp."""

    def __init__(self, storage: StorageCluster, folder: Path) -> None:
        self.storage = storage
        self.folder = folder
        self.network = storage.network
        self.view = View(storage.topology, now=asyncio.get_running_loop().time, random=Random(1))
        self.cold: dict[int, ColdService] = {}
        self.cache = CacheService(
            "cache-0-0",
            0,
            storage.topology,
            self.network.carrier("cache-0-0"),
            budget_bytes=0,
            block_cache_bytes=0,
        )
        self.expected: dict[str, dict[int, bytes]] = {owner: {} for owner in OWNERS}
        self.reads = 0
        self.runs = 0

    async def start(self) -> None:
        for replica in range(3):
            await self.start_cold(replica)
        await self.cache.start()
        self.network.register("cache-0-0", self.cache.handle)
        self.store = AsyncStore(
            self.network.carrier("application"), self.storage.topology, Source(), settings=PATIENT, random=Random(2)
        )
        self.table: AsyncTable = self.store.table("t")

    async def stop(self) -> None:
        await self.store.close()
        await self.cache.stop()
        for replica in list(self.cold):
            await self.stop_cold(replica)

    async def start_cold(self, replica: int) -> None:
        name = f"cold-0-{replica}"
        node = ColdService(
            name,
            0,
            replica,
            self.folder / name,
            self.storage.topology,
            self.network.carrier(name),
            disks=1,
            read_threads=2,
            block_cache_bytes=0,
            counters=Counters(),
            scrub=ScrubSettings(grace_s=0.0),
        )
        await node.start()
        self.network.register(name, node.handle)
        self.cold[replica] = node

    async def stop_cold(self, replica: int) -> None:
        node = self.cold.pop(replica)
        self.network.kill(node.name)
        await node.stop()

    async def write(self, window: int, tag: str) -> None:
        """Items of all owners in a window."""
        items = [
            (owner, window * POLICY.window + at * STEP + 1, f"{tag} {at} of {owner}".encode() * 3)
            for owner in OWNERS
            for at in range(EACH)
        ]
        await self.table.put_many(items)
        for owner, timestamp, value in items:
            self.expected[owner][timestamp] = value

    async def sink(self, windows: int) -> SinkReport:
        self.runs += 1
        cut_offs = chosen_cut_offs(POLICY, 0, before=windows * POLICY.window, by_event_time=True)
        script = sink(
            self.view,
            [TableSink(b"t", POLICY, cut_offs)],
            run=f"run-{self.runs}",
            now_us=0,
            settings=SETTINGS,
        )
        return await drive(script, self.storage.client)

    async def sink_all(self, windows: int) -> None:
        """Sink until the storage tier holds nothing of these windows."""
        rows = len(OWNERS) * EACH * windows
        evicted = [service.counters for service in self.storage.services.values()]
        deadline = asyncio.get_running_loop().time() + 30
        while any(counters.totals.get("rows_evicted", 0) < rows for counters in evicted):
            assert asyncio.get_running_loop().time() < deadline, "not all rows sank"
            report = await self.sink(windows)
            assert report.errors == []
            await asyncio.sleep(0.02)

    def paths(self, replica: int) -> list[Path]:
        return sorted((self.folder / f"cold-0-{replica}" / "disk-0").glob("*.arrow"))

    # ------------------------------------------------------------ reading

    async def read_one(self, random: Random) -> None:
        """One random read, which must be right."""
        owner = random.choice(OWNERS)
        expected = self.expected[owner]
        kind = random.randrange(3)
        if kind == 0:
            timestamp = random.choice(list(expected))
            item = await self.table.get(owner, timestamp)
            assert item is not None and item.value == expected[timestamp], (owner, timestamp)
        elif kind == 1:
            keys = [(one, random.choice(list(self.expected[one]))) for one in random.sample(OWNERS, 5)]
            items = await self.table.get_many(keys)
            for (one, timestamp), item in zip(keys, items, strict=True):
                assert item is not None and item.value == self.expected[one][timestamp], (one, timestamp)
        else:
            before = random.choice(list(expected))
            page = await self.table.timeline(owner, limit=9, before=before)
            newest = sorted((at for at in expected if at < before), reverse=True)[:9]
            assert [item.timestamp for item in page.items] == newest, (owner, before)
            assert [item.value for item in page.items] == [expected[at] for at in newest], (owner, before)
        self.reads += 1

    @asynccontextmanager
    async def load(self, seed: int, readers: int = 3) -> AsyncIterator[None]:
        """Readers that go on meanwhile. Raises what any of them met."""
        over = asyncio.Event()

        async def reader(number: int) -> None:
            random = Random(seed * 100 + number)
            while not over.is_set():
                await self.read_one(random)

        async with asyncio.TaskGroup() as group:
            for number in range(readers):
                group.create_task(reader(number))
            try:
                yield
            finally:
                over.set()

    async def heal(self) -> None:
        """Have all nodes that run find what is wrong with them, and wait until it is right."""
        for replica, node in self.cold.items():
            rounds = node.counters.totals.get("scrub_rounds", 0)
            answer = await self.storage.client.call(f"cold-0-{replica}", ScrubNow(100_000.0), 5.0)
            assert answer == Pong()
            await wait_for(
                lambda node=node, rounds=rounds: node.counters.totals.get("scrub_rounds", 0) > rounds,  # type: ignore[misc]
                "the end of the round",
            )
        await wait_for(lambda: all(not len(node.repairs) for node in self.cold.values()), "the end of all repairs")


@asynccontextmanager
async def tiers_in(folder: Path) -> AsyncIterator[Tiers]:
    async with StorageCluster(folder) as storage:
        tiers = Tiers(storage, folder)
        await tiers.start()
        for window in range(WINDOWS):
            await tiers.write(window, "first")
        await tiers.sink_all(WINDOWS)
        try:
            yield tiers
        finally:
            await tiers.stop()


def damage(paths: list[Path], kind: str, random: Random) -> None:
    """Damage files of one node."""
    path, other = random.sample(paths, 2)
    data = bytearray(path.read_bytes())
    if kind == "flip":
        for _ in range(8):
            data[random.randrange(len(data))] ^= 1 << random.randrange(8)
        path.write_bytes(data)
    elif kind == "cut":
        path.write_bytes(data[: random.randrange(len(data))])
    elif kind == "delete":
        path.unlink()
    else:
        path.write_bytes(other.read_bytes())
        other.write_bytes(data)


KINDS = ("flip", "cut", "delete", "swap")


def test_reads_stay_right_while_files_of_one_and_two_nodes_are_damaged(tmp_path: Path) -> None:
    seed = 4_711
    print(f"seed={seed}")
    random = Random(seed)

    async def body() -> None:
        async with tiers_in(tmp_path) as tiers:
            good = {path.name: path.read_bytes() for path in tiers.paths(0)}
            assert len(good) >= 3
            async with tiers.load(seed):
                for kind in KINDS:
                    for count in (1, 2):
                        for replica in random.sample(range(3), count):
                            damage(tiers.paths(replica), kind, random)
                        before = tiers.reads
                        await wait_for(lambda before=before: tiers.reads >= before + 40, "reads")  # type: ignore[misc]
                        await tiers.heal()
                        for replica in range(3):
                            assert {path.name: path.read_bytes() for path in tiers.paths(replica)} == good, kind
            assert tiers.reads > 100
            met = sum(node.counters.totals.get("crc_failures", 0) for node in tiers.cold.values())
            assert met > 0, "readers have met the damage, not only the scrubber"

    asyncio.run(asyncio.wait_for(body(), 120))


def test_reads_stay_right_while_files_are_damaged_with_a_node_down_and_while_the_sink_runs(tmp_path: Path) -> None:
    seed = 815
    print(f"seed={seed}")
    random = Random(seed)

    async def body() -> None:
        async with tiers_in(tmp_path) as tiers:
            async with tiers.load(seed):
                await tiers.stop_cold(2)
                for kind in KINDS:
                    damage(tiers.paths(1), kind, random)
                    before = tiers.reads
                    await wait_for(lambda before=before: tiers.reads >= before + 20, "reads")  # type: ignore[misc]
                    await tiers.heal()
                await tiers.start_cold(2)
                await tiers.heal()
            await tiers.write(WINDOWS - 1, "second")  # a next generation, for which the sink reads blocks
            await tiers.write(WINDOWS, "first")
            async with tiers.load(seed + 1):
                sinking = asyncio.create_task(tiers.sink(WINDOWS + 1))
                for kind in KINDS:
                    damage(tiers.paths(1), kind, random)
                    await asyncio.sleep(0)
                await sinking
                await tiers.heal()
                report = await tiers.sink(WINDOWS + 1)
                await tiers.heal()
            assert report.errors == []
            names = [[path.name for path in tiers.paths(replica)] for replica in range(3)]
            assert names[0] == names[1] == names[2]
            contents = [[path.read_bytes() for path in tiers.paths(replica)] for replica in range(3)]
            assert contents[0] == contents[1] == contents[2]

    asyncio.run(asyncio.wait_for(body(), 120))


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_of_which_all_copies_are_gone_is_corrupt_by_name_and_the_rest_is_still_answered(
    tmp_path: Path, kind: str
) -> None:
    async def body() -> None:
        async with tiers_in(tmp_path) as tiers:
            victim, other = tiers.paths(0)[:2]
            entries = read_index(victim.read_bytes()).blocks
            for replica in range(3):
                spoil(tiers.folder / f"cold-0-{replica}" / "disk-0", victim.name, other.name, kind)
            lost, answered = await read_all(tiers)
            assert lost and answered
            for error in lost.values():
                assert error.file in (victim.name, other.name if kind == "swap" else victim.name)
                assert error.file in str(error) and f"offset {error.offset}" in str(error)
                if error.file == victim.name:
                    assert error.offset in [entry.offset for entry in entries]

            keys = [*list(lost)[:3], *answered[:5]]
            with pytest.raises(Corrupt) as raised:
                await tiers.table.get_many(keys)
            assert raised.value.file and raised.value.offset >= 0
            results: list[Any] = list(raised.value.results)
            assert all(isinstance(result, Corrupt) and result.file for result in results[:3])
            assert [item.value for item in results[3:]] == [tiers.expected[o][at] for o, at in answered[:5]]

            owner, timestamp = next(iter(lost))
            async with asyncio.timeout(PATIENT.timeout_s / 3):  # it ends because all was asked, not at the deadline
                with pytest.raises(Corrupt):
                    await tiers.table.get(owner, timestamp)
            with pytest.raises(Corrupt, match=r"the block of \S+ at offset \d+"):
                await tiers.table.timeline(owner, limit=1, before=timestamp + 1)
            with pytest.raises(Corrupt) as raised:
                await tiers.table.timelines(OWNERS, limit=WINDOWS * EACH)
            for one, page in zip(OWNERS, raised.value.results, strict=True):
                hit = any(owner == one for owner, _ in lost)
                assert isinstance(page, Corrupt) == hit, one
                if not hit:
                    assert [item.value for item in page.items] == list(tiers.expected[one].values())[::-1]

    asyncio.run(asyncio.wait_for(body(), 120))


def spoil(folder: Path, victim: str, other: str, kind: str) -> None:
    """Damage a file on one node so that nothing of the blocks is left."""
    path = folder / victim
    data = bytearray(path.read_bytes())
    if kind == "flip":
        for entry in read_index(bytes(data)).blocks:
            data[entry.offset + entry.length // 2] ^= 1
        path.write_bytes(data)
    elif kind == "cut":
        path.write_bytes(data[:100])
    elif kind == "delete":
        path.unlink()
    else:
        path.write_bytes((folder / other).read_bytes())
        (folder / other).write_bytes(data)


async def read_all(tiers: Tiers) -> tuple[dict[tuple[str, int], Corrupt], list[tuple[str, int]]]:
    """(error by item, items that were read), of all items; a wrong value fails."""
    lost: dict[tuple[str, int], Corrupt] = {}
    answered = []
    for owner, items in tiers.expected.items():
        for timestamp, value in items.items():
            try:
                item = await tiers.table.get(owner, timestamp)
            except Corrupt as error:
                lost[owner, timestamp] = error
            else:
                assert item is not None and item.value == value, (owner, timestamp)
                answered.append((owner, timestamp))
    return lost, answered
