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
from timetier.cluster.cold.disk_marks import MARK_FILE, REGISTER_FILE
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


def files_in(folder: Path) -> list[str]:
    """Names of what is there beside the node's own notes."""
    return [path.name for path in folder.rglob("*") if path.is_file() and path.name not in (MARK_FILE, REGISTER_FILE)]


def test_a_file_is_there_only_after_its_last_piece_and_survives_a_restart(tmp_path: Path) -> None:
    store = ColdStore(tmp_path, 3).open()
    store.write_piece("a.arrow", 1, 0, DATA[:4_000], last=False, crc=0)
    assert store.list_files() == ([], False)
    with pytest.raises(Corrupt, match="missing"):
        read(store, "a.arrow", DATA)
    assert ColdStore(tmp_path, 3).open().list_files() == ([], False)
    assert list(tmp_path.rglob("*.part")) == []  # what was left half written is gone after a restart
    store = ColdStore(tmp_path, 3).open()
    assert write(store, "a.arrow", DATA, disk=1) == (len(DATA), checksum(DATA))
    assert (tmp_path / "disk-1" / "a.arrow").read_bytes() == DATA
    again = ColdStore(tmp_path, 3).open()
    assert again.find("a.arrow")[:2] == (1, len(DATA))
    assert read(again, "a.arrow", DATA, 100, 5_000) == DATA[100:5_100]
    assert [entry[:2] for entry in again.list_files()[0]] == [("a.arrow", len(DATA))]


def test_writing_the_same_file_again_succeeds_and_other_content_is_refused(tmp_path: Path) -> None:
    store = ColdStore(tmp_path, 1).open()
    write(store, "a", DATA)
    assert write(store, "a", DATA) == (len(DATA), checksum(DATA))
    with pytest.raises(InvalidRequest, match="other content"):
        write(store, "a", DATA[:-1])
    assert read(store, "a", DATA) == DATA
    assert files_in(tmp_path) == ["a"]


def test_a_checksum_that_does_not_fit_leaves_nothing_behind(tmp_path: Path) -> None:
    store = ColdStore(tmp_path, 1).open()
    with pytest.raises(InvalidRequest, match="checksum"):
        store.write_piece("a", 0, 0, DATA, last=True, crc=1)
    assert files_in(tmp_path) == []
    with pytest.raises(InvalidRequest, match="start at 0"):
        store.write_piece("a", 0, 10, DATA, last=False, crc=1)


def test_pieces_may_be_sent_again_but_not_with_gaps(tmp_path: Path) -> None:
    store = ColdStore(tmp_path, 2).open()
    store.write_piece("a", 0, 0, DATA[:50], last=False, crc=0)
    with pytest.raises(InvalidRequest, match="a piece at 60"):
        store.write_piece("a", 0, 60, DATA[60:], last=True, crc=checksum(DATA))
    with pytest.raises(InvalidRequest, match="beginning"):
        store.write_piece("a", 1, 50, DATA[50:], last=True, crc=checksum(DATA))
    for _ in range(2):
        store.write_piece("a", 0, 50, DATA[50:90], last=False, crc=0)
    assert store.write_piece("a", 0, 90, DATA[90:], last=True, crc=checksum(DATA)) == (len(DATA), checksum(DATA))


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../a", "a/b", "/a", "A", "a b", "a\n", "a\0", "-a", ".a", "a.part", "ä", "a" * 129]
)
def test_no_name_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    store = ColdStore(tmp_path / "node", 1).open()
    (tmp_path / "a").write_bytes(DATA)
    for attempt in (
        lambda: store.write_piece(name, 0, 0, b"x", last=True, crc=checksum(b"x")),
        lambda: store.read_block(name, 0, 1, 0),
        lambda: store.remove(name),
        lambda: store.restore(name, 0, b"x"),
        lambda: store.copies.add(name, 0, 0, b"x"),
        lambda: store.index(name),
    ):
        with pytest.raises(InvalidRequest):
            attempt()
    assert (tmp_path / "a").read_bytes() == DATA
    assert files_in(tmp_path / "node") == []


def test_sizes_and_disks_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ColdStore(tmp_path, 2).open()
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
    store = ColdStore(tmp_path, 1).open()
    for number in range(16):
        store.write_piece(f"a{number}", 0, 0, b"x", last=False, crc=0)
    with pytest.raises(Unavailable, match="at once"):
        store.write_piece("b", 0, 0, b"x", last=False, crc=0)
    monkeypatch.setattr(store_module, "_STALE_PART_S", 0.0)
    write(store, "b", DATA)
    assert read(store, "b", DATA) == DATA
    assert not list(tmp_path.rglob("*.part")), "what nobody writes any more takes no room"


def test_damage_shortness_and_absence_are_told_apart(tmp_path: Path) -> None:
    store = ColdStore(tmp_path, 1).open()
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
    store = ColdStore(tmp_path, 1).open()
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
    store = ColdStore(tmp_path, 1).open()

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
    store = ColdStore(tmp_path, 1).open()
    write(store, "a", DATA)
    path = tmp_path / "disk-0" / "a"
    path.write_bytes(DATA[:100] + b"\0" * 50 + DATA[150:])
    store.restore("a", 100, DATA[100:150])
    assert path.read_bytes() == DATA
    with pytest.raises(Corrupt):
        store.restore("a", len(DATA) - 10, DATA[:20])


def test_a_whole_copy_is_checked_piece_by_piece_and_counts_only_when_it_is_kept(tmp_path: Path) -> None:
    good = cold_file("a")
    store = ColdStore(tmp_path, 2).open()
    at = len(good) // 3
    damaged = good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :]

    def write_copy(*pieces: bytes) -> None:
        offset = 0
        for piece in pieces:
            store.copies.add("a", 1, offset, piece)
            offset += len(piece)

    write_copy(damaged)
    (piece,) = store.copies.check("a", 1).damaged
    assert piece.offset <= at < piece.end
    write_copy(good[:-30])
    with pytest.raises(Corrupt):
        store.copies.check("a", 1)
    store.copies.drop("a", 1)
    assert files_in(tmp_path) == []
    write_copy(good[:700], good[700:])
    found = store.copies.check("a", 1)
    assert (found.size, found.crc, found.sealed, found.damaged) == (len(good), checksum(good), True, [])
    assert store.list_files() == ([], False)
    store.copies.keep("a", 1, 1_000.0)
    assert Path(tmp_path / "disk-1" / "a").read_bytes() == good
    assert store.index("a")[1].table == b"t"
    assert store.find("a") == (1, len(good), 1_000.0)
