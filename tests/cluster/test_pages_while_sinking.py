"""Pages across the tiers have no gap and no double while rows sink, late ones come, and others are deleted."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from pathlib import Path

import pytest
from open_tiers import SMALL_BLOCKS, OpenTiers, open_tiers
from storage_cluster import POLICY
from timetier.cluster.client.store import AsyncTable

STEP = POLICY.window // 16
OWNERS = [f"owner-{number}" for number in range(5)]
PLACES = 96  # instants of a timeline; every third one is written and deleted all the time, the others stay
WALKS = 24
SETTINGS = dataclasses.replace(SMALL_BLOCKS, block_rows=8, orphan_grace_s=2)

Values = dict[tuple[str, int], list[bytes | None]]
"""What was written at an instant of an owner, in order; None for a deletion."""


def value_of(owner: str, at: int) -> bytes:
    return b"%d of " % at + owner.encode()


class Writers:
    """Writes and deletes at every third instant, one after the other; `values` has what was begun."""

    def __init__(self, table: AsyncTable, choose: random.Random) -> None:
        self.table = table
        self.choose = choose
        self.values: Values = {}
        self.writes = 0

    async def fill(self) -> None:
        for owner in OWNERS:
            await self.table.put_many([(owner, at * STEP, value_of(owner, at)) for at in range(PLACES)])
            self.values.update({(owner, at): [value_of(owner, at)] for at in range(0, PLACES, 3)})

    async def run(self) -> None:
        while True:
            owner, at = self.choose.choice(OWNERS), self.choose.randrange(0, PLACES, 3)
            self.writes += 1
            if self.choose.random() < 0.4:
                self.values[owner, at].append(None)
                await self.table.delete(owner, at * STEP)
            else:
                value = b"late %d" % self.writes
                self.values[owner, at].append(value)
                await self.table.put(owner, at * STEP, value)


async def sink_for_ever(tiers: OpenTiers, choose: random.Random) -> None:
    while True:
        await tiers.sink(before=choose.randrange(PLACES // 2, PLACES + 20) * STEP, settings=SETTINGS)


async def walk(writers: Writers, owner: str, limit: int) -> None:
    """Read a timeline from its newest item to its oldest, by pages of `limit`, and judge what comes."""
    began = {at: len(writers.values[owner, at]) for at in range(0, PLACES, 3)}
    found: dict[int, bytes] = {}
    before: str | None = None
    last = PLACES * STEP
    while True:
        page = await writers.table.timeline(owner, limit=limit, before=before)
        assert len(page.items) <= limit
        for item in page.items:
            assert item.timestamp < last, f"{owner}: {item.timestamp} after {last} (limit {limit})"
            last = item.timestamp
            found[item.timestamp // STEP] = item.value
        if page.next is None:
            break
        before = page.next
    for at in range(PLACES):
        if at % 3:
            assert found.get(at) == value_of(owner, at), f"{owner}: a gap at {at}, or another value (limit {limit})"
            continue
        # One write is under way at a time, so all but the last one that had begun were acknowledged.
        possible = writers.values[owner, at][max(0, began[at] - 2) :]
        assert found.get(at) in possible, f"{owner}: {found.get(at)!r} at {at} is none of {possible}"


@pytest.mark.parametrize("seed", [1, 2])
def test_a_walk_of_any_page_size_finds_every_item_once_while_rows_sink_and_others_come_and_go(
    tmp_path: Path, seed: int
) -> None:
    print("seed", seed)
    choose = random.Random(seed)

    async def body() -> None:
        async with open_tiers(tmp_path, seed=seed) as tiers:
            writers = Writers(tiers.client.table("t"), choose)
            await writers.fill()
            tasks = [asyncio.create_task(writers.run()), asyncio.create_task(sink_for_ever(tiers, choose))]
            try:
                for number in range(WALKS):
                    limits = [choose.choice([1, 2, 3, 5, 7, 10, 16, 33, 64, 200]) for _ in range(3)]
                    walks = [walk(writers, choose.choice(OWNERS), limit) for limit in limits[: 1 + number % 3]]
                    await asyncio.gather(*walks)
                    for task in tasks:
                        if task.done():
                            task.result()
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            assert tiers.runs > 5 and writers.writes > 50, (tiers.runs, writers.writes)
            blocks = sum(int(node.counters.totals.get("block_reads", 0)) for node in tiers.cold)
            assert blocks > WALKS, "the walks went to the cold tier"
            for owner in OWNERS:
                await walk(writers, owner, 11)

    asyncio.run(asyncio.wait_for(body(), 120))
