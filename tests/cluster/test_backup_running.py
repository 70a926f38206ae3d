"""Backups beside writes and sinks, of large timelines, to other places, and again and again."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import Awaitable, Callable
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.fs
import pytest
from backup_cluster import QUICK, Cluster, Items, named
from memory_files import MemoryFiles
from storage_cluster import wait_for
from timetier.cluster.backup.checking import check_backup
from timetier.cluster.backup.reading import find_backup
from timetier.cluster.backup.restoring import restore_backup
from timetier.cluster.backup.taking import BackupReport, BackupSettings, take_backup
from timetier.cluster.backup.target import Target
from timetier.cluster.cold.sink_calls import SinkSettings
from timetier.cluster.errors import Corrupt, InvalidRequest, Unavailable
from timetier.cluster.keys import bucket_of, item_key, split_item_key, split_timeline
from timetier.cluster.messages import Dump, Message

Handler = Callable[[Message], Awaitable[Message | None]]
OWNERS = [b"owner-%d" % number for number in range(12)]
CALLS = SinkSettings(scan_bytes=4 << 10, call_timeout_s=5)
IMPATIENT = SinkSettings(call_timeout_s=0.2, attempts=1)
SMALL = BackupSettings(part_bytes=1 << 13, calls=CALLS)


class Memory:
    """What was written to timelines, version by version."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.states: dict[bytes, dict[int, Items]] = {}

    async def put(self, timeline: bytes, items: dict[bytes, bytes | None]) -> None:
        states = self.states.setdefault(timeline, {0: {}})
        last = max(states)
        after = {**states[last], **{key: value for key, value in items.items() if value is not None}}
        for key, value in items.items():
            if value is None:
                after.pop(key, None)
        # Only this task writes to the timeline, and it is known what the entry does before it is there.
        states[last + 1] = after
        assert await self.cluster.put(timeline, items) == last + 1

    def versions(self) -> dict[bytes, int]:
        return {timeline: max(states) for timeline, states in self.states.items()}


async def write_on(memory: Memory, timelines: list[bytes], seed: int, stop: asyncio.Event) -> None:
    """Write to timelines, one entry after the other, until told to stop."""
    random = Random(seed)
    for number in itertools.count():
        if stop.is_set():
            return
        timeline = random.choice(timelines)
        key = item_key(random.randrange(900), b"" if number % 2 else b"x")
        known = memory.states[timeline][max(memory.states[timeline])]
        deletes = random.random() < 0.2 and known
        items: dict[bytes, bytes | None] = {random.choice(sorted(known)): None} if deletes else {}
        await memory.put(timeline, items or {key: random.randbytes(30), item_key(950): b"%d" % number})


async def take(cluster: Cluster, target: Target, name: str, settings: BackupSettings = SMALL) -> BackupReport:
    return await take_backup(cluster.view, cluster.client, target, name, settings=settings)


async def expect_prefixes(cluster: Cluster, memory: Memory, low: dict[bytes, int], high: dict[bytes, int]) -> None:
    """Each timeline is as it was at one version between these."""
    found = await cluster.pages(list(memory.states))
    for timeline, (version, rows) in found.items():
        assert low[timeline] <= version <= high[timeline], named(timeline)
        assert {key: value for key, value, _, _ in rows} == memory.states[timeline][version], named(timeline)


def test_a_backup_beside_writes_and_sinks_has_each_timeline_as_it_was_at_one_version(tmp_path: Path) -> None:
    async def body() -> None:
        target = Target.of(str(tmp_path / "backups"))
        async with Cluster(tmp_path / "a") as old:
            memory = Memory(old)
            timelines = [old.key("t", owner) for owner in OWNERS]
            for timeline in timelines:
                await memory.put(timeline, {item_key(10 * number): b"first" for number in range(40)})
            stop = asyncio.Event()
            writers = [asyncio.create_task(write_on(memory, timelines[at::2], at, stop)) for at in range(2)]
            sinks = asyncio.create_task(sink_on(old, stop))
            backups = []
            for number in range(3):
                low = memory.versions()
                report = await take(old, target, f"b{number}")
                backups.append((low, memory.versions(), report))
            stop.set()
            await asyncio.gather(*writers)
            assert await sinks > 2, "sinks went on meanwhile"
            assert backups[-1][2].files_kept + backups[-1][2].files_copied > 0
        for number, (low, high, _) in enumerate(backups[1:], 1):
            checked = check_backup(target, find_backup(target, f"b{number}"))
            assert checked.ok, checked.errors
            async with Cluster(tmp_path / f"new-{number}", name=f"n{number}", groups=2, cold_groups=number) as new:
                manifest = find_backup(target, f"b{number}")
                await restore_backup(new.view, new.client, new, target, manifest, settings=QUICK)
                await expect_prefixes(new, memory, {t: max(low[t] - 1, 0) for t in low}, high)
                assert (await new.verify()).ok

    asyncio.run(asyncio.wait_for(body(), 100))


async def sink_on(cluster: Cluster, stop: asyncio.Event) -> int:
    runs = 0
    while not stop.is_set():
        runs += 1
        await cluster.sink("t", 100 + 40 * runs, f"run-{runs}")
    return runs


def test_a_bucket_that_sinks_while_it_is_read_is_read_again_with_its_links(tmp_path: Path) -> None:
    async def body() -> None:
        target = Target.of(str(tmp_path / "backups"))
        async with Cluster(tmp_path / "a") as old:
            keys = [old.key("t", b"%d" % number) for number in range(2_000)]
            timelines = [key for key in keys if bucket_of(key) == 5][:8]
            for timeline in timelines:
                await old.put(timeline, {item_key(10 * number): b"value" * 9 for number in range(40)})
            sunk = asyncio.Event()

            def sinks_first(handle: Handler) -> Handler:
                async def handling(message: Message) -> Message | None:
                    if isinstance(message, Dump) and message.cursor > min(timelines) and not sunk.is_set():
                        sunk.set()
                        await old.sink("t", 300, "between")
                        await wait_for(lambda: old.evicted() >= 30 * len(timelines), "rows to be evicted")
                    return await handle(message)

                return handling

            for name, service in old.storage.items():
                old.network.register(name, sinks_first(service.handle))
            expected = await old.pages(timelines)
            report = await take(old, target, "one", dataclasses.replace(SMALL, part_bytes=1 << 11))
            assert sunk.is_set()
            assert report.buckets_again > 0
            assert report.timelines == len(timelines) + 1, "and that of its links"
        assert check_backup(target, find_backup(target, None)).ok
        async with Cluster(tmp_path / "b", name="b") as new:
            await restore_backup(new.view, new.client, new, target, find_backup(target, None), settings=QUICK)
            assert await new.pages(timelines) == expected

    asyncio.run(asyncio.wait_for(body(), 60))


def test_a_timeline_larger_than_an_answer_is_backed_up_and_restored_in_pieces_while_it_is_written(
    tmp_path: Path,
) -> None:
    async def body() -> None:
        target = Target.of(str(tmp_path / "backups"))
        async with Cluster(tmp_path / "a") as old:
            memory = Memory(old)
            large, small = old.key("t", b"large"), old.key("u", b"small")
            for start in range(0, 600, 50):
                await memory.put(large, {item_key(at): b"%d" % at * 10 for at in range(start, start + 50)})
            await memory.put(small, {item_key(1): b"one"})
            stop = asyncio.Event()
            writer = asyncio.create_task(write_on(memory, [large], 7, stop))
            low = memory.versions()
            await take(old, target, "one")
            high = memory.versions()
            stop.set()
            await writer
        manifest = find_backup(target, "one")
        assert len(manifest.parts) > 2, "the timeline lies in several parts"
        async with Cluster(tmp_path / "b", name="b") as new:
            await restore_backup(new.view, new.client, new, target, manifest, settings=QUICK)
            await expect_prefixes(new, memory, {t: max(low[t] - 1, 0) for t in low}, high)

    asyncio.run(asyncio.wait_for(body(), 60))


def test_what_a_lagging_replica_lacks_is_in_the_backup(tmp_path: Path) -> None:
    async def body() -> None:
        target = Target.of(str(tmp_path / "backups"))
        async with Cluster(tmp_path / "a") as old:
            # Timelines whose first replica is another one, so that nobody waits for the one that is cut off.
            keys = [old.key("t", b"%d" % number) for number in range(40)]
            known, *fresh = [key for key in keys if old.view.routing.storage_order(key)[2] == "storage-0-0"]
            await old.put(known, {item_key(1): b"old"})
            for peer in (1, 2):
                old.network.cut("storage-0-0", f"storage-0-{peer}")
            acknowledged = {known: await old.put(known, {item_key(2): b"new"})}
            for timeline in fresh:
                acknowledged[timeline] = await old.put(timeline, {item_key(3): timeline})
            expected = await old.pages(list(acknowledged))
            assert {timeline: page[0] for timeline, page in expected.items()} == acknowledged
            lagging = old.storage["storage-0-0"]._life.replica
            assert lagging is not None
            assert max(lagging.core.chosen_of([known])) < 2
            assert not any(lagging.core.chosen_of(fresh))
            await take(old, target, "one")  # which asks storage-0-0 first
            for peer in (1, 2):
                old.network.cut("client", f"storage-0-{peer}")
            with pytest.raises(Unavailable):  # one replica alone can't tell what there is
                await take(old, target, "alone", dataclasses.replace(SMALL, calls=IMPATIENT))
        async with Cluster(tmp_path / "b", name="b") as new:
            await restore_backup(new.view, new.client, new, target, find_backup(target, None), settings=QUICK)
            assert await new.pages(list(expected)) == expected

    asyncio.run(asyncio.wait_for(body(), 60))


def test_later_backups_copy_only_cold_files_that_are_not_there(tmp_path: Path) -> None:
    async def body() -> None:
        target = Target(pa.fs.PyFileSystem(MemoryFiles()), "backups", "memory")
        async with Cluster(tmp_path / "a") as old:
            timelines = [old.key("t", owner) for owner in OWNERS]
            for timeline in timelines:
                await old.put(timeline, {item_key(10 * number): b"value" * 9 for number in range(60)})
            await old.sink("t", 300, "first")
            first = await take(old, target, "one")
            assert (first.files_copied, first.files_kept) == (first.files, 0)
            again = await take(old, target, "two")
            assert (again.files_copied, again.files_kept, again.copied_bytes) == (0, first.files, 0)
            await old.sink("t", 500, "second")
            third = await take(old, target, "three")
            assert third.files_copied + third.files_kept == third.files
            assert third.files_copied > 0
            # One that broke off has left a whole file and a half one, and no manifest.
            files = target.filesystem.handler.files
            whole, half = [name for name in sorted(files) if "/cold/" in name][:2]
            files[half] = files[half][: len(files[half]) // 2]
            for name in [name for name in files if name.endswith("manifest.json")]:
                del files[name]
            with pytest.raises(Corrupt, match=r"manifest\.json is missing"):
                find_backup(target, None)
            fourth = await take(old, target, "four")
            kept = {name.rpartition("/")[2] for name in (whole, half)}
            assert kept <= set(target.entries("cold")[1])
            assert (fourth.files_copied, fourth.files_kept) == (1, fourth.files - 1)
            assert check_backup(target, find_backup(target, None)).ok
            with pytest.raises(InvalidRequest, match="exists already"):
                await take(old, target, "four")
            expected = await old.pages(timelines)
        async with Cluster(tmp_path / "b", name="b") as new:
            await restore_backup(new.view, new.client, new, target, find_backup(target, "four"), settings=QUICK)
            assert await new.pages(timelines) == expected

    asyncio.run(asyncio.wait_for(body(), 60))


def test_a_backup_by_reference_is_restored_with_the_cold_folders(tmp_path: Path) -> None:
    async def body() -> None:
        target = Target.of(str(tmp_path / "backups"))
        async with Cluster(tmp_path / "a") as old:
            timelines = [old.key("t", owner) for owner in OWNERS]
            for timeline in timelines:
                await old.put(timeline, {item_key(10 * number): b"value" for number in range(60)})
            await old.sink("t", 300, "first")
            report = await take(old, target, "one", dataclasses.replace(SMALL, copy_cold=False))
            assert (report.files_copied, target.entries("cold")) == (0, ([], {}))
            expected = await old.pages(timelines)
        manifest = find_backup(target, None)
        checked = check_backup(target, manifest)
        assert (checked.ok, checked.files_not_checked) == (True, report.files)
        folders = Target.of(str(tmp_path / "a" / "cold-0-1"))
        assert check_backup(target, manifest, elsewhere=folders).files == report.files
        async with Cluster(tmp_path / "b", name="b", cold_groups=2) as new:
            with pytest.raises(Corrupt, match=r"cold file .* is missing"):
                await restore_backup(new.view, new.client, new, target, manifest, settings=QUICK)
            assert new.topology.restoring is None, "nothing was begun"
            await restore_backup(new.view, new.client, new, target, manifest, elsewhere=folders, settings=QUICK)
            assert await new.pages(timelines) == expected

    asyncio.run(asyncio.wait_for(body(), 60))


def test_the_items_of_a_backup_can_be_read_with_arrow_alone(tmp_path: Path) -> None:
    async def body() -> None:
        async with Cluster(tmp_path / "a") as old:
            memory = Memory(old)
            timelines = [old.key("t", owner) for owner in OWNERS]
            for timeline in timelines:
                await memory.put(timeline, {item_key(10 * number): b"value" for number in range(60)})
            await old.sink("t", 300, "first")
            await wait_for(lambda: old.evicted() > 0, "rows to be evicted")
            for timeline in timelines[::2]:
                await memory.put(timeline, {item_key(20): None, item_key(30): b"late"})
            await take(old, Target.of(str(tmp_path / "backups")), "one")
            expected = {
                (split_timeline(timeline)[2], *split_item_key(key)): value
                for timeline, states in memory.states.items()
                for key, value in states[max(states)].items()
            }
            assert read_by_arrow(tmp_path / "backups", "one", "t") == expected

    asyncio.run(asyncio.wait_for(body(), 60))


def read_by_arrow(folder: Path, name: str, table: str) -> dict[tuple[bytes, int, bytes], bytes]:
    """Values by owner, timestamp and id, with nothing but pyarrow: as docs/backup.md says."""
    rows: dict[tuple[bytes, int, bytes], tuple[int, bool, bytes]] = {}
    wiped: dict[bytes, int] = {}
    for path in sorted((folder / name).glob("timelines-*.arrow")):
        for row in pa.ipc.open_file(path).read_all().to_pylist():
            if row["table"] == table:
                wiped[row["owner"]] = row["wiped"]
    hot = [pa.ipc.open_file(path).read_all() for path in sorted((folder / name).glob("items-*.arrow"))]
    cold = [pa.ipc.open_file(path).read_all() for path in sorted((folder / "cold").glob("*.arrow"))]
    for part in (*hot, *cold):
        for row in part.to_pylist():
            key = row["owner"], row["timestamp"], row["id"]
            if row.get("table", table) == table and row["version"] > max(rows.get(key, (0,))[0], wiped[row["owner"]]):
                rows[key] = row["version"], row.get("deleted", False), row["value"]
    return {key: value for key, (_, deleted, value) in rows.items() if not deleted}
