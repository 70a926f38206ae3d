"""What the cold tier costs and gives, in figures.

    python -m benchmarks.cold [--json] [--part PART ...] [--quick] [--timelines 1000000]
    python -m benchmarks.cold_table REPORT.json     # the table of docs/performance.md

- `sink` (`cold_sink.py`): real events sunk in full: items a second, bytes of an item by tier, blocks, files, readers
- `beside` (`beside.py`): p99 of hot reads while a sink runs, to that of quiet periods in between
- `reads` (`cold_reads.py`): latency of a cold read, CPU by tier, reads from files; `pread` and decoding of the block
- `scrub` (`cold_scrub.py`): MB/s that a cold node checks, and what its reads take meanwhile; MB/s of repairs
- `rebuild` (`cold_disks.py`): MiB/s at which a lost disk comes back from its peers
- `idle` (`cold_idle.py`): a run of the sink with nothing to do, with many timelines
- `encodings` (`cold_encodings.py`): bytes, CPU and time of a read for each way to write a block

Each part has clusters of its own: processes, without Ray, in a temporary folder. Without `--part` all of them run. What
goes on is told on stderr.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from timetier.cluster.cold.sink_calls import SinkSettings
from timetier.jobs.sample import SAMPLE, SAMPLE_COLUMNS

from . import beside, cold_disks, cold_encodings, cold_idle, cold_reads, cold_scrub, cold_sink
from .machine import describe_machine
from .processes import Spinners

_MILLION = 1_000_000
_SCRUB_MB, _SCRUB_READS_S = 256, 3.0
_REBUILD_MB = 500


@dataclass(frozen=True)
class Options:
    """What is asked for; the names are those of the command line's options."""

    quick: bool
    blocks: int
    rows: int
    buckets: int
    turns: int
    timelines: int
    seed: int
    settings: SinkSettings


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _sink(folder: Path, options: Options) -> dict[str, Any]:
    return asyncio.run(
        cold_sink.measure(folder, SAMPLE, SAMPLE_COLUMNS, buckets=options.buckets, tell=_tell, quick=options.quick)
    )


def _beside(folder: Path, options: Options) -> dict[str, Any]:
    size = beside.QUICK if options.quick else beside.FULL
    return asyncio.run(beside.measure(folder, size, options.turns, tell=_tell, phases=(beside.QUIET, beside.SINK)))


def _reads(folder: Path, options: Options) -> dict[str, Any]:
    def tell(done: int, total: int | None) -> None:
        if done == total:
            _tell("reading")

    spinners = Spinners()
    spinners.start()
    try:
        return asyncio.run(
            cold_reads.measure(folder, options.blocks, options.rows, options.settings, options.seed, tell)
        )
    finally:
        spinners.stop()


def _scrub(folder: Path, options: Options) -> dict[str, Any]:
    _tell("scrubbing")
    mb, seconds = (cold_scrub.FILE_MB, 0.5) if options.quick else (_SCRUB_MB, _SCRUB_READS_S)
    return cold_scrub.measure(folder, mb=mb, seconds=seconds, seed=options.seed)


def _show_scrub(found: dict[str, Any]) -> None:
    print(cold_scrub.text_of(found))


def _rebuild(folder: Path, options: Options) -> dict[str, Any]:
    return asyncio.run(cold_disks.measure_rebuild(folder, 8 if options.quick else _REBUILD_MB, tell=_tell))


def _show_rebuild(found: dict[str, Any]) -> None:
    print(
        f"a disk with {found['bytes'] / cold_disks.MIB:,.0f} MiB came back in {found['seconds']:.2f} s: "
        f"{found['mb_per_s']:,.1f} MiB/s; cp and fsync of the same files: {found['cp_and_fsync_mb_per_s']:,.1f} MiB/s"
    )


def _idle(folder: Path, options: Options) -> dict[str, Any]:
    return asyncio.run(cold_idle.measure(folder, options.timelines, tell=_tell))


def _encodings(folder: Path, options: Options) -> dict[str, Any]:
    rows = cold_encodings.load(SAMPLE, SAMPLE_COLUMNS, _MILLION)
    return cold_encodings.study(rows, folder, options.seed)


@dataclass(frozen=True)
class Part:
    """A part of the benchmark: measures in a folder of its own, and prints for people."""

    measure: Callable[[Path, Options], dict[str, Any]]
    show: Callable[[dict[str, Any]], None]


PARTS: dict[str, Part] = {
    "sink": Part(_sink, cold_sink.print_sink),
    "beside": Part(_beside, beside.print_report),
    "reads": Part(_reads, cold_reads.print_reads),
    "scrub": Part(_scrub, _show_scrub),
    "rebuild": Part(_rebuild, _show_rebuild),
    "idle": Part(_idle, cold_idle.print_idle),
    "encodings": Part(_encodings, cold_encodings.print_study),
}


def run(parts: Sequence[str], options: Options) -> dict[str, Any]:
    """The figures of each part, and how long it took; ready for JSON."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="tt-cold-") as folder:
        found["machine"] = describe_machine(Path(folder))
    for name in parts:
        _tell(f"part {name}")
        began = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="tt-cold-") as folder:
            found[name] = PARTS[name].measure(Path(folder), options)
        found[name]["took_s"] = round(time.perf_counter() - began, 1)
    return found


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--part", "parts", type=click.Choice(list(PARTS)), multiple=True, help="Repeatable.  [default: all]")
@click.option("--quick", is_flag=True, help="Little data: to see that it works.")
@click.option("--blocks", type=click.IntRange(2, 1_024), default=60, show_default=True, help="reads: buckets.")
@click.option(
    "--rows", type=click.IntRange(16, 1_048_576), default=4_096, show_default=True, help="reads: of a bucket."
)
@click.option("--block-rows", type=click.IntRange(16), help="reads: rows of a block.  [default: the sink's]")
@click.option("--buckets", type=click.IntRange(64, 131_072), default=1_024, show_default=True, help="sink: buckets.")
@click.option("--turns", type=click.IntRange(1, 100), default=beside.TURNS, show_default=True, help="beside: periods.")
@click.option(
    "--timelines", type=click.IntRange(1), default=100_000, show_default=True, help="idle: how many there are."
)
@click.option("--seed", default=1, show_default=True, help="Decides what is read.")
def main(
    as_json: bool,
    parts: tuple[str, ...],
    quick: bool,
    blocks: int,
    rows: int,
    block_rows: int | None,
    buckets: int,
    turns: int,
    timelines: int,
    seed: int,
) -> None:
    """Figures of the cold tier."""
    options = Options(
        quick=quick,
        blocks=4 if quick else blocks,
        rows=512 if quick else rows,
        buckets=buckets,
        turns=1 if quick else turns,
        timelines=1_000 if quick else timelines,
        seed=seed,
        settings=SinkSettings() if block_rows is None else SinkSettings(block_rows=block_rows),
    )
    report = run(parts or list(PARTS), options)
    if as_json:
        print(json.dumps(report))
        return
    for name in parts or PARTS:
        print(f"\n{name} ({report[name]['took_s']} s)")
        PARTS[name].show(report[name])


if __name__ == "__main__":
    main()
