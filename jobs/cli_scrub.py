"""The command that has cold nodes check all their files, or tells how far they are."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import click

from .cli_common import NAMESPACE, cluster_options, enter, one_line, progress, show, table_of
from .scrub import HEADINGS, follow_rounds, nodes_of, scrub_row, scrub_states, start_rounds


@click.command()
@click.option("--node", help="Only this cold node, such as cold-0-1.  [default: all]")
@click.option("--now", "begin", is_flag=True, help="Start a round at once, and follow it to its end.")
@click.option(
    "--mb-per-s",
    type=click.FloatRange(min=0.001, max=100_000.0),
    help="Rate of this round, of each node.  [default: cold.scrub_mb_per_s]",
)
@cluster_options
def scrub(
    node: str | None,
    begin: bool,
    mb_per_s: float | None,
    data_dir: Path | None,
    address: str | None,
    namespace: str | None,
    as_json: bool,
) -> int:
    """Show how far the cold nodes are with checking their files, or have them check all of them now.

    What is damaged is restored from the other replicas. The exit status is 0 if nothing is left to repair.
    """
    if mb_per_s is not None and not begin:
        raise click.UsageError("--mb-per-s is the rate of a round that begins now: add --now")
    enter(data_dir, address)
    states = asyncio.run(_run(namespace or NAMESPACE, node, begin, mb_per_s or 0.0))
    rows = [scrub_row(name, state["scrub"], state["repairs"]) for name, state in states.items() if "scrub" in state]
    lines = [table_of(HEADINGS, rows)] if rows else []
    for name, state in states.items():
        if "scrub" not in state:
            lines.append(f"{name}: {one_line(state['reason'])}")
            continue
        for one in state["repairs"]["last_reasons"]:
            where = one["file"] if one["offset"] < 0 else f"{one['file']} at {one['offset']}"
            lines.append(f"{name}: {where} can't be repaired: {one_line(one['reason'])}")
    good = all("scrub" in state and not state["repairs"]["queued"] for state in states.values())
    show({"ok": good, "nodes": states}, "\n".join(lines), as_json=as_json)
    return 0 if good else 1


async def _run(namespace: str, node: str | None, begin: bool, mb_per_s: float) -> dict[str, dict[str, Any]]:
    from ..actors.connecting import connect_async

    store = await connect_async(namespace=namespace)
    try:
        nodes = nodes_of(store, node)
        if not begin:
            return await scrub_states(store, nodes)
        await start_rounds(store.carrier, nodes, mb_per_s)
        with progress("checking bytes") as tell:
            return await follow_rounds(store, nodes, tell)
    finally:
        await store.close()
