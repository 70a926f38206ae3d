"""Ten times what nodes can hold is offered to them, from many sides and for seconds: each is a process of its own.

Their memory stays under their budgets, the rest is refused with a hint, nothing acknowledged is lost, and afterwards
they are as fast as before.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random
from typing import Any

from read_answers import values_of
from timetier.benchmarks.nodes import SECRET, NodeProcesses, topology_in
from timetier.cluster.carriers.base import CallError
from timetier.cluster.carriers.direct import DirectCarrier, host_id
from timetier.cluster.client.scripts import ItemQueries, ItemQuery, ItemResult, WriteRequest, read_items, write
from timetier.cluster.client.view import View
from timetier.cluster.config import CacheConfig, Config, StorageConfig, TableConfig
from timetier.cluster.drive import drive
from timetier.cluster.keys import item_key, timeline_key
from timetier.cluster.messages import (
    OK,
    PUT,
    UNAVAILABLE,
    Failure,
    Message,
    Pages,
    ReadPages,
    Status,
    StatusRequest,
    Write,
    Written,
    pack_i64,
    pack_u32,
)
from timetier.cluster.topology import Topology

MIB = 1 << 20
BUCKETS = 64
QUEUED_MB = 8
VALUE = Random(1).randbytes(100_000)
WRITES_AT_ONCE = 10 * (QUEUED_MB << 20) // len(VALUE)
READERS = 60
PAGE_ITEMS = 30
STORM_S = 6.0
CONFIG = Config(
    buckets=BUCKETS,
    storage=StorageConfig(
        timelines_in_memory=20_000, max_queued_mb=QUEUED_MB, engine_cache_mb=16, engine_write_buffer_mb=8
    ),
    cache=CacheConfig(budget_mb=32, block_cache_mb=0, max_queued_mb=QUEUED_MB),
    tables={"t": TableConfig()},
)
BIG = timeline_key(b"t", b"big", BUCKETS)


@contextlib.asynccontextmanager
async def carrier_to(topology: Topology) -> AsyncIterator[DirectCarrier]:
    carrier = DirectCarrier(bytes.fromhex(SECRET), host_id=host_id())
    carrier.update(topology.addresses)
    try:
        yield carrier
    finally:
        await carrier.close()


class Storm:
    """Writers and readers that don't wait for one another. `outcomes`: how often each thing was the answer."""

    def __init__(self, topology: Topology, carriers: list[DirectCarrier]) -> None:
        self.storage = [topology.storage_node(0, replica) for replica in range(3)]
        self.cache = topology.cache_node(0, 0)
        self.carriers = carriers
        self.ends_at = time.monotonic() + STORM_S
        self.outcomes: Counter[str] = Counter()
        self.acknowledged: list[bytes] = []
        self.requests = 0

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(WRITES_AT_ONCE):
                group.create_task(self.write_on(number))
            for number in range(READERS):
                group.create_task(self.read_on(number))

    async def write_on(self, number: int) -> None:
        carrier, node = self.carriers[number % len(self.carriers)], self.storage[number % 3]
        while time.monotonic() < self.ends_at:
            self.requests += 1
            timeline = timeline_key(b"t", b"owner-%d" % self.requests, BUCKETS)
            request_id = self.requests.to_bytes(16, "big")
            columns = [item_key(1)], [VALUE]
            message = Write(
                1, [timeline], [request_id], pack_i64([0]), pack_i64([-1]), pack_u32([1]), bytes((PUT,)), *columns, 8000
            )
            answer = await self.call(carrier, node, message)
            if isinstance(answer, Written):
                self.outcomes[f"written {answer.outcomes[0]}"] += 1
                if answer.outcomes[0] == OK:
                    self.acknowledged.append(timeline)

    async def read_on(self, number: int) -> None:
        carrier = self.carriers[number % len(self.carriers)]
        node = [self.cache, *self.storage][number % 4]
        while time.monotonic() < self.ends_at:
            answer = await self.call(carrier, node, ReadPages(1, [BIG], [b""], pack_u32([PAGE_ITEMS]), 8000))
            if isinstance(answer, Pages):
                assert answer.outcomes[0] in (OK, UNAVAILABLE)
                self.outcomes[f"read {answer.outcomes[0]}"] += 1
                assert answer.outcomes[0] != OK or {item.value for item in answer.items[0]} == {VALUE}

    async def call(self, carrier: DirectCarrier, node: str, message: Message) -> Message | None:
        """The answer; None when there is none, or when it is a refusal, which must say when to come back."""
        try:
            answer = await carrier.call(node, message, 10.0)
        except CallError as error:
            self.outcomes["not sent" if not error.sent else "no answer"] += 1
            await asyncio.sleep(0.05)
            return None
        if isinstance(answer, Failure):
            assert answer.kind == "Unavailable", answer
            hint_s = answer.fields.get("retry_after_s")
            assert isinstance(hint_s, float) and hint_s > 0, answer
            self.outcomes["refused"] += 1
            await asyncio.sleep(hint_s)
            return None
        return answer


class Client:
    """One well-behaved client."""

    def __init__(self, topology: Topology, carrier: DirectCarrier) -> None:
        self.view = View(topology, now=time.monotonic, random=Random(1))
        self.carrier = carrier
        self.number = 0

    async def write(self, timeline: bytes, keys: list[bytes]) -> None:
        request = WriteRequest(timeline, bytes((PUT,)) * len(keys), keys, [VALUE] * len(keys))
        (version,) = await drive(write(self.view, [request], 10), self.carrier)
        assert isinstance(version, int), version

    async def missing(self, timelines: list[bytes]) -> list[bytes]:
        found: list[Any] = []
        for start in range(0, len(timelines), 100):
            queries = [ItemQuery(timeline, item_key(1)) for timeline in timelines[start : start + 100]]
            found += (await drive(read_items(self.view, ItemQueries.of(queries), 10), self.carrier)).rows()
        assert all(isinstance(result, ItemResult) for result in found), [f for f in found if not hasattr(f, "item")][:1]
        values = values_of(result.item for result in found)
        return [timeline for timeline, value in zip(timelines, values, strict=True) if value != VALUE]

    async def latency_s(self) -> float:
        """Median of a few writes and reads, one after the other."""
        times = []
        for _ in range(15):
            self.number += 1
            timeline = timeline_key(b"t", b"calm-%d" % self.number, BUCKETS)
            began = time.monotonic()
            await self.write(timeline, [item_key(1)])
            assert await self.missing([timeline]) == []
            times.append(time.monotonic() - began)
        return statistics.median(times)

    async def status(self, node: str) -> dict[str, Any]:
        answer = await self.carrier.call(node, StatusRequest(), 5.0)
        assert isinstance(answer, Status)
        return dict(json.loads(answer.body))


def test_ten_times_what_nodes_can_hold_is_refused_with_a_hint_and_does_no_harm() -> None:
    async def body(folder: Path) -> None:
        topology = topology_in(folder, CONFIG)
        async with contextlib.AsyncExitStack() as stack:
            client = Client(topology, await stack.enter_async_context(carrier_to(topology)))
            await client.write(timeline_key(b"t", b"first", BUCKETS), [item_key(1)])
            for start in range(0, PAGE_ITEMS, 10):
                await client.write(BIG, [item_key(at) for at in range(start, start + 10)])
            calm_s = await client.latency_s()
            carriers = [await stack.enter_async_context(carrier_to(topology)) for _ in range(6)]
            storm = Storm(topology, carriers)
            await storm.run()
            statuses = {node: await client.status(node) for node in [*storm.storage, storm.cache]}
            report = {node: (status["peak_mb"], status["budget_mb"]) for node, status in statuses.items()}
            print(f"{storm.requests} writes offered, outcomes {dict(storm.outcomes)}, (peak, budget) MiB: {report}")
            assert all(peak <= budget for peak, budget in report.values()), report
            assert storm.outcomes["refused"] > 0
            assert storm.outcomes["written 0"] > 0, "and what there is room for is served"
            assert storm.outcomes["read 0"] > 0
            assert await client.missing(storm.acknowledged) == []
            deadline = time.monotonic() + 15
            while (after_s := await client.latency_s()) > 3 * calm_s + 0.05:
                assert time.monotonic() < deadline, f"a write and a read took {calm_s:.3f} s, now {after_s:.3f} s"
            assert all(status["state"] in ("voting", "serving") for status in statuses.values())

    with (
        tempfile.TemporaryDirectory(prefix="tt") as folder,  # paths of Unix sockets must be short
        NodeProcesses(Path(folder), CONFIG, tiers=("storage", "cache")),
    ):
        asyncio.run(asyncio.wait_for(body(Path(folder)), 120))
