"""Figures of the whole from a sample of buckets (*pure*).

Timelines are spread over buckets by a hash, so any set of buckets is a uniform sample of timelines. A total is
estimated as (buckets in all / buckets asked) times what was found, and how far off that may be follows from how much
the buckets differ (Cochran, "Sampling Techniques", 1977, section 2.6: simple random sampling without replacement).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import xxhash

_SEED = 0x7A6E
_NORMAL_95 = 1.96  # standard errors within which 95 % of a normal distribution lies


def sample_order(buckets: int) -> list[int]:
    """All buckets in an order without meaning: each beginning of it is a sample, and is the same each time."""
    return sorted(range(buckets), key=lambda bucket: xxhash.xxh3_64_intdigest(bucket.to_bytes(4, "big"), seed=_SEED))


def relative_error(found: Sequence[int], population: int) -> float:
    """Half the width of the 95 % interval of an estimated total, as a part of that total.

    `found`: the figure in each bucket asked, of `population` buckets in all. 0 when all were asked or nothing was
    found; infinite for a single bucket of several.
    """
    count, total = len(found), sum(found)
    if count >= population or not total:
        return 0.0
    if count < 2:
        return math.inf
    mean = total / count
    variance = sum((figure - mean) ** 2 for figure in found) / (count - 1)
    standard_error = math.sqrt(variance / count * (1 - count / population))
    return _NORMAL_95 * standard_error / mean


def needed_sample(found: Sequence[int], population: int, target: float) -> int:
    """How many buckets would bring the relative error down to `target`, if all buckets are like those found."""
    error = relative_error(found, population)
    count = len(found)
    if error <= target or not count:
        return count
    if math.isinf(error) or target <= 0:
        return population
    spread = (error / target) ** 2 * count / (1 - count / population)  # sample of an endless population
    return min(population, math.ceil(spread / (1 + spread / population)))
