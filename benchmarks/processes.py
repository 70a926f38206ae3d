"""Processes that a benchmark starts: on free ports of loopback, ended by pid in every case; their CPU and memory."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
_END_S = 20.0
_POLL_S = 0.05
_SCHEDULED = 2  # which clock of a process: the one that the scheduler keeps, in nanoseconds (clock_getcpuclockid(3))


class StartError(Exception):
    """A system can't be started; the text says why."""


def start_module(module: str, arguments: Iterable[str], log_file: Path) -> subprocess.Popen[bytes]:
    """Start a program of this package, which is spoken to by its standard input and output and ends with the former.

    What it says of errors goes to `log_file`. Ctrl-C does not reach it.
    """
    with log_file.open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
            cwd=_ROOT,
        )


class Processes:
    """The servers of one system. Ctrl-C does not reach them: whoever started them ends them.

    They stay in the session of who starts them: Linux shares its cores out among sessions first, and the nodes of a
    TimeTier cluster are in one, too.
    """

    def __init__(self, folder: Path) -> None:
        """`folder`: for their output."""
        self._folder = folder
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._running.values()]

    def start(self, name: str, command: list[str]) -> None:
        """Start a server, which writes to `name`.log. Raises StartError."""
        with (self._folder / f"{name}.log").open("wb") as log:
            try:
                self._running[name] = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    process_group=0,
                    cwd=self._folder,
                )
            except OSError as error:
                raise StartError(f"{command[0]} can't be started: {error.strerror}") from None

    def check(self) -> None:
        """Raises StartError when one of them has ended, with the end of its output."""
        for name, process in self._running.items():
            if process.poll() is not None:
                raise StartError(f"{name} ended with status {process.returncode}: {self._last_line(name)}")

    def stop(self) -> None:
        """End all of them."""
        for process in self._running.values():
            process.terminate()
        for process in self._running.values():
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._running.clear()

    def _last_line(self, name: str) -> str:
        lines = (self._folder / f"{name}.log").read_text(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "it said nothing")


def end_on_signals() -> None:
    """End this program by SystemExit on SIGTERM and SIGHUP, so that what it has started is ended, too."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)


def wait_until(ready: object, processes: Processes, timeout_s: float = 30.0) -> None:
    """Call `ready` until it is true; what it raises counts as not yet. Raises StartError."""
    assert callable(ready)
    deadline = time.monotonic() + timeout_s
    while True:
        reason = "it is not ready"
        try:
            if ready():
                return
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        processes.check()
        if time.monotonic() > deadline:
            raise StartError(f"not ready within {timeout_s:.0f} s: {reason}")
        time.sleep(_POLL_S)


def free_ports(count: int) -> list[int]:
    """TCP ports of loopback that nobody listens on."""
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in held:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in held]


def cpu_seconds(pids: Iterable[int]) -> float:
    """CPU that processes have used so far, all threads, ended ones too; of those that live."""
    total = 0.0
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended: what it used before is lost
            total += time.clock_gettime((~pid << 3) | _SCHEDULED)
    return total


def cpu_by_part(parts: Mapping[str, Iterable[int]]) -> dict[str, float]:
    return {part: cpu_seconds(pids) for part, pids in parts.items()}


def memory_bytes(pid: int) -> int:
    """Proportional set size: what a process has in memory, with its share of what others have, too."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) << 10
    raise OSError(f"the kernel tells no Pss of process {pid}")


class Spinners:
    """One idle-priority process for each core, which keeps cores from sleeping and gives way to everybody.

    Waking a sleeping core costs more than many a call that is measured here, and which core sleeps is luck.
    """

    def __init__(self) -> None:
        self._pids: list[int] = []

    def start(self) -> None:
        parent = os.getpid()
        for core in sorted(os.sched_getaffinity(0)):
            pid = os.fork()
            if pid == 0:
                _spin(core, parent)
            self._pids.append(pid)

    def running(self) -> int:
        """How many spin; fewer than there are cores where the system does not let them."""
        self._pids = [pid for pid in self._pids if os.waitpid(pid, os.WNOHANG)[0] == 0]
        return len(self._pids)

    def stop(self) -> None:
        for pid in self._pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        self._pids.clear()


def _spin(core: int, parent: int) -> None:
    """Never returns; ends when its parent has."""
    try:
        os.setsid()
        with contextlib.suppress(FileNotFoundError):  # a kernel that shares its cores out among processes alone
            Path("/proc/self/autogroup").write_text("19")  # the idle policy counts within a session only
        os.sched_setaffinity(0, {core})
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        while os.getppid() == parent:
            for _ in range(1_000_000):
                pass
    finally:
        os._exit(0)
