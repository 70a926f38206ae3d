"""Where the CPU time of a call with 1,000 strong reads goes, step by step: of 1,000 items, or of the newest 20 of 50
timelines.

    python -m benchmarks.read_budget [--calls 200] [--owners 2000] [--json]

A client, a cache node's pages and the version caches of three replicas in one thread: the production code of each step,
without sockets and event loop, so that each step can be timed by itself. All pages are in memory and current, which is
what nearly all reads meet. Printed: microseconds of CPU an item, and a page; each step's median over the calls.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from timetier.cluster.client.item_reads import ItemResults
from timetier.cluster.client.items import item_queries, page_queries, to_pages
from timetier.cluster.client.page_reads import PageResults
from timetier.cluster.counters import Counters
from timetier.cluster.keys import MIN_TIMESTAMP, digest_seed, item_key, priority_index, timeline_digest, timeline_key
from timetier.cluster.memory.columns import Glance, ItemGlance, PageGlance
from timetier.cluster.memory.glances import MAX_REPLICAS, Glances, Label
from timetier.cluster.memory.incarnations import Incarnations
from timetier.cluster.memory.page_cache import PageCache
from timetier.cluster.memory.pages import Page, Rows
from timetier.cluster.messages import (
    PUT,
    FoundItems,
    Message,
    Pages,
    ReadItems,
    ReadPages,
    Same,
    decode,
    encode,
    pack_u32,
    unpack_u32,
)
from timetier.cluster.paxos.versions import Versions
from timetier.cluster.storage.version_cache import Owner, VersionCache
from timetier.cluster.suspicion import Suspicion

T = TypeVar("T")

ITEMS_PER_CALL = 1_000
PAGES_PER_CALL = 50
PAGE_ITEMS = 20
MAX_PAGE_BYTES = 256 << 10
ITEMS_PER_TIMELINE = 25
VALUE_BYTES = 200
BUCKETS = 1024
TABLE = b"bench"
VERSION = 7
SEED = digest_seed("read budget")
NAMES = [f"storage-0-{number}" for number in range(3)]


class Budget:
    """The nodes of one read path. `spent_us`: microseconds of CPU of each call, by step; `calls`: how many."""

    def __init__(self, owners: int, seed: int) -> None:
        self.spent_us: defaultdict[str, list[float]] = defaultdict(list)
        self.calls = 0
        self._random = random.Random(seed)
        self._owners = [f"owner-{number}" for number in range(owners)]
        self._replicas = {
            name: Versions(VersionCache(bytearray(16 << 20), Owner(b"read budget", 1, None, SEED)), (number, 1, 1))
            for number, name in enumerate(NAMES)
        }
        self._cache = PageCache(1 << 30)
        for owner in self._owners:
            self._load(timeline_key(TABLE, owner.encode(), BUCKETS))
        self._glances = Glances(
            Suspicion(time.monotonic, first_s=1.0, longest_s=8.0),
            Incarnations(),
            Counters(),
            attempt_timeout_s=0.3,
            probation_timeout_s=0.1,
        )

    def _load(self, timeline: bytes) -> None:
        keys = [item_key(timestamp) for timestamp in range(ITEMS_PER_TIMELINE)][::-1]
        values = [self._random.randbytes(VALUE_BYTES) for _ in keys]
        rows = Rows(keys, bytes([PUT]) * len(keys), values, [VERSION] * len(keys), [1_700_000_000_000_000] * len(keys))
        page = Page.of(rows, version=VERSION, low=b"", high=b"", horizon=MIN_TIMESTAMP)
        digest, order = timeline_digest(timeline, SEED), priority_index(timeline, len(NAMES))
        mark = self._replicas[NAMES[0]].mark
        page.label = Label(digest, VERSION, (mark,) * MAX_REPLICAS, order).packed()
        self._cache.put(timeline, page)
        for replica in self._replicas.values():
            replica.mark = mark  # as if each page had been read from each of them
            replica.cache.note(digest, np.array([VERSION]))

    def _timed(self, step: str, work: Callable[[], T]) -> T:
        began = time.process_time_ns()
        found = work()
        self.spent_us[step].append((time.process_time_ns() - began) / 1_000)
        return found

    def read_items(self) -> None:
        """One call for items; every item must be found."""
        asked = [
            (self._random.choice(self._owners), self._random.randrange(ITEMS_PER_TIMELINE))
            for _ in range(ITEMS_PER_CALL)
        ]
        timed = self._timed
        queries = timed("client: arguments to columns", lambda: item_queries(TABLE, BUCKETS, asked))
        question = self._travel("codec: question", ReadItems(1, queries.timelines, queries.keys, 500))
        assert isinstance(question, ReadItems)
        look = timed("cache: find pages and items", lambda: ItemGlance(self._cache, question.timelines, question.keys))
        self._prove(look)
        answer = timed("cache: columns of the answer", lambda: look.answer(bytearray(ITEMS_PER_CALL), {}))
        found = self._travel("codec: answer, to items", answer)
        assert isinstance(found, FoundItems)
        items = timed("client: results", lambda: ItemResults.of(found)).items
        assert len(items) == ITEMS_PER_CALL and None not in items
        self.calls += 1

    def read_pages(self) -> None:
        """One call for pages; all must be full."""
        asked = self._random.sample(self._owners, PAGES_PER_CALL)
        timed = self._timed
        queries = timed("client: arguments to columns", lambda: page_queries(TABLE, BUCKETS, asked, PAGE_ITEMS))
        columns = (queries.timelines, queries.before, pack_u32(queries.limits))
        question = self._travel("codec: question", ReadPages(1, *columns, 500))
        assert isinstance(question, ReadPages)
        limits = unpack_u32(question.limits)
        look = timed("cache: find pages", lambda: PageGlance(self._cache, question.timelines, question.before, limits))
        self._prove(look)
        answer = timed(
            "cache: columns of the answer", lambda: look.answer(bytearray(PAGES_PER_CALL), {}, MAX_PAGE_BYTES)
        )
        found = self._travel("codec: answer, to items", answer)
        assert isinstance(found, Pages)
        pages = timed("client: pages", lambda: to_pages(PageResults.of(found)))
        assert [len(page.items) for page in pages] == [PAGE_ITEMS] * PAGES_PER_CALL
        self.calls += 1

    def _travel(self, step: str, message: Message) -> Message:
        frame = self._timed(step, lambda: encode(message))
        return self._timed(step, lambda: decode(frame))

    def _prove(self, look: Glance) -> None:
        """Have the pages proven to be current."""
        timed = self._timed
        pages = timed("cache: each page once", look.covered)
        script = self._glances.prove(pages, NAMES)
        calls = timed("cache: ask whether pages are current", lambda: next(script))
        replies = []
        for node, question in [(one.node, one.message) for one in calls]:  # type: ignore[union-attr]
            replica = self._replicas[node]
            others = timed(
                "replicas: version caches (two of three for each page)",
                lambda replica=replica, question=question: replica.others(question.digests, question.versions),  # type: ignore[misc]
            )
            replies.append(Same(pack_u32(others), replica.mark, [1, 1, 1]))
        assert timed("cache: count votes", lambda: _result(script, replies)) == [], "a page was not proven"

    def per_unit_us(self, units: int) -> dict[str, float]:
        """Median over the calls, by step, divided by `units`; a step that a call does several times is summed."""
        found = {}
        for step, spent in self.spent_us.items():
            times = len(spent) // self.calls
            sums = [sum(spent[at : at + times]) for at in range(0, times * self.calls, times)]
            found[step] = statistics.median(sums) / units
        return found


def _result(script: Any, replies: list[Same]) -> Any:
    try:
        script.send(replies)
    except StopIteration as done:
        return done.value
    raise AssertionError("a proof takes one round")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--owners", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    report: dict[str, dict[str, float]] = {}
    for unit, units, call in (
        ("item", ITEMS_PER_CALL, Budget.read_items),
        ("page", PAGES_PER_CALL, Budget.read_pages),
    ):
        budget = Budget(options.owners, options.seed)
        for _ in range(options.calls + 10):
            call(budget)
        steps = budget.per_unit_us(units)
        report[f"us_per_{unit}"] = {**steps, "all": sum(steps.values())}
    if options.json:
        print(json.dumps(report))
        return
    for heading, steps in report.items():
        print(heading)
        for step, spent_us in steps.items():
            print(f"  {step:58s} {spent_us:6.3f}")


if __name__ == "__main__":
    main()
