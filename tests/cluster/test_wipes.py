"""Timelines that were wiped while cold blocks hold their rows: scans name them until no link holds what was wiped."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cold_links import ALICE, BUCKET, FIRST, SECOND, SMALL, SYSTEM, THIRD, commit, link_of, rid
from replica_group import BUCKETS, Group, key_of, write_message
from timetier.cluster.cold.link import Carried, Link
from timetier.cluster.keys import timeline_hash
from timetier.cluster.messages import DELETE, OK, PUT, WIPE, Scan, Scanned, pack_i64, pack_u32, unpack_i64, unpack_u32
from timetier.cluster.paxos.core import Settings

OTHER = next(key for key in (key_of(f"other-{n}") for n in range(10_000)) if key[:4] == ALICE[:4])


def put(group: Group, version: int, timestamp: int, *, timeline: bytes = ALICE) -> None:
    number = 1_000 + version + (timeline == OTHER) * 500
    assert group.put(FIRST, timeline, rid(number), [(timestamp, b"", b"x")], seen=version) == (OK, version + 1)


def wipe(group: Group, version: int, *, replica: int = FIRST) -> None:
    message = write_message(ALICE, rid(3_000 + version), [], seen=version)
    message.kinds, message.counts = bytes((WIPE,)), pack_u32([1])
    message.keys.append(b"")
    message.values.append(b"")
    group.call(replica, message)


def scan(group: Group, number: int, *, cursor: bytes = b"", limit: int = 1 << 20, event_before: int = 5) -> Scanned:
    message = Scan(BUCKET, b"t", event_before, 1 << 62, cursor, limit, all_links=False)
    return group.replica(number).scans.scan(message, range(BUCKETS))[0]


def told(group: Group, number: int) -> list[tuple[bytes, int, int, int]]:
    """(timeline, version, wiped, rows) of the bucket's timelines that a scan names."""
    answer = scan(group, number)
    if answer.scanned_bucket != BUCKET:
        return []
    columns = unpack_i64(answer.timeline_versions), unpack_i64(answer.wiped), unpack_u32(answer.counts)
    return list(zip(answer.timelines, *columns, strict=True))


def sunk(seed: int, settings: Settings = SMALL) -> Group:
    """Alice's three items are in a block, and gone from the storage tier."""
    group = Group(seed, settings=settings)
    for version in range(3):
        put(group, version, 10 + version)
    commit(group, FIRST, link_of(3), 1, 0)
    group.run(0.5)
    return group


def test_a_wiped_timeline_without_rows_is_named_until_a_link_was_made_after_the_wipe() -> None:
    group = sunk(1)
    assert told(group, FIRST) == []
    wipe(group, 3)
    group.run(0.3)
    for number in range(3):
        assert told(group, number) == [(ALICE, 4, 3, 0)]
        assert len(scan(group, number).links) == 1
    commit(group, FIRST, link_of(4, generation=2), 2, 1)
    group.run(0.3)
    assert [told(group, number) for number in range(3)] == [[]] * 3


def test_a_link_as_of_the_wiped_version_itself_still_holds_what_was_wiped() -> None:
    group = sunk(2)
    wipe(group, 3)
    group.run(0.3)
    commit(group, FIRST, link_of(3, generation=2), 2, 1)
    group.run(0.3)
    assert told(group, SECOND) == [(ALICE, 4, 3, 0)]


def test_a_link_that_goes_takes_the_note_along() -> None:
    group = sunk(3)
    wipe(group, 3)
    group.run(0.3)
    message = write_message(SYSTEM, rid(77), [], if_version=1)
    message.kinds, message.counts = bytes((DELETE,)), pack_u32([1])
    message.keys.append(link_of(3).key)
    message.values.append(b"")
    group.call(FIRST, message)
    group.run(0.3)
    assert [told(group, number) for number in range(3)] == [[]] * 3
    assert all(not group.replica(number).core.wipes.held for number in range(3))


def test_a_link_that_was_read_before_the_wipe_and_written_after_it_is_noticed() -> None:
    group = Group(4, settings=SMALL)
    for version in range(3):
        put(group, version, 10 + version)
    wipe(group, 3)
    group.run(0.3)
    assert told(group, FIRST) == [], "there is no block yet"
    commit(group, FIRST, link_of(3), 1, 0)
    group.run(0.3)
    assert [told(group, number) for number in range(3)] == [[(ALICE, 4, 3, 0)]] * 3


def test_a_note_survives_restarts_and_a_transfer_of_state() -> None:
    group = sunk(5)
    group.crash(THIRD)
    wipe(group, 3)
    for version in range(4, 60):
        put(group, version, 1_000)
    group.run(0.3)
    group.start(THIRD)
    group.run_until(lambda: group.votes(THIRD))
    assert group.replica(THIRD).note_behind(group.now, FIRST, ALICE, 60)
    group.pump(THIRD)
    group.run_until(lambda: group.replica(THIRD).core.timeline(ALICE).chosen == 60)
    assert group.replica(THIRD).core.counters.totals.get("states_installed", 0) > 0
    group.run(0.5)
    assert told(group, THIRD) == [(ALICE, 60, 3, 0)]
    for number in range(3):
        group.members[number].engine.sync()
        group.crash(number)
        group.start(number)
    group.run_until(lambda: all(group.votes(number) for number in range(3)))
    assert [told(group, number)[0][::2] for number in range(3)] == [(ALICE, 3)] * 3


@pytest.mark.parametrize("slices", range(6))
def test_a_crash_right_after_a_wipe_forgets_nothing(slices: int) -> None:
    group = sunk(6)
    wipe(group, 3)
    for _ in range(slices):
        group.replica(FIRST).run_chores(group.now)
    group.crash(FIRST)
    group.start(FIRST)
    group.run_until(lambda: bool(group.votes(FIRST) and told(group, FIRST)))
    assert told(group, FIRST)[0][0] == ALICE


def test_rows_of_other_timelines_come_in_order_with_those_that_were_wiped_and_pages_go_on() -> None:
    group = sunk(7)
    put(group, 0, 3, timeline=OTHER)
    wipe(group, 3)
    group.run(0.3)
    assert told(group, FIRST) == sorted([(ALICE, 4, 3, 0), (OTHER, 1, 0, 1)])
    names, cursor = [], b""
    while True:
        answer = scan(group, FIRST, cursor=cursor, limit=1)
        names += answer.timelines
        if answer.next_bucket != BUCKET:
            break
        cursor = answer.next_cursor
    assert names == sorted((ALICE, OTHER))


def test_a_carried_owner_is_held_unless_the_run_that_read_it_came_after_the_wipe() -> None:
    owner = timeline_hash(b"t", b"alice")
    hashes = link_of(1).owners

    def carried(version: int) -> Link:
        return replace_versions(link_of(0), [Carried(100, 100, hashes, pack_i64([version]))])

    assert carried(5).holds_wiped(owner, 5)
    assert not carried(6).holds_wiped(owner, 5)
    assert link_of(0).holds_wiped(owner, 5)
    assert not link_of(6).holds_wiped(owner + 1, 5), "the blocks hold nothing of it"


def replace_versions(link: Link, carried: list[Carried]) -> Link:
    fields = {name: getattr(link, name) for name in link.__struct_fields__}
    return Link(**{**fields, "carried": carried})


def test_a_timeline_that_was_wiped_and_has_eligible_rows_is_named_once_with_its_rows() -> None:
    group = sunk(8, replace(SMALL, chore_rows=1))
    wipe(group, 3)
    put(group, 4, 2)
    group.run(0.3)
    assert told(group, FIRST) == [(ALICE, 5, 3, 1)]
    assert bytes(scan(group, FIRST).kinds) == bytes((PUT,))
