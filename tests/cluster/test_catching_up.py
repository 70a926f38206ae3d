"""A replica that was away fetches what it missed, at a bounded pace, and gives up on what does not come."""

from __future__ import annotations

from typing import Any

import pytest
from replica_group import Group, key_of
from timetier.cluster.effects import Call, CallFailed, Script, Sleep
from timetier.cluster.errors import ProtocolError, Unavailable
from timetier.cluster.keys import priority
from timetier.cluster.messages import OK, AskChosen, ChangedList, Failure, Message, pack_i64
from timetier.cluster.paxos.replica import Replica
from timetier.cluster.storage.catching_up import ENTRIES_AN_ANSWER, ENTRIES_UNDER_WAY, catch_up

AWAY = 2
TIMELINES = [key_of(f"owner-{number}") for number in range(60)]
EACH = 30


def rid(number: int) -> bytes:
    return number.to_bytes(16, "big")


def put(group: Group, timeline: bytes, entry: int) -> None:
    number = next(replica for replica in priority(timeline, 3) if replica != AWAY)
    outcome, version = group.put(number, timeline, rid(entry), [(entry, b"", b"%d" % entry)], seen=entry - 1)
    assert (outcome, version) == (OK, entry)


def group_with_one_away(entries: dict[bytes, int]) -> Group:
    """Replica `AWAY` has come back and votes, and has nothing of what was written meanwhile."""
    group = Group(3)
    group.crash(AWAY)
    for timeline, count in entries.items():
        for entry in range(1, count + 1):
            put(group, timeline, entry)
    group.start(AWAY)
    group.run_until(lambda: group.votes(AWAY))
    return group


class Driver:
    """Carries the script out against peer 0. `most`: entries that were asked for and had not come, at most."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.most = 0

    def script(self) -> Script[int]:
        return catch_up(self.step, lambda: self.group.now, 0, "storage-0-0")

    def step(self, work: Any) -> Any:
        found = work(self.group.replica(AWAY))
        self.group.pump(AWAY)
        self.most = max(self.most, self.under_way())
        return found

    def under_way(self) -> int:
        here, there = self.group.replica(AWAY).core, self.group.replica(0).core
        asked = [t for t in TIMELINES if here.timeline(t).asked_until > self.group.now]
        return sum(min(there.timeline(t).chosen - here.timeline(t).chosen, ENTRIES_AN_ANSWER) for t in asked)

    def run(self) -> int:
        script = self.script()
        try:
            effect = next(script)
            while True:
                effect = script.send(self.carry_out(effect))
        except StopIteration as stop:
            behind: int = stop.value
            return behind

    def carry_out(self, effect: list[Call] | Sleep) -> Any:
        if isinstance(effect, Sleep):
            self.group.run(max(effect.seconds, 0.001))
            return self.group.now
        return [self.group.call(0, call.message) for call in effect]


def chosen_of(replica: Replica) -> list[int]:
    return [replica.core.timeline(timeline).chosen for timeline in TIMELINES]


def test_everything_that_was_missed_comes_and_never_much_at_once() -> None:
    group = group_with_one_away(dict.fromkeys(TIMELINES, EACH))
    driver = Driver(group)
    assert driver.run() == len(TIMELINES)
    assert chosen_of(group.replica(AWAY)) == [EACH] * len(TIMELINES)
    assert EACH < driver.most <= ENTRIES_UNDER_WAY + EACH, "but for one that it was told of by itself"
    assert driver.run() == 0


def test_a_timeline_that_lacks_more_than_is_asked_for_at_once_comes_too() -> None:
    group = group_with_one_away({TIMELINES[0]: 2 * ENTRIES_UNDER_WAY, TIMELINES[1]: 3})
    Driver(group).run()
    group.run(1.0)
    assert chosen_of(group.replica(AWAY))[:2] == [2 * ENTRIES_UNDER_WAY, 3]


def test_what_does_not_come_holds_nothing_up_for_ever() -> None:
    group = group_with_one_away(dict.fromkeys(TIMELINES, EACH))
    group.cut.add(frozenset((0, AWAY)))
    driver = Driver(group)
    began = group.now
    assert driver.run() == len(TIMELINES)
    assert group.now - began < 10.0
    group.cut.clear()
    driver.run()
    assert chosen_of(group.replica(AWAY)) == [EACH] * len(TIMELINES)


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (CallFailed("storage-0-0", "no connection", False), Unavailable, "no connection"),
        (Failure("Unavailable", "it is learning"), Unavailable, "it is learning"),
        (AskChosen(0, b""), Unavailable, "AskChosen"),
        (ChangedList([TIMELINES[0]], pack_i64([1, 2]), (1, 1, 1), False, True), ProtocolError, "2 versions of 1"),
    ],
)
def test_an_answer_that_is_none_ends_it_with_the_reason(
    answer: Message | CallFailed, error: type[Exception], words: str
) -> None:
    script = Driver(Group(4)).script()
    next(script)
    with pytest.raises(error, match=words):
        script.send([answer])
