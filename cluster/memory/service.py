"""The memory tier's node: takes reads of one storage group, merges them, answers them by strong reads.

Reads that a page in memory covers are answered from it once the page is proven to be current: one proof at a time, for
all that came meanwhile. What has changed gets its deltas through the fast lane, what is not in memory goes through the
fill lane, which fetches pages. What one round trip can't answer (a dead replica, an open entry, cold
blocks) goes on as a job of its own, a bounded number of them at a time. A node with a budget of 0 keeps no pages and
serves the same reads; so do storage nodes while no cache node is up.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from typing import Any

from ..carriers.base import Carrier, Reply, at_fast_door, still_wanted
from ..cold.block import DecodedBlock
from ..cold.block_cache import BlockCache
from ..counters import Counters
from ..drive import Running, drive
from ..effects import Script
from ..errors import InvalidRequest, TimeTierError, TooLarge, Unavailable
from ..gate import overloaded
from ..keys import MAX_BATCH_ITEMS, MIN_ITEM_KEY_BYTES
from ..messages import (
    INVALID,
    MISPLACED,
    OK,
    AskHeld,
    AskReads,
    Message,
    Ping,
    Pong,
    ReadItems,
    ReadPages,
    Status,
    StatusRequest,
    unpack_u32,
)
from ..routing import Routing
from ..topology import Topology
from .columns import (
    MAX_ANSWER_BYTES,
    MAX_KEY_BYTES,
    Glance,
    ItemGlance,
    PageGlance,
    answer_bytes,
    is_page_read,
)
from .lanes import ReadLane, ReadLimits
from .looks import Looks
from .page_cache import PageCache
from .pages import Page
from .proving import ProofLane, Told
from .reading import Reader
from .requests import Read
from .shared_reads import SharedBlockReads
from .steps import Job, ReaderSettings, Step
from .tickets import Ticket

_log = logging.getLogger(__name__)

MAX_TIMEOUT_S = 60.0
_MIN_PAGE_BYTES = 256 << 10
_FILL_BATCHES = 4
_MAX_BATCHES = 16
_MAX_JOBS = 128


class CacheService:
    """Implements `Service`: answers `ReadPages` and `ReadItems` for the timelines of one storage group."""

    def __init__(
        self,
        name: str,
        group: int,
        topology: Topology,
        carrier: Carrier,
        *,
        budget_bytes: int,
        page_items: int = 64,
        block_cache_bytes: int = 64 << 20,
        max_queued_requests: int = 50_000,
        max_queued_bytes: int = 256 << 20,
        counters: Counters | None = None,
        seed: int = 0,
        settings: ReaderSettings | None = None,
        limits: ReadLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_us: Callable[[], int] = lambda: time.time_ns() // 1_000,
    ) -> None:
        """`budget_bytes`: memory for pages; 0 keeps none. `max_queued_requests`: reads in this node at a time, beyond
        which it refuses with `Unavailable`; `max_queued_bytes`: of answers that wait for the rest of their message,
        beyond which a read fails. `settings` overrides all other times and limits; `page_items` goes into
        them when they are not given. `limits`: of the lanes. `clock`: monotonic seconds. `wall_us`: microseconds since
        1970, for statistics alone. Raises InvalidRequest.
        """
        for argument, value in (("budget_bytes", budget_bytes), ("block_cache_bytes", block_cache_bytes)):
            if value < 0:
                raise InvalidRequest(f"{argument}={value}: pass 0 or more bytes")
        if max_queued_requests < 1 or not 1 <= page_items <= MAX_BATCH_ITEMS:
            raise InvalidRequest(
                f"max_queued_requests={max_queued_requests}, page_items={page_items}: pass 1 or more, "
                f"and at most {MAX_BATCH_ITEMS} page_items"
            )
        self.name = name
        self.group = group
        self.counters = counters or Counters()
        self._clock = clock
        self._topology = topology
        self._routing = Routing(topology)
        self._cache = PageCache(budget_bytes)
        self._blocks: BlockCache[DecodedBlock] = BlockCache(block_cache_bytes)
        self._reader = Reader(
            self._routing,
            self._cache,
            self._blocks,
            clock=clock,
            random=random.Random(seed),
            settings=settings or ReaderSettings(page_items=page_items),
            counters=self.counters,
        )
        self._looks = Looks(
            self._cache,
            lambda table: self._topology.policy(table),
            clock=clock,
            wall_us=wall_us,
            random=random.Random(seed),
        )
        self._limits = limits or ReadLimits()
        self._carrier = SharedBlockReads(carrier, most=self._limits.block_reads, counters=self.counters)
        self._max_queued_requests = max_queued_requests
        self._max_queued_bytes = max_queued_bytes
        self._open = 0  # reads without an answer yet
        self._answer_bytes = 0  # of answers that are not from pages in memory
        self._serving = True
        self._tickets: set[Ticket] = set()
        self._proofs = ProofLane(
            self._begin_proof,
            parallel=1,
            batch_pages=self._limits.batch_reads,
            max_batches=_MAX_BATCHES,
            stall_s=self._limits.stall_s,
        )
        self._fast = ReadLane(
            self._run_fast_batch,
            parallel=1,
            batch_reads=self._limits.batch_reads,
            max_batches=_MAX_BATCHES,
            stall_s=self._limits.stall_s,
            one_per_timeline=False,
        )
        self._fill = ReadLane(
            self._run_fill_batch,
            parallel=_FILL_BATCHES,
            batch_reads=self._limits.fetch_reads,
            max_batches=self._limits.max_fetches,
            stall_s=self._limits.stall_s,
            one_per_timeline=True,
        )
        self._jobs: deque[Job] = deque()
        self._heavy_jobs: deque[Job] = deque()
        self._job_tasks: set[asyncio.Task[None]] = set()
        self._heavy_tasks: set[asyncio.Task[None]] = set()

    # ------------------------------------------------------------ as a Service

    async def start(self) -> None:
        """Nothing to open: the memory tier begins empty."""

    async def handle(self, message: Message) -> Message | None:
        """Answer one message. Raises Unavailable when too much is queued, InvalidRequest for other messages."""
        if isinstance(message, ReadItems | ReadPages):
            return await at_fast_door(self.begin, message)
        if isinstance(message, StatusRequest):
            return Status(json.dumps(self.status()).encode())
        if isinstance(message, Ping):
            return Pong()
        if isinstance(message, AskReads | AskHeld):
            return await self._looks.answer(message)
        raise InvalidRequest(f"{self.name} is a cache node: it takes no {type(message).__name__} messages")

    def begin(self, message: Message, reply: Reply) -> bool:
        """The fast door, for reads: those that pages in memory answer need no task. Raises what `handle` does."""
        if isinstance(message, ReadItems):
            self._begin_items(message, reply)
            return True
        if isinstance(message, ReadPages):
            self._begin_pages(message, reply)
            return True
        return False

    def update(self, topology: Topology) -> None:
        """Go by a later topology."""
        if topology.epoch > self._topology.epoch:
            if topology.storage_groups != self._topology.storage_groups:
                self._cache.clear()  # pages of buckets that belong to another group by now
            self._topology = topology
            self._routing = Routing(topology)
            self._reader.update(self._routing)
            self._looks.read_ages.forget_policies()

    def status(self) -> dict[str, Any]:
        """State and figures."""
        self._measure()
        return {
            "name": self.name,
            "state": "serving" if self._serving else "stopped",
            "reason": "",
            "group": self.group,
            "epoch": self._topology.epoch,
            "suspected": self._reader.suspicion.names(),
            "counters": self.counters.read(),
        }

    async def stop(self) -> None:
        """Give up all reads; those that wait get Unavailable."""
        self._serving = False
        self._jobs.clear()
        self._heavy_jobs.clear()
        self._proofs.stop()
        for ticket in list(self._tickets):
            ticket.end()
        tasks = [*self._job_tasks, *self._heavy_tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._fast.stop()
        await self._fill.stop()
        await self._carrier.close()

    def _measure(self) -> None:
        counters = self.counters
        counters.set("bytes", self._cache.nbytes)
        counters.set("entries", len(self._cache))
        counters.set("block_bytes", self._blocks.nbytes)
        counters.set("evictions", self._cache.evictions)
        counters.set("queue", self._open)
        counters.set("answer_bytes", self._answer_bytes)

    # ------------------------------------------------------------ requests

    def _begin_pages(self, message: ReadPages, reply: Reply) -> None:
        timelines, bounds, limits = message.timelines, message.before, unpack_u32(message.limits)
        count = self._check_columns(timelines, bounds, limits)
        deadline = self._deadline(message.timeout_ms)
        max_bytes = max(_MIN_PAGE_BYTES, MAX_ANSWER_BYTES // 2 // max(count, 1))
        glance = PageGlance(self._cache, timelines, bounds, limits)
        wanted = still_wanted(reply)
        reads: dict[int, Read] = {}
        reply = self._looks.see_pages(reply, timelines, glance, bounds, limits, reads)

        def proven() -> None:
            outcomes = self._place(timelines, glance.rest)
            for index in glance.rest:
                if outcomes[index] == OK and not is_page_read(bounds[index], limits[index]):
                    outcomes[index] = INVALID
                if outcomes[index] == OK:
                    reads[index] = Read(timelines[index], bounds[index], limits[index], deadline, max_bytes)
            self._answer_all(reads, deadline, reply, lambda: glance.answer(outcomes, reads, max_bytes), wanted)

        self._prove(glance, reply, proven)

    def _begin_items(self, message: ReadItems, reply: Reply) -> None:
        timelines, keys = message.timelines, message.keys
        self._check_columns(timelines, keys)
        deadline = self._deadline(message.timeout_ms)
        glance = ItemGlance(self._cache, timelines, keys)
        wanted = still_wanted(reply)

        def proven() -> None:
            reads: dict[int, Read] = {}
            outcomes = self._place(timelines, glance.rest)
            for index in glance.rest:
                if outcomes[index] == OK and not MIN_ITEM_KEY_BYTES <= len(keys[index]) <= MAX_KEY_BYTES:
                    outcomes[index] = INVALID
                if outcomes[index] == OK:
                    reads[index] = Read(timelines[index], keys[index], 0, deadline)
            self._answer_all(reads, deadline, reply, lambda: glance.answer(outcomes, reads), wanted)

        self._prove(glance, reply, proven)
        self._looks.see_items(timelines, keys)  # while the proof is under way

    @staticmethod
    def _check_columns(timelines: list[bytes], *columns: Sequence[object]) -> int:
        count = len(timelines)
        if count > MAX_BATCH_ITEMS:
            raise TooLarge(f"{count} requests in a message, the limit is {MAX_BATCH_ITEMS}", limit=MAX_BATCH_ITEMS)
        if any(len(column) != count for column in columns):
            raise InvalidRequest(f"columns of a message differ in length: {count}, {[len(c) for c in columns]}")
        return count

    def _place(self, timelines: list[bytes], indices: list[int]) -> bytearray:
        """An outcome per timeline, at these indices OK, INVALID or MISPLACED. A bad one must not reach a batch that
        others share."""
        outcomes = bytearray(len(timelines))
        if not indices:
            return outcomes
        good = []
        for index in indices:
            if _is_timeline(timelines[index]):
                good.append(index)
            else:
                outcomes[index] = INVALID
        groups = self._routing.storage_groups([timelines[index] for index in good])
        for index, group in zip(good, groups, strict=True):
            if group != self.group:
                outcomes[index] = MISPLACED
        return outcomes

    def _deadline(self, timeout_ms: int) -> float:
        return self._clock() + min(max(timeout_ms, 1) / 1000, MAX_TIMEOUT_S)

    def _prove(self, glance: Glance, reply: Reply, then: Callable[[], None]) -> None:
        """Prove the pages that cover reads of a message, and go on; those of the others are left to the long way."""
        count = len(glance.pages)
        self.counters.add("requests")
        self.counters.add("items", count)
        if not self._serving:
            raise Unavailable(f"{self.name} is stopping")
        if self._open + count > self._max_queued_requests:
            self.counters.add("refused", count)
            raise overloaded(f"{self.name} has {self._open} reads under way, the limit is {self._max_queued_requests}")
        covered = count - len(glance.rest)
        if not covered:
            then()
            return
        self._open += count

        def told(unproven: Collection[Page]) -> None:
            self._open -= count
            self.counters.add("hits", covered - glance.drop(unproven))
            try:
                then()
            except Exception as error:
                reply(error)

        self._proofs.prove(glance.covered(), told)

    def _begin_proof(self, pages: list[Page], tell: Told) -> Running[list[int]]:
        """Ask whether pages are current, and tell those of which that could not be proven."""

        def done(running: Running[list[int]]) -> None:
            try:
                indices = running.result()
            except Exception as error:
                _log.warning("%s: pages could not be proven to be current: %r", self.name, error)
                tell(pages)
                return
            if self._reader.suspicion:
                self._jobs.extend(self._reader.probes())
                self._start_jobs()
            tell([pages[index] for index in indices])

        running = Running(self._reader.prove(pages, self.group), self._carrier, done)
        running.start()
        return running

    def _answer_all(
        self,
        reads: Mapping[int, Read],
        deadline: float,
        reply: Reply,
        answer: Callable[[], Message],
        wanted: Callable[[], bool],
    ) -> None:
        """Have the reads of a message answered, as far as that is possible before the deadline; then reply.

        `wanted`: whether whoever asked is still there."""
        if not reads:
            reply(answer())
            return
        if not self._serving:
            reply(Unavailable(f"{self.name} is stopping"))
            return

        def over(ticket: Ticket) -> None:
            self._tickets.discard(ticket)
            if ticket.left:
                self.counters.add("timeouts", ticket.left)
            try:
                reply(answer())
            except Exception as error:
                reply(error)
            self._answer_bytes -= ticket.nbytes

        self._open += len(reads)
        self._tickets.add(Ticket(list(reads.values()), over, deadline - self._clock(), wanted))
        is_resident = self._reader.is_resident
        fast: list[Read] = []
        fill: list[Read] = []
        for read in reads.values():
            (fast if is_resident(read) else fill).append(read)
        if fast:
            self._fast.put(fast)
        if fill:
            self._fill.put(fill)

    # ------------------------------------------------------------ batches and jobs

    async def _run_fast_batch(self, reads: list[Read]) -> None:
        await self._run(self._reader.batch(reads), reads, counted=False)

    async def _run_fill_batch(self, reads: list[Read]) -> None:
        wanted = [read for read in reads if self._is_wanted(read)]
        if wanted:
            await self._run(self._reader.batch(wanted), wanted, counted=True)

    def _is_wanted(self, read: Read) -> bool:
        """Whether somebody still waits for a read. Behind many others it may have waited until its deadline, and to
        fetch what nobody waits for would have the next ones wait, too."""
        if read.wanted():
            return True
        self.counters.add("abandoned")
        self._give_up([read], Unavailable("its deadline has passed"))
        return False

    async def _run(self, script: Script[Step], reads: list[Read], *, counted: bool) -> None:
        """Carry out a script for `reads`. Raises nothing but cancellation; every read gets an answer or goes on.

        `counted`: answers take memory of their own, beside the pages that are kept.
        """
        try:
            step = await drive(script, self._carrier)
        except asyncio.CancelledError:
            self._give_up(reads, Unavailable(f"{self.name} is stopping"))
            raise
        except Exception as error:
            if not isinstance(error, TimeTierError):
                _log.exception("%s: a read failed in an unforeseen way", self.name)
            self._give_up(
                reads, error if isinstance(error, TimeTierError) else Unavailable(f"internal error: {error!r}")
            )
            return
        for read in step.done:
            if counted:
                self._count_answer(read)
            self._done(read)
        for job in step.then:
            (self._heavy_jobs if job.heavy else self._jobs).append(job)
        self._start_jobs()
        self._measure()

    def _give_up(self, reads: list[Read], error: TimeTierError) -> None:
        for read in reads:
            if read.answer is None:
                read.answer = error
            self._done(read)

    def _count_answer(self, read: Read) -> None:
        """Count an answer until its message is answered, or drop it if there is no room for it."""
        ticket, size = read.ticket, answer_bytes(read)
        if not isinstance(ticket, Ticket) or ticket.is_over or not size:
            return
        if ticket.nbytes + size > MAX_ANSWER_BYTES or self._answer_bytes + size > self._max_queued_bytes:
            self.counters.add("refused")
            read.answer = overloaded(f"{self.name} holds {self._answer_bytes} bytes of answers already")
            return
        ticket.nbytes += size
        self._answer_bytes += size

    def _done(self, read: Read) -> None:
        ticket = read.ticket
        if isinstance(ticket, Ticket):
            read.ticket = None
            self._open -= 1
            ticket.one_done()

    def _start_jobs(self) -> None:
        for jobs, tasks, most in (
            (self._jobs, self._job_tasks, _MAX_JOBS),
            (self._heavy_jobs, self._heavy_tasks, self._limits.max_heavy_jobs),
        ):
            while jobs and len(tasks) < most and self._serving:
                job = jobs.popleft()
                if job.reads and not any(read.wanted() for read in job.reads):
                    self.counters.add("abandoned", len(job.reads))
                    job.script.close()
                    self._give_up(job.reads, Unavailable("nobody waits for it any more"))
                    continue
                task = asyncio.create_task(self._run_job(job))
                tasks.add(task)
                task.add_done_callback(self._job_finished)

    def _run_job(self, job: Job) -> Coroutine[Any, Any, None]:
        return self._run(job.script, job.reads, counted=True)

    def _job_finished(self, task: asyncio.Task[None]) -> None:
        self._job_tasks.discard(task)
        self._heavy_tasks.discard(task)
        self._start_jobs()


def _is_timeline(key: bytes) -> bool:
    """Whether the bytes have the form of a timeline key."""
    if len(key) < 6:
        return False
    end = 5 + key[4]
    return len(key) > end and len(key) == end + 1 + key[end]
