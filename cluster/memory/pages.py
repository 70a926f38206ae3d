"""Pages: a contiguous piece of one timeline, complete as of one version (*pure*).

A page covers the key range [low, high) at version v: every item that is visible in that range at v is in it, and
nothing else. `low` = b"" reaches the oldest item, `high` = b"" the newest. A page never changes: what happens to it
(a delta, an extension, a trim) gives another page, which may share its columns. So a script that holds a page keeps
a consistent one, whatever other scripts put into the cache meanwhile.

Its items are kept as they travel, so that an answer is a slice: `keys` (ascending item keys), `packed` (what
`packed_items` makes of the items, in the order of the keys) and `starts` (where each begins in `packed`, and where the
last one ends).
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from ..keys import MIN_TIMESTAMP, timestamp_floor
from ..messages import PUT, WIPE
from ..packed_items import Item, pack_items, unpack_items

_BYTES_HEADER = 40  # of a bytes object: 33, and on average 7 to the next multiple of 16
_ITEM_OVERHEAD_BYTES = _BYTES_HEADER + 2 * 8  # the key, and two column slots
_PAGE_OVERHEAD_BYTES = 520  # the page, its columns, low, high and label


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

    def packed(self, places: Sequence[int]) -> list[bytes]:
        """The items at these places, packed."""
        return pack_items(
            [self.keys[at] for at in places],
            [self.values[at] for at in places],
            [self.versions[at] for at in places],
            [self.written[at] for at in places],
        )


@dataclass(slots=True)
class PageSlice:
    """`count` items of a page, oldest first, packed. `more`: older items than these may exist."""

    count: int
    packed: bytes
    more: bool

    def unpacked(self) -> list[Item]:
        """The items, newest first."""
        return unpack_items(self.packed, self.count)[::-1]


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
        "packed",
        "starts",
        "used",
        "version",
    )

    def __init__(
        self,
        version: int,
        low: bytes,
        high: bytes,
        horizon: int,
        keys: list[bytes],
        packed: bytes,
        starts: array[int],
    ) -> None:
        self.version = version
        self.low = low
        self.high = high
        self.horizon = horizon
        self.keys = keys
        self.packed = packed
        self.starts = starts
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
        keys = rows.keys[first:end][::-1]
        items = rows.packed(range(end - 1, first - 1, -1))
        starts = array("q", accumulate(map(len, items), initial=0))
        return cls(version, low, high, horizon, keys, b"".join(items), starts)._expire(horizon)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def nbytes(self) -> int:
        """Memory that the page occupies, object headers included, in bytes."""
        if not self._nbytes:
            data = sum(map(len, self.keys)) + len(self.packed)
            self._nbytes = _PAGE_OVERHEAD_BYTES + len(self.keys) * _ITEM_OVERHEAD_BYTES + data
        return self._nbytes

    def contains(self, key: bytes) -> bool:
        """Whether the page's range covers an item key, so that it can tell whether the item exists."""
        return key >= self.low and (not self.high or key < self.high)

    def find(self, key: bytes) -> bytes:
        """The packed item with that key, b"" if there is none."""
        at = bisect_left(self.keys, key)
        return self.packed_item(at) if at < len(self.keys) and self.keys[at] == key else b""

    def packed_item(self, place: int) -> bytes:
        """The packed item at a place in the columns."""
        return self.packed[self.starts[place] : self.starts[place + 1]]

    def unpacked(self) -> list[Item]:
        """All items, oldest first."""
        return unpack_items(self.packed, len(self.keys))

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

        Fewer come when there are no more, or when packed they would exceed `max_bytes` (then at least one).
        """
        if self.high and (not before or before > self.high):
            return None
        end = bisect_left(self.keys, before) if before else len(self.keys)
        if before and before < self.low:
            return None
        start = max(0, end - limit)
        starts = self.starts
        cut = start
        if starts[end] - starts[start] > max_bytes:  # least place from which all fit
            cut = min(bisect_left(starts, starts[end] - max_bytes, start, end), end - 1)
        if cut == start and end - start < limit and self.low:
            return None
        return PageSlice(end - cut, self.packed[starts[cut] : starts[end]], cut > 0 or bool(self.low))

    def apply(self, delta: Rows, *, version: int, wiped: int, horizon: int) -> Page:
        """The page at `version`, given every row that was chosen after its own version, in log order.

        `wiped`: items of a version up to this one are deleted. A row outside of the range is not this page's
        business. After a wipe the page reaches the oldest item, because the delta holds all that came later.
        """
        for row_kind, row_version in zip(delta.kinds, delta.versions, strict=True):
            if row_kind == WIPE:
                wiped = max(wiped, row_version - 1)  # what its own entry writes comes after the wipe
        if wiped >= self.version:
            page = Page(version, b"", self.high, self.horizon, [], b"", array("q", (0,)))
        elif not delta.keys and version == self.version and horizon <= self.horizon:
            return self
        else:
            page = Page(version, self.low, self.high, self.horizon, self.keys, self.packed, self.starts)
        return page._changed(delta, wiped)._expire(horizon)

    def _changed(self, delta: Rows, wiped: int) -> Page:
        """The page with the rows of a delta, those that are its business."""
        last = {  # of several rows of an item
            key: at
            for at, (key, kind, version) in enumerate(zip(delta.keys, delta.kinds, delta.versions, strict=True))
            if kind != WIPE and version > wiped and self.contains(key)
        }
        if not last:
            return self
        written = [at for at in last.values() if delta.kinds[at] == PUT]
        changes = dict.fromkeys(last, b"")  # packed items by key, b"" where one is deleted
        changes |= zip([delta.keys[at] for at in written], delta.packed(written), strict=True)
        keys: list[bytes] = []
        parts: list[bytes] = []
        starts = array("q", (0,))
        place = 0
        for key in sorted(changes):
            until = bisect_left(self.keys, key, place)
            self._copy(place, until, keys, parts, starts)
            place = until + (until < len(self.keys) and self.keys[until] == key)
            if item := changes[key]:
                keys.append(key)
                parts.append(item)
                starts.append(starts[-1] + len(item))
        self._copy(place, len(self.keys), keys, parts, starts)
        return Page(self.version, self.low, self.high, self.horizon, keys, b"".join(parts), starts)

    def _copy(self, first: int, end: int, keys: list[bytes], parts: list[bytes], starts: array[int]) -> None:
        """Append the items at [first, end) to other columns."""
        if first == end:
            return
        keys += self.keys[first:end]
        parts.append(self.packed[self.starts[first] : self.starts[end]])
        shift = starts[-1] - self.starts[first]
        ends = self.starts[first + 1 : end + 1]
        starts += array("q", [one + shift for one in ends]) if shift else ends

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
            return Page(self.version, low, self.high, horizon, self.keys, self.packed, self.starts)
        shift = self.starts[first]
        starts = array("q", [start - shift for start in self.starts[first:]])
        return Page(self.version, low, self.high, horizon, self.keys[first:], self.packed[shift:], starts)

    def extend(self, older: Page) -> Page:
        """This page and the piece right below it, both at one version. Raises ValueError if they don't meet."""
        if older.version != self.version or older.high != self.low or not self.low:
            raise ValueError("only a piece that ends where the page starts, at the same version, extends it")
        keys, packed = older.keys + self.keys, older.packed + self.packed
        shift = older.starts[-1]
        starts = older.starts + array("q", [start + shift for start in self.starts[1:]])
        return Page(self.version, older.low, self.high, self.horizon, keys, packed, starts)._expire(older.horizon)

    def trim(self, max_items: int, max_bytes: int) -> Page:
        """The page without its oldest items, so that it has at most `max_items`, in at most `max_bytes` of memory.

        The newest item stays even if it alone exceeds `max_bytes`.
        """
        first = max(0, len(self.keys) - max_items)
        if self.nbytes > max_bytes:
            size = _PAGE_OVERHEAD_BYTES
            for at in range(len(self.keys) - 1, first - 1, -1):
                size += len(self.keys[at]) + self.starts[at + 1] - self.starts[at] + _ITEM_OVERHEAD_BYTES
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
