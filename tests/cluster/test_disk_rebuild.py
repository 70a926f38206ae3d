"""A disk of a cold node is replaced: its files come back from the peers, verified, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
import errno
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from random import Random

import pytest
from cold_disks import Group, run
from timetier.cluster.cold import rebuild as rebuild_module
from timetier.cluster.cold.block import checksum, read_index
from timetier.cluster.cold.disk_marks import MARK_FILE
from timetier.cluster.messages import (
    DISK_REPLACING,
    AskDisks,
    BlockBytes,
    DiskList,
    DiskReplace,
    Disks,
    Failure,
    FileRead,
    FileRemove,
    FileWrite,
    Message,
    Pong,
)

FILES = 6


def lose_disk(group: Group, replica: int, disk: int = 1) -> None:
    """Put an empty disk in the place of one; the node does not run."""
    shutil.rmtree(group.default(replica, disk))
    group.default(replica, disk).mkdir()


async def fill(group: Group, files: int = FILES) -> None:
    for number in range(files):
        await group.write(f"f{number}", 1, owners=2 + number)
    await group.write("other", 0)


async def replace_disk(group: Group, replica: int, *, erase: bool = False) -> None:
    answer = await group.call(replica, DiskReplace(1, erase))
    assert answer == Pong(), answer


async def whole(group: Group, replica: int) -> None:
    """Wait until the disk serves, and check that it holds what it should, and nothing else."""
    await group.until(lambda: group.disk(replica, 1)["state"] == "serving", "the disk to be filled")
    folder = group.place(replica, 1)
    expected = {name: data for name, data in group.contents.items() if name != "other"}
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MARK_FILE}
    assert found == expected


def handle_with(group: Group, replica: int, act: Callable[[Message], Awaitable[None]]) -> None:
    """Have something happen before a node answers a message."""
    handle = group.nodes[replica].handle

    async def acting(message: Message) -> Message | None:
        await act(message)
        return await handle(message)

    group.network.register(f"cold-0-{replica}", acting)


def test_a_replaced_disk_holds_the_same_bytes_as_those_of_its_peers(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        await fill(group)
        await group.stop(0)
        lose_disk(group, 0)
        await group.start(0)
        assert group.disk(0, 1)["state"] == "absent"
        await replace_disk(group, 0)
        await whole(group, 0)
        for name in group.contents:
            assert isinstance(await group.call(0, group.block(name)), BlockBytes)
        assert group.nodes[0].status()["alarms"] == []
        told = group.nodes[0].counters.totals
        assert (told["disks_replaced"], told["disks_rebuilt"]) == (1, 1)
        ages = [group.place(replica, 1).joinpath("f0").stat().st_mtime for replica in range(2)]
        assert abs(ages[0] - ages[1]) < 3, "a copy is as old as what it was copied from"
        await group.stop(0)
        await group.start(0)
        await whole(group, 0)

    run(tmp_path, body)


def test_a_disk_that_holds_files_or_serves_is_emptied_only_on_demand(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        await fill(group, 2)
        answer = await group.call(0, DiskReplace(1, False))
        assert isinstance(answer, Failure)
        assert "serves" in answer.message and "--erase" in answer.message
        group.files[0].fault[group.place(0, 1)] = errno.EIO
        await group.call(0, group.block("f0"))
        group.files[0].fault.clear()
        answer = await group.call(0, DiskReplace(1, False))
        assert isinstance(answer, Failure)
        assert "holds 3 files" in answer.message
        assert isinstance(await group.call(1, group.block("f0")), BlockBytes)
        (group.place(0, 1) / "stray").write_bytes(b"x")
        await replace_disk(group, 0, erase=True)
        await whole(group, 0)

    run(tmp_path, body)


def test_a_disk_is_not_erased_when_no_other_replica_could_give_its_files_back(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        await fill(group, 2)
        for replica in (1, 2):
            group.files[replica].fault[group.place(replica, 1)] = errno.EIO
            await group.call(replica, group.block("f0"))
        answer = await group.call(0, DiskReplace(1, True))
        assert isinstance(answer, Failure)
        assert (answer.kind, "no other replica" in answer.message) == ("InvalidRequest", True)
        assert isinstance(await group.call(0, group.block("f0")), BlockBytes)
        group.network.cut("cold-0-0", "cold-0-1")
        await group.stop(2)
        assert isinstance(await group.call(0, DiskReplace(1, True)), Failure)
        assert isinstance(await group.call(0, group.block("f0")), BlockBytes)

    run(tmp_path, body)


def test_while_a_disk_is_filled_it_serves_what_it_has_and_says_away_for_the_rest(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        await fill(group)
        gate = asyncio.Event()
        held = asyncio.Event()

        async def hold(message: Message) -> None:
            if isinstance(message, FileRead) and message.file == "f3":
                held.set()
                await gate.wait()

        for replica in (1, 2):
            handle_with(group, replica, hold)
        await replace_disk(group, 0, erase=True)
        await asyncio.wait_for(held.wait(), 10)
        for name in ("f0", "f1", "f2", "other"):
            assert isinstance(await group.call(0, group.block(name)), BlockBytes)
        for name in ("f3", "f4", "f5"):
            answer = await group.call(0, group.block(name))
            assert isinstance(answer, Failure)
            assert (answer.kind, answer.fields["reason"]) == ("Unavailable", "disk"), "not missing: not yet there"
        refused = await group.call(0, FileWrite("x", 1, 0, b"x", True, checksum(b"x")))
        assert isinstance(refused, Failure)
        assert refused.kind == "Unavailable"
        assert isinstance(await group.call(0, DiskList(1, "")), Failure), "nobody takes its list for the whole"
        answer = await group.call(0, AskDisks())
        assert isinstance(answer, Disks)
        assert answer.states[1] == DISK_REPLACING
        told = group.disk(0, 1)["rebuild"]
        assert (told["phase"], told["files"], told["files_done"]) == ("copying", 6, 3)
        assert 0 < told["bytes_done"] < told["bytes"]
        assert told["peer"] in ("cold-0-1", "cold-0-2")
        assert len(group.nodes[0].repairs) == 0
        await replace_disk(group, 0)  # once more is no error, and nothing begins again
        gate.set()
        await whole(group, 0)

    run(tmp_path, body)


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_a_node_that_ends_in_the_middle_goes_on_by_itself_and_copies_nothing_twice(tmp_path: Path, how: str) -> None:
    async def body(group: Group) -> None:
        await fill(group)
        read: list[str] = []
        held = asyncio.Event()
        gate = asyncio.Event()

        async def hold(message: Message) -> None:
            if isinstance(message, FileRead):
                read.append(message.file)
                if message.file == "f3" and message.length > 1 and not gate.is_set():
                    held.set()
                    await gate.wait()

        for replica in (1, 2):
            handle_with(group, replica, hold)
        await replace_disk(group, 0, erase=True)
        await asyncio.wait_for(held.wait(), 10)
        if how == "kill":
            (group.place(0, 1) / "f3.copy.part").write_bytes(b"half")
        await group.stop(0)
        gate.set()
        before = {path.name: path.stat().st_ino for path in group.default(0, 1).iterdir()}
        assert {"f0", "f1", "f2"} <= set(before)
        read.clear()
        await group.start(0)
        assert group.disk(0, 1)["state"] in ("replacing", "serving"), "its marker says so"
        await whole(group, 0)
        assert set(read) == {"f3", "f4", "f5"}
        after = {path.name: path.stat().st_ino for path in group.default(0, 1).iterdir()}
        assert all(after[name] == before[name] for name in ("f0", "f1", "f2"))

    run(tmp_path, body)


def test_blocks_that_are_damaged_at_one_peer_come_from_the_other(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        await fill(group, 2)
        blocks = read_index(group.contents["f1"]).blocks
        for replica, entry in ((1, blocks[0]), (2, blocks[-1])):
            path = group.place(replica, 1) / "f1"
            data = bytearray(path.read_bytes())
            data[entry.offset + entry.length // 2] ^= 1
            path.write_bytes(data)
        await replace_disk(group, 0, erase=True)
        await whole(group, 0)

    run(tmp_path, body)


def test_a_file_that_is_damaged_everywhere_keeps_no_disk_from_serving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rebuild_module, "FIRST_PAUSE_S", 0.01)

    async def body(group: Group) -> None:
        await fill(group, 3)
        entry = read_index(group.contents["f1"]).blocks[0]
        for replica in (1, 2):
            path = group.place(replica, 1) / "f1"
            data = bytearray(path.read_bytes())
            data[entry.offset + entry.length // 2] ^= 1
            path.write_bytes(data)
        await replace_disk(group, 0, erase=True)
        await group.until(lambda: group.disk(0, 1)["state"] == "serving", "the disk to be filled")
        assert isinstance(await group.call(0, group.block("f2")), BlockBytes)
        assert not (group.place(0, 1) / "f1").exists(), "and it is not taken for good"

    run(tmp_path, body)


def test_when_one_peer_ends_the_other_gives_the_rest(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        await fill(group)
        seen: list[str] = []

        async def watch(message: Message) -> None:
            if isinstance(message, FileRead) and message.file == "f2":
                seen.append(message.file)
                group.network.kill("cold-0-1")

        handle_with(group, 1, watch)
        await replace_disk(group, 0, erase=True)
        await whole(group, 0)
        assert seen, "it was asked before it ended"

    run(tmp_path, body)


def test_without_a_peer_that_serves_the_disk_it_waits_and_goes_on_when_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rebuild_module, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(rebuild_module, "LONGEST_PAUSE_S", 0.05)

    async def body(group: Group) -> None:
        await fill(group, 2)
        await group.stop(0, 1, 2)
        lose_disk(group, 0)
        await group.start(0)
        await replace_disk(group, 0)
        await group.until(lambda: "no other replica" in group.disk(0, 1)["rebuild"].get("reason", ""), "the reason")
        await group.until(lambda: "waits to be filled" in str(group.nodes[0].status()["alarms"]), "an alarm")
        answer = await group.call(0, group.block("f0"))
        assert isinstance(answer, Failure)
        assert answer.kind == "Unavailable"
        await group.start(2)
        await whole(group, 0)

    run(tmp_path, body)


def test_files_that_come_or_go_meanwhile_are_there_or_not_in_the_end(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        await fill(group)
        changed = False

        async def change(message: Message) -> None:
            nonlocal changed
            if isinstance(message, FileRead) and message.file == "f1" and not changed:
                changed = True
                await group.write("late", 1, to=(1, 2))
                for replica in range(3):
                    assert await group.call(replica, FileRemove(["f4"])) == Pong()
                del group.contents["f4"]

        for replica in (1, 2):
            handle_with(group, replica, change)
        await replace_disk(group, 0, erase=True)
        await whole(group, 0)
        assert changed

    run(tmp_path, body)


def test_copying_keeps_to_its_rate(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        random = Random(1)
        nbytes = 0
        for number in range(8):
            nbytes += len(await group.write(f"f{number}", 1, owners=60 + random.randrange(20)))
        await group.stop(0)
        await group.start(0, rebuild_mb_per_s=nbytes / (1 << 20) / 2)
        began = asyncio.get_running_loop().time()
        await replace_disk(group, 0, erase=True)
        await whole(group, 0)
        took = asyncio.get_running_loop().time() - began
        assert took > 0.9, f"{nbytes} bytes at half of that a second, with a second's burst, took {took:.2f} s"

    run(tmp_path, body)


def test_a_disk_that_fails_while_it_is_filled_is_taken_out_and_may_be_replaced_again(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        await fill(group)

        async def fail(message: Message) -> None:
            if isinstance(message, FileRead) and message.file == "f2":
                group.files[0].fault[group.place(0, 1)] = errno.EROFS

        for replica in (1, 2):
            handle_with(group, replica, fail)
        await replace_disk(group, 0, erase=True)
        await group.until(lambda: group.disk(0, 1)["state"] == "failed", "the failure")
        for replica in (1, 2):
            group.network.register(f"cold-0-{replica}", group.nodes[replica].handle)
        group.files[0].fault.clear()
        assert isinstance(await group.call(0, group.block("other")), BlockBytes)
        await replace_disk(group, 0, erase=True)
        await whole(group, 0)

    run(tmp_path, body)


@pytest.mark.parametrize("register", ["lost", "kept"])
def test_a_node_that_lost_everything_fills_all_its_disks(tmp_path: Path, register: str) -> None:
    async def body(group: Group) -> None:
        await fill(group)
        await group.stop(0)
        shutil.rmtree(tmp_path / "cold-0-0")
        wholes: list[bool] = []
        await group.start(0, lost=True, on_whole=lambda: wholes.append(True))
        answer = await group.call(0, group.block("f5"))
        assert isinstance(answer, BlockBytes) or (isinstance(answer, Failure) and answer.kind == "Unavailable")
        if register == "kept":
            await group.stop(0)
            await group.start(0, lost=True, on_whole=lambda: wholes.append(True))
        await whole(group, 0)
        await group.until(lambda: bool(wholes), "the word that all is there")
        assert isinstance(await group.call(0, group.block("other")), BlockBytes)
        assert wholes == [True]

    run(tmp_path, body)


def test_a_lost_node_folder_takes_over_named_disks_that_are_its_own_and_whole(tmp_path: Path) -> None:
    places = [tmp_path / "a", tmp_path / "b"]
    for place in places:
        place.mkdir()

    async def body(group: Group) -> None:
        await fill(group, 2)
        await group.stop(0)
        shutil.rmtree(tmp_path / "cold-0-0")
        shutil.rmtree(places[1] / "cold-0-0")
        kept = (places[0] / "cold-0-0" / "other").stat().st_ino
        await group.start(0, lost=True)
        await whole(group, 0)
        assert (places[0] / "cold-0-0" / "other").stat().st_ino == kept, "what is there is not copied"

    run(tmp_path, body, disk_dirs=places)
