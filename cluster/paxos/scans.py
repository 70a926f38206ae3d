"""What a replica answers to the sink: rows that may sink, bucket by bucket.

A scan is made in slices (`slices.py`), because a bucket may have many rows and readers wait meanwhile. Links, horizon
and version of the bucket's system timeline are of one instant, and so are the rows of each timeline; when a link is
chosen in between, the answer ends before the next timeline.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import islice

from ..cold.link import encode_link
from ..keys import MAX_TIMESTAMP, MIN_TIMESTAMP, bucket_prefix, split_item_key, system_timeline, timestamp_floor
from ..messages import AskTables, Scan, Scanned, Tables, pack_i64, pack_u32
from .core import Core
from .links import LinkIndex, TableLinks
from .quiet import place_in
from .rows import VERSION_BYTES, decode_row, prefix_end, rows_prefix, version_of
from .slices import Pinned, Slices, in_one_slice, until_it_holds
from .standings import NO_STANDING, Standing

BUCKETS_PER_ANSWER = 256  # of an answer to `AskTables`
QUIET_PER_ANSWER = 65_536  # buckets that are left out at the cost of a look-up
_QUIET_PER_SLICE = 512
ROWS_PER_ANSWER = 50_000  # rows looked at, so that an answer does not take for ever
_LOOK_ROWS = 8  # to look at a bucket takes about as long as so many rows
MAX_ANSWER_BYTES = 16 << 20  # whatever is asked for; a timeline is never split
_SEEK_ROWS = 8  # a seek takes about as long as so many rows

_Row = tuple[bytes, int, int, int, bytes]  # item key, version, written, kind, value


class _Answer:
    """Columns of a `Scanned` while it grows. `standing`: as of `system_version`."""

    def __init__(self, bucket: int, standing: Standing, system_version: int, dirty: int) -> None:
        self.bucket = bucket
        self.standing = standing
        self.links: TableLinks | None = None  # parsed when it is known that they are to be told
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
        """Add the eligible rows of one timeline, none if it is reported for having been wiped."""
        self.after = max(self.after, pinned.dirty)
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
            [encode_link(link) for link in self.links.links] if self.links is not None else [],
            self.system_version,
            self.standing.horizon,
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
        """What is to be done in the next bucket with anything, and the engine batch that must be durable first."""
        work = _Work(self.core.settings.chore_rows)
        at = bisect_left(owned, message.bucket)
        if at == len(owned):
            return self._nothing(message, message.bucket, -1)
        skip = _Skip(self.core, message)
        cursor = message.cursor if owned[at] == message.bucket else b""
        passed = 0
        while at < len(owned):
            bucket = owned[at]
            if not cursor and skip.is_quiet(bucket):
                at += 1
                passed += 1
                if passed % _QUIET_PER_SLICE == 0:
                    if passed >= QUIET_PER_ANSWER and at < len(owned):
                        self.core.counters.add("quiet_buckets", passed)
                        return self._stop_before(owned[at])
                    yield
                continue
            if work.seen >= ROWS_PER_ANSWER:
                self.core.counters.add("quiet_buckets", passed)
                return self._stop_before(bucket)
            answer, rest = yield from self._scan_bucket(bucket, message, cursor, work)
            cursor = b""
            at += 1
            if answer is not None:
                self.core.counters.add("quiet_buckets", passed)
                if rest:
                    return answer.message(bucket, rest), answer.after
                return answer.message(owned[at] if at < len(owned) else -1, b""), answer.after
        self.core.counters.add("quiet_buckets", passed)
        return self._nothing(message, owned[-1], -1)

    def tables(self, message: AskTables, owned: Sequence[int]) -> Tables:
        """Names of the tables that have rows or links in the next buckets; one seek for each table of a bucket."""
        names: set[bytes] = set()
        first = bisect_left(owned, message.bucket)
        for seeks, bucket in enumerate(islice(owned, first, None)):
            if seeks >= BUCKETS_PER_ANSWER:
                return Tables(sorted(names), bucket)
            self.links.standing(bucket, b"")
            names.update(self.core.standings.tables_of(bucket))
            prefix = b"R" + bucket_prefix(bucket)
            at = prefix + b"\x01"  # behind the system timeline, whose table has no name
            while (row := next(iter(self.core.engine.scan(at, prefix_end(prefix))), None)) is not None:
                name_end = len(prefix) + 1 + row[0][len(prefix)]
                names.add(row[0][len(prefix) + 1 : name_end])
                at = prefix_end(row[0][:name_end])
        return Tables(sorted(names), -1)

    def _begin(self, bucket: int, table: bytes) -> _Answer:
        system = self.core.timeline(system_timeline(bucket))
        return _Answer(bucket, self.links.standing(bucket, table), system.chosen, system.dirty)

    def _nothing(self, message: Scan, bucket: int, next_bucket: int) -> tuple[Scanned, int]:
        answer = self._begin(bucket, message.table)
        answer.links = self.links.of_table(bucket, message.table)
        return answer.message(next_bucket, b""), answer.after

    def _stop_before(self, bucket: int) -> tuple[Scanned, int]:
        """So much was looked at that the rest is for another answer."""
        return _Answer(bucket, NO_STANDING, 0, 0).message(bucket, b""), 0

    def _scan_bucket(
        self, bucket: int, message: Scan, cursor: bytes, work: _Work
    ) -> Slices[tuple[_Answer | None, bytes]]:
        """The bucket's timelines that are to be reported, from `cursor` on, and where to go on, b"" when that was all;
        None if there is nothing in the bucket for the sink."""
        answer, rest, oldest = yield from self._gather(bucket, message, cursor, work)
        if not answer.timelines:
            if self.core.timeline(system_timeline(bucket)).chosen != answer.system_version:
                answer = self._begin(bucket, message.table)
            if not cursor and not self._is_due(message, answer.standing, oldest):
                return None, b""
        if answer.links is None:
            answer.links = self.links.of_table(bucket, message.table)
        return answer, rest

    @staticmethod
    def _is_due(message: Scan, standing: Standing, oldest: int) -> bool:
        """Whether a bucket without anything to sink is answered, by the least timestamp of its rows."""
        if message.all_links and standing.first != MAX_TIMESTAMP:
            return True
        may_step = standing.horizon <= message.expire_before - message.expire_step
        return may_step and min(oldest, standing.first) < message.expire_before

    def _gather(self, bucket: int, message: Scan, cursor: bytes, work: _Work) -> Slices[tuple[_Answer, bytes, int]]:
        """What is to be reported of a bucket, where to go on, and the least timestamp of its rows."""
        work.done(_LOOK_ROWS)
        answer = self._begin(bucket, message.table)
        limit_bytes = min(message.limit_bytes, MAX_ANSWER_BYTES)
        walk = _Walk(self, bucket, message, cursor, answer.standing)
        while True:
            if work.done(_SEEK_ROWS):
                yield
            key = walk.next()
            if key is None:
                if not answer.timelines:
                    walk.end()
                return answer, b"", walk.oldest
            if answer.timelines and (answer.size >= limit_bytes or work.seen >= ROWS_PER_ANSWER):
                return answer, key, walk.oldest
            timeline = _Timeline(self, key, message, answer.standing.horizon, work)
            pinned, rows = yield from until_it_holds(timeline.read)
            if pinned.system_version != answer.system_version:  # a link was chosen since the answer began
                if answer.timelines:
                    return answer, key, walk.oldest
                answer = self._begin(bucket, message.table)
                continue
            if rows or walk.is_held(key):
                if answer.links is None:
                    answer.links = self.links.of_table(bucket, message.table)
                answer.add(pinned, rows)
            walk.passed(key, timeline)


class _Skip:
    """Which buckets are left out at the cost of a look-up."""

    def __init__(self, core: Core, message: Scan) -> None:
        self._message = message
        self._tail = bytes((len(message.table),)) + message.table
        self._bounds, self._held = core.quiet.bounds, core.wipes.held
        self._known, self._stirred = core.standings.known, core.standings.stirred
        self._floor = timestamp_floor(message.expire_before)
        self._horizon = message.expire_before - message.expire_step  # of a bucket that may take a step

    def is_quiet(self, bucket: int) -> bool:
        """Whether it is known that a bucket has nothing for the sink."""
        place = bucket_prefix(bucket) + self._tail
        bound, message = self._bounds.get(place), self._message
        if bound is None or message.event_before > bound.event or message.written_before > bound.written:
            return False
        if place in self._held or bucket in self._stirred:
            return False
        standing = self._known.get(place, NO_STANDING)
        if message.all_links and standing.first != MAX_TIMESTAMP:
            return False
        return standing.horizon > self._horizon or (
            bound.floor >= self._floor and standing.first >= message.expire_before
        )


class _Walk:
    """The timelines of a table in a bucket that are to be looked at, in order: those with a row that is old enough, and
    those that were wiped while blocks still hold them.

    `oldest`: least timestamp of the rows of those passed so far.
    """

    def __init__(self, scans: Scans, bucket: int, message: Scan, cursor: bytes, standing: Standing) -> None:
        self._core = scans.core
        self._message = message
        place = self._place = place_in(bucket_prefix(bucket), message.table)
        self._at = max(b"R" + cursor, b"R" + place)
        self._end = prefix_end(b"R" + place)
        self._held_at = cursor
        self._held: bytes | None = None
        quiet = self._core.quiet
        self.oldest = self._event = self._written = self._first = MAX_TIMESTAMP
        may_step = standing.horizon <= message.expire_before - message.expire_step
        is_old = may_step and quiet.may_be_below(place, timestamp_floor(message.expire_before))
        self._covered = quiet.covers(place, message.event_before, message.written_before) and not is_old
        self._scan = 0 if cursor or self._covered else quiet.begin(place)

    def next(self) -> bytes | None:
        """The next timeline, None at the end. The same until it is passed."""
        self._held = self._core.wipes.next(self._place, self._held_at)
        with_rows = None if self._covered else self._next_with_rows()
        keys = [key for key in (self._held, with_rows) if key is not None]
        return min(keys, default=None)

    def _next_with_rows(self) -> bytes | None:
        prefix = len(self._place) + 1
        while (row := next(iter(self._core.engine.scan(self._at, self._end)), None)) is not None:
            key = row[0][1 : prefix + 1 + row[0][prefix]]
            first = timestamp_in(row[0], key)
            if first < self._message.event_before:
                self._first = first
                return key
            self._event, self.oldest = (
                min(self._event, first),
                min(self.oldest, first),
            )  # and so are all of the timeline
            self._at = prefix_end(rows_prefix(key))
        return None

    def is_held(self, key: bytes) -> bool:
        """Whether blocks hold rows of a timeline that were wiped."""
        return key == self._held

    def passed(self, key: bytes, timeline: _Timeline) -> None:
        """Go on behind a timeline."""
        self._held_at = key + b"\x00"
        self._at = max(self._at, prefix_end(rows_prefix(key)))
        young = timeline.next_timestamp()
        self._event, self._written = min(self._event, young), min(self._written, timeline.written)
        self.oldest = min(self.oldest, young, self._first)
        self._first = MAX_TIMESTAMP

    def end(self) -> None:
        """All was looked at, and nothing may sink."""
        if self._scan:
            self._core.quiet.end(self._place, self._scan, self._event, self._written, self.oldest)


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
    written. Rows below `horizon` have expired; the first instant of all stays, since links have no place for it."""

    def __init__(self, scans: Scans, key: bytes, message: Scan, horizon: int, work: _Work) -> None:
        self._core = scans.core
        self._key = key
        self._message = message
        self._low = timestamp_floor(max(horizon, MIN_TIMESTAMP + 1))
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
        low, high = prefix + self._low, prefix + timestamp_floor(message.event_before)
        for part in pinned.rows(low, max(low, high), whole=whole):
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
