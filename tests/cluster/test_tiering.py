"""`tiers` shows by age what lies where and what is read: against real services of all tiers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from random import Random

import pytest
from storage_cluster import DAY_US, topology, wait_for
from tiers_model import NOW_US, POLICY, ThreeTiers
from timetier.cluster.ages import BIN_NAMES
from timetier.cluster.config import PricesConfig
from timetier.cluster.drive import drive
from timetier.cluster.errors import InvalidRequest, Unavailable
from timetier.cluster.tiering import Prices, Survey, TableTiers, costs_of, survey
from timetier.cluster.topology import TablePolicy
from timetier.jobs.tiers_text import survey_json, survey_text

HOUR_US = DAY_US // 24
AGES_US = {  # an age in the middle of each bin
    "hour": HOUR_US // 2,
    "day": 10 * HOUR_US,
    "week": 3 * DAY_US,
    "month": 20 * DAY_US,
    "quarter": 60 * DAY_US,
    "year": 200 * DAY_US,
    "2 years": 500 * DAY_US,
    "5 years": 1_000 * DAY_US,
    "older": 3_000 * DAY_US,
}
CUT_OFF = NOW_US - 30 * DAY_US
OWNERS = [f"owner-{number}" for number in range(40)]
VALUE = b"v" * 100


def run(tmp_path: Path, body: Callable[[ThreeTiers], Awaitable[None]], tables: list[str] | None = None) -> None:
    async def main() -> None:
        shape = topology(tables=dict.fromkeys(tables or ["t"], POLICY))
        async with ThreeTiers(tmp_path, shape) as tiers:
            await body(tiers)

    asyncio.run(asyncio.wait_for(main(), 60))


async def fill(tiers: ThreeTiers) -> None:
    """One item of each age for each owner, all within three seconds."""
    items = [(owner, NOW_US - age + n, VALUE) for owner in OWNERS for age in AGES_US.values() for n in range(3)]
    await tiers.table.put_many(items)


async def look(tiers: ThreeTiers, table: str | None = None, *, exact: bool = True, error: float = 0.05) -> Survey:
    script = survey(tiers.store.view, now_us=NOW_US, table=table, exact=exact, error=error)
    return await drive(script, tiers.storage.client)


def by_age(figures: list[int]) -> dict[str, int]:
    return dict(zip(BIN_NAMES, figures, strict=True))


def test_every_item_that_was_loaded_is_counted_once_in_its_tier_and_at_its_age(tmp_path: Path) -> None:
    async def body(tiers: ThreeTiers) -> None:
        await fill(tiers)
        each = 3 * len(OWNERS)
        (hot,) = (await look(tiers)).tables
        assert by_age(hot.storage_items) == dict.fromkeys(BIN_NAMES, each)
        assert sum(hot.cold_items) == 0
        assert all(nbytes > each * len(VALUE) for nbytes in hot.storage_bytes)
        assert (hot.buckets_asked, hot.factor, hot.storage_error) == (hot.buckets, 1.0, 0.0)

        report = await tiers.sink_and_evict(CUT_OFF)
        (sunk,) = (await look(tiers)).tables
        young = {"hour", "day", "week", "month"}
        assert by_age(sunk.storage_items) == {name: each if name in young else 0 for name in BIN_NAMES}
        assert sum(sunk.cold_items) == report.rows == 5 * each
        assert sum(sunk.cold_raw_bytes) == report.raw_bytes
        assert sum(sunk.cold_bytes) == report.cold_bytes
        assert by_age(sunk.cold_items) == {name: 0 if name in young else each for name in BIN_NAMES}
        assert sunk.data_curve()[-1] == 1.0
        assert sunk.data_curve() == sorted(sunk.data_curve())

    run(tmp_path, body)


def test_deleted_items_are_not_counted_and_late_writes_count_in_both_tiers(tmp_path: Path) -> None:
    async def body(tiers: ThreeTiers) -> None:
        await fill(tiers)
        await tiers.sink_and_evict(CUT_OFF)
        before = (await look(tiers)).tables[0]
        owner = OWNERS[0]
        await tiers.table.delete(owner, NOW_US - AGES_US["week"])
        await tiers.table.put(owner, NOW_US - AGES_US["older"], b"late")
        after = (await look(tiers)).tables[0]
        assert sum(after.storage_items) == sum(before.storage_items)
        assert by_age(after.storage_items)["week"] == by_age(before.storage_items)["week"] - 1
        assert by_age(after.storage_items)["older"] == 1
        assert after.cold_items == before.cold_items, "a block changes only with the next sink"
        await tiers.table.delete_timeline(OWNERS[1])
        await wait_for(lambda: all(s.status()["chores"] == 0 for s in tiers.storage.services.values()), "the purge")
        wiped = (await look(tiers)).tables[0]
        assert sum(wiped.storage_items) == sum(after.storage_items) - 4 * 3

    run(tmp_path, body)


def test_a_sample_is_right_within_the_error_that_it_states(tmp_path: Path) -> None:
    async def body(tiers: ThreeTiers) -> None:
        random = Random(7)
        items = [(f"o{n}", NOW_US - random.randrange(1, 120) * DAY_US, VALUE) for n in range(2_000)]
        await tiers.table.put_many(items)
        await tiers.sink_and_evict(CUT_OFF)
        (exact,) = (await look(tiers)).tables
        (sampled,) = (await look(tiers, exact=False, error=0.2)).tables
        assert sampled.buckets_asked < sampled.buckets
        assert sampled.factor == sampled.buckets / sampled.buckets_asked
        for error, some, all_ in (
            (sampled.storage_error, sampled.storage_bytes, exact.storage_bytes),
            (sampled.cold_error, sampled.cold_raw_bytes, exact.cold_raw_bytes),
        ):
            assert 0 < error <= 0.2
            assert abs(sum(some) - sum(all_)) <= 2 * error * sum(all_), "twice the error: 1 in 10,000"

    shape = topology(tables={"t": POLICY}, buckets=512)

    async def main() -> None:
        async with ThreeTiers(tmp_path, shape) as tiers:
            await body(tiers)

    asyncio.run(asyncio.wait_for(main(), 60))


def test_reads_are_counted_by_the_age_of_what_was_asked_for_and_of_what_pages_brought(tmp_path: Path) -> None:
    async def body(tiers: ThreeTiers) -> None:
        await fill(tiers)
        asked = {"hour": 9, "week": 5, "older": 2}
        for name, count in asked.items():
            for number in range(count):
                await tiers.table.get(OWNERS[number], NOW_US - AGES_US[name])
        await tiers.table.get_many([(owner, NOW_US - AGES_US["year"] + 1) for owner in OWNERS])
        expected = {**dict.fromkeys(BIN_NAMES, 0), **asked, "year": len(OWNERS)}
        (found,) = (await look(tiers)).tables
        assert by_age(found.reads_hour) == by_age(found.reads_day) == expected

        for _ in range(2):  # the first one fills the page, the second is answered from it
            page = await tiers.table.timeline(OWNERS[0], limit=10)
            assert len(page.items) == 10
        for name, count in {"hour": 3, "day": 3, "week": 3, "month": 1}.items():
            expected[name] += 2 * count
        await tiers.table.timeline(OWNERS[0], limit=4, before=NOW_US - AGES_US["quarter"])
        expected["year"] += 3
        expected["2 years"] += 1
        (found,) = (await look(tiers)).tables
        assert by_age(found.reads_day) == expected
        assert found.read_curve()[-1] == 1.0

    run(tmp_path, body)


def test_reads_that_storage_nodes_answer_are_counted_too(tmp_path: Path) -> None:
    async def body(tiers: ThreeTiers) -> None:
        await fill(tiers)
        tiers.storage.network.kill("cache-0-0")
        for owner in OWNERS:
            await tiers.table.get(owner, NOW_US - AGES_US["day"])
        found = await look(tiers)
        assert by_age(found.tables[0].reads_day)["day"] >= len(OWNERS)
        assert list(found.silent) == ["cache-0-0"]

    async def with_own_clock(tiers: ThreeTiers) -> None:
        for service in tiers.storage.services.values():
            service._reader._looks.read_ages._wall_us = lambda: NOW_US
        await body(tiers)

    run(tmp_path, with_own_clock)


def test_pages_in_memory_are_counted_with_the_memory_that_they_take(tmp_path: Path) -> None:
    async def body(tiers: ThreeTiers) -> None:
        await fill(tiers)
        await tiers.table.timelines(OWNERS, limit=6)
        cache = tiers.cache._cache
        for exact in (True, False):
            (found,) = (await look(tiers, exact=exact)).tables
            assert sum(found.memory_bytes) == pytest.approx(cache.nbytes, abs=9)
            assert sum(found.memory_items) == sum(len(cache.peek(key) or ()) for key in cache.timelines()) > 0
        assert by_age(found.memory_items)["hour"] == 3 * len(OWNERS)

    run(tmp_path, body)


def test_tables_are_told_apart(tmp_path: Path) -> None:
    async def body(tiers: ThreeTiers) -> None:
        other = tiers.store.table("tt")
        await tiers.table.put("alice", NOW_US - AGES_US["day"], b"x")
        await other.put_many([("alice", NOW_US - AGES_US["week"] + at, b"x") for at in range(5)])
        await other.get("alice", NOW_US - AGES_US["week"])
        found = {tiers.table: tiers for tiers in (await look(tiers)).tables}
        assert list(found) == ["t", "tt"], "a table without data is not shown"
        assert (sum(found["t"].storage_items), sum(found["tt"].storage_items)) == (1, 5)
        assert (sum(found["t"].reads_day), sum(found["tt"].reads_day)) == (0, 1)
        (only,) = (await look(tiers, "tt")).tables
        assert only.table == "tt"

    run(tmp_path, body, ["t", "tt", "unused"])


def test_a_dead_storage_node_is_done_without_and_a_dead_group_is_an_error(tmp_path: Path) -> None:
    async def body(tiers: ThreeTiers) -> None:
        await fill(tiers)
        tiers.storage.network.kill("storage-0-1")
        found = await look(tiers)
        assert sum(found.tables[0].storage_items) == 27 * len(OWNERS)
        assert "storage-0-1" in found.silent
        for number in (0, 2):
            tiers.storage.network.kill(f"storage-0-{number}")
        with pytest.raises(Unavailable, match="storage group 0"):
            await look(tiers)

    run(tmp_path, body)


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    async def body(tiers: ThreeTiers) -> None:
        with pytest.raises(InvalidRequest, match="known tables: t"):
            await look(tiers, "other")
        with pytest.raises(InvalidRequest, match=r"0\.05"):
            await look(tiers, error=0)

    run(tmp_path, body)


def test_costs_count_every_copy_at_its_price() -> None:
    table = TableTiers("t", 1, 64)
    table.memory_bytes[0] = 2 * 10**9
    table.storage_bytes[1] = 10 * 10**9
    table.cold_raw_bytes[8] = 100 * 10**9
    table.cold_bytes[8] = 40 * 10**9
    costs = costs_of([table], Prices(5, 0.1, 0.02), storage_replicas=3, cold_replicas=3)
    assert (costs.memory, costs.storage, costs.cold) == pytest.approx((10, 3, 2.4))
    assert costs.total == pytest.approx(15.4)
    assert (costs.all_in_storage, costs.all_in_memory) == pytest.approx((33, 550))


def test_a_survey_is_text_and_json() -> None:
    table = TableTiers("t", 1, 64, buckets_asked=16, factor=4.0, storage_error=0.04, cold_error=float("inf"))
    table.storage_bytes[0], table.cold_raw_bytes[8], table.reads_day[0] = 10**6, 3 * 10**6, 50
    found = Survey(NOW_US, False, [table], {"cache-0-1": "it is away"})
    told = json.loads(json.dumps(survey_json(found, PricesConfig(), topology()), allow_nan=False))
    assert told["tables"][0]["data_up_to_age"][0] == 0.25
    assert told["tables"][0]["reads_up_to_age"] == [1.0] * 9
    assert (told["tables"][0]["factor"], told["tables"][0]["cold_error"]) == (4.0, None)
    assert told["prices"]["currency"] == "USD"
    text = survey_text(found, PricesConfig(), topology())
    for words in ("16 of 64 buckets", "scaled by 4", "within 4.0%", "25.0% ######", "100.0%", "USD/month", "cache-0-1"):
        assert words in text
    assert survey_text(Survey(NOW_US, True), PricesConfig(), topology()) == "there is no data in any table"


def test_timestamps_of_any_unit_have_the_same_ages(tmp_path: Path) -> None:
    per_second = 1_000
    policy = TablePolicy(per_second=per_second, cold_after=30 * 86_400_000, window=90 * 86_400_000)

    async def main() -> None:
        async with ThreeTiers(tmp_path, topology(tables={"t": policy})) as tiers:
            await tiers.table.put_many([("alice", (NOW_US - age) // 1_000, b"x") for age in AGES_US.values()])
            (found,) = (await look(tiers)).tables
            assert found.storage_items == [1] * len(BIN_NAMES)

    asyncio.run(asyncio.wait_for(main(), 60))
