"""The mix that timelines are made for: a hundred reads to a write, owners after Zipf, new items read most."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .bench_data import Dataset, Key, Write

READS_PER_WRITE = 100
_MEAN_AGE = 5.0  # items between the newest one and the one that is read
_VISIBLE_AFTER = 2_000  # places in the stream: by then a write has been answered, whatever is in flight


class Step(NamedTuple):
    """A read of `key`, or a write."""

    key: Key | None
    write: Write | None


class Mix:
    """A stream of reads and writes over one data set. It remembers what was written, so that later reads find it."""

    def __init__(self, data: Dataset, rng: np.random.Generator) -> None:
        """`data` has been loaded, and nobody else writes to its timelines."""
        self._data = data
        self._rng = rng
        self._newer: dict[int, list[int]] = {}  # by number of the owner: timestamps beyond those of `data`

    def steps(self, count: int, first_time: int) -> list[Step]:
        """The next `count` steps. `first_time`: timestamps from there on are free."""
        data, newer = self._data, {owner: list(times) for owner, times in self._newer.items()}
        owners = data.zipf_owners(self._rng, count).tolist()
        ages = (self._rng.geometric(1 / _MEAN_AGE, size=count) - 1).tolist()
        made: list[Step] = []
        unseen: list[tuple[int, int, int]] = []  # place, owner, timestamp of writes that reads don't know of yet
        for place, (owner, age) in enumerate(zip(owners, ages, strict=True)):
            while unseen and unseen[0][0] + _VISIBLE_AFTER <= place:
                _, writer, time = unseen.pop(0)
                newer.setdefault(writer, []).append(time)
            if place % (READS_PER_WRITE + 1) == READS_PER_WRITE // 2:
                time = first_time + place
                unseen.append((place, owner, time))
                made.append(Step(None, data.write(data.names[owner], time)))
            else:
                made.append(Step((data.names[owner], self._time(newer.get(owner, []), age)), None))
        return made

    def did(self, steps: list[Step]) -> None:
        """These steps, the first ones of the last `steps()`, have been done."""
        for step in steps:
            if step.write is not None:
                self._newer.setdefault(int(step.write[0][-8:]), []).append(step.write[1])

    def _time(self, newer: list[int], age: int) -> int:
        """Timestamp of the item that has `age` newer ones in its timeline, or of the oldest."""
        if age < len(newer):
            return newer[-1 - age]
        at = max(0, self._data.per_owner - 1 - (age - len(newer)))
        return self._data.base + at * self._data.step
