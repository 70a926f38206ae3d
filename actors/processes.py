"""Which processes of this machine belong together, and ending them. Needs /proc to see more than the first one.

A process is known by its pid and by when it was started, since pids are used again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

_POLL_S = 0.05


def started(pid: int) -> str:
    """When a process was started, as a text that no other process of that pid shares; "" when it has ended."""
    with contextlib.suppress(ChildProcessError):  # it is no child of this process
        os.waitpid(pid, os.WNOHANG)
    try:
        fields = _stat(pid)
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        if Path("/proc/self").exists():
            return ""
        found = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
        return found.stdout.strip()
    return "" if fields[0] in "ZX" else f"{boot}:{fields[19]}"


def family(leader: int, leader_started: str, environment: str) -> dict[int, str]:
    """Living processes that a session's leader started, and theirs, with the leader dead or alive: pid -> `started`.

    They are those of its session (the kernel gives its number to nobody else while one of them lives), and those
    that have left it, but were started with `environment`, a text like `NAME=value` that no others have.
    """
    boot = leader_started.partition(":")[0]
    wanted = environment.encode()
    found: dict[int, str] = {}
    for path in Path("/proc").glob("[0-9]*"):
        pid = int(path.name)
        with contextlib.suppress(OSError):  # it has ended meanwhile, or belongs to somebody else
            in_session = int(_stat(pid)[3]) == leader
            if in_session or wanted in (path / "environ").read_bytes().split(b"\0"):
                found[pid] = started(pid)
    return {pid: since for pid, since in found.items() if since.startswith(boot + ":") and pid != os.getpid()}


def send(processes: dict[int, str], number: signal.Signals) -> None:
    """Send a signal to those that still run. Raises PermissionError."""
    for pid, since in processes.items():
        if since and started(pid) == since:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(pid, number)


def wait_for(processes: dict[int, str], timeout_s: float) -> bool:
    """Whether all of them have ended within `timeout_s` seconds."""
    deadline = time.monotonic() + timeout_s
    while any(since and started(pid) == since for pid, since in processes.items()):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on. Raises FileNotFoundError or ProcessLookupError."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # the name before may hold blanks
