"""Which encoding the blocks of cold files should have: bytes of an item, CPU to write and read it, time of one read.

    python -m benchmarks.cold_encodings [--json] [--data FILE --owner COLUMN --time COLUMN --id COLUMN ...]

The items are those of the sample that ships with the package (264,513 events of three projects), or of a file that
`timetier load` takes. They are cut into blocks as the sink does it, all of them as one bucket and window, so that
blocks are as large as they may be; the last lines cut them into the buckets and windows of the embedded default, where
most blocks are small. One thing varies at a time: compression and block size, columns, order of the rows in a block.

`raw` are the bytes of owner, id, value and eight of the timestamp. `RocksDB` is what the rows of the same items take in
the storage tier, compacted, in one replica. A *read* is what a cold node does for a reader of one owner: one `pread` of
the block, its CRC32C, decoding, the owner's rows; of blocks in random order, once the kernel was told to forget them
(`disk`) and once not (`page cache`). Layouts beside the chosen one are decoded, not searched.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from timetier.cluster.cold.block import BLOCK_RAW_BYTES, SCHEMA, checksum, decode_block, verify
from timetier.cluster.cold.ipc_file import COMPRESSION, LEVEL, message_of
from timetier.cluster.cold.rows import Rows, batch_of
from timetier.cluster.keys import bucket_of, item_key, item_keys_timestamps, timeline_key
from timetier.cluster.messages import PUT
from timetier.cluster.paxos.rows import encode_row, row_key
from timetier.cluster.storage.engine import RocksEngine
from timetier.jobs.rejects import Rejects
from timetier.jobs.rows import Columns, read_rows
from timetier.jobs.sample import SAMPLE, SAMPLE_COLUMNS
from timetier.jobs.sources import open_source

TABLE = b"t"
CODECS = ("none", "lz4", "zstd 1", "zstd 3", "zstd 9")
BLOCK_KIB = (64, 128, 256, 512, 1_024, 4_096)
CHOSEN = f"{COMPRESSION} {LEVEL}"
BUCKETS = 1_024
WINDOW_US = 4 * 365 * 86_400_000_000
_BLOCK_ROWS = 4_096
_UNBOUNDED_ROWS = 1 << 20
_PER_ENTRY = 100  # items of a timeline that one write brings, as the loader does it
_WRITTEN_US = 1_760_000_000_000_000
_READS = 60
_ROWS_A_BATCH = 10_000


@dataclass(frozen=True)
class Figures:
    """Of one encoding. `ratio`: to raw. Microseconds: CPU to encode and decode an item; p50 of a read."""

    name: str
    compression: str
    block_kib: int
    blocks: int
    bytes_per_item: float
    ratio: float
    encode_us: float
    decode_us: float
    read_disk_us: float
    read_cached_us: float


# ---------------------------------------------------------------- data


def load(path: Path, columns: Columns, per_second: int) -> Rows:
    """All items of a file, sorted by (owner, key), with versions and times as the loader would give them."""
    items: dict[tuple[bytes, bytes], bytes] = {}
    with Rejects(None) as rejects:
        for batch in read_rows(open_source(path, rejects, None), columns, per_second, rejects):
            keys = map(item_key, batch.timestamps, batch.ids)
            items.update(zip(zip(batch.owners, keys, strict=True), batch.values, strict=True))
    rows = Rows()
    for owner, group in itertools.groupby(sorted(items), key=lambda place: place[0]):
        for at, (_, key) in enumerate(group):
            written = _WRITTEN_US + len(rows) // _PER_ENTRY * 10_000
            rows.append(owner, key, items[owner, key], at // _PER_ENTRY + 1, written)
    return rows


def raw_bytes(rows: Rows) -> int:
    """Bytes of owners, timestamps, ids and values."""
    return rows.raw_bytes() - 2 * len(rows)  # a key without an id has two bytes beside the timestamp


def one_bucket(rows: Rows, block_kib: int, block_rows: int = _UNBOUNDED_ROWS) -> list[Rows]:
    """Blocks of at most that size, of all rows as one bucket."""
    return [rows.part(low, high) for low, high in rows.cuts(block_rows, block_kib << 10)]


def as_it_sinks(rows: Rows, buckets: int, window: int) -> list[Rows]:
    """Blocks of each bucket and window."""
    cells: dict[tuple[int, int], Rows] = {}
    windows = (item_keys_timestamps(rows.keys) // window).tolist()
    columns = zip(rows.owners, rows.keys, rows.values, rows.versions, rows.written, strict=True)
    for at, row in zip(windows, columns, strict=True):
        bucket = bucket_of(timeline_key(TABLE, row[0], buckets))
        cells.setdefault((bucket, at), Rows()).append(*row)
    return [block for cell in cells.values() for block in one_bucket(cell, BLOCK_RAW_BYTES >> 10, _BLOCK_ROWS)]


def rocks_bytes(rows: Rows, folder: Path) -> float:
    """Bytes that an item takes in the storage tier of one replica, compacted."""
    engine = RocksEngine(folder, create=True, cache_mb=16, write_buffer_mb=64)
    columns = zip(rows.owners, rows.keys, rows.values, rows.versions, rows.written, strict=True)
    for at, (owner, key, value, version, written) in enumerate(columns):
        timeline = timeline_key(TABLE, owner, BUCKETS)
        engine.put(row_key(timeline, key, version), encode_row(written, PUT, value))
        if at % _ROWS_A_BATCH == 0:
            engine.commit()
    engine.commit()
    engine._db.flush()
    engine._db.compact_range(None, None)
    size = engine.size_bytes()
    engine.close()
    return size / len(rows)


# ---------------------------------------------------------------- layouts


def _replaced(batch: pa.RecordBatch, columns: dict[str, Any]) -> pa.RecordBatch:
    found = {name: columns.get(name, column) for name, column in zip(batch.schema.names, batch.columns, strict=True)}
    return pa.RecordBatch.from_pydict(found)


def _narrow(batch: pa.RecordBatch) -> pa.RecordBatch:
    seconds = pc.divide(batch["written"], 1_000_000)
    return _replaced(
        batch, {"version": batch["version"].cast(pa.int32()), "written": seconds.cast(pa.uint32(), safe=False)}
    )


def _run_ends(batch: pa.RecordBatch) -> pa.RecordBatch:
    return _replaced(batch, {name: pc.run_end_encode(batch[name]) for name in ("owner", "version", "written")})


def _differences(batch: pa.RecordBatch) -> pa.RecordBatch:
    found = {}
    for name in ("timestamp", "version", "written"):
        column = batch[name].to_numpy()
        found[name] = pa.array(np.diff(column, prepend=0))
    return _replaced(batch, found)


def _nested(batch: pa.RecordBatch) -> pa.RecordBatch:
    """One row an owner: its items as a list of structs."""
    owners = pc.run_end_encode(batch["owner"])
    offsets = pa.array([0, *owners.run_ends.to_pylist()], pa.int32())
    rest = batch.drop_columns(["owner"])
    items = pa.StructArray.from_arrays(rest.columns, rest.schema.names)
    return pa.RecordBatch.from_pydict({"owner": owners.values, "items": pa.ListArray.from_arrays(offsets, items)})


def _sorted_by(*names: str) -> Callable[[pa.RecordBatch], pa.RecordBatch]:
    def change(batch: pa.RecordBatch) -> pa.RecordBatch:
        return batch.sort_by([(name, "ascending") for name in names])

    return change


LAYOUTS: dict[str, Callable[[pa.RecordBatch], pa.RecordBatch]] = {
    "narrow version and written": _narrow,
    "run ends: owner, version, written": _run_ends,
    "differences: timestamp, version, written": _differences,
    "one row an owner, items in a list": _nested,
    "sorted by owner, id, timestamp": _sorted_by("owner", "id", "timestamp"),
    "sorted by timestamp, owner, id": _sorted_by("timestamp", "owner", "id"),
}


# ---------------------------------------------------------------- one encoding


def _options(compression: str) -> Any:
    codec = None
    if compression != "none":
        name, _, level = compression.partition(" ")
        codec = pa.Codec(name, int(level)) if level else name
    return pa.ipc.IpcWriteOptions(compression=codec, use_threads=False)


class Study:
    """Measures encodings of the same rows."""

    def __init__(self, rows: Rows, folder: Path, seed: int) -> None:
        self._rows = rows
        self._raw = raw_bytes(rows)
        self._folder = folder
        self._random = random.Random(seed)

    def measure(
        self,
        name: str,
        compression: str,
        block_kib: int,
        blocks: list[Rows],
        layout: Callable[[pa.RecordBatch], pa.RecordBatch] | None = None,
    ) -> Figures:
        """Encode all blocks and read some of them."""
        plain = [batch_of(block, SCHEMA) for block in blocks]
        batches = [layout(batch) for batch in plain] if layout is not None else plain
        options = _options(compression)
        began = time.process_time()
        messages = [message_of(batch, options) for batch in batches]
        encoded_s = time.process_time() - began
        decode = _decoder(batches[0].schema) if layout is not None else decode_block
        began = time.process_time()
        for message in messages:
            decode(message)
        decoded_s = time.process_time() - began
        count, size = len(self._rows), sum(map(len, messages))
        disk, cached = self._read(messages, blocks, decode, searched=layout is None)
        return Figures(
            name=name,
            compression=compression,
            block_kib=block_kib,
            blocks=len(blocks),
            bytes_per_item=round(size / count, 2),
            ratio=round(size / self._raw, 3),
            encode_us=round(encoded_s / count * 1e6, 3),
            decode_us=round(decoded_s / count * 1e6, 3),
            read_disk_us=round(disk, 1),
            read_cached_us=round(cached, 1),
        )

    def _read(
        self, messages: list[bytes], blocks: list[Rows], decode: Callable[[bytes], Any], *, searched: bool
    ) -> tuple[float, float]:
        """p50 of a read from disk, and from the page cache: microseconds."""
        path = self._folder / "blocks"
        with path.open("wb") as out:
            out.writelines(messages)
            out.flush()
            os.fsync(out.fileno())
        offsets = np.cumsum([0, *map(len, messages)]).tolist()
        wanted = [self._random.randrange(len(messages)) for _ in range(_READS)]
        times: dict[bool, list[float]] = {True: [], False: []}
        file = os.open(path, os.O_RDONLY)
        try:
            for at, from_disk in itertools.product(wanted, times):
                if from_disk:
                    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
                owner, crc = self._random.choice(blocks[at].owners), checksum(messages[at])
                began = time.perf_counter()
                data = os.pread(file, len(messages[at]), offsets[at])
                verify(data, crc)
                decoded = decode(data)
                if searched:
                    decoded.part_of(owner)
                times[from_disk].append(time.perf_counter() - began)
        finally:
            os.close(file)
        return float(np.median(times[True])) * 1e6, float(np.median(times[False])) * 1e6


def _decoder(schema: pa.Schema) -> Callable[[bytes], Any]:
    head = schema.serialize().to_pybytes()
    options = pa.ipc.IpcReadOptions(use_threads=False)

    def decode(data: bytes) -> pa.RecordBatch:
        with pa.ipc.open_stream(pa.BufferReader(head + data), options=options) as reader:
            return reader.read_next_batch()

    return decode


def _cases(rows: Rows) -> Iterator[tuple[str, str, int, list[Rows], Any]]:
    """(name, compression, KiB of a block, blocks, layout) of all that is measured."""
    for kib in BLOCK_KIB:
        blocks = one_bucket(rows, kib)
        for compression in CODECS if kib == BLOCK_RAW_BYTES >> 10 else ("lz4", CHOSEN):
            yield "columns as they are", compression, kib, blocks, None
    kib = BLOCK_RAW_BYTES >> 10
    blocks = one_bucket(rows, kib)
    for name, layout in LAYOUTS.items():
        yield name, CHOSEN, kib, blocks, layout
    blocks = as_it_sinks(rows, BUCKETS, WINDOW_US)
    for compression in ("lz4", CHOSEN):
        yield "in buckets and windows", compression, kib, blocks, None


def study(rows: Rows, folder: Path, seed: int) -> dict[str, Any]:
    """All figures; ready for JSON."""
    bench = Study(rows, folder, seed)
    found = []
    cases = list(_cases(rows))
    for number, (name, compression, kib, blocks, layout) in enumerate(cases, 1):
        print(f"{number} of {len(cases)}: {name}, {compression}, {kib} KiB", file=sys.stderr, flush=True)
        found.append(asdict(bench.measure(name, compression, kib, blocks, layout)))
    return {
        "items": len(rows),
        "raw_bytes_per_item": round(raw_bytes(rows) / len(rows), 2),
        "rocksdb_bytes_per_item": round(rocks_bytes(rows, folder / "engine"), 2),
        "chosen": {"compression": CHOSEN, "block_kib": BLOCK_RAW_BYTES >> 10},
        "encodings": found,
    }


def print_study(report: dict[str, Any]) -> None:
    """The figures of `study`, for people."""
    raw, rocks = report["raw_bytes_per_item"], report["rocksdb_bytes_per_item"]
    print(f"{report['items']:,} items of {raw} raw bytes; {rocks} bytes in RocksDB ({rocks / raw:.2f}x)")
    print(
        f"{'':40} {'':7} {'KiB':>5} {'blocks':>6} {'B/item':>7} {'to raw':>6} {'encode':>7} {'decode':>7}"
        f" {'disk':>6} {'cached':>6}   (us an item; us a read)"
    )
    for row in report["encodings"]:
        print(
            f"{row['name']:40} {row['compression']:7} {row['block_kib']:5} {row['blocks']:6}"
            f" {row['bytes_per_item']:7.1f} {row['ratio']:6.3f} {row['encode_us']:7.2f} {row['decode_us']:7.3f}"
            f" {row['read_disk_us']:6.0f} {row['read_cached_us']:6.0f}"
        )


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--data", type=click.Path(path_type=Path, exists=True), help="A file of items.  [default: the sample]")
@click.option("--owner", help="Its column with the owner.")
@click.option("--time", "time_column", help="Its column with the time.")
@click.option("--id", "ids", multiple=True, help="Its columns of the id.")
@click.option("--seed", default=1, show_default=True, help="Decides what is read.")
def main(
    as_json: bool, data: Path | None, owner: str | None, time_column: str | None, ids: tuple[str, ...], seed: int
) -> None:
    """Compare encodings of cold blocks."""
    columns = SAMPLE_COLUMNS
    if owner is not None or time_column is not None:
        if owner is None or time_column is None:
            raise click.UsageError("name both columns: --owner and --time")
        columns = Columns(owner, time_column, ids)
    rows = load(data or SAMPLE, columns, 1_000_000)
    if not rows:
        raise click.UsageError(f"{data} has no items")
    with tempfile.TemporaryDirectory(prefix="tt-enc-") as name:
        report = study(rows, Path(name), seed)
    if as_json:
        print(json.dumps(report))
    else:
        print_study(report)


if __name__ == "__main__":
    main()
