"""The format of cold files: blocks of rows in plain Arrow.

A cold file is an Arrow IPC *file* with LZ4-frame buffers: whatever reads Arrow reads it in place. It holds rows of
one table and one cold group. Each record batch is a *block*: rows of one bucket and one window, sorted by
(owner, timestamp, id), which a link names by offset, length and CRC32C. So a reader of one timeline needs one
positioned read, and neither the file's head nor its footer: the columns are the same in every file of a format.

The file explains itself. The schema's metadata says format, table, cold group, run and the timestamps' unit. The
footer's metadata has the index, a JSON object: `blocks` is a list of [bucket, window_start, window_end, generation,
rows, offset, length, crc32c], in the order of the record batches. With it a file can be verified, and its owners
found, without any link.

Writing takes two passes over the buffers, because Arrow wants the footer's metadata before the first batch, and the
index has the offsets: each block is encoded once when it is added (that gives its length and checksum) and once when
the file is finished, and must come out the same.
"""

from __future__ import annotations

import itertools
import json
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import google_crc32c
import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..errors import Corrupt, InvalidRequest
from ..keys import item_key, item_keys, item_keys_timestamps
from .link import FORMAT, Block

SCHEMA = pa.schema(
    [
        ("owner", pa.binary()),
        ("timestamp", pa.int64()),
        ("id", pa.binary()),
        ("value", pa.binary()),
        ("version", pa.int64()),
        ("written", pa.int64()),
    ]
)
MAX_BLOCK_BYTES = 32 << 20  # of an encoded block; half of what a frame may have
BLOCK_RAW_BYTES = 512 << 10  # rows of a block before encoding: for a reader of one row all of them are decoded

_MAGIC_BYTES = 8
_INDEX = b"timetier.index"
_FORMAT = b"timetier.format"
_TABLE = b"timetier.table"


def checksum(data: bytes | memoryview) -> int:
    """CRC32C."""
    return int(google_crc32c.value(bytes(data)))


def verify(data: bytes, crc: int) -> None:
    """Raise Corrupt unless the CRC32C of `data` is `crc`."""
    found = checksum(data)
    if found != crc:
        raise Corrupt(f"{len(data)} bytes have checksum {found:08x}, not {crc:08x}", reason="checksum")


@dataclass(slots=True)
class Rows:
    """Items as parallel columns. `keys`: item keys; `written`: microseconds since 1970."""

    owners: list[bytes] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    values: list[bytes] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    written: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)

    def append(self, owner: bytes, key: bytes, value: bytes, version: int, written: int) -> None:
        """Add one row."""
        self.owners.append(owner)
        self.keys.append(key)
        self.values.append(value)
        self.versions.append(version)
        self.written.append(written)

    def part(self, low: int, high: int) -> Rows:
        """Rows low .. high-1."""
        cut = slice(low, high)
        return Rows(self.owners[cut], self.keys[cut], self.values[cut], self.versions[cut], self.written[cut])

    def raw_bytes(self) -> int:
        """Bytes of owners, keys and values as they are."""
        return sum(map(len, self.owners)) + sum(map(len, self.keys)) + sum(map(len, self.values))

    def cuts(self, block_rows: int, block_bytes: int) -> Iterator[tuple[int, int]]:
        """Bounds of parts of at most `block_rows` rows and `block_bytes` raw bytes (or one row).

        A part ends between two owners where that leaves it at least half of its bytes: who reads an owner reads one.
        """
        start = size = 0
        owner_at = before_owner = 0  # where the last owner begins, and the bytes of the part before it
        for at in range(len(self)):
            if at and self.owners[at] != self.owners[at - 1]:
                owner_at, before_owner = at, size
            more = len(self.owners[at]) + len(self.keys[at]) + len(self.values[at])
            while at > start and (at - start >= block_rows or size + more > block_bytes):
                between = owner_at > start and 2 * before_owner >= size
                cut, part = (owner_at, before_owner) if between else (at, size)
                yield start, cut
                start, size = cut, size - part
                before_owner = 0
            size += more
        if start < len(self):
            yield start, len(self)


class IndexEntry(NamedTuple):
    """What a file's own index says of one block."""

    bucket: int
    window_start: int
    window_end: int
    generation: int
    rows: int
    offset: int
    length: int
    crc: int


class FileIndex(NamedTuple):
    """What a cold file says of itself."""

    table: bytes
    metadata: dict[str, str]
    blocks: list[IndexEntry]


class FileBuilder:
    """Gathers blocks of one table and one cold group, and makes one file of them.

    `file`: the name that it will have. `per_second`: units of the table's timestamps in a second. The same calls
    give the same bytes.
    """

    def __init__(self, file: str, *, table: bytes, per_second: int, cold_group: int, run: str) -> None:
        self.file = file
        self.entries: list[IndexEntry] = []
        self._batches: list[pa.RecordBatch] = []
        self._schema = SCHEMA.with_metadata(
            {
                _FORMAT: str(FORMAT).encode(),
                _TABLE: table,
                b"timetier.timestamp_per_second": str(per_second).encode(),
                b"timetier.cold_group": str(cold_group).encode(),
                b"timetier.run": run.encode(),
            }
        )
        self.size = _MAGIC_BYTES + len(self._schema.serialize())

    def add(
        self,
        rows: Rows,
        *,
        bucket: int,
        window_start: int,
        window_end: int,
        generation: int,
        block_rows: int,
        block_bytes: int = BLOCK_RAW_BYTES,
    ) -> list[Block]:
        """Add the rows of one window, sorted by (owner, key), as one or more blocks. Returns what a link says of them.

        Raises InvalidRequest when the rows are not sorted, or one of them is too large for a block.
        """
        blocks = []
        for low, high in rows.cuts(block_rows, block_bytes):
            part = rows.part(low, high)
            order = list(zip(part.owners, part.keys, strict=True))
            if any(a >= b for a, b in itertools.pairwise(order)):
                raise InvalidRequest(f"bucket {bucket}: the rows of a block are not sorted by (owner, timestamp, id)")
            batch = _encode(part, self._schema)
            message = _message_of(batch, self._schema)
            if len(message) > MAX_BLOCK_BYTES:
                raise InvalidRequest(f"bucket {bucket}: a block of {len(message)} bytes; make blocks smaller")
            crc = checksum(message)
            self.entries.append(
                IndexEntry(bucket, window_start, window_end, generation, len(part), self.size, len(message), crc)
            )
            self._batches.append(batch)
            block = Block(
                file=self.file,
                offset=self.size,
                length=len(message),
                crc=crc,
                rows=len(part),
                low=min(part.keys),
                high=max(part.keys) + b"\x00",  # the least byte string above it
                first_owner=part.owners[0],
                last_owner=part.owners[-1],
            )
            self.size += len(message)
            blocks.append(block)
        return blocks

    def finish(self) -> bytes:
        """The file. Raises Corrupt if a block did not come out as it was announced."""
        names = list(IndexEntry._fields)
        index = json.dumps({"columns": names, "blocks": self.entries}, separators=(",", ":")).encode()
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, self._schema, options=_write_options(), metadata={_INDEX: index}) as writer:
            for batch in self._batches:
                writer.write_batch(batch)
        data: bytes = sink.getvalue().to_pybytes()
        view = memoryview(data)
        for entry in self.entries:
            verify(bytes(view[entry.offset : entry.offset + entry.length]), entry.crc)
        return data


def _write_options() -> Any:
    return pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)


def _encode(rows: Rows, schema: Any) -> Any:
    timestamps = item_keys_timestamps(rows.keys)
    ids = [key[8:-2] for key in rows.keys]
    if any(b"\x00" in item_id for item_id in ids):
        ids = [item_id.replace(b"\x00\xff", b"\x00") for item_id in ids]
    return pa.record_batch(
        [
            pa.array(rows.owners, pa.binary()),
            pa.array(timestamps, pa.int64()),
            pa.array(ids, pa.binary()),
            pa.array(rows.values, pa.binary()),
            pa.array(rows.versions, pa.int64()),
            pa.array(rows.written, pa.int64()),
        ],
        schema=schema,
    )


def _message_of(batch: Any, schema: Any) -> bytes:
    """The encapsulated IPC message of a batch: the same bytes in a stream and in a file."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema, options=_write_options()) as writer:
        writer.write_batch(batch)
        end = sink.tell()
    data: bytes = sink.getvalue().to_pybytes()[len(schema.serialize()) : end]
    return data


def decode_block(data: bytes, format: int = FORMAT) -> DecodedBlock:
    """Rows of a block's bytes, as a link names them. Raises Corrupt if they are none, whatever their checksum."""
    if format != FORMAT:
        raise Corrupt(f"a block of format {format}; this version reads format {FORMAT}", reason="format")
    try:
        message = pa.ipc.read_message(data)
        if message.type != "record batch":
            raise ValueError(f"a {message.type} message")
        return DecodedBlock(pa.ipc.read_record_batch(message, SCHEMA))
    except (pa.ArrowException, OSError, ValueError, EOFError) as error:
        raise Corrupt(f"{len(data)} bytes are no block: {error}", reason="content") from None


class DecodedBlock:
    """Rows of one block, kept as Arrow columns; only rows that are asked for become Python objects."""

    __slots__ = ("_batch", "_id_at", "_owner_at", "_timestamps", "_value_at", "_versions", "_written", "nbytes", "rows")

    def __init__(self, batch: Any) -> None:
        if batch.num_columns != len(SCHEMA) or any(column.null_count for column in batch.columns):
            raise ValueError("columns are missing or have gaps")
        batch.validate(full=False)
        self.rows: int = batch.num_rows
        self.nbytes: int = batch.nbytes + 2_000  # about what the objects around the buffers take
        self._batch = batch
        owner, timestamp, item_id, value, version, written = batch.columns
        self._owner_at = _Binary(owner)
        self._id_at = _Binary(item_id)
        self._value_at = _Binary(value)
        self._timestamps: npt.NDArray[np.int64] = timestamp.to_numpy(zero_copy_only=True)
        self._versions: npt.NDArray[np.int64] = version.to_numpy(zero_copy_only=True)
        self._written: npt.NDArray[np.int64] = written.to_numpy(zero_copy_only=True)

    def rows_of(
        self, owner: bytes, low: bytes = b"", before: bytes = b"", limit: int = 0
    ) -> tuple[list[bytes], list[bytes], list[int], list[int]]:
        """(keys, values, versions, written) of the owner's items with low <= key < before, *newest first*.

        `before`: b"" = no bound. `limit`: the newest so many, 0 = all.
        """
        first, last = self._span(owner)
        if before:
            last = bisect_left(range(self.rows), before, lo=first, hi=last, key=self._key_at)
        if low:
            first = bisect_left(range(self.rows), low, lo=first, hi=last, key=self._key_at)
        if limit:
            first = max(first, last - limit)
        return (
            self._keys_of(first, last)[::-1],
            self._value_at.part(first, last)[::-1],
            self._versions[first:last][::-1].tolist(),
            self._written[first:last][::-1].tolist(),
        )

    def all_rows(self) -> Rows:
        """All rows, in their order: by owner, then oldest first."""
        return Rows(
            self._owner_at.part(0, self.rows),
            self._keys_of(0, self.rows),
            self._value_at.part(0, self.rows),
            self._versions.tolist(),
            self._written.tolist(),
        )

    def part_of(self, owner: bytes) -> bytes:
        """A block with the owner's rows only, not compressed: bytes for `decode_block`."""
        first, last = self._span(owner)
        data: bytes = self._batch.slice(first, last - first).serialize().to_pybytes()
        return data

    def _span(self, owner: bytes) -> tuple[int, int]:
        """The owner's rows: first, and behind the last."""
        first = bisect_left(range(self.rows), owner, key=self._owner_at)
        return first, bisect_left(range(self.rows), owner + b"\x00", lo=first, key=self._owner_at)

    def _key_at(self, at: int) -> bytes:
        return item_key(int(self._timestamps[at]), self._id_at(at))

    def _keys_of(self, first: int, last: int) -> list[bytes]:
        """Item keys of rows first .. last-1."""
        timestamps = self._timestamps[first:last]
        if self._id_at.has_data(first, last):
            return list(map(item_key, timestamps.tolist(), self._id_at.part(first, last)))
        return item_keys(timestamps)


class _Binary:
    """Elements of an Arrow binary column, one at a time."""

    __slots__ = ("_data", "_offsets")

    def __init__(self, column: Any) -> None:
        _, offsets, data = column.buffers()
        count = len(column) + 1
        self._offsets = np.frombuffer(offsets, dtype="<i4")[column.offset : column.offset + count]
        self._data = memoryview(data if data is not None else b"")
        ends = self._offsets
        if len(ends) != count or ends[0] < 0 or int(ends[-1]) > len(self._data) or bool((ends[1:] < ends[:-1]).any()):
            raise ValueError("the offsets of a column are out of order")

    def __call__(self, at: int) -> bytes:
        return bytes(self._data[self._offsets[at] : self._offsets[at + 1]])

    def has_data(self, first: int, last: int) -> bool:
        """Whether any of the elements first .. last-1 has a byte."""
        return bool(self._offsets[last] > self._offsets[first])

    def part(self, first: int, last: int) -> list[bytes]:
        """Elements first .. last-1."""
        start = self._offsets[first]
        data = bytes(self._data[start : self._offsets[last]])
        ends = (self._offsets[first : last + 1] - start).tolist()
        return [data[low:high] for low, high in itertools.pairwise(ends)]


def read_index(source: Any) -> FileIndex:
    """Index of a cold file. `source`: its path as str, or its bytes. Raises Corrupt if it is none, OSError."""
    try:
        opened = pa.BufferReader(source) if isinstance(source, bytes) else pa.memory_map(source)
        with opened, pa.ipc.open_file(opened) as reader:
            about = dict(reader.schema.metadata or {})
            index = reader.metadata.get(_INDEX) if reader.metadata is not None else None
            batches = reader.num_record_batches
        if about.get(_FORMAT) != str(FORMAT).encode() or index is None:
            raise Corrupt("this Arrow file is no cold file of a format that this version reads", reason="format")
        entries = [IndexEntry(*entry) for entry in msgspec.json.decode(index, type=_IndexBody).blocks]
    except (pa.ArrowException, msgspec.MsgspecError, TypeError, ValueError) as error:
        raise Corrupt(f"this is no cold file: {error}", reason="content") from None
    if len(entries) != batches:
        raise Corrupt(f"the index names {len(entries)} blocks, but the file has {batches}", reason="content")
    return FileIndex(about.get(_TABLE, b""), {k.decode(): v.decode() for k, v in about.items()}, entries)


class _IndexBody(msgspec.Struct):
    blocks: list[tuple[int, int, int, int, int, int, int, int]]
