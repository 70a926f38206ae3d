"""A node that refuses says when to come back; the client does so, asks others meanwhile, and hands the hint on."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from random import Random
from typing import Any

from client_model import make_topology
from scripted_group import Scripted
from timetier.cluster.client.scripts import ItemQueries, WriteRequest, read_items, write
from timetier.cluster.client.view import View
from timetier.cluster.effects import Call, CallFailed, Script, Sleep
from timetier.cluster.errors import Unavailable
from timetier.cluster.gate import RETRY_AFTER_S, overloaded
from timetier.cluster.keys import item_key, timeline_key
from timetier.cluster.messages import OK, PUT, Failure, FoundItems, Message, Written, decode, encode, failure, pack_i64
from timetier.cluster.packed_items import Item
from timetier.cluster.paxos.replica import LEARNING

ALICE = timeline_key(b"moments", b"alice", 1024)
BUSY = failure(overloaded("it has too much to do"))
FULL = failure(Unavailable("its disk is full", retry_after_s=1.5))
DONE = Written(bytes((OK,)), pack_i64([1]))
PUT_ALICE = WriteRequest(ALICE, bytes((PUT,)), [item_key(1)], [b"v"])


class Asked:
    """Runs one script. `calls`: (time, node) of each; the clock moves only by the script's own pauses."""

    def __init__(self) -> None:
        self.now = 0.0
        self.view = View(make_topology(), now=lambda: self.now, random=Random(3))
        self.calls: list[tuple[float, str]] = []

    def run(self, script: Script[Any], answer: Callable[[int, Call], Message | CallFailed]) -> Any:
        try:
            effect = next(script)
            while True:
                assert len(self.calls) < 10_000, "the script does not end"
                if isinstance(effect, Sleep):
                    self.now += effect.seconds
                    effect = script.send(self.now)
                    continue
                replies = []
                for call in effect:
                    replies.append(answer(len(self.calls), call))
                    self.calls.append((self.now, call.node))
                effect = script.send(replies)
        except StopIteration as stop:
            return stop.value

    def write(self, answer: Callable[[int, Call], Message], timeout_s: float = 10.0) -> Any:
        return self.run(write(self.view, [PUT_ALICE], timeout_s), answer)[0]


def test_an_overloaded_node_is_not_asked_again_and_its_load_not_passed_on_before_the_hint() -> None:
    asked = Asked()
    assert asked.write(lambda number, _: DONE if number else BUSY) == 1
    (first, _), (second, _) = asked.calls
    assert second - first >= RETRY_AFTER_S


def test_while_all_nodes_are_overloaded_a_call_makes_few_attempts() -> None:
    asked = Asked()
    asked.write(lambda _number, _call: BUSY, timeout_s=5.0)
    assert 3 <= len(asked.calls) <= 5.0 / RETRY_AFTER_S


def test_a_node_that_can_not_write_for_a_while_costs_its_writes_no_time_and_is_asked_last_until_then() -> None:
    asked = Asked()
    full = asked.view.routing.storage_order(ALICE)[0]
    for _ in range(3):
        assert asked.write(lambda _, call: FULL if call.node == full else DONE) == 1
    assert asked.now == 0.0
    assert [node for _, node in asked.calls].count(full) == 1
    asked.now = 1.6
    assert asked.write(lambda _, call: FULL if call.node == full else DONE) == 1
    assert [node for _, node in asked.calls].count(full) == 2


def test_when_no_node_can_write_they_are_asked_again_when_they_said() -> None:
    asked = Asked()
    assert asked.write(lambda number, _: DONE if number >= 3 else FULL) == 1
    times = [time for time, _ in asked.calls]
    assert times[:3] == [0.0, 0.0, 0.0]
    assert 1.5 <= times[3] <= 2.1


def test_the_error_at_the_deadline_names_reason_and_hint_and_keeps_them_when_it_is_pickled() -> None:
    for answer, words in ((FULL, "its disk is full"), (BUSY, "too much to do")):
        error = Asked().write(lambda _number, _call, answer=answer: answer, timeout_s=4.0)  # type: ignore[misc]
        hint_s = answer.fields["retry_after_s"]
        for seen in (error, pickle.loads(pickle.dumps(error))):
            assert type(seen) is Unavailable
            assert seen.retry_after_s == hint_s
            assert words in str(seen)
            assert f"come back in {hint_s:g} s" in str(seen)
            assert "not applied" in str(seen)


def test_a_hint_survives_the_frame_and_reads_honour_it_too() -> None:
    assert decode(encode(BUSY)) == BUSY
    asked = Asked()
    queries = ItemQueries([ALICE], [item_key(1)])
    (error,) = asked.run(read_items(asked.view, queries, 3.0), lambda _number, _call: BUSY).rows()
    assert type(error) is Unavailable
    assert error.retry_after_s == RETRY_AFTER_S
    assert len(asked.calls) <= 3.0 / RETRY_AFTER_S + 1


def test_hints_that_make_no_sense_are_not_waited_for() -> None:
    for hint in (-1.0, float("nan"), 1e300, "soon", None):
        asked = Asked()
        refusal = Failure("Unavailable", "no", {"retry_after_s": hint})
        error = asked.write(lambda _number, _call, refusal=refusal: refusal, timeout_s=2.0)  # type: ignore[misc]
        assert type(error) is Unavailable
        assert asked.now <= 2.1
        assert error.retry_after_s is not None
        assert 0 < error.retry_after_s <= 60


def test_a_learner_or_a_node_that_starts_is_asked_again_soon_and_is_on_no_probation_afterwards() -> None:
    asked = Asked()
    first = asked.view.routing.storage_order(ALICE)[0]
    not_yet = failure(_refusal_of_a_learner())
    for _ in range(3):
        assert asked.write(lambda _, call: not_yet if call.node == first else DONE) == 1
        asked.now += 0.25
    assert [node for _, node in asked.calls].count(first) == 3
    assert asked.write(lambda _, call: DONE) == 1
    assert asked.calls[-1][1] == first
    assert asked.view.attempt_timeout_s(first, hasty=True) == asked.view.settings.attempt_timeout_s


def _refusal_of_a_learner() -> Unavailable:
    group = Scripted(1)
    group.replica(0).state = LEARNING
    try:
        group.replica(0).require_voting()
    except Unavailable as refusal:
        return refusal
    raise AssertionError("it votes")


def test_a_node_that_the_map_has_just_added_and_that_does_not_listen_yet_is_asked_again_soon() -> None:
    asked = Asked()
    asked.view.update(make_topology(2, caches=3))
    timelines = [timeline_key(b"moments", b"owner %d" % n, 1024) for n in range(50)]
    timeline = next(one for one in timelines if asked.view.routing.cache_order(one)[0] == "cache-0-2")
    queries = ItemQueries([timeline], [item_key(1)])
    listens = False

    def answer(_number: int, call: Call) -> Message | CallFailed:
        if call.node == "cache-0-2" and not listens:
            return CallFailed(call.node, "no address of it is known", sent=False)
        return FoundItems(b"\0", pack_i64([1]), [Item(1, b"v", b"", 1, 1)])

    asked.run(read_items(asked.view, queries, 3.0), answer)
    assert [node for _, node in asked.calls] == ["cache-0-2", asked.view.routing.cache_order(timeline)[1]]
    listens, asked.now = True, asked.now + 0.3
    asked.run(read_items(asked.view, queries, 3.0), answer)
    assert asked.calls[-1][1] == "cache-0-2"
    assert asked.view.attempt_timeout_s("cache-0-2", hasty=True) == asked.view.settings.attempt_timeout_s


def test_a_node_that_is_unreachable_long_after_it_was_added_is_suspected() -> None:
    asked = Asked()
    asked.view.update(make_topology(2, caches=3))
    asked.now += 60.0
    asked.view.unreachable("cache-0-2")
    asked.now += 0.3
    assert asked.view.is_suspect("cache-0-2")
