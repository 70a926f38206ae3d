"""Rows that have expired are freed from the engine, a slice at a time (*pure*).

Items with a timestamp below the chosen horizon of their table are invisible for ever, in every tier (`standings.py`).
The rows of the storage tier go: all versions up to the last chosen one, tombstones too. That raises the timeline's
floor in the same write, so the log is never asked for a value that is gone. Rows of an open entry stay until it is
chosen.

When: as soon as a replica has applied a horizon, and a while after rows were written below it. Both are noted on disk
in the same write as what they are due to, as a row `X bucket table`, which goes when all of the table's timelines in
the bucket have been gone through; so a crash forgets nothing, and what is done twice does no harm.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING

from ..keys import MIN_TIMESTAMP, timestamp_floor
from .quiet import place_of
from .rows import prefix_end, rows_prefix, version_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .core import Core
    from .timeline import Timeline

_PREFIX = b"X"
_SEEKS_PER_SLICE = 30

Delete = Callable[["Timeline", list[bytes], int], None]
"""Deletes rows of a timeline by name, and raises its floor to the version, in one write."""
Settle = Callable[["Timeline", float], None]
"""Finds out whether the open entry of a timeline was chosen."""


class Expiry:
    """What has expired and may still be there, by bucket and table (`quiet.place_of`)."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._floors: dict[bytes, bytes] = {}  # the least item key that has not expired
        self._due: dict[bytes, int] = {}  # what is noted on disk -> how often it was noted
        self._queue: list[tuple[float, bytes]] = []  # when to go through it
        self._left: set[bytes] = set()  # timelines of which expired rows had to stay, because their entry was open
        self._now = 0.0
        for name, _ in core.engine.scan(_PREFIX, b"Y"):
            self._due[name[1:]] = 1
            self._queue.append((0.0, name[1:]))

    # ---- what is noted

    @property
    def watches(self) -> bool:
        """Whether any table has a horizon."""
        return bool(self._floors)

    @property
    def pending(self) -> int:
        """How many tables in buckets have to be gone through."""
        return len(self._due)

    def load(self, place: bytes, horizon: int) -> None:
        """A horizon that an earlier life has applied; what it was due to is noted."""
        if horizon != MIN_TIMESTAMP:
            self._floors[place] = timestamp_floor(horizon)

    def moved(self, place: bytes, horizon: int) -> None:
        """The replica has applied a horizon. What it hides is to go."""
        floor = timestamp_floor(horizon)
        if horizon != MIN_TIMESTAMP and self._floors.get(place) != floor:
            self._floors[place] = floor
            if self._core.quiet.may_be_below(place, floor):
                self._note(place)
                heapq.heappush(self._queue, (0.0, place))

    def note(self, timeline: bytes, keys: Sequence[bytes]) -> None:
        """Rows of items are written in the pending batch."""
        place = place_of(timeline)
        floor = self._floors.get(place)
        if floor is not None:
            least = keys[0] if len(keys) == 1 else min(filter(None, keys), default=b"")
            if least and least < floor:
                if place not in self._due:
                    heapq.heappush(self._queue, (self._now + self._core.settings.expire_rest_s, place))
                self._note(place)

    def _note(self, place: bytes) -> None:
        if place not in self._due:
            self._core.engine.put(_PREFIX + place, b"")
        self._due[place] = self._due.get(place, 0) + 1

    # ---- the chore

    def next(self, now: float) -> bytes | None:
        """Which table of which bucket is to be gone through at this time, None for none."""
        self._now = now
        while self._queue and self._queue[0][0] <= now:
            place = heapq.heappop(self._queue)[1]
            if place in self._due:
                return place
        return None

    def sweep(self, place: bytes, now: float, delete: Delete, settle: Settle) -> Iterator[bool]:
        """Free the expired rows of a table in a bucket. Yields True after each slice."""
        noted, floor = self._due[place], self._floors.get(place)
        is_complete = True
        start = b"R" + place
        at, end = start, prefix_end(start)
        for seeks in itertools.count(1):
            row = None if floor is None else next(iter(self._core.engine.scan(at, end)), None)
            if row is None or floor is None:
                break
            key = row[0][1 : len(start) + 1 + row[0][len(start)]]
            prefix = rows_prefix(key)
            if row[0] < prefix + floor:
                is_complete &= yield from self._free(self._core.timeline(key), prefix + floor, now, delete, settle)
            at = prefix_end(prefix)
            if seeks % _SEEKS_PER_SLICE == 0:
                yield True
        if is_complete and self._due[place] == noted:
            del self._due[place]
            self._core.engine.delete(_PREFIX + place)
            if floor is not None:
                self._core.quiet.nothing_below(place, floor)
        else:
            heapq.heappush(self._queue, (now + self._core.settings.expire_rest_s, place))

    def _free(
        self, timeline: Timeline, high: bytes, now: float, delete: Delete, settle: Settle
    ) -> Generator[bool, None, bool]:
        """Delete the rows of one timeline below `high`. False if some had to stay."""
        doomed: list[bytes] = []
        kept = False
        for seen, (name, _) in enumerate(self._core.engine.scan(rows_prefix(timeline.key), high), 1):
            if version_of(name) <= timeline.chosen:
                doomed.append(name)
            else:
                kept = True
            if seen % self._core.settings.chore_rows == 0:
                self._delete(timeline.key, doomed, delete)
                doomed = []
                yield True
        self._delete(timeline.key, doomed, delete)
        if not kept:
            self._left.discard(timeline.key)
        elif timeline.key in self._left:
            settle(self._core.timeline(timeline.key), now)  # after a restart nobody may remember that it was chosen
        else:
            self._left.add(timeline.key)
        return not kept

    def _delete(self, key: bytes, doomed: list[bytes], delete: Delete) -> None:
        if doomed:
            delete(self._core.timeline(key), doomed, max(map(version_of, doomed)))
            self._core.counters.add("rows_expired", len(doomed))
