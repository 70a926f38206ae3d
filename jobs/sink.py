"""Runs the sink once: the program of a Ray job (or of a task, where Ray has no job server).

All logic is in `cluster/cold/sink_script.py`; this connects, drives it and reports. Exit status 0 only when nothing
went wrong. What went wrong is in the report's `errors`; running again does what is left.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
import time
import uuid
from dataclasses import asdict
from typing import Any

import click

from ..actors.connecting import ClusterStore, connect_async
from ..cluster.cold.sink_calls import SinkSettings, settings_of, tables_in_use
from ..cluster.cold.sink_script import SinkProgress, SinkReport, TableSink, sink
from ..cluster.cold.sinking import CutOffs, chosen_cut_offs, patience_of
from ..cluster.drive import drive
from ..cluster.errors import InvalidRequest, TimeTierError, Unavailable
from ..cluster.topology import Topology

_NICENESS = 10  # nobody waits for the sink, and readers may wait for the processor that it has
_REPORT_PERIOD_S = 0.5
_HEARTBEAT_S = 5.0  # a run that is not heard of for long is taken for dead
_REPORTED_ERRORS = 10
_REPORTED_ERROR_CHARS = 500


def run_name() -> str:
    """Name of this run: the id of the Ray job that it is, or a random one."""
    try:
        metadata = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("metadata", {})
        return str(metadata["job_submission_id"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"sink-{uuid.uuid4().hex[:12]}"


def tables_to_sink(
    topology: Topology,
    names: tuple[str, ...],
    before: int | None,
    by_event_time: bool,
    now_us: int,
    max_wait_s: float | None = None,
) -> list[TableSink]:
    """The named tables with their cut-offs. Raises InvalidRequest.

    `max_wait_s`: how long rows may wait for a window to fill, None for not at all; who names a cut-off by hand wants
    all that is older to sink.
    """
    by_rule = before is None and not by_event_time
    tasks = []
    for name in names:
        policy = topology.policy(name)
        if policy is None:
            raise InvalidRequest(f"table={name!r} is not configured; known: {', '.join(sorted(topology.tables))}")
        cut_offs: CutOffs = chosen_cut_offs(policy, now_us, before=before, by_event_time=by_event_time)
        patience = patience_of(policy, now_us, max_wait_s) if by_rule and max_wait_s is not None else None
        tasks.append(TableSink(name.encode(), policy, cut_offs, patience))
    return tasks


async def run_sink(
    store: ClusterStore, tasks: list[TableSink], run: str, now_us: int, *, check_files: bool = False
) -> SinkReport:
    """Run the sink with a connected store; the Router is told how it goes, if it answers."""
    settings = settings_of(store.config.sink)
    last: list[SinkProgress] = []
    name = re.sub("[^a-z0-9-]", "-", run.lower())[-40:]
    script = sink(
        store.view,
        tasks,
        run=name,
        now_us=now_us,
        settings=settings,
        check_files=check_files,
        progress=lambda p: last.append(p),
    )
    teller = asyncio.create_task(_tell(store, run, last))
    try:
        return await drive(script, store.carrier)
    finally:
        teller.cancel()
        await asyncio.gather(teller, return_exceptions=True)


async def _tell(store: ClusterStore, run: str, last: list[SinkProgress]) -> None:
    told_at = time.monotonic()
    while True:
        if last or time.monotonic() - told_at >= _HEARTBEAT_S:
            figures: dict[str, Any] = {}
            if last:
                progress = last[-1]
                last.clear()
                figures = {"done": progress.buckets_done, "total": progress.buckets_total, **asdict(progress)}
            await _report(store, {"run": run, "state": "running", **figures})
            told_at = time.monotonic()
        await asyncio.sleep(_REPORT_PERIOD_S)


async def _is_admitted(store: ClusterStore, run: str, take_over: bool) -> bool:
    """Whether no other run is at work; also when the Router can't tell, since runs fence each other."""
    try:
        other = await store.router_call("admit_sink", run, take_over)
    except Unavailable as error:
        print(f"the Router does not tell whether another run is at work: {error}", file=sys.stderr)
        return True
    if other:
        print(f"the sink run {other} is at work, so this one is not needed; --take-over would replace it")
    return not other


async def _report(store: ClusterStore, report: dict[str, Any]) -> None:
    try:
        await store.router_report(report)
    except Unavailable as error:  # a run does not need the Router
        print(f"the Router did not take the report: {error}", file=sys.stderr)


async def _run(
    namespace: str,
    tables: tuple[str, ...],
    before: int | None,
    by_event_time: bool,
    run: str,
    take_over: bool,
    check_files: bool,
) -> bool:
    now_us = time.time_ns() // 1_000
    store = await connect_async(namespace=namespace)
    try:
        if not await _is_admitted(store, run, take_over):
            return True
        if not tables:
            tables = await _tables_with_data(store)
        max_wait_s = store.config.sink.max_wait
        tasks = tables_to_sink(store.view.routing.topology, tables, before, by_event_time, now_us, max_wait_s)
        report = await run_sink(store, tasks, run, now_us, check_files=check_files)
        print(report.to_json(), flush=True)
        errors = [error[:_REPORTED_ERROR_CHARS] for error in report.errors[:_REPORTED_ERRORS]]
        state = "failed" if errors else "succeeded"
        await _report(store, {**report.to_dict(), "errors": errors, "run": run, "state": state})
        for error in report.errors:
            print(error, file=sys.stderr)
        return not report.errors
    finally:
        await store.close()


async def _tables_with_data(store: ClusterStore) -> tuple[str, ...]:
    """Tables that have rows and a policy; what has lost its policy stays where it is."""
    names = [name.decode() for name in await drive(tables_in_use(store.view, SinkSettings()), store.carrier)]
    known = tuple(name for name in names if store.view.routing.topology.policy(name) is not None)
    for name in sorted(set(names) - set(known)):
        print(f"table {name!r} has data, but no policy in the configuration: it does not sink", file=sys.stderr)
    return known


@click.command()
@click.option("--namespace", default="timetier", help="Ray namespace of the cluster.")
@click.option("--table", "tables", multiple=True, help="Only this table; may be repeated.")
@click.option("--before", type=int, help="Cut-off instead of the table's cold_after, in the table's unit.")
@click.option("--by-event-time", is_flag=True, help="Go by the items' timestamps alone, whenever they were written.")
@click.option("--run", default=None, help="Name of the run in reports, files and links.")
@click.option("--take-over", is_flag=True, help="Begin even if another run is at work, which is then fenced.")
@click.option("--check-files", is_flag=True, help="Compare all cold files with all links.")
def main(
    namespace: str,
    tables: tuple[str, ...],
    before: int | None,
    by_event_time: bool,
    run: str | None,
    take_over: bool,
    check_files: bool,
) -> None:
    """Move old items to the cold tier."""
    try:
        ok = asyncio.run(_run(namespace, tables, before, by_event_time, run or run_name(), take_over, check_files))
    except TimeTierError as error:
        print(f"timetier sink: {error}", file=sys.stderr)
        ok = False
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    os.nice(_NICENESS)
    main()
