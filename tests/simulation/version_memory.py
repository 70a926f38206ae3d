"""Shared memory for version caches, which outlives the processes that use it; they may be killed between any stores."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
from timetier.cluster.storage.version_cache import HEADER_BYTES, ROW_BYTES, Ints, Owner, VersionCache, Words

from .disk import SimDisk
from .loop import Life

POINTS = 0.3  # of the updates are points at which a planned crash may come
LOST = 0.2  # of the crashes are those of the machine


class SimVersionMemory:
    """The memory of one node's version cache, over all its lives."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self._memory = bytearray(HEADER_BYTES + random.choice([1, 1, 2, 40]) * ROW_BYTES)

    def crash(self) -> None:
        """A process ends; sometimes it was the machine."""
        if self.random.random() < LOST:
            self._memory = bytearray(len(self._memory))

    def of(self, disk: SimDisk, life: Life) -> SimVersionHome:
        """The memory as one life of the node has it."""
        return SimVersionHome(self, disk, life)

    def open(self, owner: Owner, disk: SimDisk, life: Life) -> VersionCache:
        return _Crashing(memoryview(self._memory), owner, self.random, disk, life)


class SimVersionHome:
    """Implements `VersionHome`."""

    where = "simulated memory"

    def __init__(self, memory: SimVersionMemory, disk: SimDisk, life: Life) -> None:
        self._memory = memory
        self._disk = disk
        self._life = life

    def open(self, owner: Owner) -> VersionCache:
        return self._memory.open(owner, self._disk, self._life)

    def remove(self) -> None:
        """Simulated nodes do not stop in order."""


class _Crashing(VersionCache):
    """The production cache. A planned crash may come right before, within and right after each update."""

    def __init__(self, memory: memoryview, owner: Owner, random: Random, disk: SimDisk, life: Life) -> None:
        super().__init__(memory, owner)
        self.few = random.choice([0, 0, 24])  # batches are small here, and array operations have bugs of their own
        self._random = random
        self._disk = disk
        self._life = life

    def _point(self, what: str) -> None:
        if self._random.random() < POINTS:
            self._disk.point(self._life, what)

    def note(self, digests: bytes, versions: Ints) -> None:
        self._point("note versions")
        super().note(digests, versions)
        self._point("noted versions")

    def mark_dirty(self, digests: bytes) -> None:
        self._point("mark versions dirty")
        super().mark_dirty(digests)
        self._point("marked versions dirty")

    def _store(self, rows: Ints, low: Words, high: Words, versions: Ints) -> None:
        self._tear(rows)
        super()._store(rows, low, high, versions)

    def _put_first(self, row: int, *entry: Any) -> None:
        self._tear(np.array([row]))
        super()._put_first(row, *entry)

    def _tear(self, rows: Ints) -> None:
        """What a crash leaves in the middle of a move: digests that have moved on, and versions that have not."""
        self._sequence[rows] += np.uint64(1)
        low, high = self._low[rows], self._high[rows]
        self._low[rows] = np.roll(low, 1, axis=1)
        if self._random.random() < 0.5:  # else it ends between the two halves
            self._high[rows] = np.roll(high, 1, axis=1)
        self._point("move versions")
        self._low[rows], self._high[rows] = low, high
        self._sequence[rows] -= np.uint64(1)


def clean_entries(cache: VersionCache) -> list[tuple[bytes, int]]:
    """Digests and versions of all entries that are clean, without moving any."""
    found = []
    for row, way in zip(*np.nonzero(cache._versions >= 0), strict=True):
        digest = int(cache._low[row, way]).to_bytes(8, "little") + int(cache._high[row, way]).to_bytes(8, "little")
        found.append((digest, int(cache._versions[row, way])))
    return found
