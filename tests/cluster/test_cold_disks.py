"""Disks of cold nodes: which one is which, and what happens when one fails, hangs or is not mounted."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import shutil
import threading
from pathlib import Path

import pytest
from cold_disks import DISKS, Group, run
from timetier.cluster.cold import disk_keeper
from timetier.cluster.cold.block import checksum
from timetier.cluster.cold.disk_marks import MARK_FILE, REGISTER_FILE, Owner
from timetier.cluster.cold.disk_set import disk_folders
from timetier.cluster.cold.files import SystemFiles
from timetier.cluster.cold.store import ColdStore
from timetier.cluster.errors import InvalidRequest, Unavailable
from timetier.cluster.messages import (
    DISK_ABSENT,
    DISK_FAILED,
    DISK_SERVES,
    AskDisks,
    BlockBytes,
    BlockRead,
    DiskRetry,
    Disks,
    Failure,
    FileList,
    FileRemove,
    Files,
    FileWrite,
    Message,
    Pong,
    unpack_i64,
)

OWNER = Owner("c", "cold-0-0")


def opened(folder: Path, disks: int = DISKS, **settings: object) -> ColdStore:
    return ColdStore(folder, disks, **{"owner": OWNER, **settings}).open()  # type: ignore[arg-type]


def put(store: ColdStore, file: str, disk: int, data: bytes = b"bytes of a file") -> None:
    store.write_piece(file, disk, 0, data, last=True, crc=checksum(data))


def is_away(answer: Message) -> bool:
    """Whether it says that the disk is out, and nothing worse."""
    return isinstance(answer, Failure) and (answer.kind, answer.fields.get("reason")) == ("Unavailable", "disk")


def states(store: ColdStore) -> list[int]:
    return [disk.state for disk in store.disks]


# ---------------------------------------------------------------- which disk is which


def test_named_disks_are_shared_by_the_nodes_of_a_machine_and_must_be_there(tmp_path: Path) -> None:
    places = [tmp_path / "a", tmp_path / "b"]
    assert disk_folders(tmp_path / "data" / "cold-0-1", 2, places) == [p / "cold-0-1" for p in places]
    places[0].mkdir()
    store = opened(tmp_path / "data" / "cold-0-0", disk_dirs=places)
    assert states(store) == [DISK_SERVES, DISK_ABSENT]
    assert "does not exist" in store.disks[1].reason
    assert not places[1].exists(), "where a disk should be mounted nothing is made"
    put(store, "a", 0)
    assert (places[0] / "cold-0-0" / "a").is_file()
    with pytest.raises(InvalidRequest, match="name each one"):
        opened(tmp_path / "data" / "cold-0-1", disk_dirs=places[:1])
    places[1].mkdir()
    assert store.reopen_disk(1).state == DISK_SERVES
    assert states(opened(tmp_path / "data" / "cold-0-0", disk_dirs=places)) == [DISK_SERVES] * 2


def test_an_unmounted_disk_is_absent_and_its_mount_point_is_never_written_to(tmp_path: Path) -> None:
    store = opened(tmp_path)
    put(store, "a", 1)
    (tmp_path / "disk-1").rename(tmp_path / "taken out")
    (tmp_path / "disk-1").mkdir()
    for _ in range(2):  # also not at the second start
        store = opened(tmp_path)
        assert states(store) == [DISK_SERVES, DISK_ABSENT]
        assert "nothing is mounted" in store.disks[1].reason
        with pytest.raises(Unavailable) as caught:
            store.find("a")
        assert caught.value.fields["reason"] == "disk", "it is not missing: nobody knows what is on that disk"
        with pytest.raises(Unavailable):
            put(store, "b", 1)
        with pytest.raises(Unavailable):
            store.copies.add("a", 1, 0, b"x")
        assert list((tmp_path / "disk-1").iterdir()) == []
    put(store, "c", 0)
    (tmp_path / "disk-1").rmdir()
    (tmp_path / "taken out").rename(tmp_path / "disk-1")
    assert store.reopen_disk(1).state == DISK_SERVES
    assert store.find("a").disk == 1


def test_a_disk_that_is_unmounted_while_it_serves_is_noticed_and_not_written_to(tmp_path: Path) -> None:
    store = opened(tmp_path)
    put(store, "a", 1)
    (tmp_path / "disk-1").rename(tmp_path / "taken out")
    (tmp_path / "disk-1").mkdir()
    with pytest.raises(Unavailable, match="not mounted"):
        store.read_block("a", 0, 5, 0)
    assert states(store) == [DISK_SERVES, DISK_FAILED]
    store = ColdStore(tmp_path / "other", 1, owner=OWNER).open()
    shutil.rmtree(tmp_path / "other" / "disk-0")
    (tmp_path / "other" / "disk-0").mkdir()
    with pytest.raises(Unavailable):
        put(store, "b", 0)
    assert list((tmp_path / "other" / "disk-0").iterdir()) == []


@pytest.mark.parametrize("how", ["cluster", "node", "order", "old"])
def test_a_foreign_disk_is_refused_for_itself_alone(tmp_path: Path, how: str) -> None:
    mine = tmp_path / "mine" / "cold-0-0"
    put(opened(mine), "a", 1)
    if how == "cluster":
        opened(tmp_path / "theirs" / "cold-0-0", owner=Owner("another", "cold-0-0"))
    elif how == "node":
        opened(tmp_path / "theirs" / "cold-0-0", owner=Owner("c", "cold-0-9"))
    elif how == "order":
        shutil.copytree(mine, tmp_path / "theirs" / "cold-0-0")
    else:
        shutil.copytree(mine, tmp_path / "theirs" / "cold-0-0")
        opened(mine).replace_disk(0, erase=True)
    shutil.rmtree(mine / "disk-0")
    shutil.copytree(tmp_path / "theirs" / "cold-0-0" / ("disk-1" if how == "order" else "disk-0"), mine / "disk-0")
    store = opened(mine)
    assert states(store) == [DISK_ABSENT, DISK_SERVES]
    expected = {"cluster": "another", "node": "cold-0-9", "order": "is disk 1 of cold-0-0", "old": "replaced"}[how]
    assert expected in store.disks[0].reason
    assert store.find("a").disk == 1


def test_folders_from_before_there_were_markers_are_taken_over_with_their_files(tmp_path: Path) -> None:
    for disk in range(DISKS):
        (tmp_path / f"disk-{disk}").mkdir()
        (tmp_path / f"disk-{disk}" / f"file-{disk}").write_bytes(b"content")
    store = opened(tmp_path)
    assert states(store) == [DISK_SERVES] * DISKS
    assert [entry.name for entry in store.list_files()[0]] == ["file-0", "file-1"]
    marks = [json.loads((tmp_path / f"disk-{disk}" / MARK_FILE).read_bytes()) for disk in range(DISKS)]
    assert [(m["node"], m["ordinal"], m["rebuilding"]) for m in marks] == [
        ("cold-0-0", 0, False),
        ("cold-0-0", 1, False),
    ]
    assert marks[0]["disk_id"] != marks[1]["disk_id"]


@pytest.mark.parametrize("step", range(12))
def test_a_crash_at_any_step_of_formatting_is_finished_by_the_next_start(tmp_path: Path, step: int) -> None:
    class Power(Exception):
        pass

    class Cut(SystemFiles):
        left = step

        def tick(self) -> None:
            if self.left == 0:
                raise Power
            self.left -= 1

        def rename(self, source: Path, target: Path) -> None:
            self.tick()
            super().rename(source, target)

        def make_folder(self, folder: Path) -> None:
            self.tick()
            super().make_folder(folder)

        def sync_folder(self, folder: Path) -> None:
            self.tick()
            super().sync_folder(folder)

    with contextlib.suppress(Power):  # unless there are fewer steps
        opened(tmp_path, files=Cut())
    store = opened(tmp_path)
    assert states(store) == [DISK_SERVES] * DISKS
    put(store, "a", 1)
    assert states(opened(tmp_path)) == [DISK_SERVES] * DISKS


def test_a_damaged_marker_takes_one_disk_out_and_a_damaged_register_the_node(tmp_path: Path) -> None:
    put(opened(tmp_path), "a", 0)
    mark = tmp_path / "disk-1" / MARK_FILE
    mark.write_bytes(mark.read_bytes().replace(b"cold-0-0", b"cold-0-1"))
    store = opened(tmp_path)
    assert states(store) == [DISK_SERVES, DISK_FAILED]
    assert "checksum" in store.disks[1].reason
    assert store.find("a").disk == 0
    register = tmp_path / REGISTER_FILE
    register.write_bytes(register.read_bytes()[:-9])
    with pytest.raises(InvalidRequest, match="damaged"):
        opened(tmp_path)
    register.unlink()
    mark.unlink()
    assert states(opened(tmp_path)) == [DISK_SERVES, DISK_ABSENT], "a marker shows that the other had one, too"


def test_the_number_of_disks_of_a_node_is_fixed(tmp_path: Path) -> None:
    opened(tmp_path, 2)
    with pytest.raises(InvalidRequest, match="2 disks"):
        opened(tmp_path, 3)


# ---------------------------------------------------------------- disks that fail


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.ENODEV, errno.EACCES, errno.EUCLEAN])
def test_a_disk_that_fails_is_taken_out_and_the_others_serve(tmp_path: Path, number: int) -> None:
    async def body(group: Group) -> None:
        await group.write("a", 0)
        await group.write("b", 1)
        files, node = group.files[0], group.nodes[0]
        files.fault[group.place(0, 1)] = number
        assert is_away(await group.call(0, group.block("b")))
        assert is_away(await group.call(0, group.block("b"))), "and again, without asking the disk"
        assert is_away(await group.call(0, FileWrite("c", 1, 0, b"x", True, checksum(b"x"))))
        assert isinstance(await group.call(0, group.block("a")), BlockBytes)
        await group.call(0, FileWrite("d", 0, 0, b"x", True, checksum(b"x")))
        assert group.disk(0, 1)["state"] == "failed"
        assert "injected" in group.disk(0, 1)["reason"]
        status = node.status()
        assert status["state"] == "serving"
        assert "disk 1 is failed" in status["reason"]
        assert len(status["alarms"]) == 1
        assert node.counters.totals["disk_failures"] == 1, "counted once, however often it is asked for"
        assert len(node.repairs) == 0, "there is nothing to be repaired there"
        answer = await group.call(0, AskDisks())
        assert isinstance(answer, Disks)
        assert list(answer.states) == [DISK_SERVES, DISK_FAILED]
        assert unpack_i64(answer.free)[0] > 0
        listed = await group.call(0, FileList(""))
        assert isinstance(listed, Files)
        assert listed.names == ["a", "d"], "what can't be read is not listed"
        missing = await group.call(0, BlockRead("never", 0, 1, 0))
        assert isinstance(missing, Failure)
        assert missing.fields["reason"] == "missing", "what was on the disk is known, so others are missing for sure"
        assert await group.call(0, FileRemove(["b"])) == Pong()

    run(tmp_path, body)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EMFILE])
def test_a_full_disk_or_a_process_without_descriptors_is_no_failed_disk(tmp_path: Path, number: int) -> None:
    async def body(group: Group) -> None:
        await group.write("a", 1)
        group.files[0].fault[group.place(0, 1)] = number
        answer = await group.call(0, FileWrite("b", 1, 0, b"x", True, checksum(b"x")))
        assert isinstance(answer, Failure)
        assert answer.kind == "Unavailable"
        assert group.disk(0, 1)["state"] == "serving"
        group.files[0].fault.clear()
        assert isinstance(await group.call(0, group.block("a")), BlockBytes)
        assert isinstance(await group.call(0, FileWrite("b", 1, 0, b"x", True, checksum(b"x"))), Message)

    run(tmp_path, body)


def test_a_damaged_block_takes_no_disk_out(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        data = await group.write("a", 1)
        path = group.place(0, 1) / "a"
        path.write_bytes(data[:300] + bytes([data[300] ^ 1]) + data[301:])
        await group.call(0, group.block("a"))
        assert group.disk(0, 1)["state"] == "serving"

    run(tmp_path, body)


def test_a_failed_disk_serves_again_after_a_restart_or_a_retry_that_finds_it_working(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        await group.write("a", 1)
        for again in ("restart", "retry"):
            group.files[0].fault[group.place(0, 1)] = errno.EIO
            assert is_away(await group.call(0, group.block("a")))
            if again == "restart":
                await group.stop(0)
                await group.start(0)
                assert group.disk(0, 1)["state"] == "failed", "it still does not work"
            group.files[0].fault.clear()
            assert is_away(await group.call(0, group.block("a"))), "it does not come back by itself"
            if again == "restart":
                await group.stop(0)
                await group.start(0)
            else:
                assert isinstance(await group.call(0, DiskRetry(1)), Disks)
            assert isinstance(await group.call(0, group.block("a")), BlockBytes)

    run(tmp_path, body)


def test_a_node_without_one_working_disk_says_so_and_starts_nevertheless(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        await group.stop(0)
        for disk in range(DISKS):
            group.files[0].fault[group.default(0, disk)] = errno.EIO
        await group.start(0)
        status = group.nodes[0].status()
        assert status["state"] == "refused"
        assert "disk 0" in status["reason"] and "disk 1" in status["reason"]
        group.files[0].fault.clear()
        for disk in range(DISKS):
            await group.call(0, DiskRetry(disk))
        assert group.nodes[0].status()["state"] == "serving"

    run(tmp_path, body)


def test_a_hanging_disk_holds_up_no_other_and_is_taken_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_keeper, "TICK_S", 0.05)

    async def body(group: Group) -> None:
        await group.write("a", 0)
        await group.write("b", 1)
        group.files[0].hanging[group.place(0, 1)] = threading.Event()
        stuck = [asyncio.create_task(group.call(0, group.block("b", at))) for at in range(5)]
        for at in range(20):
            answer = await asyncio.wait_for(group.call(0, group.block("a", at % 3)), 1.0)
            assert isinstance(answer, BlockBytes), "the other disk answers meanwhile"
        assert all(is_away(answer) for answer in await asyncio.wait_for(asyncio.gather(*stuck), 5.0))
        assert "hangs" in group.disk(0, 1)["reason"]
        group.files[0].hanging.pop(group.place(0, 1)).set()
        await group.call(0, DiskRetry(1))
        assert isinstance(await group.call(0, group.block("b")), BlockBytes)

    run(tmp_path, body, disk_timeout_s=0.5)


def test_a_disk_that_hangs_when_it_is_opened_does_not_hold_up_the_start(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        await group.write("a", 0)
        await group.write("b", 1)
        await group.stop(0)
        group.files[0].hanging[group.default(0, 1)] = threading.Event()
        await asyncio.wait_for(group.start(0), 5.0)
        assert isinstance(await group.call(0, group.block("a")), BlockBytes)
        assert group.disk(0, 1)["state"] == "absent"
        assert is_away(await group.call(0, group.block("b")))
        group.files[0].hanging.pop(group.default(0, 1)).set()
        await group.until(lambda: group.disk(0, 1)["state"] == "serving", "the disk to open after all")
        assert isinstance(await group.call(0, group.block("b")), BlockBytes)

    run(tmp_path, body, disk_timeout_s=0.3)
