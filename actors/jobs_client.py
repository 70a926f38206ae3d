"""Runs the sink in the Ray cluster: as a Ray job where there is a dashboard, else as a Ray task.

Ray's job server is part of its dashboard. All functions here block, so an actor calls them in a thread.
"""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import uuid
from dataclasses import dataclass
from typing import Any, Protocol

import ray

from ..cluster.errors import Unavailable

PENDING, RUNNING, SUCCEEDED, FAILED = "pending", "running", "succeeded", "failed"
ENDED = frozenset({SUCCEEDED, FAILED})

_LOG_TAIL_BYTES = 2_000
_KNOCK_S = 2.0


@dataclass(frozen=True, slots=True)
class SinkOptions:
    """What one run of the sink is to do. `before`: cut-off by hand, in the table's unit; None = by the tables' rules.

    `by_event_time`: the cut-off looks only at the items' timestamps. `table`: only this one.
    """

    before: int | None = None
    by_event_time: bool = False
    table: str | None = None

    def arguments(self, namespace: str) -> list[str]:
        """Command line of the run, from the program on."""
        arguments = [sys.executable, "-m", "timetier.jobs.sink", "--namespace", namespace]
        if self.before is not None:
            arguments += ["--before", str(self.before)]
        if self.by_event_time:
            arguments.append("--by-event-time")
        if self.table is not None:
            arguments += ["--table", self.table]
        return arguments


class RunningSink(Protocol):
    """A run that was started. `kind`: `job` or `task`. `id`: its name in reports, and that of the Ray job."""

    kind: str
    id: str

    def state(self) -> tuple[str, str]:
        """State of the run, and for a failed one why."""


def start_sink(namespace: str, options: SinkOptions) -> RunningSink:
    """Start one run in the connected Ray cluster. Raises Unavailable."""
    arguments = options.arguments(namespace)
    dashboard = dashboard_url()
    return _Job(dashboard, arguments) if dashboard else _Task(arguments)


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
    kind = "job"

    def __init__(self, dashboard: str, arguments: list[str]) -> None:
        from ray.job_submission import JobSubmissionClient

        try:
            self._client = JobSubmissionClient(dashboard)
            self.id = self._client.submit_job(
                entrypoint=f"exec {shlex.join(arguments)}", metadata={"job_name": "timetier sink"}
            )
        except (RuntimeError, ConnectionError, ValueError) as error:
            raise Unavailable(f"Ray's job server at {dashboard} did not take the sink: {error}") from None

    def state(self) -> tuple[str, str]:
        status = self._client.get_job_status(self.id)
        if not status.is_terminal():
            return (PENDING if status.value == "PENDING" else RUNNING), ""
        if status.value == "SUCCEEDED":
            return SUCCEEDED, ""
        return FAILED, self._client.get_job_logs(self.id)[-_LOG_TAIL_BYTES:].strip()


class _Task:
    """Where there is no dashboard. The same program runs as a child of a Ray task."""

    kind = "task"

    def __init__(self, arguments: list[str]) -> None:
        address = ray.get_runtime_context().gcs_address
        self.id = f"task-{uuid.uuid4().hex[:16]}"  # a job knows its id; a task has to be told
        run = ray.remote(num_cpus=0, max_retries=0)(_run_program)
        self._result = run.options(name="timetier sink").remote([*arguments, "--run", self.id], address)

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


def describe(run: RunningSink) -> dict[str, Any]:
    """`kind`, `id` of a run, ready for JSON."""
    return {"kind": run.kind, "id": run.id}
