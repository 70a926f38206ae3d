"""Backup and restore through real services: the drill, with other numbers of groups, and what must not go wrong."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from random import Random
from typing import Any

import pytest
from backup_cluster import QUICK, Cluster, Pages
from storage_cluster import wait_for
from timetier.cluster.backup.checking import check_backup
from timetier.cluster.backup.reading import find_backup
from timetier.cluster.backup.restoring import RestoreReport, restore_backup
from timetier.cluster.backup.taking import BackupReport, BackupSettings, take_backup
from timetier.cluster.backup.target import Target
from timetier.cluster.errors import VersionConflict
from timetier.cluster.keys import item_key

OWNERS = [b"owner-%d" % number for number in range(9)]
SMALL_PARTS = BackupSettings(part_bytes=1 << 14)


async def fill(cluster: Cluster, seed: int) -> list[bytes]:
    """Three tables with sunk and hot items, late writes, deletes, wipes and retention; the timelines."""
    random = Random(seed)
    timelines = [cluster.key(table, owner) for table in ("t", "u", "kept") for owner in OWNERS]
    for at, timeline in enumerate(timelines):
        items: dict[bytes, bytes | None] = {
            item_key(10 * number + at % 7, b"" if number % 3 else b"i%d" % number): random.randbytes(20)
            for number in range(60)
        }
        keys = list(items)
        for start in range(0, 60, 20):
            await cluster.put(timeline, {key: items[key] for key in keys[start : start + 20]})
    timelines.append(cluster.key("t", b"all of it sinks"))
    await cluster.put(timelines[-1], {item_key(at): b"old" for at in range(5)})
    for table in ("t", "kept"):
        await cluster.sink(table, 400, f"first-{table}")
    await wait_for(lambda: cluster.evicted() > 0, "rows to be evicted")
    for timeline in timelines[:-1:3]:
        await cluster.put(timeline, {item_key(35, b"late"): b"late", item_key(11): None, item_key(450): None})
    for timeline in timelines[1::9]:
        await cluster.wipe(timeline)
    for timeline in timelines[1::18]:
        await cluster.put(timeline, {item_key(77): b"anew"})
    await cluster.sink("t", 450, "second", now_us=0)
    await cluster.sink("kept", 400, "retained", now_us=2_200 * 1_000_000)  # what is older than 200 has expired
    for timeline in timelines[:-1:5]:
        await cluster.put(timeline, {item_key(901): b"after the sink", item_key(120): None})
    return timelines


async def backup(cluster: Cluster, target: Target, name: str = "one", **changes: Any) -> BackupReport:
    settings = dataclasses.replace(SMALL_PARTS, **changes)
    return await take_backup(cluster.view, cluster.client, target, name, settings=settings)


async def restore(cluster: Cluster, target: Target, name: str = "one", **options: Any) -> RestoreReport:
    manifest = find_backup(target, name)
    options = {"settings": QUICK, **options}
    return await restore_backup(cluster.view, cluster.client, cluster, target, manifest, **options)


async def expect_same(cluster: Cluster, expected: Pages) -> None:
    """Every timeline has the same version and items, all replicas hold the same, and nothing is missing."""
    assert await cluster.pages(list(expected)) == expected
    report = await cluster.verify()
    assert report.ok, report
    assert not report.differences


async def expect_writable(cluster: Cluster, expected: Pages) -> None:
    """Conditional writes go by the versions of before."""
    for timeline, (version, _) in list(expected.items())[::7]:
        with pytest.raises(VersionConflict):
            await cluster.put(timeline, {item_key(5_000): b"no"}, if_version=version - 1)
        assert await cluster.put(timeline, {item_key(5_000): b"yes"}, if_version=version) == version + 1
        found = (await cluster.pages([timeline]))[timeline]
        assert (found[0], found[1][0][:3]) == (version + 1, (item_key(5_000), b"yes", version + 1))


@pytest.mark.parametrize(("before", "after"), [((1, 1, 1), (1, 1, 2)), ((1, 1, 1), (2, 2, 2)), ((2, 2, 1), (1, 1, 1))])
def test_a_restored_cluster_has_every_timeline_as_it_was_whatever_its_groups(
    tmp_path: Path, before: tuple[int, int, int], after: tuple[int, int, int]
) -> None:
    async def body() -> None:
        target = Target.of(str(tmp_path / "backups"))
        async with Cluster(tmp_path / "a", groups=before[0], cold_groups=before[1], disks=before[2]) as old:
            timelines = await fill(old, 3)
            report = await backup(old, target)
            assert report.files_copied > 2
            assert report.timelines > len(timelines)
            expected = await old.pages(timelines)
        checked = check_backup(target, find_backup(target, None))
        assert checked.ok, checked.errors
        assert (checked.timelines, checked.items, checked.files) == (report.timelines, report.items, report.files)
        groups, cold_groups, disks = after
        async with Cluster(tmp_path / "b", name="b", groups=groups, cold_groups=cold_groups, disks=disks) as new:
            restored = await restore(new, target)
            assert (restored.timelines, restored.items) == (report.timelines, report.items)
            assert restored.warnings == []
            await expect_same(new, expected)
            await expect_writable(new, expected)
            for table in ("t", "u"):  # the sink goes on where it was
                await new.sink(table, 600, f"after-{table}")
            for timeline, page in (await new.pages(timelines)).items():
                kept = [row for row in page[1] if row[0] != item_key(5_000)]
                assert kept == expected[timeline][1]

    asyncio.run(asyncio.wait_for(body(), 100))
