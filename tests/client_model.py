"""A small faithful store behind the client: the nodes of one group, which answer from one dict over the memory carrier.

It keeps the contract of `Write`, `ReadPages` and `ReadItems` (request ids, seen versions, conditions, atomic entries),
and has none of the machinery behind it; so a test sees what the client makes of answers, refusals and silence.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from timetier.cluster.carriers.memory import MemoryNetwork
from timetier.cluster.client.faces import Store
from timetier.cluster.client.store import AsyncStore
from timetier.cluster.keys import split_item_key
from timetier.cluster.messages import (
    CONFLICT,
    DELETE,
    MISPLACED,
    OK,
    STALE,
    WIPE,
    FoundItems,
    Message,
    Pages,
    ReadItems,
    ReadPages,
    Status,
    StatusRequest,
    Write,
    Written,
    pack_i64,
    unpack_i64,
    unpack_u32,
)
from timetier.cluster.packed_items import Item
from timetier.cluster.topology import TablePolicy, Topology

POLICY = TablePolicy(per_second=1_000_000, cold_after=10**12, window=10**10)
REMEMBERED = 8  # entries whose request ids a timeline remembers


def make_topology(epoch: int = 1, *, groups: int = 1, caches: int = 1) -> Topology:
    """Shape of a small cluster with the table `moments`."""
    return Topology(
        cluster_id="c1",
        namespace="test",
        epoch=epoch,
        buckets=1024,
        storage_groups=groups,
        storage_replicas=3,
        cold_groups=1,
        cold_replicas=3,
        cold_disks=1,
        cache_nodes=caches,
        tables={"moments": POLICY},
        default_table=None,
        addresses={},
        secret="00" * 32,
    )


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Wait for a condition. Raises TimeoutError after `timeout_s` seconds."""
    async with asyncio.timeout(timeout_s):
        while True:
            if condition():
                return
            await asyncio.sleep(0.001)


class FixedSource:
    """A Router that hands out `later` once it is set."""

    def __init__(self) -> None:
        self.later: Topology | None = None
        self.calls = 0
        self.failure: Exception | None = None

    async def fetch(self, known_epoch: int, timeout_s: float) -> Topology | None:
        self.calls += 1
        if self.failure is not None:
            raise self.failure
        try:
            await until(lambda: self.later is not None and self.later.epoch > known_epoch, timeout_s)
        except TimeoutError:
            return None
        return self.later


@dataclass
class _Timeline:
    version: int = 0
    items: dict[bytes, tuple[bytes, int, int]] = field(default_factory=dict)
    ids: dict[bytes, int] = field(default_factory=dict)


Fault = Callable[[str, Message], Awaitable[Message | None]]
"""Takes (node, message) before the node does; what it returns is the answer, None lets the node answer itself."""


class ModelStore:
    """All nodes of a cluster on a `MemoryNetwork`. `log`: (node, message) as they came."""

    def __init__(self, topology: Topology) -> None:
        self.network = MemoryNetwork()
        self.timelines: dict[bytes, _Timeline] = {}
        self.log: list[tuple[str, Message]] = []
        self.fault: Fault | None = None
        self.epoch_needed = 0
        self.clock_us = 1_700_000_000_000_000
        for node in topology.node_names():
            self.network.register(node, self._door(node))

    def entries(self) -> int:
        """Number of entries in all timelines."""
        return sum(timeline.version for timeline in self.timelines.values())

    def revive(self, node: str) -> None:
        """Bring a killed node back."""
        self.network.register(node, self._door(node))

    def _door(self, node: str) -> Callable[[Message], Awaitable[Message | None]]:
        async def handle(message: Message) -> Message | None:
            self.log.append((node, message))
            if self.fault is not None:
                answer = await self.fault(node, message)
                if answer is not None:
                    return answer
            return self.answer(message)

        return handle

    def answer(self, message: Message) -> Message:
        """What a healthy node answers."""
        if isinstance(message, Write):
            return self._write(message)
        if isinstance(message, ReadPages):
            return self._pages(message)
        if isinstance(message, ReadItems):
            return self._items(message)
        assert isinstance(message, StatusRequest)
        return Status(b'{"state": "serving"}')

    def _write(self, message: Write) -> Written:
        outcomes, versions, low = bytearray(), [], 0
        columns = zip(unpack_i64(message.seen), unpack_i64(message.if_version), unpack_u32(message.counts), strict=True)
        for key, request_id, (seen, if_version, count) in zip(
            message.timelines, message.request_ids, columns, strict=True
        ):
            rows = slice(low, low + count)
            low += count
            timeline = self.timelines.setdefault(key, _Timeline())
            if message.epoch < self.epoch_needed:
                outcome, version = MISPLACED, 0
            elif request_id in timeline.ids and timeline.ids[request_id] > timeline.version - REMEMBERED:
                outcome, version = OK, timeline.ids[request_id]
            elif timeline.version - seen > REMEMBERED:
                outcome, version = STALE, timeline.version
            elif if_version not in (-1, timeline.version):
                outcome, version = CONFLICT, timeline.version
            else:
                outcome, version = OK, self._apply(timeline, request_id, message, rows)
            outcomes.append(outcome)
            versions.append(version)
        return Written(bytes(outcomes), pack_i64(versions))

    def _apply(self, timeline: _Timeline, request_id: bytes, message: Write, rows: slice) -> int:
        timeline.version += 1
        self.clock_us += 1
        timeline.ids[request_id] = timeline.version
        for kind, key, value in zip(message.kinds[rows], message.keys[rows], message.values[rows], strict=True):
            if kind == WIPE:
                timeline.items.clear()
            elif kind == DELETE:
                timeline.items.pop(key, None)
            else:
                timeline.items[key] = (value, timeline.version, self.clock_us)
        return timeline.version

    def _pages(self, message: ReadPages) -> Pages:
        pages: list[list[Item]] = []
        timeline_versions, more = [], bytearray()
        limits = unpack_u32(message.limits)
        for key, before, limit in zip(message.timelines, message.before, limits, strict=True):
            timeline = self.timelines.get(key, _Timeline())
            keys = sorted((k for k in timeline.items if not before or k < before), reverse=True)
            pages.append([_item(item_key, timeline.items[item_key]) for item_key in reversed(keys[:limit])])
            timeline_versions.append(timeline.version)
            more.append(len(keys) > limit)
        return Pages(bytes(len(pages)), pack_i64(timeline_versions), bytes(more), pages)

    def _items(self, message: ReadItems) -> FoundItems:
        timelines = [self.timelines.get(key, _Timeline()) for key in message.timelines]
        items = [
            _item(key, timeline.items[key]) if key in timeline.items else None
            for timeline, key in zip(timelines, message.keys, strict=True)
        ]
        return FoundItems(bytes(len(items)), pack_i64([timeline.version for timeline in timelines]), items)


def _item(key: bytes, stored: tuple[bytes, int, int]) -> Item:
    timestamp, item_id = split_item_key(key)
    value, version, written_us = stored
    return Item(timestamp, value, item_id, version, written_us)


def open_store(fault: Fault | None = None) -> tuple[Store, ModelStore]:
    """A synchronous store, and the model behind it, which lives on the store's thread."""
    models: list[ModelStore] = []

    async def connect() -> AsyncStore:
        model = ModelStore(make_topology())
        model.fault = fault
        models.append(model)
        return AsyncStore(model.network.carrier("client"), make_topology(), FixedSource())

    return Store.open(connect), models[0]
