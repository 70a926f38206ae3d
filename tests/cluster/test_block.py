"""The block format: what is written comes back, damage is noticed, and plain Arrow readers read the files in place."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from timetier.cluster.cold.block import (
    DecodedBlock,
    FileBuilder,
    checksum,
    decode_block,
    read_index,
    verify,
)
from timetier.cluster.cold.link import Block
from timetier.cluster.cold.rows import Rows
from timetier.cluster.errors import Corrupt, InvalidRequest
from timetier.cluster.keys import item_key, split_item_key, timestamp_floor

I64 = st.integers(-(1 << 63), (1 << 63) - 1)


def rows_from(items: dict[tuple[bytes, bytes], tuple[bytes, int, int]]) -> Rows:
    rows = Rows()
    for owner, key in sorted(items):
        rows.append(owner, key, *items[owner, key])
    return rows


def some_rows(owners: int, each: int) -> Rows:
    return rows_from(
        {
            (b"owner-%03d" % owner, item_key(at, b"x%d" % at)): (b"value %d" % at, at + 1, at * 1_000)
            for owner in range(owners)
            for at in range(each)
        }
    )


def build(rows: Rows, **options: int) -> tuple[list[Block], bytes]:
    builder = FileBuilder("f-1.arrow", table=b"moments", per_second=1_000, cold_group=3, run="r1")
    settled = {"bucket": 5, "window_start": 0, "window_end": 100, "generation": 1, "block_rows": 10, **options}
    blocks = builder.add(rows, **settled)
    data = builder.finish()
    assert len(data) > builder.size  # the footer comes on top
    return blocks, data


def lone(blocks: list[Block], data: bytes) -> list[DecodedBlock]:
    found = []
    for block in blocks:
        piece = data[block.offset : block.offset + block.length]
        verify(piece, block.crc)
        found.append(decode_block(piece))
    return found


ITEMS = st.dictionaries(
    st.tuples(st.binary(min_size=1, max_size=4), st.builds(item_key, I64, st.binary(max_size=3))),
    st.tuples(st.binary(max_size=20), I64, I64),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(ITEMS, st.integers(1, 12), st.binary(max_size=10), st.binary(max_size=10), st.integers(0, 5))
def test_a_lone_block_gives_back_exactly_the_rows_of_an_owner_in_range(
    items: dict[tuple[bytes, bytes], tuple[bytes, int, int]], block_rows: int, low: bytes, before: bytes, limit: int
) -> None:
    blocks, data = build(rows_from(items), block_rows=block_rows)
    decoded = lone(blocks, data)
    assert sum(block.rows for block in blocks) == len(items)
    assert all(block.rows <= block_rows for block in blocks)
    for owner in {owner for owner, _ in items} | {b"nobody"}:
        found = []
        for block, rows in zip(blocks, decoded, strict=True):
            got = list(zip(*rows.rows_of(owner, low, before), strict=True))
            assert got == sorted(got, reverse=True)
            assert list(zip(*rows.rows_of(owner, low, before, limit), strict=True)) == got[: limit or None]
            assert not got or block.first_owner <= owner <= block.last_owner
            assert all(block.low <= row[0] < block.high for row in got)
            found += got
        expected = {(k, *v) for (o, k), v in items.items() if o == owner and k >= low and (not before or k < before)}
        assert len(found) == len(expected)
        assert set(found) == expected


def test_a_block_holds_at_most_so_many_rows_and_bytes() -> None:
    rows = some_rows(3, 50)
    blocks, _ = build(rows, block_rows=1_000, block_bytes=500)
    assert len(blocks) > 5
    assert sum(block.rows for block in blocks) == 150
    blocks, data = build(rows, block_rows=40)
    assert [block.rows for block in blocks] == [40, 40, 20, 40, 10]
    assert rows_of_all(blocks, data) == rows


def rows_of_all(blocks: list[Block], data: bytes) -> Rows:
    again = Rows()
    for part in lone(blocks, data):
        more = part.all_rows()
        again.owners += more.owners
        again.keys += more.keys
        again.values += more.values
        again.versions += more.versions
        again.written += more.written
    return again


def test_a_block_ends_between_two_owners_where_that_leaves_it_at_least_half() -> None:
    rows = some_rows(8, 20)
    blocks, data = build(rows, block_rows=50)
    assert [block.rows for block in blocks] == [40, 40, 40, 40]
    assert all(block.rows <= 50 for block in blocks)
    assert rows_of_all(blocks, data) == rows
    alone = some_rows(1, 120)
    blocks, data = build(alone, block_rows=50)
    assert [block.rows for block in blocks] == [50, 50, 20], "a long timeline is cut where the block is full"
    assert rows_of_all(blocks, data) == alone


@settings(max_examples=60, deadline=None)
@given(ITEMS, st.integers(1, 12), st.integers(1, 200))
def test_blocks_have_all_rows_whatever_their_bounds(
    items: dict[tuple[bytes, bytes], tuple[bytes, int, int]], block_rows: int, block_bytes: int
) -> None:
    rows = rows_from(items)
    blocks, data = build(rows, block_rows=block_rows, block_bytes=block_bytes)
    assert rows_of_all(blocks, data) == rows
    for block, decoded in zip(blocks, lone(blocks, data), strict=True):
        assert block.rows == 1 or (block.rows <= block_rows and decoded.all_rows().raw_bytes() <= block_bytes)


@settings(max_examples=60, deadline=None)
@given(ITEMS)
def test_the_part_of_an_owner_is_a_block_with_its_rows_alone(
    items: dict[tuple[bytes, bytes], tuple[bytes, int, int]],
) -> None:
    blocks, data = build(rows_from(items))
    for whole in lone(blocks, data):
        for owner in {*whole.all_rows().owners, b"nobody"}:
            part = decode_block(whole.part_of(owner))
            assert part.rows_of(owner) == whole.rows_of(owner)
            assert part.rows == len(part.rows_of(owner)[0])


def test_a_value_larger_than_a_block_should_be_gets_a_block_of_its_own() -> None:
    rows = rows_from({(b"o", item_key(at)): (bytes([at]) * 3_000, 1, 1) for at in range(4)})
    blocks, data = build(rows, block_bytes=1_000)
    assert [block.rows for block in blocks] == [1, 1, 1, 1]
    assert [part.rows_of(b"o")[1][0][:1] for part in lone(blocks, data)] == [b"\0", b"\1", b"\2", b"\3"]


def test_the_same_rows_give_the_same_bytes() -> None:
    assert build(some_rows(4, 30)) == build(some_rows(4, 30))


def test_every_flipped_bit_of_a_block_is_noticed() -> None:
    blocks, data = build(some_rows(1, 8))
    (block,) = blocks
    piece = data[block.offset : block.offset + block.length]
    for bit in range(len(piece) * 8):
        damaged = bytearray(piece)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(Corrupt, match="checksum"):
            verify(bytes(damaged), block.crc)


def test_bytes_that_are_no_block_raise_corrupt_whatever_their_checksum() -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    blocks, data = build(some_rows(1, 8))
    piece = data[blocks[0].offset : blocks[0].offset + blocks[0].length]
    for wrong in [b"", b"\xff", rng.randbytes(64), piece[:40], piece[: len(piece) // 2], data[:8]]:
        with pytest.raises(Corrupt):
            decode_block(wrong)
    with pytest.raises(Corrupt, match="format 9"):
        decode_block(piece, 9)


def test_unsorted_rows_are_refused() -> None:
    rows = some_rows(2, 3)
    rows.keys.reverse()
    with pytest.raises(InvalidRequest, match="sorted"):
        build(rows)


def test_pyarrow_reads_the_file_in_place_with_the_right_rows(tmp_path: Path) -> None:
    rows = some_rows(5, 30)
    blocks, data = build(rows, block_rows=40)
    path = tmp_path / "f-1.arrow"
    path.write_bytes(data)
    with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as reader:
        assert reader.num_record_batches == len(blocks)
        assert [reader.get_batch(at).num_rows for at in range(len(blocks))] == [block.rows for block in blocks]
        assert reader.schema.metadata[b"timetier.table"] == b"moments"
        assert reader.schema.metadata[b"timetier.timestamp_per_second"] == b"1000"
        assert reader.schema.metadata[b"timetier.format"] == b"1"
    table = pyarrow.dataset.dataset(str(path), format="arrow").to_table()
    assert table.column("owner").to_pylist() == rows.owners
    places = list(zip(table.column("timestamp").to_pylist(), table.column("id").to_pylist(), strict=True))
    assert places == [split_item_key(key) for key in rows.keys]
    assert table.column("value").to_pylist() == rows.values
    assert table.column("version").to_pylist() == rows.versions
    assert table.column("written").to_pylist() == rows.written


def test_a_file_tells_by_itself_where_its_blocks_are_and_what_they_hold() -> None:
    blocks, data = build(some_rows(5, 30), block_rows=40)
    index = read_index(data)
    assert index.table == b"moments"
    assert [(e.offset, e.length, e.crc, e.rows) for e in index.blocks] == [
        (b.offset, b.length, b.crc, b.rows) for b in blocks
    ]
    assert {(e.bucket, e.window_start, e.window_end, e.generation) for e in index.blocks} == {(5, 0, 100, 1)}
    for wrong in [b"", data[:-20], data[: len(data) // 2], b"\0" * 100]:
        with pytest.raises(Corrupt):
            read_index(wrong)


def test_a_bound_that_is_no_item_key_works_too() -> None:
    blocks, data = build(some_rows(1, 10))
    (block,) = lone(blocks, data)
    keys, _, _, _ = block.rows_of(b"owner-000", timestamp_floor(3), timestamp_floor(6))
    assert [split_item_key(key)[0] for key in keys] == [5, 4, 3]
    assert len(block.rows_of(b"owner-000", b"", b"\xff" * 9)[0]) == 10
    assert block.nbytes > 400
    assert checksum(b"123456789") == 0xE3069283  # the check value of CRC32C
