"""What a replica answers to the sink: rows that may sink, bucket by bucket.

A scan is made in slices (`slices.py`), because a bucket may have many rows and readers wait meanwhile. Links, horizon
and version of the bucket's system timeline are of one instant, and so are the rows of each timeline; when a link is
chosen in between, the answer ends before the next timeline.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from ..cold.link import encode_link
from ..keys import MAX_TIMESTAMP, bucket_prefix, split_item_key, system_timeline, timestamp_floor
from ..messages import AskTables, Scan, Scanned, Tables, pack_i64, pack_u32
from .core import Core
from .links import LinkIndex, TableLinks
from .rows import VERSION_BYTES, decode_row, prefix_end, rows_prefix, version_of
from .slices import Pinned, Slices, in_one_slice, until_it_holds

BUCKETS_PER_ANSWER = 64
ROWS_PER_ANSWER = 50_000  # rows looked at, so that an answer does not take for ever
MAX_ANSWER_BYTES = 16 << 20  # whatever is asked for; a timeline is never split
_SEEK_ROWS = 8  # a seek takes about as long as so many rows

_Row = tuple[bytes, int, int, int, bytes]  # item key, version, written, kind, value


class _Answer:
    """Columns of a `Scanned` while it grows. `seen`: rows looked at; `work`: the same since the last slice."""

    def __init__(self, bucket: int, links: TableLinks, system_version: int, dirty: int) -> None:
        self.bucket = bucket
        self.links = links
        self.system_version = system_version
        self.after = dirty
        self.timelines: list[bytes] = []
        self.timeline_versions: list[int] = []
        self.wiped: list[int] = []
        self.counts: list[int] = []
        self.kinds = bytearray()
        self.keys: list[bytes] = []
        self.values: list[bytes] = []
        self.versions: list[int] = []
        self.written: list[int] = []
        self.size = 0

    def add(self, pinned: Pinned, rows: list[_Row]) -> None:
        """Add the eligible rows of one timeline."""
        self.after = max(self.after, pinned.dirty)
        if not rows:
            return
        for key, version, written, kind, value in rows:
            self.kinds.append(kind)
            self.keys.append(key)
            self.values.append(value)
            self.versions.append(version)
            self.written.append(written)
            self.size += len(key) + len(value) + 32
        self.timelines.append(pinned.key)
        self.timeline_versions.append(pinned.version)
        self.wiped.append(pinned.wiped)
        self.counts.append(len(rows))

    def message(self, next_bucket: int, next_cursor: bytes) -> Scanned:
        return Scanned(
            self.bucket,
            self.timelines,
            pack_i64(self.timeline_versions),
            pack_i64(self.wiped),
            pack_u32(self.counts),
            bytes(self.kinds),
            self.keys,
            self.values,
            pack_i64(self.versions),
            pack_i64(self.written),
            [encode_link(link) for link in self.links.links],
            self.system_version,
            self.links.horizon,
            next_bucket,
            next_cursor,
        )


class Scans:
    """Answers of one replica to the sink."""

    def __init__(self, core: Core, links: LinkIndex) -> None:
        self.core = core
        self.links = links

    def scan(self, message: Scan, owned: Sequence[int]) -> tuple[Scanned, int]:
        """Result of `slices`, without a break."""
        return in_one_slice(self.slices(message, owned))

    def slices(self, message: Scan, owned: Sequence[int]) -> Slices[tuple[Scanned, int]]:
        """Eligible rows of the next bucket that has any, and the engine batch that must be durable first."""
        work = _Work(self.core.settings.chore_rows)
        buckets = list(islice((bucket for bucket in owned if bucket >= message.bucket), BUCKETS_PER_ANSWER + 1))
        if not buckets:
            return self._nothing(message, message.bucket, -1)
        for position, bucket in enumerate(buckets):
            following = buckets[position + 1] if position + 1 < len(buckets) else -1
            if position == BUCKETS_PER_ANSWER or work.seen >= ROWS_PER_ANSWER:
                return self._nothing(message, bucket, bucket)
            cursor = message.cursor if bucket == message.bucket else b""
            answer, rest = yield from self._scan_bucket(bucket, message, cursor, work)
            if rest:
                return answer.message(bucket, rest), answer.after
            if answer.timelines or answer.links.links:  # the sink sees links for expired windows and files in use
                return answer.message(following, b""), answer.after
        return self._nothing(message, buckets[-1], -1)

    def tables(self, message: AskTables, owned: Sequence[int]) -> Tables:
        """Names of the tables that have rows or links in the next buckets; one seek for each table of a bucket."""
        names: set[bytes] = set()
        for seeks, bucket in enumerate(bucket for bucket in owned if bucket >= message.bucket):
            if seeks >= BUCKETS_PER_ANSWER:
                return Tables(sorted(names), bucket)
            names.update(self.links.of_bucket(bucket).tables)
            prefix = b"R" + bucket_prefix(bucket)
            at = prefix + b"\x01"  # behind the system timeline, whose table has no name
            while (row := next(iter(self.core.engine.scan(at, prefix_end(prefix))), None)) is not None:
                name_end = len(prefix) + 1 + row[0][len(prefix)]
                names.add(row[0][len(prefix) + 1 : name_end])
                at = prefix_end(row[0][:name_end])
        return Tables(sorted(names), -1)

    def _begin(self, bucket: int, table: bytes) -> _Answer:
        system = self.core.timeline(system_timeline(bucket))
        return _Answer(bucket, self.links.of_table(bucket, table), system.chosen, system.dirty)

    def _nothing(self, message: Scan, bucket: int, next_bucket: int) -> tuple[Scanned, int]:
        answer = self._begin(bucket, message.table)
        return answer.message(next_bucket, b""), answer.after

    def _scan_bucket(self, bucket: int, message: Scan, cursor: bytes, work: _Work) -> Slices[tuple[_Answer, bytes]]:
        """The bucket's eligible timelines from `cursor` on, and where to go on, b"" when that was all."""
        answer = self._begin(bucket, message.table)
        prefix = b"R" + bucket_prefix(bucket) + bytes((len(message.table),)) + message.table
        at = max(b"R" + cursor, prefix)
        limit_bytes = min(message.limit_bytes, MAX_ANSWER_BYTES)
        end = prefix_end(prefix)
        place, quiet = prefix[1:], self.core.quiet
        if quiet.covers(place, message.event_before, message.written_before):
            work.done(_SEEK_ROWS)
            self.core.counters.add("quiet_buckets")
            return answer, b""
        scan = 0 if cursor else quiet.begin(place)
        oldest = written = MAX_TIMESTAMP
        while True:
            if work.done(_SEEK_ROWS):
                yield
            row = next(iter(self.core.engine.scan(at, end)), None)
            if row is None:
                if scan and not answer.timelines:
                    quiet.end(place, scan, oldest, written)
                return answer, b""
            key = row[0][1 : len(prefix) + 1 + row[0][len(prefix)]]
            first = timestamp_in(row[0], key)
            if first >= message.event_before:  # and so are all of the timeline
                oldest = min(oldest, first)
                at = prefix_end(rows_prefix(key))
                continue
            if answer.timelines and (answer.size >= limit_bytes or work.seen >= ROWS_PER_ANSWER):
                return answer, key
            timeline = _Timeline(self, key, message, work)
            pinned, rows = yield from until_it_holds(timeline.read)
            if pinned.system_version != answer.system_version:  # a link was chosen since the answer began
                if answer.timelines:
                    return answer, key
                answer = self._begin(bucket, message.table)
                continue
            answer.add(pinned, rows)
            if not answer.timelines:
                oldest, written = min(oldest, timeline.next_timestamp()), min(written, timeline.written)
            at = prefix_end(rows_prefix(key))


class _Work:
    """Counts rows, so that a slice ends after `slice_rows` of them."""

    def __init__(self, slice_rows: int) -> None:
        self.seen = 0
        self._slice_rows = slice_rows
        self._since = 0

    def done(self, rows: int) -> bool:
        """Note that so many rows were looked at. Whether the slice should end."""
        self.seen += rows
        self._since += rows
        if self._since < self._slice_rows:
            return False
        self._since = 0
        return True


class _Timeline:
    """The eligible rows of one timeline. `written`: least time at which one that is old enough, and not eligible, was
    written."""

    def __init__(self, scans: Scans, key: bytes, message: Scan, work: _Work) -> None:
        self._core = scans.core
        self._key = key
        self._message = message
        self._work = work
        self.written = MAX_TIMESTAMP

    def next_timestamp(self) -> int:
        """Of the oldest item that is too young, MAX_TIMESTAMP without one."""
        prefix = rows_prefix(self._key)
        low = prefix + timestamp_floor(self._message.event_before)
        row = next(iter(self._core.engine.scan(low, prefix_end(prefix))), None)
        return MAX_TIMESTAMP if row is None else timestamp_in(row[0], self._key)

    def _eligible(self, rows: Iterator[_Row]) -> Iterator[_Row]:
        for row in rows:
            if row[2] < self._message.written_before:
                yield row
            else:
                self.written = min(self.written, row[2])

    def read(self, whole: bool) -> Slices[tuple[Pinned, list[_Row]] | None]:
        """The rows, oldest item first, and as of when they are; None if that version's rows may be gone."""
        core, message = self._core, self._message
        timeline = core.timeline(self._key)
        system = core.timeline(system_timeline(int.from_bytes(self._key[:4], "big")))
        pinned = Pinned(core, timeline, system, timeline.chosen)
        prefix = rows_prefix(self._key)
        newest = _Newest(prefix, pinned.version)
        found: list[_Row] = []
        for part in pinned.rows(prefix, prefix + timestamp_floor(message.event_before), whole=whole):
            if part is None:
                return None
            found += self._eligible(newest.of(part))
            if self._work.done(len(part)) and not whole:
                yield
        found += self._eligible(newest.last())
        self.written = min(self.written, newest.open_written)
        return pinned, found


class _Newest:
    """The newest row of each item as of a version, from rows that come item by item, oldest version first."""

    def __init__(self, prefix: bytes, version: int) -> None:
        self._start = len(prefix)
        self._version = version
        self._known: tuple[bytes, int, bytes] | None = None
        self.open_written = MAX_TIMESTAMP  # least time at which one of a later version was written

    def of(self, rows: list[tuple[bytes, bytes]]) -> Iterator[_Row]:
        for name, row in rows:
            version = version_of(name)
            if version > self._version:
                self.open_written = min(self.open_written, decode_row(row)[0])
                continue
            key = name[self._start : -VERSION_BYTES]
            if self._known is not None and self._known[0] != key:
                yield from self.last()
            self._known = key, version, row

    def last(self) -> Iterator[_Row]:
        if self._known is not None:
            key, version, row = self._known
            yield (key, version, *decode_row(row))
            self._known = None


def timestamp_in(name: bytes, timeline: bytes) -> int:
    """Timestamp of the item in the name of a row."""
    return split_item_key(name[1 + len(timeline) : -VERSION_BYTES])[0]
