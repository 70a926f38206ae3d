"""The storage node: feeds a `Replica` and its engine, and carries out what they say.

One event loop, one replica, one flusher thread. Whatever arrives in one turn of the loop is one step: the replica
takes it all, the engine gets one batch, the log is flushed once (while a flush runs the next step gathers), and each
peer gets one message. Only what waits for the disk waits; the rest of a step leaves at once.
"""

from __future__ import annotations

import asyncio
import logging
import random
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..carriers.base import CallError, Carrier
from ..config import StorageConfig
from ..counters import Counters
from ..errors import Corrupt, OutcomeUnknown, ProtocolError, TimeTierError, Unavailable
from ..identity import Identity
from ..memory.service import CacheService
from ..messages import (
    Accept,
    AskChosen,
    AskTables,
    AskVersions,
    Check,
    ChosenList,
    Entries,
    Message,
    PeerBatch,
    PeerMessage,
    Ping,
    Pong,
    Prepare,
    ReadItems,
    ReadPages,
    Scan,
    Settle,
    State,
    Write,
    unpack_i64,
)
from ..paxos.core import Settings
from ..paxos.replica import VOTING, Replica
from ..paxos.rows import IDENTITY_KEY
from ..routing import Routing
from ..topology import Topology
from .engine import DurableEngine, EngineFailed, RocksEngine

logger = logging.getLogger(__name__)

CHORE_SLICE_S = 0.002
REOPEN_S = 1.0
FETCHES_AT_ONCE = 200
ENGINE_FOLDER = "engine"
WRITES = (Accept, Prepare, Entries, State)  # what a peer's message may make this replica write


OpenEngine = Callable[[Path, bool], DurableEngine]
"""Opens the engine in a folder; True to create it. Raises Corrupt when it is damaged or missing."""


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
    ) -> None:
        """`clock`: monotonic seconds. `wall_us`: microseconds since 1970. `open_engine`: opens the engine of a folder;
        None for RocksDB as `config` says. `free_bytes`: room on the disk of a folder; may raise OSError.
        """
        self.name = name
        self.group = group
        self.number = replica
        self.counters = counters
        self._folder = folder / ENGINE_FOLDER
        self._identity = identity
        self._carrier = carrier
        self._config = config
        self._routing = Routing(topology)
        self._random = random.Random(seed)
        self._now = clock
        self._wall_us = wall_us
        self._open_engine = open_engine or self._open_rocks
        self._free_bytes = free_bytes
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
            counters=Counters(),
            seed=self._random.getrandbits(32),
            clock=clock,
        )
        self._engine: DurableEngine | None = None
        self._replica: Replica | None = None
        self._failed = "not started"
        self._votes_allowed = False
        self._waiting: dict[int, asyncio.Future[Message]] = {}
        self._writes: set[int] = set()
        self._token = 0
        self._flusher = ThreadPoolExecutor(1, thread_name_prefix=f"{name}-flush")
        self._flushing = False
        self._reserve_bytes = config.disk_reserve_mb << 20
        self._disk_is_full = False
        self._pump_planned = False
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._caught_up: dict[str, Any] = {"rounds": 0, "behind": 0}

    # ------------------------------------------------------------ Service

    async def start(self) -> None:
        """Open the engine. Raises Corrupt when the data is damaged, Unavailable when the disk refuses."""
        await self._reader.start()
        self._open()
        self._keep(self._do_chores())
        self._keep(self._catch_up())
        self._plan_pump()

    def allow_votes(self) -> None:
        """The folder is known as formatted: from now on this replica may answer."""
        self._votes_allowed = True
        self._plan_pump()

    async def handle(self, message: Message) -> Message | None:
        match message:
            case PeerBatch():
                if self._replica is not None and self._votes_allowed:
                    batch = self._without_writes(message) if self._disk_is_full else message
                    self._guard(lambda replica: replica.peer(self._now(), message.life[0], batch))
                return None
            case Write() | Settle() if self._disk_is_full:
                raise Unavailable(f"{self.name}: {self._disk_reason()}", retry_after_s=1.0)
            case Write():
                return await self._wait(message, lambda r, token: r.write(self._now(), token, message))
            case Settle():
                return await self._wait(message, lambda r, token: r.settle(self._now(), token, message))
            case Check() | AskVersions() | AskChosen() | AskTables() | Scan():
                return await self._wait(message, lambda r, token: r.ask(self._now(), token, message))
            case ReadPages() | ReadItems():
                self._require_replica()
                return await self._reader.handle(message)
            case Ping():
                return Pong()
            case _:
                raise Unavailable(f"{self.name} does not answer a {type(message).__name__}")

    def update(self, topology: Topology) -> None:
        self._routing = Routing(topology)
        self._reader.update(topology)

    def status(self) -> dict[str, Any]:
        replica, engine = self._replica, self._engine
        state, reason = ("failed", self._failed) if replica is None else (replica.state, replica.reason)
        if replica is not None and not self._votes_allowed:
            state, reason = "joining", "waiting for the Router to note that the data folder is formatted"
        elif replica is not None and self._disk_is_full:
            reason = self._disk_reason()
        figures: dict[str, Any] = {
            "state": state,
            "reason": reason,
            "incarnation": self._identity.incarnation,
            "boot": self._identity.boot,
            "catch_up": dict(self._caught_up),
        }
        if replica is not None and engine is not None:
            figures |= {
                "engine_bytes": engine.size_bytes(),
                "timelines_in_memory": replica.core.in_memory(),
                "queued_requests": replica.proposer.queued,
                "chores": replica.chores.pending,
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
        self._fail_waiting("the node stops")
        if replica is not None:
            replica.core.mark_all()
        await asyncio.get_running_loop().run_in_executor(self._flusher, lambda: None)  # a flush under way ends first
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        self._flusher.shutdown()

    # ------------------------------------------------------------ engine and replica

    def _open(self) -> None:
        """Open the engine and begin a life."""
        identity = self._identity
        engine = self._open_engine(self._folder, not identity.formatted)
        try:
            self._check_identity(engine)
            engine.put(IDENTITY_KEY, self._identity_row())
            engine.commit()
            engine.sync()
            replica = Replica(
                replica=self.number,
                replicas=self._routing.topology.storage_replicas,
                life=(self.number, identity.incarnation, identity.boot),
                buckets=self._routing.topology.buckets,
                owned=self._routing.buckets_of_storage_group(self.group).tolist(),
                engine=engine,
                settings=self._settings,
                rng=self._random,
                wall_us=self._wall_us,
                counters=self.counters,
            )
        except Exception:
            engine.abandon()  # else its lock would keep every later life out
            raise
        self._engine, self._replica, self._failed = engine, replica, ""

    def _open_rocks(self, folder: Path, create: bool) -> DurableEngine:
        return RocksEngine(
            folder,
            create=create,
            cache_mb=self._config.engine_cache_mb,
            write_buffer_mb=self._config.engine_write_buffer_mb,
        )

    def _identity_row(self) -> bytes:
        return f"{self._identity.cluster_id} {self._identity.node} {self._identity.incarnation}".encode()

    def _check_identity(self, engine: DurableEngine) -> None:
        found = engine.get(IDENTITY_KEY)
        if found is None and self._identity.formatted:
            raise Corrupt(f"{self._folder} holds an empty database, but {self.name} has been formatted before")
        if found is not None and found != self._identity_row():
            raise Corrupt(
                f"{self._folder} holds the database of {found.decode()}, not of {self._identity_row().decode()}"
            )

    def _break(self, error: Exception) -> None:
        """The disk or the core failed: nothing in memory can be trusted. End this life, begin the next one."""
        expected = isinstance(error, EngineFailed)
        logger.error("%s ends this life: %s", self.name, error, exc_info=None if expected else error)
        self.counters.add("lives_ended_by_errors")
        self._replica, self._failed = None, str(error)
        self._fail_waiting(f"{self.name}: {error}")
        engine, self._engine = self._engine, None
        self._keep(self._reopen(engine))

    async def _reopen(self, failed: DurableEngine | None) -> None:
        if failed is not None:
            # In the flusher's thread, so that a flush under way ends before the engine closes.
            await asyncio.get_running_loop().run_in_executor(self._flusher, failed.abandon)
        while self._replica is None:
            await asyncio.sleep(REOPEN_S)
            try:
                await asyncio.to_thread(self._identity.begin_life)
                self._open()
            except Exception as error:
                # Whatever it was, it may pass, and a node that gave up would need somebody to notice.
                self._failed = str(error)
                logger.warning("%s can't begin its next life: %s", self.name, self._failed)
        self._plan_pump()

    # ------------------------------------------------------------ steps

    def _require_replica(self) -> Replica:
        if self._replica is None:
            raise Unavailable(f"{self.name} has failed: {self._failed}", retry_after_s=REOPEN_S)
        if not self._votes_allowed:
            raise Unavailable(f"{self.name} is joining", retry_after_s=0.2)
        return self._replica

    async def _wait(self, message: Message, step: Callable[[Replica, int], None]) -> Message:
        """Give a request to the replica and wait for its answer."""
        self._require_replica().require_voting()
        self._token = token = self._token + 1
        future: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._waiting[token] = future
        if isinstance(message, Write):
            self._writes.add(token)
        try:
            self._guard(lambda replica: step(replica, token), question=not isinstance(message, Write | Settle))
            return await future
        finally:
            self._waiting.pop(token, None)
            self._writes.discard(token)

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
        self._plan_pump()

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
            engine.commit()
        except Exception as error:
            self._break(error)
            return
        if not self._flushing and replica.waits_for_disk:
            self._flushing = True
            self._keep(self._flush(replica, engine))
        self._plan_timer(replica)

    def _send(self, replica: Replica, now: float) -> None:
        output = replica.take(now)
        for token, answer in output.replies:
            future = self._waiting.get(token)
            if future is not None and not future.done():
                future.set_result(answer)
        for peer, batch in output.peers:
            self._carrier.send(self._routing.topology.storage_node(self.group, peer), batch)

    async def _flush(self, replica: Replica, engine: DurableEngine) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._replica is replica and replica.waits_for_disk:
                batch = engine.commit()
                began = self._now()
                await loop.run_in_executor(self._flusher, engine.sync)
                self.counters.add("fsyncs")
                self.counters.add("fsync_us", int((self._now() - began) * 1e6))
                if self._replica is replica:
                    replica.durable(self._now(), batch)
                    self._send(replica, self._now())
        except Exception as error:
            if self._replica is replica:
                self._break(error)
        finally:
            self._flushing = False
        self._plan_pump()

    def _plan_timer(self, replica: Replica) -> None:
        loop = asyncio.get_running_loop()
        wait_s = max(replica.next_due() - self._now(), 0.0005)
        when = loop.time() + min(wait_s, 0.5)
        if self._timer is not None and not self._timer.cancelled() and loop.time() < self._timer.when() <= when:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = loop.call_at(when, self._pump)

    def _fail_waiting(self, reason: str) -> None:
        for token, future in self._waiting.items():
            if not future.done():
                kind = OutcomeUnknown if token in self._writes else Unavailable
                future.set_exception(kind(reason))

    def _keep(self, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ------------------------------------------------------------ background

    async def _do_chores(self) -> None:
        """Evict, purge: a slice of a few milliseconds at a time, half of the time at the most."""
        while True:
            more = False
            if self._replica is not None and self._votes_allowed:
                ends = self._now() + CHORE_SLICE_S
                try:
                    while self._now() < ends and (more := self._replica.run_chores(self._now())):
                        pass
                except Exception as error:
                    self._break(error)
                self._plan_pump()
            self._look_around()
            await asyncio.sleep(CHORE_SLICE_S if more else 0.1)

    def _look_around(self) -> None:
        """Note how much room the disk has, and the lengths of queues."""
        try:
            free_bytes = self._free_bytes(self._folder)
        except OSError as error:
            logger.warning("%s can't tell how full its disk is: %s", self.name, error)
            return
        self._disk_is_full = free_bytes < self._reserve_bytes
        self.counters.set("disk_free_bytes", free_bytes)
        replica = self._replica
        if replica is not None:
            self.counters.set("queued_requests", replica.proposer.queued)
            self.counters.set("queued_bytes", replica.proposer.queued_bytes)
            self.counters.set("timelines_in_memory", replica.core.in_memory())
            self.counters.set("chores", replica.chores.pending)

    def _disk_reason(self) -> str:
        return (
            f"less than {self._reserve_bytes >> 20} MiB of disk are free (storage.disk_reserve_mb): no writes are "
            "taken until there is room; reads go on"
        )

    @staticmethod
    def _without_writes(batch: PeerBatch) -> PeerBatch:
        """A peer's batch without what would be written. To a peer that is as if this replica did not answer."""
        kept: list[PeerMessage] = [message for message in batch.messages if not isinstance(message, WRITES)]
        return PeerBatch(batch.life, batch.incarnation_seen, batch.boot_seen, kept)

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
                    behind += await self._compare(replica, peer)
                    compared += 1
                except (CallError, TimeTierError) as error:
                    self._caught_up["reason"] = f"replica {peer}: {error}"
            complete = compared == len(replica.core.peers)
            self._caught_up["rounds"] += complete
            self._caught_up["behind"] = behind
            # Questions and answers get lost, and transfers are put off: what was behind is looked at again soon.
            interval_s = self._config.catch_up_interval_s
            pause_s = interval_s if complete and not behind else min(interval_s, 2.0)

    async def _compare(self, replica: Replica, peer: int) -> int:
        """Go through what a peer has. How many timelines it has more of."""
        node = self._routing.topology.storage_node(self.group, peer)
        bucket, cursor = 0, b""
        behind = 0
        while bucket >= 0 and self._replica is replica:
            answer = await self._carrier.call(node, AskChosen(bucket, cursor), 5.0)
            if not isinstance(answer, ChosenList):
                raise Unavailable(f"{node} answered with a {type(answer).__name__}: {getattr(answer, 'message', '')}")
            chosen = unpack_i64(answer.chosen)
            if len(chosen) != len(answer.timelines):
                raise ProtocolError(f"{node} answered {len(chosen)} versions of {len(answer.timelines)} timelines")
            for start in range(0, len(chosen), FETCHES_AT_ONCE):
                names = answer.timelines[start : start + FETCHES_AT_ONCE]
                fetched = self._note_behind(replica, peer, names, chosen[start : start + FETCHES_AT_ONCE])
                behind += fetched
                await asyncio.sleep(0.02 if fetched else 0)
            bucket, cursor = answer.next_bucket, answer.next_cursor
        return behind

    def _note_behind(self, replica: Replica, peer: int, names: list[bytes], chosen: list[int]) -> int:
        """Fetch what a peer has and this replica lacks. How many timelines are behind."""
        fetched = 0

        def compare(replica: Replica) -> None:
            nonlocal fetched
            now = self._now()
            for name, entries in zip(names, chosen, strict=True):
                fetched += replica.note_behind(now, peer, name, entries)

        if self._replica is replica:
            self._guard(compare)
        return fetched


def settings_of(config: StorageConfig) -> Settings:
    """The replica's settings from the configuration."""
    return Settings(
        timelines_in_memory=config.timelines_in_memory,
        request_id_entries=config.request_id_entries,
        log_keep_entries=config.log_keep_entries,
        max_queued_requests=config.max_queued_requests,
        max_queued_bytes=config.max_queued_mb << 20,
        accept_timeout_s=config.accept_timeout_ms / 1000,
        backoff_s=config.prepare_backoff_ms / 1000,
    )
