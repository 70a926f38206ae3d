"""The cache node over the memory carrier: merging, bounds, refusals, and real storage replicas behind it."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from read_answers import keys_of, travelled, values_of
from storage_cluster import BUCKETS as CLUSTER_BUCKETS
from storage_cluster import StorageCluster, wait_for
from storage_model import World, key_of, topology
from timetier.cluster.carriers.base import CallError
from timetier.cluster.carriers.memory import MemoryNetwork
from timetier.cluster.errors import InvalidRequest, TooLarge, Unavailable
from timetier.cluster.keys import item_key, timeline_key
from timetier.cluster.memory.lanes import ReadLimits
from timetier.cluster.memory.service import CacheService
from timetier.cluster.memory.shared_reads import SharedBlockReads
from timetier.cluster.memory.steps import ReaderSettings
from timetier.cluster.messages import (
    INVALID,
    MISPLACED,
    OK,
    UNAVAILABLE,
    BlockBytes,
    BlockRead,
    Check,
    FoundItems,
    Message,
    Pages,
    ReadItems,
    ReadPages,
    Status,
    StatusRequest,
    Write,
    pack_u32,
    unpack_i64,
)
from timetier.cluster.packed_items import Item
from timetier.cluster.routing import Routing

T = key_of("alice")


class Node:
    """A `CacheService` on a network whose replicas are those of a model. `gate` holds up all storage answers."""

    def __init__(self, *, groups: int = 1, **options: Any) -> None:
        self.world = World(1)
        self.world.log(T)
        self.network = MemoryNetwork()
        self.gate = asyncio.Event()
        self.gate.set()
        self.messages: list[Message] = []
        for replica in self.world.replicas:
            self.network.register(replica.name, self._handler(partial(self.world.answer, replica)))
        for node in self.world.cold:
            self.network.register(node.name, self._handler(partial(self.world.cold_answer, node)))
        options = {"budget_bytes": 1 << 20, "page_items": 8, **options}
        self.service = CacheService("cache-0-0", 0, topology(groups=groups), self.network.carrier("cache"), **options)

    def _handler(self, answer: Callable[[Message], Message]) -> Callable[[Message], Awaitable[Message]]:
        async def handle(message: Message) -> Message:
            self.messages.append(message)
            await self.gate.wait()
            return answer(message)

        return handle

    def sent(self, kind: type[Message]) -> list[Any]:
        return [message for message in self.messages if isinstance(message, kind)]

    async def pages(self, *timelines: bytes, limit: int = 5, before: bytes = b"", timeout_ms: int = 2000) -> Pages:
        count = len(timelines)
        message = ReadPages(1, list(timelines), [before] * count, pack_u32([limit] * count), timeout_ms)
        reply = await self.service.handle(message)
        assert isinstance(reply, Pages)
        return travelled(reply)

    async def items(self, *timestamps: int, timeline: bytes = T, timeout_ms: int = 2000) -> FoundItems:
        keys = [item_key(timestamp) for timestamp in timestamps]
        reply = await self.service.handle(ReadItems(1, [timeline] * len(keys), keys, timeout_ms))
        assert isinstance(reply, FoundItems)
        return travelled(reply)


async def until(condition: Callable[[], bool]) -> None:
    await wait_for(condition, "the state that the test needs")


def test_pages_and_items_come_back_in_the_order_of_the_request() -> None:
    async def main() -> None:
        node = Node()
        other = key_of("bob")
        for timestamp in range(4):
            node.world.put(T, timestamp, b"a%d" % timestamp)
        node.world.put(other, 9, b"b")
        pages = await node.pages(T, other, T, limit=2)
        assert pages.outcomes == bytes((OK, OK, OK))
        assert pages.more == bytes((1, 0, 1))
        assert unpack_i64(pages.timeline_versions) == [4, 1, 4]
        assert [values_of(page) for page in pages.items] == [[b"a2", b"a3"], [b"b"], [b"a2", b"a3"]]
        assert keys_of(pages.items[0]) == [item_key(2), item_key(3)]
        items = await node.items(2, 77, 0)
        assert items.items == [Item(2, b"a2", b"", 3, 1003), None, Item(0, b"a0", b"", 1, 1001)]
        await node.service.stop()

    asyncio.run(main())


def test_reads_that_arrive_while_a_batch_is_in_flight_form_the_next_one() -> None:
    async def main() -> None:
        node = Node()
        node.world.put(T, 1)
        await node.pages(T)
        node.messages.clear()
        node.gate.clear()
        reads = [asyncio.create_task(node.pages(T)) for _ in range(20)]
        await until(lambda: len(node.messages) == 2)
        node.gate.set()
        await asyncio.gather(*reads)
        assert len(node.sent(Check)) <= 3, "20 callers, but at most three batches"
        for task in reads:
            assert task.result().outcomes == bytes((OK,))
        totals = node.service.counters.totals
        assert totals["requests"] == totals["items"] == 21 and totals["batches"] <= 4
        await node.service.stop()

    asyncio.run(main())


def test_a_read_never_shares_an_answer_that_was_asked_for_before_it_arrived() -> None:
    async def main() -> None:
        node = Node()
        node.world.put(T, 1, b"old")
        await node.pages(T)
        for _ in range(20):
            node.gate.clear()
            early = asyncio.create_task(node.pages(T))
            node.messages.clear()
            await until(lambda: len(node.messages) == 2)
            version = node.world.put(T, 1, b"new")
            late = asyncio.create_task(node.pages(T))
            await asyncio.sleep(0)
            node.gate.set()
            await early
            assert unpack_i64((await late).timeline_versions)[0] >= version
        await node.service.stop()

    asyncio.run(main())


def test_one_fetch_at_a_time_per_timeline_serves_all_that_wait_for_it() -> None:
    async def main() -> None:
        node = Node()
        for timestamp in range(30):
            node.world.put(T, timestamp)
        node.gate.clear()
        reads = [asyncio.create_task(node.pages(T)) for _ in range(50)]
        await until(lambda: len(node.messages) >= 2)
        await asyncio.sleep(0.05)
        assert len(node.sent(Check)) == 1, "the others wait for that page"
        node.gate.set()
        for reply in await asyncio.gather(*reads):
            assert [len(page) for page in reply.items] == [5]
        assert len(node.sent(Check)) <= 3
        await node.service.stop()

    asyncio.run(main())


def test_a_full_queue_refuses_with_a_hint_and_serves_again_afterwards() -> None:
    async def main() -> None:
        node = Node(max_queued_requests=10)
        node.world.put(T, 1)
        node.gate.clear()
        waiting = [asyncio.create_task(node.items(1, 2)) for _ in range(5)]
        await asyncio.sleep(0)
        with pytest.raises(Unavailable) as refusal:
            await node.items(1)
        assert refusal.value.retry_after_s is not None and refusal.value.retry_after_s > 0
        node.gate.set()
        await asyncio.gather(*waiting)
        assert None not in (await node.items(1)).items
        assert node.service.status()["counters"]["queue"] == 0
        assert node.service.counters.totals["refused"] == 1
        await node.service.stop()

    asyncio.run(main())


def test_a_deadline_ends_a_read_and_nothing_of_it_stays_behind() -> None:
    async def main() -> None:
        node = Node()
        node.world.put(T, 1)
        for replica in node.world.replicas:
            node.network.hold("cache", replica.name)
        loop = asyncio.get_running_loop()
        began = loop.time()
        reply = await node.items(1, timeout_ms=100)
        assert reply.outcomes == bytes((UNAVAILABLE,)) and loop.time() - began < 1
        node.network.heal()
        await until(lambda: node.service.status()["counters"]["queue"] == 0)
        assert None not in (await node.items(1)).items
        await node.service.stop()

    asyncio.run(main())


def test_what_nobody_waits_for_any_more_is_not_fetched() -> None:
    async def main() -> None:
        limits = ReadLimits(fetch_reads=4, fetched_bytes=64 << 20, stall_s=60.0)
        node = Node(limits=limits, settings=ReaderSettings(page_items=8, attempt_timeout_s=60.0))
        timelines = [key_of(f"owner-{number}") for number in range(40)]
        for timeline in timelines:
            node.world.put(timeline, 1)
        node.gate.clear()
        late = await node.pages(*timelines, timeout_ms=20)
        assert set(late.outcomes) == {UNAVAILABLE}
        asked = {timeline for message in node.sent(Check) for timeline in message.timelines}
        assert 0 < len(asked) < 30
        node.gate.set()
        await until(lambda: node.service.status()["counters"]["queue"] == 0)
        assert {timeline for message in node.sent(Check) for timeline in message.timelines} == asked
        assert node.service.counters.totals["abandoned"] == 40 - len(asked)
        assert (await node.pages(*timelines)).outcomes == bytes(40)
        await node.service.stop()

    asyncio.run(main())


def test_a_paused_replica_does_not_hold_up_reads_that_come_later() -> None:
    async def main() -> None:
        node = Node()
        timelines = [key_of(f"o{n}") for n in range(12)]
        for timeline in timelines:
            node.world.put(timeline, 1)
        await node.pages(*timelines)
        node.network.hold("cache", "storage-0-0")
        order = Routing(topology()).storage_order
        away = [t for t in timelines if order(t)[0] == "storage-0-0"]
        safe = [t for t in timelines if "storage-0-0" not in order(t)[:2]]
        assert away and safe
        slow = asyncio.create_task(node.pages(*away))
        await asyncio.sleep(0)
        began = asyncio.get_running_loop().time()
        assert (await node.pages(*safe)).outcomes == bytes(len(safe))
        assert asyncio.get_running_loop().time() - began < 0.2 and not slow.done()
        assert (await slow).outcomes == bytes(len(away))
        await node.service.stop()

    asyncio.run(main())


def test_timelines_of_other_groups_and_malformed_requests_are_refused_one_by_one() -> None:
    async def main() -> None:
        node = Node(groups=2)
        groups = Routing(topology(groups=2)).storage_groups
        mine = next(key_of(f"o{n}") for n in range(99) if groups([key_of(f"o{n}")]) == [0])
        foreign = next(key_of(f"o{n}") for n in range(99) if groups([key_of(f"o{n}")]) == [1])
        node.world.put(mine, 1)
        reply = await node.pages(mine, foreign, mine[:-1], b"")
        assert reply.outcomes == bytes((OK, MISPLACED, INVALID, INVALID))
        assert (await node.pages(mine, limit=0)).outcomes == bytes((INVALID,))
        assert (await node.pages(mine, before=b"x")).outcomes == bytes((INVALID,))
        bad_key = await node.service.handle(ReadItems(1, [mine, mine], [b"", item_key(1)], 100))
        assert isinstance(bad_key, FoundItems) and bad_key.outcomes == bytes((INVALID, OK))
        with pytest.raises(InvalidRequest):
            await node.service.handle(ReadPages(1, [mine], [], pack_u32([1]), 100))
        with pytest.raises(TooLarge):
            await node.service.handle(ReadItems(1, [mine] * 10_001, [item_key(1)] * 10_001, 100))
        with pytest.raises(InvalidRequest):
            await node.service.handle(Write(1, [], [], b"", b"", b"", b"", [], [], 1))
        await node.service.stop()

    asyncio.run(main())


def test_readers_of_one_block_share_one_read_of_it() -> None:
    async def main() -> None:
        node = Node(budget_bytes=0, block_cache_bytes=0)
        for timestamp in range(10):
            node.world.put(T, timestamp, b"%d" % timestamp)
        window = node.world.sink(T, 0, block_rows=100)
        for number in range(3):
            node.world.apply_link(number, T, window)
        carrier = SharedBlockReads(node.network.carrier("cache"))
        ref = window.refs[0]
        question = BlockRead(ref.file, ref.offset, ref.length, ref.crc)
        node.gate.clear()
        calls = [asyncio.create_task(carrier.call("cold-0-0", question, 2.0)) for _ in range(8)]
        hasty = asyncio.create_task(carrier.call("cold-0-0", question, 0.01))
        with pytest.raises(CallError):
            await hasty
        node.gate.set()
        blocks = await asyncio.gather(*calls)
        assert len(node.sent(BlockRead)) == 1, "nor does one that gives up take the others along"
        assert all(isinstance(block, BlockBytes) and len(block.data) == ref.length for block in blocks)
        assert values_of((await node.items(4)).items) == [b"4"]
        await node.service.stop()

    asyncio.run(main())


def test_stop_answers_whoever_waits_and_status_says_so() -> None:
    async def main() -> None:
        node = Node()
        node.world.put(T, 1)
        node.gate.clear()
        waiting = asyncio.create_task(node.pages(T))
        await until(lambda: len(node.messages) >= 2)
        await node.service.stop()
        assert (await waiting).outcomes == bytes((UNAVAILABLE,))
        with pytest.raises(Unavailable):
            await node.pages(T)
        reply = await node.service.handle(StatusRequest())
        assert isinstance(reply, Status)
        assert json.loads(reply.body)["state"] == "stopped"

    asyncio.run(main())


@pytest.mark.parametrize("budget_bytes", [0, 1 << 20])
def test_reads_through_real_replicas_are_never_older_than_acknowledged_writes(
    tmp_path: Path, budget_bytes: int
) -> None:
    """Writers and readers at once over three real storage services; one of them goes away and comes back."""

    async def main() -> None:
        async with StorageCluster(tmp_path) as cluster:
            node = CacheService(
                "cache-0-0",
                0,
                cluster.topology,
                cluster.network.carrier("cache"),
                budget_bytes=budget_bytes,
                page_items=8,
            )
            rng = random.Random(7)
            timelines = [timeline_key(b"t", b"o%d" % n, CLUSTER_BUCKETS) for n in range(6)]
            acknowledged = dict.fromkeys(timelines, 0)
            reads = 0

            async def write(number: int) -> None:
                for step in range(25):
                    timeline = timelines[(number + step * 2) % len(timelines)]
                    item = (item_key(step % 12), b"%d-%d" % (number, step))
                    request = number.to_bytes(8, "big") + step.to_bytes(8, "big")
                    seen = acknowledged[timeline]
                    replica = next(r for r in rng.sample([0, 1, 2], 3) if r in cluster.services)
                    outcome, version = await cluster.put(replica, timeline, request, [item], seen=seen)
                    if outcome == OK:
                        acknowledged[timeline] = max(acknowledged[timeline], version)

            async def read() -> None:
                nonlocal reads
                while not writers.done():
                    floor = dict(acknowledged)
                    message = ReadPages(1, timelines, [b""] * 6, pack_u32([4] * 6), 4000)
                    reply = await node.handle(message)
                    assert isinstance(reply, Pages)
                    for index, version in enumerate(unpack_i64(reply.timeline_versions)):
                        if reply.outcomes[index] == OK:
                            assert version >= floor[timelines[index]]
                            reads += 1

            writers = asyncio.gather(write(0), write(1))
            readers = [asyncio.create_task(read()) for _ in range(3)]
            await writers
            await asyncio.gather(*readers)
            assert reads > 50
            await cluster.stop(1)
            reply = await node.handle(ReadPages(1, timelines, [b""] * 6, pack_u32([20] * 6), 4000))
            assert isinstance(reply, Pages) and reply.outcomes == bytes(6)
            for index, version in enumerate(unpack_i64(reply.timeline_versions)):
                assert version >= acknowledged[timelines[index]] > 0
            await node.stop()

    asyncio.run(main())
