"""The client processes of a run: starting them, hearing how they get on, ending them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import msgspec

from .client import Progress, Task

ROOT = Path(__file__).resolve().parents[2]
_END_S = 40.0
_READ_S = 150.0


class Clients:
    """Client processes that run a workload, each with files of its own in the folder.

    `not_begun`: operations that would have begun, had not too many been under way.
    """

    def __init__(self, tasks: list[Task], environment: Mapping[str, str]) -> None:
        """`environment`: what leads them to their Ray."""
        self.tasks = tasks
        self._lock = threading.Lock()
        self._told = Progress()
        self.not_begun = 0
        self._processes = [_start(task, environment) for task in tasks]
        self._listeners = [threading.Thread(target=self._listen, args=(p,), daemon=True) for p in self._processes]
        for listener in self._listeners:
            listener.start()

    def take(self) -> Progress:
        """What all of them have told since the last time. Raises RuntimeError when one has ended."""
        for task, process in zip(self.tasks, self._processes, strict=True):
            if process.poll() is not None:
                raise RuntimeError(f"client {task.client} ended with status {process.returncode}: {_log_of(task)}")
        with self._lock:
            told, self._told = self._told, Progress()
        return told

    def stop(self) -> None:
        """Have them end what is under way, and wait for that. Raises RuntimeError when one fails."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for task, process in zip(self.tasks, self._processes, strict=True):
            status = process.wait(_END_S)
            if status:
                raise RuntimeError(f"client {task.client} ended with status {status}: {_log_of(task)}")

    def kill(self) -> None:
        """End them at once."""
        for process in self._processes:
            process.kill()
            process.wait(_END_S)

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            heard = msgspec.json.decode(line, type=Progress)
            with self._lock:
                self._told.reads += heard.reads
                self._told.writes += heard.writes
                self._told.errors += heard.errors
                self._told.under_way += heard.under_way
                self.not_begun += heard.not_begun


def read_all(task: Task, environment: Mapping[str, str]) -> None:
    """Have a client read all of its `owners`. Raises RuntimeError when it fails."""
    process = _start(task, environment)
    try:
        status = process.wait(_READ_S)
    except BaseException:
        process.kill()
        process.wait()
        raise
    if status:
        raise RuntimeError(f"client {task.client} ended with status {status}: {_log_of(task)}")


def _start(task: Task, environment: Mapping[str, str]) -> subprocess.Popen[str]:
    with (Path(task.folder) / f"log-{task.client}.txt").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.client", msgspec.json.encode(task).decode()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=ROOT,
            env={**os.environ, **environment},
            start_new_session=True,  # an interrupt of the terminal is for the run, which ends its clients
        )


def _log_of(task: Task) -> str:
    text = (Path(task.folder) / f"log-{task.client}.txt").read_text(errors="replace").strip()
    return text.splitlines()[-1] if text else "(it said nothing)"
