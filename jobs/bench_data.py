"""The data of a benchmark: items with values that can be told from their keys, and batches of keys drawn from them."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from random import Random

import numpy as np
import numpy.typing as npt

Key = tuple[str, int]
"""Owner and timestamp."""

Write = tuple[str, int, bytes]
"""Owner, timestamp, value."""

PER_OWNER = 25
_STAMP = struct.Struct("<Qq")
_NOISE = Random(20).randbytes(1 << 18)
_ZIPF = 0.99  # exponent: the usual one of YCSB


@dataclass(frozen=True)
class Dataset:
    """`owners` timelines of `per_owner` items each. `base`: timestamp of their oldest items; `step`: between two.

    `prefix`: what the owners' names begin with. `value_bytes`: at least 16. The same arguments give the same items.
    """

    prefix: str
    owners: int
    base: int
    step: int
    per_owner: int = PER_OWNER
    value_bytes: int = 200

    def __len__(self) -> int:
        return self.owners * self.per_owner

    @cached_property
    def names(self) -> list[str]:
        """Owners, in the order of their numbers."""
        return [f"{self.prefix}{number:08d}" for number in range(self.owners)]

    def key(self, item: int) -> Key:
        """Key of item number 0 .. len-1; items of one owner follow each other, oldest first."""
        number, at = divmod(item, self.per_owner)
        return self.names[number], self.base + at * self.step

    def value(self, owner: str, timestamp: int) -> bytes:
        """The value of an item: its key's stamp and noise, which does not compress."""
        number = int(owner[-8:])
        start = (number * 7919 + timestamp * 104_729) % (len(_NOISE) - self.value_bytes)
        return _STAMP.pack(number, timestamp) + _NOISE[start : start + self.value_bytes - _STAMP.size]

    def write(self, owner: str, timestamp: int) -> Write:
        """An item to write."""
        return owner, timestamp, self.value(owner, timestamp)

    def loads(self, per_call: int) -> Iterator[list[Write]]:
        """Every item once, `per_call` items at a time, whole timelines together."""
        owners = max(1, per_call // self.per_owner)
        times = [self.base + at * self.step for at in range(self.per_owner)]
        for first in range(0, self.owners, owners):
            names = self.names[first : first + owners]
            yield [self.write(name, time) for name in names for time in times]

    def reads(self, rng: np.random.Generator, count: int, per_call: int) -> list[list[Key]]:
        """`count` batches of keys, each item equally likely."""
        picked = rng.integers(len(self), size=(count, per_call))
        return [[self.key(item) for item in batch] for batch in picked.tolist()]

    def zipf_owners(self, rng: np.random.Generator, count: int) -> npt.NDArray[np.int64]:
        """Numbers of owners; owner k is drawn in proportion to 1 / (k+1)^0.99."""
        return np.searchsorted(self._zipf, rng.random(count), side="right").astype(np.int64)

    @cached_property
    def _zipf(self) -> npt.NDArray[np.float64]:
        weights = 1.0 / np.arange(1, self.owners + 1) ** _ZIPF
        sums = np.cumsum(weights)
        sums /= sums[-1]
        return sums

    def new_items(self, rng: np.random.Generator, first_time: int, count: int, per_call: int) -> Iterator[list[Write]]:
        """Up to `count` batches of items that were never written: one each of `per_call` owners drawn at random.

        Timestamps go up by one a batch from `first_time`; an owner is drawn once in a batch at most.
        """
        for at in range(count):
            drawn = rng.integers(self.owners, size=1) if per_call == 1 else self._distinct(rng, per_call)
            yield [self.write(self.names[number], first_time + at) for number in drawn.tolist()]

    def _distinct(self, rng: np.random.Generator, count: int) -> npt.NDArray[np.int64]:
        """Numbers of distinct owners: a random stretch of a random stride through all of them."""
        if count > self.owners:
            raise ValueError(f"{count} distinct owners of {self.owners}")
        start, stride = int(rng.integers(self.owners)), int(rng.integers(1, self.owners)) if self.owners > 1 else 1
        while np.gcd(stride, self.owners) != 1:
            stride = stride % self.owners + 1
        return (start + stride * np.arange(count, dtype=np.int64)) % self.owners
