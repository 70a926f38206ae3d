"""What a report says in tables, and how it stands to the aims.

    python -m benchmarks.tables REPORT.json

prints the tables of a report that `compare --json` has written.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click
from timetier.jobs.bench_report import spread
from timetier.jobs.bench_workloads import WORKLOADS
from timetier.jobs.cli_common import table_of

TITLES = {"timetier": "TimeTier", "redis": "Redis", "etcd": "etcd"}

Report = dict[str, Any]
Spread = dict[str, float]
"""`median`, `min`, `max`."""


class Aim(NamedTuple):
    """`measure`: from a report, None where that was not measured. `unit`: of the measure; "x" is a ratio.

    `at_most`, `at_least`: the bound; one that has neither is told for notice.
    """

    title: str
    measure: Callable[[Report], Spread | None]
    at_most: float | None = None
    at_least: float | None = None
    unit: str = "x"


def _values(report: Report, workload: str, system: str, figure: str) -> list[float]:
    """`items_per_s` or a latency of each slice, in the order of the repeats."""
    return [
        one[figure] if figure in one else one["latency_us"][figure]
        for one in report["samples"]
        if (one["workload"], one["system"]) == (workload, system)
    ]


def _of(workload: str, figure: str) -> Callable[[Report], Spread | None]:
    """A figure of TimeTier alone."""

    def measure(report: Report) -> Spread | None:
        found = _values(report, workload, "timetier", figure)
        return spread(found) if found else None

    return measure


def _against(system: str, workload: str, figure: str, *, other: str | None = None) -> Callable[[Report], Spread | None]:
    """Ratio of TimeTier's figure to another system's, repeat by repeat. `other`: its workload, if not the same."""

    def measure(report: Report) -> Spread | None:
        mine, theirs = _values(report, workload, "timetier", figure), _values(report, other or workload, system, figure)
        pairs = [a / b for a, b in zip(mine, theirs, strict=False)]
        return spread(pairs, 3) if pairs else None

    return measure


def _cold(report: Report) -> Spread | None:
    """Cold reads from disk against raw reads of the same blocks: ratio of the medians, and of pairs."""
    if "cold" not in report:
        return None
    samples = report["cold"]["samples"]
    found = spread((a / b for a, b in zip(samples["disk"], samples["raw_disk"], strict=True)), 3)
    return {**found, "median": round(statistics.median(samples["disk"]) / statistics.median(samples["raw_disk"]), 3)}


def _memory(report: Report) -> Spread | None:
    found = report.get("memory", {})
    if not {"timetier", "redis"} <= found.keys():
        return None
    return spread([found["timetier"]["bytes_an_item"] / found["redis"]["bytes_an_item"]], 3)


def _merging(name: str) -> Callable[[Report], Spread | None]:
    """A counter around writes of 1,000 a call."""

    def measure(report: Report) -> Spread | None:
        found: Spread | None = report["merging"].get("put1000", {}).get(name)
        return found

    return measure


AIMS = (
    Aim("single strong read, p50", _of("get1", "p50"), at_most=250, unit="us"),
    Aim("  to etcd", _against("etcd", "get1", "p50"), at_most=0.35),
    Aim("reads, 1,000 a call, to Redis MGET", _against("redis", "get1000", "items_per_s"), at_least=0.7),
    Aim(
        "  4 calls in flight to Redis MGET, one at a time",
        _against("redis", "get1000x4", "items_per_s", other="get1000"),
        at_least=1.0,
    ),
    Aim("  4 calls in flight to Redis MGET, 4 in flight", _against("redis", "get1000x4", "items_per_s")),
    Aim("  to etcd", _against("etcd", "get1000", "items_per_s"), at_least=6),
    Aim("single reads, 64 callers", _of("get1x64", "items_per_s"), at_least=100_000, unit="/s"),
    Aim("  to Redis", _against("redis", "get1x64", "items_per_s"), at_least=3),
    Aim("single durable write, p50, to etcd", _against("etcd", "put1", "p50"), at_most=1.0),
    Aim("  to Redis with WAIT", _against("redis", "put1", "p50"), at_most=1.2),
    Aim("writes, 1,000 a call, to Redis with WAIT", _against("redis", "put1000", "items_per_s"), at_least=1.0),
    Aim("  to etcd", _against("etcd", "put1000", "items_per_s"), at_least=2.5),
    Aim("newest 20, 50 timelines a call, to Redis piped", _against("redis", "page50", "items_per_s"), at_least=1.0),
    Aim("cold read from disk, p50, to pread and decode", _cold, at_most=2.0),
    Aim("memory added by an item, storage node to Redis", _memory, at_most=0.25),
    Aim("fsyncs of a replica for a batch of writes", _merging("fsyncs_per_batch"), at_most=1.0, unit=""),
    Aim("messages to a peer each way for a batch", _merging("messages_per_batch"), at_most=1.0, unit=""),
    Aim("Prepares for 1,000 writes", _merging("prepares_per_1000"), at_most=1.0, unit=""),
)


def judge(report: Report) -> list[dict[str, Any]]:
    """Each aim with what was measured: `met` is None where something is missing, or where there is no bound."""
    found = []
    for aim in AIMS:
        measured = aim.measure(report)
        met = None
        if measured is not None and aim.at_most is not None:
            met = measured["median"] <= aim.at_most
        elif measured is not None and aim.at_least is not None:
            met = measured["median"] >= aim.at_least
        bound = {"at_most": aim.at_most, "at_least": aim.at_least}
        found.append({"aim": aim.title.strip(), "measured": measured, **bound, "unit": aim.unit, "met": met})
    return found


# ---------------------------------------------------------------- as text


def text(report: Report) -> str:
    """The tables."""
    names = [name for name in TITLES if any(name in found for found in report["figures"].values())]
    parts = [_head(report)]
    parts.append("items or pages a second: median (least - most)\n" + _table(report, names, _rate_cell))
    parts.append("latency of a call, us: p50 / p99\n" + _table(report, names, _latency_cell))
    parts.append("CPU of all processes, us an item or page (of it the client)\n" + _table(report, names, _cpu_cell))
    if len(names) > 1 and "timetier" in names:
        parts.append("TimeTier to the others: throughput, p50, CPU\n" + _ratios(report, names))
    told = (_parts_text(report), _merging_text(report), _cold_text(report), _memory_text(report))
    parts += [part for part in told if part]
    parts.append("aims\n" + _aims(report))
    parts += [f"{TITLES[name]} is missing: {why}" for name, why in report["missing"].items()]
    parts += [f"failed: {error}" for error in report["errors"]]
    return "\n\n".join(parts)


def _head(report: Report) -> str:
    machine, options = report["machine"], report["options"]
    return (
        f"{machine['cores']} cores, {machine['cpu']}, {machine['file_system']}; {options['items']:,} items of 200 "
        f"bytes; {options['repeats']} slices of {options['seconds']:g} s of each workload and system; "
        f"{report['cores_kept_awake']} cores kept awake; load before: {machine['load_before']:.1f}; idle: "
        + ", ".join(f"{TITLES[name]} {cores:.3f} cores" for name, cores in report["idle_cores"].items())
    )


def _table(report: Report, names: list[str], cell: Callable[[dict[str, Any]], str]) -> str:
    rows = []
    for workload, found in report["figures"].items():
        cells = [cell(found[name]) if name in found else "failed" for name in names]
        rows.append([WORKLOADS[workload].title, *cells])
    return table_of(["workload", *(TITLES[name] for name in names)], rows)


def _rate_cell(found: dict[str, Any]) -> str:
    rate = found["per_s"]
    return f"{rate['median']:,.0f} ({rate['min']:,.0f} - {rate['max']:,.0f})"


def _latency_cell(found: dict[str, Any]) -> str:
    return f"{found['p50_us']['median']:,.0f} / {found['p99_us']['median']:,.0f}"


def _cpu_cell(found: dict[str, Any]) -> str:
    return f"{found['cpu_us']['median']:,.2f} ({found['cpu_us_by_part']['client']:,.2f})"


def _ratios(report: Report, names: list[str]) -> str:
    others = [name for name in names if name != "timetier"]
    headings = ["workload", *(f"{TITLES[name]} {what}" for name in others for what in ("throughput", "p50", "CPU"))]
    rows = []
    for workload, found in report["figures"].items():
        row = [WORKLOADS[workload].title]
        for name in others:
            if "timetier" not in found or name not in found:
                row += ["", "", ""]
                continue
            row += [
                f"{found['timetier'][figure]['median'] / found[name][figure]['median']:.2f}x"
                for figure in ("per_s", "p50_us", "cpu_us")
            ]
        rows.append(row)
    return table_of(headings, rows)


def _parts_text(report: Report) -> str:
    found = {
        workload: by_system["timetier"]["cpu_us_by_part"]
        for workload, by_system in report["figures"].items()
        if "timetier" in by_system
    }
    if not found:
        return ""
    headings = ["", *next(iter(found.values()))]
    rows = [[WORKLOADS[name].title, *(f"{used:,.2f}" for used in by_part.values())] for name, by_part in found.items()]
    return "CPU of TimeTier by part, us an item or page\n" + table_of(headings, rows)


def _merging_text(report: Report) -> str:
    if not report["merging"]:
        return ""
    names = ("items_per_batch", "fsyncs_per_batch", "messages_per_batch", "prepares_per_1000")
    rows = [
        [WORKLOADS[workload].title, *(f"{found[name]['median']:g}" if name in found else "" for name in names)]
        for workload, found in report["merging"].items()
    ]
    headings = ["", "items in it", "fsyncs of a replica", "messages to a peer, each way", "Prepares for 1,000 items"]
    return "what a batch of writes costs TimeTier (a call makes up to three)\n" + table_of(headings, rows)


def _cold_text(report: Report) -> str:
    if "cold" not in report:
        return ""
    cold = report["cold"]
    titles = {
        "disk": "cold read, page cache dropped",
        "raw_disk": "  pread and decode of the same block",
        "page_cache": "cold read, block in the page cache",
        "raw_page_cache": "  pread and decode of the same block",
        "decoded": "cold read, block decoded in the cold node",
    }
    rows = [
        [title, *(f"{cold['us'][name][which]:,.0f}" for which in ("median", "min", "max"))]
        for name, title in titles.items()
        if name in cold["us"]
    ]
    about = (
        f"cold reads, us, of {cold['blocks']} blocks of {cold['rows_a_block']:,} items, {cold['bytes_a_block']:,} bytes"
    )
    return about + "\n" + table_of(["", "p50", "least", "most"], rows)


def _memory_text(report: Report) -> str:
    if "memory" not in report:
        return ""
    items = report["memory"]["items"]
    rows = [
        [
            TITLES[name],
            *(f"{found[which] / 2**20:,.0f}" for which in ("before", "after")),
            f"{found['bytes_an_item']:,}",
        ]
        for name, found in report["memory"].items()
        if name != "items"
    ]
    about = f"memory (PSS) of one process with all the data, MiB, before and after {items:,} items more"
    return about + "\n" + table_of(["", "before", "after", "bytes an item"], rows)


def _aims(report: Report) -> str:
    rows = []
    for aim, told in zip(AIMS, report["aims"], strict=True):
        measured = told["measured"]
        bound = f"<= {aim.at_most:g}" if aim.at_most is not None else ""
        bound = f">= {aim.at_least:g}" if aim.at_least is not None else bound
        met = {None: "", True: "met", False: "not met"}[told["met"]]
        if measured is None:
            rows.append([aim.title, "not measured", "", bound and f"{bound}{aim.unit}", ""])
            continue
        digits = 0 if aim.unit in ("us", "/s") else 2
        value, least, most = (f"{measured[which]:,.{digits}f}{aim.unit}" for which in ("median", "min", "max"))
        rows.append([aim.title, value, f"{least} - {most}", bound and f"{bound}{aim.unit}", met])
    return table_of(["aim", "measured", "least - most", "bound", ""], rows)


@click.command(help=__doc__)
@click.argument("report", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(report: Path) -> None:
    found = json.loads(report.read_text())
    click.echo(text({**found, "aims": judge(found)}))


if __name__ == "__main__":
    main()
