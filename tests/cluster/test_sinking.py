"""The sink's decisions, against a model: whatever is sunk and evicted, and wherever, readers find the same."""

from __future__ import annotations

import copy
import itertools
from random import Random, SystemRandom
from typing import Any

import pytest
from cold_model import POLICY, TABLE, Stored, eligible, evict_timeline, visible
from hypothesis import given, settings
from hypothesis import strategies as st
from timetier.cluster.cold import sinking
from timetier.cluster.cold.block import DecodedBlock, FileBuilder, decode_block, verify
from timetier.cluster.cold.link import Block, Link, decode_link, encode_link
from timetier.cluster.cold.merging import merge_window
from timetier.cluster.cold.sinking import (
    CutOffs,
    Timeline,
    chosen_cut_offs,
    expired_links,
    make_link,
    next_horizon,
    split_stale,
    standing_cut_offs,
    timelines_of,
    windows_of,
)
from timetier.cluster.errors import ProtocolError
from timetier.cluster.keys import MAX_TIMESTAMP, MIN_TIMESTAMP, item_key, split_item_key, timeline_hash, timeline_key
from timetier.cluster.messages import DELETE, PUT, WIPE, Scanned, pack_i64, pack_u32
from timetier.cluster.topology import TablePolicy

OWNERS = [b"a", b"b"]
# One bucket, whatever the owners hash to.
KEYS = {owner: timeline_key(TABLE, owner, 1) for owner in OWNERS}


def timeline(owner: bytes, stored: Stored, cut_offs: CutOffs) -> Timeline:
    """What a scan of this replica brings."""
    rows = eligible(stored, *cut_offs)
    return Timeline(
        KEYS[owner],
        owner,
        stored.version,
        stored.wiped,
        bytes(row[1] for row in rows.values()),
        list(rows),
        [row[2] for row in rows.values()],
        [row[0] for row in rows.values()],
        [row[3] for row in rows.values()],
    )


class World:
    """One bucket: logs, three replicas that apply and evict when they like, links and files."""

    def __init__(self) -> None:
        self.logs: dict[bytes, list[tuple[int, bytes, bytes, int]]] = {owner: [] for owner in OWNERS}
        self.replicas = [{owner: Stored() for owner in OWNERS} for _ in range(3)]
        self.links: dict[bytes, Link] = {}
        self.files: dict[str, bytes] = {}
        self.horizon = MIN_TIMESTAMP

    def write(self, owner: bytes, kind: int, timestamp: int, written: int) -> None:
        log = self.logs[owner]
        log.append((kind, item_key(timestamp), b"%d" % len(log) if kind == PUT else b"", written))

    def write_to(self, replicas: tuple[int, ...], owner: bytes, kind: int, timestamp: int, written: int) -> None:
        """Write, and have these replicas learn of it at once."""
        self.write(owner, kind, timestamp, written)
        for replica in replicas:
            self.apply(replica, owner)

    def apply(self, replica: int, owner: bytes, count: int = 1 << 30) -> None:
        stored = self.replicas[replica][owner]
        for kind, key, value, written in self.logs[owner][stored.version :][:count]:
            stored.apply(bytes((kind,)), [key], [value], written)

    def evict(self, replica: int) -> None:
        for owner in OWNERS:
            evict_timeline(self.replicas[replica][owner], KEYS[owner], self.links.values())

    def read(self, block: Block) -> DecodedBlock:
        data = self.files[block.file][block.offset : block.offset + block.length]
        verify(data, block.crc)
        return decode_block(data)

    def sink(self, replica: int, cut_offs: CutOffs, skipped: set[bytes], window: int, horizon: int) -> None:
        """A run through this replica, which may be behind, that finds no snapshot of the `skipped` owners."""
        self.horizon = max(self.horizon, horizon)
        links = list(self.links.values())
        scanned = [timeline(o, self.replicas[replica][o], cut_offs) for o in OWNERS if o not in skipped]
        usable, stale = split_stale([one for one in scanned if one.keys], links)
        builder = FileBuilder(f"f{len(self.files)}", table=TABLE, per_second=1, cold_group=0, run=str(len(self.files)))
        wiped = {one.owner: one.wiped for one in usable}
        for old in expired_links(links, self.horizon):
            del self.links[old.key]
        for plan in windows_of(usable, links, window, self.horizon):
            old_rows = [self.read(block).all_rows() for block in plan.old.blocks] if plan.old else []
            rows = merge_window(plan, old_rows, wiped, self.horizon)
            blocks = builder.add(
                rows,
                bucket=0,
                window_start=plan.start,
                window_end=plan.end,
                generation=plan.generation,
                block_rows=3,
            )
            link = make_link(plan, bucket=0, table=TABLE, cut_offs=cut_offs, run="r", rows=rows, blocks=blocks)
            self.links[link.key] = decode_link(encode_link(link))
        self.files[builder.file] = builder.finish()
        if not stale and not skipped:
            self.check_that_nothing_eligible_is_left(replica, cut_offs)

    def check_that_nothing_eligible_is_left(self, replica: int, cut_offs: CutOffs) -> None:
        replicas = copy.deepcopy(self.replicas[replica])
        for owner in OWNERS:
            evict_timeline(replicas[owner], KEYS[owner], self.links.values())
            left = {split_item_key(key)[0] for key in eligible(replicas[owner], *cut_offs)}
            assert all(timestamp < self.horizon for timestamp in left), left

    def check(self) -> None:
        spans = sorted((link.window_start, link.window_end) for link in self.links.values())
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans)), spans
        blocks: dict[tuple[str, int], DecodedBlock] = {}

        def read(block: Block) -> DecodedBlock:
            place = (block.file, block.offset)
            if place not in blocks:
                blocks[place] = self.read(block)
            return blocks[place]

        for owner, log in self.logs.items():
            expected: dict[bytes, tuple[int, bytes]] = {}
            for version, (kind, key, value, _) in enumerate(log, 1):
                if kind == WIPE:
                    expected.clear()
                elif kind == DELETE:
                    expected.pop(key, None)
                else:
                    expected[key] = (version, value)
            expected = {k: v for k, v in sorted(expected.items()) if split_item_key(k)[0] >= self.horizon}
            for number, replica in enumerate(self.replicas):
                caught_up = copy.deepcopy(replica[owner])
                for kind, key, value, written in log[caught_up.version :]:
                    caught_up.apply(bytes((kind,)), [key], [value], written)
                for _ in range(2):  # before and after this replica evicts what the present links cover
                    found = visible(caught_up, KEYS[owner], self.links.values(), read, self.horizon)
                    assert found == expected, (owner, number)
                    evict_timeline(caught_up, KEYS[owner], self.links.values())


owner_of = st.sampled_from(OWNERS)
some_replicas = st.sampled_from([(0, 1, 2), (0, 1, 2), (0, 1), (2,), ()])
writes = st.tuples(
    st.just("write_to"),
    some_replicas,
    owner_of,
    st.sampled_from([PUT, PUT, PUT, DELETE, DELETE, WIPE]),
    st.integers(-2, 3),
    st.integers(0, 4),
)
sinks = st.tuples(
    st.just("sink"),
    st.integers(0, 2),
    st.builds(CutOffs, st.sampled_from([-1, 1, 2, 9, 9]), st.sampled_from([1, 3, 9, 9])),
    st.sets(owner_of, max_size=1),
    st.sampled_from([2, 3, 100]),
    st.sampled_from([MIN_TIMESTAMP] * 8 + [-1, 0]),
)
others = st.one_of(
    st.tuples(st.just("apply"), st.integers(0, 2), owner_of, st.integers(1, 4)),
    st.tuples(st.just("evict"), st.integers(0, 2)),
)
steps = st.lists(st.one_of(writes, writes, sinks, others), min_size=8, max_size=30)


def play(script: list[tuple[Any, ...]]) -> World:
    world = World()
    for name, *arguments in script:
        getattr(world, name)(*arguments)
        if name == "sink":
            world.check()
    world.check()
    return world


@pytest.mark.parametrize("max_carried", [1, 8])
def test_whatever_is_sunk_and_evicted_anywhere_readers_find_the_same(max_carried: int) -> None:
    @settings(max_examples=400, deadline=None)
    @given(steps)
    def holds(script: list[tuple[Any, ...]]) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sinking, "MAX_CARRIED", max_carried)
            play(script)

    holds()


def random_script(rng: Random) -> list[tuple[Any, ...]]:
    """Many late writes into few windows, cut-offs that go up and down, and owners that a run finds no snapshot of."""
    script: list[tuple[Any, ...]] = []
    for _ in range(30):
        kind = rng.choice([PUT, PUT, PUT, PUT, DELETE])
        replicas = rng.choice([(0, 1, 2), (0, 1), (1, 2)])
        script.append(("write_to", replicas, rng.choice(OWNERS), kind, rng.randint(0, 3), rng.randint(0, 3)))
        if rng.random() < 0.3:
            script += [("apply", 0, owner, 9) for owner in OWNERS]
        if rng.random() < 0.4:
            cut_offs = CutOffs(rng.randint(1, 4), rng.randint(1, 4))
            skipped = {rng.choice(OWNERS)} if rng.random() < 0.5 else set()
            script.append(("sink", 0, cut_offs, skipped, 100, MIN_TIMESTAMP))
        if rng.random() < 0.3:
            script.append(("evict", rng.randrange(3)))
    return script


@pytest.mark.parametrize("max_carried", [1, 8])
def test_many_generations_with_cut_offs_that_rise_and_fall_lose_nothing(
    max_carried: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinking, "MAX_CARRIED", max_carried)
    seed = SystemRandom().randrange(1 << 32)
    for number in range(seed, seed + 60):
        print("seed", number)
        play(random_script(Random(number)))


ALL = CutOffs(100, 100)


def test_a_row_that_was_too_young_for_an_earlier_run_is_not_evicted_by_a_run_that_did_not_read_it() -> None:
    world = play(
        [
            ("write", b"a", PUT, 1, 1),
            ("write", b"a", PUT, 8, 1),
            ("write", b"b", PUT, 1, 1),
            ("apply", 0, b"a"),
            ("apply", 0, b"b"),
            ("sink", 0, CutOffs(5, 100), set(), 100, MIN_TIMESTAMP),
            ("write", b"b", PUT, 2, 1),
            ("apply", 0, b"b"),
            ("sink", 0, ALL, {b"a"}, 100, MIN_TIMESTAMP),
            ("evict", 0),
        ]
    )
    assert item_key(8) in world.replicas[0][b"a"].rows
    (link,) = world.links.values()
    assert link.version_of(timeline_hash(TABLE, b"a")) == 0
    assert [rule.event_before for rule in link.rules_of(timeline_hash(TABLE, b"a"))] == [5]


def test_a_replica_that_missed_the_first_generation_evicts_its_rows_with_the_second() -> None:
    world = play(
        [
            ("write", b"a", PUT, 1, 1),
            ("write", b"b", PUT, 1, 1),
            *[("apply", replica, owner) for replica in range(3) for owner in (b"a", b"b")],
            ("sink", 0, CutOffs(5, 5), set(), 100, MIN_TIMESTAMP),
            ("evict", 0),
            ("write", b"b", PUT, 2, 7),
            ("apply", 0, b"b"),
            ("sink", 0, ALL, set(), 100, MIN_TIMESTAMP),
            ("evict", 2),
        ]
    )
    assert not world.replicas[2][b"a"].rows


def test_a_stale_replica_does_not_bring_a_deleted_item_back() -> None:
    world = play(
        [
            ("write", b"a", PUT, 1, 1),
            ("apply", 1, b"a"),
            ("write", b"a", DELETE, 1, 2),
            ("apply", 0, b"a"),
            ("sink", 0, ALL, set(), 100, MIN_TIMESTAMP),
            ("evict", 0),
            ("sink", 1, ALL, set(), 100, MIN_TIMESTAMP),
        ]
    )
    assert [link.generation for link in world.links.values()] == [1]


def test_a_late_write_wins_over_the_block_and_is_merged_by_the_next_run() -> None:
    world = play(
        [
            ("write", b"a", PUT, 1, 1),
            ("apply", 0, b"a"),
            ("sink", 0, ALL, set(), 100, MIN_TIMESTAMP),
            ("evict", 0),
            ("write", b"a", PUT, 1, 2),
            ("apply", 0, b"a"),
            ("sink", 0, ALL, set(), 100, MIN_TIMESTAMP),
            ("evict", 0),
        ]
    )
    (link,) = world.links.values()
    assert (link.generation, link.rows) == (2, 1)
    assert not world.replicas[0][b"a"].rows
    assert world.read(link.blocks[0]).rows_of(b"a") == ([item_key(1)], [b"1"], [2], [2])


def test_windows_without_eligible_rows_are_left_alone() -> None:
    world = World()
    world.write(b"a", PUT, 1, 1)
    world.write(b"a", PUT, 9, 1)
    world.apply(0, b"a")
    world.sink(0, ALL, set(), 5, MIN_TIMESTAMP)
    before = dict(world.links)
    world.evict(0)
    world.write(b"a", PUT, 8, 1)
    world.apply(0, b"a")
    world.sink(0, ALL, set(), 5, MIN_TIMESTAMP)
    assert {link.window_start: link.generation for link in world.links.values()} == {0: 1, 5: 2}
    assert [link for key, link in world.links.items() if before[key] == link] == [before[item_key(0, TABLE)]]


@pytest.mark.parametrize(
    ("timestamp", "window", "expected"),
    [
        (-1, 10, (-10, 0)),
        (-10, 10, (-10, 0)),
        (0, 10, (0, 10)),
        (MAX_TIMESTAMP - 1, 10, (MAX_TIMESTAMP // 10 * 10, MAX_TIMESTAMP)),
        (MIN_TIMESTAMP + 1, 10, (MIN_TIMESTAMP + 1, (MIN_TIMESTAMP + 1) // 10 * 10 + 10)),
    ],
)
def test_a_window_is_the_floor_of_the_timestamp_also_below_zero_and_at_the_ends(
    timestamp: int, window: int, expected: tuple[int, int]
) -> None:
    world = World()
    world.write(b"a", PUT, timestamp, 1)
    world.apply(0, b"a")
    world.sink(0, CutOffs(MAX_TIMESTAMP, 100), set(), window, MIN_TIMESTAMP)
    (link,) = world.links.values()
    assert (link.window_start, link.window_end) == expected
    world.evict(0)
    world.check()
    assert not world.replicas[0][b"a"].rows


def test_the_first_and_last_instant_stay_in_the_storage_tier() -> None:
    owner = Stored()
    for instant in (MIN_TIMESTAMP, MAX_TIMESTAMP):
        owner.apply(bytes((PUT,)), [item_key(instant)], [b"x"], 0)
    one = timeline(b"a", owner, CutOffs(MAX_TIMESTAMP + 1, 1))
    assert len(one.keys) == 2
    assert windows_of([one], [], 10, MIN_TIMESTAMP) == []


def test_cut_offs_follow_the_younger_of_event_and_write_time_unless_told_otherwise() -> None:
    policy = TablePolicy(per_second=1_000, cold_after=5_000, window=1)
    assert standing_cut_offs(policy, 60_000_000) == CutOffs(55_000, 55_000_000)
    assert chosen_cut_offs(policy, 60_000_000, before=None, by_event_time=True) == CutOffs(55_000, MAX_TIMESTAMP)
    assert chosen_cut_offs(policy, 60_000_000, before=7_000, by_event_time=True) == CutOffs(7_000, MAX_TIMESTAMP)
    assert chosen_cut_offs(policy, 60_000_000, before=7_000, by_event_time=False) == CutOffs(7_000, 7_000_000)


def test_the_horizon_grows_in_steps_and_never_shrinks() -> None:
    policy = TablePolicy(per_second=1, cold_after=1, window=5, retention=500)
    assert next_horizon(MIN_TIMESTAMP, policy, 1_000_000_000) == 500
    assert next_horizon(496, policy, 1_000_000_000) == 496
    assert next_horizon(495, policy, 1_000_000_000) == 500
    fine = TablePolicy(per_second=1, cold_after=1, window=50, retention=300)
    assert (next_horizon(697, fine, 1_000_000_000), next_horizon(698, fine, 1_000_000_000)) == (700, 698), "by a 100th"
    assert next_horizon(2_000, policy, 1_000_000_000) == 2_000
    assert next_horizon(3, POLICY, 1_000_000_000) == 3


def test_an_answer_that_is_not_what_was_asked_for_is_refused() -> None:
    def scanned(**changes: Any) -> Scanned:
        fields: dict[str, Any] = {
            "scanned_bucket": 0,
            "timelines": [KEYS[b"a"]],
            "timeline_versions": pack_i64([3]),
            "wiped": pack_i64([0]),
            "counts": pack_u32([2]),
            "kinds": bytes(2),
            "keys": [item_key(1), item_key(2)],
            "values": [b"", b""],
            "versions": pack_i64([1, 2]),
            "written": pack_i64([1, 1]),
            "links": [],
            "system_version": 0,
            "horizon": 0,
            "next_bucket": -1,
            "next_cursor": b"",
        }
        return Scanned(**{**fields, **changes})

    assert len(timelines_of(scanned(), TABLE, CutOffs(3, 2))) == 1
    wrong: list[tuple[Scanned, CutOffs]] = [
        (scanned(), CutOffs(2, 2)),
        (scanned(), CutOffs(3, 1)),
        (scanned(keys=[item_key(2), item_key(1)]), ALL),
        (scanned(keys=[item_key(1), item_key(1)]), ALL),
        (scanned(values=[b""]), ALL),
        (scanned(counts=pack_u32([1])), ALL),
        (scanned(wiped=b""), ALL),
        (scanned(scanned_bucket=1), ALL),
        (scanned(timelines=[timeline_key(b"other", b"a", 1)]), ALL),
    ]
    for answer, cut_offs in wrong:
        with pytest.raises(ProtocolError):
            timelines_of(answer, TABLE, cut_offs)
