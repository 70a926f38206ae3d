"""The log tail of a timeline is bounded by number and by bytes, and forgets no request id before its time."""

from __future__ import annotations

import random

from replica_group import Group, key_of
from timetier.cluster.keys import item_key, priority
from timetier.cluster.messages import OK, Check, Checked, pack_i64, pack_u32
from timetier.cluster.paxos.core import Settings
from timetier.cluster.paxos.rows import Meta, decode_record, log_key, rows_prefix

ALICE = key_of("alice")
FIRST, SECOND, THIRD = priority(ALICE, 3)
KEEP_BYTES = 100_000
VALUE_BYTES = 10_000
SETTINGS = Settings(log_keep_entries=64, request_id_entries=32, log_keep_bytes=KEEP_BYTES, transfer_bytes=30_000)


def rid(number: int) -> bytes:
    return number.to_bytes(16, "big")


def value(number: int) -> bytes:
    return number.to_bytes(4, "big") * (VALUE_BYTES // 4)


def fill(group: Group, first: int, last: int, *, items: int = 1) -> None:
    """Entries `first` to `last`, with one value each, written over `items` items in turn."""
    for entry in range(first, last + 1):
        written = group.put(FIRST, ALICE, rid(entry), [(entry % items, b"", value(entry))], seen=entry - 1)
        assert written == (OK, entry)
    group.run(1.0)


def tail(group: Group, number: int) -> tuple[int, int, int]:
    """(bytes of rows on disk, entries that can still be sent, entries whose ids are known)."""
    engine = group.members[number].engine
    rows = sum(len(row) for _, row in engine.scan(rows_prefix(ALICE), rows_prefix(ALICE) + b"\xff"))
    records = [decode_record(row) for _, row in engine.scan(log_key(ALICE, 0), log_key(ALICE, 1 << 40))]
    return rows, sum(bool(record.keys) for record in records), len(records)


def test_large_values_are_trimmed_by_bytes_long_before_their_number_counts() -> None:
    group = Group(1, settings=SETTINGS)
    fill(group, 1, 60)
    for number in range(3):
        rows, sendable, known = tail(group, number)
        assert KEEP_BYTES <= rows <= 2 * KEEP_BYTES + 2 * VALUE_BYTES, "of one item, only what the tail needs"
        assert KEEP_BYTES // VALUE_BYTES <= sendable <= 2 * KEEP_BYTES // VALUE_BYTES + 2
        assert known == 60, "the ids of all of them"


def test_small_values_are_trimmed_by_number_only() -> None:
    group = Group(2, settings=SETTINGS)
    for entry in range(1, 140):
        assert group.put(FIRST, ALICE, rid(entry), [(1, b"", b"x")], seen=entry - 1) == (OK, entry)
    _, sendable, known = tail(group, FIRST)
    assert SETTINGS.log_keep_entries <= sendable == known <= 2 * SETTINGS.log_keep_entries


def test_a_retry_is_applied_once_although_its_entry_was_emptied() -> None:
    group = Group(3, settings=SETTINGS)
    fill(group, 1, 40)
    for number in (FIRST, SECOND):
        for entry in (40, 30, 20, 10):
            assert group.put(number, ALICE, rid(entry), [(9, b"", b"again")], seen=entry - 1) == (OK, entry)
    for number in range(3):  # what was only in memory is gone, the ids are not
        group.crash(number)
        group.start(number)
    group.run(2.0)
    for entry in (40, 30, 20, 10):
        assert group.put(SECOND, ALICE, rid(entry), [(9, b"", b"again")], seen=entry - 1) == (OK, entry)


def test_a_replica_behind_an_emptied_tail_gets_the_state_and_then_the_same_answers() -> None:
    group = Group(4, settings=SETTINGS)
    fill(group, 1, 3, items=5)
    group.crash(THIRD)
    fill(group, 4, 60, items=5)
    group.start(THIRD)
    replica = group.replica(THIRD)
    group.run(1.0)
    replica.note_behind(group.now, SECOND, ALICE, 60)
    group.pump(THIRD)
    group.run_until(lambda: replica.core.timeline(ALICE).chosen == 60)
    assert replica.core.counters.totals["states_installed"] >= 1
    question = Check([ALICE], pack_i64([-1]), b"\x01", [b""], pack_u32([100]))
    answer = group.call(THIRD, question)
    assert isinstance(answer, Checked)
    assert dict(zip(answer.keys, answer.values, strict=True)) == {
        item_key(entry % 5, b""): value(entry) for entry in range(56, 61)
    }
    fill(group, 61, 100, items=5)  # what it has now is bounded alike
    assert tail(group, THIRD)[1] <= 2 * KEEP_BYTES // VALUE_BYTES + 2


def test_bytes_of_the_tail_survive_restarts_and_a_memory_that_holds_few_timelines() -> None:
    """Else a timeline that is loaded anew for each write would never reach the bound."""
    group = Group(5, settings=SETTINGS)
    for entry in range(1, 61):
        assert group.put(FIRST, ALICE, rid(entry), [(1, b"", value(entry))], seen=entry - 1)[0] == OK
        group.run(1.0)
        for number in range(3):
            group.members[number].engine.sync()
            group.crash(number)
            group.start(number)
        group.run(0.6)
    for number in range(3):
        rows, sendable, _ = tail(group, number)
        assert sendable <= 3 * KEEP_BYTES // VALUE_BYTES + 2
        assert rows <= 3 * KEEP_BYTES + 2 * VALUE_BYTES


def test_random_sizes_and_crashes_keep_the_tail_bounded_and_the_newest_values_readable() -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    group = Group(seed, settings=SETTINGS)
    expected: dict[bytes, bytes] = {}
    version, largest = 0, 40_000
    for request in range(150):
        if rng.random() < 0.05:
            number = rng.randrange(3)
            group.crash(number)
            group.start(number)
            group.run(2.0)
        item, content = rng.randrange(6), rng.randbytes(rng.choice((1, 100, 5_000, largest)))
        outcome, version = group.put(FIRST, ALICE, rid(request), [(item, b"", content)], seen=version)
        assert outcome == OK
        expected[item_key(item, b"")] = content
    group.run(2.0)
    for number in (FIRST, SECOND):
        answer = group.call(number, Check([ALICE], pack_i64([-1]), b"\x01", [b""], pack_u32([100])))
        assert isinstance(answer, Checked)
        assert dict(zip(answer.keys, answer.values, strict=True)) == expected
        rows, _, _ = tail(group, number)
        # Whatever fills a part of the tail may be as large as that, and so may be what it superseded.
        assert rows <= 4 * (KEEP_BYTES + largest) + sum(map(len, expected.values()))


def test_meta_rows_of_an_earlier_format_can_be_read() -> None:
    row = Meta(chosen=7, floor=3, log_low=2, wiped=1, promised_entry=8, promised=(4, (1, 2, 3))).encode()
    assert Meta.decode(row[:72]) == Meta(7, 3, 2, 1, 8, (4, (1, 2, 3)), 0, 0)
