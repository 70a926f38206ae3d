"""The sink does not look again where nothing can be old enough, and misses nothing for that."""

from __future__ import annotations

import pytest
from cold_links import link_of, rid
from counting_engine import CountingEngine
from interaction import Interpreter
from interaction_text import owner_key
from msgspec import structs
from replica_group import BUCKETS, Group, key_of, write_message
from timetier.cluster.cold.link import encode_link
from timetier.cluster.keys import MAX_TIMESTAMP, bucket_of, item_key, priority, system_timeline
from timetier.cluster.messages import DELETE, OK, PUT, Scan, Scanned, Written, pack_u32, unpack_u32
from timetier.cluster.paxos.core import Settings
from timetier.cluster.paxos.replica import Replica

FOR_EVER = MAX_TIMESTAMP


def put(group: Group, timeline: bytes, number: int, timestamp: int, *, seen: int, kind: int = PUT) -> int:
    """One mutation; the version that it made."""
    replica = next(replica for replica in priority(timeline, 3) if group.votes(replica))
    items = [(timestamp, b"", b"" if kind == DELETE else b"v%d" % number)]
    outcome, version = group.put(replica, timeline, number.to_bytes(16, "big"), items, seen=seen, kinds=bytes((kind,)))
    assert outcome == OK
    return version


def scan_all(replica: Replica, event_before: int, written_before: int, table: bytes = b"t") -> set[tuple[bytes, bytes]]:
    """(timeline, item key) of all rows that a replica says may sink."""
    found: set[tuple[bytes, bytes]] = set()
    bucket, cursor = 0, b""
    while bucket >= 0:
        answer, _ = replica.scans.scan(
            Scan(bucket, table, event_before, written_before, cursor, 1 << 20), replica.owned
        )
        found |= rows_of(answer)
        bucket, cursor = answer.next_bucket, answer.next_cursor
    return found


def rows_of(answer: Scanned) -> set[tuple[bytes, bytes]]:
    keys = iter(answer.keys)
    counts = unpack_u32(answer.counts)
    return {(name, next(keys)) for name, count in zip(answer.timelines, counts, strict=True) for _ in range(count)}


def rows_read_by_another_scan(timelines: int) -> int:
    group = Group(1)
    engine = group.members[0].engine = CountingEngine()
    group.start(0)
    group.run_until(lambda: group.votes(0))
    for number in range(timelines):
        put(group, key_of(f"owner-{number}"), number, 1_000 + number, seen=0)
    group.run(0.5)
    replica = group.replica(0)
    assert scan_all(replica, 500, FOR_EVER) == set()
    engine.commit()
    engine.rows_read = 0
    assert scan_all(replica, 900, FOR_EVER) == set()
    return engine.rows_read


def test_planning_unchanged_buckets_reads_as_many_rows_however_many_timelines_there_are() -> None:
    few, many = rows_read_by_another_scan(20), rows_read_by_another_scan(500)
    assert many <= few + BUCKETS


def test_it_is_known_after_a_restart_too() -> None:
    group = Group(2)
    engine = group.members[0].engine = CountingEngine()
    group.start(0)
    group.run_until(lambda: group.votes(0))
    for number in range(300):
        put(group, key_of(f"owner-{number}"), number, 1_000, seen=0)
    group.run(1.0)
    scan_all(group.replica(0), 500, FOR_EVER)
    engine.sync()
    group.crash(0)
    group.start(0)
    group.run_until(lambda: group.votes(0))
    engine.rows_read = 0
    assert scan_all(group.replica(0), 600, FOR_EVER) == set()
    assert engine.rows_read <= 4 * BUCKETS


@pytest.mark.parametrize("late", [10, 499, 500, 999])
def test_a_late_write_into_a_quiet_bucket_is_found(late: int) -> None:
    group = Group(3)
    timeline = key_of("alice")
    put(group, timeline, 1, 1_000, seen=0)
    group.run(0.1)
    replica = group.replica(0)
    assert scan_all(replica, 500, FOR_EVER) == set()
    put(group, timeline, 2, late, seen=1)
    group.run(0.1)
    expected = {(timeline, item_key(late))} if late < 500 else set()
    assert scan_all(replica, 500, FOR_EVER) == expected
    assert scan_all(replica, 1_000, FOR_EVER) == {(timeline, item_key(late))}


def test_an_item_that_is_old_by_its_time_sinks_when_it_was_written_long_enough_ago() -> None:
    group = Group(4)
    timeline = key_of("alice")
    put(group, timeline, 1, 10, seen=0)
    group.run(0.1)
    replica = group.replica(0)
    now_us = int(group.now * 1e6) + 1_000_000
    assert scan_all(replica, 500, 1_000) == set(), "written later than that"
    assert scan_all(replica, 500, 2_000) == set()
    assert scan_all(replica, 500, now_us) == {(timeline, item_key(10))}


def test_an_entry_that_is_chosen_after_a_scan_is_found_by_the_next_one() -> None:
    """Its rows were written before the scan, which could not see them."""
    interpreter = Interpreter()
    for line in ("cluster", "write r0 alice@10=a id=a", "sync r0", "deliver r0->r1", "sync r1"):
        interpreter.run(line)
    replica = interpreter.group.replica(1)
    assert scan_all(replica, 500, FOR_EVER, b"moments") == set(), "it is not known to be chosen here"
    interpreter.run("stabilize")
    assert scan_all(replica, 500, FOR_EVER, b"moments") == {(owner_key("alice"), item_key(10))}


@pytest.mark.parametrize("seed", range(10))
def test_what_is_left_out_is_never_what_a_scan_of_everything_finds(seed: int) -> None:
    print(f"seed {seed}")
    group = Group(200 + seed, settings=Settings(chore_rows=3))
    random = group.random
    timelines = [key_of(f"owner-{number}") for number in range(12)]
    versions = dict.fromkeys(timelines, 0)
    group.loss = 0.1
    event, written = 100, 0
    left_out = 0
    for round_ in range(60):
        timeline = random.choice(timelines)
        timestamp = random.choice([random.randrange(event), random.randrange(event, event + 300)])
        kind = random.choice([PUT, PUT, PUT, DELETE])
        versions[timeline] = put(group, timeline, round_ + 1, timestamp, seen=versions[timeline], kind=kind)
        if random.random() < 0.15:
            number = random.randrange(3)
            group.crash(number)
            group.run(random.choice([0.05, 0.7]))
            group.start(number)
            group.run_until(lambda: all(group.votes(number) for number in range(3)))
        group.run(random.choice([0.0, 0.01, 0.2]))
        if random.random() < 0.5:
            event += random.randrange(20)
            now_us = int(group.now * 1e6) + 1_000_000
            written = random.choice([written, now_us - 500_000, now_us, FOR_EVER])
            replica = group.replica(random.randrange(3))
            before = replica.core.counters.totals.get("quiet_buckets", 0)
            found = scan_all(replica, event, written)
            left_out += replica.core.counters.totals.get("quiet_buckets", 0) - before
            known = dict(replica.core.quiet.bounds)
            replica.core.quiet.bounds.clear()
            assert scan_all(replica, event, written) == found
            for place, bound in known.items():
                replica.core.quiet.put(place, bound)  # in the engine too, as a restart finds it
    assert left_out > 0


def sink_everywhere(group: Group) -> None:
    """Every bucket has a row that is young, and a link of a window in which nothing has expired."""
    for bucket in range(BUCKETS):
        owner = next(f"o{n}" for n in range(10_000) if bucket_of(key_of(f"o{n}")) == bucket)
        put(group, key_of(owner), bucket, 1_000, seen=0)
        link = structs.replace(link_of(0, window=(500, 600)), bucket=bucket)
        message = write_message(system_timeline(bucket), rid(9_000 + bucket), [], if_version=0)
        message.kinds, message.counts = bytes((PUT,)), pack_u32([1])
        message.keys.append(link.key)
        message.values.append(encode_link(link))
        answer = group.call(next(n for n in priority(system_timeline(bucket), 3) if group.votes(n)), message)
        assert isinstance(answer, Written) and answer.outcomes[0] == OK
    group.run(1.0)


def test_an_idle_scan_is_one_call_that_reads_no_row_and_parses_no_link_also_after_a_restart() -> None:
    group = Group(5)
    engine = group.members[0].engine = CountingEngine()
    group.start(0)
    group.run_until(lambda: all(map(group.votes, range(3))))
    sink_everywhere(group)
    question = Scan(0, b"t", 500, FOR_EVER, b"", 1 << 20, expire_before=500, expire_step=10, all_links=False)
    for round_ in range(3):
        replica = group.replica(0)
        group.run_until(lambda replica=replica: replica.chores.pending == 0)
        engine.commit()
        replica.links._buckets.clear()
        engine.rows_read = 0
        answer, _ = replica.scans.scan(question, replica.owned)
        assert (answer.timelines, answer.next_bucket) == ([], -1)
        if round_:
            assert engine.rows_read <= 4, "but for the bucket that an answer without anything names"
            assert len(replica.links._buckets) <= 1
        if round_ == 1:
            engine.sync()
            group.crash(0)
            group.start(0)
            group.run_until(lambda: group.votes(0))


def test_with_all_links_every_bucket_with_links_is_answered() -> None:
    group = Group(6)
    sink_everywhere(group)
    replica = group.replica(0)
    found, bucket = [], 0
    while bucket >= 0:
        answer, _ = replica.scans.scan(Scan(bucket, b"t", 500, FOR_EVER, b"", 1 << 20), replica.owned)
        found += [answer.scanned_bucket] * bool(answer.links)
        bucket = answer.next_bucket
    assert found == list(range(BUCKETS))


def test_an_expired_window_is_told_by_the_place_of_its_links_alone() -> None:
    group = Group(7)
    sink_everywhere(group)
    replica = group.replica(0)

    def buckets_told(expire_before: int) -> int:
        told, bucket = 0, 0
        while bucket >= 0:
            question = Scan(bucket, b"t", 500, FOR_EVER, b"", 1 << 20, expire_before, 1, all_links=False)
            answer, _ = replica.scans.scan(question, replica.owned)
            told += bool(answer.links) and answer.next_bucket >= 0
            bucket = answer.next_bucket
        return told

    assert buckets_told(500) == 0
    assert buckets_told(501) == BUCKETS - 1, "and the last one"
