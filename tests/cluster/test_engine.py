"""The RocksDB engine: order, atomic batches, bounds, durability numbers, damage."""

from __future__ import annotations

import itertools
import random
import shutil
import time
from pathlib import Path

import pytest
from memory_engine import MemoryEngine
from rocksdict import ReadOptions
from timetier.cluster.errors import Corrupt
from timetier.cluster.storage.engine import EngineFailed, RocksEngine


def engine_in(folder: Path, *, create: bool = True) -> RocksEngine:
    return RocksEngine(folder / "engine", create=create, cache_mb=8, write_buffer_mb=4)


def test_scans_keep_to_their_bounds_when_memory_is_reused_meanwhile(tmp_path: Path) -> None:
    """RocksDB holds a bare pointer to the bound; what it points to must live as long as the scan."""
    rng = random.Random(7)
    engine = engine_in(tmp_path)
    for number in range(2_000):
        engine.put(b"L%06d" % number, b"v")
        engine.put(b"M%06d" % number, b"foreign")
    wrong = 0
    for number in range(1_000):
        rows = engine.scan(b"L%06d" % number, b"L%06d" % (number + 3))
        junk = [rng.randbytes(7) for _ in range(20)]
        noise = [ReadOptions() for _ in range(2)]  # of the size of what the scan may have let go
        for bounds in noise:
            bounds.set_iterate_upper_bound(rng.randbytes(7))
        del noise, junk
        wrong += len(list(itertools.islice(rows, 50))) != 3
        del rows
    engine.close()
    assert wrong == 0


def test_it_agrees_with_the_engine_of_the_simulated_tests(tmp_path: Path) -> None:
    """Random puts, deletions, scans and look-ups give the same rows in RocksDB and in memory."""
    seed = 4711
    print(f"seed {seed}")
    rng = random.Random(seed)
    rocks, memory = engine_in(tmp_path), MemoryEngine()
    names = [bytes(rng.choices(b"\x00ab\xff", k=rng.randint(1, 4))) for _ in range(60)]
    for _ in range(3_000):
        name, other = rng.choice(names), rng.choice(names)
        act = rng.random()
        if act < 0.4:
            value = rng.randbytes(5)
            rocks.put(name, value)
            memory.put(name, value)
        elif act < 0.55:
            rocks.delete(name)
            memory.delete(name)
        elif act < 0.7:
            assert rocks.get(name) == memory.get(name)
            assert rocks.get_many([name, other]) == memory.get_many([name, other])
        else:
            low, high = sorted((name, other))
            reverse = rng.random() < 0.5
            assert list(rocks.scan(low, high, reverse=reverse)) == list(memory.scan(low, high, reverse=reverse))
    rocks.close()


def test_batches_are_numbered_and_survive_a_restart_once_synced(tmp_path: Path) -> None:
    engine = engine_in(tmp_path)
    engine.put(b"a", b"1")
    first = engine.sequence
    assert engine.commit() == first
    assert engine.commit() == first, "an empty batch has no number"
    engine.put(b"b", b"2")
    assert engine.get(b"b") == b"2", "reads see what is pending"
    engine.sync()
    engine.close()
    engine = engine_in(tmp_path, create=False)
    assert [engine.get(b"a"), engine.get(b"b")] == [b"1", b"2"]
    engine.close()


def test_a_missing_database_is_not_silently_made_anew(tmp_path: Path) -> None:
    with pytest.raises(Corrupt, match="formatted before"):
        engine_in(tmp_path, create=False)


def test_a_damaged_log_is_reported_and_not_skipped(tmp_path: Path) -> None:
    """RocksDB's default recovery would drop the records behind a flipped bit and say nothing."""
    engine = engine_in(tmp_path)
    for number in range(50):
        engine.put(b"key-%d" % number, b"v" * 100)
        engine.commit()
    engine.sync()
    for name in ("whole", "damaged"):  # as a kill -9 would leave it: nothing closed
        shutil.copytree(tmp_path / "engine", tmp_path / name / "engine")
    engine.close()
    log = next((tmp_path / "damaged" / "engine").glob("*.log"))
    content = bytearray(log.read_bytes())
    content[len(content) // 2] ^= 1
    log.write_bytes(content)
    whole = engine_in(tmp_path / "whole", create=False)
    assert whole.get(b"key-49") is not None
    whole.close()
    with pytest.raises(Corrupt, match="can't be opened"):
        engine_in(tmp_path / "damaged", create=False)


def test_a_block_that_cannot_be_read_fails_every_read_that_needs_it(tmp_path: Path) -> None:
    """A scan that ended there as at its bound would hide acknowledged rows, and votes."""
    engine = engine_in(tmp_path)
    for number in range(20_000):
        engine.put(b"R%08d" % number, bytes(100) + b"%d" % number)
    engine.commit()
    engine._db.flush()
    engine.close()
    (table,) = (tmp_path / "engine").glob("*.sst")
    data = bytearray(table.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 40] = bytes(byte ^ 0xFF for byte in data[middle : middle + 40])
    table.write_bytes(data)
    engine = engine_in(tmp_path, create=False)
    readable = []
    for number in range(20_000):
        try:
            assert engine.get(b"R%08d" % number) is not None
            readable.append(number)
        except EngineFailed as error:
            assert "Corruption" in error.message
    assert 10_000 < len(readable) < 20_000
    lost = next(number for number in range(20_000) if number not in set(readable))
    for low, high in ((0, 20_000), (lost, lost + 1), (lost - 5, lost + 5), (lost, 20_000), (0, lost + 1)):
        for reverse in (False, True):
            with pytest.raises(EngineFailed):
                list(engine.scan(b"R%08d" % low, b"R%08d" % high, reverse=reverse))
    with pytest.raises(EngineFailed):
        engine.get_many([b"R%08d" % lost])
    assert len(list(engine.scan(b"R%08d" % 0, b"R%08d" % 100))) == 100
    assert len(list(engine.scan(b"R%08d" % 19_900, b"S", reverse=True))) == 100
    engine.close()


def test_the_way_down_gives_every_live_row_however_many_were_deleted_between(tmp_path: Path) -> None:
    engine = engine_in(tmp_path)
    rng = random.Random(5)
    names = [b"R%06d" % number for number in range(3_000)]
    for name in names:
        engine.put(name, b"v" + name)
    engine.commit()
    alive = set(names)
    for _ in range(12):
        start = rng.randrange(len(names))
        for name in names[start : start + rng.choice([3, 63, 64, 65, 66, 500])]:
            if rng.random() < 0.99:  # now and then one row stays
                engine.delete(name)
                alive.discard(name)
        engine.commit()
        for _ in range(60):
            low, high = sorted(rng.sample(range(3_100), 2))
            bounds = b"R%06d" % low, b"R%06d" % high
            expected = sorted((name for name in alive if bounds[0] <= name < bounds[1]), reverse=True)
            assert [name for name, _ in engine.scan(*bounds, reverse=True)] == expected
    assert len(alive) < 2_500
    engine.close()


def test_a_read_where_rows_were_evicted_does_not_walk_over_them(tmp_path: Path) -> None:
    engine = engine_in(tmp_path)
    for at in range(100_000):
        engine.put(b"R%06d" % at, bytes(20))
    engine.commit()
    for at in range(100_000):
        engine.delete(b"R%06d" % at)
    engine.put(b"A", b"far below")
    engine.commit()
    times = []
    for _ in range(5):
        began = time.perf_counter()
        assert list(engine.scan(b"R090000", b"R090001", reverse=True)) == []
        times.append(time.perf_counter() - began)
    print(times)
    assert min(times) < 0.004, "walking over 90,000 deleted rows takes ten times as long"
    engine.close()
