"""Answers over many rows are made in short slices, and are right whatever happens between two of them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from replica_group import Group, key_of, write_message
from storage_cluster import StorageCluster
from timetier.cluster.cold.link import FORMAT, Block, Link, decode_link, encode_link
from timetier.cluster.keys import bucket_of, item_key, priority, split_item_key, system_timeline, timeline_hash
from timetier.cluster.messages import (
    DELETE,
    OK,
    PUT,
    WIPE,
    AskDigests,
    AskVersions,
    Scan,
    Scanned,
    Versions,
    Written,
    pack_i64,
    pack_u32,
    unpack_i64,
    unpack_u32,
)
from timetier.cluster.paxos.core import Settings
from timetier.cluster.paxos.slices import Slices, in_one_slice

SLICE_ROWS = 20
FOREVER = (1 << 62, 1 << 62)
ALICE = key_of("alice")
BUCKET = bucket_of(ALICE)
SYSTEM = system_timeline(BUCKET)
OTHERS = [key for key in (key_of(f"owner-{n}") for n in range(1_000)) if bucket_of(key) == BUCKET][:3]


def rid(number: int) -> bytes:
    return number.to_bytes(16, "big")


def scan_message(cursor: bytes = b"") -> Scan:
    return Scan(BUCKET, b"t", *FOREVER, cursor, 1 << 20)


def count_rows(group: Group, number: int) -> list[int]:
    """A list whose only element counts the rows that a replica's engine gives."""
    engine = group.replica(number).core.engine
    seen = [0]
    original = engine.scan

    def scan(low: bytes, high: bytes, *, reverse: bool = False) -> Iterator[tuple[bytes, bytes]]:
        for row in original(low, high, reverse=reverse):
            seen[0] += 1
            yield row

    engine.scan = scan  # type: ignore[method-assign]
    return seen


def fill(group: Group, rows: int) -> int:
    """Items of one timeline and some of others in its bucket; the replica that has them."""
    first = priority(ALICE, 3)[0]
    for at, start in enumerate(range(0, rows, 50)):
        group.put(first, ALICE, rid(at), [(n, b"", b"v%d" % n) for n in range(start, start + 50)], seen=at)
    for at, key in enumerate(OTHERS):
        group.put(first, key, rid(1_000 + at), [(1, b"", b"other")])
    return first


@pytest.mark.parametrize("question", [scan_message(), AskDigests(BUCKET, b"")], ids=["scan", "digests"])
def test_no_slice_of_a_long_answer_reads_more_than_a_bounded_number_of_rows(question: Scan | AskDigests) -> None:
    group = Group(1, settings=Settings(chore_rows=SLICE_ROWS, request_id_entries=8, log_keep_entries=8))
    first = fill(group, 1_000)
    replica = group.replica(first)
    seen = count_rows(group, first)
    slices: Slices[object] = replica.slices(question)
    largest = steps = 0
    while True:
        before = seen[0]
        try:
            next(slices)
        except StopIteration as stop:
            answer = stop.value
            break
        largest, steps = max(largest, seen[0] - before), steps + 1
    assert steps >= 1_000 // SLICE_ROWS, "each slice ended where it should"
    assert largest <= 2 * SLICE_ROWS + 16, "one slice of rows, some seeks, and the log records of one timeline"
    assert answer == in_one_slice(replica.slices(question)), "the same as without a break"


class Writer:
    """Writes at random to the timelines of one bucket, and knows the rows of each at every version."""

    def __init__(self, group: Group, seed: int) -> None:
        self.group = group
        self.random = random.Random(seed)
        self.number = priority(ALICE, 3)[0]
        self.ids = count(10_000)
        self.links = 0
        self.versions = dict.fromkeys([ALICE, *OTHERS], 0)
        self.rows: dict[bytes, dict[bytes, tuple[int, int, bytes]]] = {key: {} for key in self.versions}
        self.history: dict[tuple[bytes, int], dict[bytes, tuple[int, int, bytes]]] = {}
        self.digests: dict[tuple[bytes, int, int], bytes | None] = {}

    def write(self) -> None:
        key = self.random.choice([ALICE, ALICE, *OTHERS])
        kind = self.random.choices([PUT, DELETE, WIPE], [10, 3, 1])[0]
        seen = self.versions[key]
        stamps = [0] if kind == WIPE else self.random.sample(range(40), self.random.randint(1, 6))
        value = b"%d" % next(self.ids)
        message = write_message(key, rid(next(self.ids)), [(t, b"", value) for t in stamps], seen=seen)
        message.kinds = bytes((kind,)) * len(stamps)
        if kind == WIPE:
            message.keys[:], message.values[:] = [b""], [b""]
        elif kind == DELETE:
            message.values[:] = [b""] * len(stamps)
        answer = self.group.call(self.number, message)
        assert isinstance(answer, Written) and answer.outcomes[0] == OK
        version = unpack_i64(answer.versions)[0]
        rows = {} if kind == WIPE else dict(self.rows[key])
        if kind != WIPE:
            rows.update({item_key(t): (version, kind, b"" if kind == DELETE else value) for t in stamps})
        self.rows[key], self.versions[key] = rows, version
        self.history[key, version] = rows
        self.note_digest(key)

    def note_digest(self, key: bytes) -> None:
        replica = self.group.replica(self.number)
        timeline = replica.core.timeline(key)
        system = replica.core.timeline(SYSTEM).chosen
        self.digests[key, timeline.chosen, system] = replica.digests.of(timeline, timeline.chosen)[0]

    def link(self) -> None:
        """Have alice's items of a window sink: from then on her rows may be evicted."""
        window = (10 * self.links, 10 * self.links + 10)
        owner = np.array([timeline_hash(b"t", b"alice")], dtype="<u8").tobytes()
        block = Block("f", 8, 10, 0, 1, item_key(window[0]), item_key(window[1]), b"alice", b"alice")
        version = self.versions[ALICE]
        link = Link(FORMAT, BUCKET, b"t", *window, 1, *FOREVER, owner, pack_i64([version]), 1, 1, "run", [block])
        message = write_message(SYSTEM, rid(next(self.ids)), [], if_version=self.links, seen=self.links)
        message.kinds, message.counts = bytes((PUT,)), pack_u32([1])
        message.keys.append(link.key)
        message.values.append(encode_link(link))
        answer = self.group.call(self.number, message)
        assert isinstance(answer, Written) and answer.outcomes[0] == OK
        self.links += 1
        for key in self.versions:
            self.note_digest(key)

    def happen(self) -> None:
        """Some of what goes on between two slices."""
        for _ in range(self.random.randint(0, 3)):
            self.write()
        if self.random.random() < 0.05 and self.links < 4:
            self.link()
        self.group.run(self.random.choice([0.0, 0.01]))
        for _ in range(self.random.randint(0, 4)):
            self.group.replica(self.number).run_chores(self.group.now)

    def check(self, answer: Scanned) -> int:
        """Compare a scan with what was written; the number of rows compared."""
        links = [decode_link(value) for value in answer.links]
        assert len(links) == answer.system_version, "links and their version are of one instant"
        start = 0
        versions = unpack_i64(answer.versions)
        counts = unpack_u32(answer.counts)
        for key, version, wiped, n in zip(
            answer.timelines, unpack_i64(answer.timeline_versions), unpack_i64(answer.wiped), counts, strict=True
        ):
            part = range(start, start + n)
            start += n
            found = {
                answer.keys[at]: (versions[at], answer.kinds[at], answer.values[at])
                for at in part
                if versions[at] > wiped
            }
            expected = self.history[key, version]
            assert found.items() <= expected.items(), f"rows that were not there at version {version}"
            for item, row in expected.items():
                assert item in found or (key == ALICE and self.is_covered(links, item, row[0])), (key, version, item)
        return start

    @staticmethod
    def is_covered(links: list[Link], item: bytes, version: int) -> bool:
        timestamp = split_item_key(item)[0]
        return any(
            link.window_start <= timestamp < link.window_end and version <= unpack_i64(link.versions)[0]
            for link in links
        )


@pytest.mark.parametrize("seed", range(12))
def test_a_scan_is_of_one_version_a_timeline_whatever_happens_between_its_slices(seed: int) -> None:
    group = Group(seed, settings=Settings(chore_rows=3, request_id_entries=8, log_keep_entries=8))
    writer = Writer(group, seed)
    for _ in range(20):
        writer.write()
    compared = 0
    for _ in range(12):
        cursor = b""
        while True:
            slices = group.replica(writer.number).slices(scan_message(cursor))
            try:
                while True:
                    next(slices)
                    writer.happen()
            except StopIteration as stop:
                answer = stop.value[0]
            compared += writer.check(answer)
            if answer.next_bucket != BUCKET:
                break
            assert answer.next_cursor > cursor, "it goes on"
            cursor = answer.next_cursor
    assert compared > 50
    assert writer.links, "rows were evicted meanwhile"


@pytest.mark.parametrize("seed", range(12))
def test_a_digest_is_that_of_its_version_whatever_happens_between_its_slices(seed: int) -> None:
    group = Group(seed, settings=Settings(chore_rows=3, request_id_entries=8, log_keep_entries=8))
    writer = Writer(group, seed)
    for _ in range(20):
        writer.write()
    compared = 0
    for _ in range(12):
        slices = group.replica(writer.number).slices(AskDigests(BUCKET, b""))
        try:
            while True:
                next(slices)
                writer.happen()
        except StopIteration as stop:
            answer = stop.value[0]
        versions, systems = unpack_i64(answer.versions), unpack_i64(answer.systems)
        for at, key in enumerate(answer.timelines):
            if key in writer.versions and versions[at] >= 0:
                digest = answer.digests[16 * at : 16 * at + 16]
                assert digest == writer.digests[key, versions[at], systems[at]], (key, versions[at])
                compared += 1
    assert compared >= 12


def test_a_storage_node_answers_others_between_the_slices_of_a_long_scan(tmp_path: Path) -> None:
    async def body() -> None:
        async with StorageCluster(tmp_path) as cluster:
            for at in range(8):
                items = [(item_key(n), bytes(20)) for n in range(1_000 * at, 1_000 * at + 1_000)]
                outcome, _ = await cluster.put(0, ALICE, rid(at), items, seen=at)
                assert outcome == OK
            node = cluster.services[0].name
            scan = asyncio.create_task(cluster.client.call(node, scan_message(), 30))
            answered = 0
            while not scan.done():
                versions = await cluster.client.call(node, AskVersions([ALICE]), 30)
                assert isinstance(versions, Versions) and unpack_i64(versions.chosen) == [8]
                answered += not scan.done()
            found = await scan
            assert isinstance(found, Scanned)
            assert len(found.keys) == 8_000, "all rows of one timeline in one answer"
            assert answered >= 8, "who asks small things meanwhile does not wait for the whole scan"

    asyncio.run(asyncio.wait_for(body(), 60))
