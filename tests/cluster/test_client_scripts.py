"""The client's scripts, answered by hand: no loop, no network, a clock that only the test moves."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from client_model import make_topology
from timetier.cluster.client.batch import MAX_MESSAGE_BYTES
from timetier.cluster.client.scripts import (
    ItemQueries,
    PageQueries,
    WriteRequest,
    ask_status,
    read_items,
    read_pages,
    write,
)
from timetier.cluster.client.view import ClientSettings, View
from timetier.cluster.effects import Call, CallFailed, Script, Sleep
from timetier.cluster.errors import (
    Corrupt,
    InvalidRequest,
    OutcomeUnknown,
    TimeTierError,
    TooLarge,
    Unavailable,
    VersionConflict,
)
from timetier.cluster.keys import item_key, timeline_key
from timetier.cluster.messages import (
    CONFLICT,
    CORRUPT,
    INVALID,
    MISPLACED,
    OK,
    PUT,
    STALE,
    UNAVAILABLE,
    UNKNOWN,
    Failure,
    FoundItems,
    Message,
    Pages,
    Pong,
    ReadItems,
    ReadPages,
    Write,
    Written,
    failure,
    pack_i64,
    unpack_i64,
    unpack_u32,
)
from timetier.cluster.packed_items import Item

ALICE = timeline_key(b"moments", b"alice", 1024)
Answer = Callable[[Call], Message | CallFailed]


class Hand:
    """Answers scripts by hand. `calls`: all that were made; `rounds`: how many went together; `slept`: pauses."""

    def __init__(self, *, caches: int = 2, **settings: Any) -> None:
        self.now = 100.0
        self.view = View(
            make_topology(caches=caches), now=lambda: self.now, random=Random(7), settings=ClientSettings(**settings)
        )
        self.calls: list[Call] = []
        self.rounds: list[int] = []
        self.slept: list[float] = []

    def run(self, script: Script[Any], answer: Answer) -> Any:
        result: Any = None
        try:
            effect = next(script)
            while True:
                assert len(self.calls) + len(self.slept) < 10_000, "the script does not end"
                if isinstance(effect, Sleep):
                    self.slept.append(effect.seconds)
                    self.now += effect.seconds
                    effect = script.send(self.now)
                else:
                    self.calls += effect
                    self.rounds.append(len(effect))
                    effect = script.send([answer(call) for call in effect])
        except StopIteration as stop:
            result = stop.value
        return result

    def write(self, answer: Answer, request: WriteRequest | None = None, timeout_s: float = 10.0) -> Any:
        return self.run(write(self.view, [request or put()], timeout_s), answer)[0]

    def times_out(self, call: Call) -> CallFailed:
        """The node stays silent for the whole attempt."""
        self.now += call.timeout_s
        return CallFailed(call.node, "no answer", sent=True)

    @property
    def writes(self) -> list[Write]:
        return [call.message for call in self.calls if isinstance(call.message, Write)]

    @property
    def nodes(self) -> list[str]:
        return [call.node for call in self.calls]


def put(owner: bytes = b"alice", value: bytes = b"v", if_version: int = -1) -> WriteRequest:
    return WriteRequest(timeline_key(b"moments", owner, 1024), bytes((PUT,)), [item_key(1)], [value], if_version)


def written(*outcomes: tuple[int, int]) -> Written:
    return Written(bytes(outcome for outcome, _ in outcomes), pack_i64([version for _, version in outcomes]))


def in_turn(*answers: Message | CallFailed | Callable[[Call], CallFailed]) -> Answer:
    """The answers one after the other, the last one for ever."""
    rest = list(answers)

    def answer(call: Call) -> Message | CallFailed:
        one = rest.pop(0) if len(rest) > 1 else rest[0]
        return one(call) if callable(one) else one

    return answer


def unsent(call: Call) -> CallFailed:
    return CallFailed(call.node, "connection refused", sent=False)


def cut_off(call: Call) -> CallFailed:
    return CallFailed(call.node, "connection ended", sent=True)


# ---------------------------------------------------------------- writes


def test_a_write_goes_to_the_replica_of_first_priority_and_its_version_is_remembered() -> None:
    hand = Hand()
    assert hand.write(in_turn(written((OK, 5)))) == 5
    assert hand.nodes == hand.view.routing.storage_order(ALICE)[:1]
    assert hand.view.seen(ALICE) == 5
    hand.write(in_turn(written((OK, 6))))
    assert unpack_i64(hand.writes[1].seen) == [5]
    assert hand.writes[0].request_ids != hand.writes[1].request_ids
    assert all(len(request_id) == 16 for message in hand.writes for request_id in message.request_ids)


@pytest.mark.parametrize("first", [unsent, cut_off, written((UNKNOWN, 0)), written((UNAVAILABLE, 0)), Pong()])
def test_a_repeated_write_keeps_its_request_id_and_seen_version_and_goes_to_the_next_replica(first: Any) -> None:
    hand = Hand()
    hand.view.remember(ALICE, 3)
    assert hand.write(in_turn(first, written((OK, 4)))) == 4
    one, two = hand.writes
    assert one.request_ids == two.request_ids
    assert unpack_i64(one.seen) == unpack_i64(two.seen) == [3]
    assert hand.nodes == hand.view.routing.storage_order(ALICE)[:2]


def test_a_write_of_unknown_fate_keeps_its_seen_version_whatever_other_calls_learn_meanwhile() -> None:
    hand = Hand()
    hand.view.remember(ALICE, 3)

    def lose(call: Call) -> CallFailed:
        hand.view.remember(ALICE, 500)  # by a write of another task
        return cut_off(call)

    hand.write(in_turn(lose, written((OK, 501))))
    assert [unpack_i64(message.seen) for message in hand.writes] == [[3], [3]]


def test_a_dead_node_costs_no_pause_and_is_asked_last_afterwards() -> None:
    hand = Hand()
    order = hand.view.routing.storage_order(ALICE)
    hand.write(in_turn(unsent, written((OK, 1))))
    assert hand.slept == []
    hand.write(in_turn(written((OK, 2))))
    assert hand.nodes == [order[0], order[1], order[1]]
    hand.now += hand.view.settings.suspect_s
    hand.write(in_turn(written((OK, 3))))
    assert hand.nodes[-1] == order[0], "suspicion ends"


def test_suspicion_doubles_while_a_node_keeps_failing_and_ends_with_its_first_answer() -> None:
    hand = Hand(suspect_s=1.0, suspect_max_s=4.0)
    lengths = []
    for _ in range(5):
        hand.view.suspect("storage-0-0")
        began = hand.now
        while hand.view.is_suspect("storage-0-0"):
            hand.now += 0.25
        lengths.append(hand.now - began)
    assert lengths == [1.0, 2.0, 4.0, 4.0, 4.0]
    hand.view.suspect("storage-0-0")
    hand.view.trust("storage-0-0")
    assert not hand.view.is_suspect("storage-0-0")


def test_a_write_that_surely_was_not_applied_ends_as_unavailable_at_the_deadline() -> None:
    for answer in (unsent, written((UNAVAILABLE, 0)), Failure("Unavailable", "starting")):
        hand = Hand()
        error = hand.write(in_turn(answer), timeout_s=3.0)
        assert isinstance(error, Unavailable), answer
        assert "not applied" in str(error) and "'alice'" in str(error)
        assert hand.now == pytest.approx(103.0)
        assert set(hand.nodes) == set(hand.view.routing.storage_order(ALICE))


@pytest.mark.parametrize(
    "first",
    [cut_off, written((UNKNOWN, 0)), failure(ZeroDivisionError("a bug")), Failure("ProtocolError", "?"), Pong()],
)
def test_a_write_of_unknown_fate_never_ends_as_unavailable(first: Any) -> None:
    hand = Hand()
    error = hand.write(in_turn(first, unsent), timeout_s=3.0)
    assert isinstance(error, OutcomeUnknown)
    assert "read before you retry" in str(error)


def test_pauses_between_repeated_attempts_double_up_to_a_bound() -> None:
    hand = Hand(back_off_s=0.01, back_off_max_s=0.08)
    hand.write(in_turn(written((UNAVAILABLE, 0))), timeout_s=2.0)
    bounds = [0.01, 0.02, 0.04] + [0.08] * (len(hand.slept) - 3)
    assert all(bound / 2 <= pause <= bound for pause, bound in zip(hand.slept[:-1], bounds, strict=False))
    assert len(hand.slept) < 60


def test_a_silent_node_costs_one_attempt_and_not_the_whole_time() -> None:
    hand = Hand(attempt_timeout_s=2.0)
    assert hand.write(in_turn(hand.times_out, written((OK, 1)))) == 1
    assert hand.now == pytest.approx(102.0)
    assert hand.writes[0].timeout_ms < 2_000, "the node answers before its caller has gone"


def test_a_write_of_a_sender_that_knows_no_version_is_repeated_with_the_one_it_is_told() -> None:
    hand = Hand()
    assert hand.write(in_turn(written((STALE, 50)), written((OK, 51)))) == 51
    assert [unpack_i64(message.seen) for message in hand.writes] == [[0], [50]]
    assert hand.slept == []


def test_a_stale_answer_after_an_attempt_of_unknown_fate_is_never_repeated() -> None:
    hand = Hand()
    error = hand.write(in_turn(cut_off, written((STALE, 50)), written((OK, 51))))
    assert isinstance(error, OutcomeUnknown)
    assert len(hand.calls) == 2


def test_a_conflict_names_the_present_version() -> None:
    hand = Hand()
    error = hand.write(in_turn(written((CONFLICT, 9))), put(if_version=4))
    assert isinstance(error, VersionConflict) and error.version == 9
    assert unpack_i64(hand.writes[0].if_version) == [4]
    assert unpack_i64(hand.writes[0].seen) == [4], "who names a version has seen it"


def test_a_conflict_with_a_later_version_settles_a_conditional_write_of_unknown_fate() -> None:
    error = Hand().write(in_turn(cut_off, written((CONFLICT, 9))), put(if_version=4))
    assert isinstance(error, VersionConflict)


def test_a_conflict_with_an_earlier_version_leaves_a_conditional_write_of_unknown_fate_open() -> None:
    error = Hand().write(in_turn(cut_off, written((CONFLICT, 2))), put(if_version=4))
    assert isinstance(error, OutcomeUnknown)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (written((INVALID, 0)), InvalidRequest),
        (Failure("InvalidRequest", "no such table"), InvalidRequest),
        (Failure("TooLarge", "too much", {"limit": 3}), TooLarge),
    ],
)
def test_a_rejected_write_ends_at_once_unless_an_earlier_attempt_is_of_unknown_fate(answer: Any, kind: Any) -> None:
    hand = Hand()
    assert type(hand.write(in_turn(answer))) is kind
    assert len(hand.calls) == 1
    assert isinstance(Hand().write(in_turn(cut_off, answer)), OutcomeUnknown)


def test_a_misplaced_write_has_the_map_fetched_and_goes_on_with_the_next_one() -> None:
    hand = Hand()
    stale: list[bool] = []

    def fetch() -> None:
        stale.append(hand.view.stale_map)
        hand.view.update(make_topology(epoch=2, groups=2))

    hand.view.on_stale = fetch
    assert hand.write(in_turn(written((MISPLACED, 0)), written((OK, 1)))) == 1
    assert stale == [True] and not hand.view.stale_map
    assert [message.epoch for message in hand.writes] == [1, 2]
    assert hand.writes[0].request_ids == hand.writes[1].request_ids
    assert hand.nodes[1] in hand.view.routing.storage_order(ALICE)


def test_a_map_that_stays_old_ends_as_unavailable_that_says_so() -> None:
    hand = Hand()
    error = hand.write(in_turn(written((MISPLACED, 0))), timeout_s=1.0)
    assert isinstance(error, Unavailable) and "epoch 1" in str(error)


def test_each_request_of_a_batch_gets_its_own_outcome_in_order() -> None:
    hand = Hand()
    requests = [put(f"owner{i}".encode(), if_version=i % 2 - 1) for i in range(30)]

    def answer(call: Call) -> Message:
        assert isinstance(call.message, Write)
        conditions = unpack_i64(call.message.if_version)
        return written(*[(OK, 7) if condition == -1 else (CONFLICT, 3) for condition in conditions])

    results = hand.run(write(hand.view, requests, 10.0), answer)
    assert [type(result) for result in results] == [int, VersionConflict] * 15
    assert len(set(hand.nodes)) == len(hand.nodes) == 3, "one message per node"
    assert hand.rounds == [3], "in parallel"
    for call in hand.calls:
        assert isinstance(call.message, Write)
        assert {hand.view.routing.storage_order(timeline)[0] for timeline in call.message.timelines} == {call.node}


def test_a_dead_replica_spreads_its_writes_over_the_others() -> None:
    hand = Hand()
    requests = [put(f"owner{i}".encode()) for i in range(300)]

    def answer(call: Call) -> Message | CallFailed:
        assert isinstance(call.message, Write)
        return unsent(call) if call.node == "storage-0-1" else written(*[(OK, 1)] * len(call.message.timelines))

    assert hand.run(write(hand.view, requests, 10.0), answer) == [1] * 300
    second_round = {call.node: len(call.message.timelines) for call in hand.calls[3:]}  # type: ignore[union-attr]
    assert set(second_round) == {"storage-0-0", "storage-0-2"}
    assert min(second_round.values()) > 25


def test_messages_stay_below_their_limits_of_bytes_and_items() -> None:
    hand = Hand()
    big = [put(f"owner{i}".encode(), b"x" * (1 << 20)) for i in range(30)]

    def answer(call: Call) -> Message:
        assert isinstance(call.message, Write)
        assert sum(map(len, call.message.values)) <= MAX_MESSAGE_BYTES
        assert len(call.message.keys) <= 10_000
        return written(*[(OK, 1)] * len(call.message.timelines))

    assert hand.run(write(hand.view, big, 10.0), answer) == [1] * 30
    column = [item_key(i) for i in range(4_000)]
    many = [WriteRequest(ALICE, bytes(4_000), column, [b""] * 4_000) for _ in range(5)]
    assert hand.run(write(hand.view, many, 10.0), answer) == [1] * 5
    assert [unpack_u32(message.counts) for message in hand.writes[-3:]] == [[4_000] * 2, [4_000] * 2, [4_000]]


def test_an_answer_with_the_wrong_number_of_outcomes_is_not_believed() -> None:
    for unfit in (written((OK, 1), (OK, 2)), Written(b"\x00", b""), Written(b"", pack_i64([1]))):
        assert Hand().write(in_turn(unfit, written((OK, 8)))) == 8


def test_a_request_id_given_by_the_caller_is_used() -> None:
    hand = Hand()
    request = put()
    request.request_id = b"i" * 16
    hand.write(in_turn(written((OK, 1))), request)
    assert hand.writes[0].request_ids == [b"i" * 16]


def test_calls_end_at_their_next_step_when_the_store_closes() -> None:
    hand = Hand()

    def answer(call: Call) -> CallFailed:
        hand.view.closing = True
        return cut_off(call)

    error = hand.write(answer)
    assert isinstance(error, OutcomeUnknown) and "closed" in str(error)
    assert len(hand.calls) == 1


def test_versions_are_remembered_in_a_bounded_number_least_recent_first_out() -> None:
    hand = Hand(seen_timelines=3)
    for version, name in enumerate((b"a", b"b", b"c"), start=1):
        hand.view.remember(name, version)
    hand.view.remember(b"a", 0)
    hand.view.remember(b"d", 4)
    assert [hand.view.seen(name) for name in (b"a", b"b", b"c", b"d")] == [1, 0, 3, 4]
    hand.view.remember_all([b"c", b"e", b"a"], [2, 5, 7])
    assert hand.view.all_seen([b"a", b"c", b"d", b"e"]) == [7, 3, 0, 5]


# ---------------------------------------------------------------- reads


def page(call: Call, *, more: bool = False, items: int = 1) -> Pages:
    assert isinstance(call.message, ReadPages)
    n = len(call.message.timelines)
    pages = [[Item(10 - items + i, b"v", b"", 1, 1) for i in range(items)] for _ in range(n)]
    return Pages(bytes(n), pack_i64([4] * n), bytes([more]) * n, pages)


def found(call: Call, outcome: int = OK) -> FoundItems:
    assert isinstance(call.message, ReadItems)
    n = len(call.message.timelines)
    ones = pack_i64([1] * n)
    return FoundItems(bytes([outcome]) * n, ones, [Item(1, b"v", b"", 1, 1)] * n)


def read_one(hand: Hand, answer: Answer, timeout_s: float = 10.0) -> Any:
    queries = ItemQueries([ALICE], [item_key(1)])
    return hand.run(read_items(hand.view, queries, timeout_s), answer).rows()[0]


def test_reads_go_to_the_cache_nodes_first_and_to_the_storage_nodes_when_none_of_them_answers() -> None:
    hand = Hand()

    def answer(call: Call) -> Message | CallFailed:
        return unsent(call) if call.node.startswith("cache") else found(call)

    assert read_one(hand, answer).item.value == b"v"
    order = hand.view.routing.cache_order(ALICE) + hand.view.routing.storage_order(ALICE)
    assert hand.nodes == order[:3]
    assert hand.slept == []
    read_one(hand, answer)
    assert hand.nodes[3:] == order[2:3], "a suspected cache node is passed over"


@pytest.mark.parametrize("outcome", [UNAVAILABLE, UNKNOWN, MISPLACED])
def test_reads_are_repeated_until_the_deadline_and_end_as_unavailable(outcome: int) -> None:
    hand = Hand()
    error = read_one(hand, lambda call: found(call, outcome), timeout_s=2.0)
    assert isinstance(error, Unavailable)
    assert hand.now == pytest.approx(102.0)
    assert set(hand.nodes) == {"cache-0-0", "cache-0-1", "storage-0-0", "storage-0-1", "storage-0-2"}


@pytest.mark.parametrize(("outcome", "kind"), [(INVALID, InvalidRequest), (CORRUPT, Corrupt)])
def test_reads_that_no_repetition_can_mend_end_at_once(outcome: int, kind: type[TimeTierError]) -> None:
    hand = Hand()
    assert type(read_one(hand, lambda call: found(call, outcome))) is kind
    assert len(hand.calls) == 1


def test_a_page_comes_back_as_columns() -> None:
    hand = Hand()
    queries = PageQueries([ALICE, timeline_key(b"moments", b"bob", 1024)], [b"", item_key(5)], [20, 20])
    results = hand.run(read_pages(hand.view, queries, 10.0), lambda call: page(call, more=True, items=2))
    for result in results.rows():
        assert result == (4, True, [Item(9, b"v", b"", 1, 1), Item(8, b"v", b"", 1, 1)])
    assert hand.view.seen(ALICE) == 4


def test_pages_with_columns_that_do_not_fit_are_not_believed() -> None:
    good = Pages(b"\x00", pack_i64([4]), b"\x00", [[Item(1, b"v", b"", 1, 1)]])
    changes: list[dict[str, Any]] = [
        {"outcomes": b""},
        {"timeline_versions": b"1"},
        {"more": b""},
        {"items": []},
        {"items": [[], []]},
        {"items": [[]], "more": b"\x01"},
    ]
    for change in changes:
        for caches in (1, 2):  # one cache node for all timelines is asked without a batch
            hand = Hand(caches=caches)
            bad = Pages(**{name: change.get(name, getattr(good, name)) for name in good.__struct_fields__})
            query = PageQueries([ALICE], [b""], [5])
            [result] = hand.run(read_pages(hand.view, query, 10.0), in_turn(bad, good)).rows()
            assert result.version == 4 and len(result.items) == 1 and len(hand.calls) == 2, change


def test_an_answer_too_large_for_a_frame_is_asked_for_in_smaller_pieces() -> None:
    hand = Hand()

    def answer(call: Call) -> Message:
        assert isinstance(call.message, ReadPages)
        limits = unpack_u32(call.message.limits)
        return Failure("TooLarge", "a frame has its limit", {"limit": 1}) if sum(limits) > 100 else page(call)

    queries = PageQueries([timeline_key(b"moments", b"o%d" % i, 1024) for i in range(4)], [b""] * 4, [400] * 4)
    results = hand.run(read_pages(hand.view, queries, 10.0), answer)
    assert results.versions == [4] * 4 and not results.errors


def test_a_single_item_too_large_for_a_frame_is_an_error_and_no_endless_loop() -> None:
    hand = Hand()
    assert isinstance(read_one(hand, in_turn(Failure("TooLarge", "one frame", {"limit": 1}))), TooLarge)


def test_status_asks_all_nodes_a_bounded_number_at_a_time() -> None:
    hand = Hand()
    nodes = [f"cache-0-{n}" for n in range(150)]
    result = hand.run(ask_status(nodes, 1.0), lambda call: CallFailed(call.node, f"{call.node} is gone", sent=False))
    assert {node: answer.reason for node, answer in result.items()} == {node: f"{node} is gone" for node in nodes}
    assert max(hand.rounds) <= 64
