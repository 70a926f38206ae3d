"""Cold data as a `pyarrow.dataset`: whatever reads Arrow datasets reads the live rows of a table, and those alone.

A dataset is a list of fragments (`live.py`), each of which looks like an Arrow IPC file in a file system of our own.
A file comes into being when it is opened: the fragment's blocks are read and checked, and put together as they are;
only a block with hidden rows is decoded, filtered and encoded again. Each fragment is known to lie between two
timestamps, so a filter on `timestamp` opens those alone that it needs.

What is in memory at a time: a fragment of some 4 MiB of encoded blocks for each file that Arrow has open, which are a
few (`fragment_readahead`, 4 by default), as many that it has opened to see their columns and will open again, and the
batches that it has decoded ahead.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.fs as fs

from ..errors import InvalidRequest
from ..topology import TablePolicy
from .block import SCHEMA, decode_block
from .ipc_file import head_of, message_of, tail_of
from .live import Fragment, LiveBlock, visible_rows

_UNITS = {1: "s", 1_000: "ms", 1_000_000: "us", 1_000_000_000: "ns"}
_PLAIN = pa.ipc.IpcWriteOptions(use_threads=False)

_SEEN_FILES = 4  # Arrow opens a file to see its columns, and soon again to read it

ReadBlocks = Callable[[Sequence[LiveBlock]], list[bytes]]


class Shape:
    """Columns that a dataset has.

    `text`: `owner` is a string, which all owners must be. `times`: `timestamp` and `written` are Arrow timestamps
    (UTC), which takes a table whose timestamps count seconds, milli-, micro- or nanoseconds.
    """

    def __init__(self, policy: TablePolicy, *, text: bool, times: bool) -> None:
        """Raises InvalidRequest."""
        unit = _UNITS.get(policy.per_second)
        if times and unit is None:
            raise InvalidRequest(
                f"times=True: {policy.per_second} units of this table's timestamps make a second; "
                "Arrow has seconds, milli-, micro- and nanoseconds"
            )
        types: dict[str, pa.DataType] = {"owner": pa.string()} if text else {}
        if times:
            types |= {"timestamp": pa.timestamp(unit, tz="UTC"), "written": pa.timestamp("us", tz="UTC")}
        self.schema = pa.schema([(field.name, types.get(field.name, field.type)) for field in SCHEMA])
        self._text = text

    def between(self, oldest: int, newest: int) -> ds.Expression:
        """That the timestamp lies within bounds."""
        kind = self.schema.field("timestamp").type
        low, high = pa.scalar(oldest, pa.int64()).cast(kind), pa.scalar(newest, pa.int64()).cast(kind)
        return (pc.field("timestamp") >= low) & (pc.field("timestamp") <= high)

    def message(self, block: LiveBlock, data: bytes) -> bytes:
        """A record batch with the visible rows of a block, b"" without any. Raises Corrupt, InvalidRequest."""
        if block.is_whole and not self._text:
            return data  # the columns' types differ in name only, their bytes are the same
        batch = visible_rows(decode_block(data, block.format).batch, block)
        if not batch.num_rows:
            return b""
        if self._text:
            _check_text(batch.column("owner"))
        if batch.num_rows == block.rows:
            return data
        return message_of(batch, _PLAIN)


def _check_text(owners: pa.Array) -> None:
    try:
        owners.cast(pa.string())
    except pa.ArrowInvalid:
        bad = next(owner for owner in owners.to_pylist() if not _is_text(owner))
        raise InvalidRequest(f"text=True, but owner {bad!r} is no UTF-8: leave `text` out") from None


def _is_text(owner: bytes) -> bool:
    try:
        owner.decode()
    except UnicodeDecodeError:
        return False
    return True


def fragment_file(fragment: Fragment, shape: Shape, read: ReadBlocks) -> pa.Buffer:
    """The live rows of a fragment as an Arrow IPC file. Raises Unavailable, Corrupt, InvalidRequest."""
    blocks = fragment.blocks()
    parts = zip(blocks, read(blocks), strict=True)
    messages = [message for block, data in parts if (message := shape.message(block, data))]
    return pa.py_buffer(b"".join([head_of(shape.schema), *messages, tail_of(shape.schema, messages, {})]))


def open_dataset(name: str, fragments: Sequence[Fragment], shape: Shape, read: ReadBlocks) -> ds.Dataset:
    """A dataset of the live rows of these fragments. `name`: of the table."""
    handler = _Handler(name, fragments, shape, read)
    filesystem = fs.PyFileSystem(handler)
    kind = ds.IpcFileFormat()
    made = [
        kind.make_fragment(
            handler.path(at),
            filesystem=filesystem,
            partition_expression=shape.between(fragment.oldest, fragment.newest),
        )
        for at, fragment in enumerate(fragments)
    ]
    return ds.FileSystemDataset(made, shape.schema, kind, filesystem=filesystem)


class _Handler(fs.FileSystemHandler):  # type: ignore[misc]  # pyarrow is untyped
    """A file system with a file for each fragment, which is made when it is opened."""

    def __init__(self, name: str, fragments: Sequence[Fragment], shape: Shape, read: ReadBlocks) -> None:
        self._name = name
        self._fragments = fragments
        self._shape = shape
        self._read = read
        self._lock = threading.Lock()
        self._seen: OrderedDict[int, pa.Buffer] = OrderedDict()  # files that were opened once

    def path(self, at: int) -> str:
        return f"{self._name}/{at:07d}.arrow"

    def open_input_file(self, path: str) -> pa.NativeFile:
        at = self._number(path)
        if at < 0:
            raise FileNotFoundError(path)
        with self._lock:
            data = self._seen.pop(at, None)
        if data is None:
            data = fragment_file(self._fragments[at], self._shape, self._read)
            with self._lock:
                self._seen[at] = data
                while len(self._seen) > _SEEN_FILES:
                    self._seen.popitem(last=False)
        return pa.BufferReader(data)

    def open_input_stream(self, path: str) -> pa.NativeFile:
        return self.open_input_file(path)

    def get_file_info(self, paths: list[str]) -> list[fs.FileInfo]:
        kinds = [fs.FileType.File if self._number(path) >= 0 else fs.FileType.NotFound for path in paths]
        return [fs.FileInfo(path, kind) for path, kind in zip(paths, kinds, strict=True)]

    def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        if selector.base_dir.strip("/") not in ("", self._name):
            return []
        return self.get_file_info([self.path(at) for at in range(len(self._fragments))])

    def get_type_name(self) -> str:
        return "timetier-cold"

    def normalize_path(self, path: str) -> str:
        return path

    def __eq__(self, other: object) -> bool:
        return self is other

    def __ne__(self, other: object) -> bool:
        return self is not other

    __hash__ = object.__hash__

    def __reduce__(self) -> Any:
        raise InvalidRequest(
            "a cold dataset reads through the connection of this process: take it where it is read, "
            "or use cold_ray_dataset()"
        )

    def _number(self, path: str) -> int:
        folder, _, file = path.rpartition("/")
        stem = file.removesuffix(".arrow")
        if folder != self._name or not stem.isdigit() or int(stem) >= len(self._fragments):
            return -1
        return int(stem)

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise InvalidRequest("cold data is read-only: write through the table")

    create_dir = delete_dir = delete_dir_contents = delete_root_dir_contents = delete_file = _refuse
    move = copy_file = open_output_stream = open_append_stream = _refuse
