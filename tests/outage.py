"""How long a replica needs to be current after an outage, and what the others' callers notice of it.

    python -m tests.outage --writes 100000

Three storage nodes run in processes of their own, joined by sockets. One is killed (SIGKILL); while it is away,
`--writes` items are written over `--timelines` timelines, and `--long` more entries to a single one, which goes beyond
the tail of its log. Then it is started again. A light load of single writes and reads goes on all the time. The last
line is one JSON object: seconds until the replica had everything that the others had when it was started, until
`verify` found all replicas equal, and latencies (ms) of the light load in each phase. Exit status 1 unless all are
equal in the end.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from timetier.cluster.carriers.base import Address
from timetier.cluster.carriers.direct import DirectCarrier, DirectServer, host_id
from timetier.cluster.client.store import AsyncStore, AsyncTable
from timetier.cluster.config import StorageConfig
from timetier.cluster.counters import Counters
from timetier.cluster.drive import drive
from timetier.cluster.errors import TimeTierError
from timetier.cluster.identity import has_identity, open_identity
from timetier.cluster.keys import timeline_key
from timetier.cluster.messages import AskVersions, Message, Status, StatusRequest, Versions, unpack_i64
from timetier.cluster.routing import Routing
from timetier.cluster.storage.service import StorageService
from timetier.cluster.topology import TablePolicy, Topology
from timetier.cluster.verifying import VerifySettings, verify

SECRET = bytes(range(32))
BUCKETS = 1024
TABLE = "t"
DAY_US = 86_400_000_000
LONG = "long"
VALUE_BYTES = 200
BATCH = 250
ATTEMPTS = 5
QUESTION = 2_000


# ---------------------------------------------------------------- the nodes


def make_topology(folder: Path) -> Topology:
    """One group of three replicas, on Unix sockets in `folder`."""
    names = [f"storage-0-{replica}" for replica in range(3)]
    return Topology(
        cluster_id="outage",
        namespace="outage",
        epoch=1,
        buckets=BUCKETS,
        storage_groups=1,
        storage_replicas=3,
        cold_groups=1,
        cold_replicas=3,
        cold_disks=1,
        cache_nodes=0,
        tables={TABLE: TablePolicy(per_second=1_000_000, cold_after=30 * DAY_US, window=365 * DAY_US)},
        default_table=None,
        addresses={name: Address(name, host=host_id(), unix_path=str(folder / f"{name}.sock")) for name in names},
        secret=SECRET.hex(),
    )


async def run_node(folder: Path, replica: int, *, wiped: bool) -> None:
    """One storage node, until SIGTERM. `wiped`: an empty folder has lost its data, as the Router would know."""
    topology = make_topology(folder)
    name = f"storage-0-{replica}"
    carrier = DirectCarrier(SECRET, host_id=host_id())
    carrier.update(topology.addresses)
    home = folder / name
    may_format = not (wiped or has_identity(home))
    identity = open_identity(home, topology.cluster_id, name, may_format=may_format, may_learn=wiped)
    counters = Counters()
    service = StorageService(
        name=name,
        group=0,
        replica=replica,
        folder=home,
        identity=identity,
        topology=topology,
        carrier=carrier,
        config=StorageConfig(),
        counters=counters,
        seed=replica,
    )

    async def handle(message: Message) -> Message | None:
        if isinstance(message, StatusRequest):
            return Status(json.dumps({**service.status(), "figures": counters.read()}).encode())
        return await service.handle(message)

    server = DirectServer(handle, SECRET, name=name, unix_path=topology.addresses[name].unix_path)
    await server.start()
    await service.start()
    identity.mark_formatted()
    service.allow_votes()
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    await ended.wait()
    await server.stop()
    await service.stop()
    await carrier.close()


class Nodes:
    """The processes of the three nodes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, replica: int, *, wiped: bool = False) -> None:
        command = [sys.executable, __file__, "--node", str(replica), "--folder", str(self.folder)]
        command += ["--wipe"] * wiped
        self.processes[replica] = subprocess.Popen(command)

    def kill(self, replica: int) -> None:
        """As a power failure would end it."""
        process = self.processes.pop(replica)
        process.kill()
        process.wait(timeout=30)

    def wipe(self, replica: int) -> None:
        """As if its disk had been replaced."""
        shutil.rmtree(self.folder / f"storage-0-{replica}")

    def stop(self) -> None:
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(timeout=30)
        self.processes.clear()


@contextlib.contextmanager
def running_nodes(folder: Path) -> Iterator[Nodes]:
    nodes = Nodes(folder)
    try:
        for replica in range(3):
            nodes.start(replica)
        yield nodes
    finally:
        nodes.stop()


# ---------------------------------------------------------------- the load


@dataclass
class Latencies:
    """What callers saw in one phase: seconds of each call, by kind, and when calls ended."""

    began_s: float
    ended_s: float = 0.0
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"write": [], "read": []})
    failed: int = 0

    def figures(self) -> dict[str, Any]:
        """Rates and percentiles: calls a second, and ms."""
        found: dict[str, Any] = {"seconds": round(self.ended_s - self.began_s, 2), "failed": self.failed}
        for kind, seconds in self.seconds.items():
            ordered = sorted(seconds)
            if ordered:
                found[kind] = {
                    "per_s": round(len(ordered) / (self.ended_s - self.began_s)),
                    "p50_ms": round(1e3 * ordered[len(ordered) // 2], 2),
                    "p99_ms": round(1e3 * ordered[int(len(ordered) * 0.99)], 2),
                    "longest_ms": round(1e3 * ordered[-1], 1),
                }
        return found


class Load:
    """Single writes and reads, a few at a time, with small pauses; counted for the present phase."""

    def __init__(self, store: AsyncStore, owners: list[str]) -> None:
        self.table = store.table(TABLE)
        self.owners = owners
        self.phases: dict[str, Latencies] = {}
        self._present = Latencies(time.monotonic())
        self._tasks: list[asyncio.Task[None]] = []

    def begin(self, phase: str) -> None:
        """Count for another phase from now on."""
        self._present.ended_s = time.monotonic()
        self._present = self.phases[phase] = Latencies(time.monotonic())

    def start(self, each: int = 4) -> None:
        for number in range(each):
            self._tasks.append(asyncio.create_task(self._work("write", number)))
            self._tasks.append(asyncio.create_task(self._work("read", number)))

    async def stop(self) -> None:
        self._present.ended_s = time.monotonic()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _work(self, kind: str, number: int) -> None:
        at = number
        while True:
            owner = self.owners[at * 7919 % len(self.owners)]
            phase, began_s = self._present, time.monotonic()
            try:
                if kind == "write":
                    await self.table.put(owner, 10**12 + at, b"x" * VALUE_BYTES)
                else:
                    await self.table.timeline(owner, limit=10)
            except Exception:
                phase.failed += 1  # counted and told in the report
            phase.seconds[kind].append(time.monotonic() - began_s)
            at += len(self._tasks)
            await asyncio.sleep(0.004)


class NoSource:
    """A topology that never changes."""

    async def fetch(self, known_epoch: int, timeout_s: float) -> Topology | None:
        await asyncio.sleep(timeout_s)
        return None


@contextlib.asynccontextmanager
async def open_store(topology: Topology) -> AsyncIterator[AsyncStore]:
    async with AsyncStore(DirectCarrier(SECRET, host_id=host_id()), topology, NoSource()) as store:
        yield store


async def fill(store: AsyncStore, owners: list[str], writes: int, first: int) -> float:
    """Write `writes` items over the owners, `BATCH` a call, two calls at a time. Seconds that it took."""
    table = store.table(TABLE)
    value = b"v" * VALUE_BYTES
    began_s = time.monotonic()
    items = [(owners[n % len(owners)], first + n, value) for n in range(writes)]
    batches = iter([items[start : start + BATCH] for start in range(0, writes, BATCH)])

    async def work() -> None:
        for batch in batches:
            await _put(table, batch)

    await asyncio.gather(work(), work())
    return time.monotonic() - began_s


async def _put(table: AsyncTable, batch: list[tuple[str, int, bytes]]) -> None:
    """Write a batch; again when its outcome is unknown, which changes no item. Raises when that does not help."""
    for attempt in range(ATTEMPTS):
        try:
            await table.put_many(batch)
            return
        except TimeTierError:
            if attempt == ATTEMPTS - 1:
                raise


async def make_long(store: AsyncStore, entries: int) -> None:
    """One timeline whose log no longer reaches back: `entries` writes, one after the other."""
    table = store.table(TABLE)
    for at in range(entries):
        await table.put(LONG, at, b"l" * VALUE_BYTES)


# ---------------------------------------------------------------- the measurement


async def status_of(store: AsyncStore, replica: int) -> dict[str, Any]:
    try:
        answer = await store.carrier.call(f"storage-0-{replica}", StatusRequest(), 2.0)
    except Exception as error:  # it does not run yet
        return {"state": "away", "reason": str(error)}
    assert isinstance(answer, Status)
    found: dict[str, Any] = json.loads(answer.body)
    return found


async def until_voting(store: AsyncStore, nodes: Nodes, replica: int, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while (status := await status_of(store, replica))["state"] != "voting":
        assert nodes.processes[replica].poll() is None, f"node {replica} has ended"
        assert time.monotonic() < deadline, status
        await asyncio.sleep(0.02)


async def versions_of(store: AsyncStore, replica: int, timelines: list[bytes]) -> list[int]:
    """How far one replica has applied each timeline."""
    found: list[int] = []
    for start in range(0, len(timelines), QUESTION):
        question = AskVersions(timelines[start : start + QUESTION])
        answer = await store.carrier.call(f"storage-0-{replica}", question, 10.0)
        assert isinstance(answer, Versions), answer
        found += unpack_i64(answer.chosen)
    return found


async def until_current(store: AsyncStore, replica: int, targets: dict[bytes, int], timeout_s: float) -> None:
    """Until the replica has applied everything that the others had."""
    deadline = time.monotonic() + timeout_s
    left = dict(targets)
    while left:
        assert time.monotonic() < deadline, (
            f"{len(left)} timelines are still behind, such as {next(iter(left.items()))}"
        )
        names = list(left)[:QUESTION]
        versions = await versions_of(store, replica, names)
        reached = [name for name, version in zip(names, versions, strict=True) if version >= left[name]]
        for name in reached:
            del left[name]
        if len(reached) < len(names):
            await asyncio.sleep(0.05)


async def measure(
    folder: Path,
    *,
    writes: int,
    timelines: int,
    long: int,
    steady_s: float = 4.0,
    wipe: bool = False,
    timeout_s: float = 300.0,
) -> dict[str, Any]:
    """One outage, as the module says. `steady_s`: length of the phases in which nothing else happens."""
    owners = [f"owner-{number}" for number in range(timelines)]
    away = 2
    with running_nodes(folder) as nodes:
        topology = make_topology(folder)
        async with open_store(topology) as store:
            for replica in range(3):
                await until_voting(store, nodes, replica)
            await fill(store, owners, 3 * timelines, first=0)
            load = Load(store, owners)
            load.start()
            load.begin("healthy")
            await asyncio.sleep(steady_s)

            nodes.kill(away)
            load.begin("after_the_kill")
            await asyncio.sleep(min(steady_s, 1.0))
            load.begin("one_down")
            await asyncio.sleep(steady_s)
            load.begin("filling")
            await make_long(store, long)
            fill_s = await fill(store, owners, writes, first=10**9)

            keys = [timeline_key(TABLE.encode(), owner.encode(), BUCKETS) for owner in [*owners, LONG]]
            present = [await versions_of(store, replica, keys) for replica in range(2)]
            targets = {key: max(both) for key, both in zip(keys, zip(*present, strict=True), strict=True)}
            load.begin("catching_up")
            if wipe:
                nodes.wipe(away)
            began_s = time.monotonic()
            nodes.start(away, wiped=wipe)
            await until_voting(store, nodes, away, timeout_s)
            voting_s = time.monotonic() - began_s
            await until_current(store, away, targets, timeout_s)
            current_s = time.monotonic() - began_s
            load.begin("verifying")
            report = await drive(verify(Routing(topology), settings=VerifySettings()), store.carrier)
            load.begin("afterwards")
            await asyncio.sleep(steady_s)
            await load.stop()
            status = await status_of(store, away)
    return {
        "writes_while_away": writes + long,
        "timelines": timelines,
        "fill_s": round(fill_s, 2),
        "wiped": wipe,
        "incarnation": status["incarnation"],
        "voting_after_s": round(voting_s, 2),
        "current_after_s": round(current_s, 2),
        "verified_equal": report.ok,
        "verified_timelines": report.timelines,
        "verify_s": round(report.seconds, 2),
        "load": {phase: found.figures() for phase, found in load.phases.items()},
        "figures": {
            name: status["figures"].get(name, 0)
            for name in ("fetches", "entries_fetched", "states_installed", "catch_up_bytes", "transfers_postponed")
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--writes", type=int, default=100_000)
    parser.add_argument("--timelines", type=int, default=5_000)
    parser.add_argument("--long", type=int, default=2_000, help="entries of one further timeline")
    parser.add_argument("--wipe", action="store_true", help="empty its folder meanwhile")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--node", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.node is not None:
        asyncio.run(run_node(arguments.folder, arguments.node, wiped=arguments.wipe))
        return 0
    with tempfile.TemporaryDirectory(prefix="tt-outage-") as folder:
        counts = {"writes": arguments.writes, "timelines": arguments.timelines, "long": arguments.long}
        found = asyncio.run(measure(Path(folder), **counts, wipe=arguments.wipe))
    print(msgspec.json.encode(found).decode())
    return 0 if found["verified_equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
