"""What breaks a restore off, or must be refused: the cluster stays closed until all is there, and nothing is mixed."""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from backup_cluster import KEPT, POLICY, QUICK, Cluster, Pages
from timetier.cluster.backup.checking import check_backup
from timetier.cluster.backup.format import MANIFEST
from timetier.cluster.backup.reading import find_backup
from timetier.cluster.backup.restoring import RestoreReport, RestoreSettings, abandon_restore, restore_backup
from timetier.cluster.backup.taking import BackupSettings, take_backup
from timetier.cluster.backup.target import Target
from timetier.cluster.cold.sink_calls import SinkSettings
from timetier.cluster.errors import Corrupt, InvalidRequest, TimeTierError, Unavailable
from timetier.cluster.keys import item_key
from timetier.cluster.messages import (
    PUT,
    AskVersions,
    BeginRestore,
    Failure,
    Message,
    Pong,
    Restore,
    TimelineState,
    Write,
    Written,
    pack_i64,
    pack_u32,
    unpack_i64,
)
from timetier.cluster.paxos.rows import encode_row
from timetier.cluster.topology import BEGINNING, COPYING, TablePolicy

OWNERS = [b"owner-%d" % number for number in range(16)]
REQUEST_ID = b"a request of old"


class Stopped(Exception):
    """The command was ended."""


@pytest.fixture(scope="module")
def backup(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Pages]:
    """A backup of a small cluster with two tiers, and what was in it."""
    folder = tmp_path_factory.mktemp("backup")

    async def body() -> Pages:
        async with Cluster(folder / "a") as old:
            timelines = [old.key("t", owner) for owner in OWNERS]
            for timeline in timelines:
                await old.put(timeline, {item_key(10 * number): b"value %d" % number for number in range(60)})
            await old.sink("t", 300, "first")
            for timeline in timelines[::2]:
                await old.put(timeline, {item_key(30): None, item_key(40): b"late", item_key(700): b"new"})
            assert (await send(old, write_of(timelines[0]))) == (0, 3)
            settings = BackupSettings(part_bytes=1 << 12, calls=SinkSettings(scan_bytes=1 << 12))
            await take_backup(old.view, old.client, Target.of(str(folder / "to")), "one", settings=settings)
            return await old.pages(timelines)

    return folder / "to", asyncio.run(asyncio.wait_for(body(), 60))


def copy_of(backup: tuple[Path, Pages], tmp_path: Path) -> Target:
    """A copy of the backup that a test may damage."""
    shutil.copytree(backup[0], tmp_path / "copy")
    return Target.of(str(tmp_path / "copy"))


def write_of(timeline: bytes, request_id: bytes = REQUEST_ID) -> Write:
    """A write as a client's retry sends it again: the same bytes."""
    columns = (pack_i64([0]), pack_i64([-1]), pack_u32([1]), bytes((PUT,)), [item_key(800)], [b"once"])
    return Write(1, [timeline], [request_id], *columns, 3_000)


async def send(cluster: Cluster, message: Write) -> tuple[int, int]:
    """Outcome and version of a write."""
    node = cluster.view.routing.storage_order(message.timelines[0])[0]
    answer = await cluster.client.call(node, message, 5.0)
    assert isinstance(answer, Written), answer
    return answer.outcomes[0], unpack_i64(answer.versions)[0]


async def restore(
    cluster: Cluster, target: Target, settings: RestoreSettings = QUICK, stop: Callable[[str, int], bool] | None = None
) -> RestoreReport:
    """Restore, or stop where `stop` says."""

    def progress(what: str, done: int, total: int) -> None:
        if stop is not None and stop(what, done):
            raise Stopped(what)

    manifest = find_backup(target, None)
    return await restore_backup(
        cluster.view, cluster.client, cluster, target, manifest, settings=settings, progress=progress
    )


def stop_at(what: str, done: int) -> Callable[[str, int], bool]:
    """Stop when so many of these are done."""
    return lambda now, count: (now, count) == (what, done)


async def expect_whole(cluster: Cluster, expected: Pages) -> None:
    assert cluster.topology.restoring is None
    assert await cluster.pages(list(expected)) == expected
    report = await cluster.verify()
    assert report.ok
    assert not report.differences


async def expect_closed(cluster: Cluster, timeline: bytes) -> None:
    """Nobody is answered, neither by clients' ways nor by a single replica."""
    for message in (write_of(timeline, b"another request!"), AskVersions([timeline])):
        for replica in range(3):
            answer = await cluster.client.call(f"storage-0-{replica}", message, 5.0)
            assert isinstance(answer, Failure)
            assert answer.kind == "Unavailable"
            assert "restore" in answer.message


def test_a_write_that_is_retried_after_the_restore_is_applied_once(backup: tuple[Path, Pages], tmp_path: Path) -> None:
    async def body() -> None:
        folder, expected = backup
        async with Cluster(tmp_path, name="b", groups=2) as new:
            await restore(new, Target.of(str(folder)))
            timeline = next(iter(expected))
            assert await send(new, write_of(timeline)) == (0, 3)
            await expect_whole(new, expected)
            assert await send(new, write_of(timeline, b"another request!")) == (0, expected[timeline][0] + 1)

    asyncio.run(asyncio.wait_for(body(), 60))


@pytest.mark.parametrize("cold_groups", [1, 2])
def test_a_restore_that_is_stopped_anywhere_goes_on_when_it_is_run_again(
    backup: tuple[Path, Pages], tmp_path: Path, cold_groups: int
) -> None:
    async def body() -> None:
        folder, expected = backup
        target = Target.of(str(folder))
        timeline = next(iter(expected))
        async with Cluster(tmp_path, name="b", groups=1, cold_groups=cold_groups) as new:
            for step in (("cold files", 1), ("parts", 0), ("parts", 2), ("parts", 4), ("replicas", 0), ("replicas", 2)):
                if step[0] == "cold files" and cold_groups != 1:
                    continue
                with pytest.raises(Stopped):
                    await restore(new, target, stop=stop_at(*step))
                await expect_closed(new, timeline)
            await new.stop_storage("storage-0-1")
            await new.start_storage(0, 1)
            await new.ready()
            await restore(new, target)
            await expect_whole(new, expected)
            files = [sorted(p.name for p in (tmp_path / f"cold-0-{r}").rglob("*.arrow")) for r in range(3)]
            assert files[0] == files[1] == files[2] != []

    asyncio.run(asyncio.wait_for(body(), 60))


def test_a_replica_that_loses_its_data_during_the_restore_has_all_of_it_in_the_end(
    backup: tuple[Path, Pages], tmp_path: Path
) -> None:
    async def body() -> None:
        folder, expected = backup
        target = Target.of(str(folder))
        async with Cluster(tmp_path, name="b") as new:
            with pytest.raises(Stopped):
                await restore(new, target, stop=stop_at("parts", 4))
            await new.stop_storage("storage-0-2")
            shutil.rmtree(tmp_path / "storage-0-2")
            with pytest.raises(Unavailable, match="storage-0-2"):  # a majority is not enough
                await restore(new, target, dataclasses.replace(QUICK, patience_s=0.5))
            await new.start_storage(0, 2, lost=True)
            await restore(new, target, dataclasses.replace(QUICK, patience_s=30.0))
            await expect_whole(new, expected)
            assert new.storage["storage-0-2"].status()["incarnation"] > 1

    asyncio.run(asyncio.wait_for(body(), 60))


def test_replicas_that_restart_or_lose_their_data_after_the_restore_come_back_with_all_of_it(
    backup: tuple[Path, Pages], tmp_path: Path
) -> None:
    async def body() -> None:
        folder, expected = backup
        timeline, *others = expected
        async with Cluster(tmp_path, name="b") as new:
            await restore(new, Target.of(str(folder)))
            version = await new.put(timeline, {item_key(2_000): b"after"}, if_version=expected[timeline][0])
            for replica in range(3):
                await new.stop_storage(f"storage-0-{replica}")
            for replica in range(3):
                await new.start_storage(0, replica)
            await new.ready()
            await new.stop_storage("storage-0-1")
            shutil.rmtree(tmp_path / "storage-0-1")
            await new.start_storage(0, 1, lost=True)
            await new.ready()
            await expect_whole(new, {key: expected[key] for key in others})
            await new.stop_storage("storage-0-0")  # so that the one which learnt it has to tell it
            assert await new.pages(others) == {key: expected[key] for key in others}
            assert await new.put(timeline, {item_key(2_001): b"on"}, if_version=version) == version + 1

    asyncio.run(asyncio.wait_for(body(), 60))


def test_a_replica_with_a_topology_of_before_the_restore_answers_nobody(
    backup: tuple[Path, Pages], tmp_path: Path
) -> None:
    async def body() -> None:
        folder, expected = backup
        async with Cluster(tmp_path, name="b") as new:
            with pytest.raises(Stopped):
                await restore(new, Target.of(str(folder)), stop=stop_at("parts", 3))
            told = new.topology
            new.topology = msgspec.structs.replace(told, restoring=None, epoch=1)
            for replica in range(3):
                await new.stop_storage(f"storage-0-{replica}")
                await new.start_storage(0, replica)
            await new.ready()
            await expect_closed(new, next(iter(expected)))
            new.topology = told
            for service in new.storage.values():
                service.update(told)
            await restore(new, Target.of(str(folder)))
            await expect_whole(new, expected)

    asyncio.run(asyncio.wait_for(body(), 60))


@pytest.mark.parametrize("part", ["timelines-00002.arrow", "items-00003.arrow", "cold", "cold-files.arrow", MANIFEST])
def test_a_flipped_bit_in_a_backup_is_named_and_nothing_is_served(
    backup: tuple[Path, Pages], tmp_path: Path, part: str
) -> None:
    async def body() -> None:
        target = copy_of(backup, tmp_path)
        folder = tmp_path / "copy"
        path = sorted((folder / "cold").iterdir())[1] if part == "cold" else folder / "one" / part
        good = path.read_bytes()
        path.write_bytes(good[: len(good) // 2] + bytes((good[len(good) // 2] ^ 1,)) + good[len(good) // 2 + 1 :])
        async with Cluster(tmp_path / "b", name="b") as new:
            with pytest.raises(TimeTierError, match=path.name):
                await restore(new, target)
            if part in (MANIFEST, "cold-files.arrow"):
                assert new.topology.restoring is None
            else:
                checked = check_backup(target, find_backup(target, None))
                assert not checked.ok
                assert path.name in checked.errors[0]
                await expect_closed(new, next(iter(backup[1])))
            path.write_bytes(good)
            await restore(new, target)
            await expect_whole(new, backup[1])

    asyncio.run(asyncio.wait_for(body(), 60))


@pytest.mark.parametrize("part", ["one/timelines-00002.arrow", "one/items-00002.arrow", "cold", "one/manifest.json"])
def test_a_missing_part_is_named_before_anything_is_begun(
    backup: tuple[Path, Pages], tmp_path: Path, part: str
) -> None:
    async def body() -> None:
        target = copy_of(backup, tmp_path)
        folder = tmp_path / "copy"
        path = next((folder / "cold").iterdir()) if part == "cold" else folder / part
        path.unlink()
        async with Cluster(tmp_path / "b", name="b") as new:
            with pytest.raises(Corrupt, match=path.name):
                await restore(new, target)
            assert new.topology.restoring is None
            assert await new.put(new.key("t", b"x"), {item_key(1): b"it serves"}) == 1
        if part != "one/manifest.json":
            assert path.name in check_backup(target, find_backup(target, None)).errors[0]

    asyncio.run(asyncio.wait_for(body(), 60))


def test_a_cluster_with_data_or_other_buckets_is_refused_and_goes_on(
    backup: tuple[Path, Pages], tmp_path: Path
) -> None:
    async def body() -> None:
        target = Target.of(str(backup[0]))
        async with Cluster(tmp_path / "b", name="b") as used:
            assert await used.put(used.key("u", b"x"), {item_key(1): b"mine"}) == 1
            with pytest.raises(InvalidRequest, match="is not empty"):
                await restore(used, target)
            assert (await used.pages([used.key("u", b"x")]))[used.key("u", b"x")][0] == 1
        async with Cluster(tmp_path / "c", name="c", buckets=64) as other:
            with pytest.raises(InvalidRequest, match="128 buckets, this cluster has 64"):
                await restore(other, target)
            assert await other.put(other.key("t", b"x"), {item_key(1): b"it serves"}) == 1

    asyncio.run(asyncio.wait_for(body(), 60))


def test_data_that_came_after_the_first_look_ends_the_restore_before_anything_is_installed(
    backup: tuple[Path, Pages], tmp_path: Path
) -> None:
    async def body() -> None:
        async with Cluster(tmp_path, name="b") as new:
            close = new.set_restoring
            with pytest.raises(Stopped):  # it leaves its marks
                await restore(new, Target.of(str(backup[0])), stop=stop_at("cold files", 0))
            await abandon_restore(new.view, new.client, new)

            async def write_first(restore: str, phase: str) -> None:
                if phase == BEGINNING:
                    await new.put(new.key("t", b"quick"), {item_key(1): b"mine"})
                await close(restore, phase)

            new.set_restoring = write_first  # type: ignore[method-assign]
            with pytest.raises(InvalidRequest, match="not empty"):
                await restore(new, Target.of(str(backup[0])))
            assert new.topology.restoring is None
            found = await new.pages([new.key("t", b"quick"), *backup[1]])
            assert [page[0] for page in found.values()] == [1] + [0] * len(backup[1])

    asyncio.run(asyncio.wait_for(body(), 60))


def test_a_restore_is_given_up_only_while_nothing_was_installed(backup: tuple[Path, Pages], tmp_path: Path) -> None:
    async def body() -> None:
        target = Target.of(str(backup[0]))
        async with Cluster(tmp_path, name="b") as new:
            assert await abandon_restore(new.view, new.client, new) == ""
            with pytest.raises(Stopped):
                await restore(new, target, stop=lambda what, done: what == "cold files")
            assert await abandon_restore(new.view, new.client, new) == find_backup(target, None).restore_name
            assert await new.put(new.key("u", b"x"), {item_key(1): b"it serves"}) == 1
        async with Cluster(tmp_path / "c", name="c") as other:
            with pytest.raises(Stopped):
                await restore(other, target, stop=stop_at("replicas", 0))
            with pytest.raises(InvalidRequest, match="remove its data folders"):
                await abandon_restore(other.view, other.client, other)
            await expect_closed(other, next(iter(backup[1])))

    asyncio.run(asyncio.wait_for(body(), 60))


def test_a_replica_takes_states_of_its_own_restore_only_and_never_another_state(tmp_path: Path) -> None:
    async def body() -> None:
        async with Cluster(tmp_path, name="b") as new:
            key = new.key("t", b"x")
            row = item_key(5) + (3).to_bytes(8, "big")
            state = TimelineState(key, 3, 0, [(3, [b"i" * 16])], 0, False, [row], [encode_row(7, PUT, b"v")])

            async def answer(message: Message) -> Message:
                return await new.client.call("storage-0-0", message, 5.0)

            assert isinstance(await answer(BeginRestore("one")), Failure), "the topology does not tell of it"
            await new.set_restoring("one", BEGINNING)
            assert isinstance(await answer(Restore("one", [state])), Failure), "it has no mark yet"
            assert isinstance(await answer(BeginRestore("one")), Pong)
            assert isinstance(await answer(Restore("one", [state])), Failure), "the others may not be empty"
            await new.set_restoring("one", COPYING)
            assert isinstance(await answer(BeginRestore("two")), Failure)
            assert isinstance(await answer(Restore("one", [state])), Pong)
            assert isinstance(await answer(Restore("one", [state])), Pong), "the same again"
            others = [
                msgspec.structs.replace(state, version=4),
                msgspec.structs.replace(state, wiped=1),
                msgspec.structs.replace(state, rows=[encode_row(7, PUT, b"w")]),
                msgspec.structs.replace(state, rows=[], row_keys=[]),
            ]
            for other in others:
                refused = await answer(Restore("one", [other]))
                assert isinstance(refused, Failure)
                assert "at version 3" in refused.message
            piece = msgspec.structs.replace(state, timeline=new.key("t", b"y"), before=1)
            lost = await answer(Restore("one", [piece]))
            assert isinstance(lost, Failure)
            assert "first pieces" in lost.message

    asyncio.run(asyncio.wait_for(body(), 60))


def test_tables_whose_policy_is_another_one_are_told(backup: tuple[Path, Pages], tmp_path: Path) -> None:
    async def body() -> None:
        hourly = TablePolicy(per_second=1, cold_after=3_600, window=100)
        async with Cluster(tmp_path, name="b", tables={"t": hourly, "kept": KEPT, "more": POLICY}) as new:
            report = await restore(new, Target.of(str(backup[0])))
            about = sorted(warning.split("'")[1] for warning in report.warnings)
            assert about == ["t", "u"]
            assert "cold_after=3600" in next(w for w in report.warnings if "'t'" in w)
            await expect_whole(new, {key: page for key, page in backup[1].items() if key[5:6] == b"t"})

    asyncio.run(asyncio.wait_for(body(), 60))
