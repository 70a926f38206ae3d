"""What a backup consists of. docs/backup.md describes it for readers without TimeTier.

    URI/NAME/manifest.json            written last: without it the backup is incomplete, and does not count
    URI/NAME/timelines-00001.arrow    a row for each timeline (or piece of one): version, wiped, request ids
    URI/NAME/items-00001.arrow        the items of these timelines in the storage tier, in the same order
    URI/NAME/cold-files.arrow         the cold files that the links name
    URI/cold/FILE.arrow               cold files as they are, shared by all backups of this folder

Parts are numbered; those of one number belong together. A bucket's own timeline (table and owner empty) comes before
the others of its bucket; its items are the cold links.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Any

import google_crc32c
import msgspec
import pyarrow as pa

from ..errors import Corrupt, InvalidRequest
from ..keys import bucket_of, item_ids, item_key, item_keys_timestamps, split_timeline, timeline_key
from ..messages import DELETE, PUT, TimelineState
from ..paxos.rows import VERSION_BYTES, decode_row, encode_row, version_of
from ..topology import TablePolicy
from .target import Stored

FORMAT = 1
MANIFEST = "manifest.json"
COLD_FOLDER = "cold"
COPIED, REFERENCED = "copied", "referenced"
_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,79}")
_BATCH_ROWS = 16_384

TIMELINES = pa.schema(
    [
        ("bucket", pa.uint32()),
        ("table", pa.string()),
        ("owner", pa.binary()),
        ("version", pa.int64()),
        ("wiped", pa.int64()),
        ("items", pa.int64()),  # rows of it in the items of this part
        ("before", pa.int64()),  # rows of it in earlier parts
        ("more", pa.bool_()),  # it goes on in the next part
        ("request_entries", pa.list_(pa.int64())),
        ("request_ids", pa.list_(pa.list_(pa.binary()))),  # parallel to `request_entries`
    ]
)
ITEMS = pa.schema(
    [
        ("bucket", pa.uint32()),
        ("table", pa.string()),
        ("owner", pa.binary()),
        ("timestamp", pa.int64()),
        ("id", pa.binary()),
        ("deleted", pa.bool_()),
        ("value", pa.binary()),
        ("version", pa.int64()),
        ("written", pa.int64()),
    ]
)
COLD_FILES = pa.schema([("file", pa.string()), ("size", pa.int64()), ("crc32c", pa.uint32()), ("group", pa.int32())])


class Part(msgspec.Struct, frozen=True):
    """Two files that belong together, and what they hold; a timeline that is cut counts where it begins."""

    timelines: Stored
    items: Stored
    timeline_count: int
    item_count: int


class ColdFile(msgspec.Struct, frozen=True):
    """A cold file that links name. `group`: the cold group that it belongs to."""

    name: str
    size: int
    crc: int
    group: int

    def stored_at(self, place: str) -> Stored:
        """The same as a file of a folder of backups."""
        return Stored(place, self.size, self.crc)


class Manifest(msgspec.Struct, frozen=True):
    """Facts of one backup. Times: microseconds since 1970. `cold`: `COPIED` or `REFERENCED`. `tables`,
    `default_table`: policies of the cluster when it was taken. `map_checksum`: of its map from buckets to groups.
    """

    format: int
    name: str
    program: str
    cluster_id: str
    namespace: str
    began_us: int
    ended_us: int
    buckets: int
    map_checksum: str
    storage_groups: int
    storage_replicas: int
    cold_groups: int
    cold_replicas: int
    tables: dict[str, TablePolicy]
    default_table: TablePolicy | None
    cold: str
    parts: list[Part]
    cold_files: Stored
    timelines: int
    items: int
    storage_bytes: int
    cold_file_count: int
    cold_bytes: int

    @property
    def restore_name(self) -> str:
        """By which a cluster knows that it is this very backup that is being restored."""
        return f"{self.name}-{google_crc32c.value(msgspec.json.encode(self)):08x}"


class _Sealed(msgspec.Struct):
    crc32c: int
    backup: msgspec.Raw


def check_backup_name(name: str) -> str:
    """The same name, if a backup may have it. Raises InvalidRequest."""
    if not _NAME.fullmatch(name) or name == COLD_FOLDER:
        raise InvalidRequest(f"name={name!r}: pass 1 to 80 of A-Z a-z 0-9 . _ -, beginning with a letter or digit")
    return name


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest's file."""
    body = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
    return msgspec.json.encode(_Sealed(int(google_crc32c.value(body)), msgspec.Raw(body)))


def decode_manifest(data: bytes, file: str) -> Manifest:
    """Manifest of its file. Raises Corrupt, naming the file; InvalidRequest for a later format."""
    try:
        sealed = msgspec.json.decode(data, type=_Sealed)
        if int(google_crc32c.value(bytes(sealed.backup))) != sealed.crc32c:
            raise Corrupt(f"{file} is damaged: its checksum does not agree")
        version = msgspec.json.decode(sealed.backup, type=_Format).format
        if version > FORMAT:
            raise InvalidRequest(f"{file} has format {version}, this program reads up to {FORMAT}: use a later one")
        return msgspec.json.decode(sealed.backup, type=Manifest)
    except msgspec.MsgspecError as error:
        raise Corrupt(f"{file} is damaged: {error}") from None


class _Format(msgspec.Struct):
    format: int


# ---------------------------------------------------------------- parts


def encode_part(states: Iterable[TimelineState]) -> tuple[bytes, bytes]:
    """(timelines, items) of a part as Arrow files."""
    timelines: dict[str, list[Any]] = {name: [] for name in TIMELINES.names}
    items: dict[str, list[Any]] = {name: [] for name in ITEMS.names}
    for state in states:
        bucket, table_bytes, owner = split_timeline(state.timeline)
        table = table_bytes.decode()
        facts = (bucket, table, owner, state.version, state.wiped, len(state.rows), state.before, state.more)
        entries = [entry for entry, _ in state.request_ids]
        ids = [ids for _, ids in state.request_ids]
        for name, value in zip(TIMELINES.names, (*facts, entries, ids), strict=True):
            timelines[name].append(value)
        keys = [name[:-VERSION_BYTES] for name in state.row_keys]
        rows = [decode_row(row) for row in state.rows]
        count = len(rows)
        columns: tuple[Any, ...] = (
            [bucket] * count,
            [table] * count,
            [owner] * count,
            item_keys_timestamps(keys).tolist() if keys else [],
            item_ids(keys),
            [kind == DELETE for _, kind, _ in rows],
            [value for _, _, value in rows],
            [version_of(name) for name in state.row_keys],
            [written for written, _, _ in rows],
        )
        for name, column in zip(ITEMS.names, columns, strict=True):
            items[name] += column
    return _encode(timelines, TIMELINES), _encode(items, ITEMS)


def decode_part(timelines: bytes, items: bytes, name: str, buckets: int) -> Iterator[TimelineState]:
    """The states of a part. Raises Corrupt, naming it, when the files don't fit each other."""
    rows = _rows(items, name)
    for facts in _records(timelines, TIMELINES, name):
        count = facts["items"]
        key = _key_of(facts["bucket"], facts["table"], facts["owner"], buckets)
        found = list(itertools.islice(rows, count))
        if len(found) != count or any(row[0] != key for row in found) or bucket_of(key) != facts["bucket"]:
            raise Corrupt(f"{name} of the backup is damaged: its items are not those of its timelines")
        ids = list(zip(facts["request_entries"], facts["request_ids"], strict=True))
        yield TimelineState(
            key,
            facts["version"],
            facts["wiped"],
            ids,
            facts["before"],
            facts["more"],
            [row[1] for row in found],
            [row[2] for row in found],
        )
    if next(rows, None) is not None:
        raise Corrupt(f"{name} of the backup is damaged: it has items of no timeline")


def _rows(items: bytes, name: str) -> Iterator[tuple[bytes, bytes, bytes]]:
    """(timeline key but for its bucket's check, item key and version, row) of each item."""
    last: tuple[int, str, bytes] | None = None
    key = b""
    for row in _records(items, ITEMS, name):
        place = row["bucket"], row["table"], row["owner"]
        if place != last:
            last, key = place, _key_of(*place, buckets=0)
        row_key = item_key(row["timestamp"], row["id"]) + row["version"].to_bytes(VERSION_BYTES, "big")
        yield key, row_key, encode_row(row["written"], DELETE if row["deleted"] else PUT, row["value"])


def _key_of(bucket: int, table: str, owner: bytes, buckets: int) -> bytes:
    """Key of a timeline, in the bucket that is told, or where its hash puts it in a cluster of `buckets`."""
    encoded = table.encode()
    if buckets and table:
        return timeline_key(encoded, owner, buckets)
    return bucket.to_bytes(4, "big") + bytes((len(encoded),)) + encoded + bytes((len(owner),)) + owner


# ---------------------------------------------------------------- cold files


def encode_cold_files(files: Iterable[ColdFile]) -> bytes:
    """The list of cold files as an Arrow file."""
    rows = [(file.name, file.size, file.crc, file.group) for file in files]
    columns = zip(*rows, strict=True) if rows else [()] * len(COLD_FILES)
    return _encode({name: list(column) for name, column in zip(COLD_FILES.names, columns, strict=True)}, COLD_FILES)


def decode_cold_files(data: bytes, name: str) -> list[ColdFile]:
    """Cold files of such a list. Raises Corrupt."""
    return [ColdFile(*row.values()) for row in _records(data, COLD_FILES, name)]


# ---------------------------------------------------------------- Arrow


def _encode(columns: dict[str, list[Any]], schema: Any) -> bytes:
    arrays = [pa.array(columns[field.name], field.type) for field in schema]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
        writer.write_table(pa.Table.from_arrays(arrays, schema=schema), max_chunksize=_BATCH_ROWS)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _records(data: bytes, schema: Any, name: str) -> Iterator[dict[str, Any]]:
    """Rows of an Arrow file. Raises Corrupt when it is none, or has other columns."""
    try:
        with pa.ipc.open_file(pa.BufferReader(data)) as reader:
            if not reader.schema.equals(schema):
                raise Corrupt(f"{name} of the backup has other columns than format {FORMAT}")
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
            for batch in batches:
                yield from batch.to_pylist()
    except (pa.ArrowException, ValueError) as error:
        raise Corrupt(f"{name} of the backup is damaged: {error}") from None
