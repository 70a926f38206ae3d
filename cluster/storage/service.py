"""The storage node: its front doors, its chores and its status.

One event loop, one replica, one flusher thread. `life_cycle.py` begins and ends the lives of the replica, `steps.py`
lets it take what arrives and carries out what it says, `comparisons.py` fetches what it missed.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import random
import shutil
import time
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

from ..budget import IDS_PER_TIMELINE
from ..carriers.base import Carrier, Reply, at_fast_door, settle
from ..config import StorageConfig
from ..counters import Counters
from ..errors import TimeTierError, Unavailable
from ..identity import Identity
from ..keys import digest_seed
from ..memory.service import CacheService
from ..messages import (
    AskAccepted,
    AskAges,
    AskChanged,
    AskChosen,
    AskDigests,
    AskLives,
    AskOverlay,
    AskReads,
    AskRestore,
    AskRestored,
    AskSame,
    AskTables,
    AskTimeline,
    AskVersions,
    BeginRestore,
    Check,
    Dump,
    Lives,
    Mend,
    Message,
    PeerBatch,
    Ping,
    Pong,
    ReadItems,
    ReadPages,
    Restore,
    Scan,
    Settle,
    Write,
)
from ..paxos.core import Settings
from ..paxos.replica import LEARNING, LongQuestion, Replica
from ..routing import Routing
from ..topology import Topology
from .comparisons import Comparisons
from .disk_room import DiskRoom
from .engine import DurableEngine
from .flusher import IN_PLACE_S, Flusher
from .home import EngineHome, OpenEngine, remove_engine, rocks_opener
from .life_cycle import REOPEN_S, LifeCycle
from .restore_door import RestoreDoor, is_refused
from .steps import Steps
from .version_home import PrivateVersions, VersionHome, owner_of
from .waiting import Waiting, weight

logger = logging.getLogger(__name__)

_FOR_READER = (ReadItems, ReadPages)
_QUESTIONS = (Check, AskVersions, AskChosen, AskChanged, AskTables, AskAccepted, Mend)
_OF_RESTORE = (Restore, BeginRestore)
_AT_FAST_DOOR = (AskSame, PeerBatch, Write, Settle, *_FOR_READER, *_QUESTIONS, *_OF_RESTORE)

CHORE_SLICE_S = 0.001
CHORE_PAUSE_S = 0.003  # after a slice: nobody waits for chores, and readers wait for the processor


def wall_us() -> int:
    """Microseconds since 1970."""
    return time.time_ns() // 1000


def free_bytes(folder: Path) -> int:
    """Room on the disk of a folder. Raises OSError."""
    return shutil.disk_usage(folder).free


class StorageService:
    """One storage replica without its surroundings; see `service.Service`.

    It answers `Unavailable` until `allow_votes` was called, until a peer has confirmed its life, and while its disk
    fails; `status()` says which.
    """

    def __init__(
        self,
        *,
        name: str,
        group: int,
        replica: int,
        folder: Path,
        identity: Identity,
        topology: Topology,
        carrier: Carrier,
        config: StorageConfig,
        counters: Counters,
        seed: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_us: Callable[[], int] = wall_us,
        open_engine: OpenEngine | None = None,
        free_bytes: Callable[[Path], int] = free_bytes,
        remove_engine: Callable[[Path], None] = remove_engine,
        versions: VersionHome | None = None,
        flush_in_place_s: float = IN_PLACE_S,
    ) -> None:
        """`clock`: monotonic seconds. `wall_us`: microseconds since 1970. `open_engine`: opens the engine of a folder;
        None for RocksDB as `config` says. `free_bytes`: room on the disk of a folder; may raise OSError, as
        `remove_engine` may. `versions`: where the version cache lies; None for memory of this process.
        `flush_in_place_s`: see `Flusher`.
        """
        self.name = name
        self.group = group
        self.number = replica
        self.counters = counters
        self._identity = identity
        self._versions = versions or PrivateVersions(config.version_cache_mb << 20)
        self._carrier = carrier
        self._config = config
        self._routing = Routing(topology)
        self._random = random.Random(seed)
        self._now = clock
        self._wall_us = wall_us
        self._settings = settings_of(config)
        self._reader = CacheService(
            name,
            group,
            topology,
            carrier,
            budget_bytes=0,
            page_items=1,
            block_cache_bytes=0,
            max_queued_requests=10_000,
            max_queued_bytes=config.max_queued_mb << 20,
            counters=Counters(),
            seed=self._random.getrandbits(32),
            clock=clock,
            wall_us=wall_us,
        )
        self._waiting = Waiting(
            name, counters, max_requests=config.max_queued_requests, max_bytes=config.max_queued_mb << 20
        )
        self._door = RestoreDoor(name)
        self._door.look(topology, None)
        self._slicing = asyncio.Lock()  # one long answer at a time
        self._flusher = Flusher(name, clock, flush_in_place_s)
        self._disk = DiskRoom(name, folder, config.disk_reserve_mb << 20, free_bytes)
        self._tasks: set[asyncio.Task[None]] = set()
        self._life = LifeCycle(
            name=name,
            number=replica,
            identity=identity,
            home=EngineHome(folder, identity, open_engine or rocks_opener(config), remove_engine),
            make_replica=self._make_replica,
            peers=self._peers,
            carrier=carrier,
            config=config,
            counters=counters,
            flusher=self._flusher,
            clock=clock,
            step_of=lambda replica: self._steps.of(replica),
            began=self._life_began,
            ended=self._waiting.fail_all,
            keep=self._keep,
        )
        self._steps = Steps(name, self._life, self._waiting, self._flusher, self._send, counters, clock)
        self._comparisons = Comparisons(
            self._life, self._steps, self._peers, carrier, clock, config.catch_up_interval_s
        )

    # ------------------------------------------------------------ Service

    async def start(self) -> None:
        """Open the engine, or begin to rejoin if the data is lost. Raises Corrupt when it is damaged and there is
        nobody to copy it from, Unavailable when the disk refuses."""
        await self._reader.start()
        self._life.start()
        self._door.look(self._routing.topology, self._life.replica)
        self._keep(self._do_chores())
        self._keep(self._comparisons.run())
        self._steps.plan_end()

    def allow_votes(self) -> None:
        """The folder is known as formatted: from now on this replica may answer."""
        self._life.votes_allowed = True
        self._steps.plan_end()

    async def handle(self, message: Message) -> Message | None:
        if self._door.closed and is_refused(message):
            raise self._door.refuse()
        match message:
            case AskLives():
                return self._lives()
            case Scan() | AskOverlay() | AskDigests() | AskTimeline() | AskAges() | Dump() | AskRestored():
                return await self._answer_in_slices(message)
            case AskRestore():
                replica = self._require_replica()
                replica.require_voting()
                return self._door.facts(self._routing.topology, replica)
            case AskReads():
                return await self._reader.handle(message)
            case Ping():
                return Pong()
            case _ if isinstance(message, _AT_FAST_DOOR):
                return await at_fast_door(self.begin, message)
            case _:
                raise Unavailable(f"{self.name} does not answer a {type(message).__name__}")

    def begin(self, message: Message, reply: Reply) -> bool:
        """The fast door: for all but what is answered in slices."""
        if self._door.closed and is_refused(message):
            raise self._door.refuse()
        if isinstance(message, AskSame):
            reply(self._same(message))
        elif isinstance(message, PeerBatch):
            self._take_batch(message)
            reply(None)
        elif isinstance(message, Write):
            self._disk.require_for_write(self._routing.topology.storage_replicas, self._now())
            self._ask(message, reply, lambda replica, token: replica.write(self._now(), token, message))
        elif isinstance(message, _FOR_READER):
            self._require_replica()
            return self._reader.begin(message, reply)
        elif isinstance(message, Settle):
            self._disk.require_for_settling()
            self._ask(message, reply, lambda replica, token: replica.settle(self._now(), token, message))
        elif isinstance(message, _QUESTIONS):
            self._ask(message, reply, lambda replica, token: replica.ask(self._now(), token, message))
        elif isinstance(message, _OF_RESTORE):
            self._restore(message, reply)
        else:
            return False
        return True

    def _restore(self, message: Restore | BeginRestore, reply: Reply) -> None:
        """Take part in a restore, if the topology tells of it."""
        epoch = self._routing.topology.epoch
        first = self._door.require(self._routing.topology, message.restore)
        if isinstance(message, BeginRestore):
            name = message.restore
            self._ask(message, reply, lambda r, token: r.begin_restore(self._now(), token, name, epoch, first=first))
        elif first:
            raise Unavailable(f"{self.name} has not heard yet that all replicas are empty", retry_after_s=0.2)
        else:
            self._disk.require_for_write(self._routing.topology.storage_replicas, self._now())
            self._ask(message, reply, lambda r, token: r.restore(self._now(), token, message))

    def _lives(self) -> Lives:
        if self._life.replica is None or not self._life.votes_allowed:
            return Lives((self.number, 0, 0), False, [])
        return self._life.replica.lives()

    def _take_batch(self, message: PeerBatch) -> None:
        if self._life.replica is not None and self._life.votes_allowed:
            self._disk.note_peer(message.life[0], message.full, self._now())
            batch = self._disk.allowed(message)
            self._steps.take(lambda replica: replica.peer(self._now(), message.life[0], batch))
            self._life.rejoin_if_fenced()

    def _same(self, message: AskSame) -> Message:
        """Nothing that it says waits for the disk, so it leaves before the step ends."""
        replica = self._require_replica()
        replica.require_voting()
        try:
            return replica.reads.same(message)[0]
        except TimeTierError:
            raise
        except Exception as error:
            self._life.break_off(error)  # entries may have stopped half moved; the next life finds their rows torn
            raise Unavailable(f"{self.name} failed: {error}") from error

    def update(self, topology: Topology) -> None:
        self._routing = Routing(topology)
        self._door.look(topology, self._life.replica)
        self._reader.update(topology)

    def status(self) -> dict[str, Any]:
        replica, engine = self._life.replica, self._life.engine
        state, reason = ("failed", self._life.failed) if replica is None else (replica.state, replica.reason)
        if replica is not None and not self._life.votes_allowed:
            state, reason = "joining", "waiting for the Router to note that the data folder is formatted"
        elif replica is not None and self._disk.full:
            reason = self._disk.reason
        elif self._door.closed and not reason:
            reason = self._door.closed
        figures: dict[str, Any] = {
            "state": state,
            "reason": reason,
            "incarnation": self._identity.incarnation,
            "boot": self._identity.boot,
            "catch_up": dict(self._comparisons.figures),
        }
        if self._life.rejoining is not None:
            figures["state"] = LEARNING
            figures["reason"] = self._life.rejoining.reason or "copying what was lost from its peers"
            figures["rejoin"] = dataclasses.asdict(self._life.rejoining)
        if replica is not None and engine is not None:
            figures |= {
                "engine_bytes": engine.size_bytes(),
                "timelines_in_memory": replica.core.in_memory(),
                "queued_requests": replica.proposer.queued,
                "chores": replica.chores.pending,
                "versions": replica.core.versions.status(self._versions.where),
                "lives": {str(peer): list(life) for peer, life in replica.core.lives.items()},
            }
        return figures

    async def stop(self) -> None:
        tasks, self._tasks = self._tasks, set()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._reader.stop()
        self._steps.stop()
        await self._life.stop()
        self._versions.remove()
        self._flusher.shutdown()

    # ------------------------------------------------------------ surroundings of the replica

    def _make_replica(self, engine: DurableEngine) -> Replica:
        """The replica of a life that begins, over its engine."""
        identity, topology = self._identity, self._routing.topology
        owned = self._routing.buckets_of_storage_group(self.group).tolist()
        owner = owner_of(identity, topology.buckets, owned, digest_seed(topology.secret))
        return Replica(
            replica=self.number,
            replicas=topology.storage_replicas,
            life=(self.number, identity.incarnation, identity.life_number),
            buckets=topology.buckets,
            owned=owned,
            engine=engine,
            settings=self._settings,
            rng=self._random,
            wall_us=self._wall_us,
            counters=self.counters,
            past=identity.past,
            learner=identity.learning,
            versions=self._versions.open(owner),
        )

    def _life_began(self) -> None:
        self._door.look(self._routing.topology, self._life.replica)
        self._steps.plan_end()

    def _peers(self) -> dict[int, str]:
        topology = self._routing.topology
        replicas = range(topology.storage_replicas)
        return {peer: topology.storage_node(self.group, peer) for peer in replicas if peer != self.number}

    def _send(self, peer: int, batch: PeerBatch) -> None:
        batch.full = self._disk.full
        self._carrier.send(self._routing.topology.storage_node(self.group, peer), batch)

    # ------------------------------------------------------------ questions

    def _require_replica(self) -> Replica:
        if self._life.replica is None:
            raise Unavailable(f"{self.name} has failed: {self._life.failed}", retry_after_s=REOPEN_S)
        if not self._life.votes_allowed:
            raise Unavailable(f"{self.name} is joining", retry_after_s=0.2)
        return self._life.replica

    def _ask(self, message: Message, reply: Reply, step: Callable[[Replica, int], None]) -> None:
        """Give a request to the replica; `reply` is told its answer."""
        self._require_replica().require_voting()
        token = self._waiting.enter(message, reply)
        question = not isinstance(message, (Write, Settle, *_OF_RESTORE))
        try:
            self._steps.take(lambda replica: step(replica, token), question=question)
        except Exception as error:
            if (waits := self._waiting.leave(token)) is not None:  # else it was told, as all that waited
                waits(error)

    async def _answer_in_slices(self, message: LongQuestion) -> Message:
        """Answer a question about many rows, one such question at a time. All else has its turn after each slice, and
        half of the time."""
        replica = self._require_replica()
        found: list[tuple[Message, int]] = []
        with self._waiting.reads.entered(*weight(message)):
            async with self._slicing:
                slices = replica.slices(message)

                def step(_: Replica) -> None:
                    try:
                        next(slices)
                    except StopIteration as stop:
                        found.append(stop.value)

                while not found:
                    self._steps.require_life(replica)
                    began = self._now()
                    self._steps.take(step, question=True)
                    if not found:
                        await asyncio.sleep(self._now() - began)
        self._steps.require_life(replica)
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._ask(message, partial(settle, answer), lambda replica, token: replica.answer(token, *found[0]))
        return await answer

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ------------------------------------------------------------ background

    async def _do_chores(self) -> None:
        """Evict, purge: a slice of a millisecond or two at a time, a quarter of the time or so."""
        while True:
            more = False
            held_up = self._disk.bare or self._door.closed  # what is being restored stays as it came
            if self._life.replica is not None and self._life.votes_allowed and not held_up:
                ends = self._now() + CHORE_SLICE_S
                try:
                    while self._now() < ends and (more := self._life.replica.run_chores(self._now())):
                        pass
                except Exception as error:
                    self._life.break_off(error)
                self._steps.plan_end()
            self._look_around()
            await asyncio.sleep(CHORE_PAUSE_S if more else 0.1)

    def _look_around(self) -> None:
        """Note how much room the disk has, and the lengths of queues."""
        try:
            self._disk.look()
        except OSError as error:
            logger.warning("%s can't tell how full its disk is: %s", self.name, error)
            return
        self.counters.set("disk_free_bytes", self._disk.free_bytes)
        self.counters.set("fsyncs_in_place", self._flusher.in_place)
        replica = self._life.replica
        if replica is not None:
            self.counters.set("queued_requests", replica.proposer.queued)
            self.counters.set("queued_bytes", replica.proposer.queued_bytes)
            self.counters.set("timelines_in_memory", replica.core.in_memory())
            self.counters.set("chores", replica.chores.pending)


def settings_of(config: StorageConfig) -> Settings:
    """The replica's settings from the configuration."""
    return Settings(
        timelines_in_memory=config.timelines_in_memory,
        request_id_entries=config.request_id_entries,
        request_ids_in_memory=IDS_PER_TIMELINE * config.timelines_in_memory,
        log_keep_entries=config.log_keep_entries,
        log_keep_bytes=config.log_keep_mb << 20,
        journal_bytes=config.journal_mb << 20,
        max_queued_requests=config.max_queued_requests,
        max_queued_bytes=config.max_queued_mb << 20,
        incoming_bytes=config.max_queued_mb << 20,
        accept_timeout_s=config.accept_timeout_ms / 1000,
        backoff_s=config.prepare_backoff_ms / 1000,
    )
