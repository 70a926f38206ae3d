"""What hides rows of cold blocks, gathered from a majority: nothing acknowledged is missed, whoever answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from cold_model import BUCKETS, TABLE, topology, view_of
from timetier.cluster.cold.link import FORMAT, Link, encode_link
from timetier.cluster.cold.overlays import Facts, LookSettings, look
from timetier.cluster.effects import Call, CallFailed, Sleep
from timetier.cluster.errors import Unavailable
from timetier.cluster.keys import MIN_TIMESTAMP, bucket_of, item_key, system_timeline, timeline_key
from timetier.cluster.messages import (
    OK,
    UNAVAILABLE,
    AskOverlay,
    BucketOverlay,
    Message,
    Overlay,
    Settle,
    Settled,
    pack_i64,
    pack_u32,
    unpack_i64,
    unpack_u32,
)

ALICE = timeline_key(TABLE, b"alice", BUCKETS)
BUCKET = bucket_of(ALICE)
ITEM = item_key(5)
A, B, C = "storage-0-0", "storage-0-1", "storage-0-2"
SETTINGS = LookSettings(attempts=3)


class Replica:
    """One replica by hand. `version`: of the item that it knows; `opened`: an entry that it has accepted."""

    def __init__(self, *, version: int = 0, opened: int = 0, links: int = 3) -> None:
        self.version = version
        self.opened = opened
        self.links = links
        self.incarnations = [1, 1, 1]
        self.settles: Callable[[int], bool] = lambda entry: True
        self.asked: list[list[int]] = []
        self.away = False

    def answer(self, message: Message) -> Message | CallFailed:
        if self.away:
            return CallFailed("", "it is away", True)
        if isinstance(message, Settle):
            return self._settle(message)
        assert isinstance(message, AskOverlay)
        buckets = unpack_u32(message.buckets)
        self.asked.append(buckets)
        return Overlay([self._part(bucket) for bucket in buckets], b"", self.incarnations)

    def _settle(self, message: Settle) -> Settled:
        outcomes = bytearray()
        entries = unpack_i64(message.entries)
        for timeline, entry in zip(message.timelines, entries, strict=True):
            found = self.settles(entry)
            outcomes.append(OK if found else UNAVAILABLE)
            if found and timeline == system_timeline(BUCKET):
                self.links = max(self.links, entry)
            elif found:
                self.version, self.opened = max(self.version, entry), 0
        return Settled(bytes(outcomes), pack_i64(entries))

    def _part(self, bucket: int) -> BucketOverlay:
        mine = bucket == BUCKET
        link = Link(FORMAT, bucket, TABLE, 0, 10, self.links, 0, 0, b"", b"", 0, 0, "run", [])
        known, opened = mine and self.version, mine and self.opened
        return BucketOverlay(
            bucket,
            self.links if mine else 1,
            MIN_TIMESTAMP,
            [encode_link(link)],
            [ALICE] if known else [],
            pack_i64([0] if known else []),
            pack_u32([1] if known else []),
            [ITEM] if known else [],
            pack_i64([self.version] if known else []),
            [ALICE] if opened else [],
            pack_i64([self.opened] if opened else []),
        )


def gather(replicas: dict[str, Replica], *, first: tuple[str, str] = (A, B)) -> tuple[Facts, list[Any]]:
    """The facts of the bucket, and the effects that it took. `first`: the replicas that are asked first."""
    view = view_of(topology(), 1)
    (last,) = {A, B, C} - set(first)
    view.suspicion.suspect(last)
    script = look(view, TABLE, 0, [BUCKET, BUCKET + 1], SETTINGS)
    effects: list[Any] = []
    result: Any = None
    while True:
        try:
            effect = script.send(result)
        except StopIteration as stop:
            facts, other = stop.value
            assert (facts.bucket, other.bucket) == (BUCKET, BUCKET + 1)
            return facts, effects
        effects.append(effect)
        assert len(effects) < 100, "it does not end"
        result = 0.0 if isinstance(effect, Sleep) else [replicas[call.node].answer(call.message) for call in effect]


def settled(effects: list[Any]) -> list[Call]:
    return [c for effect in effects if isinstance(effect, list) for c in effect if isinstance(c.message, Settle)]


def test_two_replicas_that_agree_are_asked_once() -> None:
    facts, effects = gather({A: Replica(version=4), B: Replica(version=4), C: Replica()})
    assert facts.items == {(b"alice", ITEM): 4}
    assert len(effects) == 1 and [call.node for call in effects[0]] == [A, B]


@pytest.mark.parametrize("first", [(A, B), (B, A)])
def test_what_one_of_two_knows_counts(first: tuple[str, str]) -> None:
    facts, _ = gather({A: Replica(version=7), B: Replica(version=4), C: Replica()}, first=first)
    assert facts.items == {(b"alice", ITEM): 7}


def test_an_entry_that_is_open_is_settled_and_then_counts_if_it_was_chosen() -> None:
    replicas = {A: Replica(version=4, opened=5), B: Replica(version=3), C: Replica()}
    facts, effects = gather(replicas)
    assert facts.items == {(b"alice", ITEM): 5}
    assert {call.node for call in settled(effects)} == {A, B}
    assert replicas[A].asked == [[BUCKET, BUCKET + 1], [BUCKET]], "only that bucket is asked for again"


def test_it_is_enough_that_one_of_those_that_were_asked_finds_out() -> None:
    replicas = {A: Replica(version=4, opened=5), B: Replica(version=3), C: Replica()}
    replicas[A].settles = lambda entry: False
    facts, effects = gather(replicas)
    assert facts.items == {(b"alice", ITEM): 5}
    assert len(settled(effects)) == 2, "one attempt"


def test_when_nobody_can_find_out_the_third_replica_is_asked() -> None:
    replicas = {A: Replica(version=4, opened=5), B: Replica(version=3), C: Replica(version=6)}
    replicas[A].settles = replicas[B].settles = lambda entry: False
    facts, _ = gather(replicas)
    assert facts.items == {(b"alice", ITEM): 6}
    replicas[C].away = True
    with pytest.raises(Unavailable, match="no majority"):
        gather({A: replicas[A], B: replicas[B], C: replicas[C]})


def test_a_timeline_that_always_has_an_open_entry_holds_nobody_up() -> None:
    replicas = {A: Replica(version=4, opened=5), B: Replica(version=4), C: Replica()}

    def settles(entry: int) -> bool:
        replicas[A].settles = lambda _: True
        return True

    original = replicas[A]._settle

    def settle_and_open(message: Settle) -> Settled:
        answer = original(message)
        replicas[A].opened = replicas[A].version + 1  # another write came at once
        return answer

    replicas[A].settles = settles
    replicas[A]._settle = settle_and_open  # type: ignore[method-assign]
    facts, effects = gather(replicas)
    assert facts.items == {(b"alice", ITEM): 5}, "the write of later was not acknowledged before the question"
    assert len(settled(effects)) == 2


@pytest.mark.parametrize("behind", [A, B])
def test_the_latest_links_count_and_who_lacks_them_is_asked_again_with_them(behind: str) -> None:
    replicas = {A: Replica(version=4, links=9), B: Replica(version=4, links=9), C: Replica()}
    replicas[behind].links = 8
    facts, _ = gather(replicas)
    assert (facts.system_version, facts.links[0].generation) == (9, 9)
    assert replicas[behind].asked[-1] == [BUCKET] and replicas[behind].links == 9


def test_a_replica_that_does_not_get_the_links_is_replaced_by_the_third() -> None:
    replicas = {A: Replica(version=4, links=8), B: Replica(version=4, links=9), C: Replica(version=5, links=9)}
    replicas[A].settles = lambda entry: False
    facts, _ = gather(replicas)
    assert facts.system_version == 9
    assert facts.items == {(b"alice", ITEM): 5}


def test_a_node_that_is_away_is_replaced_and_without_a_majority_there_is_no_answer() -> None:
    replicas = {A: Replica(version=4), B: Replica(version=2), C: Replica(version=3)}
    replicas[A].away = True
    assert gather(replicas)[0].items == {(b"alice", ITEM): 3}
    replicas[B].away = True
    with pytest.raises(Unavailable, match="away"):
        gather(replicas)


def test_an_incarnation_that_was_replaced_counts_for_nothing() -> None:
    replicas = {A: Replica(version=1), B: Replica(version=2), C: Replica(version=6)}
    replicas[B].incarnations = [2, 1, 1]  # it knows that A has lost its data since
    facts, _ = gather(replicas)
    assert facts.items == {(b"alice", ITEM): 6}
    assert replicas[C].asked
