"""The format of cold files: blocks of rows in plain Arrow.

A cold file is an Arrow IPC *file* with zstd buffers: whatever reads Arrow reads it in place. It holds rows of
one table and one cold group. Each record batch is a *block*: rows of one bucket and one window, sorted by
(owner, timestamp, id), which a link names by offset, length and CRC32C. So a reader of one timeline needs one
positioned read, and neither the file's head nor its footer: the columns are the same in every file of a format.

The file explains itself. The schema's metadata says format, table, cold group, run, file and the timestamps' unit. The
footer's metadata has the index, a JSON object: `blocks` is a list of [bucket, window_start, window_end, generation,
rows, offset, length, crc32c], in the order of the record batches. With it a file can be verified, and its owners
found, without any link: the index ends with the checksums of what lies before and behind the blocks (`pieces.py`), and
the schema's metadata names the file, so that a file under another's name is noticed.

A block is encoded once, when it is added (`ipc_file.py`). A reader takes buffers in whatever way Arrow compresses
them, or not at all: each batch says which.
"""

from __future__ import annotations

import itertools
import json
from bisect import bisect_left
from typing import Any, NamedTuple

import google_crc32c
import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..errors import Corrupt, InvalidRequest
from ..keys import item_key, item_keys
from .ipc_file import head_of, message_of, tail_of
from .link import FORMAT, Block
from .rows import Rows, batch_of

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
BLOCK_RAW_BYTES = 256 << 10  # rows of a block before encoding: for a reader of one row all of them are decoded

_SCHEMA_MESSAGE: bytes = SCHEMA.serialize().to_pybytes()
_READ_OPTIONS = pa.ipc.IpcReadOptions(use_threads=False)
_INDEX = b"timetier.index"
_FORMAT = b"timetier.format"
_TABLE = b"timetier.table"
_FILE = b"timetier.file"
_SEAL = ',"head":"%08x","tail":"%08x"}'  # the end of the index: checksums of the head and of the tail


def checksum(data: bytes | memoryview) -> int:
    """CRC32C."""
    return int(google_crc32c.value(bytes(data)))


def verify(data: bytes, crc: int) -> None:
    """Raise Corrupt unless the CRC32C of `data` is `crc`."""
    found = checksum(data)
    if found != crc:
        raise Corrupt(f"{len(data)} bytes have checksum {found:08x}, not {crc:08x}", reason="checksum")


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
        self._messages: list[bytes] = []
        self._schema = SCHEMA.with_metadata(
            {
                _FORMAT: str(FORMAT).encode(),
                _TABLE: table,
                b"timetier.timestamp_per_second": str(per_second).encode(),
                b"timetier.cold_group": str(cold_group).encode(),
                b"timetier.run": run.encode(),
                _FILE: file.encode(),
            }
        )
        self.size = len(head_of(self._schema))

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
            try:
                batch = batch_of(part, self._schema)
            except ValueError as error:
                raise InvalidRequest(f"bucket {bucket}: {error}") from None
            message = message_of(batch)
            if len(message) > MAX_BLOCK_BYTES:
                raise InvalidRequest(f"bucket {bucket}: a block of {len(message)} bytes; make blocks smaller")
            crc = checksum(message)
            self.entries.append(
                IndexEntry(bucket, window_start, window_end, generation, len(part), self.size, len(message), crc)
            )
            self._messages.append(message)
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

    def add_encoded(
        self, message: bytes, block: Block, *, bucket: int, window_start: int, window_end: int, generation: int
    ) -> Block:
        """Add a block of another file of this format as it is. Returns what a link says of it."""
        entry = IndexEntry(bucket, window_start, window_end, generation, block.rows, self.size, len(message), block.crc)
        self.entries.append(entry)
        self._messages.append(message)
        self.size += len(message)
        return msgspec.structs.replace(block, file=self.file, offset=entry.offset)

    def finish(self) -> bytes:
        """The file. Raises Corrupt if Arrow can't read it."""
        names = list(IndexEntry._fields)
        body = json.dumps({"columns": names, "blocks": self.entries}, separators=(",", ":"))
        index = (body.removesuffix("}") + _SEAL % (0, 0)).encode()
        tail = tail_of(self._schema, self._messages, {_INDEX: index})
        data = b"".join([head_of(self._schema), *self._messages, self._seal(tail, index)])
        if read_index(data).blocks != self.entries:
            raise Corrupt(f"{self.file} was not written as it was meant", reason="content")
        return data

    def _seal(self, tail: bytes, index: bytes) -> bytes:
        """The tail with the checksums of the file's head and of itself in the index (see `pieces.py`)."""
        end = tail.rindex(index) + len(index)
        start = end - len(_SEAL % (0, 0))
        head = checksum(head_of(self._schema)) if self.entries else 0
        crc = checksum(tail[:start] + (_SEAL % (head, 0)).encode() + tail[end:])
        return tail[:start] + (_SEAL % (head, crc)).encode() + tail[end:]


def decode_block(data: bytes, format: int = FORMAT) -> DecodedBlock:
    """Rows of a block's bytes, as a link names them. Raises Corrupt if they are none, whatever their checksum."""
    if format != FORMAT:
        raise Corrupt(f"a block of format {format}; this version reads format {FORMAT}", reason="format")
    try:
        # By one thread: to hand the buffers of a block to several costs more than it gains.
        with pa.ipc.open_stream(pa.BufferReader(_SCHEMA_MESSAGE + data), options=_READ_OPTIONS) as reader:
            return DecodedBlock(reader.read_next_batch())
    except (pa.ArrowException, OSError, ValueError, EOFError, StopIteration) as error:
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
        self._timestamps = _int64s(timestamp)
        self._versions = _int64s(version)
        self._written = _int64s(written)

    @property
    def batch(self) -> Any:
        """The rows as an Arrow record batch with the columns of SCHEMA, by owner, timestamp and id."""
        return self._batch

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


def _int64s(column: Any) -> npt.NDArray[np.int64]:
    """The numbers of a column, not copied. Arrow's `to_numpy` would import pandas first: a fifth of a second."""
    _, data = column.buffers()
    if data is None:
        return np.empty(0, dtype=np.int64)
    return np.frombuffer(data, dtype="<i8")[column.offset : column.offset + len(column)]


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
    """Index of a cold file. `source`: its path as str, its bytes, or an object with Python's methods of a file.

    Raises Corrupt if it is none, OSError.
    """
    try:
        opened = pa.BufferReader(source) if isinstance(source, bytes) else _open_arrow(source)
        with opened, pa.ipc.open_file(opened) as reader:
            about = dict(reader.schema.metadata or {})
            index = reader.metadata.get(_INDEX) if reader.metadata is not None else None
            batches = reader.num_record_batches
        if about.get(_FORMAT) != str(FORMAT).encode() or index is None:
            raise Corrupt("this Arrow file is no cold file of a format that this version reads", reason="format")
        entries = [IndexEntry(*entry) for entry in msgspec.json.decode(index, type=_IndexBody).blocks]
        metadata = {key.decode(): value.decode() for key, value in about.items()}
    except (pa.ArrowException, msgspec.MsgspecError, TypeError, ValueError) as error:
        raise Corrupt(f"this is no cold file: {error}", reason="content") from None
    except OSError as error:
        if error.errno is None:  # Arrow's word for a footer that makes no sense
            raise Corrupt(f"this is no cold file: {error}", reason="content") from None
        raise
    if len(entries) != batches:
        raise Corrupt(f"the index names {len(entries)} blocks, but the file has {batches}", reason="content")
    return FileIndex(about.get(_TABLE, b""), metadata, entries)


def _open_arrow(source: Any) -> Any:
    return pa.memory_map(source) if isinstance(source, str) else pa.PythonFile(source, "r")


class _IndexBody(msgspec.Struct):
    blocks: list[tuple[int, int, int, int, int, int, int, int]]
