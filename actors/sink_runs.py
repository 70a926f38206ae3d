"""The runs of the sink, as the Router knows them: it starts them, one at a time, and follows each to its end.

What is told of a run is an entry of `RouterState.runs`, and is durable whenever its state changes: `run` (its name,
which is also that of the Ray job), `kind` (`job` or `task`), `by` (`schedule`, `hand`, or `job` for one that somebody
else submitted), `state`, `started_at`, `ended_at`, and the figures that the run reports itself. A Router that was
restarted follows the runs that it finds.

One run at a time is a matter of economy, not of safety: two runs at once fence each other (decision 004).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from typing import Any

from ..cluster.config import SinkConfig
from ..cluster.counters import Counters
from ..cluster.errors import TimeTierError, Unavailable
from ..cluster.schedule import Schedule
from .jobs_client import ENDED, FAILED, JOB, PENDING, RUNNING, RunningSink, SinkOptions, find_job, start_sink
from .router_state import RouterState

SILENT_S = 120.0  # a run that reports nothing for so long, and of which Ray knows nothing, has ended
_POLL_S = 1.0
_LONGEST_SLEEP_POLLS = 30  # the clock may be set
_SUNK = {"sunk_items": "rows", "sunk_bytes": "cold_bytes", "sunk_raw_bytes": "raw_bytes"}  # counter: figure of a run

logger = logging.getLogger(__name__)


class SinkRuns:
    """Starts, follows and remembers the runs of one cluster's sink. All methods run on one event loop."""

    def __init__(
        self,
        namespace: str,
        state: RouterState,
        counters: Counters,
        *,
        start: Callable[[str, SinkOptions, str], RunningSink] = start_sink,
        find: Callable[[str], RunningSink] = find_job,
        wall_s: Callable[[], float] = time.time,
        poll_s: float = _POLL_S,
    ) -> None:
        """`start`, `find`: how runs are started, and found again. `wall_s`: seconds since 1970. `poll_s`: between two
        questions about a run."""
        self._namespace = namespace
        self._state = state
        self._counters = counters
        self._start = start
        self._find = find
        self._wall_s = wall_s
        self._poll_s = poll_s
        self._longest_sleep_s = _LONGEST_SLEEP_POLLS * poll_s
        self._starting = asyncio.Lock()
        self._running: dict[str, RunningSink | None] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._next_at: float | None = None

    @property
    def schedule(self) -> Schedule | None:
        """When runs start by themselves."""
        config: SinkConfig = self._state.config.sink
        return config.schedule()

    def begin(self) -> None:
        """Follow the runs that an earlier Router has left, and start others on schedule."""
        for entry in self._state.runs:
            if entry["state"] not in ENDED:
                self._follow(entry["run"], self._find(entry["run"]) if entry.get("kind") == JOB else None)
        if self.schedule is not None:
            self._keep(self._start_on_schedule(self.schedule))

    def stop(self) -> None:
        """End the work of this process; runs go on."""
        for task in self._tasks:
            task.cancel()

    def under_way(self) -> dict[str, Any] | None:
        """The run that has not ended, None if there is none."""
        return next((entry for entry in reversed(self._state.runs) if entry["state"] not in ENDED), None)

    def status(self) -> dict[str, Any]:
        """`schedule` in words ("" = by hand only), `next_at` (seconds since 1970), `alarm` ("" = all is well)."""
        schedule = self.schedule
        return {
            "schedule": "" if schedule is None else str(schedule),
            "next_at": self._next_at,
            "alarm": alarm_of(self._state.runs, schedule, self._wall_s()),
        }

    # ------------------------------------------------------------ starting

    async def start(self, options: SinkOptions, by: str) -> dict[str, Any]:
        """Start a run; its `kind` and `id`.

        Raises Unavailable while another one is at work, while the cluster is being restored, or when Ray takes none.
        """
        async with self._starting:
            if self._state.topology().restoring is not None:
                raise Unavailable("the cluster is being restored: the sink runs again when that has ended")
            if not options.take_over:
                self._refuse_a_second()
            run = run_name(self._wall_s())
            self._note({"run": run, "state": PENDING, "by": by, "started_at": self._wall_s(), **options.told()})
            try:
                started = await asyncio.to_thread(self._start, self._namespace, options, run)
            except Unavailable as error:
                self._end(run, FAILED, error.message)
                raise
            self._note({"run": run, "state": PENDING, "kind": started.kind})
            self._follow(run, started)
            return {"kind": started.kind, "id": run}

    async def admit(self, run: str, *, take_over: bool = False) -> str:
        """A run that begins, whoever started it. "" if it may go on, else the name of the one that is at work."""
        async with self._starting:
            if self._entry(run) is not None:
                return ""
            other = self.under_way()
            if other is None or take_over:
                self._note({"run": run, "state": RUNNING, "kind": JOB, "by": JOB, "started_at": self._wall_s()})
                self._follow(run, self._find(run))
                return ""
            return str(other["run"])

    def _refuse_a_second(self) -> None:
        other = self.under_way()
        if other is not None:
            since_s = max(0.0, self._wall_s() - other.get("started_at", self._wall_s()))
            raise Unavailable(
                f"the sink run {other['run']} has been at work for {since_s:.0f} s: wait until it has ended, follow it "
                "with `timetier sink --follow`, or replace it with `timetier sink --take-over`"
            )

    async def _start_on_schedule(self, schedule: Schedule) -> None:
        began = self._wall_s()
        last_start = _last_scheduled(self._state.runs)
        while True:
            now = self._wall_s()
            self._next_at = schedule.next_after(began if last_start is None else now, last_start)
            if self._next_at > now:
                await asyncio.sleep(min(self._next_at - now, self._longest_sleep_s))
                continue
            last_start = now
            try:
                await self.start(SinkOptions(), "schedule")
            except (TimeTierError, RuntimeError, OSError) as error:
                logger.warning("the scheduled sink did not start: %s", error)

    # ------------------------------------------------------------ following

    def report(self, report: dict[str, Any]) -> None:
        """Note what a run says of itself: `run`, `state` and figures. Raises InvalidRequest, Unavailable."""
        ended = {entry["run"] for entry in self._state.runs if entry["state"] in ENDED}
        if report.get("run") in ended and report.get("state") not in ENDED:
            return  # it was given up meanwhile, or its last word has overtaken this one
        counts = report.get("state") in ENDED and report.get("run") not in ended
        self._note({**report, **({"ended_at": self._wall_s()} if counts else {})})
        if counts:
            self._counters.add("sink_runs_failed" if report["state"] == FAILED else "sink_runs_succeeded")
            for total, figure in _SUNK.items():
                if isinstance(report.get(figure), int):
                    self._counters.add(total, report[figure])

    async def state(self, run: str) -> dict[str, str]:
        """`state` and `reason` of a run. Raises Unavailable for one that is not known (any more)."""
        entry = self._entry(run)
        if entry is None:
            raise Unavailable(f"the Router does not know the sink run {run}")
        if entry["state"] in ENDED and run in self._running:
            return {"state": RUNNING, "reason": ""}  # its last word is here, but its process has not ended
        return {"state": entry["state"], "reason": "; ".join(entry.get("errors", []))}

    def _follow(self, run: str, found: RunningSink | None) -> None:
        if run not in self._running:
            self._running[run] = found
            self._keep(self._until_ended(run, found))

    async def _until_ended(self, run: str, found: RunningSink | None) -> None:
        try:
            while True:
                known = await self._look(run, found)
                if known is not None:
                    break
                await asyncio.sleep(self._poll_s)
        finally:
            del self._running[run]
        entry = self._entry(run)
        if entry is not None and entry["state"] not in ENDED:
            self._end(run, *known)
        elif entry is not None and known[0] == FAILED and entry["state"] != FAILED:
            self._note({"run": run, "state": FAILED, "errors": [known[1]]})

    async def _look(self, run: str, found: RunningSink | None) -> tuple[str, str] | None:
        """State and reason of a run that has ended, None for one that has not, as far as can be told."""
        if found is not None:
            try:
                state, reason = await asyncio.to_thread(found.state)
            except Unavailable as error:
                state, reason = PENDING, error.message
            if state in ENDED:
                return state, reason
        else:
            reason = "the Router was restarted"
        entry = self._entry(run)
        if entry is None or (found is None and entry["state"] in ENDED):
            return ("", "") if entry is None else (entry["state"], "")
        if self._wall_s() - max(entry.get("reported_at", 0.0), entry.get("started_at", 0.0)) > SILENT_S and (
            found is None or state == PENDING
        ):
            return FAILED, f"nothing was heard of it for {SILENT_S:.0f} s" + (f" ({reason})" if reason else "")
        return None

    def _end(self, run: str, state: str, reason: str) -> None:
        lines = [reason[-2_000:]] if reason else []
        try:
            self.report({"run": run, "state": state, "errors": lines})
        except TimeTierError as error:
            logger.error("the end of the sink run %s can't be noted: %s", run, error)

    def _entry(self, run: str) -> dict[str, Any] | None:
        return next((entry for entry in self._state.runs if entry["run"] == run), None)

    def _note(self, report: dict[str, Any]) -> None:
        self._state.report_run(report)
        alarm = alarm_of(self._state.runs, None, self._wall_s())
        self._counters.set("sink_alarm", 1 if alarm else 0)

    def _keep(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def run_name(now: float) -> str:
    """Name of a run that begins: it says when, in UTC, and no two have the same."""
    return time.strftime("sink-%Y%m%d-%H%M%S-", time.gmtime(now)) + secrets.token_hex(2)


def alarm_of(runs: list[dict[str, Any]], schedule: Schedule | None, now: float) -> str:
    """What is wrong with the sink, in one line; "" if nothing is. `runs`: oldest first; `now`: seconds since 1970."""
    ended = [run for run in runs if run["state"] in ENDED]
    if ended and ended[-1]["state"] == FAILED:
        last = ended[-1]
        errors = last.get("errors") or ["see its log"]
        failed = 0
        for run in reversed(ended):
            if run["state"] != FAILED:
                break
            failed += 1
        times = "" if failed == 1 else f" (the last {failed} have)"
        reason = str(errors[0]).strip().splitlines()
        return f"run {last['run']} failed{times}: {reason[-1] if reason else 'see its log'}"
    if schedule is not None and schedule.is_overdue(now, _last_scheduled(runs)):
        return f"no run has begun for too long: {schedule}"
    return ""


def _last_scheduled(runs: list[dict[str, Any]]) -> float | None:
    starts = [run["started_at"] for run in runs if run.get("by") == "schedule" and "started_at" in run]
    return max(starts, default=None)
