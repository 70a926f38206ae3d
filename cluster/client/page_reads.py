"""Reads of pages in columns: as they are asked, as they travel, as they are answered. *Pure*.

As with single items (`item_reads.py`), no object is made for a page on its way but the list of its items, which is
what the caller gets.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple, overload

from ..errors import TimeTierError
from ..messages import Pages, unpack_i64
from ..packed_items import Item


class PageQuery(NamedTuple):
    """The newest `limit` items of a timeline below `before` (an item key or a bound, exclusive; b"" = the newest)."""

    timeline: bytes
    before: bytes
    limit: int


class PageResult(NamedTuple):
    """A page, newest first. `version`: of the timeline. `more`: older items may exist."""

    version: int
    more: bool
    items: list[Item]


class PageQueries(Sequence[PageQuery]):
    """Pages that are asked for: of `timelines[i]`, below `before[i]`, `limits[i]` items."""

    __slots__ = ("before", "limits", "timelines")

    def __init__(self, timelines: list[bytes], before: list[bytes], limits: list[int]) -> None:
        self.timelines = timelines
        self.before = before
        self.limits = limits

    @classmethod
    def of(cls, queries: Iterable[PageQuery]) -> PageQueries:
        """Queries one by one as columns."""
        rows = list(queries)
        return cls([row.timeline for row in rows], [row.before for row in rows], [row.limit for row in rows])

    def __len__(self) -> int:
        return len(self.timelines)

    @overload
    def __getitem__(self, index: int) -> PageQuery: ...
    @overload
    def __getitem__(self, index: slice) -> PageQueries: ...
    def __getitem__(self, index: int | slice) -> PageQuery | PageQueries:
        if isinstance(index, slice):
            return PageQueries(self.timelines[index], self.before[index], self.limits[index])
        return PageQuery(self.timelines[index], self.before[index], self.limits[index])


class PageResults:
    """Columns of answers: `versions` of the timelines, `more` (1 where older items may exist), `items` newest first;
    `errors` by index, where a read has failed."""

    __slots__ = ("errors", "items", "more", "versions")

    def __init__(
        self,
        versions: list[int],
        more: bytes | bytearray,
        items: list[list[Item]],
        errors: dict[int, TimeTierError] | None = None,
    ) -> None:
        self.versions = versions
        self.more = more
        self.items = items
        self.errors = errors or {}

    @classmethod
    def of(cls, answer: Pages) -> PageResults:
        """The columns of a node's answer, which is not used after."""
        deque(map(list.reverse, answer.items), maxlen=0)
        return cls(unpack_i64(answer.timeline_versions), answer.more, answer.items)

    @classmethod
    def gathered(cls, count: int, parts: Iterable[tuple[Sequence[int], PageResults]]) -> PageResults:
        """`count` results from parts of them, each with the indices at which its results belong."""
        more = bytearray(count)
        results = cls([0] * count, more, [[] for _ in range(count)])
        for indices, part in parts:
            for at, index in enumerate(indices):
                results.versions[index] = part.versions[at]
                more[index] = part.more[at]
                results.items[index] = part.items[at]
            results.errors |= {indices[at]: error for at, error in part.errors.items()}
        return results

    @classmethod
    def failed(cls, count: int, error: TimeTierError) -> PageResults:
        """The same error for all."""
        return cls([0] * count, bytes(count), [[]] * count, dict.fromkeys(range(count), error))

    def __len__(self) -> int:
        return len(self.versions)

    def __getitem__(self, part: slice) -> PageResults:
        results = PageResults(self.versions[part], self.more[part], self.items[part])
        if self.errors:
            low, high, _ = part.indices(len(self))
            results.errors = {index - low: error for index, error in self.errors.items() if low <= index < high}
        return results

    def rows(self) -> list[PageResult | TimeTierError]:
        """Results one by one."""
        rows: list[PageResult | TimeTierError] = list(map(PageResult, self.versions, map(bool, self.more), self.items))
        for index, error in self.errors.items():
            rows[index] = error
        return rows


class PageColumns:
    """How a lane puts calls for pages together, and takes their results apart (see `lanes.Shape`)."""

    def merged(self, calls: Sequence[PageQueries]) -> PageQueries:
        return PageQueries(
            [timeline for call in calls for timeline in call.timelines],
            [bound for call in calls for bound in call.before],
            [limit for call in calls for limit in call.limits],
        )

    def taken(self, requests: PageQueries, indices: Sequence[int]) -> PageQueries:
        return PageQueries.of([requests[index] for index in indices])

    def gathered(self, count: int, parts: Iterable[tuple[Sequence[int], PageResults]]) -> PageResults:
        return PageResults.gathered(count, parts)

    def failed(self, count: int, error: TimeTierError) -> PageResults:
        return PageResults.failed(count, error)
