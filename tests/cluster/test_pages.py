"""Pages against a naive model: a dictionary of all items, rebuilt from the log for every version."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from read_answers import keys_of, values_of
from timetier.cluster.keys import MIN_TIMESTAMP, item_key, timestamp_floor
from timetier.cluster.memory.pages import Page, Rows, merge
from timetier.cluster.messages import DELETE, PUT, WIPE

ALL_BYTES = 1 << 40


@dataclass(frozen=True)
class Entry:
    """One mutation of the log; its version is its place in the log, from 1 on."""

    kind: int
    timestamp: int
    value: bytes


ENTRIES = st.builds(
    Entry,
    st.sampled_from([PUT, PUT, PUT, PUT, DELETE, WIPE]),
    st.integers(-3, 12),
    st.binary(max_size=4),
)
LOGS = st.lists(ENTRIES, max_size=40)


def model(log: list[Entry], horizon: int = MIN_TIMESTAMP) -> dict[bytes, tuple[bytes, int]]:
    items: dict[bytes, tuple[bytes, int]] = {}
    for version, entry in enumerate(log, start=1):
        if entry.kind == WIPE:
            items.clear()
        elif entry.kind == DELETE:
            items.pop(item_key(entry.timestamp), None)
        else:
            items[item_key(entry.timestamp)] = (entry.value, version)
    return {key: item for key, item in items.items() if key >= timestamp_floor(horizon)}


def rows_of_log(log: list[Entry], first_version: int) -> Rows:
    rows = Rows()
    for version, entry in enumerate(log, start=1):
        if version >= first_version:
            rows.keys.append(b"" if entry.kind == WIPE else item_key(entry.timestamp))
            rows.kinds += bytes((entry.kind,))
            rows.values.append(entry.value if entry.kind == PUT else b"")
            rows.versions.append(version)
            rows.written.append(1000 + version)
    return rows


def wiped_of(log: list[Entry]) -> int:
    return max((v - 1 for v, entry in enumerate(log, start=1) if entry.kind == WIPE), default=0)


def page_of(log: list[Entry], low: bytes, high: bytes = b"", horizon: int = MIN_TIMESTAMP) -> Page:
    items = model(log, horizon)
    keys = sorted(items, reverse=True)
    rows = Rows(
        keys,
        bytes(len(keys)),
        [items[k][0] for k in keys],
        [items[k][1] for k in keys],
        [1000 + items[k][1] for k in keys],
    )
    return Page.of(rows, version=len(log), low=low, high=high, horizon=horizon)


def assert_page_is(page: Page, log: list[Entry], horizon: int = MIN_TIMESTAMP) -> None:
    truth = {k: v for k, v in model(log, horizon).items() if page.contains(k)}
    assert page.keys == sorted(truth)
    items = page.unpacked()
    assert keys_of(items) == page.keys
    assert [(item.value, item.version) for item in items] == [truth[k] for k in page.keys]
    assert [item.written_us for item in items] == [1000 + truth[k][1] for k in page.keys]
    assert [page.packed_item(at) for at in range(len(items))] == [page.find(k) for k in page.keys]


def test_items_that_are_written_in_the_entry_of_a_wipe_survive_it() -> None:
    page = page_of([Entry(PUT, 5, b"old"), Entry(PUT, 7, b"old")], item_key(6))
    delta = Rows([b"", item_key(7), item_key(2)], bytes((WIPE, PUT, PUT)), [b"", b"a", b"b"], [3, 3, 4], [0, 0, 0])
    moved = page.apply(delta, version=4, wiped=2, horizon=MIN_TIMESTAMP)
    assert (moved.keys, values_of(moved.unpacked()), moved.low) == ([item_key(2), item_key(7)], [b"b", b"a"], b"")


LOWS = st.one_of(st.just(b""), st.integers(-3, 12).map(item_key))


@given(LOGS, LOGS, LOWS)
def test_a_page_after_a_delta_is_the_page_of_the_later_version(
    before: list[Entry], after: list[Entry], low: bytes
) -> None:
    page, log = page_of(before, low), before + after
    delta = rows_of_log(log, len(before) + 1)
    snapshot = (page.version, list(page.keys), page.unpacked())
    moved = page.apply(delta, version=len(log), wiped=wiped_of(log), horizon=MIN_TIMESTAMP)
    assert moved.version == len(log)
    assert_page_is(moved, log)
    assert moved.low == (b"" if wiped_of(log) >= len(before) else low), "after a wipe it reaches the oldest item"
    assert snapshot == (page.version, page.keys, page.unpacked()), "a page never changes"


@given(LOGS, LOGS, LOWS, st.integers(-4, 13))
def test_a_horizon_hides_expired_items_and_completes_the_page(
    before: list[Entry], after: list[Entry], low: bytes, horizon: int
) -> None:
    page, log = page_of(before, low), before + after
    delta = rows_of_log(log, len(before) + 1)
    moved = page.apply(delta, version=len(log), wiped=wiped_of(log), horizon=horizon)
    assert_page_is(moved, log, horizon)
    assert all(key >= timestamp_floor(horizon) for key in moved.keys)
    if timestamp_floor(horizon) >= low:
        assert moved.low == b""
    # The horizon stays, also when a later answer comes from a replica that has not heard of it.
    again = moved.apply(Rows(), version=len(log) + 1, wiped=0, horizon=MIN_TIMESTAMP)
    assert again.horizon == moved.horizon and again.keys == moved.keys


@given(LOGS, LOWS, st.integers(1, 12), st.one_of(st.just(b""), st.integers(-3, 13).map(item_key)))
def test_a_slice_is_exact_or_refused(log: list[Entry], low: bytes, limit: int, before: bytes) -> None:
    page = page_of(log, low)
    got = page.newest(limit, before, ALL_BYTES)
    items = model(log)
    truth = [key for key in sorted(items, reverse=True) if not before or key < before]
    if got is None:
        known = [key for key in truth if key >= low]
        assert len(known) < limit and low, "refused although the page knows the answer"
        return
    assert keys_of(got.unpacked()) == truth[:limit]
    assert [(item.value, item.version) for item in got.unpacked()] == [items[k] for k in truth[:limit]]
    assert got.more or len(truth) <= limit, "older items exist, but the slice says there are none"


@given(LOGS, st.integers(1, 200))
def test_a_slice_cut_by_bytes_says_that_more_exists(log: list[Entry], max_bytes: int) -> None:
    page = page_of(log, b"")
    got = page.newest(100, b"", max_bytes)
    assert got is not None
    truth = sorted(model(log), reverse=True)
    assert keys_of(got.unpacked()) == truth[: got.count]
    assert len(got.packed) <= max_bytes or got.count == 1
    if got.count < len(truth):
        assert got.more and got.count
        rest = len(page.keys) - got.count - 1
        assert len(got.packed) + len(page.packed_item(rest)) > max_bytes, "there was room for one more"


@given(LOGS, st.integers(-3, 12), st.integers(-3, 12))
def test_pieces_that_meet_make_one_page(log: list[Entry], a: int, b: int) -> None:
    middle, low = item_key(max(a, b)), item_key(min(a, b))
    top, older = page_of(log, middle), page_of(log, low, high=middle)
    joined = top.extend(older)
    assert (joined.low, joined.high) == (low, b"")
    assert_page_is(joined, log)
    assert not older.keys or older.newest(1, b"", ALL_BYTES) is None, "a piece does not know what is above it"


def test_pieces_of_two_versions_are_never_joined() -> None:
    log = [Entry(PUT, 5, b"x"), Entry(PUT, 1, b"y")]
    middle = item_key(3)
    with pytest.raises(ValueError):
        page_of(log, middle).extend(page_of(log[:1], b"", high=middle))
    with pytest.raises(ValueError):
        page_of(log, middle).extend(page_of(log, b"", high=item_key(2)))


@given(LOGS, LOWS, st.integers(1, 10), st.integers(600, 3000))
def test_a_trimmed_page_is_a_smaller_true_page(log: list[Entry], low: bytes, max_items: int, max_bytes: int) -> None:
    page = page_of(log, low)
    trimmed = page.trim(max_items, max_bytes)
    assert len(trimmed) <= max_items
    assert trimmed.nbytes <= max_bytes or len(trimmed) <= 1
    assert_page_is(trimmed, log)
    assert trimmed.keys == page.keys[len(page.keys) - len(trimmed) :]


@given(LOGS, st.sets(st.integers(0, 39)), st.sets(st.integers(0, 39)), st.integers(-4, 13))
def test_merge_of_hot_and_cold_rows_equals_the_truth(
    log: list[Entry], evicted: set[int], sunk: set[int], horizon: int
) -> None:
    """Any row may be in a block, or in the storage tier, or in both; every row of the log is somewhere."""
    rows = rows_of_log(log, 1)
    order = sorted(range(len(rows)), key=lambda at: (rows.keys[at], rows.versions[at]), reverse=True)

    def pick(ats: list[int]) -> Rows:
        return Rows(
            [rows.keys[a] for a in ats],
            bytes(rows.kinds[a] for a in ats),
            [rows.values[a] for a in ats],
            [rows.versions[a] for a in ats],
            [rows.written[a] for a in ats],
        )

    plain = [at for at in order if rows.kinds[at] != WIPE]
    hot = pick([at for at in plain if at not in evicted])
    cold = [pick([at for at in plain if at in evicted and at % 2 == half]) for half in (0, 1)]
    cold.append(pick([at for at in plain if at in sunk and rows.kinds[at] == PUT]))
    got = merge(hot, cold, wiped=wiped_of(log), horizon=horizon)
    truth = model(log, horizon)
    assert got.keys == sorted(truth, reverse=True)
    assert got.values == [truth[k][0] for k in got.keys]
    assert got.versions == [truth[k][1] for k in got.keys]


@pytest.mark.parametrize(("items", "value_bytes"), [(1, 10), (20, 200), (100, 37), (500, 1000)])
def test_nbytes_is_the_memory_that_a_page_occupies(items: int, value_bytes: int) -> None:
    rows = Rows()
    for n in range(items, 0, -1):
        rows.keys.append(item_key(n * 1_000_003, bytes(str(n), "ascii")))
        rows.kinds += bytes((PUT,))
        rows.values.append(bytes(value_bytes))
        rows.versions.append(n + 1000)
        rows.written.append(1_700_000_000_000_000 + n)
    page = Page.of(rows, version=5000, low=b"", high=b"", horizon=MIN_TIMESTAMP)
    columns = (page.keys, page.packed, page.starts)
    true_bytes = sys.getsizeof(page) + sum(map(sys.getsizeof, columns)) + sum(map(sys.getsizeof, page.keys))
    assert abs(page.nbytes - true_bytes) < 0.15 * true_bytes + 300
