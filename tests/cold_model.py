"""Helpers for the tests of the cold tier: a storage tier small enough to be looked through, and what it must hold.

`StorageModel` answers the sink's messages as a storage group would, strongly consistent, from plain dicts, and evicts
by the rules of the links that are written to it. `visible` is what readers must find: hot rows and blocks, merged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from random import Random

from timetier.cluster.client.view import ClientSettings, View
from timetier.cluster.cold.block import DecodedBlock, FileBuilder
from timetier.cluster.cold.link import Block, Link, decode_link, evict_up_to
from timetier.cluster.cold.pieces import read_anatomy
from timetier.cluster.cold.rows import Rows
from timetier.cluster.cold.sink_calls import horizon_key, is_record
from timetier.cluster.keys import (
    MIN_TIMESTAMP,
    bucket_of,
    bucket_prefix,
    is_internal,
    is_system,
    item_key,
    split_item_key,
    split_timeline,
    system_timeline,
    timeline_hash,
    timeline_key,
    timestamp_floor,
)
from timetier.cluster.messages import (
    CONFLICT,
    DELETE,
    OK,
    POINT,
    PUT,
    RANGE,
    WIPE,
    AskVersions,
    Check,
    Checked,
    FoundItems,
    Message,
    Open,
    ReadItems,
    Scan,
    Scanned,
    Settle,
    Settled,
    Versions,
    Write,
    Written,
    pack_i64,
    pack_u32,
    unpack_i64,
    unpack_u32,
)
from timetier.cluster.packed_items import Item
from timetier.cluster.topology import TablePolicy, Topology

POLICY = TablePolicy(per_second=1, cold_after=100, window=50)
TABLE = b"t"
BUCKETS = 128
BUCKETS_PER_ANSWER = 3


def topology(*, groups: int = 1, disks: int = 2) -> Topology:
    """A cluster of `groups` storage groups and as many cold groups."""
    return Topology(
        cluster_id="c",
        namespace="n",
        epoch=1,
        buckets=BUCKETS,
        storage_groups=groups,
        storage_replicas=3,
        cold_groups=groups,
        cold_replicas=3,
        cold_disks=disks,
        cache_nodes=0,
        tables={"t": POLICY},
        default_table=None,
        addresses={},
        secret="00",
    )


def view_of(shape: Topology, seed: int) -> View:
    """A client's view whose clock stands still unless it is looked at."""
    ticks = iter(range(1 << 40))
    return View(shape, now=lambda: next(ticks) * 1e-4, random=Random(seed), settings=ClientSettings())


def cold_file(file: str = "a.arrow", owners: int = 9, each: int = 40, bucket: int = 1) -> bytes:
    """A file of some blocks of one bucket."""
    rows = Rows()
    for owner in range(owners):
        for at in range(each):
            rows.append(b"owner-%03d" % owner, item_key(at), b"value %d" % at, at + 1, at * 1_000)
    builder = FileBuilder(file, table=TABLE, per_second=1, cold_group=0, run="r")
    builder.add(rows, bucket=bucket, window_start=0, window_end=50, generation=1, block_rows=50)
    return builder.finish()


def unsealed(data: bytes) -> bytes:
    """The same file as it was written before files had names and seals."""
    anatomy = read_anatomy(lambda offset, length: data[offset : offset + length], len(data))
    seal = anatomy.tail.index(b',"head":"')
    end = anatomy.tail.index(b"}", seal) + 1
    tail = anatomy.tail[:seal] + b"}" + b" " * (end - seal - 1) + anatomy.tail[end:]
    tail = tail.replace(b"timetier.file", b"timetier.past")
    head = data[: anatomy.head.length].replace(b"timetier.file", b"timetier.past")
    return head + data[anatomy.head.length : anatomy.tail_at] + tail


@dataclass
class Stored:
    """One timeline: rows as (version, kind, value, written) by item key, newest first."""

    version: int = 0
    wiped: int = 0
    open: bool = False
    rows: dict[bytes, list[tuple[int, int, bytes, int]]] = field(default_factory=dict)
    request_ids: dict[bytes, int] = field(default_factory=dict)

    def apply(self, kinds: bytes, keys: list[bytes], values: list[bytes], written: int) -> int:
        self.version += 1
        for kind, key, value in zip(kinds, keys, values, strict=True):
            if kind == WIPE:
                self.wiped = self.version - 1
            else:
                self.rows.setdefault(key, []).insert(0, (self.version, kind, value, written))
        return self.version


class StorageModel:
    """All buckets of a cluster. `now`: write time (us) of what comes by message."""

    def __init__(self, shape: Topology) -> None:
        self.shape = shape
        self.timelines: dict[bytes, Stored] = {}
        self.now = 0
        self.evicting = True
        self.scans = 0
        self.before_write: Callable[[], None] = lambda: None

    def stored(self, timeline: bytes) -> Stored:
        return self.timelines.setdefault(timeline, Stored())

    def put(self, owner: bytes, timestamp: int, value: bytes, written: int, item_id: bytes = b"") -> int:
        key = timeline_key(TABLE, owner, self.shape.buckets)
        return self.stored(key).apply(bytes((PUT,)), [item_key(timestamp, item_id)], [value], written)

    def delete(self, owner: bytes, timestamp: int, written: int) -> int:
        key = timeline_key(TABLE, owner, self.shape.buckets)
        return self.stored(key).apply(bytes((DELETE,)), [item_key(timestamp)], [b""], written)

    def wipe(self, owner: bytes) -> int:
        return self.stored(timeline_key(TABLE, owner, self.shape.buckets)).apply(bytes((WIPE,)), [b""], [b""], 0)

    def links(self, bucket: int) -> list[Link]:
        rows = self.stored(system_timeline(bucket)).rows
        return [decode_link(r[0][2]) for key, r in sorted(rows.items()) if r[0][1] == PUT and not is_record(key)]

    def all_links(self) -> list[Link]:
        return [link for bucket in range(self.shape.buckets) for link in self.links(bucket)]

    def horizon(self, bucket: int, table: bytes) -> int:
        rows = self.stored(system_timeline(bucket)).rows.get(horizon_key(table))
        return int.from_bytes(rows[0][2], "little", signed=True) if rows else MIN_TIMESTAMP

    def evict(self) -> None:
        """What every replica does once a link is chosen."""
        for key, stored in self.timelines.items():
            if not is_system(key):
                evict_timeline(stored, key, self.links(bucket_of(key)))

    async def handle(self, message: Message) -> Message | None:
        return self.answer(message)

    def answer(self, message: Message) -> Message:
        if isinstance(message, Scan):
            self.scans += 1
            return self._scan(message)
        if isinstance(message, AskVersions):
            stored = [self.stored(key) for key in message.timelines]
            opens = [Open(at, (0, (0, 1, 1))) for at, one in enumerate(stored) if one.open]
            return Versions(pack_i64([one.version for one in stored]), opens)
        if isinstance(message, Settle):
            for key in message.timelines:
                self.stored(key).open = False
            versions = [self.stored(key).version for key in message.timelines]
            return Settled(bytes((OK,)) * len(versions), pack_i64(versions))
        if isinstance(message, Check):
            return self._points(message) if POINT in message.wants else self._check(message)
        if isinstance(message, ReadItems):
            return self._items(message)
        assert isinstance(message, Write), message
        self.before_write()
        return self._write(message)

    def _write(self, message: Write) -> Written:
        outcomes, versions = bytearray(), []
        low = 0
        conditions = unpack_i64(message.if_version)
        for at, (timeline, count) in enumerate(zip(message.timelines, unpack_u32(message.counts), strict=True)):
            cut = slice(low, low + count)
            low += count
            stored = self.stored(timeline)
            request_id = message.request_ids[at]
            if request_id in stored.request_ids:
                outcomes.append(OK)
                versions.append(stored.request_ids[request_id])
            elif conditions[at] not in (-1, stored.version):
                outcomes.append(CONFLICT)
                versions.append(stored.version)
            else:
                outcomes.append(OK)
                versions.append(stored.apply(message.kinds[cut], message.keys[cut], message.values[cut], self.now))
                stored.request_ids[request_id] = stored.version
        if self.evicting:
            self.evict()
        return Written(bytes(outcomes), pack_i64(versions))

    def _items(self, message: ReadItems) -> FoundItems:
        items: list[Item | None] = []
        for timeline, key in zip(message.timelines, message.keys, strict=True):
            rows = self.stored(timeline).rows.get(key)
            version, kind, value, written = rows[0] if rows else (0, DELETE, b"", 0)
            timestamp, item_id = split_item_key(key)
            items.append(Item(timestamp, value, item_id, version, written) if kind == PUT else None)
        versions = pack_i64([self.stored(timeline).version for timeline in message.timelines])
        return FoundItems(bytes((OK,)) * len(items), versions, items)

    def _points(self, message: Check) -> Checked:
        """Versions, and how far timelines are wiped; for keys that no item has."""
        stored = [self.stored(timeline) for timeline in message.timelines]
        nothing = bytes(4 * len(stored))
        return Checked(
            chosen=pack_i64([one.version for one in stored]),
            opens=[],
            payloads=bytes((POINT,)) * len(stored),
            counts=nothing,
            kinds=b"",
            keys=[],
            values=[],
            versions=b"",
            written=b"",
            wiped=pack_i64([one.wiped for one in stored]),
            horizons=pack_i64([MIN_TIMESTAMP] * len(stored)),
            floors=[b""] * len(stored),
            links=[],
        )

    def _check(self, message: Check) -> Checked:
        (timeline,) = message.timelines
        stored = self.stored(timeline)
        (limit,) = unpack_u32(message.limits)
        keys = sorted(key for key in stored.rows if not message.bounds[0] or key < message.bounds[0])[::-1]
        page = keys[:limit]
        rows = [stored.rows[key][0] for key in page]
        return Checked(
            chosen=pack_i64([stored.version]),
            opens=[],
            payloads=bytes((RANGE,)),
            counts=pack_u32([len(page)]),
            kinds=bytes(row[1] for row in rows),
            keys=page,
            values=[row[2] for row in rows],
            versions=pack_i64([row[0] for row in rows]),
            written=pack_i64([row[3] for row in rows]),
            wiped=pack_i64([stored.wiped]),
            horizons=pack_i64([MIN_TIMESTAMP]),
            floors=[page[-1] if len(page) < len(keys) else b""],
            links=[],
        )

    def _scan(self, message: Scan) -> Scanned:
        full = sorted({bucket_of(k) for k, s in self.timelines.items() if s.version} - set(range(message.bucket)))
        if not full:
            return _scanned(message.bucket, [], [], self.links(message.bucket), 0, MIN_TIMESTAMP, -1, b"")
        bucket = full[0]
        if bucket - message.bucket > BUCKETS_PER_ANSWER:  # like a replica that looks only so far at a time
            stop = message.bucket + BUCKETS_PER_ANSWER
            version = self.stored(system_timeline(stop)).version
            return _scanned(stop, [], [], self.links(stop), version, self.horizon(stop, message.table), stop, b"")
        prefix = bucket_prefix(bucket)
        cursor = message.cursor if bucket == message.bucket else b""
        found: list[tuple[bytes, Stored, dict[bytes, tuple[int, int, bytes, int]]]] = []
        size, next_bucket, next_cursor = 0, (full[1] if len(full) > 1 else -1), b""
        for key in sorted(self.timelines):
            if not key.startswith(prefix) or is_system(key) or key < cursor:
                continue
            if split_timeline(key)[1] != message.table:
                continue
            stored = self.timelines[key]
            rows = eligible(stored, message.event_before, message.written_before)
            wiped = stored.wiped and any(
                link.holds_wiped(owner_hash_of(key), stored.wiped) for link in self.links(bucket)
            )
            if rows and size >= message.limit_bytes:
                next_bucket, next_cursor = bucket, key
                break
            if rows or wiped:
                found.append((key, stored, rows))
                size += sum(len(k) + len(r[2]) for k, r in rows.items())
        links = [link for link in self.links(bucket) if link.table == message.table]
        version = self.stored(system_timeline(bucket)).version
        names = [key for key, _, _ in found]
        horizon = self.horizon(bucket, message.table)
        parts = [(stored, rows) for _, stored, rows in found]
        return _scanned(bucket, names, parts, links, version, horizon, next_bucket, next_cursor)


def is_data(timeline: bytes) -> bool:
    """Whether a timeline is an application's."""
    return not is_system(timeline) and not is_internal(split_timeline(timeline)[1])


def owner_hash_of(timeline: bytes) -> int:
    """As links name the owner of a timeline."""
    _, table, owner = split_timeline(timeline)
    return timeline_hash(table, owner)


def eligible(stored: Stored, event_before: int, written_before: int) -> dict[bytes, tuple[int, int, bytes, int]]:
    """Newest row of each item that satisfies the cut-offs, oldest item first."""
    newest = {key: rows[0] for key, rows in sorted(stored.rows.items()) if rows}
    return {k: r for k, r in newest.items() if split_item_key(k)[0] < event_before and r[3] < written_before}


def _scanned(
    bucket: int,
    names: list[bytes],
    parts: Iterable[tuple[Stored, dict[bytes, tuple[int, int, bytes, int]]]],
    links: list[Link],
    system_version: int,
    horizon: int,
    next_bucket: int,
    next_cursor: bytes,
) -> Scanned:
    from timetier.cluster.cold.link import encode_link

    parts = list(parts)
    rows = [(key, row) for _, rows in parts for key, row in rows.items()]
    return Scanned(
        scanned_bucket=bucket,
        timelines=names,
        timeline_versions=pack_i64([stored.version for stored, _ in parts]),
        wiped=pack_i64([stored.wiped for stored, _ in parts]),
        counts=pack_u32([len(rows) for _, rows in parts]),
        kinds=bytes(row[1] for _, row in rows),
        keys=[key for key, _ in rows],
        values=[row[2] for _, row in rows],
        versions=pack_i64([row[0] for _, row in rows]),
        written=pack_i64([row[3] for _, row in rows]),
        links=[encode_link(link) for link in links],
        system_version=system_version,
        horizon=horizon,
        next_bucket=next_bucket,
        next_cursor=next_cursor,
    )


def evict_timeline(stored: Stored, timeline: bytes, links: Iterable[Link]) -> None:
    """Evict by the rules of the links, as a replica does that has applied all of them."""
    _, table, owner = split_timeline(timeline)
    for link in links:
        rules = [rule for rule in link.rules_of(timeline_hash(table, owner)) if rule.version <= stored.version]
        if link.table != table or not rules:
            continue
        for key in list(stored.rows):
            timestamp = split_item_key(key)[0]
            if link.window_start <= timestamp < link.window_end:
                up_to = evict_up_to(rules, timestamp, [(row[0], row[3]) for row in stored.rows[key]])
                stored.rows[key] = [row for row in stored.rows[key] if row[0] > up_to]
                if not stored.rows[key]:
                    del stored.rows[key]


def visible(
    stored: Stored, timeline: bytes, links: Iterable[Link], read: Callable[[Block], DecodedBlock], horizon: int
) -> dict[bytes, tuple[int, bytes]]:
    """What a reader finds: (version, value) by item key, hot rows and blocks merged by version."""
    _, table, owner = split_timeline(timeline)
    found = {key: (rows[0][0], rows[0][1], rows[0][2]) for key, rows in stored.rows.items()}
    for link in links:
        if link.table != table:
            continue
        for block in link.blocks_of(owner):
            keys, values, versions, _ = read(block).rows_of(owner)
            for key, value, version in zip(keys, values, versions, strict=True):
                if key not in found or found[key][0] < version:
                    found[key] = (version, PUT, value)
    floor = timestamp_floor(horizon)
    return {
        key: (version, value)
        for key, (version, kind, value) in sorted(found.items())
        if kind == PUT and version > stored.wiped and key >= floor
    }
