"""A reader in a model of storage and cold tier (`storage_model.py`), for tests."""

from __future__ import annotations

import random

from storage_model import World, key_of, topology
from timetier.cluster.cold.block import DecodedBlock
from timetier.cluster.cold.block_cache import BlockCache
from timetier.cluster.keys import item_key
from timetier.cluster.memory.page_cache import PageCache
from timetier.cluster.memory.reading import Reader
from timetier.cluster.memory.requests import ItemAnswer, PageAnswer, Read
from timetier.cluster.memory.steps import Job, ReaderSettings
from timetier.cluster.messages import Message
from timetier.cluster.routing import Routing

T = key_of("alice")
ALL_BYTES = 1 << 40
TIMEOUT_S = 5.0


class Bench:
    """A world and a reader in it."""

    def __init__(
        self, seed: int = 0, *, replicas: int = 3, budget_bytes: int = 1 << 20, settings: ReaderSettings | None = None
    ) -> None:
        self.world = World(seed, replicas=replicas)
        self.world.log(T)
        self.reader = Reader(
            Routing(topology(replicas)),
            PageCache(budget_bytes),
            BlockCache[DecodedBlock](1 << 20),
            clock=lambda: self.world.now,
            random=random.Random(seed),
            settings=settings or ReaderSettings(page_items=8),
        )

    def order(self, timeline: bytes = T) -> list[int]:
        """Replica numbers by priority."""
        names = Routing(topology(len(self.world.replicas))).storage_order(timeline)
        return [int(name.rpartition("-")[2]) for name in names]

    def page_read(self, limit: int = 5, before: bytes = b"", timeline: bytes = T) -> Read:
        return Read(timeline, before, limit, self.world.now + TIMEOUT_S, ALL_BYTES)

    def item_read(self, timestamp: int, timeline: bytes = T) -> Read:
        return Read(timeline, item_key(timestamp), 0, self.world.now + TIMEOUT_S)

    def start(self, *reads: Read) -> list[Job]:
        """One batch, without the jobs that it leaves."""
        step = self.world.drive(self.reader.batch(reads))
        assert all(read.answer is not None for read in step.done)
        return list(step.then)

    def run(self, *reads: Read) -> None:
        """A batch with all its jobs, in random order."""
        jobs = self.start(*reads)
        while jobs:
            job = jobs.pop(self.world.random.randrange(len(jobs)))
            jobs += self.world.drive(job.script).then
        assert all(read.answer is not None for read in reads), "a read was forgotten"

    def page(self, limit: int = 5, before: bytes = b"") -> PageAnswer:
        read = self.page_read(limit, before)
        self.run(read)
        assert isinstance(read.answer, PageAnswer), read.answer
        return read.answer

    def item(self, timestamp: int) -> ItemAnswer:
        read = self.item_read(timestamp)
        self.run(read)
        assert isinstance(read.answer, ItemAnswer), read.answer
        return read.answer

    def sent(self, kind: type[Message]) -> list[str]:
        """Nodes that were sent a kind of message since the last question; forgets all of them."""
        nodes = [node for node, message in self.world.sent if isinstance(message, kind)]
        self.world.sent.clear()
        return nodes
