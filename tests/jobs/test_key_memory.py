"""The memory of keys agrees with a plain dict, whatever order repeats come in."""

from __future__ import annotations

import random

import numpy as np
import pytest
from timetier.jobs.key_memory import KeyMemory, key_digests, value_digests


@pytest.mark.parametrize("keys", [3, 200, 100_000])
def test_repeats_and_last_values_agree_with_a_dict(keys: int) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    memory = KeyMemory()
    last: dict[int, bytes] = {}
    conflicting: set[int] = set()
    batches = []
    for _ in range(20):
        rows = [(rng.randrange(keys), rng.choice([b"x", b"y"])) for _ in range(rng.randrange(1, 5_000))]
        digests = key_digests([b"o"] * len(rows), [key for key, _ in rows], [b"i"] * len(rows))
        values = value_digests([value for _, value in rows])
        batches.append((rows, digests, values))
        duplicates, replaced = 0, []
        for at, (key, value) in enumerate(rows):
            before = last.get(key)
            duplicates += before == value
            if before not in (None, value):
                replaced.append(at)
                conflicting.add(key)
            last[key] = value
        found = memory.note(digests, values)
        assert (found.duplicates, found.overwritten, found.conflicting) == (duplicates, len(replaced), replaced)
        assert (memory.keys, memory.conflicting_keys) == (len(last), len(conflicting))
    taken = {}
    for rows, digests, values in batches:
        for at in np.flatnonzero(memory.take_final(digests, values)).tolist():
            key, value = rows[at]
            assert key not in taken
            taken[key] = value
    assert taken == last


def test_keys_that_differ_in_one_part_are_different() -> None:
    owners = [b"a", b"a", b"ab", b"a", b"b"]
    times = [1, -1, 1, 256, 1]
    ids = [b"bc", b"bc", b"c", b"bc", b"bc"]
    assert len({tuple(pair) for pair in key_digests(owners, times, ids).tolist()}) == 5


def test_a_row_that_was_never_noted_is_an_error() -> None:
    memory = KeyMemory()
    memory.note(key_digests([b"a"], [1], [b""]), value_digests([b"x"]))
    with pytest.raises(KeyError, match="not noted"):
        memory.take_final(key_digests([b"a"], [2], [b""]), value_digests([b"x"]))
