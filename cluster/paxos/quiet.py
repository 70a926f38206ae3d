"""Where nothing can be old enough to sink yet, so that the sink need not look again (*pure*).

A scan that has looked at all rows of a table in a bucket and found none that may sink knows a *bound* (E, W, O): each
row has a timestamp >= E or was written >= W, so no cut-offs up to these let any go; and each has a timestamp >= O, so
none has expired by a horizon up to that. Rows that come later are checked against the bound when they are written: one
that lies below E and was written before W lowers W, one below O lowers O, in the same write. Whatever else happens to
rows takes some away, which leaves a bound true; a state that is installed as a whole removes it.

Rows below the retention horizon count for O alone: nobody sees them, and they never sink.

One engine row for each table of a bucket: `Q bucket table` -> (E, W, O). All of them are in memory, which is a matter
of buckets and tables, not of data.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..keys import MAX_TIMESTAMP, split_item_key, timestamp_floor

if TYPE_CHECKING:
    from .core import Core

MAX_BOUNDS = 500_000  # some 330 bytes each
_BOUND = struct.Struct("<qqq")
_PREFIX = b"Q"


class Bound(NamedTuple):
    """See the module's text. `floor`: O as the least byte string that an item key of that instant begins with."""

    event: int
    written: int
    floor: bytes


class Quiet:
    """Bounds of one replica, by bucket and table as a timeline's key begins with them."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self.bounds: dict[bytes, Bound] = {}
        self._scans: dict[bytes, int] = {}  # the last scan that looks at all of a table in a bucket, while nothing came
        self._last_scan = 0
        for key, row in core.engine.scan(_PREFIX, b"R"):
            if len(row) == _BOUND.size:  # else it is of an earlier format, and the next scan makes another one
                event, written, oldest = _BOUND.unpack(row)
                self.bounds[key[1:]] = Bound(event, written, timestamp_floor(oldest))

    def covers(self, place: bytes, event_before: int, written_before: int) -> bool:
        """Whether nothing of a table in a bucket may sink by these cut-offs."""
        bound = self.bounds.get(place)
        return bound is not None and event_before <= bound.event and written_before <= bound.written

    def may_be_below(self, place: bytes, floor: bytes) -> bool:
        """Whether a table may have rows in a bucket of a key below `floor`."""
        bound = self.bounds.get(place)
        return bound is None or bound.floor < floor

    def begin(self, place: bytes) -> int:
        """A scan begins to look at everything. Its number, for `end`."""
        self._last_scan += 1
        self._scans[place] = self._last_scan
        return self._last_scan

    def end(self, place: bytes, scan: int, event: int, written: int, oldest: int) -> None:
        """It has found nothing. `event`: least timestamp of the rows that it did not look at, MAX_TIMESTAMP without
        any; `written`: least time at which one of the others was written; `oldest`: least timestamp of all rows."""
        if self._scans.get(place) != scan:
            return  # something was written meanwhile
        del self._scans[place]
        if place in self.bounds or len(self.bounds) < MAX_BOUNDS:
            self.put(place, Bound(event, written, timestamp_floor(oldest)))

    @property
    def watches(self) -> bool:
        """Whether there is anything to be noted."""
        return bool(self.bounds or self._scans)

    def note(self, timeline: bytes, written: int, keys: Sequence[bytes]) -> None:
        """Rows of items are written in the pending batch."""
        if not (self.bounds or self._scans):
            return
        place = place_of(timeline)
        self._scans.pop(place, None)
        bound = self.bounds.get(place)
        if bound is None:
            return
        event, bound_written, floor = bound
        least = keys[0] if len(keys) == 1 else min(filter(None, keys), default=b"")
        if not least or (least >= floor and written >= bound_written):
            return
        if written < bound_written and least < timestamp_floor(event):
            bound_written = written
        if least < floor:
            floor = least[:8]
        if (bound_written, floor) != bound[1:]:
            self.put(place, Bound(event, bound_written, floor))

    def nothing_below(self, place: bytes, floor: bytes) -> None:
        """All rows with keys below `floor` are gone."""
        bound = self.bounds.get(place)
        if bound is not None and bound.floor < floor:
            self.put(place, bound._replace(floor=floor))

    def forget(self, timeline: bytes) -> None:
        """Rows of a timeline are replaced in the pending batch by others, of any age."""
        place = place_of(timeline)
        self._scans.pop(place, None)
        if self.bounds.pop(place, None) is not None:
            self._core.engine.delete(_PREFIX + place)

    def put(self, place: bytes, bound: Bound) -> None:
        """Go by a bound from now on."""
        self.bounds[place] = bound
        event, written, floor = bound
        oldest = split_item_key(floor[:8])[0] if len(floor) == 8 else MAX_TIMESTAMP
        row = _BOUND.pack(min(event, MAX_TIMESTAMP), min(written, MAX_TIMESTAMP), oldest)
        self._core.engine.put(_PREFIX + place, row)


def place_of(timeline: bytes) -> bytes:
    """Bucket and table, as a timeline's key begins with them."""
    return timeline[: 5 + timeline[4]]


def place_in(bucket_bytes: bytes, table: bytes) -> bytes:
    """The same of a bucket (`bucket_prefix`) and a table's name."""
    return bucket_bytes + bytes((len(table),)) + table
