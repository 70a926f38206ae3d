"""Several zones on one machine: a Ray head and one raylet a zone, each of which can lose its power and come back.

    with RayZones(tmp_path) as zones:             # a head without a zone, and zones a, b, c
        with ZoneDriver(zones) as driver:         # a process that is connected to this Ray
            driver.call(start_cluster, config)
        zones.kill("b")                           # kill -9 the raylet of b and all that it has started
        zones.start("b")                          # the machine is switched on again

A zone is a *machine* with an address of its own (of 127.0.0.0/8, or one of `addresses`), own temporary folders and the
label `zone=NAME`. Whoever has network namespaces passes `addresses` and `wrap`, and can cut a zone off besides. Only
the head is never killed: Ray itself does not survive that.

Processes are known by the session they are in and by the TMPDIR that only their zone has, so nothing else is ever
ended. When this process is killed itself, a watcher ends them. This module imports Ray nowhere at its top: Ray reads
its settings once, see `RayZones.use`.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from timetier.actors.processes import family, send, started, wait_for

R = TypeVar("R")

HEAD = "head"
_STARTED = "Ray runtime started."
_ATTEMPTS = 3
_START_S = 60.0
_END_S = 20.0
_WAIT = threading.Event()  # never set: its `wait` is the pause between two looks
_RAY_OWN_PORTS = range(10002, 20000)

Wrap = Callable[[str, list[str]], list[str]]
"""Command that runs a given one within the machine of a zone: (zone, command) -> command."""


class RayZones:
    """A Ray cluster of a head and some zones. Starts with `with`; its end ends every process of it.

    `folder`: for tokens and logs. `zones`: their names. `addresses`: IP address of each zone and of "head".
    `wrap`: see `Wrap`; not asked for the head. `labels`: further labels of a zone's Ray node; a `zone` among
    them replaces its name there, for several machines in one zone. `num_cpus`: of each.
    `health_check_s`: Ray gives a node up after five failed looks, this far apart (Ray's own default: 3 s);
    a node that is only slow has ten seconds for each.
    """

    def __init__(
        self,
        folder: Path,
        zones: Iterable[str] = ("a", "b", "c"),
        *,
        addresses: Mapping[str, str] | None = None,
        wrap: Wrap | None = None,
        labels: Mapping[str, Mapping[str, str]] | None = None,
        num_cpus: int = 1,
        health_check_s: float = 1.0,
    ) -> None:
        self.folder = folder.absolute()
        self.zones = list(zones)
        self.address = ""
        """For `ray.init`; empty until the head runs."""
        usual = {name: f"127.0.0.{number}" for number, name in enumerate([HEAD, *self.zones], start=1)}
        self.addresses = dict(addresses or usual)
        self._wrap = wrap or (lambda zone, command: command)
        self._labels = {zone: {"zone": zone, **(labels or {}).get(zone, {})} for zone in self.zones}
        self._num_cpus = num_cpus
        self._health_check_s = health_check_s
        self._temp = Path(tempfile.mkdtemp(prefix="tz", dir="/tmp"))  # short: Ray's sockets lie in it
        self._leaders: dict[str, tuple[int, str]] = {}  # of each machine that was started: pid, when
        self._watcher: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "token").write_text(secrets.token_hex(32))
            self._watcher = subprocess.Popen(
                [sys.executable, __file__, str(self._temp)], stdin=subprocess.PIPE, start_new_session=True
            )
            self._start_head()
            for zone in self.zones:
                self.start(zone)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all of it, at once."""
        for machine in [*self.zones, HEAD]:
            if machine in self._leaders:
                self.kill(machine)
        if self._watcher is not None:
            self._watcher.communicate(timeout=_END_S)  # finds nothing left to end
        shutil.rmtree(self._temp, ignore_errors=True)  # only sockets and logs

    # ------------------------------------------------------------ zones

    def kill(self, zone: str) -> dict[int, str]:
        """Cut the power of a zone: kill -9 its raylet and all that it has started. The processes that were ended.

        Raises AssertionError when some are left.
        """
        ended: dict[int, str] = {}
        deadline = time.monotonic() + _END_S
        while found := self.processes(zone):
            assert time.monotonic() < deadline, f"processes of {zone} do not end: {found}"
            send(found, signal.SIGSTOP)  # so that none of them notices the end of another one
            send(found, signal.SIGKILL)
            wait_for(found, 1.0)
            ended.update(found)
        self._leaders.pop(zone, None)
        return ended

    def start(self, zone: str) -> None:
        """Switch a killed zone on again: the same address, labels and data, a fresh raylet. It has joined afterwards.

        Raises AssertionError when it does not, with the end of its log.
        """
        assert zone not in self._leaders, f"zone {zone} runs"
        labels = ",".join(f"{name}={value}" for name, value in self._labels[zone].items())
        options = [f"--address={self.address}", f"--labels={labels}", f"--num-cpus={self._num_cpus}"]
        self._start_ray(zone, options, self._wrap)

    @property
    def running(self) -> list[str]:
        """Zones that were started and not killed since."""
        return [zone for zone in self.zones if zone in self._leaders]

    def processes(self, zone: str) -> dict[int, str]:
        """Living processes of a zone (or of "head"), actors included: pid and when it was started."""
        if zone not in self._leaders:
            return {}
        pid, since = self._leaders[zone]
        found = family(pid, since, f"TMPDIR={self._tmp_of(zone)}")
        return {**found, pid: since} if started(pid) == since else found

    def zone_of(self, pid: int) -> str | None:
        """The zone (or "head") in which a process runs, such as that of an actor."""
        return next((zone for zone in self._leaders if pid in self.processes(zone)), None)

    # ------------------------------------------------------------ being part of it

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment, before it imports Ray, to belong to this Ray."""
        return {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "token"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ADDRESS": self.address,
        }

    def use(self) -> None:
        """Make this process, which has not imported Ray, belong to this Ray; `connect_ray()` then finds it."""
        assert "ray" not in sys.modules, "Ray reads its settings at its import: use a ZoneDriver"
        os.environ.pop("RAY_AUTH_TOKEN", None)
        os.environ.update(self.environment)

    def run(self, arguments: list[str], timeout_s: float = 180.0) -> subprocess.CompletedProcess[str]:
        """Run `timetier ARGUMENTS` against this Ray."""
        return subprocess.run(
            [sys.executable, "-m", "timetier.jobs.command_line", *arguments],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env={**_own_environment(), **self.environment},
            cwd=self.folder,
            check=False,
        )

    # ------------------------------------------------------------ machinery

    def _start_head(self) -> None:
        ports = _free_ports(3)
        options = [
            "--head",
            f"--port={ports[0]}",
            f"--ray-client-server-port={ports[1]}",
            "--include-dashboard=false",
            "--num-cpus=1",
        ]
        self._start_ray(HEAD, options, lambda zone, command: command)
        self.address = f"{self.addresses[HEAD]}:{ports[0]}"

    def _start_ray(self, machine: str, options: list[str], wrap: Wrap) -> None:
        for attempt in range(1, _ATTEMPTS + 1):
            log = self._spawn(machine, options, wrap)
            told = self._what_went_wrong(machine, log)
            if not told:
                return
            self.kill(machine)
            assert attempt < _ATTEMPTS, f"the Ray of {machine} does not start: {told}"

    def _what_went_wrong(self, machine: str, log: Path) -> str:
        """Wait until the Ray of a machine is ready: "", or the end of its log when it ended or took too long.

        On a busy machine it now and then gives up by itself, half a minute after it began.
        """
        pid, since = self._leaders[machine]
        deadline = time.monotonic() + _START_S
        while _STARTED not in (text := log.read_text(errors="replace")):
            if started(pid) != since or time.monotonic() > deadline:
                return text[-1_000:] or "(nothing)"
            _WAIT.wait(0.05)
        return ""

    def _spawn(self, machine: str, options: list[str], wrap: Wrap) -> Path:
        temp = self._temp / machine
        shutil.rmtree(temp, ignore_errors=True)  # sockets of a killed raylet
        self._tmp_of(machine).mkdir(parents=True)
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"),
            *options,
            f"--temp-dir={temp / 'r'}",
            f"--node-ip-address={self.addresses[machine]}",
            f"--dashboard-agent-listen-port={_free_ports(1)[0]}",
            "--min-worker-port=0",
            "--max-worker-port=0",
            f"--object-store-memory={100 << 20}",
        ]
        # Each start has a log of its own: its words say when Ray is ready.
        log_path = self.folder / f"ray-{machine}-{len(list(self.folder.glob(f'ray-{machine}-*.log')))}.log"
        environment = {
            **{name: value for name, value in self.environment.items() if name != "RAY_ADDRESS"},
            "TMPDIR": str(self._tmp_of(machine)),
            "RAY_health_check_period_ms": str(int(self._health_check_s * 1_000)),
        }
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                wrap(machine, command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=self.folder,
                env={**_own_environment(), **environment},
            )
        self._leaders[machine] = (process.pid, started(process.pid))
        return log_path

    def _tmp_of(self, machine: str) -> Path:
        return self._temp / machine / "t"


class ZoneDriver:
    """A process that is connected to the Ray of some zones, and calls functions there.

    For tests: their own process is connected to another Ray. A function must be importable, as those of modules are.
    """

    def __init__(self, zones: RayZones) -> None:
        self._pool = ProcessPoolExecutor(
            max_workers=1,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_enter,
            initargs=(zones.environment,),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        processes = list((self._pool._processes or {}).values())
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()  # it may hang in a call
            process.join(_END_S)

    def call(self, work: Callable[..., R], *arguments: Any, timeout_s: float = 120.0, **options: Any) -> R:
        """Result of `work(*arguments, **options)` in that process. Raises what it raises, and TimeoutError."""
        return self._pool.submit(work, *arguments, **options).result(timeout_s)


def _enter(environment: dict[str, str]) -> None:
    os.environ.pop("RAY_AUTH_TOKEN", None)
    os.environ.update(environment)
    from timetier.actors.ray_session import connect_ray

    connect_ray()


def _own_environment() -> dict[str, str]:
    """That of this process, without what would lead to another Ray."""
    return {k: v for k, v in os.environ.items() if k not in {"RAY_ADDRESS", "RAY_AUTH_TOKEN"}}


def _free_ports(count: int) -> list[int]:
    found: list[int] = []
    held: list[socket.socket] = []
    while len(found) < count:
        held.append(socket.create_server(("", 0)))
        port = held[-1].getsockname()[1]
        if port not in _RAY_OWN_PORTS:
            found.append(port)
    for each in held:
        each.close()
    return found


def _watch(temp: Path) -> None:
    """Wait until who started this is gone, then end every process whose TMPDIR lies in `temp`, and remove that."""
    sys.stdin.buffer.read()
    wanted = f"TMPDIR={temp}/".encode()
    deadline = time.monotonic() + _END_S
    while (found := _with_environment(wanted)) and time.monotonic() < deadline:
        send(found, signal.SIGKILL)
        wait_for(found, 1.0)
    shutil.rmtree(temp, ignore_errors=True)


def _with_environment(start: bytes) -> dict[int, str]:
    """Living processes that have a variable whose `NAME=value` begins like this: pid and when each was started."""
    found: dict[int, str] = {}
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has ended meanwhile, or belongs to somebody else
            if any(variable.startswith(start) for variable in path.read_bytes().split(b"\0")):
                found[int(path.parent.name)] = started(int(path.parent.name))
    return {pid: since for pid, since in found.items() if since and pid != os.getpid()}


if __name__ == "__main__":
    _watch(Path(sys.argv[1]))
