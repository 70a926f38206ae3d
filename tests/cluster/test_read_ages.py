"""What cache nodes count of reads by age: exact where little is read, an honest estimate where much is, and bounded."""

from __future__ import annotations

from random import Random

import pytest
from timetier.cluster.ages import BIN_NAMES, BINS, bin_of, edges_of, spread
from timetier.cluster.keys import MAX_TIMESTAMP, MIN_TIMESTAMP, item_key, timeline_key
from timetier.cluster.memory.read_ages import EVERY, MAX_ITEMS, MAX_TABLES, ReadAgeCounter
from timetier.cluster.messages import unpack_i64
from timetier.cluster.topology import TablePolicy

NOW_US = 1_700_000_000_000_000
MINUTE_US = 60_000_000
YOUNG, OLD = NOW_US - 5 * MINUTE_US, NOW_US - 100 * 1_440 * MINUTE_US  # of the bins `hour` and `year`


class Counted:
    """A counter with a clock of its own."""

    def __init__(self, *, exact_reads: int = 0, seed: int = 1) -> None:
        self.now = 1_000.0
        self.counter = ReadAgeCounter(
            lambda table: None if table == "unknown" else TablePolicy(1_000_000, 1, 1),
            clock=lambda: self.now,
            wall_us=lambda: NOW_US,
            random=Random(seed),
            exact_reads=exact_reads,
        )

    def get(self, timestamps: list[int], table: bytes = b"t") -> None:
        timelines = [timeline_key(table, b"owner", 64)] * len(timestamps)
        weight = self.counter.wants(len(timestamps))
        if weight:
            self.counter.note_items(weight, timelines, [item_key(timestamp) for timestamp in timestamps])

    def by_age(self, what: str = "day", table: bytes = b"t") -> dict[str, int]:
        """Counts of one table, those that are not 0."""
        told = self.counter.read()
        if table not in told.tables:
            return {}
        first = told.tables.index(table) * BINS
        figures = unpack_i64(getattr(told, what))[first : first + BINS]
        return {name: figure for name, figure in zip(BIN_NAMES, figures, strict=True) if figure}


def test_few_reads_are_counted_exactly() -> None:
    counted = Counted(exact_reads=100)
    for _ in range(40):
        counted.get([YOUNG])
    counted.get([OLD] * 60)
    assert counted.by_age() == {"hour": 40, "year": 60}
    assert counted.by_age("hour") == {"hour": 40, "year": 60}


@pytest.mark.parametrize("period", [1, 2, EVERY, 2 * EVERY])
def test_many_reads_are_estimated_whatever_rhythm_they_have(period: int) -> None:
    counted = Counted()
    messages = 60_000
    for number in range(messages):
        counted.get([OLD if number % period == 0 else YOUNG])
    old = messages // period
    found = counted.by_age()
    # The standard deviation of the count is below the square root of (messages x EVERY).
    assert found["year"] == pytest.approx(old, abs=5 * (old * EVERY) ** 0.5)
    assert sum(found.values()) == pytest.approx(messages, rel=0.1)


def test_of_a_large_message_a_part_stands_for_all() -> None:
    counted = Counted(exact_reads=10**6)
    for _ in range(50):
        counted.get([YOUNG, OLD] * 500)
    found = counted.by_age()
    assert sum(found.values()) == pytest.approx(50_000, rel=0.05)
    assert sum(found.values()) % -(-1_000 // MAX_ITEMS) == 0, "each that was noted stands for as many"


def test_the_sample_is_taken_after_so_many_reads_of_a_minute_and_the_next_minute_begins_exactly() -> None:
    counted = Counted(exact_reads=10)
    for minute in range(3):
        counted.now = 6_000.0 + 60 * minute
        while counted.counter.wants(0) != 1:
            pass  # at most a few messages pass until the node notices the minute
        for _ in range(10):
            counted.get([YOUNG])
        assert counted.by_age() == {"hour": 10 * (minute + 1)}


def test_the_hour_and_the_day_pass() -> None:
    counted = Counted(exact_reads=10**6)
    counted.get([YOUNG])
    counted.now += 55 * 60
    counted.get([OLD])
    assert counted.by_age("hour") == {"hour": 1, "year": 1}
    counted.now += 15 * 60
    assert counted.by_age("hour") == {"year": 1}
    assert counted.by_age("day") == {"hour": 1, "year": 1}
    counted.now += 23 * 3_600
    assert counted.by_age("hour") == {}
    assert counted.by_age("day") == {"year": 1}
    counted.now += 3_600
    assert counted.by_age("day") == {}
    assert counted.counter.read().tables == [], "what has passed takes no memory"


def test_tables_beyond_the_bound_share_a_line_and_unknown_ones_are_not_counted() -> None:
    counted = Counted(exact_reads=10**6)
    for number in range(MAX_TABLES + 10):
        counted.get([YOUNG], b"table-%03d" % number)
    counted.get([YOUNG], b"unknown")
    tables = counted.counter.read().tables
    assert len(tables) == MAX_TABLES + 1
    assert counted.by_age(table=b"") == {"hour": 10}
    assert counted.by_age(table=b"unknown") == {}


def test_what_is_no_key_is_not_counted_and_does_no_harm() -> None:
    counted = Counted(exact_reads=10**6)
    good = timeline_key(b"t", b"owner", 64)
    counted.counter.note_items(1, [b"", b"\xff" * 5, good, good], [item_key(YOUNG), item_key(YOUNG), b"", b"short"])
    assert counted.counter.read().tables == []


def test_bins_hold_every_timestamp_and_spread_totals_add_up() -> None:
    edges = edges_of(NOW_US, 1_000_000)
    assert edges == sorted(edges)
    assert len(edges) == BINS - 1
    assert bin_of(MIN_TIMESTAMP, edges) == 0
    assert bin_of(MAX_TIMESTAMP, edges) == bin_of(NOW_US, edges) == BINS - 1
    assert bin_of(NOW_US - 60 * MINUTE_US - 1, edges) == bin_of(NOW_US - 60 * MINUTE_US, edges) - 1
    random = Random(3)
    for _ in range(500):
        low, high = sorted(random.randrange(NOW_US - 10**17, NOW_US + 10**15) for _ in range(2))
        total = random.choice([0, 1, 7, 10**12])
        parts = spread(total, low, high, edges)
        assert sum(parts) == total
        assert all(part >= 0 for part in parts)
        for at, part in enumerate(parts):
            assert not part or bin_of(low, edges) <= at <= bin_of(high, edges)
    assert edges_of(NOW_US, 10**9)[0] == (NOW_US - 1_825 * 86_400 * 10**6) * 1_000
    assert min(edges_of(0, 10**12)) == MIN_TIMESTAMP, "a bound that int64 can't hold is the last one that it can"
