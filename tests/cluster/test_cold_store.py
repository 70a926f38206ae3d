"""Cold files on disk: whole and verified under their name, or not there at all."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest
from cold_model import cold_file
from timetier.cluster.cold import store as store_module
from timetier.cluster.cold.block import checksum
from timetier.cluster.cold.store import ColdStore
from timetier.cluster.errors import Corrupt, InvalidRequest, TooLarge, Unavailable

DATA = random.Random(7).randbytes(10_000)


def write(store: ColdStore, file: str, data: bytes, *, disk: int = 0, piece: int = 4_000) -> tuple[int, int]:
    answer = (0, 0)
    for offset in range(0, len(data), piece):
        part = data[offset : offset + piece]
        last = offset + len(part) == len(data)
        answer = store.write_piece(file, disk, offset, part, last=last, crc=checksum(data))
        assert last or answer == (offset + len(part), 0)
    return answer


def read(store: ColdStore, file: str, data: bytes, offset: int = 0, length: int = 0) -> bytes:
    length = length or len(data) - offset
    return store.read_block(file, offset, length, checksum(data[offset : offset + length]))


def test_a_file_is_there_only_after_its_last_piece_and_survives_a_restart(tmp_path: Path) -> None:
    store = ColdStore(tmp_path, 3)
    store.write_piece("a.arrow", 1, 0, DATA[:4_000], last=False, crc=0)
    assert store.list_files() == ([], False)
    with pytest.raises(Corrupt, match="missing"):
        read(store, "a.arrow", DATA)
    assert ColdStore(tmp_path, 3).list_files() == ([], False)
    assert list(tmp_path.rglob("*.part")) == []  # what was left half written is gone after a restart
    store = ColdStore(tmp_path, 3)
    assert write(store, "a.arrow", DATA, disk=1) == (len(DATA), checksum(DATA))
    assert (tmp_path / "disk-1" / "a.arrow").read_bytes() == DATA
    again = ColdStore(tmp_path, 3)
    assert again.find("a.arrow")[:2] == (1, len(DATA))
    assert read(again, "a.arrow", DATA, 100, 5_000) == DATA[100:5_100]
    assert [entry[:2] for entry in again.list_files()[0]] == [("a.arrow", len(DATA))]


def test_writing_the_same_file_again_succeeds_and_other_content_is_refused(tmp_path: Path) -> None:
    store = ColdStore(tmp_path, 1)
    write(store, "a", DATA)
    assert write(store, "a", DATA) == (len(DATA), checksum(DATA))
    with pytest.raises(InvalidRequest, match="other content"):
        write(store, "a", DATA[:-1])
    assert read(store, "a", DATA) == DATA
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["a"]


def test_a_checksum_that_does_not_fit_leaves_nothing_behind(tmp_path: Path) -> None:
    store = ColdStore(tmp_path, 1)
    with pytest.raises(InvalidRequest, match="checksum"):
        store.write_piece("a", 0, 0, DATA, last=True, crc=1)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    with pytest.raises(InvalidRequest, match="start at 0"):
        store.write_piece("a", 0, 10, DATA, last=False, crc=1)


def test_pieces_may_be_sent_again_but_not_with_gaps(tmp_path: Path) -> None:
    store = ColdStore(tmp_path, 2)
    store.write_piece("a", 0, 0, DATA[:50], last=False, crc=0)
    with pytest.raises(InvalidRequest, match="a piece at 60"):
        store.write_piece("a", 0, 60, DATA[60:], last=True, crc=checksum(DATA))
    with pytest.raises(InvalidRequest, match="disk-1"):
        store.write_piece("a", 1, 50, DATA[50:], last=True, crc=checksum(DATA))
    for _ in range(2):
        store.write_piece("a", 0, 50, DATA[50:90], last=False, crc=0)
    assert store.write_piece("a", 0, 90, DATA[90:], last=True, crc=checksum(DATA)) == (len(DATA), checksum(DATA))


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../a", "a/b", "/a", "A", "a b", "a\n", "a\0", "-a", ".a", "a.part", "ä", "a" * 129]
)
def test_no_name_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    store = ColdStore(tmp_path / "node", 1)
    (tmp_path / "a").write_bytes(DATA)
    for attempt in (
        lambda: store.write_piece(name, 0, 0, b"x", last=True, crc=checksum(b"x")),
        lambda: store.read_block(name, 0, 1, 0),
        lambda: store.remove(name),
        lambda: store.restore(name, 0, b"x"),
        lambda: store.add_to_copy(name, 0, 0, b"x"),
        lambda: store.index(name),
    ):
        with pytest.raises(InvalidRequest):
            attempt()
    assert (tmp_path / "a").read_bytes() == DATA
    assert [path for path in (tmp_path / "node").rglob("*") if path.is_file()] == []


def test_sizes_and_disks_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ColdStore(tmp_path, 2)
    with pytest.raises(InvalidRequest, match="disks 0 to 1"):
        write(store, "a", DATA, disk=2)
    with pytest.raises(InvalidRequest):
        store.write_piece("a", 0, -1, DATA, last=False, crc=0)
    monkeypatch.setattr(store_module, "MAX_PIECE_BYTES", 100)
    with pytest.raises(TooLarge):
        store.write_piece("a", 0, 0, DATA, last=False, crc=0)
    with pytest.raises(InvalidRequest):
        store.read_block("a", 0, 101, 0)
    with pytest.raises(InvalidRequest, match="disks=0"):
        ColdStore(tmp_path, 0)


def test_only_so_many_files_are_written_at_once_and_stale_ones_make_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ColdStore(tmp_path, 1)
    for number in range(16):
        store.write_piece(f"a{number}", 0, 0, b"x", last=False, crc=0)
    with pytest.raises(Unavailable, match="at once"):
        store.write_piece("b", 0, 0, b"x", last=False, crc=0)
    monkeypatch.setattr(store_module, "_STALE_PART_S", 0.0)
    write(store, "b", DATA)
    assert read(store, "b", DATA) == DATA
    assert not list(tmp_path.rglob("*.part")), "what nobody writes any more takes no room"


def test_damage_shortness_and_absence_are_told_apart(tmp_path: Path) -> None:
    store = ColdStore(tmp_path, 1)
    write(store, "a", DATA)
    path = tmp_path / "disk-0" / "a"
    damaged = bytearray(DATA)
    damaged[500] ^= 4
    path.write_bytes(damaged)
    assert read(store, "a", DATA, 1_000, 100) == DATA[1_000:1_100]
    for length, reason in ((1_000, "checksum"), (20_000, "short")):
        with pytest.raises(Corrupt) as caught:
            store.read_block("a", 0, length, checksum(DATA[:length]))
        assert caught.value.fields["reason"] == reason
    path.unlink()
    for file in ("a", "never"):
        with pytest.raises(Corrupt, match="missing") as caught:
            read(store, file, DATA)
        assert caught.value.fields["reason"] == "missing"


def test_a_listing_comes_in_pages(tmp_path: Path) -> None:
    store = ColdStore(tmp_path, 1)
    for number in range(5):
        write(store, f"f{number}", DATA)
    page, more = store.list_files("", 2)
    assert ([entry.name for entry in page], more) == (["f0", "f1"], True)
    page, more = store.list_files("f1", 3)
    assert ([entry.name for entry in page], more) == (["f2", "f3", "f4"], False)
    assert all(0 <= entry.age_s < 100 for entry in page)
    assert store.remove("f3")
    assert not store.remove("f3")
    assert store.totals() == (4, 4 * len(DATA))


def test_a_full_disk_is_unavailable_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ColdStore(tmp_path, 1)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(Unavailable, match="disk is full"):
            write(store, "a", DATA)
    write(store, "a", DATA)
    assert read(store, "a", DATA) == DATA
    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
        with pytest.raises(Unavailable, match="I/O error"):
            read(store, "a", DATA)


def test_restoring_bytes_in_place_keeps_the_rest(tmp_path: Path) -> None:
    store = ColdStore(tmp_path, 1)
    write(store, "a", DATA)
    path = tmp_path / "disk-0" / "a"
    path.write_bytes(DATA[:100] + b"\0" * 50 + DATA[150:])
    store.restore("a", 100, DATA[100:150])
    assert path.read_bytes() == DATA
    with pytest.raises(Corrupt):
        store.restore("a", len(DATA) - 10, DATA[:20])


def test_a_whole_copy_is_taken_only_if_all_its_blocks_are_good(tmp_path: Path) -> None:
    good = cold_file()
    store = ColdStore(tmp_path, 2)
    damaged = bytearray(good)
    damaged[len(good) // 3] ^= 1

    def replace(*pieces: bytes) -> None:
        offset = 0
        for piece in pieces:
            store.add_to_copy("a", 1, offset, piece)
            offset += len(piece)
        store.finish_copy("a", 1)

    with pytest.raises(Corrupt):
        replace(bytes(damaged))
    with pytest.raises(Corrupt):
        replace(good[:-30])
    store.add_to_copy("a", 1, 0, good[:700])
    store.drop_copy("a", 1)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    replace(good[:700], good[700:])
    assert Path(tmp_path / "disk-1" / "a").read_bytes() == good
    assert store.index("a")[1].table == b"t"
