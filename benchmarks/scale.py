"""How cost grows with the data and with the cluster.

    python -m benchmarks.scale [--json] [--quick] [--seconds S] [--items N] [--startup-items N]

One thing grows at a time: timelines, items, storage groups, cache nodes. What is read and written is a hot part of the
same size, which fits in memory; `cold put` writes to all timelines alike, of which few are in memory, 1,000 a call.
Each configuration is a cluster of its own in a temporary folder, every node a process, without Ray, its data written by
`bulk.py`. One client process does each workload for some seconds. CPU is that of all processes, the client's among it;
memory is the proportional set size (PSS). What a node has without data is subtracted where memory is told per million
items.

The last lines say how long a storage node takes from its start until it serves, on an empty folder and on full ones.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
from timetier.cluster.client.store import AsyncStore
from timetier.cluster.config import Config, load_config
from timetier.jobs.bench import TimeTierSubject
from timetier.jobs.bench_data import Dataset
from timetier.jobs.bench_workloads import PAGE, WORKLOADS, Bench, client_cpu

from .bulk import fill
from .nodes import NodeProcesses, open_store, start_node, topology_in
from .processes import cpu_by_part, end_on_signals, memory_bytes

TABLE = "bench"
BASE = 1_700_000_000_000_000
STEP = 1_000_000
HOT_ITEMS, HOT_TIMELINES = 100_000, 10_000  # whichever is less
COLD_WRITES = "cold put"
ASKED = ("get1000x4", "get1x64", "page50", "put1000", COLD_WRITES)
_START_S = 300.0
_READY_S = 60.0
_POLL_S = 0.1
_PATIENCE_S = 60.0  # of a call: a machine in use may be slow, and that is measured, not refused
_WARM_OWNERS = 50  # read at once, before anything is measured
_WARM_READS = 3  # of each: the memory tier keeps what is read more than once


@dataclass(frozen=True, slots=True)
class Shape:
    """One configuration."""

    timelines: int
    items: int
    groups: int = 1
    caches: int = 1

    @property
    def name(self) -> str:
        return (
            f"{_short(self.timelines)} timelines, {_short(self.items)} items, {self.groups} group"
            f"{'s' * (self.groups > 1)}, {self.caches} cache{'s' * (self.caches > 1)}"
        )

    def data(self) -> Dataset:
        return self._first(self.timelines)

    def hot(self) -> Dataset:
        """The part of the data that is read: as much of it for every shape, as far as that can be."""
        return self._first(max(1, min(self.timelines, HOT_TIMELINES, HOT_ITEMS * self.timelines // max(1, self.items))))

    def _first(self, timelines: int) -> Dataset:
        return Dataset("own", timelines, BASE, STEP, max(1, self.items // max(1, self.timelines)))


def shapes(items: int, *, quick: bool) -> list[Shape]:
    """What is measured: one dimension at a time, around a middle. `items`: of most of them."""
    middle = Shape(items // 10, items)
    if quick:
        return [middle, Shape(items // 10, items, groups=2, caches=2)]
    return [
        Shape(items // 100, items),
        middle,
        Shape(items, items),
        Shape(items // 10, items, groups=2),
        Shape(items // 10, items, groups=4),
        Shape(items // 10, items, caches=2),
        Shape(items // 10, items, caches=3),
        Shape(items // 10, 10 * items),
    ]


def _short(number: int) -> str:
    for size, unit in ((1_000_000, " M"), (1_000, " k")):
        if number >= size:
            return f"{number / size:g}{unit}"
    return str(number)


def make_config(folder: Path, shape: Shape) -> Config:
    """The embedded default with the shape's groups and cache nodes."""
    config = load_config(None, data_dir=folder)
    storage = config.storage.model_copy(update={"groups": shape.groups})
    cache = config.cache.model_copy(update={"nodes": shape.caches})
    client = config.client.model_copy(update={"timeout_s": _PATIENCE_S, "attempt_timeout_s": _PATIENCE_S / 4})
    return config.model_copy(update={"storage": storage, "cache": cache, "client": client})


# ---------------------------------------------------------------- one configuration


async def _until_ready(store: AsyncStore) -> None:
    """Until the group takes writes: replicas join one another first."""
    deadline = time.monotonic() + _READY_S
    while True:
        try:
            await store.table(TABLE).put("ready", BASE, b"r")
            return
        except Exception:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(_POLL_S)


async def _work(nodes: NodeProcesses, shape: Shape, seconds: float) -> dict[str, Any]:
    """Items a second and CPU of each workload, and memory afterwards."""
    parts = {tier: [pid for name, pid in nodes.pids.items() if name.startswith(tier)] for tier in ("storage", "cache")}
    found: dict[str, Any] = {}
    async with open_store(nodes.folder, nodes.config) as store:
        await _until_ready(store)
        if shape.items:
            hot = shape.hot()
            subject = TimeTierSubject(store.table(TABLE))
            for first in list(range(0, hot.owners, _WARM_OWNERS)) * _WARM_READS:
                await subject.pages(hot.names[first : first + _WARM_OWNERS], PAGE)
            for name in ASKED:
                owners = shape.timelines if name == COLD_WRITES else max(hot.owners, WORKLOADS[name].per_call)
                bench = Bench(
                    lambda workload: subject,
                    reads=hot,
                    writes=Dataset("own", owners, BASE + STEP * shape.items * len(found), STEP, hot.per_owner),
                    mix=hot,
                    cpu=lambda: {**client_cpu(), **cpu_by_part(parts)},
                )
                workload = WORKLOADS["put1000" if name == COLD_WRITES else name]
                timing = await bench.slice(workload, seconds)
                cpu_us = {part: round(1e6 * used / timing.items, 2) for part, used in timing.cpu_s.items()}
                found[name] = {
                    "per_s": round(timing.items_per_s),
                    "cpu_us": round(sum(cpu_us.values()), 2),
                    "cpu_us_by_part": cpu_us,
                }
    sizes = {tier: [memory_bytes(pid) for pid in pids] for tier, pids in parts.items()}
    return {
        "workloads": found,
        "memory_mb": {tier: round(sum(found) / len(found) / (1 << 20), 1) for tier, found in sizes.items()},
        "disk_mb": round(_folder_bytes(nodes.folder / "storage-0-0") / (1 << 20), 1),
    }


def measure_shape(shape: Shape, seconds: float) -> dict[str, Any]:
    """Fill, start, measure, end."""
    folder = Path(tempfile.mkdtemp(prefix="sc"))
    try:
        config = make_config(folder, shape)
        began_s = time.monotonic()
        if shape.items:
            fill(folder, topology_in(folder, config), config, TABLE, shape.data(), replicas=config.storage.replicas)
        filled_s = time.monotonic() - began_s
        with NodeProcesses(folder, config) as nodes:
            found = asyncio.run(_work(nodes, shape, seconds))
        return {"shape": shape.name, "filled_in_s": round(filled_s, 1), **found}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# ---------------------------------------------------------------- start-up


def measure_start(shape: Shape, repeats: int) -> dict[str, Any]:
    """Seconds from the start of a storage node's process until it serves, each time after `kill -9` but the first."""
    folder = Path(tempfile.mkdtemp(prefix="sc"))
    try:
        config = make_config(folder, shape)
        if shape.items:
            fill(folder, topology_in(folder, config), config, TABLE, shape.data(), replicas=1)
        starts = [_start_once(folder, config) for _ in range(repeats)]
        return {
            "items": shape.items,
            "timelines": shape.timelines,
            "first_s": round(starts[0][0], 2),
            "again_s": round(min(seconds for seconds, _ in starts[1:]), 2),
            "memory_mb": round(starts[-1][1] / (1 << 20), 1),
            "disk_mb": round(_folder_bytes(folder / "storage-0-0") / (1 << 20), 1),
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _start_once(folder: Path, config: Config) -> tuple[float, int]:
    """(seconds until it serves, its memory then). Killed afterwards, as by a power failure."""
    began_s = time.monotonic()
    process = start_node("storage-0-0", folder, config)
    try:
        assert process.stdout is not None
        if process.stdout.readline().strip() != b"ready":
            raise click.ClickException(f"the node did not start: {(folder / 'storage-0-0.log').read_text()[-500:]}")
        return time.monotonic() - began_s, memory_bytes(process.pid)
    finally:
        process.kill()
        process.wait(_START_S)


# ---------------------------------------------------------------- the report


def measure(
    wanted: list[Shape], starts: list[int], seconds: float, repeats: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(kind, result) of each measurement as it is done: `empty`, `shape` or `start`. `starts`: numbers of items."""
    yield "empty", measure_shape(Shape(0, 0), seconds)
    for shape in wanted:
        yield "shape", measure_shape(shape, seconds)
    for count in starts:
        yield "start", measure_start(Shape(count // 10, count), repeats)


def per_million(report: dict[str, Any], shape: Shape, empty: dict[str, Any]) -> dict[str, float]:
    """MB of memory that a node of a tier adds per million items that it has.

    A storage node has 1/groups of all items, a cache node its share of those that are read.
    """
    cached = len(shape.hot()) / shape.groups / shape.caches
    held = {"storage": shape.items / shape.groups / 1e6, "cache": cached / 1e6}
    return {
        tier: round((report["memory_mb"][tier] - empty["memory_mb"][tier]) / millions, 1)
        for tier, millions in held.items()
    }


def _row(report: dict[str, Any]) -> str:
    cells = [f"{report['workloads'][name]['per_s']:>9,} {report['workloads'][name]['cpu_us']:>7.1f}" for name in ASKED]
    memory = " ".join(f"{report['mb_per_million'][tier]:>9,.0f}" for tier in ("storage", "cache"))
    return f"{report['shape']:<50} {' '.join(cells)} {memory}"


def _heading() -> str:
    cells = " ".join(f"{name + '/s':>9} {'us CPU':>7}" for name in ASKED)
    return f"{'configuration':<50} {cells} {'MB/M sto.':>9} {'cache':>9}"


def _start_row(report: dict[str, Any]) -> str:
    return (
        f"a storage node with {report['items']:>12,} items in {report['timelines']:>11,} timelines serves after "
        f"{report['first_s']:.2f} s, after kill -9 {report['again_s']:.2f} s, with {report['memory_mb']:.0f} MB of "
        f"memory and {report['disk_mb']:,.0f} MB of disk"
    )


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--quick", is_flag=True, help="Thousands of items for fractions of a second: a test that it works.")
@click.option("--items", type=int, default=1_000_000, show_default=True, help="Items of most configurations.")
@click.option("--startup-items", type=int, default=10_000_000, show_default=True, help="Items of the largest start.")
@click.option("--seconds", type=float, default=3.0, show_default=True, help="Of each workload.")
def main(as_json: bool, quick: bool, items: int, startup_items: int, seconds: float) -> None:
    """Measure how cost grows: timelines, items, storage groups, cache nodes, start-up."""
    end_on_signals()
    if quick:
        items, startup_items, seconds = 20_000, 40_000, 0.2
    wanted = shapes(items, quick=quick)
    report: dict[str, Any] = {"shapes": [], "starts": []}
    known = iter(wanted)
    tell = partial(click.echo, err=as_json)  # a line as soon as it is known
    tell(_heading())
    for kind, found in measure(wanted, sorted({0, items, startup_items}), seconds, 2 if quick else 3):
        if kind == "empty":
            report["empty"] = found
        elif kind == "shape":
            found["mb_per_million"] = per_million(found, next(known), report["empty"])
            report["shapes"].append(found)
            tell(_row(found))
        else:
            report["starts"].append(found)
            tell(_start_row(found))
    if as_json:
        click.echo(json.dumps(report))


if __name__ == "__main__":
    main()
