"""A cluster of one group of each tier, every node a process of its own, without Ray: less moves, so less varies.

    python -m benchmarks.nodes NAME FOLDER CONFIG_JSON     # one node; `NodeProcesses` starts them

`FOLDER` is common to all nodes: data of a node in `FOLDER/NAME`, its socket at `FOLDER/NAME.s`. A node ends with its
standard input, so none outlives who started it.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from timetier.cluster.budget import budget_mb, queued_mb, sends_mb
from timetier.cluster.carriers.base import Address
from timetier.cluster.carriers.direct import DirectCarrier, DirectServer, host_id
from timetier.cluster.client.store import AsyncStore
from timetier.cluster.client.view import settings_of
from timetier.cluster.cold.service import ColdService
from timetier.cluster.collecting import collect_rarely
from timetier.cluster.config import Config
from timetier.cluster.counters import Counters
from timetier.cluster.identity import open_identity
from timetier.cluster.memory.lanes import limits_of
from timetier.cluster.memory.service import CacheService
from timetier.cluster.messages import Message, Status, StatusRequest
from timetier.cluster.storage.service import StorageService
from timetier.cluster.topology import Topology

from .processes import start_module

SECRET = "5a" * 32
_START_S = 60.0
_END_S = 20.0


def topology_in(folder: Path, config: Config) -> Topology:
    """The cluster's shape; nodes listen on sockets in `folder`."""
    shape = config.topology(cluster_id="c", namespace="n", epoch=1, addresses={}, secret=SECRET)
    host = host_id()
    addresses = {name: Address(name, host=host, unix_path=str(folder / f"{name}.s")) for name in shape.node_names()}
    return config.topology(cluster_id="c", namespace="n", epoch=1, addresses=addresses, secret=SECRET)


class NoNews:
    """A source of topologies for a cluster that never changes."""

    async def fetch(self, known_epoch: int, timeout_s: float) -> Topology | None:
        await asyncio.sleep(timeout_s)
        return None


def open_store(folder: Path, config: Config) -> AsyncStore:
    """A client of the cluster in `folder`. Needs a running event loop."""
    carrier = DirectCarrier(bytes.fromhex(SECRET), host_id=host_id())
    return AsyncStore(carrier, topology_in(folder, config), NoNews(), settings=settings_of(config.client))


def start_node(name: str, folder: Path, config: Config) -> subprocess.Popen[bytes]:
    """Start one node. It writes the line `ready` when it serves."""
    return start_module("benchmarks.nodes", [name, str(folder), config.to_json()], folder / f"{name}.log")


class NodeProcesses:
    """The nodes of a cluster, started and ended together."""

    def __init__(self, folder: Path, config: Config, *, tiers: Collection[str] = ("storage", "cache", "cold")) -> None:
        """`folder`: a short path, since sockets lie in it. `tiers`: whose nodes are wanted."""
        self.folder = folder
        self.config = config
        self.tiers = tiers
        self.pids: dict[str, int] = {}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> NodeProcesses:
        try:
            for name in topology_in(self.folder, self.config).node_names():
                if name.partition("-")[0] in self.tiers:
                    self._start(name)
            for name, process in self._processes.items():
                assert process.stdout is not None
                if process.stdout.readline().strip() != b"ready":
                    raise RuntimeError(f"{name} did not start: see {self.folder / name}.log")
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self, name: str) -> None:
        process = start_node(name, self.folder, self.config)
        self._processes[name], self.pids[name] = process, process.pid

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            assert process.stdin is not None
            process.stdin.close()
        for process in self._processes.values():
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()


# ---------------------------------------------------------------- one node


def _make_service(name: str, folder: Path, config: Config, topology: Topology, carrier: DirectCarrier) -> Any:
    tier, group, number = name.split("-")
    if tier == "cache":
        return CacheService(
            name,
            int(group),
            topology,
            carrier,
            budget_bytes=config.cache.budget_mb << 20,
            page_items=config.cache.page_items,
            block_cache_bytes=config.cache.block_cache_mb << 20,
            max_queued_requests=config.cache.max_queued_requests,
            max_queued_bytes=config.cache.max_queued_mb << 20,
            limits=limits_of(config.cache),
        )
    if tier == "cold":
        return ColdService(
            name,
            int(group),
            int(number),
            folder / name,
            topology,
            carrier,
            disks=config.cold.disks,
            disk_dirs=config.cold.disk_dirs,
            disk_timeout_s=config.cold.disk_timeout_s,
            rebuild_mb_per_s=config.cold.rebuild_mb_per_s,
            read_threads=config.cold.read_threads,
            block_cache_bytes=config.cold.block_cache_mb << 20,
            counters=Counters(),
        )
    return StorageService(
        name=name,
        group=int(group),
        replica=int(number),
        folder=folder / name,
        identity=open_identity(folder / name, "c", name, may_format=True),
        topology=topology,
        carrier=carrier,
        config=config.storage,
        counters=Counters(),
    )


def _peak_mb() -> int:
    """The most memory that this program has used; `getrusage` would count that of the process it was started by."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) >> 10


async def _serve(name: str, folder: Path, config: Config) -> None:
    tier = name.partition("-")[0]
    topology = topology_in(folder, config)
    secret = bytes.fromhex(SECRET)
    carrier = DirectCarrier(secret, host_id=host_id(), max_queue_bytes=sends_mb(tier, config) << 20)
    carrier.update(topology.addresses)
    service = _make_service(name, folder, config, topology, carrier)

    async def handle(message: Message) -> Message | None:
        if not isinstance(message, StatusRequest):
            answer: Message | None = await service.handle(message)
            return answer
        figures = {"peak_mb": _peak_mb(), "budget_mb": budget_mb(tier, config), "uptime_s": time.monotonic()}
        return Status(json.dumps({**service.status(), "counters": service.counters.read(), **figures}).encode())

    server = DirectServer(
        handle,
        secret,
        begin=service.begin,
        name=name,
        unix_path=topology.addresses[name].unix_path,
        max_reply_bytes=queued_mb(tier, config) << 20,
    )
    await service.start()
    collect_rarely()
    if isinstance(service, StorageService):
        service._identity.mark_formatted()
        service.allow_votes()
    await server.start()
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop()
    await service.stop()
    await carrier.close()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], Path(sys.argv[2]), Config.from_json(sys.argv[3])))
