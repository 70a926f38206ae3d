"""Every byte of a cold file is covered by a checksum that the file itself has."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from cold_model import cold_file, unsealed
from timetier.cluster.cold.block import read_index
from timetier.cluster.cold.pieces import Anatomy, Piece, parts_to_read, read_anatomy
from timetier.cluster.errors import Corrupt

DATA = cold_file("a.arrow")


def anatomy_of(data: bytes) -> Anatomy:
    return read_anatomy(lambda offset, length: data[offset : offset + length], len(data))


def is_good(data: bytes, file: str = "a.arrow") -> bool:
    """Whether a file is what its name says and all of its pieces are right."""
    try:
        anatomy = anatomy_of(data)
        anatomy.check_name(file)
    except Corrupt:
        return False
    return all(piece.fits(data[piece.offset : piece.end]) for piece in (anatomy.head, *anatomy.blocks))


def test_a_file_is_its_head_its_blocks_and_its_tail_without_a_gap() -> None:
    anatomy = anatomy_of(DATA)
    assert (anatomy.name, anatomy.sealed, anatomy.size) == ("a.arrow", True, len(DATA))
    pieces = [anatomy.head, *anatomy.blocks, Piece(anatomy.tail_at, len(anatomy.tail), None)]
    assert pieces[0].offset == 0
    assert [piece.end for piece in pieces] == [*[piece.offset for piece in pieces[1:]], len(DATA)]
    assert [(b.offset, b.length, b.crc) for b in anatomy.blocks] == [e[5:8] for e in read_index(DATA).blocks]
    assert is_good(DATA)


def test_whoever_reads_arrow_reads_a_sealed_file(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    path.write_bytes(DATA)
    assert pa.ipc.open_file(str(path)).read_all().num_rows == 360
    assert read_index(str(path)) == read_index(DATA)


def test_a_bit_that_flips_anywhere_in_a_file_is_noticed() -> None:
    anatomy = anatomy_of(DATA)
    places = [*range(anatomy.head.length), *range(anatomy.tail_at, len(DATA)), *range(0, len(DATA), 97)]
    for at in places:
        damaged = bytearray(DATA)
        damaged[at] ^= 1 << (at % 8)
        assert not is_good(bytes(damaged)), f"bit {at % 8} of byte {at}"


def test_a_file_cut_anywhere_is_noticed() -> None:
    for size in [*range(40), *range(40, len(DATA), 53), len(DATA) - 1]:
        assert not is_good(DATA[:size]), size
    assert not is_good(DATA + b"\x00")


def test_a_good_file_under_the_name_of_another_is_noticed() -> None:
    other = cold_file("b.arrow")
    assert is_good(other, "b.arrow")
    assert not is_good(other, "a.arrow")
    with pytest.raises(Corrupt, match=r"under the name a\.arrow is b\.arrow"):
        anatomy_of(other).check_name("a.arrow")


def test_a_file_without_a_name_and_a_seal_is_read_by_its_blocks_alone() -> None:
    anatomy = anatomy_of(unsealed(DATA))
    assert (anatomy.name, anatomy.sealed, anatomy.head.crc) == ("", False, None)
    assert [b.crc for b in anatomy.blocks] == [entry.crc for entry in read_index(DATA).blocks]
    anatomy.check_name("whatever.arrow")


def test_a_large_tail_takes_a_second_read() -> None:
    data = cold_file("a.arrow", owners=700, each=50)
    anatomy = anatomy_of(data)
    assert len(anatomy.blocks) == 700
    reads = []

    def read(offset: int, length: int) -> bytes:
        reads.append((offset, length))
        return data[offset : offset + length]

    assert read_anatomy(read, len(data)) == anatomy
    assert 1 <= len(reads) <= 3


def test_runs_of_pieces_cover_head_and_blocks_and_are_bounded() -> None:
    anatomy = anatomy_of(DATA)
    longest = max(piece.length for piece in (anatomy.head, *anatomy.blocks))
    for most in (1, longest, 3 * longest, 1 << 30):
        runs = list(parts_to_read(anatomy, most))
        assert [piece for run in runs for piece in run] == [anatomy.head, *anatomy.blocks]
        assert all(run[-1].end - run[0].offset <= most or len(run) == 1 for run in runs)
