"""Runs the sink in the Ray cluster: as a Ray job where there is a dashboard, else as a Ray task.

Ray's job server is part of its dashboard. All functions here block, so an actor calls them in a thread.
"""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import ray

from ..cluster.errors import Unavailable

PENDING, RUNNING, SUCCEEDED, FAILED = "pending", "running", "succeeded", "failed"
ENDED = frozenset({SUCCEEDED, FAILED})
JOB, TASK = "job", "task"

_LOG_TAIL_BYTES = 2_000
_KNOCK_S = 2.0


@dataclass(frozen=True, slots=True)
class SinkOptions:
    """What one run of the sink is to do. `before`: cut-off by hand, in the table's unit; None = by the tables' rules.

    `by_event_time`: the cut-off looks only at the items' timestamps. `table`: only this one. `take_over`: begin even if
    another run is at work, which is then fenced. `check_files`: compare all cold files with all links.
    """

    before: int | None = None
    by_event_time: bool = False
    table: str | None = None
    take_over: bool = False
    check_files: bool = False

    def told(self) -> dict[str, Any]:
        """What is not as usual, ready for JSON."""
        return {name: value for name, value in asdict(self).items() if value not in (None, False)}

    def arguments(self, namespace: str, run: str) -> list[str]:
        """Command line of the run of this name, from the program on."""
        arguments = [sys.executable, "-m", "timetier.jobs.sink", "--namespace", namespace, "--run", run]
        if self.before is not None:
            arguments += ["--before", str(self.before)]
        if self.by_event_time:
            arguments.append("--by-event-time")
        if self.table is not None:
            arguments += ["--table", self.table]
        if self.take_over:
            arguments.append("--take-over")
        if self.check_files:
            arguments.append("--check-files")
        return arguments


class RunningSink(Protocol):
    """A run that was started. `kind`: `job` or `task`."""

    kind: str

    def state(self) -> tuple[str, str]:
        """State of the run, and for a failed one why. Raises Unavailable when nobody can tell."""


def start_sink(namespace: str, options: SinkOptions, run: str) -> RunningSink:
    """Start the run of this name in the connected Ray cluster; a Ray job has that id. Raises Unavailable."""
    arguments = options.arguments(namespace, run)
    dashboard = dashboard_url()
    if not dashboard:
        return _Task(arguments)
    job = _Job(run)
    job.submit(dashboard, arguments)
    return job


def find_job(run: str) -> RunningSink:
    """The Ray job of this id, which may have been started long ago."""
    return _Job(run)


def dashboard_url() -> str | None:
    """Where the connected cluster's dashboard (and so its job server) answers, or None."""
    from ray._private import ray_constants
    from ray.experimental.internal_kv import _internal_kv_get

    found = _internal_kv_get(ray_constants.DASHBOARD_ADDRESS, namespace=ray_constants.KV_NAMESPACE_DASHBOARD)
    # A Ray that was told to have no dashboard may name an address all the same, where nobody listens.
    return f"http://{found.decode()}" if found and _is_open(found.decode()) else None


def _is_open(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_S).close()
    except (OSError, ValueError):
        return False
    return True


class _Job:
    kind = JOB

    def __init__(self, run: str) -> None:
        self._run = run

    def submit(self, dashboard: str, arguments: list[str]) -> None:
        from ray.job_submission import JobSubmissionClient

        try:
            JobSubmissionClient(dashboard).submit_job(
                entrypoint=f"exec {shlex.join(arguments)}",
                submission_id=self._run,
                metadata={"job_name": "timetier sink"},
            )
        except (RuntimeError, ConnectionError, ValueError) as error:
            raise Unavailable(f"Ray's job server at {dashboard} did not take the sink: {error}") from None

    def state(self) -> tuple[str, str]:
        from ray.job_submission import JobSubmissionClient

        dashboard = dashboard_url()
        if not dashboard:
            raise Unavailable("Ray has no dashboard, and so no job server")
        try:
            client = JobSubmissionClient(dashboard)
            status = client.get_job_status(self._run)
            if not status.is_terminal():
                return (PENDING if status.value == "PENDING" else RUNNING), ""
            if status.value == "SUCCEEDED":
                return SUCCEEDED, ""
            return FAILED, client.get_job_logs(self._run)[-_LOG_TAIL_BYTES:].strip()
        except (RuntimeError, ConnectionError) as error:
            if "does not exist" in str(error):
                return FAILED, "Ray does not know its job any more"
            raise Unavailable(f"Ray's job server at {dashboard} does not tell: {error}") from None


class _Task:
    """Where there is no dashboard. The same program runs as a child of a Ray task."""

    kind = TASK

    def __init__(self, arguments: list[str]) -> None:
        address = ray.get_runtime_context().gcs_address
        run = ray.remote(num_cpus=0, max_retries=0)(_run_program)
        self._result = run.options(name="timetier sink").remote(arguments, address)

    def state(self) -> tuple[str, str]:
        done, _ = ray.wait([self._result], timeout=0)
        if not done:
            return RUNNING, ""
        try:
            status, log = ray.get(self._result)
        except ray.exceptions.RayError as error:
            return FAILED, str(error)[-_LOG_TAIL_BYTES:]
        return (SUCCEEDED, "") if status == 0 else (FAILED, log)


def _run_program(arguments: list[str], address: str) -> tuple[int, str]:
    environment = {**os.environ, "RAY_ADDRESS": address}
    done = subprocess.run(
        arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, text=True
    )
    return done.returncode, done.stdout[-_LOG_TAIL_BYTES:].strip()
