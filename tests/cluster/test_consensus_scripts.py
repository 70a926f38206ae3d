"""Schedules made by hand for the consensus core: orders of messages that random runs meet too seldom.

Beside those that are scripts to read (`testdata/*.txt`): here are the ones that need made-up messages or many rounds.
"""

from __future__ import annotations

import copy

import pytest
from replica_group import write_message
from scripted_group import (
    ALICE,
    FIRST,
    SECOND,
    SMALL,
    SYSTEM,
    THIRD,
    Scripted,
    link_message,
    open_accept,
    rid,
    state_of,
)
from timetier.cluster.keys import item_key
from timetier.cluster.messages import (
    CONFLICT,
    DELTA,
    NO_BALLOT,
    OK,
    PUT,
    STALE,
    WIPE,
    Accept,
    Accepted,
    AskVersions,
    Check,
    Fetch,
    PeerBatch,
    PeerMessage,
    Prepare,
    Promise,
    Settle,
    Settled,
    State,
    Value,
    Written,
    pack_i64,
    pack_u32,
    unpack_i64,
)
from timetier.cluster.paxos.core import Settings
from timetier.cluster.paxos.replica import FENCED, VOTING
from timetier.cluster.paxos.rows import prefix_end, rows_prefix, version_of

# ---------------------------------------------------------------- one rule of the protocol each


def test_nothing_is_told_of_a_state_that_is_not_yet_on_disk() -> None:
    """Neither to peers (votes, promises) nor to readers."""
    group = Scripted(30)
    group.put_many(FIRST, 1, 1)
    group.run(1)
    second = group.replica(SECOND).core.life
    told: list[PeerMessage] = []

    def hear(source: int, _target: int, message: PeerMessage) -> bool:
        if source == THIRD:
            told.append(message)
        return source == THIRD

    group.holds = hear
    member = group.members[THIRD]
    group.inject(SECOND, THIRD, Prepare(ALICE, 2, (1, second)))
    open_accept(group, THIRD, (1, second), b"a")
    tokens = [
        group.send(THIRD, AskVersions([ALICE])),
        group.send(THIRD, Check([ALICE], pack_i64([-1]), bytes((DELTA,)), [b""], pack_u32([10]))),
    ]
    member.sync_at = None  # the disk takes its time
    group.run(0.1)
    assert not any(isinstance(message, Promise | Accepted) for message in told)
    assert not any(token in group.answers for token in tokens)
    group.replica(THIRD).durable(group.now, member.engine.sync())
    group.pump(THIRD)
    group.run_until(lambda: all(token in group.answers for token in tokens))
    assert {type(message) for message in told} >= {Promise, Accepted}


def test_the_own_vote_counts_only_when_it_is_on_disk() -> None:
    group = Scripted(31)
    group.put_many(FIRST, 1, 1)
    group.run(1)
    group.cut = {frozenset((FIRST, THIRD))}
    token = group.send(FIRST, write_message(ALICE, rid(2), [(2, b"", b"x")], seen=1))
    member = group.members[FIRST]
    while group.replica(SECOND).core.timeline(ALICE).accepted == NO_BALLOT or group.members[SECOND].sync_at:
        member.sync_at = None  # the own disk takes its time
        group.step()
    for _ in range(20):
        member.sync_at = None
        group.replica(FIRST).durable(group.now, 0)  # a flush of an earlier batch ends
        group.step()
    assert group.chosen(FIRST) == 1
    assert token not in group.answers
    group.replica(FIRST).durable(group.now, member.engine.sync())
    group.pump(FIRST)
    group.run_until(lambda: token in group.answers)
    assert group.chosen(FIRST) == 2


@pytest.mark.parametrize("entry", [1, 2])
def test_a_claim_of_round_zero_is_checked_against_the_entry_before(entry: int) -> None:
    group = Scripted(33)
    if entry > 1:
        group.put_many(FIRST, 1, 1)
        group.run(1)
    second, first = group.replica(SECOND).core.life, group.replica(FIRST).core.life
    timeline = group.replica(THIRD).core.timeline(ALICE)
    open_accept(group, THIRD, (0, second), b"a", entry=entry)
    assert timeline.accepted == NO_BALLOT
    group.members[FIRST].boot += 1  # a later life of the rightful replica has lost the right of entry 2
    later = (FIRST, 1, group.members[FIRST].boot)
    batch = PeerBatch(later, 1, 1, [], [1])
    group.replica(THIRD).peer(group.now, FIRST, batch)
    content = Value(later, 0, [rid(9)], bytes((PUT,)), [item_key(9)], [b"x"])
    accept = Accept(ALICE, entry, (0, later), timeline.ballot, content)
    group.replica(THIRD).peer(group.now, FIRST, PeerBatch(later, 1, 1, [accept], [1]))
    assert (timeline.accepted == (0, later)) == (entry == 1)
    assert first != later


def test_a_state_has_no_rows_of_the_open_entry_and_replaces_those_of_the_receiver() -> None:
    """A row that stayed, of a value that lost, would come to light with the entry that won."""
    group = Scripted(36)
    group.put_many(FIRST, 1, 1)
    group.run(1)
    open_accept(group, THIRD, (1, group.replica(SECOND).core.life), b"a")
    open_accept(group, FIRST, (2, group.replica(SECOND).core.life), b"b")
    group.cut_off(THIRD)
    version = group.version(ALICE, (FIRST, SECOND))
    open_accept(group, FIRST, (7, group.replica(SECOND).core.life), b"c", entry=version + 1)
    assert group.replica(FIRST).core.timeline(ALICE).accepted != NO_BALLOT
    group.replica(FIRST).core.timeline(ALICE).floor = version  # as after a state transfer
    group.cut.clear()
    group.replica(THIRD).note_behind(group.now + 10, FIRST, ALICE, version)
    group.pump(THIRD)
    group.run_until(lambda: group.chosen(THIRD) == version)
    names = [name for name, _ in group.members[THIRD].engine.scan(rows_prefix(ALICE), prefix_end(rows_prefix(ALICE)))]
    assert max(map(version_of, names)) <= version
    assert set(group.shown(THIRD)) == set(group.shown(FIRST))
    assert item_key(ord("a")) not in group.shown(THIRD)


def test_a_peers_life_is_on_disk_before_it_hears_from_us() -> None:
    group = Scripted(38)
    group.put_many(FIRST, 1, 1)
    group.run(1)
    group.holds = lambda source, target, _m: (source, target) == (FIRST, SECOND)
    member = group.members[FIRST]
    later = (SECOND, 1, 2)
    group.replica(FIRST).peer(group.now, SECOND, PeerBatch(later, 1, 1, [Prepare(ALICE, 1, (1, later))], [1]))
    group.pump(FIRST)
    for _ in range(100):
        member.sync_at = None  # the disk takes its time
        group.step()
    assert not group.held
    group.replica(FIRST).durable(group.now, member.engine.sync())
    group.pump(FIRST)
    assert group.held
    group.crash(FIRST)
    group.start(FIRST)
    assert group.replica(FIRST).core.lives[SECOND] == later


def test_an_old_folder_put_back_is_fenced_and_has_answered_nothing() -> None:
    """Its later life is known to its peers. A folder of the life that has just ended looks like a restart to them."""
    group = Scripted(40)
    group.put_many(FIRST, 1, 3)
    group.run(1)
    group.crash(THIRD)
    member = group.members[THIRD]
    old_engine, old_boot = copy.deepcopy(member.engine), member.boot
    for _ in range(2):
        group.start(THIRD)
        group.run_until(lambda: group.votes(THIRD))
        group.crash(THIRD)
    group.start(THIRD)
    group.run_until(lambda: group.votes(THIRD))
    group.put_many(FIRST, 4, 6)
    group.run(1)
    group.crash(THIRD)
    member.engine, member.boot = old_engine, old_boot
    group.start(THIRD)
    while group.replica(THIRD).state != FENCED:
        assert group.replica(THIRD).state != VOTING
        group.step()
    assert group.send(THIRD, AskVersions([ALICE])) == -1
    group.put_many(FIRST, 7, 8)


# ---------------------------------------------------------------- state transfers


def test_a_state_that_waited_for_links_never_takes_a_timeline_back() -> None:
    """The replica has caught up by the log meanwhile, and has voted: installing the old state would undo the votes."""
    group = Scripted(1)
    group.put_many(FIRST, 1, 10)
    group.run(0.1)
    group.inject(FIRST, THIRD, state_of(12, needs_system=1))
    assert group.chosen(THIRD) == 10
    group.put_many(FIRST, 11, 20)
    group.run(0.1)
    assert group.chosen(THIRD) == 20
    answer = group.call(FIRST, link_message(0))
    assert isinstance(answer, Written)
    group.run_until(lambda: group.chosen(THIRD, SYSTEM) == 1)
    group.run(0.1)
    assert group.chosen(THIRD) == 20
    assert len(group.shown(THIRD)) == 20


def test_pieces_of_a_state_that_come_twice_or_out_of_order_leave_no_gap() -> None:
    group = Scripted(2, Settings(request_id_entries=8, log_keep_entries=8, transfer_bytes=300))
    group.crash(THIRD)
    group.put_many(FIRST, 1, 40, value=b"x" * 50)
    group.start(THIRD)
    group.run_until(lambda: group.votes(THIRD))
    group.holds = lambda _s, target, message: target == THIRD and isinstance(message, State)
    group.replica(THIRD).note_behind(group.now, FIRST, ALICE, 40)
    group.pump(THIRD)
    pieces: list[State] = []
    while not pieces or pieces[-1].next:
        group.run_until(lambda: bool(group.held))
        ((source, _, batch),) = group.held
        group.held.clear()
        (piece,) = batch.messages
        assert isinstance(piece, State)
        pieces.append(piece)
        if piece.next:
            group.inject(source, THIRD, piece)
    assert len(pieces) >= 3
    group.inject(FIRST, THIRD, pieces[0])  # a second question was asked when the answer was late
    group.inject(FIRST, THIRD, pieces[-1])
    group.inject(FIRST, THIRD, pieces[-2])
    assert group.chosen(THIRD) == 0
    group.held.clear()
    group.release()
    group.replica(THIRD).note_behind(group.now + 10, FIRST, ALICE, 40)
    group.pump(THIRD)
    group.run_until(lambda: group.chosen(THIRD) == 40)
    assert len(group.shown(THIRD)) == 40


def test_a_sender_that_forgot_in_a_crash_what_was_chosen_sends_no_unchosen_rows() -> None:
    group = Scripted(3)
    group.put_many(FIRST, 1, 3)
    group.run(0.1)
    group.holds = lambda _s, target, message: target == SECOND and isinstance(message, State)
    replica = group.replica(FIRST)
    replica.core.timeline(ALICE).floor = 3  # as after a state transfer
    group.inject(SECOND, FIRST, Fetch(ALICE, 1, item_key(1), 9))
    group.run_until(lambda: bool(group.held))
    (piece,) = group.held[0][2].messages
    assert isinstance(piece, State)
    assert (piece.version, piece.cursor, len(piece.rows)) == (3, b"", 3)


@pytest.mark.parametrize("wipe", [True, False])
def test_a_state_in_pieces_is_of_one_version_though_the_sender_goes_on(wipe: bool) -> None:
    """Later entries wipe, or supersede and trim, rows of the version that is being sent."""
    group = Scripted(20, Settings(request_id_entries=8, log_keep_entries=8, transfer_bytes=300))
    group.crash(THIRD)
    group.put_many(FIRST, 1, 40, value=b"x" * 50)
    group.start(THIRD)
    group.run_until(lambda: group.votes(THIRD))
    group.holds = lambda _s, target, message: target == THIRD
    group.replica(THIRD).note_behind(group.now, FIRST, ALICE, 40)
    group.pump(THIRD)
    group.run_until(lambda: any(isinstance(batch.messages[0], State) for _, _, batch in group.held))
    pieces = [held for held in group.held if isinstance(held[2].messages[0], State)]
    group.held.clear()
    if wipe:
        message = write_message(ALICE, rid(41), [(0, b"", b""), (50, b"", b"y")], kinds=bytes((WIPE, PUT)), seen=40)
        message.keys[0] = b""
        group.call(FIRST, message)
    else:
        for entry in range(41, 61):
            items = [(entry - 20, b"", b"%d" % entry)]
            assert group.put(FIRST, ALICE, rid(entry), items, seen=entry - 1) == (OK, entry)
    group.held.clear()
    group.release()
    source, target, batch = pieces[0]
    group.inject(source, target, *batch.messages)
    last = 41 if wipe else 60
    while group.chosen(THIRD) < last:
        if group.chosen(THIRD):
            shown, version = group.shown(THIRD), group.chosen(THIRD)
            assert len(shown) == (1 if wipe and version == 41 else 40)
        group.replica(THIRD).note_behind(group.now, FIRST, ALICE, last)
        group.pump(THIRD)
        group.step()
    assert len(group.shown(THIRD)) == (1 if wipe else 40)


def test_an_entry_fetched_without_its_ballot_stays_chosen_after_a_crash() -> None:
    """Its record may have replaced this replica's vote, and proves nothing by itself."""
    group = Scripted(4, Settings(transfer_bytes=100, mark_delay_s=60))
    group.put_many(FIRST, 1, 1)
    group.run(0.1)
    group.crash(THIRD)
    group.put_many(FIRST, 2, 6, value=b"x" * 200)
    group.start(THIRD)
    group.run_until(lambda: group.votes(THIRD))
    group.replica(THIRD).note_behind(group.now, FIRST, ALICE, 6)
    group.pump(THIRD)
    group.run_until(lambda: group.chosen(THIRD) == 3)
    assert group.replica(THIRD).core.timeline(ALICE).ballot == NO_BALLOT
    engine = group.members[THIRD].engine
    engine.sync()
    group.crash(THIRD)
    group.start(THIRD)
    assert group.chosen(THIRD) == 3


# ---------------------------------------------------------------- outcomes


def test_a_question_is_not_answered_by_promises_that_are_older_than_it() -> None:
    """Between those promises and the question the entry was chosen and acknowledged."""
    group = Scripted(5)
    group.put_many(FIRST, 1, 1)
    group.run(0.1)
    group.holds = lambda _s, target, message: target == FIRST and isinstance(message, Promise)
    before = group.send(FIRST, Settle([ALICE], pack_i64([2]), 20_000))
    group.run_until(lambda: len(group.held) >= 2)
    promises, group.held = group.held[:2], []
    group.cut_off(FIRST)
    assert group.put(SECOND, ALICE, rid(2), [(2, b"", b"x")], seen=1) == (OK, 2)
    after = group.send(FIRST, Settle([ALICE], pack_i64([2]), 20_000))
    for source, target, batch in promises:
        group.inject(source, target, *batch.messages)
    group.run(0.1)
    first = group.answers[before]
    assert isinstance(first, Settled)
    assert (first.outcomes[0], unpack_i64(first.versions)) == (OK, [1])
    assert after not in group.answers
    group.cut.clear()
    group.release()
    group.run_until(lambda: after in group.answers)
    second = group.answers[after]
    assert isinstance(second, Settled)
    assert (second.outcomes[0], unpack_i64(second.versions)) == (OK, [2])


def test_a_conditional_write_at_a_version_that_this_replica_lacks_waits_for_a_majority() -> None:
    group = Scripted(7)
    group.put_many(FIRST, 1, 1)
    group.run(0.1)
    group.cut_off(FIRST)
    for entry in range(2, 6):
        assert group.put(SECOND, ALICE, rid(entry), [(entry, b"", b"y")], seen=entry - 1) == (OK, entry)
    message = write_message(ALICE, rid(9), [(9, b"", b"x")], seen=5, if_version=5, timeout_ms=20_000)
    token = group.send(FIRST, message)
    group.run(1)
    assert token not in group.answers
    group.cut.clear()
    group.run_until(lambda: token in group.answers)
    answer = group.answers[token]
    assert isinstance(answer, Written)
    assert (answer.outcomes[0], unpack_i64(answer.versions)) == (OK, [6])
    assert group.put(SECOND, ALICE, rid(10), [(9, b"", b"x")], seen=6, if_version=99) == (CONFLICT, 6)


def test_a_question_behind_a_refused_write_is_answered_at_once() -> None:
    group = Scripted(8, SMALL)
    group.put_many(FIRST, 1, 20)
    next_one = group.send(FIRST, write_message(ALICE, rid(21), [(21, b"", b"x")], seen=20))
    stale = group.send(FIRST, write_message(ALICE, rid(99), [(99, b"", b"x")], seen=0))
    question = group.send(FIRST, Settle([ALICE], pack_i64([22]), 20_000))
    began = group.now
    group.run_until(lambda: {next_one, stale, question} <= group.answers.keys())
    assert group.now - began < 0.1
    refused, settled = group.answers[stale], group.answers[question]
    assert isinstance(refused, Written)
    assert isinstance(settled, Settled)
    assert refused.outcomes[0] == STALE
    assert (settled.outcomes[0], unpack_i64(settled.versions)) == (OK, [21])


def test_a_fenced_replica_sends_nothing_more() -> None:
    group = Scripted(9)
    group.put_many(FIRST, 1, 1)
    group.holds = lambda source, _t, _m: source == THIRD
    replica = group.replica(THIRD)
    accept = Accept(ALICE, 2, (1, (SECOND, 1, 1)), NO_BALLOT, Value((SECOND, 1, 1), 0, [rid(2)], b"", [], []))
    batch = PeerBatch(group.replica(SECOND).core.life, 1, 1, [accept])
    replica.peer(group.now, SECOND, batch)
    replica.peer(group.now, FIRST, PeerBatch(group.replica(FIRST).core.life, 1, 9, []))
    assert replica.state == FENCED
    group.pump(THIRD)
    group.run(1)
    assert not group.held


def test_what_a_wipe_hid_stays_hidden_when_only_the_log_tells_that_it_was_chosen() -> None:
    group = Scripted(41, Settings(mark_delay_s=60))
    group.put_many(FIRST, 1, 1)
    for number in range(3):
        group.replica(number).run_chores = lambda now: False  # type: ignore[method-assign]  # the crash comes first
    wipe = write_message(ALICE, rid(2), [(1, b"", b"")], kinds=bytes((WIPE,)), seen=1)
    wipe.keys = [b""]
    group.call(FIRST, wipe)
    group.put_many(FIRST, 3, 3)
    group.run(0.1)
    for number in range(3):
        group.members[number].engine.sync()
        group.crash(number)
    for number in range(3):
        group.start(number)
    group.run_until(lambda: all(group.votes(n) for n in range(3)))
    for number in range(3):
        assert item_key(1) not in group.shown(number)
