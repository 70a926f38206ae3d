"""The simulated cluster: production services as processes on one loop, with their disks, clocks and network.

A node is started, crashes (at any point, also inside a disk operation), stands still, and starts again over what its
disk has kept. `faults.py` decides when.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from timetier.cluster.client import store as store_module
from timetier.cluster.client.view import ClientSettings
from timetier.cluster.cold import service as cold_module
from timetier.cluster.cold.scrub_round import ScrubSettings
from timetier.cluster.config import StorageConfig
from timetier.cluster.counters import Counters
from timetier.cluster.errors import TimeTierError
from timetier.cluster.keys import bucket_of
from timetier.cluster.memory import service as cache_module
from timetier.cluster.memory.steps import ReaderSettings
from timetier.cluster.paxos.replica import VOTING, Replica
from timetier.cluster.routing import Routing
from timetier.cluster.storage import service as storage_module
from timetier.cluster.topology import TablePolicy, Topology

from .cold_files import ColdFolder, SimFiles
from .disk import SimDisk, SimEngine, open_sim_identity
from .loop import WORLD, Crashed, Life, SimLoop, io_times
from .network import SimNetwork, Weather
from .plan import BASE_US, BUCKETS, TABLE, Plan, stream
from .trace import Trace, show_timeline
from .version_memory import SimVersionMemory
from .watch import Watch, chosen_of, noted_life

CLUSTER = "simulated"
RESTART_S = 0.5  # after a start that failed
SCRUB_EVERY_S = 3.0
LOSS_S = 0.5  # after a loss of data: so long nobody is asked whether writes from before it have two copies


class Node:
    """One node of the cluster, over all its lives."""

    def __init__(self, world: World, name: str) -> None:
        self.name = name
        self.tier, self.group, self.number = name.split("-")[0], int(name.split("-")[1]), int(name.split("-")[2])
        self.disk = SimDisk(name, stream(world.plan.seed, f"disk of {name}"))
        self.disk.on_crash = lambda what: world.crash(name, what)
        self.cold = ColdFolder(self.disk)
        self.versions = SimVersionMemory(stream(world.plan.seed, f"memory of {name}"))
        self.random = stream(world.plan.seed, f"node {name}")
        self.life: Life | None = None
        self.service: Any = None
        self.lives = 0
        self.restart_s: float | None = None  # after a planned crash: how long until the next life
        self.slow = 1.0


class World:
    """One run's cluster. `report(guarantee, how)` takes violations."""

    def __init__(self, plan: Plan, report: Callable[[str, str], None], *, verbose: bool = False) -> None:
        self.plan = plan
        self.report = report
        self.loop = SimLoop(self._on_error)  # type: ignore[abstract]  # the rest is for sockets
        self.trace = Trace(self.loop.time, verbose=verbose)
        self.network = SimNetwork(self.loop, stream(plan.seed, "network"), self.trace)
        shape = plan.shape
        self.weather = Weather(dropped=shape.dropped, doubled=shape.doubled, straggling=shape.straggling, late_s=0.2)
        self.watch = Watch(self, report)
        self.topology = _topology(plan)
        self.routing = Routing(self.topology)
        self.formatted: set[str] = set()  # what the Router knows
        self.skew_us: dict[str, int] = {}
        self.lost_disks: set[str] = set()  # cold nodes that had a disk fail: garbage may stay on it
        self.cold_copies_needed = self.topology.cold_replicas
        self.counters: Counter[str] = Counter()  # of lives that have ended
        self.losing = ""  # the storage node that lost its data and does not vote again yet
        self.lost_at = -math.inf
        self.nodes = {name: Node(self, name) for name in self.topology.node_names()}
        for node in self.nodes.values():
            node.cold.on_remove = partial(self.watch.cold_file_removed, node.name)
            node.cold.on_name = partial(self.watch.sinks.file_named, node.name)
        self._graves: list[Life] = []
        clocks = stream(plan.seed, "clocks")
        for name in self.nodes:
            self.skew_us[name] = int(clocks.choice([0.0, 0.0, 0.05, 2.0]) * clocks.uniform(-1e6, 1e6))

    # ------------------------------------------------------------ lives

    def start_all(self) -> None:
        """Start every node."""
        for name in self.nodes:
            self.start(name)

    def start(self, name: str) -> None:
        """Begin a node's next life, unless it is alive."""
        node = self.nodes[name]
        if node.life is not None:
            return
        node.lives += 1
        node.service = None
        low_s, high_s = self.plan.shape.disk_low_s, self.plan.shape.disk_high_s
        draw = io_times(node.random, low_s, high_s)
        node.life = node.disk.life = Life(name, lambda: draw() * node.slow)
        self.trace.note(name, f"starts life {node.lives}")
        self.loop.spawn(node.life, self._bring_up(node, node.life))

    def crash(self, name: str, what: str = "") -> None:
        """End a node's life where it stands; what its disk had not synced is lost."""
        node = self.nodes[name]
        if node.life is None:
            return
        self.trace.note(name, f"crashes ({what})" if what else "crashes")
        self._count(node)
        self.end_life(node.life)
        node.life, node.service = None, None
        node.disk.crash_after = None
        node.disk.power_off()
        node.versions.crash()
        if node.restart_s is not None:
            self.later(node.restart_s, lambda: self.start(name))
            node.restart_s = None

    def end_life(self, life: Life) -> None:
        """Have nothing of this life happen any more."""
        life.dead = True
        life.held.clear()
        self._graves.append(life)

    def _count(self, node: Node) -> None:
        """Take over what a life has counted."""
        if node.service is not None:
            self.counters.update({f"{node.tier} {name}": n for name, n in node.service.counters.totals.items()})

    async def _bring_up(self, node: Node, life: Life) -> None:
        try:
            make = {"storage": self._start_storage, "cache": self._start_cache, "cold": self._start_cold}[node.tier]
            await make(node, life)
        except (TimeTierError, OSError) as error:
            self.trace.note(node.name, f"can't start: {error}")
            self._restart_later(node, life)

    def _restart_later(self, node: Node, life: Life) -> None:
        def again() -> None:
            if node.life is life:
                self.crash(node.name, "it could not start")
                self.start(node.name)

        self.later(RESTART_S, again)

    async def _start_storage(self, node: Node, life: Life) -> None:
        may_format = node.name not in self.formatted
        identity = open_sim_identity(node.disk, life, CLUSTER, may_format=may_format, may_learn=True)
        carrier = self.network.carrier(life)
        carrier.on_peer_batch = lambda peer, batch: self.watch.peer_batch(node.disk, peer, batch)

        def open_engine(path: Path, create: bool) -> SimEngine:
            return SimEngine(node.disk, life, path, create=create)

        service = _watched(storage_module.StorageService, self.watch)(
            name=node.name,
            group=node.group,
            replica=node.number,
            folder=identity.folder,
            identity=identity,
            topology=self.topology,
            carrier=carrier,
            config=_storage_config(self.plan),
            counters=Counters(),
            seed=node.random.getrandbits(32),
            clock=self.loop.time,
            wall_us=lambda: self.wall_us(node.name),
            open_engine=open_engine,
            free_bytes=node.disk.free_bytes,
            remove_engine=node.disk.remove_engine,
            versions=node.versions.of(node.disk, life),
            flush_in_place_s=node.random.choice((0.0, 1.0)),  # all by the thread, or all in place
        )
        shape = self.plan.shape
        service._settings = replace(
            service._settings,
            transfer_bytes=shape.transfer_bytes,
            chore_rows=shape.chore_rows,
            mark_delay_s=0.1,
            flight_entries=shape.flight_entries,
            expire_rest_s=0.5,
        )
        await service.start()
        await asyncio.sleep(node.random.uniform(0.0, 0.01))  # the Router takes its time
        self.formatted.add(node.name)
        identity.mark_formatted()
        service.allow_votes()
        self._serves(node, life, service)

    async def _start_cache(self, node: Node, life: Life) -> None:
        shape = self.plan.shape
        service = cache_module.CacheService(
            node.name,
            node.group,
            self.topology,
            self.network.carrier(life),
            budget_bytes=shape.cache_bytes,
            block_cache_bytes=min(shape.cache_bytes, 5_000),
            counters=Counters(),
            seed=node.random.getrandbits(32),
            settings=ReaderSettings(page_items=shape.page_items, max_page_items=4 * shape.page_items),
            clock=self.loop.time,
        )
        inner = service._cache.put

        def put(timeline: bytes, page: Any) -> None:
            inner(timeline, page)
            self.watch.page(node.name, timeline, page)

        service._cache.put = put  # type: ignore[method-assign]
        await service.start()
        self._serves(node, life, service)

    async def _start_cold(self, node: Node, life: Life) -> None:
        service = cold_module.ColdService(
            node.name,
            node.group,
            node.number,
            Path("/") / node.name,
            self.topology,
            self.network.carrier(life),
            disks=self.topology.cold_disks,
            read_threads=2,
            counters=Counters(),
            scrub=ScrubSettings(mb_per_s=1.0, every_s=SCRUB_EVERY_S, grace_s=SCRUB_EVERY_S),
            files=SimFiles(node.cold, life, lambda: self.wall_us(node.name) * 1_000),
            clock=self.loop.time,
            wall_s=lambda: self.wall_us(node.name) / 1e6,
        )
        await service.start()
        if service._store is None:  # else it runs, also with all disks out: an operator can reach it
            raise OSError(service.status()["reason"])
        self._serves(node, life, service)

    def _serves(self, node: Node, life: Life, service: Any) -> None:
        node.service = service
        self.network.register(life, service.handle)
        self.trace.note(node.name, "serves")

    # ------------------------------------------------------------ clients

    def new_life(self, name: str, random: Random) -> Life:
        """A life of a process that is no node: a client, a run of the sink."""
        return Life(name, io_times(random, 0.0001, 0.001))

    def connect(self, life: Life, random: Random) -> Any:
        """A client's store. Call it inside the life."""
        shape = self.plan.shape
        settings = ClientSettings(
            timeout_s=shape.timeout_s, attempt_timeout_s=shape.attempt_timeout_s, suspect_s=0.3, suspect_max_s=2.0
        )
        carrier = self.network.carrier(life)
        return store_module.AsyncStore(carrier, self.topology, _FixedSource(), settings=settings, random=random)

    # ------------------------------------------------------------ time

    def wall_us(self, name: str) -> int:
        """What a node's clock says: microseconds since 1970."""
        return BASE_US + int(self.loop.now * 1e6) + self.skew_us.get(name, 0)

    def later(self, delay_s: float, work: Callable[[], None]) -> None:
        """Have something happen to the world."""
        self.loop.call_later(delay_s, work, context=WORLD)

    def after_step(self, check: Callable[[], None]) -> None:
        """Have a check made as soon as the present step of some process is over."""
        self.loop.call_soon(check, context=WORLD)

    # ------------------------------------------------------------ for the checks

    def replica(self, name: str) -> tuple[Replica, SimEngine] | None:
        """A storage node's replica and engine, if it is alive."""
        node = self.nodes[name]
        service = node.service
        if node.life is None or service is None or service._life.replica is None:
            return None
        return service._life.replica, service._life.engine

    def voters(self, timeline: bytes) -> list[str]:
        """Names of the replicas that a timeline has."""
        return self.routing.storage_nodes(self.routing.storage_group_of(bucket_of(timeline)))

    def cold_folders(self, bucket: int) -> list[ColdFolder]:
        """Folders of the cold nodes that have a bucket's blocks."""
        group = self.routing.cold_group_of(bucket)
        return [self.nodes[self.topology.cold_node(group, r)].cold for r in range(self.topology.cold_replicas)]

    def may_lose(self) -> bool:
        """Whether a storage node may lose its data: the replicas of a group bear one such loss at a time."""
        for other, node in self.nodes.items():
            if node.tier == "storage":
                found = self.replica(other)
                damaged = node.disk.engine.damaged or node.disk.engine.damaged_rows  # perhaps not yet noticed
                if found is None or found[0].state != VOTING or damaged:
                    return False
        return self.loop.now > self.lost_at + LOSS_S

    def life_is_noted(self, name: str) -> bool:
        """Whether both peers of a storage node have its present life on their disks."""
        found = self.replica(name)
        if found is None:
            return False
        life = found[0].core.life
        peers = [self.nodes[peer] for peer in self.routing.storage_nodes(self.nodes[name].group) if peer != name]
        return all(noted_life(peer.disk.engine.synced, life[0]) == life for peer in peers)

    def lost(self, name: str) -> None:
        """A storage node has lost its data."""
        self.lost_at = self.loop.now
        self.losing = name

    def lately_lost(self) -> bool:
        """Whether a disk has lost data that an acknowledged write may have been counted on."""
        return self.loop.now < self.lost_at + LOSS_S or self._votes_not(self.losing)

    def _votes_not(self, name: str) -> bool:
        found = self.replica(name) if name else None
        return bool(name) and (found is None or found[0].state != VOTING)

    def unready(self) -> str:
        """What does not serve although it should, "" when all is well."""
        for name, node in self.nodes.items():
            if node.life is None or node.service is None:
                return f"{name} does not run"
            if node.tier == "storage":
                found = self.replica(name)
                if found is None or found[0].state != VOTING:
                    return f"{name} does not vote: {node.service.status()['reason']}"
            if node.tier == "cold" and any(disk["state"] != "serving" for disk in node.service.keeper.tell()):
                return f"{name}: {node.service.status()['reason']}"
        return ""

    def unsettled(self) -> str:
        """What is not at rest and equal everywhere, "" when all is well.

        Only after a write to each timeline: when all replicas have crashed, none may remember that a last entry is
        chosen, and it is found out by whoever reads or writes next.
        """
        unready = self.unready()
        if unready:
            return unready
        chosen = {key: max(history.entries, default=0) for key, history in self.watch.truth.timelines.items()}
        for name, node in self.nodes.items():
            if node.tier == "storage":
                found = self.replica(name)
                assert found is not None, "it is ready"
                replica, engine = found
                for timeline, version in chosen.items():
                    if name in self.voters(timeline):
                        has = chosen_of(replica, engine, timeline)
                        if has != version:
                            return f"{name} has version {has} of {show_timeline(timeline)}, not {version}"
                if replica.chores.pending:
                    return f"{name} has {replica.chores.pending} chores"
            elif node.tier == "cold" and len(node.service.repairs):
                return f"{name} has {len(node.service.repairs)} repairs"
        return ""

    def _on_error(self, life: Life | None, error: BaseException) -> None:
        if life is None and not isinstance(error, Crashed):
            raise error
        name = life.name if life is not None else "the world"
        self.report("no unforeseen errors", f"{name}: {type(error).__name__}: {error}")

    def close(self) -> None:
        """End the run."""
        for node in self.nodes.values():
            self._count(node)
        self.loop.close()


class _FixedSource:
    """A Router that has nothing new to tell."""

    async def fetch(self, known_epoch: int, timeout_s: float) -> Topology | None:
        await asyncio.sleep(timeout_s)
        return None


def _watched(kind: Any, watch: Watch) -> Any:
    """The storage service's class, with a check that looks on each of its lives."""

    class Watched(kind):  # type: ignore[misc]
        def _make_replica(self, engine: Any) -> Replica:
            replica: Replica = super()._make_replica(engine)
            watch.replica(self.name, replica, engine)
            return replica

    return Watched


def _topology(plan: Plan) -> Topology:
    shape = plan.shape
    policy = TablePolicy(1_000_000, shape.cold_after_us, shape.window_us, shape.retention_us)
    return Topology(
        cluster_id=CLUSTER,
        namespace="simulation",
        epoch=1,
        buckets=BUCKETS,
        storage_groups=shape.groups,
        storage_replicas=3,
        cold_groups=1,
        cold_replicas=3,
        cold_disks=2,
        cache_nodes=shape.caches,
        tables={TABLE: policy},
        default_table=None,
        addresses={},
        secret="00" * 32,
    )


def _storage_config(plan: Plan) -> StorageConfig:
    """Smaller than what a configuration file may say."""
    shape = plan.shape
    return StorageConfig.model_construct(
        timelines_in_memory=shape.timelines_in_memory,
        log_keep_entries=shape.log_keep_entries,
        request_id_entries=shape.request_id_entries,
        prepare_backoff_ms=3,
        accept_timeout_ms=50,
        catch_up_interval_s=1.0,
        disk_reserve_mb=1,
    )
