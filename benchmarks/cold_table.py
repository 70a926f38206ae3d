"""The table of docs/performance.md from a report of `benchmarks.cold --json`.

    python -m benchmarks.cold --timelines 1000000 --json > cold.json
    python -m benchmarks.cold_table cold.json

Parts that the report does not have are left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

Line = tuple[str, str, str]
"""What, the figure, and the part that measured it."""


def lines_of(report: dict[str, Any]) -> Iterator[Line]:
    """Lines of the table."""
    for part, tell in _PARTS.items():
        if part in report:
            for what, figure in tell(report[part]):
                yield what, figure, f"`{part}`"


def _sink(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    cpu = ", ".join(f"{tier} {used:g} us" for tier, used in found["cpu_us_per_item"].items())
    yield (
        "sink at full speed (no rests, no limits)",
        f"{found['items_per_s']:,} items/s, {found['raw_mb_per_s']:g} MB/s of raw data; CPU an item: {cpu}",
    )
    size = found["bytes_per_item"]
    yield (
        "bytes of an item, one copy (aim: 0.4 of raw)",
        f"cold {size['cold']:g}, raw {size['raw']:g}, a storage node with log and all {size['storage']:g}: "
        f"{found['cold_to_raw']:g} of raw, {found['cold_to_storage']:g} of storage",
    )
    rows = found["files"]["block_rows"]
    yield (
        f"blocks and files, {found['buckets']:,} buckets, windows of 4 years",
        f"{found['blocks_per_gib_raw']:,} blocks and {found['files_per_gib_raw']:g} files a GiB of raw data "
        f"({found['blocks_per_gib_cold']:,} and {found['files_per_gib_cold']:g} a GiB on disk); rows of a block: "
        f"p50 {rows['p50']:,}, p90 {rows['p90']:,}, p99 {rows['p99']:,}",
    )


def _beside(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    sinking = found["phases"]["sink"]
    ratio = sinking["p99_ratio"]
    yield (
        "p99 of hot reads while a sink runs at its default pace, to that of quiet periods between (aim: 1.5)",
        f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f} over {found['turns']} turns); "
        f"{sinking['per_s']:,} rows/s sink meanwhile",
    )


def _reads(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for how, title in (
        ("disk", "cold read, from disk"),
        ("page_cache", "cold read, block in the page cache"),
        ("decoded", "cold read, block decoded in the cold node"),
    ):
        times, reads = found["us"][how], found["file_reads"][how]["median"]
        latency = f"p50 {times['median']:,.0f} us, p99 {times['p99']:,.0f} us"
        yield title, f"{latency}, {reads:.0f} read{'s' * (reads != 1)} of a file"


def _scrub(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield (
        "scrubbing, without a limit",
        f"{found['scrub_mb_per_s']:g} MB/s a node, {found['cpu_s_per_gb']:g} s of CPU a GB",
    )
    reads = found["reads"]
    yield (
        f"block reads of a node that scrubs at {found['usual_mb_per_s']:g} MB/s, beside those of one that does not",
        f"p50 {reads['usual_rate']['p50_ms']:g} ms beside {reads['quiet']['p50_ms']:g}, "
        f"p99 {reads['usual_rate']['p99_ms']:g} ms beside {reads['quiet']['p99_ms']:g}",
    )


def _rebuild(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield (
        "rebuilding a disk from its peers, without a limit",
        f"{found['mb_per_s']:g} MiB/s; `cp` and fsync of the same files {found['cp_and_fsync_mb_per_s']:g} MiB/s",
    )


def _idle(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    idle = found["idle_s"]
    yield (
        f"a sink with nothing to do, {found['timelines']:,} timelines",
        f"{idle['median']:g} s ({found['idle_cpu_s']:g} s of CPU in all); the first one, which has never looked, "
        f"{found['first_s']:g} s",
    )


def _encodings(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    chosen = found["chosen"]
    best = next(
        row
        for row in found["encodings"]
        if (row["compression"], row["block_kib"]) == (chosen["compression"], chosen["block_kib"])
    )
    yield (
        f"bytes of an item in full blocks, {chosen['compression']}, {chosen['block_kib']} KiB",
        f"{best['bytes_per_item']:g}: {best['ratio']:g} of raw; RocksDB's rows alone, compacted: "
        f"{found['rocksdb_bytes_per_item']:g}",
    )


_PARTS: dict[str, Callable[[dict[str, Any]], Iterator[tuple[str, str]]]] = {
    "sink": _sink,
    "encodings": _encodings,
    "beside": _beside,
    "reads": _reads,
    "scrub": _scrub,
    "rebuild": _rebuild,
    "idle": _idle,
}


@click.command()
@click.argument("report", type=click.Path(path_type=Path, exists=True, dir_okay=False))
def main(report: Path) -> None:
    """Print the table of a REPORT in Markdown."""
    print("| what | figure | part |\n|---|---|---|")
    for line in lines_of(json.loads(report.read_text())):
        print(f"| {' | '.join(line)} |")


if __name__ == "__main__":
    main()
