"""The command that measures a running cluster."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .cli_common import NAMESPACE, cluster_options, enter, progress, show, table_of

if TYPE_CHECKING:
    from .bench import BenchOptions


@click.command()
@click.option(
    "--table", default="bench", show_default=True, envvar="TIMETIER_TABLE", help="Table for the timelines of the run."
)
@click.option("--items", type=click.IntRange(25, 10_000_000), default=20_000, show_default=True, help="Items to read.")
@click.option("--seconds", type=click.FloatRange(0.01, 3_600), default=1.0, show_default=True, help="Of each slice.")
@click.option("--repeats", type=click.IntRange(1, 1_000), default=3, show_default=True, help="Slices of a workload.")
@click.option("--value-bytes", type=click.IntRange(16, 65_536), default=200, show_default=True, help="Size of a value.")
@click.option("--only", multiple=True, metavar="WORKLOAD", help="Only this one; may be given several times.")
@click.option("--seed", default=0, show_default=True, help="Decides which items are read and written.")
@cluster_options
def bench(
    table: str,
    items: int,
    seconds: float,
    repeats: int,
    value_bytes: int,
    only: tuple[str, ...],
    seed: int,
    data_dir: Path | None,
    address: str | None,
    namespace: str | None,
    as_json: bool,
) -> None:
    """Measure reads and writes of a running cluster, from one process.

    Works in timelines of its own, in the named table, and deletes them in the end. To see the cluster beside other
    stores, run `python -m benchmarks.compare` in a checkout.
    """
    from .bench import BenchOptions
    from .bench_workloads import WORKLOADS

    unknown = [name for name in only if name not in WORKLOADS]
    if unknown:
        names = ", ".join(WORKLOADS)
        raise click.BadParameter(f"no workload is called {unknown[0]!r}: there are {names}", param_hint="--only")
    options = BenchOptions(items, seconds, repeats, only or tuple(WORKLOADS), value_bytes, seed)
    enter(data_dir, address)
    found = asyncio.run(_run(address, namespace or NAMESPACE, table, options))
    show(found, _text(found), as_json=as_json)


async def _run(address: str | None, namespace: str, table: str, options: BenchOptions) -> dict[str, Any]:
    from .. import connect_async
    from .bench import run_bench

    async with await connect_async(address, namespace=namespace) as store:
        return await run_bench(store, table, options, progress)


def _text(found: dict[str, Any]) -> str:
    headings = ["workload", "per second", "least", "most", "p50 us", "p99 us", "client CPU us an item"]
    rows = [
        [
            one["title"],
            *(f"{one['per_s'][which]:,.0f}" for which in ("median", "min", "max")),
            f"{one['p50_us']['median']:,.0f}",
            f"{one['p99_us']['median']:,.0f}",
            f"{one['cpu_us']['median']:,.2f}",
        ]
        for one in found["workloads"].values()
    ]
    lines = [
        f"table {found['table']}: {found['items']:,} items of {found['value_bytes']} bytes, loaded at "
        f"{found['loads_per_s']:,} a second",
        "",
        table_of(headings, rows),
    ]
    if found["merging"]:
        headings = ["writes", "items a batch", "fsyncs of a replica", "messages to a peer", "Prepares for 1,000"]
        names = ("items_per_batch", "fsyncs_per_batch", "messages_per_batch", "prepares_per_1000")
        rows = [
            [found["workloads"][workload]["title"], *(f"{told[name]:g}" for name in names)]
            for workload, told in found["merging"].items()
        ]
        lines += ["", "for each batch, and messages each way:", table_of(headings, rows)]
    return "\n".join(lines)
