"""Strong reads against a model of storage and cold tier (`storage_model.py`)."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, cast

import msgspec
import pytest
from read_answers import keys_of, values_of
from reader_bench import Bench, T
from storage_model import DEAD, PAUSED, UP, WINDOW, World, key_of, topology
from timetier.cluster.carriers.base import Address
from timetier.cluster.errors import Corrupt, Unavailable
from timetier.cluster.keys import item_key
from timetier.cluster.memory.requests import ItemAnswer, PageAnswer, Read
from timetier.cluster.memory.steps import Step
from timetier.cluster.messages import (
    DELETE,
    PUT,
    WIPE,
    AskVersions,
    BlockRead,
    Check,
    Failure,
    Message,
    Settle,
    unpack_u32,
)
from timetier.cluster.routing import Routing


def assert_true(world: World, read: Read, floor: int) -> None:
    """The answer is the truth as of its version, and no entry that was chosen before the read began is missing."""
    answer = read.answer
    assert isinstance(answer, PageAnswer | ItemAnswer), answer
    assert floor <= answer.version <= len(world.log(read.timeline)), f"{answer.version} but {floor} was chosen"
    items = world.items(read.timeline, answer.version)
    if isinstance(answer, ItemAnswer):
        item = answer.item
        assert (item is not None) == (read.key in items)
        if item is not None:
            assert (item.value, item.version) == items[read.key]
            assert item.written_us == 1000 + item.version
        return
    got = answer.items.unpacked()
    truth = [key for key in sorted(items, reverse=True) if not read.key or key < read.key]
    assert keys_of(got) == truth[: read.limit]
    assert [(item.value, item.version) for item in got] == [items[key] for key in keys_of(got)]
    assert [item.written_us for item in got] == [1000 + item.version for item in got]
    assert answer.items.more or len(truth) <= read.limit


@pytest.mark.parametrize("lagging", range(3))
@pytest.mark.parametrize("cached", [True, False], ids=["a page in memory", "nothing in memory"])
def test_what_has_expired_does_not_come_back_through_a_replica_that_lags(lagging: int, cached: bool) -> None:
    bench = Bench(budget_bytes=1 << 20 if cached else 0)
    for timestamp in range(30):
        bench.world.put(T, timestamp)
    window = bench.world.sink(T, 10)
    for number in range(3):
        bench.world.apply_link(number, T, window)
    bench.page(limit=100)
    bench.world.replicas[bench.order()[lagging]].lags = True
    bench.world.horizon = 15
    for away in (None, 0, 1, 2):
        for replica in bench.world.replicas:
            replica.state = DEAD if replica.number == away and not replica.lags else UP
        page = bench.page(limit=100)
        assert [item.timestamp for item in page.items.unpacked()] == list(range(29, 14, -1))
        assert bench.item(14).item is None and bench.item(3).item is None and bench.item(15).item is not None


def test_a_replica_that_does_not_know_whether_a_horizon_was_chosen_is_no_vote() -> None:
    bench = Bench()
    for timestamp in range(30):
        bench.world.put(T, timestamp)
    bench.world.horizon = 15
    first, second, third = bench.order()
    bench.world.replicas[first].unsure = True
    bench.world.replicas[second].lags = True
    assert [item.timestamp for item in bench.page(limit=100).items.unpacked()] == list(range(29, 14, -1))
    bench.world.replicas[third].state = DEAD
    read = bench.page_read(100)
    bench.run(read)
    assert isinstance(read.answer, Unavailable), "the second one alone can't tell"


# ---------------------------------------------------------------- linearizability


def random_read(bench: Bench, timeline: bytes) -> Read:
    rng = bench.world.random
    if rng.random() < 0.4:
        return bench.item_read(rng.randrange(60), timeline)
    before = item_key(rng.randrange(60)) if rng.random() < 0.5 else b""
    return bench.page_read(rng.choice((1, 3, 10, 100)), before, timeline)


@pytest.mark.parametrize("seed", range(60))
def test_reads_are_linearizable_whatever_replicas_lag_accept_evict_or_sink_meanwhile(seed: int) -> None:
    print(f"seed {seed}")
    bench = Bench(seed, budget_bytes=random.Random(seed).choice((0, 8_000, 1 << 20)))
    world = bench.world
    timelines = [key_of(f"owner{n}") for n in range(3)]
    for timeline in timelines:
        world.log(timeline)
    world.truth.pop(T)
    world.noisy = True
    for _ in range(30):
        world.noise()
    asked = answered = 0
    for _ in range(15):
        for replica in world.replicas:
            replica.state = UP
        if world.random.random() < 0.5:
            world.random.choice(world.replicas).state = world.random.choice((DEAD, PAUSED))
        reads = [random_read(bench, world.random.choice(timelines)) for _ in range(world.random.choice((1, 2, 6)))]
        floors = [len(world.log(read.timeline)) for read in reads]
        asked += len(reads)
        bench.run(*reads)
        for read, floor in zip(reads, floors, strict=True):
            if isinstance(read.answer, Unavailable):
                continue  # allowed: writers and faults may go on for longer than the deadline
            assert_true(world, read, floor)
            answered += 1
        assert bench.reader.cache.nbytes <= bench.reader.cache.budget_bytes
    assert answered >= 0.9 * asked, "one replica away is no reason to give up"


def test_in_a_quiet_world_every_read_is_answered_after_random_writes() -> None:
    for seed in range(20):
        bench = Bench(seed)
        world = bench.world
        world.noisy = True
        for _ in range(300):
            world.noise()
        world.noisy = False
        for _ in range(10):
            read = random_read(bench, T)
            floor = len(world.log(T))
            bench.run(read)
            assert_true(world, read, floor)


# ---------------------------------------------------------------- rounds and messages


def test_a_read_costs_one_round_trip_a_check_at_one_replica_and_a_version_question_at_the_next() -> None:
    bench = Bench()
    bench.world.put(T, 1)
    first, second, _ = bench.order()
    assert bench.start(bench.page_read()) == []
    assert {(node, type(message)) for node, message in bench.world.sent} == {
        (f"storage-0-{first}", Check),
        (f"storage-0-{second}", AskVersions),
    }
    bench.world.sent.clear()
    assert bench.start(bench.page_read(), bench.item_read(1)) == []
    assert len(bench.world.sent) == 2


def test_a_timeline_that_is_asked_for_many_times_goes_once() -> None:
    bench = Bench()
    bench.world.put(T, 1)
    reads = [bench.page_read() for _ in range(50)] + [bench.item_read(1) for _ in range(50)]
    bench.run(*reads)
    checks = [message for _, message in bench.world.sent if isinstance(message, Check)]
    assert len(checks) == 1 and len(checks[0].timelines) == 2
    assert all(read.answer is not None for read in reads)


def test_timelines_of_one_batch_share_three_checks_at_most() -> None:
    bench = Bench()
    timelines = [key_of(f"o{n}") for n in range(200)]
    for timeline in timelines:
        bench.world.put(timeline, 1)
    reads = [bench.page_read(timeline=timeline) for timeline in timelines]
    bench.run(*reads)
    assert sorted(bench.sent(Check)) == ["storage-0-0", "storage-0-1", "storage-0-2"]
    for read in reads:
        assert_true(bench.world, read, 1)


def test_a_hot_timeline_costs_its_new_items_and_an_unchanged_one_none() -> None:
    bench = Bench()
    for timestamp in range(20):
        bench.world.put(T, timestamp)
    bench.page()
    counts: list[int] = []
    answer = bench.world.answer

    def spy(replica: Any, message: Message) -> Message:
        reply = answer(replica, message)
        if isinstance(message, Check):
            counts.append(len(reply.keys))  # type: ignore[union-attr]
        return reply

    bench.world.answer = spy  # type: ignore[method-assign]
    assert bench.page().version == 20
    bench.world.put(T, 99, b"new")
    page = bench.page()
    newest = page.items.unpacked()[0]
    assert (page.version, newest.timestamp, newest.value) == (21, 99, b"new")
    assert counts == [0, 1]
    assert bench.reader.counters.totals["hits"] == 2 and bench.reader.counters.totals["deltas"] == 1


@pytest.mark.parametrize("budget_bytes", [0, 1 << 20])
def test_a_cached_page_is_never_served_without_proof(budget_bytes: int) -> None:
    bench = Bench(budget_bytes=budget_bytes)
    bench.world.put(T, 1, b"old")
    bench.page()
    second, third = bench.order()[1:]
    # The next write is known to the two replicas of lowest priority only.
    bench.world.put(T, 1, b"new", learners=(second, third))
    assert values_of(bench.page().items.unpacked()) == [b"new"]
    assert values_of([bench.item(1).item]) == [b"new"]
    for replica in bench.world.replicas:
        replica.state = DEAD
    read = bench.page_read()
    bench.run(read)
    assert isinstance(read.answer, Unavailable)
    assert bench.world.now >= read.deadline


@pytest.mark.parametrize("state", [DEAD, PAUSED])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_with_one_replica_away_every_read_is_answered(position: int, state: str) -> None:
    bench = Bench()
    timelines = [key_of(f"o{n}") for n in range(30)]
    for timeline in timelines:
        bench.world.put(timeline, 7)
    bench.world.replicas[position].state = state
    began = bench.world.now
    reads = [bench.page_read(timeline=timeline) for timeline in timelines]
    bench.run(*reads)
    for read in reads:
        assert_true(bench.world, read, 1)
    assert bench.world.now - began < 0.5, "one attempt may time out, no more"
    assert f"storage-0-{position}" in bench.reader.suspicion.names()
    # Suspected from then on: asked by probes at most, and nobody waits for it.
    bench.world.sent.clear()
    bench.world.now += 1.5
    again = [bench.page_read(timeline=timeline) for timeline in timelines]
    jobs = bench.start(*again)
    assert all(read.answer is not None for read in again)
    assert f"storage-0-{position}" not in {node for node, _ in bench.world.sent}
    bench.world.replicas[position].state = UP
    for job in jobs:
        bench.world.drive(job.script)
    assert bench.reader.suspicion.names() == [], "a probe has found it alive"


def test_with_two_of_three_replicas_away_reads_are_unavailable_in_time_and_recover() -> None:
    bench = Bench()
    bench.world.put(T, 1)
    for replica in bench.world.replicas[:2]:
        replica.state = PAUSED
    read = bench.page_read()
    bench.run(read)
    assert isinstance(read.answer, Unavailable)
    assert read.deadline <= bench.world.now <= read.deadline + 1
    for replica in bench.world.replicas:
        replica.state = UP
    assert bench.page().version == 1


def test_a_group_of_one_replica_answers_alone_open_entries_included() -> None:
    bench = Bench(replicas=1)
    bench.world.put(T, 1)
    assert bench.page().version == 1
    bench.world.put(T, 2, learners=())
    page = bench.page()
    assert page.version == 2 and keys_of(page.items.unpacked()) == [item_key(2), item_key(1)]
    assert bench.sent(Settle) == []


# ---------------------------------------------------------------- open entries


def test_an_entry_that_a_majority_accepted_at_one_ballot_is_read_without_settling() -> None:
    bench = Bench()
    third = bench.order()[2]
    for learners in ((), (third,)):
        version = bench.world.put(T, 5, b"v%d" % len(learners), learners=learners)
        page = bench.page()
        assert page.version == version and values_of(page.items.unpacked()) == [b"v%d" % len(learners)]
    assert bench.sent(Settle) == []


def test_an_entry_that_two_of_three_have_not_accepted_is_left_alone() -> None:
    bench = Bench()
    bench.world.put(T, 1)
    first, second = bench.order()[:2]
    for holder in (first, second):
        assert bench.world.accept(holder, T, 2, (5, (holder, 1, 1)), [(PUT, item_key(2), b"x")])
        assert bench.page().version == 1
        bench.world.replicas[holder].accepted.clear()
    assert bench.sent(Settle) == []


def test_an_open_entry_that_nobody_can_judge_is_settled_once() -> None:
    bench = Bench()
    bench.world.put(T, 1)
    first, _, third = bench.order()
    bench.world.replicas[third].state = DEAD
    assert bench.world.accept(first, T, 2, (5, (first, 1, 1)), [(PUT, item_key(2), b"x")])
    reads = [bench.page_read() for _ in range(5)]
    bench.run(*reads)
    for read in reads:
        assert_true(bench.world, read, 1)
        assert isinstance(read.answer, PageAnswer) and read.answer.version == 2, "the settled entry is chosen"
    assert bench.sent(Settle) == [f"storage-0-{first}"], "at the owner of the ballot"


def test_a_slow_timeline_does_not_delay_the_batch() -> None:
    bench = Bench()
    slow, quick = T, key_of("bob")
    for timeline in (slow, quick):
        bench.world.put(timeline, 1)
    for replica in bench.order()[:2]:
        bench.world.accept(replica, slow, 2, (5 + replica, (replica, 1, 1)), [(PUT, item_key(2), b"x%d" % replica)])
    held, free = bench.page_read(timeline=slow), bench.page_read(timeline=quick)
    began = bench.world.now
    jobs = bench.start(held, free)
    assert free.answer is not None and held.answer is None and bench.world.now - began < 0.01
    assert [job.reads for job in jobs] == [[held]]
    while jobs:
        jobs += bench.world.drive(jobs.pop().script).then
    assert_true(bench.world, held, 1)


def test_data_of_a_replica_that_is_behind_is_not_used() -> None:
    bench = Bench()
    second, third = bench.order()[1:]
    bench.world.put(T, 1, b"a")
    for learners in ((second, third), (third,), (second,)):
        version = bench.world.put(T, 1, b"b%d" % len(bench.world.log(T)), learners=learners)
        assert bench.page().version == version
        assert values_of([bench.item(1).item]) == [bench.world.log(T)[-1][0][2]]


# ---------------------------------------------------------------- what is kept


def test_a_page_that_deletes_made_too_short_is_refilled() -> None:
    bench = Bench()
    for timestamp in range(40):
        bench.world.put(T, timestamp)
    bench.page(limit=8)
    bench.world.write(T, [(DELETE, item_key(t), b"") for t in range(30, 40)])
    page = bench.page(limit=8)
    assert [item.timestamp for item in page.items.unpacked()] == list(range(29, 21, -1))
    bench.world.sent.clear()
    assert bench.start(bench.page_read(limit=8)) == [], "and it is kept"


def test_a_wiped_timeline_is_empty_at_once_and_for_all_pages() -> None:
    bench = Bench()
    for timestamp in range(20):
        bench.world.put(T, timestamp)
    window = bench.world.sink(T, 0)
    for number in range(3):
        bench.world.apply_link(number, T, window)
    bench.page(limit=20)
    bench.world.write(T, [(WIPE, b"", b"")])
    page = bench.page(limit=20)
    assert page.items.count == 0 and not page.items.more
    assert bench.item(3).item is None
    bench.world.put(T, 3, b"later")
    assert values_of([bench.item(3).item]) == [b"later"]
    fresh = Bench(budget_bytes=0)
    fresh.world = bench.world
    fresh.reader._clock = lambda: bench.world.now
    assert values_of(fresh.page(limit=20).items.unpacked()) == [b"later"]


def test_single_items_of_a_timeline_fetch_its_page_when_it_is_asked_for_again() -> None:
    bench = Bench()
    for timestamp in range(20):
        bench.world.put(T, timestamp)
    bench.item(19)
    assert len(bench.reader.cache) == 0
    bench.item(18)
    assert len(bench.reader.cache) == 1
    read = bench.item_read(17)
    assert bench.reader.is_resident(read)


def test_expired_items_are_not_returned_from_any_tier() -> None:
    bench = Bench()
    for timestamp in range(30):
        bench.world.put(T, timestamp)
    window = bench.world.sink(T, 10)
    for number in range(3):
        bench.world.apply_link(number, T, window)
    bench.page(limit=4)
    bench.world.horizon = 15
    page = bench.page(limit=100)
    assert [item.timestamp for item in page.items.unpacked()] == list(range(29, 14, -1))
    assert not page.items.more
    assert bench.item(15).item is not None
    assert bench.item(14).item is None and bench.item(3).item is None


def test_paging_through_all_tiers_gives_every_item_once() -> None:
    for budget_bytes in (0, 1 << 20):
        bench = Bench(budget_bytes=budget_bytes)
        for timestamp in range(60):
            bench.world.put(T, timestamp, b"%d" % timestamp)
        for start in range(0, 40, WINDOW):
            window = bench.world.sink(T, start)
            for number in range(3):
                bench.world.apply_link(number, T, window)
        bench.world.put(T, 13, b"late")
        bench.world.write(T, [(DELETE, item_key(7), b"")])
        seen: list[tuple[int, bytes]] = []
        before, more = b"", True
        while more:
            page = bench.page(limit=7, before=before)
            items = page.items.unpacked()
            seen += [(item.timestamp, item.value) for item in items]
            more = page.items.more
            before = keys_of(items)[-1] if items else before
        expected = {t: b"%d" % t for t in range(60) if t != 7} | {13: b"late"}
        assert seen == sorted(expected.items(), reverse=True)


def test_an_answer_is_cut_by_bytes_and_says_that_there_is_more() -> None:
    bench = Bench()
    for timestamp in range(10):
        bench.world.put(T, timestamp, bytes(1000))
    read = bench.page_read(limit=10)
    read.max_bytes = 3500
    bench.run(read)
    assert isinstance(read.answer, PageAnswer)
    assert read.answer.items.count == 3 and read.answer.items.more


# ---------------------------------------------------------------- cold blocks


def sunk(bench: Bench, items: int = 10) -> None:
    """`items` items of the first window, in blocks, evicted everywhere."""
    for timestamp in range(items):
        bench.world.put(T, timestamp, b"%d" % timestamp)
    window = bench.world.sink(T, 0, block_rows=100)
    for number in range(3):
        bench.world.apply_link(number, T, window)


@pytest.mark.parametrize("lies", [False, True])
def test_a_flipped_bit_is_noticed_and_the_right_bytes_come_from_the_next_replica(lies: bool) -> None:
    for position in range(3):
        bench = Bench()
        sunk(bench)
        bad = bench.world.cold[position]
        (file,) = bad.files
        offset = bench.world.windows[T][0].refs[0].offset
        bad.files[file][offset + 100] ^= 1
        bad.lies = lies
        assert values_of([bench.item(4).item]) == [b"4"]
        page = bench.page(limit=10)
        assert [item.timestamp for item in page.items.unpacked()] == list(range(9, -1, -1))
        if bench.world.sent and bench.sent(BlockRead)[0] == bad.name:
            assert bench.reader.counters.totals["crc_failures"] == 1


@pytest.mark.parametrize("state", [DEAD, PAUSED])
def test_a_cold_node_that_is_away_is_passed_over(state: str) -> None:
    for position in range(3):
        bench = Bench()
        sunk(bench)
        bench.world.cold[position].state = state
        assert values_of([bench.item(4).item]) == [b"4"]


def test_a_read_from_cold_blocks_waits_once_for_a_machine_that_has_a_replica_and_the_first_cold_node() -> None:
    """Else a machine that is cut off costs it an attempt in each tier, which is more than its caller waits."""
    shape = topology()
    for position in range(3):
        bench = Bench()
        sunk(bench)
        hosts = {name: f"machine {name[-1]}" for name in shape.node_names()}
        addresses = {name: Address(name, host=host) for name, host in hosts.items()}
        bench.reader.update(Routing(msgspec.structs.replace(shape, epoch=2, addresses=addresses)))
        bench.world.replicas[position].state = bench.world.cold[position].state = PAUSED
        began = bench.world.now
        assert values_of([bench.item(4).item]) == [b"4"]
        assert bench.world.now - began < 1.5 * bench.reader.settings.attempt_timeout_s


def test_a_block_that_is_damaged_everywhere_is_an_error_that_names_it_and_spares_other_reads() -> None:
    bench = Bench()
    sunk(bench)
    bench.world.put(T, 50, b"hot")
    ref = bench.world.windows[T][0].refs[0]
    for node in bench.world.cold:
        node.files[ref.file][ref.offset + 50] ^= 4
    damaged, good, page = bench.item_read(4), bench.item_read(50), bench.page_read(limit=1)
    bench.run(damaged, good, page)
    assert isinstance(damaged.answer, Corrupt)
    assert ref.file in str(damaged.answer) and str(ref.offset) in str(damaged.answer)
    assert isinstance(good.answer, ItemAnswer) and values_of([good.answer.item]) == [b"hot"]
    assert isinstance(page.answer, PageAnswer) and values_of(page.answer.items.unpacked()) == [b"hot"]


def test_a_link_whose_file_a_later_generation_replaced_starts_the_read_over() -> None:
    bench = Bench()
    sunk(bench)
    old = bench.world.windows[T][0].refs[0].file
    bench.world.put(T, 4, b"late")
    window = bench.world.sink(T, 0)
    second, third = bench.order()[1:]
    for number in (second, third):
        bench.world.apply_link(number, T, window)
    for node in bench.world.cold:
        del node.files[old]
    read = bench.item_read(5)
    bench.run(read, other := bench.item_read(4))
    assert_true(bench.world, read, 11)
    assert_true(bench.world, other, 11)


def test_a_file_that_is_gone_for_good_is_reported_as_corrupt() -> None:
    bench = Bench()
    sunk(bench)
    for node in bench.world.cold:
        node.files.clear()
    read = bench.item_read(5)
    bench.run(read)
    assert isinstance(read.answer, Corrupt) and "file-1" in str(read.answer)


def test_a_block_that_is_ahead_of_its_replica_is_never_mixed_with_older_rows() -> None:
    bench = Bench()
    world = bench.world
    world.answers_ahead = True
    first, second, third = bench.order()
    world.put(T, 1, b"old")
    world.put(T, 2, b"old")
    read = bench.page_read()
    script = bench.reader.batch([read])
    calls = next(script)
    assert isinstance(calls, list) and [type(call.message) for call in calls] == [Check, AskVersions]
    versions = world.call(calls[1])  # both replicas say version 2, but between their answers ...
    world.write(T, [(PUT, item_key(1), b"new"), (PUT, item_key(50), b"new")], learners=(second, third))
    world.apply_link(first, T, world.sink(T, 0))  # ... the first gets a link to blocks of version 3
    checked = world.call(calls[0])
    step = finish(script, [checked, versions], world)
    while step.then:
        step = world.drive(step.then[0].script)
    assert_true(world, read, 2)
    assert isinstance(read.answer, PageAnswer) and read.answer.version == 3


def finish(script: Any, results: list[Any], world: World) -> Step:
    """Go on with a script whose first effect was carried out by hand."""
    try:
        effect = script.send(results)
    except StopIteration as stop:
        return cast(Step, stop.value)
    return finish(script, world.carry_out(effect), world)


def test_blocks_are_read_once_and_only_as_far_as_needed() -> None:
    bench = Bench()
    for timestamp in range(60):
        bench.world.put(T, timestamp)
    for start in range(0, 60, WINDOW):
        window = bench.world.sink(T, start, block_rows=100)
        for number in range(3):
            bench.world.apply_link(number, T, window)
    bench.page(limit=5)
    assert len(bench.sent(BlockRead)) == 1
    bench.item(3)
    bench.item(4)
    assert len(bench.sent(BlockRead)) == 1


def test_a_question_about_many_timelines_may_take_longer_than_one_about_a_single_one() -> None:
    bench = Bench()
    timeouts_s = []
    for count in (1, 50):
        reads = [bench.page_read(timeline=key_of(f"owner-{number}")) for number in range(count)]
        effect = next(bench.reader.batch(reads))
        assert isinstance(effect, list)
        timeouts_s.append(min(call.timeout_s for call in effect))
    assert timeouts_s[0] < 1.05 * bench.reader.settings.attempt_timeout_s, "one that is silent is found out soon"
    assert timeouts_s[1] - timeouts_s[0] > 0.04


def test_a_read_of_many_cold_items_shares_the_blocks() -> None:
    bench = Bench(budget_bytes=0)
    sunk(bench)
    reads = [bench.item_read(timestamp) for timestamp in range(10)]
    bench.run(*reads)
    assert len(bench.sent(BlockRead)) == 1
    for read in reads:
        assert_true(bench.world, read, 10)


# ---------------------------------------------------------------- bad answers


@pytest.mark.parametrize(
    "spoil",
    [
        lambda reply: setattr(reply, "chosen", reply.chosen[:-8]),
        lambda reply: setattr(reply, "payloads", b"\x09" * len(reply.payloads)),
        lambda reply: setattr(reply, "counts", b"\x07\0\0\0" * len(reply.payloads)),
        lambda reply: setattr(reply, "floors", []),
        lambda reply: setattr(reply, "versions", b"1"),
    ],
)
def test_an_answer_that_does_not_fit_its_question_counts_as_none(spoil: Callable[[Any], None]) -> None:
    bench = Bench()
    bench.world.put(T, 1, b"x")
    first = bench.order()[0]
    answer = bench.world.answer

    def spoilt(replica: Any, message: Message) -> Message:
        reply = answer(replica, message)
        if replica.number == first and isinstance(message, Check):
            spoil(reply)
        return reply

    bench.world.answer = spoilt  # type: ignore[method-assign]
    assert values_of(bench.page().items.unpacked()) == [b"x"]
    assert bench.reader.counters.totals["bad_answers"] >= 1


def test_answers_that_would_be_too_large_are_asked_for_one_by_one_and_in_smaller_pieces() -> None:
    bench = Bench()
    timelines = [key_of(f"o{n}") for n in range(6)]
    for timeline in timelines:
        for timestamp in range(12):
            bench.world.put(timeline, timestamp)
    answer = bench.world.answer

    def bounded(replica: Any, message: Message) -> Message:
        if isinstance(message, Check) and sum(unpack_u32(message.limits)) > 9:
            return Failure("TooLarge", "the answer exceeds the frame limit", {})
        return answer(replica, message)

    bench.world.answer = bounded  # type: ignore[method-assign]
    reads = [bench.page_read(limit=10, timeline=timeline) for timeline in timelines]
    bench.run(*reads)
    for read in reads:
        assert_true(bench.world, read, 12)
    assert bench.reader.suspicion.names() == [], "a large answer is nobody's failure"
