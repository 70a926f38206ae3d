"""Reads of single items in columns: as they are asked, as they travel, as they are answered. *Pure*.

A call for many items is one column of timelines and one of keys, and stays so: merging, sending and answering make no
object for an item but the one that the caller gets.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, overload

from ..errors import TimeTierError
from ..messages import FoundItems, unpack_i64
from ..packed_items import Item


class ItemQuery(NamedTuple):
    """One item by its key."""

    timeline: bytes
    key: bytes


class ItemResult(NamedTuple):
    """One item, None when there is none. `timeline_version`: the version at which that is true."""

    timeline_version: int
    item: Item | None


class ItemQueries(Sequence[ItemQuery]):
    """Items that are asked for: `timelines[i]` and item `keys[i]`."""

    __slots__ = ("keys", "timelines")

    def __init__(self, timelines: list[bytes], keys: list[bytes]) -> None:
        self.timelines = timelines
        self.keys = keys

    @classmethod
    def of(cls, queries: Iterable[ItemQuery]) -> ItemQueries:
        """Queries one by one as columns."""
        rows = list(queries)
        return cls([row.timeline for row in rows], [row.key for row in rows])

    def __len__(self) -> int:
        return len(self.keys)

    @overload
    def __getitem__(self, index: int) -> ItemQuery: ...
    @overload
    def __getitem__(self, index: slice) -> ItemQueries: ...
    def __getitem__(self, index: int | slice) -> ItemQuery | ItemQueries:
        if isinstance(index, slice):
            return ItemQueries(self.timelines[index], self.keys[index])
        return ItemQuery(self.timelines[index], self.keys[index])


class ItemResults:
    """Columns of answers. `items[i]` is None where there is no item; `errors` by index, where a read has failed."""

    __slots__ = ("errors", "items", "timeline_versions")

    def __init__(
        self,
        timeline_versions: list[int],
        items: list[Item | None],
        errors: dict[int, TimeTierError] | None = None,
    ) -> None:
        self.timeline_versions = timeline_versions
        self.items = items
        self.errors = errors or {}

    @classmethod
    def of(cls, answer: FoundItems) -> ItemResults:
        """The columns of a node's answer."""
        return cls(unpack_i64(answer.timeline_versions), answer.items)

    @classmethod
    def gathered(cls, count: int, parts: Iterable[tuple[Sequence[int], ItemResults]]) -> ItemResults:
        """`count` results from parts of them, each with the indices at which its results belong."""
        results = cls([0] * count, [None] * count)
        for indices, part in parts:
            for at, index in enumerate(indices):
                results.timeline_versions[index] = part.timeline_versions[at]
                results.items[index] = part.items[at]
            results.errors |= {indices[at]: error for at, error in part.errors.items()}
        return results

    @classmethod
    def failed(cls, count: int, error: TimeTierError) -> ItemResults:
        """The same error for all."""
        return cls([0] * count, [None] * count, dict.fromkeys(range(count), error))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, part: slice) -> ItemResults:
        results = ItemResults(self.timeline_versions[part], self.items[part])
        if self.errors:
            low, high, _ = part.indices(len(self))
            results.errors = {index - low: error for index, error in self.errors.items() if low <= index < high}
        return results

    def rows(self) -> list[ItemResult | TimeTierError]:
        """Results one by one."""
        rows: list[ItemResult | TimeTierError] = list(map(ItemResult, self.timeline_versions, self.items))
        for index, error in self.errors.items():
            rows[index] = error
        return rows


class ItemColumns:
    """How a lane puts calls for items together, and takes their results apart (see `lanes.Shape`)."""

    def merged(self, calls: Sequence[ItemQueries]) -> ItemQueries:
        return ItemQueries(
            [timeline for call in calls for timeline in call.timelines], [key for call in calls for key in call.keys]
        )

    def taken(self, requests: ItemQueries, indices: Sequence[int]) -> ItemQueries:
        timelines, keys = requests.timelines, requests.keys
        return ItemQueries([timelines[index] for index in indices], [keys[index] for index in indices])

    def gathered(self, count: int, parts: Iterable[tuple[Sequence[int], ItemResults]]) -> ItemResults:
        return ItemResults.gathered(count, parts)

    def failed(self, count: int, error: TimeTierError) -> ItemResults:
        return ItemResults.failed(count, error)
