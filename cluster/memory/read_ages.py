"""How old is what is read: items by table and age at the moment of the read, over the last hour and day (*pure*).

The path of a read is too short to count each one. So after the first `EXACT_READS` of a minute only one message in
`EVERY` is looked at, at random distances, so that no rhythm of the callers goes along with them; and of a message at
most `MAX_ITEMS` reads of items or `MAX_PAGES` of pages, evenly spaced. What is noted counts for the others. Where
little is read the figures are exact, where much is read they are estimates.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from random import Random

from ..ages import BINS, edges_of
from ..keys import timestamp_floor
from ..messages import ReadAges, pack_i64
from ..topology import TablePolicy
from .columns import NO_PAGE, Glance
from .pages import Page
from .requests import PageAnswer, Read

EVERY = 16
EXACT_READS = 2_000  # of a minute
MAX_ITEMS = 64  # reads of one message that are noted
MAX_PAGES = 8
MAX_TABLES = 64  # that are counted apart; further ones share a line
INTERVAL_S = 300
INTERVALS_PER_HOUR = 12
INTERVALS_PER_DAY = 288
_OTHERS = b""
_SIGN = 1 << 63
_KEY_BYTES = 8  # of an item key, that tell its timestamp
_EDGES_S = 1.0  # for so long "now" stays the same


class ReadAgeCounter:
    """Counts reads of one node. Memory: at most 65 tables x 289 intervals x 9 numbers, some 8 MB."""

    def __init__(
        self,
        policy: Callable[[str], TablePolicy | None],
        *,
        clock: Callable[[], float],
        wall_us: Callable[[], int],
        random: Random,
        every: int = EVERY,
        exact_reads: int = EXACT_READS,
    ) -> None:
        """`policy`: of a table by name; what has none is not counted. `clock`: monotonic seconds; `wall_us`:
        microseconds since 1970. `every`, `exact_reads`: see the module's text.
        """
        self._policy = policy
        self._clock = clock
        self._wall_us = wall_us
        self._random = random
        self._every = every
        self._exact_reads = exact_reads
        self._wait = 0  # messages that pass by unnoted
        self._minute = -1
        self._exact_left = 0
        self._is_exact = True
        self._intervals: dict[int, dict[bytes, list[int]]] = {}  # counts by bin, youngest first
        self._present: dict[bytes, list[int]] = {}
        self._interval = -1
        self._per_second: dict[bytes, int] = {}  # of tables seen; 0 for one without a policy
        self._edges: dict[int, list[int]] = {}  # by units per second
        self._edges_until = 0.0

    def wants(self, reads: int) -> int:
        """For how many messages the one that came counts, with so many reads; 0 if it is not to be noted."""
        self._wait -= 1
        return 0 if self._wait >= 0 else self._choose(reads)

    def _choose(self, reads: int) -> int:
        minute = int(self._clock() / 60)
        if minute != self._minute:
            self._minute, self._exact_left = minute, self._exact_reads
        if reads <= self._exact_left:
            self._exact_left -= reads
            self._wait, self._is_exact = 0, True
            return 1
        self._wait = self._random.randrange(2 * self._every - 1)
        if self._is_exact:  # the sample begins: this message is one of those among which one is drawn
            self._is_exact = False
            return 0
        return self._every

    def forget_policies(self) -> None:
        """Policies of tables may have changed."""
        self._per_second.clear()

    def note_items(self, weight: int, timelines: Sequence[bytes], keys: Sequence[bytes]) -> None:
        """Single items were asked for, whether or not they are there. `weight`: what `wants` gave."""
        self._advance()
        step, places = self._sample(len(keys), MAX_ITEMS)
        for place in places:
            timeline, key = timelines[place], keys[place]
            if len(timeline) > _KEY_BYTES - 4 and len(key) >= _KEY_BYTES:
                table = timeline[5 : 5 + timeline[4]]
                edges = self._edges_of(table)
                if edges is not None:
                    older = bisect_right(edges, int.from_bytes(key[:_KEY_BYTES], "big") - _SIGN)
                    self._counts(table)[BINS - 1 - older] += weight * step

    def note_pages(
        self,
        weight: int,
        timelines: Sequence[bytes],
        glance: Glance,
        before: Sequence[bytes],
        limits: Sequence[int],
        reads: Mapping[int, Read],
    ) -> None:
        """Pages were read: the items of pages in memory (`glance`), and those of the answers of `reads` by index.
        `weight`: what `wants` gave."""
        self._advance()
        step, places = self._sample(len(timelines), MAX_PAGES)
        for place in places:
            timeline = timelines[place]
            table = timeline[5 : 5 + timeline[4]] if len(timeline) > _KEY_BYTES - 4 else b""
            edges = self._edges_of(table)
            if edges is None:
                continue
            page, read = glance.pages[place], reads.get(place)
            if page is not NO_PAGE:
                found = _ages_in_page(page, before[place], limits[place], edges)
            elif read is not None and isinstance(read.answer, PageAnswer):
                found = _ages_of([item.timestamp for item in read.answer.items.unpacked()[::-1]], edges)
            else:
                continue
            counts = self._counts(table)
            for bin_, count in enumerate(found):
                counts[BINS - 1 - bin_] += weight * step * count

    def read(self) -> ReadAges:
        """What was counted, tables by name."""
        self._advance()
        tables = sorted({table for interval in self._intervals.values() for table in interval})
        return ReadAges(tables, self._column(tables, INTERVALS_PER_HOUR), self._column(tables, INTERVALS_PER_DAY))

    def _column(self, tables: list[bytes], intervals: int) -> bytes:
        """Counts over the present interval and so many before it."""
        sums = {table: [0] * BINS for table in tables}
        for number, counts in self._intervals.items():
            if number >= self._interval - intervals:
                for table, by_bin in counts.items():
                    sums[table] = [a + b for a, b in zip(sums[table], by_bin, strict=True)]
        return pack_i64([count for table in tables for count in sums[table]])

    def _sample(self, reads: int, at_most: int) -> tuple[int, range]:
        """For how many reads of a message each one counts that is noted, and which are to be noted."""
        step = -(-reads // at_most) or 1
        return step, range(self._random.randrange(step), reads, step)

    def _advance(self) -> None:
        """Begin another interval when it is time, and forget what is older than a day."""
        number = int(self._clock() / INTERVAL_S)
        if number != self._interval:
            self._interval = number
            self._present = self._intervals.setdefault(number, {})
            oldest = number - INTERVALS_PER_DAY
            self._intervals = {at: counts for at, counts in self._intervals.items() if at >= oldest}

    def _counts(self, table: bytes) -> list[int]:
        """Of the present interval."""
        counts = self._present.get(table)
        if counts is None:
            if len(self._present) >= MAX_TABLES:
                table = _OTHERS
            counts = self._present.setdefault(table, [0] * BINS)
        return counts

    def _edges_of(self, table: bytes) -> list[int] | None:
        """Timestamps between the bins, None for a table that there is not."""
        per_second = self._per_second.get(table)
        if per_second is None:
            policy = self._policy(table.decode(errors="replace")) if table else None
            if len(self._per_second) >= 16 * MAX_TABLES:
                self._per_second.clear()
            per_second = self._per_second[table] = policy.per_second if policy is not None else 0
        if not per_second:
            return None
        if self._clock() >= self._edges_until:
            self._edges.clear()
            self._edges_until = self._clock() + _EDGES_S
        edges = self._edges.get(per_second)
        if edges is None:
            edges = self._edges[per_second] = edges_of(self._wall_us(), per_second)
        return edges


def ages_between(keys: Sequence[bytes], first: int, end: int, edges: Sequence[int]) -> list[int]:
    """Where the bins end among ascending item keys: keys[first:end] by bin, in the order of edges."""
    ends = [bisect_left(keys, timestamp_floor(edge), first, end) for edge in edges]
    bounds = [first, *ends, end]
    return [after - before for before, after in zip(bounds, bounds[1:], strict=False)]  # noqa: RUF007


def _ages_in_page(page: Page, before: bytes, limit: int, edges: Sequence[int]) -> list[int]:
    """Ages of the newest `limit` items of a page that are older than `before`."""
    end = bisect_left(page.keys, before) if before else len(page.keys)
    return ages_between(page.keys, max(0, end - limit), end, edges)


def _ages_of(timestamps: Sequence[int], edges: Sequence[int]) -> list[int]:
    """Ages of ascending timestamps."""
    bounds = [0, *(bisect_left(timestamps, edge) for edge in edges), len(timestamps)]
    return [after - before for before, after in zip(bounds, bounds[1:], strict=False)]  # noqa: RUF007
