"""Rows of a file as items: owner, timestamp, id and value.

- **owner**: text, bytes or a whole number (its decimal digits), at most 255 bytes.
- **time**: a whole number in the table's unit; an Arrow timestamp or date; or ISO-8601 text. Without a zone it is
  UTC. Finer fractions than the table's unit are cut off, towards the past. Text of digits only is a number.
- **id**: the named columns, joined with the byte 0x1F (unit separator); a missing one is empty.
- **value**: all other columns as one compact JSON object in UTF-8, in the order of the schema (JSON lines: of the
  line). Timestamps become text, bytes base64.

Whole chunks are converted with pyarrow; a row that does not fit is then looked at alone, to say why.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ..cluster.errors import InvalidRequest
from ..cluster.keys import MAX_ID_BYTES, MAX_OWNER_BYTES, MAX_TIMESTAMP, MAX_VALUE_BYTES, MIN_TIMESTAMP
from .rejects import Rejects
from .sources import ColumnChunk, RecordChunk, Source

ID_SEPARATOR = b"\x1f"

_PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_WHOLE_NUMBER = re.compile(r"[+-]?[0-9]{1,20}")
_FRACTION = re.compile(r"[.,]([0-9]+)")
_SHORT_WHOLE_NUMBERS = r"^-?[0-9]{1,18}$"  # those that surely fit in 64 bits

_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True)
class Columns:
    """Which columns make up an item. `id`: none gives the empty id."""

    owner: str
    time: str
    id: tuple[str, ...] = ()

    @property
    def used(self) -> list[str]:
        """All names, in order, each once."""
        return list(dict.fromkeys((self.owner, self.time, *self.id)))


@dataclass(frozen=True)
class Batch:
    """Items that can be written. `rows`: int64[n], the row (for text files: the line) that each comes from."""

    owners: list[bytes]
    timestamps: list[int]
    ids: list[bytes]
    values: list[bytes]
    rows: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.owners)

    @property
    def first_row(self) -> int:
        """Row of the first item."""
        return int(self.rows[0])


class _Unfit(Exception):
    """A row can't become an item. Arguments: the reason, and what only this row has."""


def read_rows(source: Source, columns: Columns, per_second: int, rejects: Rejects) -> Iterator[Batch]:
    """Items of a file, chunk by chunk; rows that can't be items go to `rejects`.

    `per_second`: units of the table's timestamps in a second. Raises InvalidRequest for a column that is not there
    or is of a type that can't serve.
    """
    if source.names is not None:
        _check_names(columns, source.names)
    checked = source.names is not None
    for chunk in source.chunks:
        if isinstance(chunk, ColumnChunk):
            batch = _from_columns(chunk, columns, per_second, rejects)
        else:
            if not checked:
                _check_names(columns, list(dict.fromkeys(name for record in chunk.records for name in record)))
                checked = True
            batch = _from_records(chunk, columns, per_second, rejects)
        if len(batch):
            yield batch


def _check_names(columns: Columns, names: Sequence[str]) -> None:
    for option, wanted in (("owner", [columns.owner]), ("time", [columns.time]), ("id", list(columns.id))):
        for name in wanted:
            if name not in names:
                raise InvalidRequest(f"{option}={name!r} is no column of the file: it has {', '.join(names)}")


# ---------------------------------------------------------------- one row at a time


def time_in_units(value: object, per_second: int) -> int:
    """Timestamp of a number, a date or ISO-8601 text in units of 1/per_second seconds since 1970.

    Raises ValueError.
    """
    if isinstance(value, str):
        text = value.strip()
        value = int(text) if _WHOLE_NUMBER.fullmatch(text) else _parse_iso(text, per_second)
    elif isinstance(value, datetime):
        value = _datetime_in_units(value, per_second)
    elif isinstance(value, date):
        value = (value.toordinal() - _EPOCH.toordinal()) * 86_400 * per_second
    elif isinstance(value, float | Decimal) and value == value // 1:  # false for NaN, and for infinities
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError("neither a whole number nor a date")
    if not MIN_TIMESTAMP <= value <= MAX_TIMESTAMP:
        raise ValueError("does not fit in 64 bits")
    return value


def _datetime_in_units(moment: datetime, per_second: int) -> int:
    since = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - _EPOCH
    return ((since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds) * per_second // 1_000_000


def _parse_iso(text: str, per_second: int) -> int:
    units = _datetime_in_units(datetime.fromisoformat(text), per_second)
    fraction = _FRACTION.search(text)
    if per_second > 1_000_000 and fraction and len(fraction[1]) > 6:  # datetime stops at microseconds
        units += int(fraction[1][6:9].ljust(3, "0")) * per_second // 1_000_000_000
    return units


def _part(value: object, name: str) -> bytes:
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, int) and not isinstance(value, bool):
        return b"%d" % value
    if isinstance(value, bytes):
        return value
    raise _Unfit(f"{name} is neither text, bytes nor a whole number", type(value).__name__)


def _owner(value: object) -> bytes:
    if value is None or value in ("", b""):
        raise _Unfit("owner is missing")
    owner = _part(value, "owner")
    if len(owner) > MAX_OWNER_BYTES:
        raise _Unfit(f"owner is longer than {MAX_OWNER_BYTES} bytes", f"{len(owner)} bytes")
    return owner


def _time(value: object, per_second: int) -> int:
    if value is None or value == "":
        raise _Unfit("time is missing")
    try:
        return time_in_units(value, per_second)
    except (ValueError, OverflowError) as error:
        raise _Unfit("time can't be read", str(error)) from None


def _id(values: Sequence[object]) -> bytes:
    parts = [b"" if value is None else _part(value, "id") for value in values]
    joined = ID_SEPARATOR.join(parts)
    if joined.count(ID_SEPARATOR) >= max(1, len(parts)) and len(parts) > 1:
        raise _Unfit("a part of the id holds the separator byte 0x1F")
    if len(joined) > MAX_ID_BYTES:
        raise _Unfit(f"id is longer than {MAX_ID_BYTES} bytes", f"{len(joined)} bytes")
    return joined


def _value(record: dict[str, Any]) -> bytes:
    if any(_is_not_finite(cell) for cell in record.values()):
        raise _Unfit("a number is not finite", "JSON has no NaN and no infinity")
    try:
        value = _encode(record)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise _Unfit("can't be written as JSON", str(error)) from None
    if len(value) > MAX_VALUE_BYTES:
        raise _Unfit(f"value is longer than {MAX_VALUE_BYTES} bytes", f"{len(value)} bytes")
    return value


def _is_not_finite(cell: object) -> bool:
    if isinstance(cell, float):
        return not math.isfinite(cell)
    if isinstance(cell, dict):
        return any(_is_not_finite(inner) for inner in cell.values())
    if isinstance(cell, list | tuple):
        return any(_is_not_finite(inner) for inner in cell)
    return False


def _from_records(chunk: RecordChunk, columns: Columns, per_second: int, rejects: Rejects) -> Batch:
    owners, timestamps, ids, values, rows = [], [], [], [], []
    used = frozenset(columns.used)
    for row, record in zip(chunk.rows, chunk.records, strict=True):
        try:
            owner = _owner(record.get(columns.owner))
            timestamp = _time(record.get(columns.time), per_second)
            item_id = _id([record.get(name) for name in columns.id])
            value = _value({name: cell for name, cell in record.items() if name not in used})
        except _Unfit as unfit:
            rejects.add(row, unfit.args[0], record, *unfit.args[1:])
            continue
        owners.append(owner)
        timestamps.append(timestamp)
        ids.append(item_id)
        values.append(value)
        rows.append(row)
    return Batch(owners, timestamps, ids, values, np.array(rows, dtype=np.int64))


# ---------------------------------------------------------------- whole columns


def _from_columns(chunk: ColumnChunk, columns: Columns, per_second: int, rejects: Rejects) -> Batch:
    batch = chunk.batch
    owner = _as_bytes(batch.column(columns.owner), columns.owner)
    lengths = pc.fill_null(pc.binary_length(owner), 0).to_numpy(zero_copy_only=False)
    suspect = (lengths == 0) | (lengths > MAX_OWNER_BYTES)
    timestamps, bad_times = _times(batch.column(columns.time), columns.time, per_second)
    suspect |= bad_times
    ids, bad_ids = _ids(batch, columns)
    suspect |= bad_ids
    value_names = [name for name in batch.schema.names if name not in columns.used]
    values, bad_values = _values(batch, value_names)
    suspect |= bad_values
    owners = owner.to_pylist()
    if not suspect.any():
        return Batch(owners, timestamps.tolist(), ids, values, chunk.rows)
    for at in np.flatnonzero(suspect).tolist():
        _reject(chunk, at, columns, value_names, per_second, rejects)
    keep = np.flatnonzero(~suspect).tolist()
    return Batch(
        [owners[at] for at in keep],
        timestamps[keep].tolist(),
        [ids[at] for at in keep],
        [values[at] for at in keep],
        chunk.rows[keep],
    )


def _reject(
    chunk: ColumnChunk, at: int, columns: Columns, value_names: list[str], per_second: int, rejects: Rejects
) -> None:
    """Find out what is wrong with one row, by the rules for single rows."""
    record = {name: _cell(chunk.batch.column(name), at) for name in chunk.batch.schema.names}
    try:
        _owner(record[columns.owner])
        _time(record[columns.time], per_second)
        _id([record[name] for name in columns.id])
        for name in value_names:
            if isinstance(record[name], _Unreadable):
                raise _Unfit("a column can't be read", f"{name}: {record[name]}")
        _value({name: record[name] for name in value_names})
        reason, *detail = "time can't be read", "does not fit in 64 bits in the table's unit"
    except _Unfit as unfit:
        reason, *detail = unfit.args
    rejects.add(int(chunk.rows[at]), reason, record, *detail)


class _Unreadable(str):
    """Text that stands for a cell which Python can't hold, such as a string that is not UTF-8."""


def _cell(array: pa.Array, at: int) -> Any:
    array = _plain(array.slice(at, 1))
    try:
        return array[0].as_py()
    except (ValueError, OverflowError) as error:
        return _Unreadable(error)


def _cells(array: pa.Array) -> list[Any]:
    try:
        cells: list[Any] = array.to_pylist()
    except (ValueError, OverflowError):  # one cell spoils it: find out which
        cells = [_cell(array, at) for at in range(len(array))]
    return cells


def _plain(array: pa.Array) -> pa.Array:
    """The array without dictionary encoding, and with timestamps as text where Python could not hold them."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if pa.types.is_timestamp(array.type):
        zone = "UTC" if array.type.tz else None  # the same instants; named zones would need a time zone database
        array = array.cast(pa.timestamp(array.type.unit, zone)).cast(pa.string())
    return array


def _as_bytes(array: pa.Array, name: str) -> pa.Array:
    """Text, bytes or whole numbers as a binary array."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        return _as_bytes(array.dictionary_decode(), name)
    if pa.types.is_integer(kind):
        return array.cast(pa.string()).cast(pa.binary())
    if pa.types.is_null(kind) or any(is_kind(kind) for is_kind in _BYTES_KINDS):
        return array.cast(pa.binary())
    raise InvalidRequest(f"column {name!r} is of type {kind}: owners and ids are text, bytes or whole numbers")


_BYTES_KINDS: list[Callable[[pa.DataType], bool]] = [
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_binary_view,
    pa.types.is_fixed_size_binary,
]


def _ids(batch: pa.RecordBatch, columns: Columns) -> tuple[list[bytes], npt.NDArray[np.bool_]]:
    """Ids of a chunk, and which are not fit."""
    if not columns.id:
        return [b""] * batch.num_rows, np.zeros(batch.num_rows, dtype=bool)
    parts = [_as_bytes(batch.column(name), name) for name in columns.id]
    bad = np.zeros(batch.num_rows, dtype=bool)
    if len(parts) > 1:
        joined = pc.binary_join_element_wise(*parts, ID_SEPARATOR, null_handling="replace", null_replacement=b"")
        bad = pc.count_substring(joined, ID_SEPARATOR).to_numpy(zero_copy_only=False) >= len(parts)
    else:
        joined = pc.fill_null(parts[0], b"")
    bad = bad | (pc.binary_length(joined).to_numpy(zero_copy_only=False) > MAX_ID_BYTES)
    return joined.to_pylist(), bad


def _times(array: pa.Array, name: str, per_second: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Timestamps of a chunk in the table's unit, and which could not be read."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        return _times(array.dictionary_decode(), name, per_second)
    if pa.types.is_timestamp(kind):
        return _rescaled(array.cast(pa.int64()), _PER_SECOND[kind.unit], per_second)
    if pa.types.is_date32(kind):
        return _rescaled(pc.multiply(array.cast(pa.int32()).cast(pa.int64()), 86_400), 1, per_second)
    if pa.types.is_date64(kind):
        return _rescaled(array.cast(pa.int64()), 1_000, per_second)
    if pa.types.is_integer(kind) and not pa.types.is_uint64(kind):
        return _rescaled(array.cast(pa.int64()), 1, 1)
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    if is_text and array.null_count == 0:
        text = array.cast(pa.string())
        if pc.all(pc.match_substring_regex(text, _SHORT_WHOLE_NUMBERS), min_count=0).as_py():
            return _rescaled(text.cast(pa.int64()), 1, 1)
    if not (is_text or any(is_kind(kind) for is_kind in _SINGLE_TIME_KINDS)):
        raise InvalidRequest(
            f"column {name!r} is of type {kind}: times are whole numbers in the table's unit, timestamps, dates or "
            "ISO-8601 text"
        )
    timestamps = np.zeros(len(array), dtype=np.int64)
    bad = np.zeros(len(array), dtype=bool)
    for at, cell in enumerate(_cells(array)):
        try:
            timestamps[at] = _time(cell, per_second)
        except _Unfit:
            bad[at] = True
    return timestamps, bad


_SINGLE_TIME_KINDS: list[Callable[[pa.DataType], bool]] = [
    pa.types.is_null,
    pa.types.is_uint64,
    pa.types.is_floating,
    pa.types.is_decimal,
]


def _rescaled(array: pa.Array, from_per_second: int, to_per_second: int) -> tuple[Any, Any]:
    """int64 counts of 1/from_per_second seconds as counts of 1/to_per_second ones, and which do not fit or are null."""
    bad = array.is_null().to_numpy(zero_copy_only=False)
    counts = pc.fill_null(array, 0).to_numpy(zero_copy_only=False)
    if to_per_second < from_per_second:
        return counts // (from_per_second // to_per_second), bad
    factor = to_per_second // from_per_second
    if factor > 1:
        bad = bad | (counts > MAX_TIMESTAMP // factor) | (counts < -(MAX_TIMESTAMP // factor))
        counts = np.where(bad, 0, counts) * factor
    return counts, bad


def _values(batch: pa.RecordBatch, names: list[str]) -> tuple[list[bytes], npt.NDArray[np.bool_]]:
    """Values of a chunk, b"" where one can't be made, and which those are."""
    bad = np.zeros(batch.num_rows, dtype=bool)
    if not names:
        return [b"{}"] * batch.num_rows, bad
    arrays = [_plain(batch.column(name)) for name in names]
    for array in arrays:
        if pa.types.is_floating(array.type):
            bad |= ~pc.fill_null(pc.is_finite(array), True).to_numpy(zero_copy_only=False)
    nested = any(pa.types.is_nested(array.type) for array in arrays)
    try:
        cells = zip(*[array.to_pylist() for array in arrays], strict=True)
        records = [dict(zip(names, row, strict=True)) for row in cells]
        values = [_value(record) for record in records] if nested else [_encode(record) for record in records]
    except (_Unfit, ValueError, TypeError, OverflowError, RecursionError):
        return _values_singly(arrays, names)
    bad |= np.fromiter(map(len, values), dtype=np.int64, count=len(values)) > MAX_VALUE_BYTES
    return values, bad


def _values_singly(arrays: list[pa.Array], names: list[str]) -> tuple[list[bytes], npt.NDArray[np.bool_]]:
    values = []
    bad = np.zeros(len(arrays[0]), dtype=bool)
    for at in range(len(arrays[0])):
        record = {name: _cell(array, at) for name, array in zip(names, arrays, strict=True)}
        try:
            if any(isinstance(cell, _Unreadable) for cell in record.values()):
                raise _Unfit("a column can't be read")
            values.append(_value(record))
        except _Unfit:
            values.append(b"")
            bad[at] = True
    return values, bad
