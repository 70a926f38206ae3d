"""Rows on their way into blocks: where they are cut, and how they become Arrow columns (*pure*).

All of it works on whole columns, since what the sink does for each row in Python is what limits its speed.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from operator import lt
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

_TIMESTAMP_BYTES = 8  # of an item key: the timestamp at its head,
_END_BYTES = 2  # and what ends the id (see `keys.py`)


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

    def extend(self, other: Rows) -> None:
        """Add all rows of `other`."""
        self.owners += other.owners
        self.keys += other.keys
        self.values += other.values
        self.versions += other.versions
        self.written += other.written

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
        count = len(self)
        ends = np.zeros(count + 1, dtype=np.int64)  # bytes of all rows before each
        np.cumsum(_lengths(self.owners) + _lengths(self.keys) + _lengths(self.values), out=ends[1:])
        start = 0
        while start < count:
            size = int(ends[start])
            fits = int(np.searchsorted(ends, size + block_bytes, side="right")) - 1
            cut = min(max(fits, start + 1), start + block_rows)
            if cut >= count:
                yield start, count
                return
            owner_at = bisect_left(self.owners, self.owners[cut], lo=start, hi=cut)
            if owner_at > start and 2 * (int(ends[owner_at]) - size) >= int(ends[cut]) - size:
                cut = owner_at
            yield start, cut
            start = cut


def _lengths(column: list[bytes]) -> npt.NDArray[np.int64]:
    return np.fromiter(map(len, column), dtype=np.int64, count=len(column))


def batch_of(rows: Rows, schema: pa.Schema) -> pa.RecordBatch:
    """The rows of one block, at least one, as columns. Raises ValueError unless sorted by (owner, key)."""
    places = zip(rows.owners, rows.keys, strict=True)
    following = zip(islice(rows.owners, 1, None), islice(rows.keys, 1, None), strict=True)
    if not all(map(lt, places, following)):
        raise ValueError("the rows of a block are not sorted by (owner, timestamp, id)")
    keys = pa.array(rows.keys, pa.binary())
    columns = [
        pa.array(rows.owners, pa.binary()),
        _timestamps(keys),
        _ids(keys),
        pa.array(rows.values, pa.binary()),
        pa.array(rows.versions, pa.int64()),
        pa.array(rows.written, pa.int64()),
    ]
    return pa.record_batch(columns, schema=schema)


def _timestamps(keys: Any) -> Any:
    heads = pc.binary_slice(keys, 0, _TIMESTAMP_BYTES)
    raw = np.frombuffer(heads.buffers()[2], dtype=">u8", count=len(keys)).astype(np.uint64)
    return pa.array((raw ^ np.uint64(1 << 63)).view(np.int64))


def _ids(keys: Any) -> Any:
    ids = pc.binary_slice(keys, _TIMESTAMP_BYTES, -_END_BYTES)
    data = ids.buffers()[2]
    if data is not None and b"\x00" in data.to_pybytes():
        return pc.replace_substring(ids, b"\x00\xff", b"\x00")
    return ids
