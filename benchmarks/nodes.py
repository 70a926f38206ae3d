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
from pathlib import Path
from typing import Any

from timetier.cluster.budget import queued_mb, sends_mb
from timetier.cluster.carriers.base import Address
from timetier.cluster.carriers.direct import DirectCarrier, DirectServer, host_id
from timetier.cluster.client.store import AsyncStore
from timetier.cluster.client.view import settings_of
from timetier.cluster.cold.service import ColdService
from timetier.cluster.config import Config
from timetier.cluster.counters import Counters
from timetier.cluster.identity import open_identity
from timetier.cluster.memory.lanes import limits_of
from timetier.cluster.memory.service import CacheService
from timetier.cluster.messages import Message, Status, StatusRequest
from timetier.cluster.storage.service import StorageService
from timetier.cluster.topology import Topology

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


class NodeProcesses:
    """All nodes of a cluster, started and ended together."""

    def __init__(self, folder: Path, config: Config) -> None:
        """`folder`: a short path, since sockets lie in it."""
        self.folder = folder
        self.config = config
        self.pids: dict[str, int] = {}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> NodeProcesses:
        try:
            for name in topology_in(self.folder, self.config).node_names():
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
        command = [sys.executable, "-m", "benchmarks.nodes", name, str(self.folder), self.config.to_json()]
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                cwd=Path(__file__).resolve().parent.parent,
            )
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


async def _serve(name: str, folder: Path, config: Config) -> None:
    tier = name.partition("-")[0]
    topology = topology_in(folder, config)
    secret = bytes.fromhex(SECRET)
    carrier = DirectCarrier(secret, host_id=host_id(), max_queue_bytes=sends_mb(tier, config) << 20)
    carrier.update(topology.addresses)
    service = _make_service(name, folder, config, topology, carrier)

    async def handle(message: Message) -> Message | None:
        if isinstance(message, StatusRequest):
            return Status(json.dumps({**service.status(), "counters": service.counters.read()}).encode())
        answer: Message | None = await service.handle(message)
        return answer

    server = DirectServer(
        handle,
        secret,
        begin=service.begin,
        name=name,
        unix_path=topology.addresses[name].unix_path,
        max_reply_bytes=queued_mb(tier, config) << 20,
    )
    await service.start()
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
