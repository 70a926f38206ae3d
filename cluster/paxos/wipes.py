"""Timelines that were wiped while cold blocks still hold their rows (*pure*).

A WIPE hides rows in blocks at once. They go when the sink writes the window's next generation, and the sink must be
told, since the timeline may have no row left in the storage tier by which a scan would find it.

| key | value | meaning |
|---|---|---|
| `V timeline` | version | it was wiped up to this version, once; stays, as a link may come that was read before |
| `W timeline` | version | links hold rows of it that are wiped (`Link.holds_wiped`): a scan reports it |

Both are written by chores: by that of the WIPE (or of the state that brought one), in the write in which the chore's
own note goes, and by that of each link. So from the wipe being chosen to the last block being rewritten there is always
a note on disk. A `W` row goes when no link of the table holds rows that are wiped: each names the timeline as of a
later version, or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from ..keys import split_timeline, timeline_hash
from .quiet import place_of
from .rows import prefix_end

if TYPE_CHECKING:
    from ..cold.link import Link
    from .core import Core

_WIPED, _HELD = b"V", b"W"
_VERSION_BYTES = 8


class Wipes:
    """The notes of one replica. `held`: by bucket and table (`quiet.place_of`), how many `W` rows there are."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self.held: dict[bytes, int] = {}
        for name, _ in core.engine.scan(_HELD, b"X"):
            self._count(place_of(name[1:]), 1)

    def note(self, timeline: bytes, wiped: int, links: Sequence[Link]) -> None:
        """A timeline was wiped up to a version."""
        self._core.engine.put(_WIPED + timeline, wiped.to_bytes(_VERSION_BYTES, "big"))
        self._check(timeline, wiped, links)

    def check_all(self, place: bytes, links: Sequence[Link]) -> Iterator[bool]:
        """The links of a table in a bucket have changed: see which of its wiped timelines they hold. Yields True after
        each slice."""
        at = _WIPED + place
        while True:
            part = list(islice(self._core.engine.scan(at, prefix_end(_WIPED + place)), self._core.settings.chore_rows))
            for name, row in part:
                self._check(name[1:], int.from_bytes(row, "big"), links)
            if len(part) < self._core.settings.chore_rows:
                return
            at = part[-1][0] + b"\x00"
            yield True

    def tables_of(self, bucket_bytes: bytes) -> list[bytes]:
        """Tables with `W` rows in a bucket, by the bucket as a timeline's key begins with it."""
        return [place[5:] for place in self.held if place.startswith(bucket_bytes)]

    def next(self, place: bytes, cursor: bytes) -> bytes | None:
        """The first timeline from `cursor` (a timeline) on that is to be reported."""
        if place not in self.held:
            return None
        low = max(_HELD + cursor, _HELD + place)
        row = next(iter(self._core.engine.scan(low, prefix_end(_HELD + place))), None)
        return None if row is None else row[0][1:]

    def _check(self, timeline: bytes, wiped: int, links: Sequence[Link]) -> None:
        _, table, owner = split_timeline(timeline)
        owner_hash = timeline_hash(table, owner)
        is_held = any(link.holds_wiped(owner_hash, wiped) for link in links)
        was_held = self._core.engine.get(_HELD + timeline) is not None
        if is_held:
            self._core.engine.put(_HELD + timeline, wiped.to_bytes(_VERSION_BYTES, "big"))
        elif was_held:
            self._core.engine.delete(_HELD + timeline)
        self._count(place_of(timeline), is_held - was_held)

    def _count(self, place: bytes, more: int) -> None:
        count = self.held.get(place, 0) + more
        if count:
            self.held[place] = count
        else:
            self.held.pop(place, None)
