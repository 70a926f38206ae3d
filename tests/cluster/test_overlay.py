"""What a replica tells of rows that hide those of blocks: all that was acknowledged, and nothing that is not true."""

from __future__ import annotations

import random
from itertools import count
from typing import Any

import numpy as np
import pytest
from replica_group import Group, key_of, write_message
from scripted_group import ALICE, BUCKET, FIRST, SYSTEM, Scripted
from timetier.cluster.cold.link import FORMAT, Block, Link, decode_link, encode_link
from timetier.cluster.errors import InvalidRequest
from timetier.cluster.keys import bucket_of, item_key, split_item_key, timeline_hash
from timetier.cluster.messages import (
    DELETE,
    OK,
    PUT,
    WIPE,
    AskOverlay,
    BucketOverlay,
    Overlay,
    Written,
    pack_i64,
    pack_u32,
    unpack_i64,
    unpack_u32,
)
from timetier.cluster.paxos.core import Settings
from timetier.cluster.paxos.slices import in_one_slice

WINDOW = 10
SMALL = Settings(chore_rows=3, request_id_entries=8, log_keep_entries=8)
NEIGHBOURS = [key for key in (key_of(f"owner-{n}") for n in range(4_000)) if bucket_of(key) == BUCKET][:6]
NAMES = {
    key_of(name): name for name in ["alice", *[f"owner-{n}" for n in range(4_000)]] if bucket_of(key_of(name)) == BUCKET
}


def question(cursor: bytes = b"", limit_bytes: int = 1 << 20) -> AskOverlay:
    return AskOverlay(b"t", pack_u32([BUCKET]), cursor, limit_bytes)


def link_of(window: int, versions: dict[bytes, int]) -> Link:
    """A link whose block holds the owners of these timelines, read at these versions."""
    owners = sorted((timeline_hash(b"t", NAMES[key].encode()), version) for key, version in versions.items())
    names = sorted(NAMES[key].encode() for key in versions)
    start = window * WINDOW
    block = Block("f", 8, 10, 0, 1, item_key(start), item_key(start + WINDOW), names[0], names[-1])
    hashes = np.array([owner for owner, _ in owners], dtype="<u8").tobytes()
    forever = 1 << 62
    return Link(
        FORMAT, BUCKET, b"t", start, start + WINDOW, 1, forever, forever, hashes, pack_i64([v for _, v in owners]),
        1, 1, "run", [block],
    )  # fmt: skip


class Bucket:
    """Writes to the timelines of one bucket and sinks windows of it, through one replica; knows what must be told."""

    def __init__(self, group: Group, seed: int) -> None:
        self.group = group
        self.random = random.Random(seed)
        self.ids = count(1)
        self.links = 0
        self.versions = dict.fromkeys([ALICE, *NEIGHBOURS[:3]], 0)
        self.written: dict[bytes, dict[bytes, list[int]]] = {key: {} for key in self.versions}
        self.wiped: dict[bytes, list[int]] = {key: [0] for key in self.versions}

    def send(self, key: bytes, kind: int, items: list[bytes], values: list[bytes], **more: Any) -> int:
        message = write_message(key, next(self.ids).to_bytes(16, "big"), [], **more)
        message.kinds, message.counts = bytes((kind,)) * len(items), pack_u32([len(items)])
        message.keys[:], message.values[:] = items, values
        answer = self.group.call(FIRST, message)
        assert isinstance(answer, Written) and answer.outcomes[0] == OK
        return unpack_i64(answer.versions)[0]

    def write(self) -> None:
        key = self.random.choice(list(self.versions))
        kind = self.random.choices([PUT, DELETE, WIPE], [10, 4, 1])[0]
        items = (
            [b""] if kind == WIPE else [item_key(t) for t in self.random.sample(range(50), self.random.randint(1, 5))]
        )
        values = [b"value" if kind == PUT else b""] * len(items)
        version = self.versions[key] = self.send(key, kind, items, values, seen=self.versions[key])
        if kind == WIPE:
            self.wiped[key].append(version - 1)
        else:
            for item in items:
                self.written[key].setdefault(item, []).append(version)

    def sink(self) -> None:
        link = link_of(self.links % 5, {key: version for key, version in self.versions.items() if version})
        self.send(SYSTEM, PUT, [link.key], [encode_link(link)], if_version=self.links, seen=self.links)
        self.links += 1

    def happen(self) -> None:
        """Some of what goes on between two slices."""
        for _ in range(self.random.randint(0, 2)):
            self.write()
        if self.random.random() < 0.3:
            self.sink()
        self.group.run(self.random.choice([0.0, 0.005]))
        for _ in range(self.random.randint(0, 20)):
            self.group.replica(FIRST).run_chores(self.group.now)

    def ask(self, limit_bytes: int, *, busy: bool) -> tuple[list[Link], list[BucketOverlay]]:
        """All of the bucket as of one version of its links, in as many answers as it takes."""
        for attempt in range(50):
            busy = busy and attempt < 20
            parts: list[BucketOverlay] = []
            cursor = b""
            while True:
                slices = self.group.replica(FIRST).slices(question(cursor, limit_bytes))
                try:
                    while True:
                        next(slices)
                        if busy:
                            self.happen()
                except StopIteration as stop:
                    answer = stop.value[0]
                assert isinstance(answer, Overlay)
                parts += answer.parts
                assert not answer.next_cursor or answer.next_cursor > cursor, "it goes on"
                if not answer.next_cursor:
                    break
                cursor = answer.next_cursor
            if len({part.system_version for part in parts}) == 1:
                return [decode_link(value) for value in parts[0].links], parts
        raise AssertionError("no answer as of one version of the links")


@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_all_that_was_acknowledged_is_told_or_in_a_block_whatever_happens_between_slices(seed: int, busy: bool) -> None:
    group = Group(seed, settings=SMALL)
    bucket = Bucket(group, seed)
    told = 0
    for number in range(14):
        for _ in range(8):
            bucket.write()
        if number % 3 == 1:
            bucket.sink()
        known = {key: {item: versions[-1] for item, versions in items.items()} for key, items in bucket.written.items()}
        wipes = {key: wiped[-1] for key, wiped in bucket.wiped.items()}
        links, parts = bucket.ask(bucket.random.choice([1, 200, 1 << 20]), busy=busy)
        facts: dict[tuple[bytes, bytes], int] = {}
        wiped: dict[bytes, int] = {}
        for part in parts:
            rows = iter(zip(part.keys, unpack_i64(part.versions), strict=True))
            for key, n, version in zip(part.timelines, unpack_u32(part.counts), unpack_i64(part.wiped), strict=True):
                assert not version or version in bucket.wiped[key], "no wipe that there was not"
                wiped[key] = version
                for _ in range(n):
                    item, row_version = next(rows)
                    facts[key, item] = row_version
        told += len(facts)
        opens = {key for part in parts for key in part.opens}
        for (key, item), version in facts.items():
            assert version in bucket.written[key][item], "no row that there was not"
        for key, items in known.items():
            for item, version in items.items():
                link = next(
                    (one for one in links if one.window_start <= split_item_key(item)[0] < one.window_end), None
                )
                read_at = -1 if link is None else link.version_of(timeline_hash(b"t", NAMES[key].encode()))
                if read_at < 0 or version <= read_at or key in opens:
                    continue  # no block has it, or has it in that version or a later one, or it is named as open
                assert facts.get((key, item), 0) >= version or wiped.get(key, 0) >= version, (NAMES[key], item, version)
            reads = [link.version_of(timeline_hash(b"t", NAMES[key].encode())) for link in links]
            if key not in opens and any(0 <= read_at <= wipes[key] for read_at in reads):
                assert wiped.get(key, 0) >= wipes[key], "a wipe of rows that blocks hold"
    assert told > 20


def test_a_link_that_is_chosen_between_two_slices_begins_the_answer_again() -> None:
    """Its rows are evicted by then: told as of the links before, they would be neither in a block nor in the answer."""
    group = Group(2, settings=SMALL)
    bucket = Bucket(group, 2)
    keys = sorted(NAMES)[:50]
    versions = {key: bucket.send(key, PUT, [item_key(1)], [b"a"]) for key in keys}
    first = link_of(0, versions)
    bucket.send(SYSTEM, PUT, [first.key], [encode_link(first)], if_version=0)
    replica = group.replica(FIRST)
    group.run_until(lambda: replica.core.counters.totals.get("rows_evicted") == len(keys))
    late = {key: bucket.send(key, PUT, [item_key(1)], [b"b"], seen=1) for key in keys[40:]}
    slices = replica.slices(question())
    next(slices)
    second = link_of(0, versions | late)
    bucket.send(SYSTEM, PUT, [second.key], [encode_link(second)], if_version=1, seen=1)
    group.run_until(lambda: replica.core.counters.totals.get("rows_evicted") == len(keys) + len(late))
    answer, _ = in_one_slice(slices)
    assert isinstance(answer, Overlay)
    (part,) = answer.parts
    (link,) = map(decode_link, part.links)
    for key, version in late.items():
        in_block = link.version_of(timeline_hash(b"t", NAMES[key].encode())) >= version
        assert in_block or key in part.timelines, NAMES[key]


def test_rows_that_a_link_covers_and_timelines_without_blocks_are_not_told() -> None:
    group = Group(1, settings=SMALL)
    bucket = Bucket(group, 1)
    for key in (ALICE, NEIGHBOURS[0]):
        bucket.versions[key] = bucket.send(key, PUT, [item_key(1), item_key(2)], [b"a", b"b"])
    link = link_of(0, {ALICE: 1})
    bucket.send(SYSTEM, PUT, [link.key], [encode_link(link)], if_version=0)
    (part,) = bucket.ask(1 << 20, busy=False)[1]
    assert part.timelines == [], "the block has alice's rows, and none of her neighbour"
    bucket.send(ALICE, DELETE, [item_key(2)], [b""], seen=1)
    bucket.send(ALICE, PUT, [item_key(WINDOW + 1)], [b"of another window"], seen=2)
    (part,) = bucket.ask(1 << 20, busy=False)[1]
    assert (part.timelines, part.keys, unpack_i64(part.versions)) == ([ALICE], [item_key(2)], [2])


@pytest.mark.parametrize("kind", [PUT, DELETE, WIPE])
def test_an_entry_that_may_have_been_chosen_is_named_where_it_would_hide_something(kind: int) -> None:
    group = Scripted(3, settings=SMALL)
    bucket = Bucket(group, 3)
    bucket.send(ALICE, PUT, [item_key(1)], [b"a"])
    link = link_of(0, {ALICE: 1})
    bucket.send(SYSTEM, PUT, [link.key], [encode_link(link)], if_version=0)
    group.run(0.1)
    group.cut_off(FIRST)
    items = [b""] if kind == WIPE else [item_key(1)]
    message = write_message(ALICE, bytes(15) + b"x", [], seen=1)
    message.kinds, message.counts = bytes((kind,)), pack_u32([1])
    message.keys[:], message.values[:] = items, [b"b" if kind == PUT else b""]
    group.send(FIRST, message)
    group.run(0.05)
    answer, _ = in_one_slice(group.replica(FIRST).slices(question()))
    assert isinstance(answer, Overlay)
    assert (answer.parts[0].opens, unpack_i64(answer.parts[0].open_entries)) == ([ALICE], [2])
    assert answer.parts[0].timelines == [], "what may have been chosen is no fact"


def test_an_open_entry_outside_of_all_windows_is_nobodys_concern() -> None:
    group = Scripted(4, settings=SMALL)
    bucket = Bucket(group, 4)
    bucket.send(ALICE, PUT, [item_key(1)], [b"a"])
    link = link_of(0, {ALICE: 1})
    bucket.send(SYSTEM, PUT, [link.key], [encode_link(link)], if_version=0)
    group.run(0.1)
    group.cut_off(FIRST)
    group.send(FIRST, write_message(ALICE, bytes(15) + b"x", [(WINDOW + 5, b"", b"new")], seen=1))
    group.run(0.05)
    answer, _ = in_one_slice(group.replica(FIRST).slices(question()))
    assert isinstance(answer, Overlay)
    assert answer.parts[0].opens == []


def test_timelines_of_which_nothing_is_hidden_stay_out_of_memory() -> None:
    group = Group(5, settings=Settings(timelines_in_memory=2, log_keep_entries=8, request_id_entries=8))
    bucket = Bucket(group, 5)
    versions = {}
    for key in (ALICE, *NEIGHBOURS):
        versions[key] = bucket.send(key, PUT, [item_key(1)], [b"a"])
    link = link_of(0, versions)
    bucket.send(SYSTEM, PUT, [link.key], [encode_link(link)], if_version=0)
    replica = group.replica(FIRST)
    group.run_until(lambda: replica.core.counters.totals.get("rows_evicted") == len(versions))
    group.run(0.2)
    before = replica.core.in_memory()
    assert before < len(versions)
    (part,) = bucket.ask(1 << 20, busy=False)[1]
    assert part.timelines == [] and replica.core.in_memory() <= before + 1, "the system timeline at the most"


def test_bad_questions_are_refused() -> None:
    group = Group(6, settings=SMALL)
    for buckets in ([], [2, 2], [3, 1], list(range(4_000))):
        with pytest.raises(InvalidRequest, match="buckets"):
            in_one_slice(group.replica(0).slices(AskOverlay(b"t", pack_u32(buckets), b"", 1 << 20)))
