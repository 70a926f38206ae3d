"""The storage node: feeds a `Replica` and its engine, and carries out what they say.

One event loop, one replica, one flusher thread. Whatever arrives in one turn of the loop is one step: the replica
takes it all, the engine gets one batch, the log is flushed once (while a flush runs the next step gathers), and each
peer gets one message. Only what waits for the disk waits; the rest of a step leaves at once.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import random
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ..budget import IDS_PER_TIMELINE
from ..carriers.base import CallError, Carrier, Reply, at_fast_door, settle
from ..config import StorageConfig
from ..counters import Counters
from ..drive import drive
from ..errors import Corrupt, OutcomeUnknown, TimeTierError, Unavailable
from ..identity import Identity
from ..keys import digest_seed
from ..memory.service import CacheService
from ..messages import (
    AskAccepted,
    AskChanged,
    AskChosen,
    AskDigests,
    AskLives,
    AskSame,
    AskTables,
    AskVersions,
    Check,
    Lives,
    Mend,
    Message,
    PeerBatch,
    Ping,
    Pong,
    ReadItems,
    ReadPages,
    Scan,
    Settle,
    Write,
)
from ..paxos.core import Settings
from ..paxos.replica import FENCED, LEARNING, VOTING, Replica
from ..routing import Routing
from ..topology import Topology
from .catching_up import catch_up
from .disk_room import DiskRoom
from .engine import DurableEngine, EngineDamaged, EngineFailed
from .flusher import IN_PLACE_S, Flusher
from .home import EngineHome, OpenEngine, remove_engine, rocks_opener
from .learning import Progress, Rejoin, Step, ask_lives
from .version_home import PrivateVersions, VersionHome, owner_of
from .waiting import Waiting, weight

T = TypeVar("T")

logger = logging.getLogger(__name__)

_FOR_READER = (ReadItems, ReadPages)
_QUESTIONS = (Check, AskVersions, AskChosen, AskChanged, AskTables, AskAccepted, Mend)
_AT_FAST_DOOR = (AskSame, PeerBatch, Write, Settle, *_FOR_READER, *_QUESTIONS)

CHORE_SLICE_S = 0.001
CHORE_PAUSE_S = 0.003  # after a slice: nobody waits for chores, and readers wait for the processor
REOPEN_S = 1.0
IDLE_S = 0.5  # after so long a step ends, whatever it has done


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
        self._home = EngineHome(folder, identity, open_engine or rocks_opener(config), remove_engine)
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
        )
        self._engine: DurableEngine | None = None
        self._replica: Replica | None = None
        self._failed = "not started"
        self._votes_allowed = False
        self._waiting = Waiting(
            name, counters, max_requests=config.max_queued_requests, max_bytes=config.max_queued_mb << 20
        )
        self._slicing = asyncio.Lock()  # one long answer at a time
        self._flusher = Flusher(name, clock, flush_in_place_s)
        self._disk = DiskRoom(name, folder, config.disk_reserve_mb << 20, free_bytes)
        self._pump_planned = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._caught_up: dict[str, Any] = {"rounds": 0, "behind": 0}
        self._rejoin_progress: Progress | None = None
        self._begins_incarnation = False

    # ------------------------------------------------------------ Service

    async def start(self) -> None:
        """Open the engine, or begin to rejoin if the data is lost. Raises Corrupt when it is damaged and there is
        nobody to copy it from, Unavailable when the disk refuses."""
        await self._reader.start()
        try:
            if self._identity.incarnation:
                self._open()
            else:
                self._lose("its data folder was emptied, or holds what counts no more")
        except (Corrupt, EngineDamaged) as error:
            if not self._may_rejoin:
                raise
            self._lose(error.message)
        if not self._identity.learning:
            self._keep(self._remove_old_engines())  # a crash may have come before
        self._keep(self._do_chores())
        self._keep(self._catch_up())
        self._plan_pump()

    def allow_votes(self) -> None:
        """The folder is known as formatted: from now on this replica may answer."""
        self._votes_allowed = True
        self._plan_pump()

    async def handle(self, message: Message) -> Message | None:
        match message:
            case AskLives():
                return self._lives()
            case Scan() | AskDigests():
                return await self._answer_in_slices(message)
            case Ping():
                return Pong()
            case _ if isinstance(message, _AT_FAST_DOOR):
                return await at_fast_door(self.begin, message)
            case _:
                raise Unavailable(f"{self.name} does not answer a {type(message).__name__}")

    def begin(self, message: Message, reply: Reply) -> bool:
        """The fast door: for all but what is answered in slices."""
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
        else:
            return False
        return True

    def _take_batch(self, message: PeerBatch) -> None:
        if self._replica is not None and self._votes_allowed:
            self._disk.note_peer(message.life[0], message.full, self._now())
            batch = self._disk.allowed(message)
            self._guard(lambda replica: replica.peer(self._now(), message.life[0], batch))
            self._rejoin_if_fenced()

    def _same(self, message: AskSame) -> Message:
        """Nothing that it says waits for the disk, so it leaves before the step ends."""
        replica = self._require_replica()
        replica.require_voting()
        try:
            return replica.reads.same(message)[0]
        except TimeTierError:
            raise
        except Exception as error:
            self._break(error)  # entries may have stopped half moved; the next life finds their rows torn
            raise Unavailable(f"{self.name} failed: {error}") from error

    def update(self, topology: Topology) -> None:
        self._routing = Routing(topology)
        self._reader.update(topology)

    def status(self) -> dict[str, Any]:
        replica, engine = self._replica, self._engine
        state, reason = ("failed", self._failed) if replica is None else (replica.state, replica.reason)
        if replica is not None and not self._votes_allowed:
            state, reason = "joining", "waiting for the Router to note that the data folder is formatted"
        elif replica is not None and self._disk.full:
            reason = self._disk.reason
        figures: dict[str, Any] = {
            "state": state,
            "reason": reason,
            "incarnation": self._identity.incarnation,
            "boot": self._identity.boot,
            "catch_up": dict(self._caught_up),
        }
        if self._rejoin_progress is not None:
            figures["state"] = LEARNING
            figures["reason"] = self._rejoin_progress.reason or "copying what was lost from its peers"
            figures["rejoin"] = dataclasses.asdict(self._rejoin_progress)
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
        if self._timer is not None:
            self._timer.cancel()
        replica, self._replica, self._failed = self._replica, None, "stopped"
        self._waiting.fail_all("the node stops")
        if replica is not None:
            replica.core.mark_all()
        await self._flusher.after(lambda: None)  # a flush under way ends first
        if self._engine is not None:
            try:
                if replica is not None:
                    self._engine.commit()
                    replica.core.journal.settle()
                self._engine.close()
            except Exception as error:  # on a full disk; what was acknowledged is in the log
                logger.warning("%s can't close its engine in order: %s", self.name, str(error))
                self._engine.abandon()
            self._engine = None
        self._versions.remove()
        self._flusher.shutdown()

    # ------------------------------------------------------------ engine and replica

    def _open(self) -> None:
        """Open the engine and begin a life."""
        identity, topology = self._identity, self._routing.topology
        owned = self._routing.buckets_of_storage_group(self.group).tolist()
        engine = self._home.open()
        try:
            owner = owner_of(identity, topology.buckets, owned, digest_seed(topology.secret))
            replica = Replica(
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
        except Exception:
            engine.abandon()  # else its lock would keep every later life out
            raise
        self._engine, self._replica, self._failed = engine, replica, ""
        if identity.learning:
            self._keep(self._learn(replica))

    def _break(self, error: Exception) -> None:
        """The disk or the core failed: nothing in memory can be trusted. End this life, begin the next one."""
        expected = isinstance(error, EngineFailed)
        logger.error("%s ends this life: %s", self.name, error, exc_info=None if expected else error)
        self.counters.add("lives_ended_by_errors")
        if isinstance(error, EngineDamaged) and self._may_rejoin:
            self._lose(str(error))
        else:
            self._keep(self._reopen(self._end_life(str(error))))

    def _end_life(self, reason: str) -> DurableEngine | None:
        """Answer nothing any more. Returns the engine, which is to be let go of."""
        self._replica, self._failed = None, reason
        self._waiting.fail_all(f"{self.name}: {reason}")
        engine, self._engine = self._engine, None
        return engine

    async def _abandon(self, engine: DurableEngine | None) -> None:
        if engine is not None:
            # In the flusher's thread, so that a flush under way ends before the engine closes.
            await self._flusher.after(engine.abandon)

    async def _reopen(self, failed: DurableEngine | None) -> None:
        await self._abandon(failed)
        while self._replica is None:
            await asyncio.sleep(REOPEN_S)
            try:
                await asyncio.to_thread(self._identity.begin_life)
                self._open()
            except (Corrupt, EngineDamaged) as error:
                if self._may_rejoin:
                    self._lose(str(error))
                    return
                self._failed = str(error)
            except Exception as error:
                # Whatever it was, it may pass, and a node that gave up would need somebody to notice.
                self._failed = str(error)
                logger.warning("%s can't begin its next life: %s", self.name, self._failed)
        self._plan_pump()

    # ------------------------------------------------------------ loss of data

    @property
    def _may_rejoin(self) -> bool:
        return self._config.rejoin and self._routing.topology.storage_replicas > 1

    def _peers(self) -> dict[int, str]:
        topology = self._routing.topology
        replicas = range(topology.storage_replicas)
        return {peer: topology.storage_node(self.group, peer) for peer in replicas if peer != self.number}

    def _lives(self) -> Lives:
        if self._replica is None or not self._votes_allowed:
            return Lives((self.number, 0, 0), False, [])
        return self._replica.lives()

    def _rejoin_if_fenced(self) -> None:
        if self._replica is not None and self._replica.state == FENCED and self._may_rejoin:
            self._lose(self._replica.reason)

    def _lose(self, reason: str) -> None:
        """What this node holds counts no more: come back as a learner."""
        if not self._begins_incarnation:  # a learner too may lose what it has, or find that its folder is an old one
            logger.error("%s has lost its data and copies it from its peers: %s", self.name, reason)
            self.counters.add("rejoins")
            engine = self._end_life(reason)
            self._begins_incarnation = True
            self._rejoin_progress = Progress(reason=reason)
            self._keep(self._begin_incarnation(self._rejoin_progress, engine))

    async def _begin_incarnation(self, progress: Progress, engine: DurableEngine | None) -> None:
        """Choose an incarnation that nobody has seen. All peers must vote: only they have what was lost."""
        await self._abandon(engine)
        while self._replica is None:
            try:
                await asyncio.to_thread(self._identity.lose_data)
                lives = await drive(ask_lives(self._peers(), progress), self._carrier)
                noted = [life[1] for answer in lives for life in answer.noted if life[0] == self.number]
                incarnation = max(noted, default=1) + 1
                await asyncio.to_thread(self._home.remove, incarnation)
                await asyncio.to_thread(self._identity.begin_incarnation, incarnation)
                self._open()
                self._begins_incarnation = False
                self._plan_pump()
                return
            except Exception as error:
                progress.reason = str(error)
                logger.warning("%s can't begin to rejoin: %s", self.name, progress.reason)
            await asyncio.sleep(REOPEN_S)

    async def _learn(self, replica: Replica) -> None:
        """Copy and verify, make it durable, vote."""
        progress = self._rejoin_progress = self._rejoin_progress or Progress()
        peers = self._peers()
        rate = self._config.rejoin_mb_per_s * (1 << 20)
        began = self._now()

        step = self._step_of(replica)
        try:
            # Else an old life of one peer, of which the other knows, could be heard here again.
            lives = await drive(ask_lives(peers, progress), self._carrier)
            step(lambda r: r.note_lives([life for answer in lives for life in (answer.life, *answer.noted)]))
            await drive(Rejoin(step, self._now, peers, rate, progress).script(), self._carrier)
            step(lambda r: r.learning.forget_positions())
            engine = self._engine
            if engine is None or self._replica is not replica:
                return
            engine.commit()
            await self._flusher.after(engine.sync)
            await asyncio.to_thread(self._identity.end_learning)
            step(lambda r: r.begin_voting())
        except (TimeTierError, OSError) as error:
            if self._replica is replica:
                self._break(error)  # the next life goes on where this one stopped
            return
        self._rejoin_progress = None
        logger.warning("%s votes again, after %.1f s", self.name, self._now() - began)
        await self._remove_old_engines()

    async def _remove_old_engines(self) -> None:
        """Remove what earlier incarnations have held; this one has everything and votes."""
        for incarnation in range(1, self._identity.incarnation):
            try:
                await asyncio.to_thread(self._home.remove, incarnation)
            except OSError as error:
                logger.warning("%s can't remove its engine %d: %s", self.name, incarnation, error)

    # ------------------------------------------------------------ steps

    def _require_replica(self) -> Replica:
        if self._replica is None:
            raise Unavailable(f"{self.name} has failed: {self._failed}", retry_after_s=REOPEN_S)
        if not self._votes_allowed:
            raise Unavailable(f"{self.name} is joining", retry_after_s=0.2)
        return self._replica

    def _ask(self, message: Message, reply: Reply, step: Callable[[Replica, int], None]) -> None:
        """Give a request to the replica; `reply` is told its answer."""
        self._require_replica().require_voting()
        token = self._waiting.enter(message, reply)
        question = not isinstance(message, (Write, Settle))
        try:
            self._guard(lambda replica: step(replica, token), question=question)
        except Exception as error:
            if (waits := self._waiting.leave(token)) is not None:  # else it was told, as all that waited
                waits(error)

    async def _answer_in_slices(self, message: Scan | AskDigests) -> Message:
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
                    self._require_life(replica)
                    began = self._now()
                    self._guard(step, question=True)
                    if not found:
                        await asyncio.sleep(self._now() - began)
        self._require_life(replica)
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._ask(message, partial(settle, answer), lambda replica, token: replica.answer(token, *found[0]))
        return await answer

    def _require_life(self, replica: Replica) -> None:
        if self._replica is not replica:
            raise Unavailable(f"{self.name}: this life has ended")

    def _guard(self, step: Callable[[Replica], None], *, question: bool = False) -> None:
        """Let the replica take something. Errors of the request go to its sender; all others end this life: whatever
        broke off in the middle may have left memory ahead of the engine. A question changes nothing, so any error
        but a broken engine or invariant goes to who asked it.
        """
        replica = self._replica
        if replica is None:
            return
        try:
            step(replica)
        except Exception as error:
            of_request = isinstance(error, TimeTierError) or (question and not isinstance(error, AssertionError))
            if of_request and not isinstance(error, EngineFailed):
                self._plan_pump()  # what was taken before the error has its answers
                raise
            self._break(error)
            raise OutcomeUnknown(f"{self.name} failed: {error}") from error
        self._step_taken(replica)

    def _step_of(self, replica: Replica) -> Step:
        """Lets this life of the replica do something, as a step. It raises Unavailable when the life has ended."""

        def step(work: Callable[[Replica], T]) -> T:
            results: list[T] = []
            self._require_life(replica)
            self._guard(lambda r: results.append(work(r)))
            return results[0]

        return step

    def _step_taken(self, replica: Replica) -> None:
        """Answers that wait for nothing leave at once, all else with what other messages of this turn stir."""
        try:
            answers = replica.answers()
            stirred = replica.is_stirred(self._now())
        except Exception as error:
            self._break(error)
            return
        for token, answer in answers:
            self._waiting.answer(token, answer)
        if stirred:
            self._plan_pump()
        else:
            self._plan_timer(replica)

    def _plan_pump(self) -> None:
        if not self._pump_planned:
            self._pump_planned = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        """End a step: send what may leave, give the engine its batch, flush it if anything waits for that."""
        self._pump_planned = False
        replica, engine = self._replica, self._engine
        if replica is None or engine is None or not self._votes_allowed:
            return
        now = self._now()
        try:
            replica.tick(now)
            self._send(replica, now)
            batch = engine.commit()
            if not self._flusher.busy and replica.waits_for_disk:
                self._flush(replica, engine, batch)
        except Exception as error:
            self._break(error)
            return
        if self._replica is replica:
            self._plan_timer(replica)

    def _send(self, replica: Replica, now: float) -> None:
        output = replica.take(now)
        for token, answer in output.replies:
            self._waiting.answer(token, answer)
        for peer, batch in output.peers:
            batch.full = self._disk.full
            self._carrier.send(self._routing.topology.storage_node(self.group, peer), batch)

    def _flush(self, replica: Replica, engine: DurableEngine, batch: int) -> None:
        """Have what was written up to a batch made durable."""
        began = self._now()
        self._flusher.flush(engine.sync, lambda error: self._flushed(error, replica, batch, began))

    def _flushed(self, error: BaseException | None, replica: Replica, batch: int, began: float) -> None:
        """Go on with what waited for the disk, and flush again soon if something has come to wait meanwhile."""
        if error is None:
            self.counters.add("fsyncs")
            self.counters.add("fsync_us", int((self._now() - began) * 1e6))
        if self._replica is not replica:
            self._plan_pump()
            return
        try:
            if error is not None:
                raise error
            replica.durable(self._now(), batch)
            self._send(replica, self._now())
            if replica.waits_for_disk:
                self._plan_pump()
        except Exception as failed:
            self._break(failed)
            return
        self._plan_timer(replica)

    def _plan_timer(self, replica: Replica) -> None:
        """End a step when time brings the next thing to do, or in half a second. A timer that comes too early stays: to
        be woken for nothing is cheaper than to set another one for each message."""
        due = replica.next_due()
        if self._timer is not None and self._timer_due <= due:
            return
        now = self._now()
        wait_s = min(max(due - now, 0.0005), IDLE_S)
        if self._timer is not None:
            if self._timer_due <= now + wait_s:
                return
            self._timer.cancel()
        self._timer_due = now + wait_s
        self._timer = asyncio.get_running_loop().call_later(wait_s, self._time_has_come)

    def _time_has_come(self) -> None:
        self._timer = None
        self._pump()

    def _keep(self, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ------------------------------------------------------------ background

    async def _do_chores(self) -> None:
        """Evict, purge: a slice of a millisecond or two at a time, a quarter of the time or so."""
        while True:
            more = False
            if self._replica is not None and self._votes_allowed and not self._disk.bare:
                ends = self._now() + CHORE_SLICE_S
                try:
                    while self._now() < ends and (more := self._replica.run_chores(self._now())):
                        pass
                except Exception as error:
                    self._break(error)
                self._plan_pump()
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
        replica = self._replica
        if replica is not None:
            self.counters.set("queued_requests", replica.proposer.queued)
            self.counters.set("queued_bytes", replica.proposer.queued_bytes)
            self.counters.set("timelines_in_memory", replica.core.in_memory())
            self.counters.set("chores", replica.chores.pending)

    async def _catch_up(self) -> None:
        """Compare with each peer after a start, and now and then: a replica that was away fetches what it missed."""
        pause_s = 0.5
        while True:
            await asyncio.sleep(pause_s)
            replica = self._replica
            if replica is None or replica.state != VOTING:
                continue
            compared = behind = 0
            for peer in replica.core.peers:
                try:
                    node = self._routing.topology.storage_node(self.group, peer)
                    script = catch_up(self._step_of(replica), self._now, peer, node)
                    behind += await drive(script, self._carrier)
                    compared += 1
                except (CallError, TimeTierError) as error:
                    self._caught_up["reason"] = f"replica {peer}: {error}"
            complete = compared == len(replica.core.peers)
            self._caught_up["rounds"] += complete
            self._caught_up["behind"] = behind
            # Questions and answers get lost, and transfers are put off: what was behind is looked at again soon.
            interval_s = self._config.catch_up_interval_s
            pause_s = interval_s if complete and not behind else min(interval_s, 2.0)


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
