"""The Router's book of sink runs: one at a time, followed to their ends, remembered, and an alarm for what failed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from timetier.actors.jobs_client import FAILED, RUNNING, SUCCEEDED, SinkOptions
from timetier.actors.launch import alarms_of
from timetier.actors.router_state import RouterState
from timetier.actors.sink_runs import SILENT_S, SinkRuns, alarm_of, run_name
from timetier.cluster.config import Config, load_config
from timetier.cluster.counters import Counters
from timetier.cluster.errors import Unavailable
from timetier.cluster.schedule import Schedule


class RayJobs:
    """In the place of Ray's job server: jobs do what they are told to."""

    def __init__(self) -> None:
        self.states: dict[str, tuple[str, str]] = {}
        self.refuses = ""
        self.knows = True
        self.options: list[SinkOptions] = []

    def start(self, namespace: str, options: SinkOptions, run: str) -> Job:
        if self.refuses:
            raise Unavailable(self.refuses)
        self.states[run] = (RUNNING, "")
        self.options.append(options)
        return Job(self, run)

    def find(self, run: str) -> Job:
        return Job(self, run)


class Job:
    kind = "job"

    def __init__(self, jobs: RayJobs, run: str) -> None:
        self._jobs, self._run = jobs, run

    def state(self) -> tuple[str, str]:
        if not self._jobs.knows:
            raise Unavailable("no dashboard")
        return self._jobs.states.get(self._run, (FAILED, "Ray does not know its job any more"))


class Book:
    """Runs over a folder, with a clock that only moves when it is told to."""

    def __init__(self, folder: Path, config: Config | None = None, jobs: RayJobs | None = None) -> None:
        self.jobs = jobs or RayJobs()
        self.now = 1_700_000_000.0
        self.counters = Counters()
        self.state = RouterState.open(folder, "ns", config)
        self.runs = SinkRuns(
            "ns",
            self.state,
            self.counters,
            start=self.jobs.start,
            find=self.jobs.find,
            wall_s=lambda: self.now,
            poll_s=0.001,
        )
        self.runs.begin()

    def entry(self, run: str) -> dict[str, Any]:
        return next(entry for entry in self.state.runs if entry["run"] == run)

    async def ended(self, run: str) -> dict[str, Any]:
        await until(lambda: self.entry(run)["state"] not in (RUNNING, "pending"))
        return self.entry(run)


async def until(condition: Callable[[], Any], timeout_s: float = 10.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "not in time"
        await asyncio.sleep(0.002)
    return found


def in_loop(body: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(body(), 30)

    asyncio.run(bounded())


def test_a_run_is_named_by_its_time_followed_and_remembered_with_its_figures(tmp_path: Path) -> None:
    async def body() -> None:
        book = Book(tmp_path)
        started = await book.runs.start(SinkOptions(table="t"), "hand")
        run = started["id"]
        assert run.startswith("sink-20231114-221320-"), "its Ray job is found by that name"
        assert await book.runs.state(run) == {"state": "pending", "reason": ""}
        book.runs.report({"run": run, "state": RUNNING, "done": 3, "total": 9})
        book.runs.report({"run": run, "state": SUCCEEDED, "rows": 7, "blocks": 2, "cold_bytes": 10, "raw_bytes": 30})
        assert (await book.runs.state(run))["state"] == RUNNING, "its process has not ended yet"
        book.jobs.states[run] = (SUCCEEDED, "")
        await until(lambda: book.runs.under_way() is None)
        entry = RouterState.open(tmp_path, "ns", None).runs[-1]
        assert entry["by"] == "hand"
        assert entry["table"] == "t"
        assert (entry["rows"], entry["blocks"], entry["done"], entry["kind"]) == (7, 2, 3, "job")
        assert entry["ended_at"] == book.now
        figures = book.counters.read()
        assert (figures["sunk_items"], figures["sink_runs_succeeded"], figures["sink_alarm"]) == (7, 1, 0)
        book.runs.stop()

    in_loop(body)


def test_there_is_one_run_at_a_time_unless_it_is_to_be_replaced(tmp_path: Path) -> None:
    async def body() -> None:
        book = Book(tmp_path)
        first = (await book.runs.start(SinkOptions(), "schedule"))["id"]
        book.now += 5
        with pytest.raises(Unavailable, match=rf"{first} has been at work for 5 s.*--follow.*--take-over"):
            await book.runs.start(SinkOptions(), "hand")
        assert await book.runs.admit("by-somebody-else") == first
        assert await book.runs.admit(first) == ""
        second = (await book.runs.start(SinkOptions(take_over=True), "hand"))["id"]
        assert second != first
        assert await book.runs.admit("by-somebody-else", take_over=True) == ""
        for run in (first, second, "by-somebody-else"):
            book.jobs.states[run] = (SUCCEEDED, "")
        await until(lambda: book.runs.under_way() is None)
        assert await book.runs.admit("another") == "", "nobody is at work"
        assert book.entry("another")["by"] == "job"
        book.runs.stop()

    in_loop(body)


def test_a_run_that_crashes_is_noted_as_failed_and_raises_an_alarm_until_one_succeeds(tmp_path: Path) -> None:
    async def body() -> None:
        book = Book(tmp_path)
        for _ in range(2):
            run = (await book.runs.start(SinkOptions(), "hand"))["id"]
            book.jobs.states[run] = (FAILED, "Traceback\n  line\nMemoryError: too much")
            assert (await book.ended(run))["state"] == FAILED
            book.now += 60
        alarm = book.runs.status()["alarm"]
        assert alarm == f"run {run} failed (the last 2 have): MemoryError: too much"
        assert book.counters.read()["sink_alarm"] == 1
        assert alarms_of({"sink": book.runs.status()}, []) == [{"actor": "sink", "alarm": alarm}]
        run = (await book.runs.start(SinkOptions(), "hand"))["id"]
        assert book.runs.status()["alarm"] == alarm, "that one has begun says nothing yet"
        book.jobs.states[run] = (SUCCEEDED, "")
        await book.ended(run)
        assert book.runs.status()["alarm"] == ""
        assert book.counters.read()["sink_alarm"] == 0
        book.runs.stop()

    in_loop(body)


def test_a_run_that_ray_does_not_take_is_a_failed_run(tmp_path: Path) -> None:
    async def body() -> None:
        book = Book(tmp_path)
        book.jobs.refuses = "the job server is full"
        with pytest.raises(Unavailable, match="full"):
            await book.runs.start(SinkOptions(), "schedule")
        assert "the job server is full" in book.runs.status()["alarm"]
        book.jobs.refuses = ""
        await book.runs.start(SinkOptions(), "schedule")
        book.runs.stop()

    in_loop(body)


def test_no_run_begins_and_no_alarm_is_raised_while_the_cluster_is_being_restored(tmp_path: Path) -> None:
    async def body() -> None:
        book = Book(tmp_path)
        book.state.set_restoring("night", "beginning")
        with pytest.raises(Unavailable, match="being restored"):
            await book.runs.start(SinkOptions(), "schedule")
        assert (book.state.runs, book.runs.status()["alarm"]) == ([], "")
        book.state.set_restoring("night", "")
        await book.runs.start(SinkOptions(), "schedule")
        book.runs.stop()

    in_loop(body)


def test_a_restarted_router_follows_the_runs_that_it_finds(tmp_path: Path) -> None:
    async def body() -> None:
        first = Book(tmp_path)
        run = (await first.runs.start(SinkOptions(), "hand"))["id"]
        first.runs.stop()
        second = Book(tmp_path, jobs=first.jobs)
        with pytest.raises(Unavailable, match=run):
            await second.runs.start(SinkOptions(), "hand")
        first.jobs.states[run] = (FAILED, "killed")
        assert (await second.ended(run))["errors"] == ["killed"]
        second.runs.stop()

    in_loop(body)


def test_a_task_whose_router_is_gone_is_given_up_when_it_has_been_silent_for_long(tmp_path: Path) -> None:
    async def body() -> None:
        first = Book(tmp_path)
        first.runs.stop()
        first.state.report_run({"run": "r", "state": RUNNING, "kind": "task", "started_at": first.now})
        second = Book(tmp_path)
        second.state.runs[-1]["reported_at"] = second.now
        second.now = time.time() + SILENT_S - 10
        second.runs.report({"run": "r", "state": RUNNING})
        await asyncio.sleep(0.02)
        assert second.runs.under_way() is not None, "it is heard of"
        second.now = time.time() + SILENT_S + 10
        assert "nothing was heard of it" in (await second.ended("r"))["errors"][0]
        second.runs.report({"run": "r", "state": RUNNING})
        assert second.entry("r")["state"] == FAILED, "a late word does not revive it"
        second.runs.stop()

    in_loop(body)


def test_a_job_server_that_does_not_answer_does_not_end_a_run_that_is_heard_of(tmp_path: Path) -> None:
    async def body() -> None:
        book = Book(tmp_path)
        run = (await book.runs.start(SinkOptions(), "hand"))["id"]
        book.jobs.knows = False
        book.now = time.time()
        book.runs.report({"run": run, "state": RUNNING})
        await asyncio.sleep(0.02)
        assert book.entry(run)["state"] == RUNNING
        book.runs.report({"run": run, "state": SUCCEEDED})
        book.jobs.knows = True
        book.jobs.states[run] = (SUCCEEDED, "")
        assert (await book.ended(run))["state"] == SUCCEEDED
        book.runs.stop()

    in_loop(body)


def test_runs_begin_on_schedule_and_one_that_is_at_work_is_not_overtaken(tmp_path: Path) -> None:
    async def body() -> None:
        config = load_config(None, data_dir=tmp_path)
        config = config.model_copy(
            update={"namespace": "ns", "sink": config.sink.model_copy(update={"every": 3_600.0})}
        )
        book = Book(tmp_path, config)
        await until(lambda: book.runs.status()["next_at"])
        assert book.runs.status()["schedule"] == "every 1h"
        assert book.runs.status()["next_at"] == book.now + 3_600
        book.now += 3_599
        await asyncio.sleep(0.1)
        assert book.runs.under_way() is None
        book.now += 2
        first = (await until(book.runs.under_way))["run"]
        book.jobs.states[first] = (SUCCEEDED, "")
        await book.ended(first)
        book.runs.stop()

        again = Book(tmp_path)
        assert again.runs.under_way() is None, "a restarted Router counts from the last run"
        again.now += 2 * 3_600 + 1
        run = (await until(again.runs.under_way))["run"]
        assert again.entry(run)["by"] == "schedule"
        assert await until(lambda: again.jobs.options) == [SinkOptions()]
        assert await until(lambda: (again.runs.status()["next_at"] or 0) > again.now)
        again.runs.stop()

    in_loop(body)


def test_a_schedule_that_starts_nothing_any_more_raises_an_alarm() -> None:
    last = {"run": "r", "state": SUCCEEDED, "by": "schedule", "started_at": 1_000.0}
    hourly = Schedule(every_s=3_600.0)
    assert alarm_of([last], hourly, 5_000.0) == ""
    assert "no run has begun for too long: every 1h" in alarm_of([last], hourly, 50_000.0)


def test_names_of_runs_are_fit_for_files_and_jobs() -> None:
    names = {run_name(1_700_000_000.0) for _ in range(50)}
    assert len(names) > 40
    assert all(len(name) <= 40 and set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") for name in names)
