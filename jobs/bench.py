"""Measures a cluster that runs: the workloads of `bench_workloads.py` in a table of the user's choice.

The timelines that it writes are its own, told by a random prefix of their owners, and are deleted in the end.
"""

from __future__ import annotations

import asyncio
import secrets
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..cluster.client.items import Item, Page
from ..cluster.client.store import AsyncStore, AsyncTable
from ..cluster.errors import TimeTierError, Unavailable
from .bench_data import PER_OWNER, Dataset, Key, Write
from .bench_report import figures, merging, sample, storage_counters
from .bench_workloads import WORKLOADS, Bench, Timing, Workload, check, check_pages, load

Tell = Callable[[int, int | None], None]

COUNTED = ("put", "mix")
"""Kinds of workloads whose fsyncs, messages and Prepares are counted."""

_WRITERS = 1_000  # owners of new items: a call of 1,000 writes has as many timelines
_DELETES_AT_ONCE = 500


class TimeTierSubject:
    """A table of a cluster, by its client for asyncio."""

    blocking = False

    def __init__(self, table: AsyncTable) -> None:
        self._table = table
        self.get_many, self.put_many = table.get_many, table.put_many

    def key(self, owner: str, timestamp: int) -> Key:
        return owner, timestamp

    def write(self, owner: str, timestamp: int, value: bytes) -> Write:
        return owner, timestamp, value

    async def get(self, key: Key) -> Item | None:
        return await self._table.get(*key)

    async def put(self, write: Write) -> int:
        return await self._table.put(*write)

    async def page(self, owner: str, limit: int) -> Page:
        return await self._table.timeline(owner, limit=limit)

    async def pages(self, owners: list[str], limit: int) -> list[Page]:
        return await self._table.timelines(owners, limit=limit)

    def values(self, answer: Item | list[Item | None] | None) -> list[bytes | None]:
        if answer is None or isinstance(answer, Item):
            answer = [answer]
        return [None if item is None else item.value for item in answer]

    def page_values(self, answer: Page | list[Page]) -> list[list[bytes]]:
        pages = [answer] if isinstance(answer, Page) else answer
        return [[item.value for item in page.items] for page in pages]


@dataclass(frozen=True)
class BenchOptions:
    """`items`: that are loaded for reads (and a quarter of them for the mix). `seconds`: of each slice."""

    items: int = 20_000
    seconds: float = 1.0
    repeats: int = 3
    only: tuple[str, ...] = tuple(WORKLOADS)
    value_bytes: int = 200
    seed: int = 0


def datasets(prefix: str, options: BenchOptions, *, per_second: int) -> tuple[Dataset, Dataset, Dataset]:
    """What is read, whose timelines are written (they begin with one item), and what the mix reads and writes."""
    owners = max(_WRITERS, options.items // PER_OWNER)
    step = per_second
    base = int(time.time()) * per_second - PER_OWNER * step
    size = options.value_bytes
    reads = Dataset(f"{prefix}-r-", max(1, options.items // PER_OWNER), base, step, value_bytes=size)
    writes = Dataset(f"{prefix}-w-", owners, base, step, per_owner=1, value_bytes=size)
    mix = Dataset(f"{prefix}-m-", max(1, options.items // PER_OWNER // 4), base, step, value_bytes=size)
    return reads, writes, mix


async def run_bench(
    store: AsyncStore, table_name: str, options: BenchOptions, step: Callable[[str], Any]
) -> dict[str, Any]:
    """Load, check, measure, clean up; the report, ready for JSON.

    `step`: opens the progress display of one step. Raises InvalidRequest when the table is not configured, Unavailable
    when what was read is not what was written.
    """
    table = store.table(table_name)
    prefix = f"bench-{secrets.token_hex(4)}"
    reads, writes, mix = datasets(prefix, options, per_second=table.policy.per_second)
    subject = TimeTierSubject(table)
    bench = Bench(lambda _: subject, reads=reads, writes=writes, mix=mix, seed=options.seed)
    try:
        with step("loading") as tell:
            took = await load(subject, reads, progress=tell)
            for data in (mix, writes):
                await load(subject, data)
        rng = np.random.default_rng(options.seed)
        wrong = await check(subject, reads, rng) + await check_pages(subject, reads, rng)
        if wrong:
            raise Unavailable(f"{wrong} of {len(reads):,} items were not read as they had been written")
        with step("measuring") as tell:
            measured = await _measure(store, bench, options, tell)
    finally:
        with step("cleaning up") as tell:
            try:
                await _delete(table, [*reads.names, *mix.names, *writes.names], tell)
            except TimeTierError as error:
                raise Unavailable(
                    f"timelines whose owners begin with {prefix}- are left in table {table_name}: {error.message}"
                ) from error
    return {
        "table": table_name,
        "prefix": prefix,
        "items": len(reads),
        "value_bytes": options.value_bytes,
        "loads_per_s": round(len(reads) / took),
        **measured,
    }


async def _measure(store: AsyncStore, bench: Bench, options: BenchOptions, tell: Tell) -> dict[str, Any]:
    chosen = [WORKLOADS[name] for name in options.only]
    timings: dict[str, list[Timing]] = {workload.name: [] for workload in chosen}
    merged: dict[str, list[dict[str, float]]] = {}
    for repeat in range(options.repeats):
        for number, workload in enumerate(chosen):
            timings[workload.name].append(await _slice(store, bench, workload, options.seconds, merged))
            tell(repeat * len(chosen) + number + 1, options.repeats * len(chosen))
    return {
        "workloads": {
            name: {"title": WORKLOADS[name].title, **figures(found), "samples": [sample(timing) for timing in found]}
            for name, found in timings.items()
        },
        "merging": {name: _medians(found) for name, found in merged.items()},
    }


async def _slice(
    store: AsyncStore, bench: Bench, workload: Workload, seconds: float, merged: dict[str, list[dict[str, float]]]
) -> Timing:
    """One slice; notes in `merged` what its writes cost, if all storage nodes tell."""
    if workload.kind not in COUNTED:
        return await bench.slice(workload, seconds)
    before = storage_counters((await store.status())["nodes"])
    timing = await bench.slice(workload, seconds)
    after = storage_counters((await store.status())["nodes"])
    if after and all(before.get(node) for node in after) and all(after.values()):
        replicas = store.view.routing.topology.storage_replicas
        merged.setdefault(workload.name, []).append(merging(before, after, replicas=replicas))
    return timing


def _medians(found: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(one[name] for one in found), 3) for name in found[0]}


async def _delete(table: AsyncTable, owners: Iterable[str], tell: Tell) -> None:
    names = list(owners)
    for first in range(0, len(names), _DELETES_AT_ONCE):
        await asyncio.gather(*(table.delete_timeline(name) for name in names[first : first + _DELETES_AT_ONCE]))
        tell(min(len(names), first + _DELETES_AT_ONCE), len(names))
