"""What a scan of cold data and a running sink cost those who read what is hot.

    python -m benchmarks.beside [--json] [--quick]

A cluster of processes (`nodes.py`) holds old timelines, which have sunk, and hot ones. One client does the hot mix at
a fixed, modest rate: Zipf owners, newest items first, a hundred reads to a write; a latency counts from the moment when
the read was due, so that a read which waits for others is not forgotten. Three kinds of phases take turns: nothing else
goes on; another process reads old timelines page by page as fast as it can; a sink moves rows of others to the cold
tier. The figures are medians over the turns, with the least and the greatest, and the ratios to the quiet phases.

The scanner and the sink run at the lowest priority, since they stand for programs on other machines; what the nodes
do for them runs at that of the nodes.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
from timetier.cluster.client.store import AsyncStore, AsyncTable
from timetier.cluster.cold.sink_calls import settings_of
from timetier.cluster.cold.sink_script import TableSink, sink
from timetier.cluster.cold.sinking import chosen_cut_offs
from timetier.cluster.config import Config, SinkConfig
from timetier.cluster.drive import drive
from timetier.cluster.errors import TimeTierError

from .nodes import NodeProcesses, open_store

QUIET, SCAN, SINK = "quiet", "scan", "sink"
PHASES = (QUIET, SCAN, SINK)
WINDOW_US = 30 * 86_400 * 1_000_000
FIRST_US = 20 * 12 * WINDOW_US  # of old items
STEP_US = 60_000_000
VALUE_BYTES = 200
PAGE = 20
SCAN_PAGE = 500
_ZIPF = 1.1


@dataclass(frozen=True)
class Size:
    """How much there is, and how long it takes. `per_old`, `per_hot`: items of each timeline. `slice_items`: of each
    timeline of the sink's table that one run of it moves."""

    old: int
    per_old: int
    hot: int
    per_hot: int
    sinking: int
    slice_items: int
    slices: int
    phase_s: float
    rate_per_s: float


FULL = Size(600, 400, 400, 60, 300, 40, 16, 6.0, 250.0)
QUICK = Size(100, 200, 60, 40, 60, 20, 8, 2.0, 100.0)
TURNS = 5


def config_in(folder: Path) -> Config:
    """One group of each tier; few buckets, so that blocks are large."""
    table = {"timestamp_unit": "us", "cold_after": "30d", "window": "30d"}
    cache = {"block_cache_mb": 16}
    return Config.from_json(
        json.dumps({"buckets": 64, "data_dir": str(folder), "cache": cache, "default_table": table})
    )


# ---------------------------------------------------------------- data


async def load(table: AsyncTable, owners: list[str], start_us: int, items: int, rng: random.Random) -> None:
    """Give each owner items, a minute apart from `start_us` on."""
    words = [rng.randbytes(3).hex().encode() for _ in range(2_000)]
    for first in range(0, items, 20):
        stamps = [start_us + at * STEP_US for at in range(first, min(first + 20, items))]
        chunks = [owners[at : at + 100] for at in range(0, len(owners), 100)]
        for some in [chunks[at : at + 4] for at in range(0, len(chunks), 4)]:
            await asyncio.gather(
                *[
                    table.put_many(
                        [(o, t, b" ".join(rng.choices(words, k=30))[:VALUE_BYTES]) for o in chunk for t in stamps]
                    )
                    for chunk in some
                ]
            )


async def sink_before(store: AsyncStore, table: str, before_us: int, run: str) -> int:
    """Sink a table's items older than `before_us`; the number of rows."""
    policy = store.view.routing.policy(table)
    now_us = time.time_ns() // 1_000
    cut_offs = chosen_cut_offs(policy, now_us, before=before_us, by_event_time=True)
    script = sink(
        store.view,
        [TableSink(table.encode(), policy, cut_offs)],
        run=run,
        now_us=now_us,
        settings=settings_of(SinkConfig()),
    )
    report = await drive(script, store.carrier)
    if report.errors:
        raise RuntimeError(f"the sink failed: {report.errors[0]}")
    return report.rows


async def prepare(store: AsyncStore, size: Size, rng: random.Random) -> int:
    """Load everything and sink what is old; the number of rows that sank."""
    await _until_it_answers(store.table("hot"))
    await load(store.table("old"), _names("old", size.old), FIRST_US, size.per_old, rng)
    await load(store.table("sinking"), _names("s", size.sinking), FIRST_US, size.slice_items * size.slices, rng)
    await load(store.table("hot"), _names("hot", size.hot), _hot_start(), size.per_hot, rng)
    rows = 0
    while rows < size.old * size.per_old:  # a replica may not have heard of the last writes
        rows += await sink_before(store, "old", FIRST_US + 10 * WINDOW_US, f"prepare-{rows}")
    return rows


async def _until_it_answers(table: AsyncTable) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            await table.timeline("nobody")
            return
        except TimeTierError:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.1)


async def _until_evicted(store: AsyncStore) -> None:
    """Wait until no storage node has work left that a sink gave it."""
    deadline = time.monotonic() + 60
    while True:
        nodes = (await store.status())["nodes"]
        if not any(node.get("chores", 1) for name, node in nodes.items() if name.startswith("storage")):
            return
        if time.monotonic() > deadline:
            raise RuntimeError("the storage nodes still evict rows a minute after the sink")
        await asyncio.sleep(0.2)


def _names(prefix: str, count: int) -> list[str]:
    return [f"{prefix}-{number}" for number in range(count)]


def _hot_start() -> int:
    """The same in all processes of a day; what is hot is far younger than what sinks."""
    return FIRST_US + 100 * WINDOW_US


# ---------------------------------------------------------------- the hot mix


@dataclass
class Latencies:
    """Seconds that reads took, and what failed."""

    reads: list[float] = field(default_factory=list)
    failed: int = 0

    def at(self, share: float) -> float:
        ordered = sorted(self.reads)
        return ordered[min(int(len(ordered) * share), len(ordered) - 1)]


class HotMix:
    """Single reads and newest pages of hot timelines, and a few writes, at a fixed rate."""

    def __init__(self, table: AsyncTable, size: Size, seed: int) -> None:
        self._table = table
        self._size = size
        self._rng = np.random.default_rng(seed)
        self._owners = _names("hot", size.hot)
        weights = 1.0 / np.arange(1, size.hot + 1) ** _ZIPF
        self._shares = weights / weights.sum()

    async def run(self, seconds: float) -> Latencies:
        """One phase."""
        found = Latencies()
        count = int(seconds * self._size.rate_per_s)
        due = np.cumsum(self._rng.exponential(1 / self._size.rate_per_s, count))
        owners = self._rng.choice(self._size.hot, count, p=self._shares)
        ages = np.minimum(self._rng.geometric(0.1, count), self._size.per_hot)
        kinds = self._rng.random(count)
        start = time.perf_counter()
        tasks = []
        for at, owner, age, kind in zip(due.tolist(), owners.tolist(), ages.tolist(), kinds.tolist(), strict=True):
            pause_s = start + at - time.perf_counter()
            if pause_s > 0:
                await asyncio.sleep(pause_s)
            tasks.append(asyncio.create_task(self._one(self._owners[owner], age, kind, start + at, found)))
        await asyncio.gather(*tasks)
        return found

    async def _one(self, owner: str, age: int, kind: float, due: float, found: Latencies) -> None:
        timestamp = _hot_start() + (self._size.per_hot - age) * STEP_US
        try:
            if kind < 0.01:
                await self._table.put(owner, timestamp, bytes(VALUE_BYTES))
                return
            if kind < 0.5:
                await self._table.timeline(owner, limit=PAGE)
            else:
                await self._table.get(owner, timestamp)
        except TimeTierError:
            found.failed += 1
        found.reads.append(time.perf_counter() - due)


# ---------------------------------------------------------------- what goes on beside it


async def scan_until(store: AsyncStore, size: Size, is_over: Callable[[], bool], rng: random.Random) -> int:
    """Read old timelines from their newest to their oldest item; the number of items."""
    table = store.table("old")
    items = 0
    while True:
        before: str | None = None
        owner = f"old-{rng.randrange(size.old)}"
        while True:
            if is_over():
                return items
            page = await table.timeline(owner, limit=SCAN_PAGE, before=before)
            items += len(page.items)
            before = page.next
            if before is None:
                break


class Sinking:
    """Runs of the sink, each of which moves the next slice of a table."""

    def __init__(self, store: AsyncStore, size: Size) -> None:
        self._store = store
        self._size = size
        self._runs = 0

    async def until(self, is_over: Callable[[], bool]) -> int:
        rows = 0
        while not is_over() and self._runs < self._size.slices:
            self._runs += 1
            before = FIRST_US + self._runs * self._size.slice_items * STEP_US
            rows += await sink_before(self._store, "sinking", before, f"beside-{self._runs}")
        return rows


async def _helper(role: str, folder: Path, config: Config, size: Size) -> None:
    """The program of the scanner or of the sink: works from each line of its input to the next, and says how much."""
    os.nice(19)
    store = open_store(folder, config)
    sinking = Sinking(store, size)
    rng = random.Random(role)
    over = asyncio.Event()
    loop = asyncio.get_running_loop()
    work: Awaitable[int] | None = None
    while await loop.run_in_executor(None, sys.stdin.readline):
        if work is None:
            over.clear()
            task = scan_until(store, size, over.is_set, rng) if role == SCAN else sinking.until(over.is_set)
            work = asyncio.create_task(task)
        else:
            over.set()
            print(await work, flush=True)
            work = None
    await store.close()


class Helper:
    """The scanner or the sink, seen from the benchmark. With no role it does nothing."""

    def __init__(self, role: str, folder: Path, config: Config, *, quick: bool) -> None:
        command = [sys.executable, "-m", "benchmarks.beside", "--role", role, "--folder", str(folder)]
        command += ["--config", config.to_json(), *(["--quick"] if quick else [])]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).resolve().parent.parent,
            text=True,
        )

    @asynccontextmanager
    async def at_work(self, done: list[int]) -> AsyncIterator[None]:
        """It works while the body runs; then `done` gets how much it did."""
        self._say()
        yield
        self._say()
        assert self._process.stdout is not None
        line = await asyncio.to_thread(self._process.stdout.readline)
        if not line:
            raise RuntimeError(f"a helper ended with status {self._process.wait()}")
        done.append(int(line))

    def _say(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


# ---------------------------------------------------------------- the benchmark


async def measure(
    folder: Path, size: Size, turns: int, *, tell: Callable[[str], None], phases: Sequence[str] = PHASES
) -> dict[str, Any]:
    """The phases, `QUIET` among them, in turns; figures ready for JSON."""
    config = config_in(folder)
    found: dict[str, list[Latencies]] = {phase: [] for phase in phases}
    done: dict[str, list[int]] = {phase: [] for phase in phases if phase != QUIET}
    with NodeProcesses(folder, config):
        store = open_store(folder, config)
        tell("loading and sinking")
        rows = await prepare(store, size, random.Random(1))
        mix = HotMix(store.table("hot"), size, 2)
        await _until_evicted(store)
        await mix.run(size.phase_s / 2)
        helpers = {role: Helper(role, folder, config, quick=size is QUICK) for role in done}
        try:
            for turn in range(turns):
                for phase in phases:
                    tell(f"turn {turn + 1} of {turns}: {phase}")
                    if phase == QUIET:
                        found[phase].append(await mix.run(size.phase_s))
                    else:
                        async with helpers[phase].at_work(done[phase]):
                            found[phase].append(await mix.run(size.phase_s))
                        await _until_evicted(store)
        finally:
            for helper in helpers.values():
                helper.end()
        await store.close()
    return _report(size, rows, found, done)


def _report(size: Size, rows: int, found: dict[str, list[Latencies]], done: dict[str, list[int]]) -> dict[str, Any]:
    phases: dict[str, Any] = {}
    quiet = {name: [one.at(share) for one in found[QUIET]] for name, share in (("p50", 0.5), ("p99", 0.99))}
    for phase, latencies in found.items():
        figures: dict[str, Any] = {
            "reads": sum(len(one.reads) for one in latencies),
            "failed": sum(one.failed for one in latencies),
        }
        for name, share in (("p50", 0.5), ("p99", 0.99)):
            each = [one.at(share) for one in latencies]
            figures[f"{name}_ms"] = _spread([1e3 * value for value in each])
            ratios = [value / base for value, base in zip(each, quiet[name], strict=True)]
            figures[f"{name}_ratio"] = _spread(ratios)
        if phase in done:
            figures["per_s"] = round(statistics.median(done[phase]) / size.phase_s)
        phases[phase] = figures
    return {"rate_per_s": size.rate_per_s, "turns": len(found[QUIET]), "sunk_rows": rows, "phases": phases}


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
    }


def print_report(report: dict[str, Any]) -> None:
    """The figures of `measure`, for people."""
    print(f"hot mix at {report['rate_per_s']:g} a second, {report['turns']} turns, {report['sunk_rows']} cold rows")
    print(f"{'beside':8} {'p50 ms':>8} {'p99 ms':>8} {'(min-max)':>16} {'p99 to quiet':>13} {'(min-max)':>14} done/s")
    for phase, figures in report["phases"].items():
        p99, ratio = figures["p99_ms"], figures["p99_ratio"]
        print(
            f"{phase:8} {figures['p50_ms']['median']:8.2f} {p99['median']:8.2f} "
            f"{p99['min']:7.2f} -{p99['max']:7.2f} {ratio['median']:13.2f} {ratio['min']:6.2f} -{ratio['max']:6.2f}"
            f" {figures.get('per_s', '')}"
        )
        if figures["failed"]:
            print(f"         {figures['failed']} of {figures['reads']} failed")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--quick", is_flag=True, help="Little data and one short turn: to see that it works.")
@click.option("--turns", type=click.IntRange(1, 100), default=TURNS, show_default=True, help="Phases of each kind.")
@click.option("--role", type=click.Choice([SCAN, SINK]), hidden=True)
@click.option("--folder", type=click.Path(path_type=Path), hidden=True)
@click.option("--config", "config_json", hidden=True)
def main(
    as_json: bool, quick: bool, turns: int, role: str | None, folder: Path | None, config_json: str | None
) -> None:
    """Latencies of hot reads alone, beside a scan of cold data, and beside a sink."""
    size = QUICK if quick else FULL
    if role is not None:
        assert folder is not None and config_json is not None
        asyncio.run(_helper(role, folder, Config.from_json(config_json), size))
        return
    with tempfile.TemporaryDirectory(prefix="tt-beside-") as name:
        report = asyncio.run(
            measure(Path(name), size, 1 if quick else turns, tell=lambda text: print(text, file=sys.stderr, flush=True))
        )
    if as_json:
        print(json.dumps(report))
    else:
        print_report(report)


if __name__ == "__main__":
    main()
