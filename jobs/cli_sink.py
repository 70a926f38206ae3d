"""The command that runs the sink and follows it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..cluster.errors import Unavailable
from .cli_common import NAMESPACE, cluster_options, enter, note, progress, show

_POLL_S = 0.25
_PATIENCE_S = 60.0  # without an answer of the Router


@click.command()
@click.option("--before", type=int, help="Sink what is older than this, in the unit of the tables.")
@click.option("--by-event-time", is_flag=True, help="Go by the items' timestamps alone, whenever they were written.")
@click.option("--table", help="Only this table.  [default: all]")
@click.option("--follow", is_flag=True, help="Start nothing: follow the run that is at work.")
@click.option("--take-over", is_flag=True, help="Start even if a run is at work, which is then fenced and ends.")
@click.option("--check-files", is_flag=True, help="Compare all cold files with all links, and have garbage removed.")
@cluster_options
def sink(
    before: int | None,
    by_event_time: bool,
    table: str | None,
    follow: bool,
    take_over: bool,
    check_files: bool,
    data_dir: Path | None,
    address: str | None,
    namespace: str | None,
    as_json: bool,
) -> int:
    """Move old items to the cold tier, and wait until that is done.

    Runs as a Ray job, or as a Ray task where Ray has no dashboard.
    """
    if follow and (before is not None or by_event_time or table is not None or take_over or check_files):
        raise click.UsageError("--follow starts no run, so it takes none of the options of one")
    enter(data_dir, address)
    from ..actors.jobs_client import SUCCEEDED, SinkOptions

    options = None if follow else SinkOptions(before, by_event_time, table, take_over, check_files)
    with progress("sinking") as tell:
        found = asyncio.run(follow_sink(namespace or NAMESPACE, options, tell))
    ok = found["state"] == SUCCEEDED
    text = "\n".join(f"{name}: {_told(value)}" for name, value in found.items() if value not in ("", None, [], {}))
    show(found, text, as_json=as_json)
    if not ok:
        note(f"timetier: the sink failed: {found['reason'].splitlines()[-1] if found['reason'] else 'see its log'}")
    return 0 if ok else 1


async def follow_sink(namespace: str, options: Any, tell: Callable[[int, int | None], None]) -> dict[str, Any]:
    """Start a run and follow it to its end; `options` None: the one that is at work. Its report, `kind` and `id`.

    Raises Unavailable when another run is at work, or there is none to be followed.
    """
    from ..actors.jobs_client import ENDED
    from ..actors.router_link import RouterLink

    link = RouterLink(namespace)
    if options is None:
        running = [run for run in await link.call("runs") if run["state"] not in ENDED]
        if not running:
            raise Unavailable("no sink is at work: start one with `timetier sink`")
        started = {"kind": running[-1].get("kind", ""), "id": running[-1]["run"]}
    else:
        started = await link.call("start_sink", options, timeout_s=60.0)
    if started["kind"] == "task":
        note("Ray has no dashboard, and so no job server: the sink runs as a Ray task")
    loop = asyncio.get_running_loop()
    heard_at = loop.time()
    while True:
        try:
            state = await link.call("sink_state", started["id"])
            report = _report_of(await link.call("runs"), started["id"])
            heard_at = loop.time()
        except Unavailable:
            if loop.time() - heard_at > _PATIENCE_S:
                raise
            await asyncio.sleep(_POLL_S)
            continue
        if report:
            tell(int(report.get("done", 0)), report.get("total"))
        if state["state"] in ENDED:
            return {**started, **report, "state": state["state"], "reason": state["reason"]}
        await asyncio.sleep(_POLL_S)


def _told(value: Any) -> str:
    """A figure in words; of a table of figures, one after the other."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {figure}" for name, figure in value.items())
    return "; ".join(map(str, value)) if isinstance(value, list) else str(value)


def _report_of(runs: list[dict[str, Any]], started_id: str) -> dict[str, Any]:
    """What the run itself has told the Router, {} if nothing."""
    return next((run for run in reversed(runs) if run["run"] == started_id), {})
