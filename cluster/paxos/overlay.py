"""What a replica answers to whoever reads cold blocks by themselves: rows of them that it knows to be hidden (*pure*).

A block is never changed, so its rows may have been replaced, deleted, wiped or have expired since. Where that is so the
storage tier has a newer row, the version of a wipe, or a horizon. The answer names those and no values: for each
timeline that the links hold blocks of, the items within the links' windows that have a row here.

What is told is a set of *facts* that never stop being true ("this item has a chosen row of this version"), so answers
of several replicas can be put together, in any order. A replica knows of no fact that it has not applied. Where it has
accepted an entry and does not know whether that was chosen it says so, and who asked has it settled. So of an entry
that was acknowledged, one of any majority tells the fact or the doubt.

The answer is made in slices (`slices.py`). A timeline that is not in memory, has no row within the windows and no
record after its mark is told of by its mark, and stays out of memory: most timelines with cold blocks are such.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise

from ..cold.link import Link, Rule, encode_link, evict_up_to
from ..errors import InvalidRequest, Unavailable
from ..keys import (
    bucket_prefix,
    split_item_key,
    split_timeline,
    system_timeline,
    timeline_hash,
    timestamp_floor,
)
from ..messages import WIPE, AskOverlay, BucketOverlay, Overlay, pack_i64, pack_u32, unpack_u32
from .core import Core
from .links import LinkIndex, TableLinks
from .rows import VERSION_BYTES, Meta, decode_row, log_key, prefix_end, rows_prefix, version_of
from .slices import Pinned, Slices, until_it_holds
from .timeline import Timeline

MAX_ANSWER_BYTES = 8 << 20  # whatever is asked for; a timeline is never split
MAX_BUCKETS = 1_024  # of one question
_MARKS_AT_ONCE = 32  # timelines that are looked at in one slice at the least

_Row = tuple[int, int]  # version, written


@dataclass(slots=True)
class _Part:
    """A `BucketOverlay` while it grows."""

    bucket: int
    links: TableLinks
    system_version: int
    with_links: bool
    timelines: list[bytes] = field(default_factory=list)
    wiped: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    opens: list[bytes] = field(default_factory=list)
    open_entries: list[int] = field(default_factory=list)
    size: int = 0
    after: int = 0
    looked: int = 0  # timelines that were looked at

    def add(self, key: bytes, wiped: int, items: Sequence[tuple[bytes, int]]) -> None:
        """Add what is known of one timeline, if that is anything."""
        if not wiped and not items:
            return
        self.timelines.append(key)
        self.wiped.append(wiped)
        self.counts.append(len(items))
        self.keys += [item for item, _ in items]
        self.versions += [version for _, version in items]
        self.size += len(key) + 32 + sum(len(item) + 16 for item, _ in items)

    def add_open(self, key: bytes, entry: int) -> None:
        self.opens.append(key)
        self.open_entries.append(entry)
        self.size += len(key) + 16

    def message(self) -> BucketOverlay:
        links = [encode_link(link) for link in self.links.links] if self.with_links else []
        return BucketOverlay(
            self.bucket,
            self.system_version,
            self.links.horizon,
            links,
            self.timelines,
            pack_i64(self.wiped),
            pack_u32(self.counts),
            self.keys,
            pack_i64(self.versions),
            self.opens,
            pack_i64(self.open_entries),
        )


class Overlays:
    """Answers of one replica to `AskOverlay`."""

    def __init__(self, core: Core, links: LinkIndex) -> None:
        self.core = core
        self.links = links

    def slices(self, message: AskOverlay) -> Slices[tuple[Overlay, int]]:
        """The answer, and the engine batch that must be durable first. Raises InvalidRequest, Unavailable."""
        buckets = unpack_u32(message.buckets)
        if not 1 <= len(buckets) <= MAX_BUCKETS or any(low >= high for low, high in pairwise(buckets)):
            raise InvalidRequest(f"{len(buckets)} buckets: pass 1 to {MAX_BUCKETS} of them, increasing")
        foreign = [bucket for bucket in buckets if bucket not in self.core.owned]
        if foreign:
            raise Unavailable(f"bucket {foreign[0]} is of another group")
        limit_bytes = min(message.limit_bytes, MAX_ANSWER_BYTES)
        parts: list[BucketOverlay] = []
        size = after = looked = 0
        cursor = message.cursor
        for bucket in buckets:
            part, rest = yield from self._bucket(bucket, message.table, cursor, limit_bytes - size)
            parts.append(part.message())
            cursor = b""
            size += part.size + sum(map(len, parts[-1].links)) + 64
            after = max(after, part.after)
            if rest or size >= limit_bytes:
                return Overlay(parts, rest, self.core.incarnations()), after
            looked += part.looked + 1
            if looked >= _MARKS_AT_ONCE:  # most buckets have a few timelines only
                looked = 0
                yield
        return Overlay(parts, b"", self.core.incarnations()), after

    def _begin(self, bucket: int, table: bytes, *, with_links: bool) -> _Part:
        system = self.core.timeline(system_timeline(bucket))
        part = _Part(bucket, self.links.of_table(bucket, table), system.chosen, with_links, after=system.dirty)
        if system.record is not None:
            part.add_open(system.key, system.chosen + 1)
        return part

    def _bucket(self, bucket: int, table: bytes, cursor: bytes, limit_bytes: int) -> Slices[tuple[_Part, bytes]]:
        """The bucket's part from `cursor` on, and the timeline to go on from, b"" when that was all."""
        while True:
            part = self._begin(bucket, table, with_links=not cursor)
            rest = yield from self._fill(part, table, cursor, limit_bytes)
            if rest is not None:
                return part, rest

    def _fill(self, part: _Part, table: bytes, cursor: bytes, limit_bytes: int) -> Slices[bytes | None]:
        """Where to go on; None when a link was chosen since the part began."""
        if not part.links.links:
            return b""
        windows = _Windows(part.links.links)
        system = system_timeline(part.bucket)
        prefix = bucket_prefix(part.bucket) + bytes((len(table),)) + table
        at = b"M" + (cursor or prefix)
        while self.core.timeline(system).chosen == part.system_version:
            marks = list(islice(self.core.engine.scan(at, b"M" + prefix_end(prefix)), _MARKS_AT_ONCE))
            for key in self._take_quiet([(name[1:], mark) for name, mark in marks], windows, part):
                reading = _Timeline(self.core, key, windows)
                pinned = yield from until_it_holds(reading.read)
                if pinned.system_version != part.system_version:
                    return None
                part.after = max(part.after, pinned.dirty)
                part.add(key, windows.hidden_by(key, pinned.wiped), reading.items)
                if reading.open_entry:
                    part.add_open(key, reading.open_entry)
            part.looked += len(marks)
            if len(marks) < _MARKS_AT_ONCE:
                return b""
            at = marks[-1][0] + b"\x00"
            if part.size >= limit_bytes:
                return at[1:]
            yield
        return None

    def _take_quiet(self, marks: list[tuple[bytes, bytes]], windows: _Windows, part: _Part) -> list[bytes]:
        """Add the timelines about which mark or memory tell all; gives the others with blocks, which are to be read."""
        core = self.core
        named = [(key, Meta.decode(mark)) for key, mark in marks if windows.holds(key)]
        later = core.engine.get_many([log_key(key, meta.chosen + 1) for key, meta in named])
        busy = []
        for (key, meta), record in zip(named, later, strict=True):
            known: Meta | Timeline = core.timeline(key) if core.holds(key) else meta
            is_open = known.record is not None if isinstance(known, Timeline) else record is not None
            if is_open or self._has_rows(key, windows):
                busy.append(key)
            else:
                part.add(key, windows.hidden_by(key, known.wiped), [])
                part.after = max(part.after, known.dirty if isinstance(known, Timeline) else 0)
        return busy

    def _has_rows(self, key: bytes, windows: _Windows) -> bool:
        prefix = rows_prefix(key)
        low, high = windows.span(key)
        rows = self.core.engine.scan(prefix + timestamp_floor(low), prefix + timestamp_floor(high))
        return next(iter(rows), None) is not None


class _Windows:
    """The links of a table in a bucket, by owner and by time."""

    def __init__(self, links: Sequence[Link]) -> None:
        self._links = links
        self._of_owner: dict[int, list[int]] = {}  # by hash, which of the links hold rows of it, oldest window first
        for at, link in enumerate(links):
            for owner_hash in link.owner_hashes().tolist():
                self._of_owner.setdefault(owner_hash, []).append(at)
        self._starts = [link.window_start for link in links]
        self._rules: tuple[bytes, dict[int, list[Rule]]] = b"", {}  # of the timeline that was looked at last

    def holds(self, key: bytes) -> bool:
        """Whether blocks hold rows of a timeline."""
        return _hash_of(key) in self._of_owner

    def span(self, key: bytes) -> tuple[int, int]:
        """(low, high): low <= timestamp < high for all windows that hold rows of a timeline."""
        named = self._of_owner[_hash_of(key)]
        return self._links[named[0]].window_start, self._links[named[-1]].window_end

    def hidden_by(self, key: bytes, wiped: int) -> int:
        """`wiped` if blocks may hold rows of a timeline up to this version, else 0."""
        if not wiped:
            return 0
        owner_hash = _hash_of(key)
        named = self._of_owner[owner_hash]
        return wiped if any(self._links[at].holds_wiped(owner_hash, wiped) for at in named) else 0

    def rules_at(self, key: bytes, timestamp: int) -> list[Rule] | None:
        """Rules of eviction at an instant, None where no block holds rows of the timeline."""
        if self._rules[0] != key:
            owner_hash = _hash_of(key)
            self._rules = key, {at: self._links[at].rules_of(owner_hash) for at in self._of_owner[owner_hash]}
        at = bisect_right(self._starts, timestamp) - 1
        return self._rules[1].get(at) if at >= 0 and timestamp < self._links[at].window_end else None


class _Timeline:
    """What one timeline hides. `items`: (item key, newest version); `open_entry`: 0 without one that matters."""

    def __init__(self, core: Core, key: bytes, windows: _Windows) -> None:
        self._core = core
        self._key = key
        self._windows = windows
        self.items: list[tuple[bytes, int]] = []
        self.open_entry = 0

    def read(self, whole: bool) -> Slices[Pinned | None]:
        """Read it as of the version that the result names; None if that version's rows may be gone."""
        core = self._core
        timeline = core.timeline(self._key)
        system = core.timeline(system_timeline(int.from_bytes(self._key[:4], "big")))
        pinned = Pinned(core, timeline, system, timeline.chosen)
        record = timeline.record
        self.items = []
        self.open_entry = timeline.chosen + 1 if record is not None and WIPE in record.kinds else 0
        prefix = rows_prefix(self._key)
        low, high = self._windows.span(self._key)
        grouped = _Grouped(len(prefix))
        for part in pinned.rows(prefix + timestamp_floor(low), prefix + timestamp_floor(high), whole=whole):
            if part is None:
                return None
            for item, rows in grouped.of(part):
                self._take(item, rows, pinned)
            if not whole and len(part) == core.settings.chore_rows:
                yield
        for item, rows in grouped.last():
            self._take(item, rows, pinned)
        return pinned

    def _take(self, item: bytes, rows: list[_Row], pinned: Pinned) -> None:
        """Note one item by its rows, newest first."""
        timestamp = split_item_key(item)[0]
        rules = self._windows.rules_at(self._key, timestamp)
        if rules is None:
            return
        if rows[0][0] > pinned.version:
            self.open_entry = pinned.version + 1
        known = [row for row in rows if pinned.wiped < row[0] <= pinned.version]
        if not known:
            return
        newest = known[0][0]
        # A rule holds once this replica has applied the version that it was made at.
        holding = [rule for rule in rules if rule.version <= pinned.version]
        if newest > evict_up_to(holding, timestamp, known):
            self.items.append((item, newest))


class _Grouped:
    """Rows of items, newest first, from engine rows that come item by item, oldest version first."""

    def __init__(self, prefix_bytes: int) -> None:
        self._start = prefix_bytes
        self._item = b""
        self._rows: list[_Row] = []

    def of(self, rows: list[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, list[_Row]]]:
        for name, row in rows:
            item = name[self._start : -VERSION_BYTES]
            if item != self._item:
                yield from self.last()
                self._item = item
            self._rows.append((version_of(name), decode_row(row)[0]))

    def last(self) -> Iterator[tuple[bytes, list[_Row]]]:
        if self._rows:
            yield self._item, self._rows[::-1]
            self._rows = []


def _hash_of(key: bytes) -> int:
    _, table, owner = split_timeline(key)
    return timeline_hash(table, owner)
