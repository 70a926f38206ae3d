"""Many entries of one step travel, are fsync'd and are answered together; each is still decided by itself."""

from __future__ import annotations

import pytest
from replica_group import key_of
from scripted_group import Scripted, rid
from timetier.cluster.keys import item_key, priority
from timetier.cluster.messages import (
    NO_BALLOT,
    OK,
    PUT,
    Accept,
    Accepted,
    AcceptedAll,
    Accepts,
    Chosen,
    ChosenAll,
    Nack,
    PeerMessage,
    Prepare,
    Unheard,
    Value,
    Write,
    Written,
    pack_i64,
    pack_u32,
    unpack_i64,
)
from timetier.cluster.paxos import flights
from timetier.cluster.paxos.flights import singles

COUNT = 20


def owned_by(first: int, count: int = COUNT) -> list[bytes]:
    """Timelines whose replica of first priority is `first`."""
    keys = (key_of(f"owner-{number}") for number in range(100_000))
    return [key for key in keys if priority(key, 3)[0] == first][:count]


def write_to(timelines: list[bytes], number: int) -> Write:
    """One item for each timeline, as entry `number`."""
    count = len(timelines)
    ids = [rid(number * 1_000 + at) for at in range(count)]
    seen, conditions = pack_i64([number - 1] * count), pack_i64([-1] * count)
    keys, values = [item_key(number)] * count, [b"v%d" % number] * count
    return Write(1, timelines, ids, seen, conditions, pack_u32([1] * count), bytes((PUT,)) * count, keys, values, 2000)


def written(group: Scripted, replica: int, timelines: list[bytes], number: int) -> None:
    answer = group.call(replica, write_to(timelines, number))
    assert isinstance(answer, Written)
    assert set(answer.outcomes) == {OK}
    assert set(unpack_i64(answer.versions)) == {number}


class Heard(list[tuple[int, int, PeerMessage]]):
    """Messages that were sent, as (source, target, message); some kinds can be dropped on their way."""

    def __init__(self, group: Scripted, *dropped: type) -> None:
        self.dropped = dropped
        group.holds = self.take

    def take(self, source: int, target: int, message: PeerMessage) -> bool:
        if not any(message is one for _, _, one in self):
            self.append((source, target, message))
        return isinstance(message, self.dropped)

    def of(self, kind: type) -> list[PeerMessage]:
        return [message for _, _, message in self if isinstance(message, kind)]


def chosen(group: Scripted, replica: int, timelines: list[bytes]) -> set[int]:
    return {group.chosen(replica, timeline) for timeline in timelines}


def test_a_batch_is_one_message_a_peer_and_one_fsync_a_replica() -> None:
    group = Scripted(1)
    timelines = owned_by(0)
    written(group, 0, timelines, 1)
    group.run(1)
    heard = Heard(group)
    syncs = [member.engine.sequence for member in group.members]
    written(group, 0, timelines, 2)
    group.run(0.1)
    kinds = [type(message) for _, _, message in heard if message.__class__ is not Accepted]
    assert kinds.count(Accepts) == 1  # the same object for both peers
    assert kinds.count(AcceptedAll) == 2
    assert not {Accept, Accepted, Chosen, Prepare} & set(kinds)
    assert [member.engine.sequence - before for member, before in zip(group.members, syncs, strict=True)] == [1, 1, 1]
    assert all(chosen(group, replica, timelines) == {2} for replica in range(3))


def test_a_batch_to_new_timelines_is_one_write_and_one_fsync_too() -> None:
    """None of them has to be looked for by itself, which would have the engine commit what was written so far."""
    group = Scripted(13)
    timelines = owned_by(0)
    before = [member.engine.sequence for member in group.members]
    written(group, 0, timelines, 1)
    group.run(0.1)
    batches = [member.engine.sequence - first for member, first in zip(group.members, before, strict=True)]
    assert batches == [1, 1, 1]
    assert all(chosen(group, replica, timelines) == {1} for replica in range(3))


def test_what_a_flight_says_is_what_single_messages_would_say() -> None:
    group = Scripted(2)
    timelines = owned_by(0, 3)
    written(group, 0, timelines, 1)
    heard = Heard(group)
    written(group, 0, timelines, 2)
    (message,) = heard.of(Accepts)
    assert isinstance(message, Accepts)
    life = group.replica(0).core.life
    for timeline, accept in zip(timelines, singles(message), strict=True):
        assert (accept.timeline, accept.entry, accept.ballot, accept.before) == (timeline, 2, (0, life), (0, life))
        assert (accept.value.origin, accept.value.keys, accept.value.values) == (life, [item_key(2)], [b"v2"])


def test_a_timeline_that_a_peer_has_promised_away_does_not_hold_up_the_others() -> None:
    group = Scripted(3)
    timelines = owned_by(0)
    written(group, 0, timelines, 1)
    group.run(1)
    odd = timelines[7]
    for peer in (1, 2):
        group.inject(3 - peer, peer, Prepare(odd, 2, (1, group.replica(3 - peer).core.life)))
    heard = Heard(group)
    written(group, 0, timelines, 2)  # the odd one by a higher round
    votes = heard.of(AcceptedAll)
    assert [unpack for vote in votes if isinstance(vote, AcceptedAll) for unpack in vote.others[:1]] == [7, 7]
    assert {message.timeline for message in heard.of(Prepare) if isinstance(message, Prepare)} == {odd}
    group.run(1)
    assert all(chosen(group, replica, timelines) == {2} for replica in range(3))


def test_votes_for_a_flight_and_for_an_entry_of_it_count_together() -> None:
    """The one peer that is up has accepted an entry before, by itself, and now the others."""
    group = Scripted(4)
    timelines = owned_by(0)
    written(group, 0, timelines, 1)
    group.run(1)
    group.cut_off(2)
    heard = Heard(group, Accepts)
    token = group.send(0, write_to(timelines, 2))
    (message,) = heard.of(Accepts)
    assert isinstance(message, Accepts)
    odd = singles(message)[3]
    heard.dropped = ()
    group.inject(0, 1, odd)
    group.run_until(lambda: group.chosen(0, odd.timeline) == 2)
    assert chosen(group, 0, timelines) == {1, 2}
    group.run_until(lambda: token in group.answers)
    assert chosen(group, 0, timelines) == {2}
    assert not heard.of(Prepare)


@pytest.mark.parametrize("lost", [Accepts, AcceptedAll, ChosenAll])
def test_what_gets_lost_is_made_up_for(lost: type) -> None:
    group = Scripted(5)
    timelines = owned_by(0)
    written(group, 0, timelines, 1)
    group.run(1)
    heard = Heard(group, lost)
    token = group.send(0, write_to(timelines, 2))
    group.run(0.1)
    heard.dropped = ()
    group.held.clear()
    group.run_until(lambda: token in group.answers)
    group.run(1)
    written(group, 0, timelines, 3)  # whose `before` tells of entry 2
    group.run(1)
    assert all(chosen(group, replica, timelines) == {3} for replica in range(3))
    assert not heard.of(Prepare)


def test_a_flight_is_repeated_word_for_word() -> None:
    """A proposal may have gone on, by a higher round, with the value of somebody else. At round 0 it had its own."""
    group = Scripted(11)
    timelines = owned_by(0, 2)
    written(group, 0, timelines, 1)
    group.run(1)
    lost, other = timelines
    heard = Heard(group, Accepts, AcceptedAll)
    group.send(0, write_to(timelines, 2))
    (first,) = heard.of(Accepts)
    assert isinstance(first, Accepts)
    life = group.replica(1).core.life
    theirs = Value(life, 0, [rid(7)], bytes((PUT,)), [item_key(7)], [b"theirs"])
    before = group.replica(0).core.timeline(lost).ballot
    for peer in (1, 2):
        source = life[0] if peer != life[0] else 2
        group.inject(source, peer, Prepare(lost, 2, (1, life)), Accept(lost, 2, (1, life), before, theirs))
    group.inject(1, 0, Nack(lost, 2, (0, group.replica(0).core.life), (1, life)))
    group.run_until(lambda: group.chosen(0, lost) == 2)
    assert group.chosen(0, other) == 1
    heard.clear()
    group.run_until(lambda: bool(heard.of(Accepts)))
    assert heard.of(Accepts)[0] == first


def test_a_flight_that_is_repeated_when_it_is_chosen_costs_one_answer() -> None:
    """A busy group repeats itself; were each entry then sent back in full, that alone would keep it busy."""
    group = Scripted(14)
    timelines = owned_by(0)
    written(group, 0, timelines, 1)
    heard = Heard(group)
    written(group, 0, timelines, 2)
    group.run(0.1)
    (message,) = heard.of(Accepts)
    assert isinstance(message, Accepts)
    assert chosen(group, 1, timelines) == {2}
    later = Heard(group)
    group.inject(0, 1, message)
    group.run(0.1)
    answers = [one for source, _, one in later if source == 1]
    assert answers == [AcceptedAll(message.number, group.replica(0).core.life, b"")]
    assert chosen(group, 1, timelines) == {2}


def test_who_did_not_hear_of_a_flight_is_told_of_each_entry() -> None:
    group = Scripted(6)
    timelines = owned_by(0)
    written(group, 0, timelines, 1)
    group.run(1)
    heard = Heard(group)
    group.holds = lambda source, target, message: (
        heard.take(source, target, message) or (target == 2 and isinstance(message, Accepts))
    )
    written(group, 0, timelines, 2)
    group.run(0.5)
    assert heard.of(Unheard)
    assert chosen(group, 2, timelines) == {2}


def test_an_acceptance_is_answered_when_it_is_on_disk_also_in_a_flight() -> None:
    group = Scripted(7)
    timelines = owned_by(0)
    written(group, 0, timelines, 1)
    group.run(1)
    heard = Heard(group)
    group.send(0, write_to(timelines, 2))
    member = group.members[1]
    while group.replica(1).core.timeline(timelines[0]).accepted == NO_BALLOT:
        group.step()
    for _ in range(50):
        member.sync_at = None  # the disk takes its time
        group.step()
    assert not [source for source, _, message in heard if source == 1 and isinstance(message, AcceptedAll)]
    group.replica(1).durable(group.now, member.engine.sync())
    group.pump(1)
    assert [source for source, _, message in heard if source == 1 and isinstance(message, AcceptedAll)] == [1]


def test_first_entries_are_on_the_own_disk_before_they_are_sent_also_in_a_flight() -> None:
    group = Scripted(8)
    timelines = owned_by(0)
    heard = Heard(group)
    token = group.send(0, write_to(timelines, 1))
    member = group.members[0]
    for _ in range(50):
        member.sync_at = None
        group.step()
    assert not heard.of(Accepts) and not heard.of(Accept)
    group.replica(0).durable(group.now, member.engine.sync())
    group.pump(0)
    group.run_until(lambda: token in group.answers)
    assert len(heard.of(Accepts)) == 1


def test_a_flight_whose_columns_do_not_fit_is_refused_as_a_whole() -> None:
    group = Scripted(9)
    timelines = owned_by(0)
    written(group, 0, timelines, 1)
    group.run(1)
    life = group.replica(0).core.life
    one = item_key(2)
    whole = Accepts(
        9, life, (0, life), timelines[:1], pack_i64([2]), pack_i64([1]), pack_u32([1]), rid(9), pack_u32([1]),
        bytes((PUT,)), [one], [b"x"],
    )  # fmt: skip
    assert flights.is_sound(whole)
    for name, column in [
        ("entries", b""),
        ("written", pack_i64([1, 2])),
        ("id_counts", pack_u32([2])),
        ("request_ids", b"short"),
        ("counts", pack_u32([2])),
        ("kinds", b""),
        ("keys", [one, one]),
        ("values", []),
    ]:
        bad = Accepts(*[getattr(whole, field) for field in whole.__struct_fields__])
        setattr(bad, name, column)
        group.inject(0, 1, bad)
    assert group.replica(1).core.counters.totals["malformed_peer_messages"] == 8
    assert group.replica(1).core.timeline(timelines[0]).accepted == NO_BALLOT
    group.inject(0, 1, whole)
    assert group.replica(1).core.timeline(timelines[0]).accepted == (0, life)


def test_a_flight_for_which_nobody_waits_any_more_is_forgotten() -> None:
    group = Scripted(12)
    timelines = owned_by(0)
    written(group, 0, timelines, 1)
    group.run(1)
    group.cut_off(0)
    token = group.send(0, write_to(timelines, 2))
    departures = group.replica(0).proposer.departures
    group.run(0.1)
    assert len(departures._flights) == 1
    group.run_until(lambda: token in group.answers)
    group.run(1)
    assert not departures._flights


def test_flights_that_are_remembered_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flights, "MAX_ENTRIES_KEPT", 3 * COUNT)
    group = Scripted(10)
    timelines = owned_by(0)
    for number in range(1, 8):
        written(group, 0, timelines, number)
    group.run(1)
    departures, arrivals = group.replica(0).proposer.departures, group.replica(1).arrivals
    assert len(departures._decided) <= 3 and departures._entries_kept <= 3 * COUNT
    assert len(arrivals._heard) <= 3 and arrivals._entries_kept <= 3 * COUNT
    assert not departures._flights
