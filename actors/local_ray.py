"""A Ray of our own on this machine, for clusters that live in one data folder.

`timetier up` without an address starts it and leaves it running: a `ray start --head --block` in a session of its
own, described in `<data folder>/ray/head.json`. Several of them can run side by side; each has its own ports, its
own temporary folder and its own token, so whoever can read the data folder may use the cluster, and nobody else.

This module imports Ray nowhere at its top: Ray reads its authentication settings once, so `use_local_ray` must have
set them before the first `import ray`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from ..cluster.durable_file import make_folder_durably, write_durably
from ..cluster.errors import Unavailable
from .processes import family, send, started, wait_for

_LONGEST_TEMP_DIR = 38  # bytes: Ray adds some 60 for its sockets, and a socket's path ends at 107
_RAY_OWN_PORTS = range(10002, 20000)  # Ray's proxy of `ray://` clients hands these out
_ATTEMPTS = 3  # a chosen port may be taken by somebody else before Ray binds it
_END_S = 60.0
_END_REMAINS_S = 5.0  # for processes without a head, and after SIGKILL
_OBJECT_STORE_BYTES = 512 << 20


class LocalRay(msgspec.Struct, frozen=True):
    """A head that was started from a data folder.

    `pid`, `started`: its process, and what tells it from a later process with the same pid. `temp_dir`: private
    folder of its sockets and logs, removed when it is ended. `address`: for
    `ray.init`; empty until it is ready. `client_address`: for `ray://`. `dashboard_port`: on this machine.
    """

    pid: int
    started: str
    temp_dir: str
    client_port: int
    dashboard_port: int
    address: str = ""

    @property
    def client_address(self) -> str:
        return f"ray://{self.address.rpartition(':')[0] or '127.0.0.1'}:{self.client_port}"


def find_local_ray(data_dir: Path) -> LocalRay | None:
    """The running and ready local Ray of this data folder, or None."""
    record = _read_record(data_dir)
    return record if record is not None and record.address and _is_running(record) else None


def use_local_ray(data_dir: Path) -> None:
    """Make this process (and its children) speak to the local Ray of this data folder, and to no other.

    Call it before Ray is imported. When Ray is imported already but not connected, its settings are read again.
    """
    os.environ.update(_environment(data_dir))
    for name in ("RAY_AUTH_TOKEN", "RAY_ADDRESS"):
        os.environ.pop(name, None)
    if "ray" in sys.modules:
        import ray._raylet as raylet

        settings: Any = raylet
        settings.Config.initialize("")
        settings.AuthenticationTokenLoader.instance().reset_cache()


def start_local_ray(data_dir: Path, *, num_cpus: int | None = None, timeout_s: float = 90.0) -> LocalRay:
    """Start a Ray for this data folder, or find the one that runs. It outlives this process.

    `num_cpus`: what Ray believes the machine has; None = count them. Raises Unavailable when it is not ready
    within `timeout_s` seconds, with the end of its log.
    """
    deadline = time.monotonic() + timeout_s
    make_folder_durably(_folder(data_dir))
    with _start_lock(data_dir, deadline):
        running = find_local_ray(data_dir)
        if running is not None:
            return running
        stop_local_ray(data_dir)  # one that never became ready, or the remains of one that was killed
        token = _folder(data_dir) / "token"
        if not token.exists():
            write_durably(token, secrets.token_hex(32).encode())
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return _start(data_dir, num_cpus, deadline)
            except _EndedEarly as error:
                if attempt == _ATTEMPTS or time.monotonic() > deadline:
                    raise Unavailable(str(error)) from None
    raise AssertionError("unreachable")


def stop_local_ray(data_dir: Path) -> bool:
    """End the local Ray of this data folder with all its processes, and only that one. False if its head did not run.

    Raises Unavailable when it does not end.
    """
    record = _read_record(data_dir)
    if record is None:
        return False
    was_running = _is_running(record)
    _end(record)
    _record_path(data_dir).unlink(missing_ok=True)
    return was_running


def _end(record: LocalRay) -> None:
    """End the head and whatever it has started, also when the head itself was killed; remove its folder."""
    environment = f"TMPDIR={_inner_tmp(record.temp_dir)}"
    head = {record.pid: record.started}
    running = {**head, **family(record.pid, record.started, environment)}
    try:
        # The head ends its processes itself. Without a head each of them is told.
        was_running = _is_running(record)
        send(head if was_running else running, signal.SIGTERM)
        if not wait_for(running, _END_S if was_running else _END_REMAINS_S):
            send(running, signal.SIGKILL)
        left = family(record.pid, record.started, environment)  # what was started meanwhile
        send(left, signal.SIGKILL)
        if not wait_for({**running, **left}, _END_REMAINS_S):
            raise Unavailable(f"the local Ray (process {record.pid}) does not end: end it by hand")
    except PermissionError:
        raise Unavailable(f"the local Ray (process {record.pid}) belongs to somebody else") from None
    shutil.rmtree(record.temp_dir, ignore_errors=True)  # its own, made by _start; only logs and sockets


class _EndedEarly(Exception):
    """The head ended before it was ready."""


def _start(data_dir: Path, num_cpus: int | None, deadline: float) -> LocalRay:
    temp_dir = _short_temp_dir()
    ports = _free_ports(4)
    log_path = _folder(data_dir) / "head.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            _command(temp_dir, ports, num_cpus),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=data_dir,
            env=_child_environment(data_dir, temp_dir),
        )
    record = LocalRay(process.pid, started(process.pid), temp_dir, ports[1], ports[2])
    try:
        write_durably(_record_path(data_dir), msgspec.json.encode(record))
        ready = _inner(temp_dir) / "ray_current_cluster"
        while not (ready.exists() and ready.read_text().strip()):
            if process.poll() is not None:
                raise _EndedEarly(f"the local Ray ended with status {process.returncode}; {_end_of(log_path)}")
            if time.monotonic() > deadline:
                raise Unavailable(f"the local Ray was not ready in time; {_end_of(log_path)}")
            time.sleep(0.05)
        record = msgspec.structs.replace(record, address=ready.read_text().strip())
        write_durably(_record_path(data_dir), msgspec.json.encode(record))
    except BaseException:
        _end(record)
        _record_path(data_dir).unlink(missing_ok=True)
        raise
    return record


def _command(temp_dir: str, ports: list[int], num_cpus: int | None) -> list[str]:
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
        f"--temp-dir={_inner(temp_dir)}",
        f"--port={ports[0]}",
        f"--ray-client-server-port={ports[1]}",
        f"--dashboard-port={ports[2]}",
        f"--dashboard-agent-listen-port={ports[3]}",
        # Each process takes a free port: of Ray's fixed range, two Rays on one machine would pick the same ones.
        "--min-worker-port=0",
        "--max-worker-port=0",
        "--dashboard-host=127.0.0.1",
        "--include-dashboard=true",
        f"--object-store-memory={_OBJECT_STORE_BYTES}",
    ]
    return command if num_cpus is None else [*command, f"--num-cpus={num_cpus}"]


def _environment(data_dir: Path) -> dict[str, str]:
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(_folder(data_dir).absolute() / "token"),
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def _child_environment(data_dir: Path, temp_dir: str) -> dict[str, str]:
    mine = {k: v for k, v in os.environ.items() if k not in {"RAY_ADDRESS", "RAY_AUTH_TOKEN"}}
    return {
        **mine,
        **_environment(data_dir),
        "TMPDIR": str(_inner_tmp(temp_dir)),  # what killed processes leave behind goes when the Ray ends
        # Ray would wait for the actors to end by themselves for 30 s after SIGTERM; they end when they are told to.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "RAY_worker_niceness": "0",  # at Ray's 15 a node would starve beside any busy program, and its peers with it
    }


@contextlib.contextmanager
def _start_lock(data_dir: Path, deadline: float) -> Iterator[None]:
    """Only one process starts a Ray for a data folder; others wait, and then find it."""
    with (_folder(data_dir) / "lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise Unavailable(f"another process is starting the Ray of {data_dir}; try again") from None
                time.sleep(0.05)
        yield


def _folder(data_dir: Path) -> Path:
    return data_dir / "ray"


def _record_path(data_dir: Path) -> Path:
    return _folder(data_dir) / "head.json"


def _read_record(data_dir: Path) -> LocalRay | None:
    try:
        return msgspec.json.decode(_record_path(data_dir).read_bytes(), type=LocalRay)
    except FileNotFoundError:
        return None
    except msgspec.MsgspecError as error:
        path = _record_path(data_dir)
        raise Unavailable(f"{path} is damaged ({error}): end that Ray by hand, then remove the file") from None


def _is_running(record: LocalRay) -> bool:
    return bool(record.started) and started(record.pid) == record.started


def _short_temp_dir() -> str:
    usual = tempfile.gettempdir()
    made = tempfile.mkdtemp(prefix="tt-ray-", dir=usual if len(usual) + 16 <= _LONGEST_TEMP_DIR else "/tmp")
    _inner_tmp(made).mkdir()
    return made


def _inner(temp_dir: str) -> Path:
    """What Ray gets: it opens its own folder to everybody, so that one lies in a folder that is private."""
    return Path(temp_dir) / "r"


def _inner_tmp(temp_dir: str) -> Path:
    """The TMPDIR of its processes."""
    return Path(temp_dir) / "t"


def _free_ports(count: int) -> list[int]:
    """Free TCP ports of this machine, outside the range that Ray uses by itself."""
    with contextlib.ExitStack() as stack:
        ports: list[int] = []
        while len(ports) < count:
            held = stack.enter_context(socket.socket())
            held.bind(("", 0))
            port = held.getsockname()[1]
            if port not in _RAY_OWN_PORTS:
                ports.append(port)
        return ports


def _end_of(log_path: Path) -> str:
    lines = [line.strip() for line in log_path.read_text(errors="replace").splitlines() if line.strip()]
    return f"the end of {log_path}: {' | '.join(lines[-3:]) or '(empty)'}"
