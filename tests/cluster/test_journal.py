"""Replicas compare themselves at the cost of what has changed, and none lacks for ever what another has."""

from __future__ import annotations

from typing import Any

import pytest
from counting_engine import CountingEngine
from replica_group import Group, key_of
from timetier.cluster.effects import CallFailed, Sleep
from timetier.cluster.errors import Unavailable
from timetier.cluster.keys import priority
from timetier.cluster.messages import OK, AskChanged, ChangedList
from timetier.cluster.paxos.core import Settings
from timetier.cluster.paxos.journal import JOURNAL_KEY, NOWHERE
from timetier.cluster.paxos.rows import prefix_end
from timetier.cluster.storage.catching_up import catch_up


def names(count: int, first: int = 0) -> list[bytes]:
    return [key_of(f"owner-{number}") for number in range(first, first + count)]


def write(group: Group, timelines: list[bytes], entry: int = 1) -> None:
    """One item in each timeline, as its entry `entry`."""
    for timeline in timelines:
        number = next(replica for replica in priority(timeline, 3) if group.votes(replica))
        request = timeline[:6] + entry.to_bytes(10, "big")
        outcome, version = group.put(number, timeline, request[-16:].rjust(16), [(entry, b"", b"v")], seen=entry - 1)
        assert (outcome, version) == (OK, entry)


def compare(group: Group, number: int, peer: int) -> int:
    """Have a replica compare itself with a peer. How many timelines were behind."""

    def step(work: Any) -> Any:
        found = work(group.replica(number))
        group.pump(number)
        return found

    script = catch_up(step, lambda: group.now, peer, f"storage-0-{peer}")
    try:
        effect = next(script)
        while True:
            if isinstance(effect, Sleep):
                group.run(max(effect.seconds, 0.001))
                effect = script.send(group.now)
            else:
                effect = script.send([group.call(peer, call.message) for call in effect])
    except StopIteration as stop:
        behind: int = stop.value
        return behind


def compare_all(group: Group) -> int:
    """Each replica with each peer. How many timelines were behind."""
    return sum(compare(group, number, peer) for number in range(3) for peer in range(3) if peer != number)


def compared(group: Group, number: int) -> int:
    """Timelines that a replica has compared in its present life."""
    return group.replica(number).core.counters.totals.get("catch_up_compared", 0)


def journal_rows(group: Group, number: int) -> int:
    return len(list(group.members[number].engine.scan(b"J", prefix_end(b"J"))))


def trim(group: Group) -> None:
    for number in range(3):
        replica = group.members[number].replica
        while replica is not None and replica.core.journal.trim():
            group.members[number].engine.commit()


@pytest.mark.parametrize("count", [10, 400])
def test_a_comparison_costs_the_changes_since_the_last_one_however_many_timelines_there_are(count: int) -> None:
    group = Group(1)
    timelines = names(count)
    write(group, timelines)
    group.run(0.1)
    assert compare_all(group) == 0
    before = [compared(group, number) for number in range(3)]
    assert compare_all(group) == 0
    assert [compared(group, number) for number in range(3)] == before, "nothing has changed"
    write(group, timelines[:3], 2)
    group.run(0.1)
    compare_all(group)
    assert [compared(group, number) - seen for number, seen in enumerate(before)] == [6, 6, 6]


@pytest.mark.parametrize("count", [10, 400])
def test_a_replica_that_was_away_compares_what_has_changed_meanwhile(count: int) -> None:
    group = Group(2)
    timelines = names(count)
    write(group, timelines)
    group.run(2.5)
    assert compare_all(group) == 0
    group.run(0.1)
    group.members[2].engine.sync()
    group.crash(2)
    write(group, timelines[:5], 2)
    group.start(2)
    group.run_until(lambda: group.votes(2))
    behind = compare(group, 2, 0) + compare(group, 2, 1)
    assert behind >= 5 - 1, "but for one that it was told of by itself"
    assert compared(group, 2) <= 2 * (5 + 5), "what changed, and what was written in the last moments before"
    assert [group.replica(2).core.timeline(key).chosen for key in timelines[:5]] == [2] * 5


def test_what_a_crash_left_unmarked_is_told_all_the_same() -> None:
    group = Group(3)
    timelines = names(30)
    write(group, timelines)
    group.run(1.0)
    compare_all(group)
    group.crash(2)
    for entry in range(2, 5):
        write(group, timelines, entry)
    for number in (0, 1):
        group.members[number].engine.sync()
        group.crash(number)
        group.start(number)
    group.start(2)
    group.run_until(lambda: all(group.votes(number) for number in range(3)))
    compare_all(group)
    told = [group.replica(2).core.timeline(key).chosen for key in timelines]
    assert min(told) >= 3, "entry 3 is proven by entry 4, which a majority has accepted"


def test_the_journal_keeps_what_a_peer_lacks_and_nothing_else() -> None:
    group = Group(4)
    timelines = names(40)
    write(group, timelines)
    for _ in range(2):  # a position counts for trimming when it is durable, which the next question tells
        group.run(0.1)
        for member in group.members:
            member.engine.sync()
        for number in range(3):
            group.replica(number).durable(group.now, group.members[number].engine.commit())
        compare_all(group)
    trim(group)
    assert max(journal_rows(group, number) for number in range(3)) == 0
    group.crash(2)
    write(group, timelines, 2)
    compare(group, 0, 1)
    compare(group, 1, 0)
    trim(group)
    assert journal_rows(group, 0) > 0
    group.start(2)
    group.run_until(lambda: group.votes(2))
    assert compare(group, 2, 0) + compare(group, 2, 1) > 0
    assert [group.replica(2).core.timeline(key).chosen for key in timelines] == [2] * 40


def test_who_was_away_for_longer_than_the_journal_reaches_compares_everything_once() -> None:
    group = Group(5, settings=Settings(journal_bytes=600))
    timelines = names(50)
    write(group, timelines)
    group.run(0.5)
    compare_all(group)
    group.crash(2)
    for entry in range(2, 8):
        write(group, timelines, entry)
        compare(group, 0, 1)
        compare(group, 1, 0)
    group.run(3.0)
    trim(group)
    sizes = [sum(len(row) for _, row in group.members[n].engine.scan(b"J", prefix_end(b"J"))) for n in (0, 1)]
    assert max(sizes) <= 600, "the journal is bounded"
    group.start(2)
    group.run_until(lambda: group.votes(2))
    too_old = group.replica(0).core.counters.totals.get("catch_up_too_old", 0)
    assert compare(group, 2, 0) + compare(group, 2, 1) > 0
    assert [group.replica(2).core.timeline(key).chosen for key in timelines] == [7] * 50
    assert group.replica(0).core.counters.totals["catch_up_too_old"] == too_old + 1
    seen = compared(group, 2)
    assert compare(group, 2, 0) == 0
    assert compared(group, 2) - seen <= 5, "from then on by changes again"


def test_data_of_a_format_without_a_journal_is_compared_as_a_whole_once() -> None:
    group = Group(6)
    timelines = names(20)
    write(group, timelines)
    group.run(1.0)
    for number in range(3):
        engine = group.members[number].engine
        engine.sync()
        group.crash(number)
        for name in [JOURNAL_KEY, *(key for key, _ in engine.scan(b"J", prefix_end(b"J")))]:
            engine.delete(name)
        engine.sync()
        group.start(number)
    group.run_until(lambda: all(group.votes(number) for number in range(3)))
    compare(group, 0, 1)
    assert compared(group, 0) == 20
    compare(group, 0, 1)
    assert compared(group, 0) == 20


def rows_read_at_a_start(count: int) -> int:
    group = Group(7)
    engine = group.members[2].engine = CountingEngine()
    group.start(2)
    group.run_until(lambda: group.votes(2))
    write(group, names(count))
    group.run(5.0)
    compare_all(group)
    write(group, names(2, first=5_000))
    engine.sync()
    group.crash(2)
    engine.rows_read = 0
    group.start(2)
    group.run_until(lambda: group.votes(2))
    compare_all(group)
    return engine.rows_read


def test_a_start_reads_as_many_rows_however_many_timelines_there_are() -> None:
    few, many = rows_read_at_a_start(20), rows_read_at_a_start(500)
    assert many <= few + 60, "the timelines that were written in the last moments"


@pytest.mark.parametrize("seed", range(12))
def test_after_any_losses_and_crashes_comparisons_bring_everything_that_anybody_has(seed: int) -> None:
    print(f"seed {seed}")
    group = Group(100 + seed, settings=Settings(journal_bytes=1_000 if seed % 3 == 0 else 1 << 20))
    random = group.random
    timelines = names(25)
    versions = dict.fromkeys(timelines, 0)
    group.loss = 0.2
    for round_ in range(12):
        away = random.randrange(3)
        group.crash(away)
        for timeline in random.sample(timelines, 8):
            number = next(replica for replica in priority(timeline, 3) if group.votes(replica))
            request = (round_ * 1000 + timelines.index(timeline)).to_bytes(16, "big")
            outcome, version = group.put(number, timeline, request, [(round_, b"", b"v")], seen=versions[timeline])
            if outcome == OK:
                versions[timeline] = version
        group.start(away)
        group.run_until(lambda: all(group.votes(number) for number in range(3)))
        trim(group)
        if random.random() < 0.7:
            number, peer = random.sample(range(3), 2)
            compare(group, number, peer)
        group.run(random.choice([0.0, 0.6, 2.5]))
    group.loss = 0.0
    for _ in range(3):
        group.run(1.5)
        compare_all(group)
    held = [[group.replica(number).core.timeline(key).chosen for key in timelines] for number in range(3)]
    assert held[0] == held[1] == held[2]
    assert all(chosen >= version - 1 for chosen, version in zip(held[0], versions.values(), strict=True))


def test_only_peers_are_told_and_nobody_makes_a_journal_forget() -> None:
    group = Group(8)
    write(group, names(5))
    group.run(0.1)
    with pytest.raises(Exception, match="no peer"):
        group.call(0, AskChanged(7, NOWHERE, NOWHERE))
    far = (1, 1 << 62, 1 << 62)
    answer = group.call(0, AskChanged(1, far, far))
    assert isinstance(answer, ChangedList)
    assert not answer.timelines
    answer = group.call(0, AskChanged(2, NOWHERE, NOWHERE))
    assert isinstance(answer, ChangedList)
    assert len(answer.timelines) == 5


def test_a_peer_that_does_not_answer_ends_a_comparison_without_a_step_forward() -> None:
    group = Group(9)
    write(group, names(3))
    script = catch_up(lambda work: work(group.replica(2)), lambda: group.now, 0, "storage-0-0")
    next(script)
    with pytest.raises(Unavailable):
        script.send([CallFailed("storage-0-0", "no connection", False)])
    assert group.replica(2).core.journal.question(0).since == NOWHERE
