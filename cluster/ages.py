"""Age bins: how old data is, by event time, in the steps in which people think of it (*pure*).

Bins are the same for all tables and nodes, so that what many nodes have counted can be added up. The youngest bin
also has what lies in the future. Nodes count by *edges*, timestamps in a table's unit, so whoever asks decides what
"now" is.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from .keys import MAX_TIMESTAMP, MIN_TIMESTAMP

_DAY_S = 86_400
_AGES_S = {
    "hour": 3_600,
    "day": _DAY_S,
    "week": 7 * _DAY_S,
    "month": 30 * _DAY_S,
    "quarter": 91 * _DAY_S,
    "year": 365 * _DAY_S,
    "2 years": 730 * _DAY_S,
    "5 years": 1_825 * _DAY_S,
}
BIN_NAMES = (*_AGES_S, "older")
"""Youngest first: a bin is named for the age that it goes up to, and has what is older than the one before."""

BINS = len(BIN_NAMES)


def edges_of(now_us: int, per_second: int) -> list[int]:
    """Timestamps between the bins, increasing, so the oldest bin comes first.

    `now_us`: microseconds since 1970. `per_second`: units of the table's timestamps in a second.
    """
    now = now_us * per_second // 1_000_000
    return [_clipped(now - age_s * per_second) for age_s in reversed(_AGES_S.values())]


def youngest_first(by_bin: Sequence[int]) -> list[int]:
    """Figures in the order of `BIN_NAMES`, of those in the order of edges."""
    return list(by_bin)[::-1]


def bin_of(timestamp: int, edges: Sequence[int]) -> int:
    """Number of a timestamp's bin in the order of edges."""
    return bisect_right(edges, timestamp)


def spread(total: int, low: int, high: int, edges: Sequence[int]) -> list[int]:
    """A total by bin, in the order of edges, if it lies evenly between the timestamps low (inclusive) and high.

    The parts add up to the total.

    >>> spread(10, 0, 100, [50, 70])
    [5, 2, 3]
    """
    high = max(high, low + 1)
    span = high - low
    bounds = [low, *(min(max(edge, low), high) for edge in edges), high]
    reached = [total * (bound - low) // span for bound in bounds]
    return [after - before for before, after in zip(reached, reached[1:], strict=False)]  # noqa: RUF007


def add_to(sums: list[int], parts: Sequence[int]) -> None:
    """Add parts to sums, bin by bin."""
    for index, part in enumerate(parts):
        sums[index] += part


def _clipped(timestamp: int) -> int:
    return max(MIN_TIMESTAMP, min(timestamp, MAX_TIMESTAMP))
