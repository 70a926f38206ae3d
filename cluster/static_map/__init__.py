"""The static map from buckets to groups, for 1 to 1,000 groups (*pure*, apart from reading the package's file).

The map is a history of growth. With one group, group 0 owns every bucket. Step n (2, 3, ...) adds group n-1, and
lists the buckets that move to it, wherever they were. So the owner of a bucket among n groups is the group added by
the last step <= n that lists the bucket, and growing from n to m groups moves exactly the buckets that steps
n+1 .. m list: all of them to groups that are new. How the steps are chosen, and why any two groups always differ
by one bucket at most, is told in `build.py`.

File format, little endian: header `magic, format, buckets, groups, body length` (`_HEADER`), the xxh3-128 checksum
of header and body, the body. The body lists, for steps 2 .. groups in order, the step's buckets in increasing order,
each as LEB128 of its distance to the one before it, less one (the first: to -1). Step n lists floor(buckets / n)
buckets, so the body needs no counts.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from ..errors import Corrupt, InvalidRequest

FORMAT = 1
SHIPPED_BUCKETS = 131_072
SHIPPED_FILE = Path(__file__).with_name(f"b{SHIPPED_BUCKETS}.map")
MAX_BUCKETS = 1 << 20
MAX_GROUPS = 1_000
MIN_BUCKETS_PER_GROUP = 50  # with fewer, one bucket more or less would be over 2 % of a group's share

_MAGIC = b"TTIERMAP"
_HEADER = struct.Struct("<8sIIII")
_CHECKSUM_BYTES = 16
_BODY_AT = _HEADER.size + _CHECKSUM_BYTES
_KEPT_LOOKUPS = 4


def check_buckets(buckets: int) -> int:
    """The same number, if a cluster can have so many buckets. Raises InvalidRequest."""
    if not 1 <= buckets <= MAX_BUCKETS or buckets & (buckets - 1):
        raise InvalidRequest(f"buckets={buckets}: pass a power of two from 1 to {MAX_BUCKETS}")
    return buckets


def max_groups(buckets: int) -> int:
    """The greatest number of groups among which so many buckets may be shared. Raises InvalidRequest."""
    return min(MAX_GROUPS, max(1, check_buckets(buckets) // MIN_BUCKETS_PER_GROUP))


def step_sizes(buckets: int) -> npt.NDArray[np.int64]:
    """How many buckets each of the steps 2 .. max_groups lists: int64[max_groups - 1]."""
    return buckets // np.arange(2, max_groups(buckets) + 1)


class StaticMap:
    """Which group owns which bucket, for every number of groups up to `max_groups`.

    Made by `load` or `from_bytes`. `buckets`: the number of buckets. `checksum`: xxh3-128 of the content, in hex.
    """

    def __init__(self, moved: npt.NDArray[np.uint32], encoded: bytes | None = None) -> None:
        """`moved`: uint32[B + ...]: every bucket once (they start in group 0), then the buckets of each step.

        `encoded`: the file's content for the same moves, if it is at hand. Raises InvalidRequest.
        """
        self.buckets = check_buckets(int(moved.max()) + 1)
        self.max_groups = max_groups(self.buckets)
        sizes = np.concatenate([[self.buckets], step_sizes(self.buckets)])
        if len(moved) != sizes.sum():
            raise InvalidRequest(f"{len(moved)} moves are no map of {self.buckets} buckets: it has {sizes.sum()}")
        self._moved = moved
        self._moved_to = np.repeat(np.arange(self.max_groups, dtype=np.uint16), sizes)
        self._ends = np.cumsum(sizes)
        self._lookups: dict[int, npt.NDArray[np.uint16]] = {}
        self._encoded = _encode(self.buckets, moved) if encoded is None else encoded
        self.checksum = self._encoded[_HEADER.size : _BODY_AT].hex()

    @staticmethod
    def load(buckets: int) -> StaticMap:
        """The map of a cluster with so many buckets: the shipped one, or one built by the same construction.

        Building takes a millisecond for 1,024 buckets and a second for 65,536; the last few maps are kept in memory.
        Raises InvalidRequest when `buckets` is no power of two or too large, Corrupt when the shipped file is
        missing or damaged.
        """
        return _load(check_buckets(buckets))

    @staticmethod
    def from_bytes(encoded: bytes, origin: str = "static map") -> StaticMap:
        """The map of a file's content; `origin` names the file in errors. Raises Corrupt if it is damaged."""
        return StaticMap(_decode(encoded, origin), encoded)

    def to_bytes(self) -> bytes:
        """Content of a file, which `from_bytes` reads."""
        return self._encoded

    def owners(self, groups: int) -> npt.NDArray[np.uint16]:
        """Group of every bucket among so many groups: uint16[buckets], read-only. Raises InvalidRequest."""
        if not 1 <= groups <= self.max_groups:
            raise InvalidRequest(
                f"groups={groups}: {self.buckets} buckets can be shared by 1 to {self.max_groups} groups "
                f"(each needs {MIN_BUCKETS_PER_GROUP} buckets, and there are at most {MAX_GROUPS} groups)"
            )
        kept = self._lookups.get(groups)
        if kept is not None:
            return kept
        owners = np.empty(self.buckets, dtype=np.uint16)
        end = self._ends[groups - 1]
        owners[self._moved[:end]] = self._moved_to[:end]  # of a bucket's moves the last one counts
        owners.flags.writeable = False
        if len(self._lookups) >= _KEPT_LOOKUPS:
            self._lookups = {}
        self._lookups[groups] = owners
        return owners

    def measure(self) -> dict[str, Any]:
        """What the map keeps of its promises, found by looking up and comparing the owners at every step.

        `worst_spread`: the largest (max - min) / mean of the groups' shares, over every number of groups.
        `worst_excess_moved`: the largest share of all buckets that a step n -> n+1 moves between old groups.
        Besides `buckets`, `groups` (the greatest number), `checksum`, and the length of the file in `bytes`.
        """
        worst_spread = 0.0
        worst_excess = 0
        before = self.owners(1)
        for groups in range(1, self.max_groups + 1):
            owners = self.owners(groups)
            shares = np.bincount(owners, minlength=groups)
            worst_spread = max(worst_spread, int(shares.max() - shares.min()) * groups / self.buckets)
            worst_excess = max(worst_excess, int(np.count_nonzero((owners != before) & (owners != groups - 1))))
            before = owners
        return {
            "buckets": self.buckets,
            "groups": self.max_groups,
            "worst_spread": worst_spread,
            "worst_excess_moved": worst_excess / self.buckets,
            "checksum": self.checksum,
            "bytes": len(self._encoded),
        }


@lru_cache(maxsize=4)
def _load(buckets: int) -> StaticMap:
    if buckets == SHIPPED_BUCKETS:
        try:
            encoded = SHIPPED_FILE.read_bytes()
        except OSError as error:
            raise Corrupt(f"the static map of this package can't be read ({error}): install timetier again") from error
        return StaticMap.from_bytes(encoded, str(SHIPPED_FILE))
    from .build import build  # the generator imports this module, and is also run as a script

    return build(buckets)


def _encode(buckets: int, moved: npt.NDArray[np.uint32]) -> bytes:
    steps = moved[buckets:].astype(np.int64)
    sizes = step_sizes(buckets)
    values = np.diff(steps, prepend=-1) - 1
    firsts = np.cumsum(sizes) - sizes
    values[firsts] = steps[firsts]
    lengths = 1 + (values >= 1 << 7) + (values >= 1 << 14)
    starts = np.cumsum(lengths) - lengths
    out = np.zeros(int(lengths.sum()), dtype=np.uint8)
    for place in range(3):
        has = lengths > place
        more = (lengths[has] > place + 1) * 0x80
        out[starts[has] + place] = (values[has] >> 7 * place & 0x7F) | more
    body = out.tobytes()
    header = _HEADER.pack(_MAGIC, FORMAT, buckets, max_groups(buckets), len(body))
    return header + xxhash.xxh3_128_digest(header + body) + body


def _decode(encoded: bytes, origin: str) -> npt.NDArray[np.uint32]:
    """Moves as `StaticMap` takes them. Raises Corrupt."""
    remedy = "put back an undamaged copy"
    if len(encoded) < _BODY_AT:
        raise Corrupt(f"{origin}: {len(encoded)} bytes are no static map: {remedy}")
    header, checksum, body = encoded[: _HEADER.size], encoded[_HEADER.size : _BODY_AT], encoded[_BODY_AT:]
    magic, version, buckets, groups, length = _HEADER.unpack(header)
    if magic != _MAGIC:
        raise Corrupt(f"{origin}: begins with {magic!r}, so it is no static map: {remedy}")
    if version != FORMAT:
        raise Corrupt(f"{origin}: is a static map of format {version}; this version of timetier reads {FORMAT}")
    if length != len(body):
        raise Corrupt(f"{origin}: has {len(body)} bytes after its header instead of {length}: {remedy}")
    if xxhash.xxh3_128_digest(header + body) != checksum:
        raise Corrupt(f"{origin}: the checksum does not match the content: {remedy}")
    try:
        if max_groups(buckets) != groups:
            raise InvalidRequest(f"{groups} groups instead of {max_groups(buckets)}")
        moved = _decode_body(body, buckets)
    except InvalidRequest as error:
        raise Corrupt(f"{origin}: {error}: {remedy}") from None
    return moved


def _decode_body(body: bytes, buckets: int) -> npt.NDArray[np.uint32]:
    sizes = step_sizes(buckets)
    data = np.frombuffer(body, dtype=np.uint8)
    ends = np.flatnonzero(data < 0x80)
    starts = np.concatenate([[0], ends[:-1] + 1])[: len(ends)]
    lengths = ends - starts + 1
    if len(ends) != sizes.sum() or (len(data) and data[-1] >= 0x80) or (len(ends) and lengths.max() > 3):
        raise InvalidRequest(f"the body does not hold the {sizes.sum()} moves of {buckets} buckets")
    values = (data[starts] & 0x7F).astype(np.int64)
    for place in (1, 2):
        has = np.flatnonzero(lengths > place)
        values[has] |= (data[starts[has] + place].astype(np.int64) & 0x7F) << 7 * place
    moved = np.empty(buckets + len(values), dtype=np.uint32)
    moved[:buckets] = np.arange(buckets)
    sums = np.cumsum(values + 1)
    before = sums[np.cumsum(sizes) - sizes - 1]  # where the step before ended
    before[:1] = 0
    np.subtract(sums, np.repeat(before + 1, sizes), out=moved[buckets:], casting="unsafe")
    if moved.max() >= buckets:
        raise InvalidRequest(f"a step lists bucket {moved.max()} of {buckets}")
    return moved
