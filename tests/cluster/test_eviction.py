"""Cold links in the storage tier: what may be evicted, when, and that nobody ever sees neither row nor link."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from cold_links import (
    ALICE,
    BUCKET,
    FIRST,
    FOREVER,
    OWNER,
    SECOND,
    SMALL,
    SYSTEM,
    THIRD,
    commit,
    link_of,
    rid,
)
from replica_group import BUCKETS, Group
from timetier.cluster.cold.link import RECORDS_AT, Link
from timetier.cluster.keys import item_key, timeline_hash, timeline_key
from timetier.cluster.messages import (
    DELETE,
    OK,
    PUT,
    RANGE,
    AskTables,
    Check,
    Checked,
    Scan,
    Scanned,
    Tables,
    pack_i64,
    pack_u32,
    unpack_i64,
    unpack_u32,
)
from timetier.cluster.paxos.core import Settings
from timetier.cluster.paxos.replica import VOTING


def look(group: Group, number: int) -> tuple[dict[bytes, tuple[int, bytes]], list[str]]:
    """(hot rows incl. tombstones, files of the links) as one replica answers them."""
    message = Check([ALICE], pack_i64([-1]), bytes((RANGE,)), [b""], pack_u32([1000]))
    answer = group.call(number, message)
    assert isinstance(answer, Checked)
    rows = {k: (kind, v) for kind, k, v in zip(answer.kinds, answer.keys, answer.values, strict=True)}
    return rows, [ref.file for links in answer.links for ref in links.refs]


def idle(group: Group) -> bool:
    return all(m.replica is None or m.replica.chores.pending == 0 for m in group.members)


def test_exactly_the_rows_that_the_link_holds_are_evicted_on_every_replica() -> None:
    group = Group(1)
    group.put(FIRST, ALICE, rid(1), [(n, b"", b"old") for n in range(10)])  # version 1
    group.put(FIRST, ALICE, rid(2), [(3, b"", b"newer"), (250, b"", b"other window")], seen=1)
    group.put(FIRST, ALICE, rid(3), [(4, b"", b"")], kinds=bytes((DELETE,)), seen=2)
    group.put(FIRST, ALICE, rid(4), [(5, b"", b"late")], seen=3)  # the sink read version 3
    commit(group, FIRST, link_of(3, event_before=9), 5, 0)
    group.run(1)
    group.run_until(lambda: idle(group))
    for number in range(3):
        rows, files = look(group, number)
        assert rows == {item_key(250): (PUT, b"other window"), item_key(9): (PUT, b"old"), item_key(5): (PUT, b"late")}
        assert files == ["f"]


def test_a_replica_that_is_behind_evicts_only_after_it_has_caught_up() -> None:
    group = Group(2)
    group.put(FIRST, ALICE, rid(1), [(1, b"", b"a")])
    group.run(0.1)
    group.cut = {frozenset((THIRD, FIRST)), frozenset((THIRD, SECOND))}
    group.put(FIRST, ALICE, rid(2), [(2, b"", b"b")], seen=1)
    group.cut.clear()
    commit(group, FIRST, link_of(2), 3, 0)
    group.run(2)
    group.run_until(lambda: idle(group))
    for number in range(3):
        assert look(group, number) == ({}, ["f"])
        assert group.replica(number).core.timeline(ALICE).chosen == 2


def test_an_eviction_that_a_crash_cut_short_is_finished_by_the_next_life() -> None:
    group = Group(3, settings=Settings(mark_delay_s=60))
    group.put(FIRST, ALICE, rid(1), [(n, b"", b"x") for n in range(20)])
    commit(group, FIRST, link_of(1), 2, 0)
    for number in range(3):
        group.crash(number)
    for number in range(3):
        group.start(number)
    group.run_until(lambda: all(m.replica and m.replica.state == VOTING for m in group.members))
    assert group.version(SYSTEM) == 1
    group.run(2)
    group.run_until(lambda: idle(group))
    for number in range(3):
        assert look(group, number) == ({}, ["f"])


def test_a_state_transfer_waits_for_the_links_that_its_rows_went_to() -> None:
    """Else there is a moment at which the receiver has neither the row nor the link."""
    group = Group(4, settings=SMALL)
    group.put(FIRST, ALICE, rid(0), [(0, b"", b"x")])
    group.run(0.1)
    group.crash(THIRD)
    for number in range(1, 60):
        group.put(FIRST, ALICE, rid(number), [(number, b"", b"x")], seen=number)
    commit(group, FIRST, link_of(60), 100, 0)
    group.run(2)
    group.run_until(lambda: idle(group))
    group.start(THIRD)
    group.run_until(lambda: group.replica(THIRD).state == VOTING)
    replica = group.replica(THIRD)
    replica.note_behind(group.now, FIRST, ALICE, 60)
    group.pump(THIRD)
    while replica.core.timeline(ALICE).chosen < 60:
        group.step()
        timeline = replica.core.timeline(ALICE)
        if timeline.chosen == 60:
            assert replica.core.timeline(SYSTEM).chosen == 1
    group.run(2)
    group.run_until(lambda: idle(group))
    assert look(group, THIRD) == ({}, ["f"])


def test_a_state_that_survives_a_crash_has_its_links_with_it() -> None:
    """That a link is chosen is noted with delay; but not later than rows that are found through it only."""
    group = Group(4, settings=replace(SMALL, mark_delay_s=60.0))
    group.put(FIRST, ALICE, rid(0), [(0, b"", b"x")])
    group.run(0.1)
    group.crash(THIRD)
    for number in range(1, 60):
        group.put(FIRST, ALICE, rid(number), [(number, b"", b"x")], seen=number)
    commit(group, FIRST, link_of(60), 100, 0)
    group.run(2)
    group.run_until(lambda: idle(group))
    group.start(THIRD)
    group.run_until(lambda: group.replica(THIRD).state == VOTING)
    third = group.replica(THIRD)
    third.run_chores = lambda now: False  # type: ignore[method-assign]  # an eviction would note it too
    third.note_behind(group.now, FIRST, ALICE, 60)
    group.pump(THIRD)
    group.run_until(lambda: third.core.timeline(ALICE).chosen == 60)
    group.members[THIRD].engine.sync()
    group.crash(THIRD)
    group.start(THIRD)
    group.run_until(lambda: group.replica(THIRD).state == VOTING)
    group.replica(THIRD).run_chores = lambda now: False  # type: ignore[method-assign]
    assert look(group, THIRD) == ({}, ["f"])


def test_the_sinks_scan_gives_the_newest_eligible_versions_and_skips_empty_buckets() -> None:
    group = Group(5)
    group.put(FIRST, ALICE, rid(1), [(n, b"", b"a%d" % n) for n in range(5)])
    group.put(FIRST, ALICE, rid(2), [(2, b"", b"b2")], seen=1)
    group.put(FIRST, ALICE, rid(3), [(3, b"", b"")], kinds=bytes((DELETE,)), seen=2)
    answer = group.call(FIRST, Scan(0, b"t", 4, FOREVER, b"", 1 << 20))
    assert isinstance(answer, Scanned)
    assert (answer.scanned_bucket, answer.timelines, unpack_u32(answer.counts)) == (BUCKET, [ALICE], [4])
    assert unpack_i64(answer.timeline_versions) == [3]
    assert list(zip(answer.kinds, answer.keys, answer.values, strict=True)) == [
        (PUT, item_key(0), b"a0"),
        (PUT, item_key(1), b"a1"),
        (PUT, item_key(2), b"b2"),
        (DELETE, item_key(3), b""),
    ]
    written_early = group.call(FIRST, Scan(0, b"t", 4, 0, b"", 1 << 20))
    assert isinstance(written_early, Scanned)
    assert not written_early.timelines
    assert written_early.next_bucket == -1


def test_a_replica_that_knows_to_be_behind_its_links_gives_neither_a_vote_nor_data() -> None:
    """Its hot rows would stand beside a block from which items deleted since are gone already."""
    group = Group(6)
    group.put(FIRST, ALICE, rid(1), [(1, b"", b"a"), (2, b"", b"b")])
    group.run(0.1)
    group.cut = {frozenset((THIRD, FIRST)), frozenset((THIRD, SECOND))}
    group.put(FIRST, ALICE, rid(2), [(2, b"", b"")], kinds=bytes((DELETE,)), seen=1)
    group.run(0.1)
    group.cut.clear()
    behind = group.replica(THIRD)
    run_chores = behind.run_chores
    behind.run_chores = lambda now: False  # type: ignore[method-assign]  # the eviction would fetch what is missing
    commit(group, FIRST, link_of(2), 3, 0)
    group.run_until(lambda: behind.core.timeline(SYSTEM).chosen == 1)
    message = Check([ALICE], pack_i64([-1]), bytes((RANGE,)), [b""], pack_u32([10]))
    token = group.send(THIRD, message)
    assert behind.core.timeline(ALICE).chosen == 1
    group.run_until(lambda: token in group.answers)
    answer = group.answers[token]
    assert isinstance(answer, Checked)
    assert (unpack_i64(answer.chosen), answer.keys, answer.links) == ([-1], [], [])
    behind.run_chores = run_chores  # type: ignore[method-assign]
    group.run(1)
    group.run_until(lambda: idle(group))
    assert look(group, THIRD) == ({}, ["f"])


def test_the_sink_finds_every_table_that_has_rows() -> None:
    group = Group(7)
    for number, table in enumerate((b"t", b"moments", b"z" * 64)):
        for owner in range(20):
            timeline = timeline_key(table, b"owner%d" % owner, BUCKETS)
            group.put(0, timeline, rid(100 * number + owner), [(1, b"", b"x")])
    group.put(0, SYSTEM, rid(999), [(RECORDS_AT, b"fence", b"x")])
    answer = group.call(0, AskTables(0))
    assert isinstance(answer, Tables)
    assert (answer.names, answer.next_bucket) == ([b"moments", b"t", b"z" * 64], -1)


@pytest.mark.parametrize("seed", range(10))
def test_hot_rows_and_links_always_cover_all_items_while_replicas_come_and_go(seed: int) -> None:
    """Every replica, at every moment, has for each item it should know either the row or a link that covers it."""
    print(f"seed {seed}")
    rng = random.Random(seed)
    group = Group(seed, settings=SMALL)
    written: dict[int, int] = {}
    version = system = request = 0
    links: dict[int, Link] = {}
    for _ in range(60):
        alive = [n for n in range(3) if group.votes(n)]
        act = rng.random()
        if act < 0.6 and len(alive) >= 2:
            request += 1
            stamp = rng.randrange(0, 300)
            outcome, at = group.put(
                rng.choice(alive), ALICE, rid(request), [(stamp, b"", b"v%d" % request)], seen=version
            )
            assert outcome == OK
            version, written[stamp] = at, at
        elif act < 0.75 and len(alive) >= 2 and version:
            start = rng.randrange(3) * 100
            generation = links[start].generation + 1 if start in links else 1
            link = link_of(version, window=(start, start + 100), event_before=300, generation=generation)
            request += 1
            commit(group, rng.choice(alive), link, request, system)
            system, links[start] = system + 1, link
        elif act < 0.9:
            victim = rng.randrange(3)
            if group.members[victim].replica is None:
                group.start(victim)
            elif len(alive) == 3:
                group.crash(victim)
        group.run(rng.choice([0.005, 0.1, 1.0]))
        for number in range(3):
            if group.votes(number):
                _check_cover(group, number, written)
    assert BUCKETS == 64


def _check_cover(group: Group, number: int, written: dict[int, int]) -> None:
    replica = group.replica(number)
    message = Check([ALICE], pack_i64([-1]), bytes((RANGE,)), [b""], pack_u32([1000]))
    answer = group.call(number, message)
    assert isinstance(answer, Checked)
    chosen = unpack_i64(answer.chosen)[0]
    rows = dict(zip(answer.keys, unpack_i64(answer.versions), strict=True))
    known = replica.links.of_table(BUCKET, b"t")
    for stamp, version in written.items():
        if version > chosen or rows.get(item_key(stamp)) == version:
            continue
        covering = [
            link for link in known.overlapping(stamp, stamp) if link.version_of(timeline_hash(b"t", OWNER)) >= version
        ]
        assert covering, f"item {stamp} of version {version} is in no row and under no link at replica {number}"
