"""Files put together from blocks are those that Arrow itself writes, and blocks of other compressions are read."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from timetier.cluster.cold.block import SCHEMA, FileBuilder, decode_block
from timetier.cluster.cold.ipc_file import COMPRESSION, LEVEL, head_of, message_of, tail_of
from timetier.cluster.cold.rows import Rows, batch_of
from timetier.cluster.errors import InvalidRequest
from timetier.cluster.keys import item_key, split_item_key

METADATA = {b"index": b"of the footer" * 9}
FILE_SCHEMA = SCHEMA.with_metadata({b"table": b"moments"})


def rows_of(rng: random.Random, count: int) -> Rows:
    rows = Rows()
    for at in range(count):
        rows.append(b"o%05d" % (at // 7), item_key(at, rng.randbytes(at % 5)), rng.randbytes(at % 90), at + 1, 5 * at)
    return rows


def written_by_arrow(batches: list[pa.RecordBatch]) -> bytes:
    options = pa.ipc.IpcWriteOptions(compression=pa.Codec(COMPRESSION, LEVEL), use_threads=False)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, FILE_SCHEMA, options=options, metadata=METADATA) as writer:
        for batch in batches:
            writer.write_batch(batch)
    data: bytes = sink.getvalue().to_pybytes()
    return data


@pytest.mark.parametrize("counts", [[], [1], [3, 1, 500], list(range(1, 60))])
def test_a_file_is_to_the_byte_what_arrow_writes(counts: list[int]) -> None:
    rng = random.Random(7)
    batches = [batch_of(rows_of(rng, count), FILE_SCHEMA) for count in counts]
    messages = [message_of(batch) for batch in batches]
    file = head_of(FILE_SCHEMA) + b"".join(messages) + tail_of(FILE_SCHEMA, messages, METADATA)
    assert file == written_by_arrow(batches)


@pytest.mark.parametrize("compression", ["lz4", "zstd", None])
def test_a_block_is_read_whatever_its_compression(compression: str | None) -> None:
    rows = rows_of(random.Random(8), 300)
    options = pa.ipc.IpcWriteOptions(compression=compression)
    assert decode_block(message_of(batch_of(rows, SCHEMA), options)).all_rows() == rows


def test_the_first_read_of_a_process_imports_no_pandas(tmp_path: Path) -> None:
    (tmp_path / "pandas.py").write_text("raise RuntimeError('imported')")
    block = tmp_path / "block"
    block.write_bytes(message_of(batch_of(rows_of(random.Random(8), 30), SCHEMA)))
    program = (
        "import sys; from pathlib import Path; from timetier.cluster.cold.block import decode_block;"
        f"block = decode_block(Path({str(block)!r}).read_bytes());"
        "assert block.rows_of(b'o00001')[0] and block.part_of(b'o00001') and len(block.all_rows()) == 30;"
        "assert 'pandas' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- cutting rows into blocks


def slow_cuts(rows: Rows, block_rows: int, block_bytes: int) -> Iterator[tuple[int, int]]:
    """The rule for blocks, row by row."""
    start = size = 0
    owner_at = before_owner = 0  # where the last owner begins, and the bytes of the part before it
    for at in range(len(rows)):
        if at and rows.owners[at] != rows.owners[at - 1]:
            owner_at, before_owner = at, size
        more = len(rows.owners[at]) + len(rows.keys[at]) + len(rows.values[at])
        while at > start and (at - start >= block_rows or size + more > block_bytes):
            between = owner_at > start and 2 * before_owner >= size
            cut, part = (owner_at, before_owner) if between else (at, size)
            yield start, cut
            start, size = cut, size - part
            before_owner = 0
        size += more
    if start < len(rows):
        yield start, len(rows)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 40)), max_size=60),
    st.integers(1, 20),
    st.integers(1, 300),
)
def test_blocks_end_where_the_rule_says(sizes: list[tuple[int, int]], block_rows: int, block_bytes: int) -> None:
    rows = Rows()
    for at, (owner, size) in enumerate(sorted(sizes)):
        rows.append(b"%d" % owner, item_key(at), bytes(size), 1, 1)
    assert list(rows.cuts(block_rows, block_bytes)) == list(slow_cuts(rows, block_rows, block_bytes))


I64 = st.integers(-(1 << 63), (1 << 63) - 1)


@settings(max_examples=100, deadline=None)
@given(st.sets(st.tuples(I64, st.binary(max_size=6)), min_size=1, max_size=20))
def test_columns_have_the_timestamps_and_ids_of_the_keys(places: set[tuple[int, bytes]]) -> None:
    rows = Rows()
    for key in sorted(item_key(*place) for place in places):
        rows.append(b"o", key, b"", 1, 1)
    batch = batch_of(rows, SCHEMA)
    found = list(zip(batch["timestamp"].to_pylist(), batch["id"].to_pylist(), strict=True))
    assert found == [split_item_key(key) for key in rows.keys]


@pytest.mark.parametrize("change", ["owners", "keys"])
def test_rows_out_of_order_make_no_block(change: str) -> None:
    rows = rows_of(random.Random(9), 30)
    column = getattr(rows, change)
    column[9], column[8] = column[8], column[9]
    if change == "owners":
        column[3] = b"z"
    with pytest.raises(ValueError, match="sorted"):
        batch_of(rows, SCHEMA)
    twice = rows_of(random.Random(9), 1).part(0, 1)
    twice.extend(twice.part(0, 1))
    with pytest.raises(ValueError, match="sorted"):
        batch_of(twice, SCHEMA)


def test_the_builder_tells_of_the_bucket_whose_rows_are_out_of_order() -> None:
    rows = rows_of(random.Random(9), 30)
    rows.keys.reverse()
    builder = FileBuilder("f-1.arrow", table=b"moments", per_second=1_000, cold_group=3, run="r1")
    with pytest.raises(InvalidRequest, match=r"bucket 5: .*sorted"):
        builder.add(rows, bucket=5, window_start=0, window_end=100, generation=1, block_rows=10)
