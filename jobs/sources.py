"""Files of timelines as a stream of chunks: Parquet, Arrow IPC (file and stream), CSV and JSON lines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from ..cluster.errors import InvalidRequest
from .rejects import Rejects
from .text_files import read_csv, read_json_lines

Format = Literal["parquet", "arrow", "csv", "tsv", "jsonl"]

CHUNK_ROWS = 8_192
CHUNK_BYTES = 16 << 20
_READ_BUFFER_BYTES = 1 << 20

_SUFFIXES: dict[str, Format] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".arrows": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
}


@dataclass(frozen=True)
class ColumnChunk:
    """Rows as Arrow columns. `rows`: int64[n], the number (for text files: the line) of each row in the file."""

    batch: pa.RecordBatch
    rows: npt.NDArray[np.int64]


@dataclass(frozen=True)
class RecordChunk:
    """Rows as JSON objects. `rows`: the line of each in the file."""

    records: list[dict[str, Any]]
    rows: list[int]


@dataclass(frozen=True)
class Source:
    """An open file. `names`: its columns, or None when each row names its own. `total`: its rows, if known."""

    names: list[str] | None
    total: int | None
    chunks: Iterator[ColumnChunk | RecordChunk]


def file_format(path: Path, given: str | None) -> Format:
    """Format of a file, by its suffix unless it is given. Raises InvalidRequest."""
    known = get_args(Format)
    if given is not None:
        if given not in known:
            raise InvalidRequest(f"format={given!r} is not known: write one of {', '.join(known)}")
        return given  # type: ignore[return-value]  # checked on the line above
    found = _SUFFIXES.get(path.suffix.lower())
    if found is None:
        raise InvalidRequest(
            f"{path}: the suffix {path.suffix!r} does not tell the format: name it with --format, "
            f"one of {', '.join(known)}"
        )
    return found


def open_source(path: Path, rejects: Rejects, given_format: str | None = None) -> Source:
    """Open a file. Rows that can't be parsed go to `rejects`.

    Raises InvalidRequest, here or from the chunks, when the file as a whole can't be read.
    """
    kind = file_format(path, given_format)
    if not path.is_file():
        raise InvalidRequest(f"{path} is no file: name an existing one")
    try:
        if kind == "parquet":
            source = _open_parquet(path)
        elif kind == "arrow":
            source = _open_arrow(path)
        elif kind == "jsonl":
            records = read_json_lines(path, rejects)
            return Source(None, None, (RecordChunk(chunk, rows) for chunk, rows in records))
        else:
            names, columns = read_csv(path, rejects, "\t" if kind == "tsv" else ",")
            source = Source(names, None, _from_text(names, columns))
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, kind, error) from None
    repeated = sorted({name for name in source.names or [] if (source.names or []).count(name) > 1})
    if repeated:
        raise InvalidRequest(f"{path}: more than one column is named {repeated[0]!r}: give each its own name")
    return Source(source.names, source.total, _explain(path, kind, source.chunks))


def _unreadable(path: Path, kind: str, error: Exception) -> InvalidRequest:
    text = " ".join(str(error).split())
    return InvalidRequest(f"{path} can't be read as {kind}: {text}; is it whole, and is its format right (--format)?")


def _explain(path: Path, kind: str, chunks: Iterator[ColumnChunk | RecordChunk]) -> Iterator[ColumnChunk | RecordChunk]:
    try:
        yield from chunks
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, kind, error) from None


def _open_parquet(path: Path) -> Source:
    # Without pre-buffering, and with a buffer per column, a row group of any size is read piece by piece.
    file = pa.parquet.ParquetFile(path, buffer_size=_READ_BUFFER_BYTES, pre_buffer=False)
    groups = [file.metadata.row_group(group) for group in range(file.metadata.num_row_groups)]
    row_bytes = max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=1)
    rows = max(16, min(CHUNK_ROWS, CHUNK_BYTES // max(1, row_bytes)))

    def batches() -> Iterator[pa.RecordBatch]:
        with closing(file):
            yield from file.iter_batches(batch_size=rows, use_threads=False)

    return Source(file.schema_arrow.names, file.metadata.num_rows, _numbered(batches()))


def _open_arrow(path: Path) -> Source:
    opened = pa.memory_map(str(path)) if path.stat().st_size else pa.OSFile(str(path))
    try:
        is_file = opened.read(6) == b"ARROW1"
        opened.seek(0)
        reader = pa.ipc.open_file(opened) if is_file else pa.ipc.open_stream(opened)
    except BaseException:
        opened.close()
        raise

    def batches() -> Iterator[pa.RecordBatch]:
        with closing(opened):
            if is_file:
                yield from (reader.get_batch(index) for index in range(reader.num_record_batches))
            else:
                yield from reader

    return Source(reader.schema.names, None, _numbered(batches()))


def _numbered(batches: Iterator[pa.RecordBatch]) -> Iterator[ColumnChunk]:
    """Chunks of bounded size with row numbers from 1."""
    row = 1
    for batch in batches:
        if not batch.num_rows:
            continue
        rows = max(16, min(CHUNK_ROWS, CHUNK_BYTES * batch.num_rows // max(1, batch.nbytes)))
        for start in range(0, batch.num_rows, rows):
            piece = batch.slice(start, rows)
            yield ColumnChunk(piece, np.arange(row, row + piece.num_rows, dtype=np.int64))
            row += piece.num_rows


def _from_text(names: list[str], chunks: Iterator[tuple[list[Any], list[int]]]) -> Iterator[ColumnChunk]:
    for columns, rows in chunks:
        arrays = [pa.array(column, pa.string()) for column in columns]
        yield ColumnChunk(pa.RecordBatch.from_arrays(arrays, names), np.array(rows, dtype=np.int64))
