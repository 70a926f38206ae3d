"""The pure consensus core: what a client sees, the fast path, lost rights, duels, catching up."""

from __future__ import annotations

import pytest
from replica_group import Group, key_of, write_message
from timetier.cluster.keys import item_key, priority
from timetier.cluster.messages import (
    CONFLICT,
    DELETE,
    DELTA,
    INVALID,
    OK,
    PUT,
    RANGE,
    SAME,
    STALE,
    UNKNOWN,
    WIPE,
    Check,
    Checked,
    Written,
    pack_i64,
    pack_u32,
    unpack_i64,
)
from timetier.cluster.paxos.core import Settings
from timetier.cluster.paxos.replica import FENCED, VOTING

ALICE = key_of("alice")
FIRST, SECOND, THIRD = priority(ALICE, 3)


def rid(number: int) -> bytes:
    return number.to_bytes(16, "big")


def check(group: Group, number: int, have: int = -1, limit: int = 100, want: int = DELTA) -> Checked:
    message = Check([ALICE], pack_i64([have]), bytes((want,)), [b""], pack_u32([limit]))
    answer = group.call(number, message)
    assert isinstance(answer, Checked)
    return answer


def live(answer: Checked) -> dict[bytes, bytes]:
    return {k: v for kind, k, v in zip(answer.kinds, answer.keys, answer.values, strict=True) if kind == PUT}


def test_healthy_writes_need_no_prepare() -> None:
    group = Group(1)
    for number in range(200):
        assert group.put(FIRST, ALICE, rid(number), [(number, b"", b"x")], seen=number) == (OK, number + 1)
    counters = group.replica(FIRST).core.counters.totals
    assert counters.get("prepares", 0) == 0
    assert counters["fast_accepts"] == 200
    group.run(0.1)
    assert [group.replica(n).core.timeline(ALICE).chosen for n in range(3)] == [200] * 3


def test_a_range_that_ends_right_above_an_item_has_that_item() -> None:
    """A reader that goes on below a block asks with the block's upper end, which lies right above its last key."""
    group = Group(1)
    for item_id in (b"", b"x", b"\x00\x01"):
        assert group.put(FIRST, ALICE, item_id.ljust(16, b"i"), [(7, item_id, b"v")])[0] == OK
    keys = [item_key(7, item_id) for item_id in (b"", b"x", b"\x00\x01")]
    for key in keys:
        for bound, included in ((key, False), (key + b"\x00", True), (key + b"\xff", True)):
            message = Check([ALICE], pack_i64([-1]), bytes((RANGE,)), [bound], pack_u32([100]))
            answer = group.call(FIRST, message)
            assert isinstance(answer, Checked)
            assert set(live(answer)) == {k for k in keys if k < bound}
            assert (key in live(answer)) is included


@pytest.mark.parametrize("limits", [{"log_keep_entries": 4}, {"log_keep_entries": 1_000, "log_keep_bytes": 200}])
def test_the_log_is_trimmed_and_the_timeline_marked_in_one_write(limits: dict[str, int]) -> None:
    """A log with a gap would look like a shorter one: its replica would forget what it has accepted."""
    group = Group(1, settings=Settings(request_id_entries=4, mark_delay_s=60.0, **limits))
    engine = group.members[FIRST].engine
    batches: list[list[tuple[bytes, bytes | None]]] = []
    commit = engine.commit

    def note_and_commit() -> int:
        if engine._pending:
            batches.append(list(engine._pending))
        return commit()

    engine.commit = note_and_commit  # type: ignore[method-assign]
    for number in range(40):
        items = [(7, b"", b"x" * 20), (number, b"", b"x" * 20)]
        assert group.put(FIRST, ALICE, rid(number), items, seen=number)[0] == OK
    rows = b"R" + ALICE
    trims = [batch for batch in batches if any(value is None and name.startswith(rows) for name, value in batch)]
    trims += [batch for batch in batches if any(value is None and name.startswith(b"L") for name, value in batch)]
    assert trims
    assert all(any(name == b"M" + ALICE for name, _ in batch) for batch in trims)


def test_requests_that_wait_share_an_entry() -> None:
    group = Group(2)
    tokens = [group.send(FIRST, write_message(ALICE, rid(n), [(n, b"", b"v")])) for n in range(50)]
    group.run_until(lambda: all(token in group.answers for token in tokens))
    versions = set()
    for token in tokens:
        answer = group.answers[token]
        assert isinstance(answer, Written)
        versions.add(unpack_i64(answer.versions)[0])
    assert len(versions) <= 3
    assert len(live(check(group, FIRST))) == 50


def test_a_retried_request_is_applied_once_by_whichever_replica() -> None:
    group = Group(3)
    assert group.put(FIRST, ALICE, rid(1), [(1, b"", b"a")]) == (OK, 1)
    for number in (FIRST, SECOND, THIRD):
        assert group.put(number, ALICE, rid(1), [(1, b"", b"a")]) == (OK, 1)
    assert group.version(ALICE) == 1


def test_conditional_writes_apply_only_at_their_version() -> None:
    group = Group(4)
    assert group.put(FIRST, ALICE, rid(1), [(1, b"", b"a")], if_version=0) == (OK, 1)
    assert group.put(SECOND, ALICE, rid(2), [(1, b"", b"b")], if_version=0) == (CONFLICT, 1)
    assert group.put(SECOND, ALICE, rid(3), [(1, b"", b"c")], if_version=1) == (OK, 2)
    assert group.put(FIRST, ALICE, rid(4), [(1, b"", b"d")], if_version=7) == (CONFLICT, 2)


def test_a_request_older_than_the_remembered_ids_is_refused_with_the_version() -> None:
    group = Group(5, settings=Settings(request_id_entries=8, log_keep_entries=8))
    for number in range(20):
        assert group.put(FIRST, ALICE, rid(number), [(number, b"", b"x")], seen=number)[0] == OK
    assert group.put(FIRST, ALICE, rid(99), [(99, b"", b"x")], seen=0) == (STALE, 20)
    assert group.put(FIRST, ALICE, rid(99), [(99, b"", b"x")], seen=20) == (OK, 21)


def test_malformed_writes_are_refused_and_change_nothing() -> None:
    group = Group(6)
    wrong_bucket = bytes((ALICE[0], ALICE[1], ALICE[2], ALICE[3] ^ 1)) + ALICE[4:]
    assert group.put(FIRST, wrong_bucket, rid(1), [(1, b"", b"x")])[0] == INVALID
    assert group.put(FIRST, ALICE, b"short", [(1, b"", b"x")])[0] == INVALID
    assert group.put(FIRST, ALICE, rid(1), [(1, b"", b"x")], kinds=b"\x09")[0] == INVALID
    assert group.put(FIRST, ALICE, rid(1), [])[0] == INVALID
    assert group.version(ALICE) == 0


def test_delete_and_wipe_hide_items_and_later_puts_show_again() -> None:
    group = Group(7)
    group.put(FIRST, ALICE, rid(1), [(1, b"", b"a"), (2, b"", b"b"), (3, b"", b"c")])
    group.put(FIRST, ALICE, rid(2), [(2, b"", b"")], kinds=bytes((DELETE,)))
    assert list(live(check(group, FIRST)).values()) == [b"c", b"a"]
    wipe = write_message(ALICE, rid(3), [(1, b"", b"")], kinds=bytes((WIPE,)))
    wipe.keys[0] = b""
    group.call(FIRST, wipe)
    assert live(check(group, FIRST)) == {}
    group.put(FIRST, ALICE, rid(4), [(2, b"", b"again")])
    group.run(2)
    for number in range(3):
        assert live(check(group, number)) == {item_key(2): b"again"}


def test_a_reader_that_has_the_version_gets_same_and_a_delta_when_it_moved() -> None:
    group = Group(8)
    group.put(FIRST, ALICE, rid(1), [(1, b"", b"a")])
    assert check(group, FIRST, have=1).payloads[0] == SAME
    group.put(FIRST, ALICE, rid(2), [(2, b"", b"b")])
    answer = check(group, FIRST, have=1)
    assert (answer.payloads[0], live(answer)) == (DELTA, {item_key(2): b"b"})
    answer = check(group, FIRST, have=-1)
    assert (answer.payloads[0], list(live(answer))) == (RANGE, [item_key(2), item_key(1)])


def test_ranges_stop_at_their_limit_and_say_how_far_they_are_complete() -> None:
    group = Group(9)
    group.put(FIRST, ALICE, rid(1), [(n, b"", b"%d" % n) for n in range(10)])
    answer = check(group, FIRST, limit=3, want=RANGE)
    assert list(live(answer)) == [item_key(9), item_key(8), item_key(7)]
    assert answer.floors == [item_key(7)]
    assert check(group, FIRST, limit=10, want=RANGE).floors == [b""]


def test_with_the_first_replica_dead_the_second_writes_after_one_prepare() -> None:
    group = Group(10)
    assert group.put(FIRST, ALICE, rid(1), [(1, b"", b"a")]) == (OK, 1)
    group.crash(FIRST)
    assert group.put(SECOND, ALICE, rid(2), [(2, b"", b"b")], seen=1) == (OK, 2)
    prepares = group.replica(SECOND).core.counters.totals["prepares"]
    for number in range(3, 30):
        assert group.put(SECOND, ALICE, rid(number), [(number, b"", b"c")], seen=number - 1) == (OK, number)
    assert group.replica(SECOND).core.counters.totals["prepares"] == prepares


def test_a_restart_loses_the_right_to_round_zero() -> None:
    group = Group(11)
    assert group.put(FIRST, ALICE, rid(1), [(1, b"", b"a")]) == (OK, 1)
    group.run(1)
    group.crash(FIRST)
    group.start(FIRST)
    group.run_until(lambda: group.replica(FIRST).state == VOTING)
    assert group.put(FIRST, ALICE, rid(2), [(2, b"", b"b")], seen=1) == (OK, 2)
    counters = group.replica(FIRST).core.counters.totals
    assert counters["prepares"] >= 1
    assert counters.get("fast_accepts", 0) == 0
    assert group.put(FIRST, ALICE, rid(3), [(3, b"", b"b")], seen=2) == (OK, 3)
    assert counters["fast_accepts"] == 1, "the origin of entry 2 has the right to round 0 of entry 3"


def test_a_replica_that_was_away_catches_up_by_log_and_by_state() -> None:
    for entries in (5, 100):
        group = Group(12, settings=Settings(request_id_entries=8, log_keep_entries=16))
        group.crash(THIRD)
        for number in range(entries):
            assert group.put(FIRST, ALICE, rid(number), [(number, b"", b"x")], seen=number)[0] == OK
        group.start(THIRD)
        group.run_until(lambda g=group: g.replica(THIRD).state == VOTING)
        group.replica(THIRD).note_behind(group.now, FIRST, ALICE, entries)
        group.pump(THIRD)
        group.run_until(lambda g=group, e=entries: g.replica(THIRD).core.timeline(ALICE).chosen == e)
        assert len(live(check(group, THIRD, limit=1000))) == entries
        assert group.put(THIRD, ALICE, rid(entries - 1), [(1, b"", b"y")], seen=entries) == (OK, entries)


def test_a_replica_that_missed_writes_catches_up_by_the_next_one() -> None:
    group = Group(13)
    group.crash(THIRD)
    for number in range(5):
        group.put(FIRST, ALICE, rid(number), [(number, b"", b"x")], seen=number)
    group.start(THIRD)
    group.run_until(lambda: group.replica(THIRD).state == VOTING)
    group.crash(SECOND)
    assert group.put(FIRST, ALICE, rid(9), [(9, b"", b"x")], seen=5) == (OK, 6)
    group.run(0.1)
    assert group.replica(THIRD).core.timeline(ALICE).chosen == 6


def test_without_a_majority_a_write_ends_with_unknown_and_is_settled_later() -> None:
    group = Group(14)
    group.put(FIRST, ALICE, rid(1), [(1, b"", b"a")])
    group.crash(SECOND)
    group.crash(THIRD)
    assert group.put(FIRST, ALICE, rid(2), [(2, b"", b"b")], seen=1, timeout_ms=500)[0] == UNKNOWN
    group.start(SECOND)
    group.run_until(lambda: group.replica(SECOND).state == VOTING)
    first = group.version(ALICE, (FIRST, SECOND))
    group.start(THIRD)
    group.run_until(lambda: group.replica(THIRD).state == VOTING)
    assert group.version(ALICE, (SECOND, THIRD)) >= first


def test_a_folder_from_the_past_is_fenced() -> None:
    group = Group(15)
    group.put(FIRST, ALICE, rid(1), [(1, b"", b"a")])
    group.crash(FIRST)
    group.members[FIRST].boot = 0
    for _ in range(2):
        group.start(SECOND)
    group.run(1)
    group.start(FIRST)  # boot 1 again, though its peers may have seen it already
    group.members[FIRST].boot = 5
    group.crash(FIRST)
    group.start(FIRST)
    group.run_until(lambda: group.replica(FIRST).state == VOTING)
    group.crash(FIRST)
    group.members[FIRST].boot = 2
    group.start(FIRST)
    group.run_until(lambda: group.replica(FIRST).state == FENCED)
    assert "from the past" in group.replica(FIRST).reason


def test_the_log_stays_bounded_and_superseded_rows_go() -> None:
    group = Group(16, settings=Settings(request_id_entries=8, log_keep_entries=16))
    for number in range(200):
        assert group.put(FIRST, ALICE, rid(number), [(number % 3, b"", b"%d" % number)], seen=number)[0] == OK
    group.run(1)
    for member in group.members:
        assert sum(1 for _ in member.engine.scan(b"L", b"M")) <= 33
        assert sum(1 for _ in member.engine.scan(b"R", b"S")) <= 3 + 33
    assert sorted(live(check(group, SECOND)).values()) == [b"197", b"198", b"199"]


@pytest.mark.parametrize("replicas", [1])
def test_a_group_of_one_works(replicas: int) -> None:
    group = Group(17, replicas=replicas)
    assert group.put(0, ALICE, rid(1), [(1, b"", b"a")]) == (OK, 1)
    assert group.put(0, ALICE, rid(2), [(2, b"", b"b")], seen=1) == (OK, 2)
