"""Bad input to the consensus core, from clients and from peers, and the bounds of what it keeps."""

from __future__ import annotations

import pytest
from replica_group import BUCKETS, key_of, write_message
from scripted_group import (
    ALICE,
    FIRST,
    NO_KEYS,
    SECOND,
    THIRD,
    Scripted,
    link_message,
    open_accept,
    rid,
)
from timetier.cluster.cold.link import RECORDS_AT
from timetier.cluster.errors import InvalidRequest
from timetier.cluster.keys import item_key
from timetier.cluster.messages import (
    DELTA,
    INVALID,
    NO_BALLOT,
    OK,
    PUT,
    WIPE,
    Accept,
    AskChosen,
    AskVersions,
    Check,
    Checked,
    Chosen,
    ChosenList,
    Entries,
    Fetch,
    Known,
    Prepare,
    Promise,
    Settle,
    State,
    Value,
    Versions,
    Write,
    Written,
    pack_i64,
    pack_u32,
    unpack_i64,
)
from timetier.cluster.paxos import reads
from timetier.cluster.paxos.core import Settings
from timetier.cluster.paxos.replica import VOTING

# ---------------------------------------------------------------- bad input


def test_a_write_with_one_bad_timeline_does_the_others_and_says_so() -> None:
    group = Scripted(10)
    for number, bad in enumerate(NO_KEYS):
        message = Write(
            1,
            [ALICE, bad, ALICE],
            [rid(3 * number), rid(3 * number + 1), rid(3 * number + 2)],
            pack_i64([2 * number] * 3),
            pack_i64([-1] * 3),
            pack_u32([1, 1, 1]),
            bytes((PUT,)) * 3,
            [item_key(number)] * 3,
            [b"x"] * 3,
            2000,
        )
        answer = group.call(FIRST, message)
        assert isinstance(answer, Written)
        assert list(answer.outcomes) == [OK, INVALID, OK]


@pytest.mark.parametrize("bad", NO_KEYS)
def test_bytes_that_are_no_timeline_are_refused_and_leave_no_trace(bad: bytes) -> None:
    group = Scripted(11)
    group.put_many(FIRST, 1, 1)
    group.run(1)
    names = [name for name, _ in group.members[FIRST].engine.scan(b"", b"\xff")]
    for message in (
        Settle([ALICE, bad], pack_i64([2, 1]), 100),
        AskVersions([bad]),
        Check([bad], pack_i64([-1]), bytes((DELTA,)), [b""], pack_u32([1])),
    ):
        with pytest.raises(InvalidRequest):
            group.send(FIRST, message)
    life = group.replica(SECOND).core.life
    value = Value(life, 0, [rid(5)], bytes((PUT,)), [item_key(5)], [b"x"])
    group.inject(SECOND, FIRST, Prepare(bad, 1, (1, life)), Accept(bad, 1, (1, life), NO_BALLOT, value), Fetch(bad, 1))
    group.run(1)
    assert [name for name, _ in group.members[FIRST].engine.scan(b"", b"\xff")] == names
    group.put_many(FIRST, 2, 2)


def test_malformed_messages_of_peers_are_passed_over_and_those_beside_them_count() -> None:
    group = Scripted(12)
    group.put_many(FIRST, 1, 1)
    group.run(0.1)
    life = group.replica(SECOND).core.life
    ballot = (1, life)
    lame = Value(life, 0, [rid(5)], bytes((PUT, PUT)), [item_key(5)], [b"x"])
    sound = Value(life, 0, [rid(5)], bytes((PUT,)), [item_key(5)], [b"x"])
    huge = (1 << 63, life)
    group.inject(
        SECOND,
        FIRST,
        Chosen(ALICE, 2, NO_BALLOT),
        Accept(ALICE, 2, ballot, NO_BALLOT, lame),
        Prepare(ALICE, 2, huge),
        Accept(ALICE, 2, huge, NO_BALLOT, sound),
        Promise(ALICE, 2, ballot, ballot, None),
        Entries(ALICE, 2, [lame], ballot, 2),
        State(ALICE, 5, ballot, life, 0, 0, [], b"", b"", [b"short"], [b"row"]),
        State(ALICE, 5, ballot, life, 0, 0, [], b"", b"", [], [b"row"]),
        Fetch(ALICE, -5, b"\xff", -7),
        Fetch(ALICE, 1 << 63),
        Accept(ALICE, 2, ballot, NO_BALLOT, sound),
    )
    timeline = group.replica(FIRST).core.timeline(ALICE)
    assert (timeline.chosen, timeline.accepted) == (1, ballot)


def test_a_proof_without_a_ballot_proves_nothing() -> None:
    group = Scripted(13)
    group.put_many(FIRST, 1, 1)
    message = Check([ALICE], pack_i64([-1]), bytes((DELTA,)), [b""], pack_u32([1]), [Known(0, 2, NO_BALLOT)])
    answer = group.call(FIRST, message)
    assert isinstance(answer, Checked)
    assert unpack_i64(answer.chosen) == [1]
    with pytest.raises(InvalidRequest, match="one length"):
        group.send(FIRST, Check([ALICE], pack_i64([-1]), b"", [b""], pack_u32([1])))


def test_a_request_that_would_stop_its_timeline_for_good_is_refused() -> None:
    group = Scripted(14, Settings(entry_items=100))
    many = [(n, b"", b"x") for n in range(101)]
    assert group.put(FIRST, ALICE, rid(1), many)[0] == INVALID
    message = write_message(ALICE, rid(2), [(n, b"", bytes(1 << 20)) for n in range(33)])
    written = group.call(FIRST, message)
    assert isinstance(written, Written)
    assert written.outcomes[0] == INVALID
    long = write_message(ALICE, rid(3), [(1, b"", b"x")])
    long.keys = [item_key(1, b"i" * 255)[:-2] + b"i" * 300 + b"\x00\x01"]
    wipe = write_message(ALICE, rid(4), [(1, b"", b"what for")], kinds=bytes((WIPE,)))
    wipe.keys = [b""]
    horizon = item_key(RECORDS_AT, b"horizon/t")
    for bad in (long, wipe, link_message(0, b"no link"), link_message(0, b"short", horizon)):
        answer = group.call(FIRST, bad)
        assert isinstance(answer, Written)
        assert answer.outcomes[0] == INVALID
    for good in (
        link_message(0),
        link_message(1, pack_i64([5]), horizon),
        link_message(2, b"run", item_key(RECORDS_AT, b"fence")),
    ):
        answer = group.call(FIRST, good)
        assert isinstance(answer, Written)
        assert answer.outcomes[0] == OK
    group.run(1)
    assert all(member.replica is not None and member.replica.chores.pending == 0 for member in group.members)


# ---------------------------------------------------------------- bounds


def test_timers_are_bounded_by_timelines_and_not_by_requests() -> None:
    group = Scripted(15)
    for entry in range(1, 301):
        message = write_message(ALICE, rid(entry), [(entry, b"", b"x")], seen=entry - 1, timeout_ms=60_000)
        assert isinstance(group.call(FIRST, message), Written)
    assert len(group.replica(FIRST).core._timers) < 20
    group.run(61)
    assert not group.replica(FIRST).core._timers


def test_deadlines_are_kept_by_the_one_timer_of_a_timeline() -> None:
    group = Scripted(16)
    group.put_many(FIRST, 1, 1)
    group.cut_off(FIRST)
    tokens = {}
    for number, timeout_ms in enumerate((900, 100, 400, 2000, 1999)):
        message = write_message(ALICE, rid(10 + number), [(1, b"", b"x")], seen=1, timeout_ms=timeout_ms)
        tokens[group.send(FIRST, message)] = group.now + timeout_ms / 1000
    question = group.send(FIRST, Settle([ALICE], pack_i64([2]), 250))
    tokens[question] = group.now + 0.25
    ends: dict[int, float] = {}
    while len(ends) < len(tokens):
        group.step()
        for token in tokens:
            if token in group.answers:
                ends.setdefault(token, group.now)
    for token, due in tokens.items():
        assert due - 0.001 <= ends[token] <= due + 0.01


def test_a_comparison_goes_through_all_timelines_a_page_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reads, "CHOSEN_PER_ANSWER", 7)
    group = Scripted(17)
    owners = [key_of(f"owner{n}") for n in range(40)]
    for number, timeline in enumerate(owners):
        group.put(FIRST, timeline, rid(number), [(1, b"", b"x")])
    found: list[bytes] = []
    bucket, cursor = 0, b""
    while bucket >= 0:
        answer = group.call(FIRST, AskChosen(bucket, cursor))
        assert isinstance(answer, ChosenList)
        assert unpack_i64(answer.chosen) == [1] * len(answer.timelines)
        found += answer.timelines
        bucket, cursor = answer.next_bucket, answer.next_cursor
    assert found == sorted(owners)
    assert BUCKETS == 64


def test_timelines_leave_memory_though_messages_wait_for_what_they_lack() -> None:
    group = Scripted(18, Settings(timelines_in_memory=4))
    life = group.replica(SECOND).core.life
    group.holds = lambda _s, _t, message: isinstance(message, Fetch)  # the question is lost
    for number in range(50):
        group.inject(SECOND, FIRST, Prepare(key_of(f"owner{number}"), 5, (1, life)))
    group.run(0.1)
    assert group.replica(FIRST).core.in_memory() <= 5
    answer = group.call(FIRST, AskVersions([ALICE]))
    assert isinstance(answer, Versions)
    assert all(group.replica(n).state == VOTING for n in range(3))


def test_a_timeline_leaves_memory_only_when_its_state_is_on_disk() -> None:
    """Read back from the engine it would be told to others before the flush."""
    group = Scripted(21, Settings(timelines_in_memory=1))
    group.put_many(FIRST, 1, 1)
    group.run(1)
    open_accept(group, THIRD, (1, group.replica(SECOND).core.life), b"a")
    member = group.members[THIRD]
    for number in range(10):
        member.sync_at = None  # the disk takes its time
        group.send(THIRD, AskVersions([key_of(f"owner{number}")]))
    token = group.send(THIRD, AskVersions([ALICE]))
    for _ in range(50):
        member.sync_at = None
        group.step()
    assert token not in group.answers
    group.replica(THIRD).durable(group.now, member.engine.sync())
    group.pump(THIRD)
    group.run_until(lambda: token in group.answers)
