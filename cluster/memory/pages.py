"""Pages: a contiguous piece of one timeline, complete as of one version (*pure*).

A page covers the key range [low, high) at version v: every item that is visible in that range at v is in it, and
nothing else. `low` = b"" reaches the oldest item, `high` = b"" the newest. A page never changes: what happens to it
(a delta, an extension, a trim) gives another page, which may share its columns. So a script that holds a page keeps
a consistent one, whatever other scripts put into the cache meanwhile.

Columns are parallel: `keys` (ascending item keys), `values`, `versions` and `written` (int64 arrays).
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ..keys import MIN_TIMESTAMP, timestamp_floor
from ..messages import DELETE, PUT, WIPE

_BYTES_HEADER = 40  # of a bytes object: 33, and on average 7 to the next multiple of 16
_ITEM_OVERHEAD_BYTES = 2 * _BYTES_HEADER + 4 * 8  # two bytes objects, four column slots
_PAGE_OVERHEAD_BYTES = 660  # the page, its four columns, low, high and digest


@dataclass(slots=True)
class Rows:
    """Rows of one timeline, parallel columns. `kinds`: PUT, DELETE (a tombstone) or WIPE, one byte each."""

    keys: list[bytes] = field(default_factory=list)
    kinds: bytes = b""
    values: list[bytes] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    written: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(slots=True)
class PageSlice:
    """Items of a page, newest first. `more`: older items may exist. `most_bytes`: what keys and values have at most."""

    keys: list[bytes]
    values: list[bytes]
    versions: array[int]
    written: array[int]
    more: bool
    most_bytes: int


class Page:
    """Items of one timeline in [low, high), complete at `version`. Its items never change.

    `label`: what questions whether it is current need, see `glances.Label`; b"" for a page that is not in the cache.
    `used`: it was asked for since the cache looked at it last.
    """

    __slots__ = (
        "_nbytes",
        "high",
        "horizon",
        "keys",
        "label",
        "low",
        "used",
        "values",
        "version",
        "versions",
        "written",
    )

    def __init__(
        self,
        version: int,
        low: bytes,
        high: bytes,
        horizon: int,
        keys: list[bytes],
        values: list[bytes],
        versions: array[int],
        written: array[int],
    ) -> None:
        self.version = version
        self.low = low
        self.high = high
        self.horizon = horizon
        self.keys = keys
        self.values = values
        self.versions = versions
        self.written = written
        self.label = b""
        self.used = False
        self._nbytes = 0

    @classmethod
    def of(cls, rows: Rows, *, version: int, low: bytes, high: bytes, horizon: int) -> Page:
        """Page of visible rows, newest first (as `merge` gives them); those outside of [low, high) are left out."""
        first = 0
        while high and first < len(rows) and rows.keys[first] >= high:
            first += 1
        end = len(rows)
        while end > first and rows.keys[end - 1] < low:
            end -= 1
        part = slice(first, end)
        page = cls(
            version,
            low,
            high,
            horizon,
            rows.keys[part][::-1],
            rows.values[part][::-1],
            array("q", rows.versions[part][::-1]),
            array("q", rows.written[part][::-1]),
        )
        return page._expire(horizon)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def nbytes(self) -> int:
        """Memory that the page occupies, object headers included, in bytes."""
        if not self._nbytes:
            data = sum(map(len, self.keys)) + sum(map(len, self.values))
            self._nbytes = _PAGE_OVERHEAD_BYTES + len(self.keys) * _ITEM_OVERHEAD_BYTES + data
        return self._nbytes

    def contains(self, key: bytes) -> bool:
        """Whether the page's range covers an item key, so that it can tell whether the item exists."""
        return key >= self.low and (not self.high or key < self.high)

    def find(self, key: bytes) -> int:
        """Position of an item in the columns, or -1."""
        at = bisect_left(self.keys, key)
        return at if at < len(self.keys) and self.keys[at] == key else -1

    def covers(self, before: bytes, limit: int) -> bool:
        """Whether the page can give the newest `limit` items older than `before` (b"" = from the newest)."""
        if self.high and (not before or before > self.high):
            return False
        if not self.low:
            return True
        if before:
            return before >= self.low and bisect_left(self.keys, before) >= limit
        return len(self.keys) >= limit

    def newest(self, limit: int, before: bytes, max_bytes: int) -> PageSlice | None:
        """The newest `limit` items older than `before` (b"" = from the newest), or None if the page can't tell.

        Fewer come when there are no more, or when keys and values would exceed `max_bytes` (then at least one).
        """
        if self.high and (not before or before > self.high):
            return None
        end = bisect_left(self.keys, before) if before else len(self.keys)
        if before and before < self.low:
            return None
        start = max(0, end - limit)
        cut = self._cut(start, end, max_bytes)
        if cut == start and end - start < limit and self.low:
            return None
        part = slice(end - 1, cut - 1 if cut else None, -1) if end else slice(0, 0)
        more = cut > 0 or bool(self.low)
        columns = (self.keys[part], self.values[part], self.versions[part], self.written[part])
        return PageSlice(*columns, more, self.nbytes)

    def _cut(self, start: int, end: int, max_bytes: int) -> int:
        """Least position >= start from which the items up to `end` fit into `max_bytes`; one always fits."""
        if self.nbytes <= max_bytes:
            return start
        size = 0
        for at in range(end - 1, start - 1, -1):
            size += len(self.keys[at]) + len(self.values[at])
            if size > max_bytes and at < end - 1:
                return at + 1
        return start

    def apply(self, delta: Rows, *, version: int, wiped: int, horizon: int) -> Page:
        """The page at `version`, given every row that was chosen after its own version, in log order.

        `wiped`: items of a version up to this one are deleted. A row outside of the range is not this page's
        business. After a wipe the page reaches the oldest item, because the delta holds all that came later.
        """
        for row_kind, row_version in zip(delta.kinds, delta.versions, strict=True):
            if row_kind == WIPE:
                wiped = max(wiped, row_version - 1)  # what its own entry writes comes after the wipe
        if wiped >= self.version:
            page = Page(version, b"", self.high, self.horizon, [], [], array("q"), array("q"))
        elif not delta.keys and version == self.version and horizon <= self.horizon:
            return self
        else:
            copied = bool(delta.keys)
            page = Page(
                version,
                self.low,
                self.high,
                self.horizon,
                self.keys[:] if copied else self.keys,
                self.values[:] if copied else self.values,
                self.versions[:] if copied else self.versions,
                self.written[:] if copied else self.written,
            )
        page._apply_rows(delta, wiped)
        return page._expire(horizon)

    def _apply_rows(self, delta: Rows, wiped: int) -> None:
        """Apply rows in place; only for a page that nobody else has seen."""
        for at, key in enumerate(delta.keys):
            kind = delta.kinds[at]
            if kind == WIPE or delta.versions[at] <= wiped or not self.contains(key):
                continue
            place = bisect_left(self.keys, key)
            present = place < len(self.keys) and self.keys[place] == key
            if kind == DELETE:
                if present:
                    del self.keys[place], self.values[place], self.versions[place], self.written[place]
            elif present:
                self.values[place] = delta.values[at]
                self.versions[place] = delta.versions[at]
                self.written[place] = delta.written[at]
            else:
                self.keys.insert(place, key)
                self.values.insert(place, delta.values[at])
                self.versions.insert(place, delta.versions[at])
                self.written.insert(place, delta.written[at])

    def _expire(self, horizon: int) -> Page:
        """The page without items of a timestamp below `horizon`, which never decreases."""
        if horizon <= self.horizon and horizon == MIN_TIMESTAMP:
            return self
        horizon = max(horizon, self.horizon)
        floor = timestamp_floor(horizon)
        first = bisect_left(self.keys, floor)
        # All below the horizon is gone for ever, so a page that reaches it reaches the oldest item.
        low = b"" if floor >= self.low else self.low
        return self._from(first, low, horizon)

    def _from(self, first: int, low: bytes, horizon: int) -> Page:
        if first == 0:
            columns = (self.keys, self.values, self.versions, self.written)
        else:
            columns = (self.keys[first:], self.values[first:], self.versions[first:], self.written[first:])
        return Page(self.version, low, self.high, horizon, *columns)

    def extend(self, older: Page) -> Page:
        """This page and the piece right below it, both at one version. Raises ValueError if they don't meet."""
        if older.version != self.version or older.high != self.low or not self.low:
            raise ValueError("only a piece that ends where the page starts, at the same version, extends it")
        page = Page(
            self.version,
            older.low,
            self.high,
            self.horizon,
            older.keys + self.keys,
            older.values + self.values,
            older.versions + self.versions,
            older.written + self.written,
        )
        return page._expire(older.horizon)

    def trim(self, max_items: int, max_bytes: int) -> Page:
        """The page without its oldest items, so that it has at most `max_items`, in at most `max_bytes` of memory.

        The newest item stays even if it alone exceeds `max_bytes`.
        """
        first = max(0, len(self.keys) - max_items)
        if self.nbytes > max_bytes:
            size = _PAGE_OVERHEAD_BYTES
            for at in range(len(self.keys) - 1, first - 1, -1):
                size += len(self.keys[at]) + len(self.values[at]) + _ITEM_OVERHEAD_BYTES
                if size > max_bytes:
                    first = min(at + 1, len(self.keys) - 1)
                    break
        return self if first == 0 else self._from(first, self.keys[first], self.horizon)


def merge(hot: Rows, cold: Sequence[Rows], *, wiped: int, horizon: int) -> Rows:
    """Visible items of hot rows (tombstones included) and rows of blocks: newest first, one row an item.

    Of several rows of one item the greatest version counts. A tombstone hides its item, a row of a version up to
    `wiped` is deleted, an item with a timestamp below `horizon` has expired.
    """
    floor = timestamp_floor(horizon)
    joined = _joined([rows for rows in (hot, *cold) if rows.keys])
    if _is_plain(joined, wiped, floor):
        return joined
    best: dict[bytes, tuple[int, int, bytes, int]] = {}
    for rows in (hot, *cold):
        for key, kind, value, version, written in zip(
            rows.keys, rows.kinds, rows.values, rows.versions, rows.written, strict=True
        ):
            if version > wiped and key >= floor:
                known = best.get(key)
                if known is None or version > known[0]:
                    best[key] = (version, kind, value, written)
    return _columns((key, *best[key]) for key in sorted(best, reverse=True) if best[key][1] == PUT)


def _joined(parts: list[Rows]) -> Rows:
    """Rows of all parts, those with the newest items first: the blocks of a long timeline follow one another."""
    if len(parts) == 1:
        return parts[0]
    joined = Rows()
    for rows in sorted(parts, key=lambda rows: rows.keys[0], reverse=True):
        joined.keys += rows.keys
        joined.kinds += rows.kinds
        joined.values += rows.values
        joined.versions += rows.versions
        joined.written += rows.written
    return joined


def _is_plain(rows: Rows, wiped: int, floor: bytes) -> bool:
    """Whether all rows are visible as they are: distinct, descending items without tombstones."""
    keys = rows.keys
    return not keys or (
        rows.kinds.count(PUT) == len(keys)
        and keys[-1] >= floor
        and min(rows.versions) > wiped
        and all(map(bytes.__gt__, keys, keys[1:]))
    )


def _columns(items: Iterable[tuple[bytes, int, int, bytes, int]]) -> Rows:
    rows = Rows()
    kinds = bytearray()
    for key, version, kind, value, written in items:
        rows.keys.append(key)
        kinds.append(kind)
        rows.values.append(value)
        rows.versions.append(version)
        rows.written.append(written)
    rows.kinds = bytes(kinds)
    return rows
