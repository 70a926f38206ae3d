"""Guarantees of the page cache and the block cache: bounded memory, scan resistance, never an older page."""

from __future__ import annotations

import random
from dataclasses import dataclass

from timetier.cluster.cold.block_cache import BlockCache
from timetier.cluster.keys import MIN_TIMESTAMP, item_key
from timetier.cluster.memory.page_cache import PageCache
from timetier.cluster.memory.pages import Page, Rows


def page(version: int = 1, items: int = 10, high: bytes = b"") -> Page:
    keys = [item_key(n) for n in range(items, 0, -1)]
    rows = Rows(keys, bytes(items), [bytes(50)] * items, [1] * items, [0] * items)
    return Page.of(rows, version=version, low=b"", high=high, horizon=MIN_TIMESTAMP)


def name(number: int) -> bytes:
    return b"timeline%d" % number


def test_memory_stays_within_the_budget_and_is_counted_exactly() -> None:
    rng, budget = random.Random(5), 60_000
    cache = PageCache(budget)
    kept: dict[bytes, int] = {}
    for step in range(3_000):
        timeline = name(rng.randrange(60))
        action = rng.random()
        if action < 0.5:
            cache.put(timeline, page(version=step, items=rng.randrange(0, 40)))
        elif action < 0.95:
            cache.get(timeline)
        else:
            cache.drop(timeline)
        assert 0 <= cache.nbytes <= budget
    for number in range(60):
        found = cache.get(name(number))
        if found is not None:
            kept[name(number)] = found.nbytes
    assert cache.evictions > 0 and len(cache) == len(kept)
    for timeline in kept:
        cache.drop(timeline)
    assert cache.nbytes == 0 and len(cache) == 0


def test_one_scan_does_not_flush_what_is_read_again_and_again() -> None:
    one = page().nbytes
    cache = PageCache(one * 100)
    hot = [name(n) for n in range(40)]
    for timeline in hot:
        cache.put(timeline, page())
        assert cache.get(timeline) is not None
    for n in range(1_000, 6_000):
        assert cache.get(name(n)) is None
        cache.put(name(n), page())
    assert all(cache.get(timeline) is not None for timeline in hot)


def test_pages_that_nobody_reads_any_more_leave_when_others_are_read_again() -> None:
    cache = PageCache(page().nbytes * 20)
    for generation in range(3):
        for n in range(10):
            timeline = name(generation * 100 + n)
            cache.put(timeline, page())
            for _ in range(3):
                cache.get(timeline)
    assert sum(cache.get(name(n)) is not None for n in range(10)) < 10
    assert all(cache.get(name(200 + n)) is not None for n in range(10))


def test_an_older_page_never_replaces_a_later_one() -> None:
    cache = PageCache(1 << 20)
    cache.put(b"t", page(version=7))
    cache.put(b"t", page(version=6))
    found = cache.get(b"t")
    assert found is not None and found.version == 7
    cache.put(b"t", page(version=6))
    cache.put(b"t", page(version=8, items=0))
    found = cache.get(b"t")
    assert found is not None and found.version == 8
    cache.put(b"t", page(version=7))
    found = cache.get(b"t")
    assert found is not None and found.version == 8, "an empty page counts too"


def test_pieces_that_do_not_reach_the_newest_item_are_not_kept() -> None:
    cache = PageCache(1 << 20)
    cache.put(b"t", page(high=item_key(99)))
    assert len(cache) == 0 and cache.get(b"t") is None


def test_a_budget_of_zero_keeps_nothing() -> None:
    cache = PageCache(0)
    cache.put(b"t", page(items=0))
    assert cache.get(b"t") is None and cache.nbytes == 0
    assert not cache.is_warm(b"t") and not cache.is_warm(b"t")


def test_a_page_that_outgrows_the_budget_leaves() -> None:
    cache = PageCache(5_000)
    cache.put(b"t", page(items=2))
    assert cache.get(b"t") is not None
    cache.put(b"t", page(version=2, items=400))
    assert cache.get(b"t") is None and cache.nbytes == 0


def test_a_timeline_is_warm_when_it_was_asked_for_before_and_the_memory_of_it_is_bounded() -> None:
    cache = PageCache(1 << 20)
    assert not cache.is_warm(b"t")
    assert cache.is_warm(b"t")
    for n in range(20_000):
        cache.is_warm(name(n))
    assert not cache.is_warm(b"t")


@dataclass
class Block:
    nbytes: int


def test_decoded_blocks_stay_within_their_budget_least_recently_used_first_out() -> None:
    blocks: BlockCache[Block] = BlockCache(100)
    for offset in range(4):
        blocks.put("f", offset, Block(30))
    assert blocks.nbytes == 90 and blocks.get("f", 0) is None
    assert blocks.get("f", 1) is not None
    blocks.put("f", 9, Block(30))
    assert blocks.get("f", 2) is None and blocks.get("f", 1) is not None
    blocks.put("g", 0, Block(101))
    assert blocks.get("g", 0) is None and blocks.nbytes <= 100
