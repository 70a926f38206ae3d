"""Whatever could grow with load, or with a slow or dead peer or disk, has a bound, and past it nothing breaks."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from memory_engine import MemoryEngine
from replica_group import BUCKETS as GROUP_BUCKETS
from replica_group import Group, key_of
from storage_cluster import BUCKETS, StorageCluster, wait_for
from timetier.cluster.cold.disk_lane import DiskLane
from timetier.cluster.config import StorageConfig
from timetier.cluster.counters import Counters
from timetier.cluster.errors import TooLarge, Unavailable
from timetier.cluster.gate import REQUEST_BYTES, Gate
from timetier.cluster.keys import item_key, priority, timeline_key
from timetier.cluster.memory.service import CacheService
from timetier.cluster.messages import (
    OK,
    PUT,
    UNAVAILABLE,
    Accept,
    AskVersions,
    Check,
    Checked,
    Failure,
    Message,
    Pages,
    Prepare,
    ReadPages,
    Value,
    Versions,
    Write,
    Written,
    pack_i64,
    pack_u32,
)
from timetier.cluster.paxos import chores as chores_module
from timetier.cluster.paxos.core import Core, Settings
from timetier.cluster.paxos.rows import chore_key

LIMIT_MB = 8
SIZE = 100_000
ALICE = timeline_key(b"t", b"alice", BUCKETS)
FIRST = priority(ALICE, 3)[0]
CONFIG = StorageConfig(engine_cache_mb=8, engine_write_buffer_mb=4, max_queued_mb=LIMIT_MB, max_queued_requests=200)


def rid(number: int) -> bytes:
    return number.to_bytes(16, "big")


def put_message(timeline: bytes, request_id: bytes, value: bytes) -> Write:
    columns = [item_key(1)], [value]
    return Write(
        1, [timeline], [request_id], pack_i64([0]), pack_i64([-1]), pack_u32([1]), bytes((PUT,)), *columns, 20_000
    )


@contextlib.contextmanager
def hung_disk(cluster: StorageCluster, number: int) -> Iterator[Callable[[], None]]:
    """Flushes of one node's log wait until the function that this gives is called."""
    engine = cluster.services[number]._life.engine
    assert engine is not None
    gate, sync = threading.Event(), engine.sync

    def wait() -> None:
        assert gate.wait(60)
        sync()

    engine.sync = wait  # type: ignore[method-assign]
    try:
        yield gate.set
    finally:
        gate.set()


def refusals(answers: list[Message]) -> list[Failure]:
    found = [answer for answer in answers if isinstance(answer, Failure)]
    for refusal in found:
        assert refusal.kind == "Unavailable", refusal
        hint_s = refusal.fields["retry_after_s"]
        assert isinstance(hint_s, float) and hint_s > 0
        assert refusal.fields["busy"]
    return found


def test_ten_times_what_may_wait_for_a_hanging_disk_is_refused_and_what_was_taken_is_done(tmp_path: Path) -> None:
    """Entries are chosen by the other two meanwhile; their answers and values still take memory until they leave."""

    async def body() -> None:
        cluster_of_thread = StorageCluster(tmp_path, CONFIG, flush_in_place_s=0)
        async with cluster_of_thread as cluster, contextlib.AsyncExitStack() as stack:
            service, node = cluster.services[FIRST], f"storage-0-{FIRST}"
            owners = (timeline_key(b"t", b"owner-%d" % number, BUCKETS) for number in range(10_000))
            mine = [owner for owner in owners if priority(owner, 3)[0] == FIRST]
            for at, owner in enumerate(mine[:5]):
                assert (await cluster.put(FIRST, owner, rid(at), [(item_key(0), b"x")]))[0] == OK
            release = stack.enter_context(hung_disk(cluster, FIRST))
            calls = []
            for number in range(10 * (LIMIT_MB << 20) // SIZE):
                message = put_message(mine[number % 5], rid(100 + number), bytes(SIZE))
                calls.append(asyncio.create_task(cluster.client.call(node, message, 60.0)))
                if number % 50 == 0:
                    await asyncio.sleep(0.02)
                assert service._waiting.writes.nbytes <= LIMIT_MB << 20
            most = (LIMIT_MB << 20) // SIZE
            await wait_for(lambda: sum(not call.done() for call in calls) <= most, "the refusals")
            under_way = sum(not call.done() for call in calls)
            assert under_way >= 0.7 * most, "up to the limit they are taken"
            question = Check([mine[10]], pack_i64([-1]), b"\x01", [b""], pack_u32([5]))
            assert isinstance(await cluster.client.call(node, question, 5.0), Checked), "reads go on"
            release()
            answers = await asyncio.gather(*calls)
            written = [answer for answer in answers if isinstance(answer, Written)]
            assert len(written) == under_way
            assert all(answer.outcomes[0] == OK for answer in written)
            assert len(refusals(answers)) == len(calls) - under_way
            assert service._waiting.writes.nbytes == service._waiting.writes.requests == 0
            assert (await cluster.put(FIRST, mine[11], rid(1), [(item_key(0), b"x")]))[0] == OK

    asyncio.run(asyncio.wait_for(body(), 60))


def test_questions_that_wait_for_a_hanging_disk_are_bounded_too(tmp_path: Path) -> None:
    async def body() -> None:
        cluster_of_thread = StorageCluster(tmp_path, CONFIG, flush_in_place_s=0)
        async with cluster_of_thread as cluster, contextlib.AsyncExitStack() as stack:
            node = f"storage-0-{FIRST}"
            assert (await cluster.put(FIRST, ALICE, rid(1), [(item_key(1), b"x")]))[0] == OK
            release = stack.enter_context(hung_disk(cluster, FIRST))
            write = asyncio.create_task(cluster.client.call(node, put_message(ALICE, rid(2), b"y"), 60.0))
            await wait_for(lambda: cluster.services[FIRST]._waiting.writes.requests == 1, "the write")
            calls = [asyncio.create_task(cluster.client.call(node, AskVersions([ALICE]), 60.0)) for _ in range(2_000)]
            await wait_for(lambda: sum(call.done() for call in calls) == 1_800, "the refusals")
            release()
            answers = await asyncio.gather(*calls)
            assert len(refusals(answers)) == 1_800
            assert sum(isinstance(answer, Versions) for answer in answers) == 200
            assert isinstance(await write, Written)

    asyncio.run(asyncio.wait_for(body(), 60))


def test_a_gate_refuses_with_a_hint_and_counts_what_left() -> None:
    counters = Counters()
    gate = Gate("n", counters, max_requests=10, max_bytes=1_000)
    with gate.entered(1, 5_000):  # larger than the whole, but alone
        with pytest.raises(Unavailable, match="too much to do") as refused, gate.entered(2, 1):
            raise AssertionError("it must not enter")
        assert refused.value.retry_after_s
    assert counters.totals["overload_refusals"] == 2
    with gate.entered(10, REQUEST_BYTES), pytest.raises(Unavailable), gate.entered(1, 0):
        raise AssertionError("it must not enter")
    with gate.entered(10, 1_000):
        pass
    assert (gate.requests, gate.nbytes) == (0, 0)


# ---------------------------------------------------------------- in the consensus core


def new_core(**settings: int) -> Core:
    return Core(
        replica=0,
        replicas=3,
        life=(0, 1, 1),
        buckets=GROUP_BUCKETS,
        engine=MemoryEngine(),
        settings=Settings(**settings),
        rng=random.Random(1),
        wall_us=lambda: 1,
        counters=Counters(),
    )


def accept_of(timeline: bytes, size: int) -> Accept:
    life = (1, 1, 1)
    return Accept(timeline, 5, (1, life), (0, life), Value(life, 1, [], bytes((PUT,)), [item_key(1)], [bytes(size)]))


def test_early_messages_of_many_timelines_that_are_behind_are_kept_up_to_a_bound_and_the_latest_stay() -> None:
    core = new_core(max_queued_bytes=1_000_000)
    timelines = [core.timeline(key_of(f"owner-{number}")) for number in range(50)]
    for timeline in timelines:
        core.hold(timeline, 1, accept_of(timeline.key, SIZE))
        core.hold(timeline, 1, accept_of(timeline.key, SIZE))  # its sender repeats itself
    kept = [timeline for timeline in timelines if timeline.held is not None]
    assert kept == timelines[-9:]
    for timeline in kept:
        core.drop_held(timeline)
        core.drop_held(timeline)
    core.hold(timelines[0], 1, Prepare(timelines[0].key, 5, (1, (1, 1, 1))))
    assert timelines[0].held is not None


def test_large_answers_that_wait_for_the_disk_are_bounded() -> None:
    core = new_core(max_queued_bytes=1_000_000)
    assert sum(core.has_room(SIZE, after=1) for _ in range(50)) == 10
    core.forget_sent()
    assert not core.has_room(SIZE, after=1), "nothing is durable yet"
    core.durable = 1
    core.forget_sent()
    assert core.has_room(5_000_000, after=2), "one that is too large for the bound goes alone"
    assert not core.has_room(1, after=2)


def test_request_ids_in_memory_are_bounded_and_a_retry_is_found_in_the_log() -> None:
    group = Group(1, settings=Settings(request_ids_in_memory=50))
    owners = [key_of(f"owner-{number}") for number in range(20)]
    for entry in range(1, 11):
        for number, owner in enumerate(owners):
            request_id = rid(1000 * number + entry)
            written = group.put(priority(owner, 3)[0], owner, request_id, [(entry, b"", b"x")], seen=entry - 1)
            assert written == (OK, entry)
    for replica in range(3):
        core = group.replica(replica).core
        held = sum(len(core.timeline(owner).ids or {}) for owner in owners)
        assert held <= 60
    for number, owner in enumerate(owners):
        again = group.put(priority(owner, 3)[0], owner, rid(1000 * number + 3), [(3, b"", b"again")], seen=2)
        assert again == (OK, 3), "applied once"


def test_an_answer_too_large_for_a_frame_is_refused_before_it_fills_memory(tmp_path: Path) -> None:
    async def body() -> None:
        async with StorageCluster(tmp_path) as cluster:
            value = bytes(1_000_000)
            for number in range(8):
                items = [(item_key(number * 6 + at), value) for at in range(6)]
                assert (await cluster.put(FIRST, ALICE, rid(number), items, seen=number))[0] == OK
            wants = 400
            question = Check(
                [ALICE] * wants,
                pack_i64([-1] * wants),
                b"\x02" * wants,
                [item_key(at % 48) for at in range(wants)],
                pack_u32([1] * wants),
            )
            answer = await cluster.client.call(f"storage-0-{FIRST}", question, 10.0)
            assert isinstance(answer, Failure)
            assert answer.kind == TooLarge.__name__
            delta = Check([ALICE], pack_i64([1]), b"\x00", [b""], pack_u32([10]))
            answer = await cluster.client.call(f"storage-0-{FIRST}", delta, 10.0)
            assert isinstance(answer, Checked)
            assert sum(map(len, answer.values)) <= 17 << 20, "a page instead of a delta of 42 MB"

    asyncio.run(asyncio.wait_for(body(), 60))


def test_answers_of_a_cache_node_are_bounded_together_and_it_recovers(tmp_path: Path) -> None:
    async def body() -> None:
        async with StorageCluster(tmp_path) as cluster:
            owners = [timeline_key(b"t", b"owner-%d" % number, BUCKETS) for number in range(12)]
            for number, owner in enumerate(owners):
                first = priority(owner, 3)[0]
                items = [(item_key(at), bytes(200_000)) for at in range(10)]
                assert (await cluster.put(first, owner, rid(number), items))[0] == OK
            counters = Counters()
            cache = CacheService(
                "cache-0-0",
                0,
                cluster.topology,
                cluster.network.carrier("cache-0-0"),
                budget_bytes=0,
                max_queued_bytes=5_000_000,
                counters=counters,
            )
            await cache.start()
            columns = owners, [b""] * len(owners), pack_u32([10] * len(owners)), 5000
            answers = await asyncio.gather(*(cache.handle(ReadPages(1, *columns)) for _ in range(4)))
            outcomes = [outcome for answer in answers if isinstance(answer, Pages) for outcome in answer.outcomes]
            assert outcomes.count(OK) >= 2
            assert outcomes.count(UNAVAILABLE) >= len(owners), "24 times 2 MB can't be held at once"
            assert counters.totals["refused"] == outcomes.count(UNAVAILABLE)
            for owner in owners:
                page = await cache.handle(ReadPages(1, [owner], [b""], pack_u32([10]), 5000))
                assert isinstance(page, Pages)
                assert page.outcomes[0] == OK, "what was held is forgotten when it is sent"
            await cache.stop()

    asyncio.run(asyncio.wait_for(body(), 60))


def test_pieces_that_wait_for_a_cold_disk_are_bounded_by_their_bytes() -> None:
    async def body() -> None:
        lane = DiskLane("disk", 1, limit=64)
        gate = threading.Event()
        piece = 30 << 20
        running = [asyncio.create_task(lane.run(gate.wait, piece)) for _ in range(4)]
        await asyncio.sleep(0)
        with pytest.raises(Unavailable) as refused:
            await lane.run(gate.wait, piece)
        assert refused.value.retry_after_s
        gate.set()
        await asyncio.gather(*running)
        assert await lane.run(gate.wait, piece)
        assert (lane.waiting, lane.nbytes) == (0, 0)
        await lane.close()

    asyncio.run(asyncio.wait_for(body(), 60))


def test_chores_beyond_a_bound_wait_on_disk_and_are_all_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chores_module, "MAX_IN_MEMORY", 5)
    group = Group(2)
    owners = [key_of(f"owner-{number}") for number in range(40)]
    replica = group.replica(0)
    for number, owner in enumerate(owners):  # as wipes that were chosen while nobody did chores
        replica.core.engine.put(chore_key(owner, 0), b"")
        if number % 2:
            replica.core.chores_due.append((owner, 0))
    replica.chores.recover()
    steps = 0
    while replica.chores.pending:
        replica.run_chores(group.now)
        assert len(replica.chores._ready) + len(replica.chores._later) <= 11
        steps += 1
        assert steps < 1_000
    assert not list(replica.core.engine.scan(b"C", b"D"))
