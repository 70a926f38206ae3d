"""The version cache against a plain model, its memory over lives, and a process that is killed while it writes."""

from __future__ import annotations

import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from timetier.cluster.errors import InvalidRequest
from timetier.cluster.storage.version_cache import (
    DIRTY,
    HEADER_BYTES,
    ROW_BYTES,
    WAYS,
    Owner,
    VersionCache,
    rows_in,
)
from timetier.cluster.storage.version_home import SharedVersions

OWNER = Owner(b"somebody", life=1, past=None, seed=7)


def memory_of(rows: int) -> bytearray:
    return bytearray(HEADER_BYTES + rows * ROW_BYTES)


def digests(count: int, seed: int = 0) -> list[bytes]:
    return [random.Random(f"{seed} {number}").randbytes(16) for number in range(count)]


def note(cache: VersionCache, names: list[bytes], versions: list[int]) -> None:
    cache.note(b"".join(names), np.array(versions, dtype=np.int64))


class Model:
    """Rows as lists, newest use first: what the cache must do, one timeline after the other."""

    def __init__(self, rows: int) -> None:
        self.rows: list[list[tuple[bytes, int]]] = [[] for _ in range(rows)]

    def row(self, name: bytes) -> list[tuple[bytes, int]]:
        return self.rows[(struct.unpack_from("<Q", name)[0] >> 32) * len(self.rows) >> 32]

    def look_up(self, name: bytes) -> int:
        row = self.row(name)
        for entry in row:
            if entry[0] == name:
                row.remove(entry)
                row.insert(0, entry)
                return entry[1]
        return DIRTY

    def note(self, name: bytes, version: int) -> None:
        row = self.row(name)
        row[:] = [(name, version), *[entry for entry in row if entry[0] != name]][:WAYS]

    def mark_dirty(self, name: bytes) -> None:
        row = self.row(name)
        row[:] = [(known, DIRTY if known == name else version) for known, version in row]


@pytest.mark.parametrize("rows", [1, 3, 40, 400])
@pytest.mark.parametrize("seed", range(3))
def test_batches_do_what_a_plain_lru_does_also_with_two_keys_of_one_row_and_one_key_twice(rows: int, seed: int) -> None:
    rng = random.Random(seed)
    cache, model = VersionCache(memory_of(rows), OWNER), Model(rows)
    names = digests(rows * WAYS * 2 + 5, seed)
    for _ in range(300):
        size = rng.choice([0, 1, 2, 5, 8, 30, 200])
        pool = rng.sample(names, min(len(names), rng.choice([3, 20, len(names)])))
        batch = [rng.choice(pool) for _ in range(size)]
        kind = rng.choice(["look up", "look up", "note", "dirty"])
        if kind == "look up":
            assert cache.look_up(b"".join(batch)).tolist() == [model.look_up(name) for name in batch]
        elif kind == "note":
            versions = [rng.randrange(1 << 62) for _ in batch]
            note(cache, batch, versions)
            for name, version in zip(batch, versions, strict=True):
                model.note(name, version)
        else:
            cache.mark_dirty(b"".join(batch))
            for name in batch:
                model.mark_dirty(name)
    assert cache.entries == sum(map(len, model.rows))
    for number, row in enumerate(model.rows):
        halves = [struct.unpack("<QQ", name) for name, _ in row]
        assert cache._low[number].tolist()[: len(row)] == [low for low, _ in halves]
        assert cache._high[number].tolist()[: len(row)] == [high for _, high in halves]
        assert cache._versions[number].tolist() == [*[version for _, version in row], *[DIRTY] * (WAYS - len(row))]
    assert not (cache._sequence & np.uint64(1)).any()


def test_of_two_digests_with_one_low_half_only_the_last_is_known() -> None:
    cache = VersionCache(memory_of(4), OWNER)
    one, other = b"a" * 8 + b"1" * 8, b"a" * 8 + b"2" * 8
    note(cache, [one], [5])
    note(cache, [other], [9])
    assert cache.look_up(one + other).tolist() == [DIRTY, 9]
    cache.mark_dirty(one)
    assert cache.look_up(other * 20).tolist() == [9] * 20
    assert cache.look_up(one * 20).tolist() == [DIRTY] * 20
    assert cache.entries == 1


def test_many_keys_of_one_row_take_no_longer_than_as_many_single_ones() -> None:
    cache = VersionCache(memory_of(1), OWNER)
    names = digests(10_000)
    began = time.process_time()
    note(cache, names, list(range(10_000)))
    assert cache.look_up(b"".join(names))[-WAYS:].tolist() == list(range(10_000 - WAYS, 10_000))
    assert time.process_time() - began < 2.0


def test_an_empty_digest_and_a_torn_column_are_no_entries() -> None:
    cache = VersionCache(memory_of(2), OWNER)
    assert cache.look_up(bytes(16)).tolist() == [DIRTY]
    assert cache.look_up(bytes(16 * 50)).tolist() == [DIRTY] * 50
    with pytest.raises(InvalidRequest):
        cache.look_up(bytes(15))
    with pytest.raises(ValueError, match="needs"):
        VersionCache(bytearray(HEADER_BYTES + ROW_BYTES - 1), OWNER)
    assert rows_in(HEADER_BYTES + ROW_BYTES) == 1


# ---------------------------------------------------------------- lives


def test_the_next_life_finds_everything_but_what_was_dirty_or_torn() -> None:
    memory = memory_of(50)
    names = digests(60)
    first = VersionCache(memory, OWNER)
    assert first.warm == 0
    note(first, names, list(range(60)))
    first.mark_dirty(b"".join(names[:3]))
    torn = first._row_of(struct.unpack_from("<Q", names[10])[0])
    first._sequence[torn] += np.uint64(1)  # as a process leaves it that is killed while it moves entries
    kept = first.entries - int(np.count_nonzero(first._low[torn]))
    second = VersionCache(memory, Owner(b"somebody", life=2, past=1, seed=7))
    assert second.warm == second.entries == kept
    assert not second._sequence[torn]
    found = second.look_up(b"".join(names)).tolist()
    of_torn_row = [
        number for number, name in enumerate(names) if second._row_of(struct.unpack_from("<Q", name)[0]) == torn
    ]
    assert 10 in of_torn_row
    for number, version in enumerate(found):
        assert version == DIRTY if number < 3 or number in of_torn_row else version in (number, DIRTY)
    assert sum(version != DIRTY for version in found) >= kept - 3


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        (Owner(b"somebody", 9, None, 7), "the first life of a folder follows none"),
        (Owner(b"somebody", 9, 2, 7), "another life was in between"),
        (Owner(b"another", 2, 1, 7), "another node, incarnation or share of the buckets"),
        (Owner(b"somebody", 2, 1, 8), "digests of another seed"),
    ],
)
def test_memory_of_somebody_else_is_emptied(changed: Owner, why: str) -> None:
    memory = memory_of(50)
    names = digests(60)
    note(VersionCache(memory, OWNER), names, [1] * 60)
    cache = VersionCache(memory, changed)
    assert cache.warm == cache.entries == 0, why
    assert cache.look_up(b"".join(names)).tolist() == [DIRTY] * 60
    again = VersionCache(memory, Owner(changed.name, 10, changed.life, changed.seed))
    note(again, names[:1], [3])
    assert VersionCache(memory, Owner(changed.name, 11, 10, changed.seed)).look_up(names[0]).tolist() == [3]


def test_memory_of_another_size_or_format_or_half_emptied_is_emptied() -> None:
    names = digests(60)
    follows = Owner(b"somebody", 2, 1, 7)
    for spoil in ("size", "format", "half"):
        memory = memory_of(50)
        cache = VersionCache(memory, OWNER)
        note(cache, names, [1] * 60)
        if spoil == "size":
            memory = memory[: HEADER_BYTES + 40 * ROW_BYTES]
        elif spoil == "format":
            memory[11] ^= 1
        else:
            struct.pack_into("<q", memory, 72, 0)  # as when a process was killed while it emptied it
        assert VersionCache(memory, follows).warm == 0, spoil


# ---------------------------------------------------------------- a process that is killed

WRITER = """
import random, sys
import numpy as np
from pathlib import Path
from timetier.cluster.storage.version_cache import Owner, VersionCache
from timetier.cluster.storage.version_home import SharedVersions
life, seed = int(sys.argv[3]), int(sys.argv[4])
home = SharedVersions(Path(sys.argv[1]), Path(sys.argv[2]), 4096 + 200 * 60)
cache = home.open(Owner(b"somebody", life, life - 1, 7))
names = [random.Random(f"0 {n}").randbytes(16) for n in range(400)]
rng = random.Random(seed)
version = life * 1_000_000
print("warm", cache.warm, flush=True)
while True:
    # As a replica does: dirty, then the engine's write, which is the line here, then clean.
    batch = rng.sample(range(400), rng.choice([1, 3, 40, 300]))
    joined = b"".join(names[n] for n in batch)
    cache.mark_dirty(joined)
    version += 1
    sys.stdout.write("".join(f"{n} {version}\\n" for n in batch))
    sys.stdout.flush()
    cache.note(joined, np.full(len(batch), version))
    cache.look_up(b"".join(rng.choices(names, k=50)))
"""


def test_a_process_killed_at_any_moment_leaves_nothing_older_than_what_it_has_told(tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    names = digests(400)
    told: dict[int, int] = {}
    answered = warm = 0
    with tempfile.TemporaryDirectory(prefix="timetier-test-", dir=shared_folder(tmp_path)) as shared:
        path = Path(shared) / "timetier-x.versions"
        for life in range(2, 14, 2):
            arguments = [str(path), str(tmp_path), str(life), str(rng.getrandbits(32))]
            process = subprocess.Popen([sys.executable, "-c", WRITER, *arguments], stdout=subprocess.PIPE, bufsize=0)
            assert process.stdout is not None
            first = process.stdout.readline()
            warm += int(first.split()[1])
            descriptor = process.stdout.fileno()
            deadline = time.monotonic() + rng.uniform(0.02, 0.15)
            text = b""
            while time.monotonic() < deadline:
                text += os.read(descriptor, 1 << 16)
            process.send_signal(signal.SIGKILL)
            text += process.stdout.read()
            process.stdout.close()
            process.wait()
            for line in text.split(b"\n")[:-1]:
                number, version = map(int, line.split())
                told[number] = max(told.get(number, 0), version)
            found = reader(path, tmp_path, life + 1).look_up(b"".join(names)).tolist()
            for number, version in enumerate(found):
                assert version in (DIRTY, told.get(number)), f"timeline {number} of life {life}"
            answered += len(found) - found.count(DIRTY)
    assert answered > 100, "some entries were clean when it was killed"
    assert warm > 100, "the next life found them"


def reader(path: Path, data_folder: Path, life: int) -> VersionCache:
    """The cache in a life of this process; the file is let go of, so that the next process may have it."""
    home = SharedVersions(path, data_folder, 4096 + 200 * 60)
    cache = home.open(Owner(b"somebody", life, life - 1, 7))
    os.close(home._file)
    return cache


def shared_folder(tmp_path: Path) -> Path:
    shared = Path("/dev/shm")
    return shared if os.access(shared, os.W_OK) else tmp_path
