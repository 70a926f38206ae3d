"""The systems of the comparison: how each is started on loopback in a folder of its own, and ended.

Each has three copies of everything and answers a write only when it is on disk. What they do not share is said in
README.md.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from timetier.actors.local_ray import LocalRay, start_local_ray, stop_local_ray
from timetier.actors.processes import family

from .processes import Processes, StartError, free_ports, wait_until

REPLICAS = 3


class System(Protocol):
    """`name`: of its column. `client`: what a worker needs to open a client of it, ready for JSON."""

    name: str
    title: str
    client: dict[str, Any]

    def why_missing(self) -> str | None:
        """Why it can't be measured here and what to do, or None."""

    def start(self, folder: Path) -> None:
        """Start it with its data in `folder`. Raises StartError, and then it has to be stopped all the same."""

    def parts(self, told: Mapping[str, Any]) -> dict[str, list[int]]:
        """Pids by part of the system, without the client. `told`: what the worker said when it had opened."""

    def keepers(self, told: Mapping[str, Any]) -> list[int]:
        """Pids of the processes that hold all the data, for their memory."""

    def stop(self) -> None:
        """End its processes, whatever state it is in."""


class TimeTier:
    """A cluster of the embedded default configuration, in a Ray of its own. The worker starts its actors."""

    name, title = "timetier", "TimeTier"

    def __init__(self) -> None:
        self.client: dict[str, Any] = {}
        self._folder: Path | None = None
        self._ray: LocalRay | None = None

    def why_missing(self) -> str | None:
        return None

    def start(self, folder: Path) -> None:
        self._folder = folder
        self._ray = start_local_ray(folder)
        self.client = {"folder": str(folder)}

    def parts(self, told: Mapping[str, Any]) -> dict[str, list[int]]:
        assert self._ray is not None, "it has been started"
        nodes: dict[str, int] = told["nodes"]
        environment = f"TMPDIR={self._ray.temp_dir}/t"
        everything = {self._ray.pid, *family(self._ray.pid, self._ray.started, environment)}
        by_tier = {
            tier: [pid for name, pid in nodes.items() if name.startswith(tier)] for tier in ("storage", "cache", "cold")
        }
        return {**by_tier, "ray": sorted(everything - set(nodes.values()))}

    def keepers(self, told: Mapping[str, Any]) -> list[int]:
        return [pid for name, pid in told["nodes"].items() if name.startswith("storage")]

    def stop(self) -> None:
        if self._folder is not None:
            stop_local_ray(self._folder)


class _Peer:
    """A system whose servers are processes of its own. `client`: where they listen."""

    def __init__(self) -> None:
        self.client: dict[str, Any] = {}
        self._processes: Processes | None = None

    def parts(self, told: Mapping[str, Any]) -> dict[str, list[int]]:
        return {"servers": self.keepers(told)}

    def keepers(self, told: Mapping[str, Any]) -> list[int]:
        return self._processes.pids if self._processes else []

    def stop(self) -> None:
        if self._processes is not None:
            self._processes.stop()


class Redis(_Peer):
    """A primary and two replicas; every command is in the append-only file, and on disk, before it is answered."""

    name, title = "redis", "Redis"

    def __init__(self, *, unix: bool = False) -> None:
        """`unix`: clients use a Unix socket, as TimeTier's do on the machine of a node."""
        super().__init__()
        self._unix = unix

    def why_missing(self) -> str | None:
        return _why_missing("redis-server", "redis-server", {"redis": "redis", "hiredis": "hiredis"})

    def start(self, folder: Path) -> None:
        import redis

        self._processes = Processes(folder)
        ports = free_ports(REPLICAS)
        for number, port in enumerate(ports):
            home = folder / f"redis-{number}"
            home.mkdir()
            command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--dir", str(home), "--save", ""]
            command += ["--appendonly", "yes", "--appendfsync", "always", "--auto-aof-rewrite-percentage", "0"]
            if number:
                command += ["--replicaof", "127.0.0.1", str(ports[0]), "--repl-diskless-sync-delay", "0"]
            elif self._unix:
                command += ["--unixsocket", str(folder / "redis.sock")]
            self._processes.start(f"redis-{number}", command)
        primary = redis.Redis(port=ports[0])

        def replicated() -> bool:
            told = primary.info("replication")
            return all(told.get(f"slave{number}", {}).get("state") == "online" for number in range(REPLICAS - 1))

        wait_until(replicated, self._processes)
        primary.close()
        self.client = {"unix_socket_path": str(folder / "redis.sock")} if self._unix else {"port": ports[0]}


class Etcd(_Peer):
    """Three members; reads are linearizable, as they are by default. The client speaks to the leader."""

    name, title = "etcd", "etcd"

    def why_missing(self) -> str | None:
        return _why_missing("etcd", "etcd-server", {"etcd3": "python3-etcd3", "grpc": "grpcio"})

    def start(self, folder: Path) -> None:
        self._processes = Processes(folder)
        ports = free_ports(2 * REPLICAS)
        clients, peers = ports[:REPLICAS], ports[REPLICAS:]
        members = ",".join(f"m{number}=http://127.0.0.1:{port}" for number, port in enumerate(peers))
        for number, (client, peer) in enumerate(zip(clients, peers, strict=True)):
            command = ["etcd", "--name", f"m{number}", "--data-dir", str(folder / f"etcd-{number}")]
            command += ["--listen-client-urls", f"http://127.0.0.1:{client}"]
            command += ["--advertise-client-urls", f"http://127.0.0.1:{client}"]
            command += ["--listen-peer-urls", f"http://127.0.0.1:{peer}"]
            command += ["--initial-advertise-peer-urls", f"http://127.0.0.1:{peer}"]
            command += ["--initial-cluster", members, "--initial-cluster-state", "new"]
            command += ["--max-txn-ops", "10000", "--quota-backend-bytes", str(8 << 30)]
            command += ["--logger", "zap", "--log-level", "error"]
            self._processes.start(f"etcd-{number}", command)
        found: list[int] = []

        def has_leader() -> bool:
            found[:] = [port for port in clients if _leads(port)]
            return len(found) == 1

        wait_until(has_leader, self._processes)
        self.client = {"port": found[0]}


def _leads(port: int) -> bool:
    """Whether the member at a port says that it leads. Raises what gRPC raises while it is not up."""
    import grpc
    from etcd3 import etcdrpc

    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        told = etcdrpc.MaintenanceStub(channel).Status(etcdrpc.StatusRequest(), timeout=2.0)
    return bool(told.leader == told.header.member_id)


def _why_missing(program: str, package: str, modules: Mapping[str, str]) -> str | None:
    """`modules`: what is imported, and the name of its package."""
    needed = []
    if shutil.which(program) is None:
        needed.append(f"`apt-get install {package}` ({program} is not on the PATH)")
    absent = [name for module, name in modules.items() if importlib.util.find_spec(module) is None]
    if absent:
        needed.append(f"`pip install {' '.join(absent)}` (or `pip install -e '.[bench]'`)")
    return " and ".join(needed) or None


__all__ = ["Etcd", "Redis", "StartError", "System", "TimeTier"]
