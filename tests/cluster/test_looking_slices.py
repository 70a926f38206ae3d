"""What replicas tell of timelines and of ages comes in short slices and bounded answers, and adds up."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from replica_group import Group, key_of
from timetier.cluster.ages import BINS
from timetier.cluster.errors import InvalidRequest, Unavailable
from timetier.cluster.keys import bucket_of, item_key, priority, system_timeline
from timetier.cluster.messages import (
    COUNTS,
    ROWS,
    Ages,
    AskAges,
    AskTimeline,
    TimelineFacts,
    pack_i64,
    pack_u32,
    unpack_i64,
)
from timetier.cluster.paxos import age_scans, timeline_facts
from timetier.cluster.paxos.core import Settings
from timetier.cluster.paxos.slices import Slices, in_one_slice

SLICE_ROWS = 20
WINDOW = 100
ALICE = key_of("alice")
BUCKET = bucket_of(ALICE)
FIRST = priority(ALICE, 3)[0]
EDGES = list(range(100, 100 * BINS, 100))
OTHERS = [key for key in (key_of(f"owner-{n}") for n in range(1_000)) if bucket_of(key) == BUCKET][:3]


def rid(number: int) -> bytes:
    return number.to_bytes(16, "big")


def group_with(rows: int) -> Group:
    """Items of one timeline, one at each instant from 0 on, and one of each of the others in its bucket."""
    group = Group(1, settings=Settings(chore_rows=SLICE_ROWS))
    for at, start in enumerate(range(0, rows, 50)):
        group.put(FIRST, ALICE, rid(at), [(n, b"", b"v%d" % n) for n in range(start, start + 50)], seen=at)
    for at, key in enumerate(OTHERS):
        group.put(FIRST, key, rid(1_000 + at), [(1, b"", b"other")])
    return group


def ask_ages(group: Group, cursor: bytes = b"", buckets: list[int] | None = None) -> Ages:
    message = AskAges(b"t", pack_u32([BUCKET] if buckets is None else buckets), pack_i64(EDGES), cursor)
    answer = in_one_slice(group.replica(FIRST).slices(message))[0]
    assert isinstance(answer, Ages)
    return answer


def ask_counts(group: Group, low: bytes = b"") -> TimelineFacts:
    answer = in_one_slice(group.replica(FIRST).slices(AskTimeline(ALICE, WINDOW, COUNTS, low)))[0]
    assert isinstance(answer, TimelineFacts)
    return answer


@pytest.mark.parametrize(
    "question",
    [AskTimeline(ALICE, WINDOW, COUNTS), AskAges(b"t", pack_u32([BUCKET]), pack_i64(EDGES))],
    ids=["timeline", "ages"],
)
def test_no_slice_reads_more_than_a_bounded_number_of_rows(question: AskTimeline | AskAges) -> None:
    group = group_with(1_000)
    engine = group.replica(FIRST).core.engine
    seen, original = [0], engine.scan

    def scan(low: bytes, high: bytes, *, reverse: bool = False) -> Iterator[tuple[bytes, bytes]]:
        for row in original(low, high, reverse=reverse):
            seen[0] += 1
            yield row

    engine.scan = scan  # type: ignore[method-assign]
    slices: Slices[object] = group.replica(FIRST).slices(question)
    largest = steps = 0
    while True:
        before = seen[0]
        try:
            next(slices)
        except StopIteration:
            break
        largest, steps = max(largest, seen[0] - before), steps + 1
    assert steps >= 1_000 // SLICE_ROWS
    assert largest <= 2 * SLICE_ROWS + 16


def test_a_timeline_is_told_of_as_of_one_version_whatever_is_written_between_two_slices() -> None:
    random_ = random.Random(5)
    for run in range(6):
        group = group_with(200)
        truth = {group.version(ALICE): set(range(200))}
        items = set(range(200))
        slices = group.replica(FIRST).slices(AskTimeline(ALICE, WINDOW, COUNTS))
        number = 5_000 + run * 100
        while True:
            try:
                next(slices)
            except StopIteration as stop:
                facts: TimelineFacts = stop.value[0]
                break
            if number % 2:
                added = random_.randrange(1_000)
                _, version = group.put(FIRST, ALICE, rid(number), [(added, b"", b"new")], seen=max(truth))
                items = items | {added}
                truth[version] = items
            number += 1
        assert sum(window.items for window in facts.windows) == len(truth[facts.chosen])


def test_counts_are_by_window_and_a_long_timeline_goes_on_where_an_answer_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group = group_with(500)
    whole = ask_counts(group)
    assert [(w.start, w.end, w.items, w.oldest, w.newest) for w in whole.windows] == [
        (start, start + WINDOW, WINDOW, start, start + WINDOW - 1) for start in range(0, 500, WINDOW)
    ]
    assert whole.next == b""
    monkeypatch.setattr(timeline_facts, "ROWS_PER_ANSWER", 70)
    items, low, answers = 0, b"", 0
    while True:
        part = ask_counts(group, low)
        items += sum(window.items for window in part.windows)
        answers += 1
        if not part.next:
            break
        assert part.next > low
        low = part.next
    assert items == 500
    assert answers >= 500 // 90


def test_rows_are_told_one_by_one_between_two_bounds() -> None:
    group = group_with(100)
    group.put(FIRST, ALICE, rid(9_000), [(7, b"", b"longer"), (7, b"x", b"id")], seen=2)
    message = AskTimeline(ALICE, WINDOW, ROWS, item_key(7), item_key(8))
    facts = in_one_slice(group.replica(FIRST).slices(message))[0]
    assert isinstance(facts, TimelineFacts)
    assert [(row.key, row.version, row.size) for row in facts.rows] == [
        (item_key(7), 1, 2),
        (item_key(7), 3, 6),
        (item_key(7, b"x"), 3, 2),
    ]
    assert facts.windows == []


def test_ages_of_a_long_bucket_add_up_over_several_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    group = group_with(300)
    whole = ask_ages(group)
    assert unpack_i64(whole.items)[:3] == [100 + len(OTHERS), 100, 100]
    assert (unpack_i64(whole.bucket_items), whole.next, whole.cursor) == ([300 + len(OTHERS)], 1, b"")
    monkeypatch.setattr(age_scans, "ROWS_PER_ANSWER", 40)
    sums, cursor, answers = [0] * BINS, b"", 0
    nbytes = 0
    while True:
        part = ask_ages(group, cursor)
        sums = [a + b for a, b in zip(sums, unpack_i64(part.items), strict=True)]
        nbytes += sum(unpack_i64(part.nbytes))
        answers += 1
        if part.next == 1:
            break
        assert part.cursor > cursor
        cursor = part.cursor
    assert sums == unpack_i64(whole.items)
    assert nbytes == sum(unpack_i64(whole.nbytes))
    assert answers > 3


def test_questions_that_can_not_be_are_refused() -> None:
    group = group_with(50)
    replica = group.replica(FIRST)
    foreign = 1 << 20
    for message in (
        AskAges(b"t", pack_u32([foreign]), pack_i64(EDGES)),
        AskAges(b"t", pack_u32([BUCKET] * 300), pack_i64(EDGES)),
        AskAges(b"t", pack_u32([BUCKET]), pack_i64([2, 1])),
        AskTimeline(system_timeline(BUCKET), WINDOW),
        AskTimeline(ALICE, 0),
        AskTimeline(ALICE, WINDOW, 9),
        AskTimeline(ALICE, WINDOW, COUNTS, b"short"),
    ):
        with pytest.raises(InvalidRequest):
            in_one_slice(replica.slices(message))
    with pytest.raises(Unavailable):
        replica.slices(AskTimeline(foreign.to_bytes(4, "big") + ALICE[4:], WINDOW))
