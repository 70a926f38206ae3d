"""Where nothing can be old enough to sink yet, so that the sink need not look again (*pure*).

A scan that has looked at all rows of a table in a bucket and found none that may sink knows a *bound* (E, W): each row
has a timestamp >= E or was written >= W, so no cut-offs up to these let any go. Rows that come later are checked
against the bound when they are written: one that lies below E and was written before W lowers W in the same write.
Whatever else happens to rows takes some away, which leaves a bound true; a state that is installed as a whole removes
it.

One engine row for each table of a bucket: `Q bucket table` -> (E, W). All of them are in memory, which is a matter of
buckets and tables, not of data.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..keys import MAX_TIMESTAMP, timestamp_floor

if TYPE_CHECKING:
    from .core import Core

MAX_BOUNDS = 200_000
_BOUND = struct.Struct("<qq")
_PREFIX = b"Q"


class Quiet:
    """Bounds of one replica, by bucket and table as a timeline's key begins with them."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._bounds: dict[bytes, tuple[int, int]] = {}
        self._scans: dict[bytes, int] = {}  # the last scan that looks at all of a table in a bucket, while nothing came
        self._last_scan = 0
        for key, row in core.engine.scan(_PREFIX, b"R"):
            event, written = _BOUND.unpack(row)
            self._bounds[key[1:]] = event, written

    def covers(self, place: bytes, event_before: int, written_before: int) -> bool:
        """Whether nothing of a table in a bucket may sink by these cut-offs."""
        bound = self._bounds.get(place)
        return bound is not None and event_before <= bound[0] and written_before <= bound[1]

    def begin(self, place: bytes) -> int:
        """A scan begins to look at everything. Its number, for `end`."""
        self._last_scan += 1
        self._scans[place] = self._last_scan
        return self._last_scan

    def end(self, place: bytes, scan: int, oldest: int, written: int) -> None:
        """It has found nothing. `oldest`: least timestamp of the rows that it did not look at, MAX_TIMESTAMP without
        any; `written`: least time at which one of the others was written."""
        if self._scans.get(place) != scan:
            return  # something was written meanwhile
        del self._scans[place]
        if place in self._bounds or len(self._bounds) < MAX_BOUNDS:
            self._put(place, oldest, written)

    @property
    def watches(self) -> bool:
        """Whether there is anything to be noted."""
        return bool(self._bounds or self._scans)

    def note(self, timeline: bytes, written: int, keys: Sequence[bytes]) -> None:
        """Rows of items are written in the pending batch."""
        if not (self._bounds or self._scans):
            return
        place = place_of(timeline)
        self._scans.pop(place, None)
        bound = self._bounds.get(place)
        if bound is None or written >= bound[1]:
            return
        low = timestamp_floor(bound[0])
        if any(item and item < low for item in keys):
            self._put(place, bound[0], written)

    def forget(self, timeline: bytes) -> None:
        """Rows of a timeline are replaced in the pending batch by others, of any age."""
        place = place_of(timeline)
        self._scans.pop(place, None)
        if self._bounds.pop(place, None) is not None:
            self._core.engine.delete(_PREFIX + place)

    def _put(self, place: bytes, event: int, written: int) -> None:
        self._bounds[place] = event, written
        self._core.engine.put(_PREFIX + place, _BOUND.pack(min(event, MAX_TIMESTAMP), min(written, MAX_TIMESTAMP)))


def place_of(timeline: bytes) -> bytes:
    """Bucket and table, as a timeline's key begins with them."""
    return timeline[: 5 + timeline[4]]
