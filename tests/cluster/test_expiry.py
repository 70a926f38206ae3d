"""Retention in the storage tier: expired rows are freed on every replica, and no reader sees them again."""

from __future__ import annotations

import struct

import pytest
from replica_group import BUCKETS, Group, key_of, write_message
from timetier.cluster.cold.sink_calls import horizon_key
from timetier.cluster.keys import MAX_TIMESTAMP, MIN_TIMESTAMP, bucket_of, item_key, priority, system_timeline
from timetier.cluster.messages import (
    DELETE,
    DELTA,
    OK,
    PUT,
    RANGE,
    AskDigests,
    AskVersions,
    Check,
    Checked,
    Digests,
    Scan,
    Scanned,
    Value,
    Versions,
    Write,
    Written,
    pack_i64,
    pack_u32,
    unpack_i64,
    unpack_u32,
)
from timetier.cluster.paxos.core import Settings
from timetier.cluster.paxos.rows import chore_key, prefix_end, rows_prefix

ALICE = key_of("alice")
BUCKET = bucket_of(ALICE)
SYSTEM = system_timeline(BUCKET)
PLACE = ALICE[:4] + b"\x01t"
FIRST, SECOND, THIRD = priority(ALICE, 3)
SMALL = Settings(request_id_entries=8, log_keep_entries=8, chore_rows=3, expire_rest_s=0.2)


def group_with(seed: int, timestamps: list[int], settings: Settings = SMALL) -> Group:
    """Alice has an item at each of these times, an entry each."""
    group = Group(seed, settings=settings)
    for version, timestamp in enumerate(timestamps):
        put(group, version, timestamp)
    group.run(0.1)
    return group


def put(group: Group, version: int, timestamp: int, *, replica: int = FIRST, kind: int = PUT) -> None:
    items = [(timestamp, b"", b"" if kind == DELETE else b"v%d" % version)]
    request_id = (1_000 + version).to_bytes(16, "big")
    assert group.put(replica, ALICE, request_id, items, seen=version, kinds=bytes((kind,))) == (OK, version + 1)


def horizon_message(horizon: int, system_version: int) -> Write:
    message = write_message(SYSTEM, (5_000 + system_version).to_bytes(16, "big"), [], if_version=system_version)
    message.kinds, message.counts = bytes((PUT,)), pack_u32([1])
    message.keys.append(horizon_key(b"t"))
    message.values.append(struct.pack("<q", horizon))
    return message


def move_horizon(group: Group, horizon: int, system_version: int, *, replica: int = FIRST) -> None:
    answer = group.call(replica, horizon_message(horizon, system_version))
    assert isinstance(answer, Written) and answer.outcomes[0] == OK


def timestamps_on(group: Group, number: int) -> list[int]:
    """Of all rows of alice that a replica's engine has."""
    prefix = rows_prefix(ALICE)
    names = [name for name, _ in group.members[number].engine.scan(prefix, prefix_end(prefix))]
    return [int.from_bytes(name[len(prefix) : len(prefix) + 8], "big") - (1 << 63) for name in names]


def read(group: Group, number: int, have: int = -1) -> Checked:
    want = RANGE if have < 0 else DELTA
    answer = group.call(number, Check([ALICE], pack_i64([have]), bytes((want,)), [b""], pack_u32([100])))
    assert isinstance(answer, Checked)
    return answer


def scan(group: Group, number: int, **more: object) -> Scanned:
    fields = {"event_before": MAX_TIMESTAMP, "written_before": MAX_TIMESTAMP, "all_links": False, **more}
    found = group.replica(number).scans
    cut_offs = fields.pop("event_before"), fields.pop("written_before")
    return found.scan(Scan(0, b"t", *cut_offs, b"", 1 << 20, **fields), range(BUCKETS))[0]  # type: ignore[arg-type]


# ---------------------------------------------------------------- what is freed


def test_expired_rows_are_freed_on_every_replica_with_all_their_versions_and_tombstones() -> None:
    group = group_with(1, [10, 20, 10, 30, 40])
    put(group, 5, 20, kind=DELETE)
    move_horizon(group, 35, 0)
    group.run(0.5)
    assert [timestamps_on(group, number) for number in range(3)] == [[40]] * 3
    for number in range(3):
        replica = group.replica(number)
        assert replica.chores.pending == 0
        assert replica.core.timeline(ALICE).floor == 6, "the log is not asked for the values that are gone"
        assert replica.core.counters.totals["rows_expired"] == 5
    assert read(group, FIRST, have=1).payloads == bytes((RANGE,)), "a delta would lack rows"


def test_rows_that_are_written_below_the_horizon_are_freed_too() -> None:
    group = group_with(2, [50])
    move_horizon(group, 35, 0)
    group.run(0.5)
    for version, timestamp in enumerate((34, 35, MIN_TIMESTAMP + 1), start=1):
        put(group, version, timestamp)
    assert min(timestamps_on(group, FIRST)) < 35
    group.run(1.0)
    assert [timestamps_on(group, number) for number in range(3)] == [[35, 50]] * 3


def test_a_row_whose_entry_is_not_known_to_be_chosen_stays_until_it_is() -> None:
    group = group_with(3, [50])
    move_horizon(group, 35, 0)
    group.run(0.5)
    group.cut = {frozenset((FIRST, SECOND)), frozenset((FIRST, THIRD))}
    token = group.send(FIRST, write_message(ALICE, b"o" * 16, [(7, b"", b"open")], seen=1))
    group.run(1.0)
    assert token not in group.answers
    assert timestamps_on(group, FIRST) == [7, 50], "peers may ask for what it has accepted"
    assert group.replica(FIRST).acceptor.accepted_value(group.replica(FIRST).core.timeline(ALICE)) is not None
    group.cut = set()
    group.run_until(lambda: all(timestamps_on(group, number) == [50] for number in range(3)))


def test_a_replica_that_catches_up_frees_what_it_is_sent() -> None:
    group = group_with(4, [10, 50])
    group.crash(THIRD)
    move_horizon(group, 35, 0)
    for version in range(2, 40):
        put(group, version, 20 + version % 5)
    group.run(0.1)
    group.start(THIRD)
    group.run_until(lambda: group.votes(THIRD))
    put(group, 40, 60)
    assert group.replica(THIRD).note_behind(group.now, FIRST, SYSTEM, 1)
    group.pump(THIRD)
    group.run_until(lambda: all(timestamps_on(group, number) == [50, 60] for number in range(3)))


@pytest.mark.parametrize("slices", range(8))
def test_a_crash_between_any_two_slices_forgets_nothing_that_has_to_be_freed(slices: int) -> None:
    group = group_with(5, [*range(10, 22), 50])
    move_horizon(group, 35, 0)
    for _ in range(slices):
        group.replica(FIRST).run_chores(group.now)
    group.crash(FIRST)
    group.start(FIRST)
    group.run_until(lambda: timestamps_on(group, FIRST) == [50])
    group.run_until(lambda: group.replica(FIRST).chores.pending == 0)


def test_a_crash_between_a_write_below_the_horizon_and_its_end_forgets_nothing() -> None:
    group = group_with(6, [50])
    move_horizon(group, 35, 0)
    group.run(0.5)
    put(group, 1, 20)
    group.run(0.01)
    for number in range(3):
        group.members[number].engine.sync()
        group.crash(number)
        group.start(number)
    group.run_until(lambda: all(timestamps_on(group, number) == [50] for number in range(3)))


def test_replicas_that_differ_only_in_what_has_expired_have_one_digest() -> None:
    group = group_with(7, [10, 20, 50])
    move_horizon(group, 35, 0)
    for number in range(3):
        if number != THIRD:
            group.run_until(lambda number=number: timestamps_on(group, number) == [50])
    core = group.replica(THIRD).core
    for timestamp, version in ((10, 1), (20, 2)):  # as if it had not come to free them
        core.engine.put(rows_prefix(ALICE) + item_key(timestamp) + version.to_bytes(8, "big"), bytes(9))
    group.run_until(lambda: core.timeline(SYSTEM).chosen == 1)
    core.timeline(ALICE).floor = group.replica(FIRST).core.timeline(ALICE).floor
    digests = []
    for number in (FIRST, THIRD):
        answer = group.call(number, AskDigests(0, b"", [ALICE], pack_i64([3])))
        assert isinstance(answer, Digests)
        digests.append((answer.versions, answer.systems, answer.digests))
    assert digests[0] == digests[1] and unpack_i64(digests[0][0]) == [3]


# ---------------------------------------------------------------- what the sink is told


def test_rows_below_the_horizon_do_not_sink() -> None:
    group = group_with(8, [10, 50])
    group.crash(THIRD)  # so that nothing is freed there
    move_horizon(group, 35, 0)
    group.run(0.05)
    put(group, 2, 20)
    group.run(0.05)
    answer = scan(group, FIRST)
    assert (answer.keys, answer.horizon) == ([item_key(50)], 35)


def test_a_bucket_is_told_when_something_has_expired_and_a_step_has_passed() -> None:
    group = group_with(9, [40, 60])
    quiet = {"event_before": 30}
    assert scan(group, FIRST, **quiet, expire_before=40, expire_step=5).scanned_bucket == BUCKETS - 1, (
        "nothing below 40"
    )
    answer = scan(group, FIRST, **quiet, expire_before=41, expire_step=5)
    assert (answer.scanned_bucket, answer.timelines, answer.horizon) == (BUCKET, [], MIN_TIMESTAMP)
    move_horizon(group, 41, 0)
    group.run(0.5)
    assert scan(group, FIRST, **quiet, expire_before=61, expire_step=25).scanned_bucket == BUCKETS - 1, "no step yet"
    assert scan(group, FIRST, **quiet, expire_before=61, expire_step=20).scanned_bucket == BUCKET
    move_horizon(group, 61, 1)
    group.run(0.5)
    assert scan(group, FIRST, **quiet, expire_before=1_000, expire_step=1).scanned_bucket == BUCKETS - 1, "all is gone"


# ---------------------------------------------------------------- what readers are told


def accept_horizon(group: Group, horizon: int) -> None:
    """SECOND has accepted a horizon that FIRST has proposed, and nobody tells it that it was chosen."""
    token = group.send(FIRST, horizon_message(horizon, 0))
    replica = group.replica(SECOND)
    group.run_until(lambda: replica.core.timeline(SYSTEM).record is not None or token in group.answers)


def test_a_replica_that_does_not_know_whether_a_horizon_was_chosen_is_no_vote_until_it_has_settled_it() -> None:
    group = group_with(10, [10, 50])
    replica = group.replica(SECOND)
    accept_horizon(group, 35)
    assert replica.core.timeline(SYSTEM).record is not None
    group.crash(FIRST)
    group.events.clear()  # its last messages are lost
    answer = group.call(SECOND, AskVersions([ALICE, key_of("bob")]))
    assert isinstance(answer, Versions)
    assert unpack_u32(answer.unsure) == [0], "bob's bucket has no such entry"
    assert unpack_i64(read(group, SECOND).chosen) == [-1]
    for _ in range(200):
        if unpack_i64(read(group, SECOND).chosen) != [-1]:
            break
        group.run(0.01)
    answer = group.call(SECOND, AskVersions([ALICE]))
    assert isinstance(answer, Versions)
    assert (unpack_u32(answer.unsure), unpack_i64(answer.horizons)) == ([], [35])
    assert unpack_i64(read(group, SECOND).horizons) == [35]


def test_horizons_are_known_after_a_restart_at_once_and_after_a_crash_in_the_middle() -> None:
    group = group_with(11, [10, 50])
    move_horizon(group, 35, 0)
    group.run(0.5)
    place = PLACE
    for member in group.members:
        member.engine.sync()
    for number in range(3):
        group.crash(number)
    for number in range(3):
        group.start(number)
        standings = group.replica(number).core.standings
        assert standings.known[place].horizon == 35 and not standings.stirred
    group.run_until(lambda: all(group.votes(number) for number in range(3)))
    replica = group.replica(FIRST)
    value = Value(replica.core.life, 1, [], bytes((PUT,)), [horizon_key(b"t")], [struct.pack("<q", 45)])
    replica.acceptor.accept(replica.core.timeline(SYSTEM), (7, replica.core.life), value)
    group.members[FIRST].engine.sync()
    group.crash(FIRST)
    group.start(FIRST)
    replica = group.replica(FIRST)
    assert replica.core.standings.in_doubt(BUCKET, b"t"), "it was accepted, and maybe chosen"
    assert replica.links.standing(BUCKET, b"t").horizon == 35
    replica.acceptor.choose(replica.core.timeline(SYSTEM))
    assert replica.links.standing(BUCKET, b"t").horizon == 45 and not replica.core.standings.in_doubt(BUCKET, b"t")


def test_a_folder_of_a_format_without_standings_is_worked_out_in_the_background() -> None:
    group = group_with(12, [10, 50])
    move_horizon(group, 35, 0)
    group.run(0.5)
    engine = group.members[FIRST].engine
    for name in (b"Nstandings", b"B" + ALICE[:4]):
        engine.delete(name)
    engine.sync()
    group.crash(FIRST)
    group.start(FIRST)
    assert engine.get(chore_key(SYSTEM, 0)) is not None
    group.run_until(lambda: group.replica(FIRST).chores.pending == 0)
    assert group.replica(FIRST).core.standings.known[PLACE].horizon == 35
