"""Cold reads are bounded for a whole node, and end with whoever wanted them."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from random import Random

import pytest
from cold_model import cold_file
from open_tiers import open_tiers
from storage_cluster import POLICY, topology, wait_for
from timetier.cluster.carriers.base import CallError
from timetier.cluster.carriers.direct import DirectCarrier, DirectServer, host_id
from timetier.cluster.carriers.memory import MemoryNetwork
from timetier.cluster.cold.block import checksum, read_index
from timetier.cluster.cold.block_cache import BlockCache
from timetier.cluster.cold.service import ColdService
from timetier.cluster.counters import Counters
from timetier.cluster.errors import Unavailable
from timetier.cluster.keys import timeline_key
from timetier.cluster.memory.lanes import ReadLimits
from timetier.cluster.memory.service import CacheService
from timetier.cluster.memory.shared_reads import NO_TURN, SharedBlockReads
from timetier.cluster.messages import (
    BlockBytes,
    BlockRead,
    FileWrite,
    FoundItems,
    Message,
    ReadItems,
    ReadPages,
    pack_u32,
)

STEP = POLICY.window // 4
SECRET = b"secret" * 8


def question(number: int, *, timeout_ms: int = 0) -> BlockRead:
    return BlockRead("file", number, 10, 0, b"", 1, timeout_ms)


class SlowNode:
    """A cold node that answers block reads when it is let; `at_work`: how many it has at a time, at the most `most`."""

    def __init__(self, network: MemoryNetwork) -> None:
        self.gate = asyncio.Event()
        self.at_work = self.most = 0
        self.seen: list[int] = []
        network.register("cold-0-0", self.handle)

    async def handle(self, message: Message) -> Message:
        assert isinstance(message, BlockRead)
        self.seen.append(message.offset)
        self.at_work += 1
        self.most = max(self.most, self.at_work)
        try:
            await self.gate.wait()
        finally:
            self.at_work -= 1
        return BlockBytes(b"bytes")


def test_block_reads_of_all_pages_share_one_limit_and_what_waits_costs_its_node_no_time() -> None:
    async def main() -> None:
        network = MemoryNetwork()
        node = SlowNode(network)
        reads = SharedBlockReads(network.carrier("cache"), most=3)
        calls = [asyncio.create_task(reads.call("cold-0-0", question(n, timeout_ms=10_000), 5.0)) for n in range(10)]
        await wait_for(lambda: node.at_work == 3, "three reads under way")
        hasty = asyncio.create_task(reads.call("cold-0-0", question(99, timeout_ms=20), 5.0))
        with pytest.raises(CallError, match=NO_TURN):
            await hasty
        node.gate.set()
        assert all(isinstance(answer, BlockBytes) for answer in await asyncio.gather(*calls))
        assert node.most == 3
        assert sorted(node.seen) == list(range(10)), "what left the line was never asked for"
        await reads.close()

    asyncio.run(main())


def test_a_read_that_all_its_callers_gave_up_leaves_the_line_and_one_that_some_want_stays() -> None:
    async def main() -> None:
        network = MemoryNetwork()
        node = SlowNode(network)
        counters = Counters()
        reads = SharedBlockReads(network.carrier("cache"), most=1, counters=counters)
        first = asyncio.create_task(reads.call("cold-0-0", question(0, timeout_ms=10_000), 5.0))
        await wait_for(lambda: node.at_work == 1, "the first read")
        lost = [asyncio.create_task(reads.call("cold-0-0", question(1, timeout_ms=10_000), 5.0)) for _ in range(2)]
        kept = [asyncio.create_task(reads.call("cold-0-0", question(2, timeout_ms=10_000), 5.0)) for _ in range(2)]
        await wait_for(lambda: counters.gauges.get("block_reads_waiting") == 2, "two in line")
        for task in (*lost, kept[0]):
            task.cancel()
        await asyncio.gather(*lost, kept[0], return_exceptions=True)
        node.gate.set()
        assert isinstance(await first, BlockBytes) and isinstance(await kept[1], BlockBytes)
        assert node.seen == [0, 2]
        assert counters.totals["block_reads_given_up"] == 1

    asyncio.run(main())


def test_the_cache_of_decoded_blocks_never_exceeds_its_bytes_and_lets_the_least_used_go() -> None:
    class Block:
        def __init__(self, nbytes: int) -> None:
            self.nbytes = nbytes

    choose = Random(1)
    cache: BlockCache[Block] = BlockCache(1_000)
    for _ in range(3_000):
        place = f"f{choose.randrange(9)}", choose.randrange(9)
        if cache.get(*place) is None:
            cache.put(*place, Block(choose.randrange(1, 1_200)))
        assert cache.nbytes <= 1_000
    for offset in range(4):
        cache.put("last", offset, Block(250))
    assert cache.get("last", 0) is not None
    cache.put("last", 4, Block(250))
    assert cache.get("last", 0) is not None and cache.get("last", 1) is None


def test_a_cold_node_does_not_read_what_nobody_waits_for_any_more(tmp_path: Path) -> None:
    async def main() -> None:
        clock = [0.0]
        network = MemoryNetwork()
        node = ColdService(
            "cold-0-0",
            0,
            0,
            tmp_path,
            topology(),
            network.carrier("cold-0-0"),
            disks=1,
            read_threads=1,
            counters=Counters(),
            clock=lambda: clock[0],
        )
        await node.start()
        data = cold_file("a.arrow")
        await node.handle(FileWrite("a.arrow", 0, 0, data, True, checksum(data)))
        block = read_index(data).blocks[0]
        place = "a.arrow", block.offset, block.length, block.crc
        asked = [BlockRead(*place, owner, 1, 50) for owner in (b"", b"owner-000")]
        assert isinstance(await node.handle(asked[0]), BlockBytes)
        store = node._open_store()
        original = store.read_block
        reads: list[int] = []

        def reading(*arguments: object) -> bytes:
            reads.append(1)
            clock[0] += 1.0  # what comes behind has waited for too long
            return original(*arguments)  # type: ignore[arg-type]

        store.read_block = reading  # type: ignore[method-assign, assignment]
        answers = await asyncio.gather(*[node.handle(asked[n % 2]) for n in range(6)], return_exceptions=True)
        good = [answer for answer in answers if isinstance(answer, BlockBytes)]
        assert len(reads) == 1 and len(good) in (1, 3), "the reads of one owner share one"
        assert all(isinstance(answer, BlockBytes | Unavailable) for answer in answers)
        assert node.counters.totals["abandoned_reads"] >= 1
        late = BlockRead("a.arrow", block.offset, block.length, block.crc, b"owner-000", 1, 5_000)
        assert isinstance(await node.handle(late), BlockBytes)
        await node.stop()

    asyncio.run(main())


def test_an_owner_that_no_block_holds_costs_no_read_of_a_block(tmp_path: Path) -> None:
    async def main() -> None:
        async with open_tiers(tmp_path) as tiers:
            table = tiers.client.table("t")
            owners = [f"owner-{n}" for n in range(100)]
            await table.put_many([(owner, at * STEP, b"x") for owner in owners for at in range(4)])
            sunk = 0
            while sunk < 400:
                sunk += (await tiers.sink()).rows
            before = [int(node.counters.totals.get("block_reads", 0)) for node in tiers.cold]
            for owner in (f"other-{n}" for n in range(50)):
                await table.put(owner, 3 * STEP, b"hot")
                assert len((await table.timeline(owner)).items) == 1
                assert await table.get(owner, STEP) is None
            assert [int(node.counters.totals.get("block_reads", 0)) for node in tiers.cold] == before
            assert len((await table.timeline(owners[0])).items) == 4
            assert sum(int(node.counters.totals.get("block_reads", 0)) for node in tiers.cold) == sum(before) + 1

    asyncio.run(asyncio.wait_for(main(), 60))


@pytest.mark.parametrize("end", ["deadline", "disconnect"])
def test_a_reader_that_gave_up_or_went_away_begins_no_further_block_reads(tmp_path: Path, end: str) -> None:
    """Real sockets before the cache node; the cold tier takes its time."""

    async def main() -> None:
        async with open_tiers(tmp_path) as tiers:
            table = tiers.client.table("t")
            windows = 40
            await table.put_many([("alice", n * POLICY.window, b"%d" % n) for n in range(windows)])
            sunk = 0
            while sunk < windows:
                sunk += (await tiers.sink()).rows
            gate, seen = asyncio.Event(), [0]

            for node in tiers.cold:

                async def slowly(message: Message, node: ColdService = node) -> Message | None:
                    if isinstance(message, BlockRead):
                        seen[0] += 1
                        await gate.wait()
                    return await node.handle(message)

                tiers.network.register(node.name, slowly)
            storage = tiers.storage
            cache = CacheService(
                "cache-0-0",
                0,
                storage.topology,
                storage.network.carrier("cache-9"),
                budget_bytes=0,
                limits=ReadLimits(block_reads=2),
            )
            server = DirectServer(
                cache.handle, SECRET, begin=cache.begin, name="cache-0-0", unix_path=str(tmp_path / "s")
            )
            address = await server.start()
            carrier = DirectCarrier(SECRET, host_id=host_id())
            carrier.update({"cache-0-0": address})
            key = timeline_key(b"t", b"alice", storage.topology.buckets)
            timeout_ms = 400 if end == "deadline" else 60_000
            page = ReadPages(1, [key], [b""], pack_u32([windows]), timeout_ms)
            waiting = asyncio.create_task(carrier.call("cache-0-0", page, 30.0))
            await wait_for(lambda: seen[0] >= 2, "block reads")
            if end == "disconnect":
                await carrier.close()
            await asyncio.gather(waiting, return_exceptions=True)
            await wait_for(lambda: not cache._heavy_tasks and not cache._heavy_jobs, "the end of its reads")
            began, known = time.monotonic(), seen[0]
            gate.set()
            await wait_for(lambda: time.monotonic() > began + 0.3, "some time")
            assert seen[0] <= known, "nothing is read for a reader that is gone"
            assert seen[0] < windows
            item = ReadItems(1, [key], [b"\x80" + bytes(7) + b"\x00\x01"], 5_000)
            assert isinstance(await cache.handle(item), FoundItems), "and others are served"
            await server.stop()
            await cache.stop()
            await carrier.close()

    asyncio.run(asyncio.wait_for(main(), 60))
