"""What `timetier status` and `timetier up` print."""

from __future__ import annotations

import time
from typing import Any

from .cli_common import one_line, table_of
from .cli_disk import disks_table
from .scrub import HEADINGS as SCRUB_HEADINGS
from .scrub import scrub_row

_SHOWN_RUNS = 5
_SHOWN_ERROR_CHARS = 80


def describe(found: dict[str, Any]) -> str:
    """What `cluster_status` has found, as text."""
    actors = [found["router"], *found["nodes"]]
    headings = ["actor", "state", "pid", "reason"]
    rows = [[actor["node"], actor["state"], str(actor.get("pid", "")), actor.get("reason", "")] for actor in actors]
    if any(actor.get("zone") for actor in actors):
        headings.insert(1, "zone")
        for row, actor in zip(rows, actors, strict=True):
            row.insert(1, "/".join(part for part in (actor.get("zone"), actor.get("host")) if part))
    lines = [f"namespace {found['namespace']}: {found['state']}"]
    lines += [f"ALARM {alarm['actor']}: {one_line(alarm['alarm'])}" for alarm in found.get("alarms", ())]
    lines += ["", table_of(headings, rows)]
    if learners := [actor for actor in found["nodes"] if actor.get("rejoin")]:
        headings = ["learner", "phase", "from", "timelines", "bytes", "buckets"]
        lines += ["", table_of(headings, [_rejoin_row(actor) for actor in learners])]
    if out := [
        {"node": actor["node"], **disk}
        for actor in found["nodes"]
        for disk in actor.get("disks", ())
        if disk["state"] != "serving"
    ]:
        lines += ["", disks_table(out)]
    if cold := [actor for actor in found["nodes"] if actor.get("scrub")]:
        rows = [scrub_row(actor["node"], actor["scrub"], actor["repairs"]) for actor in cold]
        lines += ["", table_of(SCRUB_HEADINGS, rows)]
    figures = [
        [actor["node"], name, f"{value:,.15g}"]
        for actor in found["nodes"]
        for name, value in sorted(actor.get("figures", {}).items())
        if value
    ]
    if figures:
        lines += ["", table_of(["actor", "figure", "value"], figures)]
    lines += _sink_lines(found["router"])
    lines += ["", "what is where, and why: `timetier tiers`, `timetier explain TABLE OWNER [TIMESTAMP]`"]
    return "\n".join(lines)


def _rejoin_row(actor: dict[str, Any]) -> list[str]:
    """How far a replica that lost its data is with copying it."""
    rejoin = actor["rejoin"]
    peer = f"replica {rejoin['peer']}" if rejoin["peer"] >= 0 else ""
    buckets = f"{rejoin['buckets_done']:,} of {rejoin['buckets']:,}"
    return [actor["node"], rejoin["phase"], peer, f"{rejoin['timelines']:,}", f"{rejoin['bytes']:,}", buckets]


def _sink_lines(router: dict[str, Any]) -> list[str]:
    """When the sink runs, and what its last runs have done."""
    sink, runs = router.get("sink", {}), router.get("runs", [])
    lines = []
    if sink.get("schedule"):
        following = f", next at {_time(sink['next_at'])}" if sink.get("next_at") else ""
        lines += ["", f"sink: {sink['schedule']}{following}"]
    if runs:
        headings = [
            "sink run",
            "by",
            "began",
            "state",
            "items",
            "raw bytes",
            "cold bytes",
            "blocks",
            "seconds",
            "error",
        ]
        lines += ["", table_of(headings, [_run_row(run) for run in runs[-_SHOWN_RUNS:]])]
    return lines


def _run_row(run: dict[str, Any]) -> list[str]:
    figures = [_number(run.get(name)) for name in ("rows", "raw_bytes", "cold_bytes", "blocks", "seconds")]
    error = str(next(iter(run.get("errors") or []), ""))
    shown = one_line(error if len(error) <= _SHOWN_ERROR_CHARS else error[: _SHOWN_ERROR_CHARS - 3] + "...")
    return [run["run"], run.get("by", ""), _time(run.get("started_at")), run["state"], *figures, shown]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def _time(seconds: float | None) -> str:
    """Local time of seconds since 1970."""
    return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
