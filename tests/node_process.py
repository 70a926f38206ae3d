"""A storage or cache node in a process of its own, without Ray, so that a test can see what memory it takes.

    python tests/node_process.py NAME FOLDER CONFIG_JSON

`FOLDER` is common to all nodes: data of a node in `FOLDER/NAME`, its socket at `FOLDER/NAME.s`. Ends with its stdin.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

from timetier.cluster.budget import budget_mb, queued_mb, sends_mb
from timetier.cluster.carriers.base import Address
from timetier.cluster.carriers.direct import DirectCarrier, DirectServer, host_id
from timetier.cluster.collecting import collect_rarely
from timetier.cluster.config import Config
from timetier.cluster.counters import Counters
from timetier.cluster.identity import open_identity
from timetier.cluster.memory.service import CacheService
from timetier.cluster.messages import Message, Status, StatusRequest
from timetier.cluster.storage.service import StorageService
from timetier.cluster.topology import Topology

SECRET = "5a" * 32


def topology_in(folder: Path, config: Config) -> Topology:
    """A cluster of one storage group and its cache nodes, which listen on sockets in `folder`."""
    shape = config.topology(cluster_id="c", namespace="n", epoch=1, addresses={}, secret=SECRET)
    names = [name for name in shape.node_names() if not name.startswith("cold")]
    addresses = {name: Address(name, host=host_id(), unix_path=str(folder / f"{name}.s")) for name in names}
    return config.topology(cluster_id="c", namespace="n", epoch=1, addresses=addresses, secret=SECRET)


def make_service(
    name: str, folder: Path, config: Config, topology: Topology, carrier: DirectCarrier
) -> StorageService | CacheService:
    group, number = (int(part) for part in name.split("-")[1:])
    if name.startswith("cache"):
        return CacheService(
            name,
            group,
            topology,
            carrier,
            budget_bytes=config.cache.budget_mb << 20,
            page_items=config.cache.page_items,
            block_cache_bytes=config.cache.block_cache_mb << 20,
            max_queued_requests=config.cache.max_queued_requests,
            max_queued_bytes=config.cache.max_queued_mb << 20,
        )
    return StorageService(
        name=name,
        group=group,
        replica=number,
        folder=folder / name,
        identity=open_identity(folder / name, "c", name, may_format=True),
        topology=topology,
        carrier=carrier,
        config=config.storage,
        counters=Counters(),
    )


def peak_mb() -> int:
    """The most memory that this program has used; `getrusage` would count that of the process it was started by."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) >> 10


async def serve(name: str, folder: Path, config: Config) -> None:
    tier = name.partition("-")[0]
    topology = topology_in(folder, config)
    secret = bytes.fromhex(SECRET)
    carrier = DirectCarrier(secret, host_id=host_id(), max_queue_bytes=sends_mb(tier, config) << 20)
    carrier.update(topology.addresses)
    service = make_service(name, folder, config, topology, carrier)

    async def handle(message: Message) -> Message | None:
        if not isinstance(message, StatusRequest):
            return await service.handle(message)
        figures = {"peak_mb": peak_mb(), "budget_mb": budget_mb(tier, config), "uptime_s": time.monotonic()}
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
    await asyncio.to_thread(sys.stdin.read)  # its end is that of the test
    await server.stop()
    await service.stop()
    await carrier.close()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], Path(sys.argv[2]), Config.from_json(sys.argv[3])))
