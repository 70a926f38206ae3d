"""Rows of a window's next generation: those of its blocks, under those that the storage tier has above them. *Pure*.

Of two rows of one item the greater version wins. Tombstones, rows that their timeline has wiped and rows older than
the horizon are left out. Most owners are in the blocks alone, or in the storage tier alone, or have items there that
are all younger: their rows are taken as whole columns. Only where old and young rows of an owner interleave are they
looked at one by one.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import compress, pairwise
from typing import NamedTuple

from ..keys import timestamp_floor
from ..messages import PUT
from .rows import Rows
from .sinking import Window


class _Span(NamedTuple):
    """Rows of one owner, oldest first: parallel columns, at least one row."""

    kinds: bytes
    keys: list[bytes]
    values: list[bytes]
    versions: list[int]
    written: list[int]

    def since(self, low: int) -> _Span:
        """Rows from `low` on."""
        return _Span(self.kinds[low:], self.keys[low:], self.values[low:], self.versions[low:], self.written[low:])

    def only(self, keep: list[bool]) -> _Span:
        """Rows that are to be kept."""
        return _Span(
            bytes(compress(self.kinds, keep)),
            list(compress(self.keys, keep)),
            list(compress(self.values, keep)),
            list(compress(self.versions, keep)),
            list(compress(self.written, keep)),
        )


def merge_window(window: Window, old_rows: Iterable[Rows], wiped: dict[bytes, int], horizon: int) -> Rows:
    """Rows of the window's next generation, by (owner, key).

    `old_rows`: rows of the blocks that the old link names, by (owner, key). `wiped`: by owner, of all timelines that
    were scanned: rows up to that version are deleted.
    """
    floor = timestamp_floor(horizon)
    spans: dict[bytes, list[_Span]] = {}
    for rows in old_rows if window.old is not None else ():
        for owner, span in _spans(rows):
            spans.setdefault(owner, []).append(span)
    for timeline, low, high in window.parts:
        if low < high:
            cut = slice(low, high)
            columns = timeline.keys[cut], timeline.values[cut], timeline.versions[cut], timeline.written[cut]
            spans.setdefault(timeline.owner, []).append(_Span(timeline.kinds[cut], *columns))
    merged = Rows()
    for owner in sorted(spans):
        found = spans[owner]
        follow = all(before.keys[-1] < after.keys[0] for before, after in pairwise(found))
        for span in found if follow else [_newest(found)]:
            _add(merged, owner, span, wiped.get(owner, 0), floor)
    return merged


def _spans(rows: Rows) -> Iterator[tuple[bytes, _Span]]:
    low = 0
    while low < len(rows):
        owner = rows.owners[low]
        high = bisect_right(rows.owners, owner, lo=low)
        part = rows.part(low, high)
        yield owner, _Span(bytes((PUT,)) * len(part), part.keys, part.values, part.versions, part.written)
        low = high


def _newest(spans: Sequence[_Span]) -> _Span:
    """Of each item the row with the greatest version; of two with the same one the later."""
    found: dict[bytes, tuple[int, bytes, bytes, int, int]] = {}
    for span in spans:
        for row in zip(*span, strict=True):
            held = found.get(row[1])
            if held is None or row[3] >= held[3]:
                found[row[1]] = row
    kinds, keys, values, versions, written = zip(*[found[key] for key in sorted(found)], strict=True)
    return _Span(bytes(kinds), list(keys), list(values), list(versions), list(written))


def _add(merged: Rows, owner: bytes, span: _Span, wiped: int, floor: bytes) -> None:
    """Add the rows of a span that still count."""
    if span.keys[0] < floor:
        span = span.since(bisect_left(span.keys, floor))
    if span.kinds.count(PUT) < len(span.kinds) or (span.versions and min(span.versions) <= wiped):
        span = span.only([kind == PUT and at > wiped for kind, at in zip(span.kinds, span.versions, strict=True)])
    merged.extend(Rows([owner] * len(span.keys), span.keys, span.values, span.versions, span.written))
