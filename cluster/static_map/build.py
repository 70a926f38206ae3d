"""Generator of the static map. `python -m timetier.cluster.static_map.build` rewrites the shipped file.

**Construction.** Step n takes a map of n-1 groups, whose shares differ by one bucket at most, to one of n groups of
which the same is true, by moving buckets to the added group only. With q, r = divmod(B, n), r groups shall have q+1
buckets and n-r groups q. The added group gets q; of the old ones the r largest keep q+1, the others q.

**It is always possible**, which is to say that no old group is to keep more than it has. The old shares are p and
p+1 with p = floor(B / (n-1)) >= q, so whoever keeps q has as much. If p > q, everyone has q+1, and r <= n-1 groups
are there to keep it. If p = q, then s = B - (n-1)q groups have q+1, and r = B - nq = s - q <= s of them keep it.

**It moves as little as possible**: the added group ends with floor(B / n) buckets and nothing else moves. From n to m
groups the buckets that move are those of the m-n added groups in the end: (m-n)/m of all, up to rounding.

Which buckets a group gives up is decided by a hash of step and bucket (splitmix64's finalizer, see
https://prng.di.unimi.it/splitmix64.c), so that neighbours do not go together, and no bucket moves more often than
others by design. The arithmetic is on integers only and calls no random stream of a library: the result is the
same on every machine for ever. It has to be, because clusters with other numbers of buckets build theirs.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from . import MAX_BUCKETS, MAX_GROUPS, SHIPPED_BUCKETS, SHIPPED_FILE, StaticMap, check_buckets, max_groups

SEED = 0x71EE7135
_BUCKET_BITS = MAX_BUCKETS.bit_length() - 1
_GROUP_BITS = MAX_GROUPS.bit_length()
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def build(buckets: int) -> StaticMap:
    """The static map for a power of two of buckets. Raises InvalidRequest."""
    owners = np.zeros(check_buckets(buckets), dtype=np.uint64)
    moved = [np.arange(buckets, dtype=np.uint32)]
    for groups in range(2, max_groups(buckets) + 1):
        given = _given_up(owners, groups)
        owners[given] = groups - 1
        moved.append(given)
    return StaticMap(np.concatenate(moved))


def _given_up(owners: npt.NDArray[np.uint64], groups: int) -> npt.NDArray[np.uint32]:
    """Buckets that move to the last of `groups` groups, given the owners among one group less: sorted uint32[B/n]."""
    buckets = len(owners)
    shares = np.bincount(owners.astype(np.int64), minlength=groups - 1)
    least, larger = divmod(buckets, groups)
    by_share = np.lexsort((_hash(np.arange(groups - 1), groups, MAX_BUCKETS), -shares))
    keep = np.full(groups - 1, least)
    keep[by_share[:larger]] += 1
    give = shares - keep
    if give.min() < 0 or give.sum() != least:
        raise AssertionError(f"step {groups} of {buckets} buckets is not feasible: the map before it is uneven")
    # One sort orders the buckets by (group, hash, bucket); each group gives up its first ones.
    numbers = np.arange(buckets, dtype=np.uint64)
    order = owners << np.uint64(64 - _GROUP_BITS)
    order |= _hash(numbers, groups, 0) >> np.uint64(_GROUP_BITS + _BUCKET_BITS) << np.uint64(_BUCKET_BITS)
    order |= numbers
    order.sort()
    rank = np.arange(buckets) - np.repeat(np.cumsum(shares) - shares, shares)
    chosen = order[rank < np.repeat(give, shares)] & np.uint64(MAX_BUCKETS - 1)
    chosen.sort()
    return chosen.astype(np.uint32)


def _hash(numbers: npt.NDArray[np.integer], step: int, offset: int) -> npt.NDArray[np.uint64]:
    """64-bit hashes of numbers, different for each step and offset: uint64[n]."""
    start = (SEED << 32) + step * 2 * MAX_BUCKETS + offset
    x = (numbers.astype(np.uint64) + np.uint64(start)) * _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def main() -> None:
    """Rewrite the shipped file and print its figures."""
    static_map = build(SHIPPED_BUCKETS)
    SHIPPED_FILE.write_bytes(static_map.to_bytes())
    print(f"{SHIPPED_FILE}: {static_map.measure()}")


if __name__ == "__main__":
    main()
