"""Routing finds the owner that the static map names, and spreads load evenly over equals."""

from __future__ import annotations

from collections import Counter
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from timetier.cluster.cold.link import cold_order
from timetier.cluster.errors import InvalidRequest
from timetier.cluster.keys import bucket_of, priority, system_timeline, timeline_key
from timetier.cluster.routing import Routing
from timetier.cluster.static_map import StaticMap
from timetier.cluster.static_map.build import build
from timetier.cluster.topology import TablePolicy, Topology

POLICY = TablePolicy(per_second=1_000_000, cold_after=10, window=5)


def topology(
    *,
    buckets: int = 131_072,
    storage_groups: int = 7,
    storage_replicas: int = 3,
    cold_groups: int = 3,
    cold_replicas: int = 3,
    cache_nodes: int = 2,
    tables: dict[str, TablePolicy] | None = None,
    default_table: TablePolicy | None = None,
    map_checksum: str = "",
    static_map: bytes = b"",
) -> Topology:
    return Topology(
        map_checksum=map_checksum,
        static_map=static_map,
        cluster_id="c",
        namespace="n",
        epoch=1,
        buckets=buckets,
        storage_groups=storage_groups,
        storage_replicas=storage_replicas,
        cold_groups=cold_groups,
        cold_replicas=cold_replicas,
        cold_disks=2,
        cache_nodes=cache_nodes,
        tables={"moments": POLICY} if tables is None else tables,
        default_table=default_table,
        addresses={},
        secret="00",
    )


def timelines(count: int, buckets: int = 131_072) -> list[bytes]:
    return [timeline_key(b"moments", f"owner {number}".encode(), buckets) for number in range(count)]


def assert_even(counts: Counter[Any], parts: int) -> None:
    """Each part has its share, within six standard deviations (a few per cent at the numbers used here)."""
    total = sum(counts.values())
    share = total / parts
    assert len(counts) == parts
    for part, count in counts.items():
        assert abs(count - share) < 6 * share**0.5, (part, count, share)
        assert abs(count - share) < 0.05 * share, (part, count, share)


@pytest.mark.parametrize("storage_groups", [1, 2, 7, 1_000])
def test_every_bucket_goes_to_the_group_that_the_static_map_names_in_each_tier(storage_groups: int) -> None:
    routing = Routing(topology(storage_groups=storage_groups, cold_groups=5))
    static = StaticMap.load(131_072)
    owners = static.owners(storage_groups).tolist()
    assert [routing.storage_group_of(bucket) for bucket in range(131_072)] == owners
    assert routing.storage_groups([system_timeline(bucket) for bucket in range(131_072)]) == owners
    cold = [routing.cold_group_of(bucket) for bucket in range(131_072)]
    assert cold == static.owners(5).tolist()
    assert type(cold[0]) is int


def test_the_groups_buckets_are_all_buckets_once() -> None:
    routing = Routing(topology())
    for owned, owner, groups in (
        (routing.buckets_of_storage_group, routing.storage_group_of, 7),
        (routing.buckets_of_cold_group, routing.cold_group_of, 3),
    ):
        parts = [owned(group) for group in range(groups)]
        assert sorted(np.concatenate(parts).tolist()) == list(range(131_072))
        for group, part in enumerate(parts):
            assert part.dtype == np.uint32
            assert {owner(bucket) for bucket in part.tolist()} == {group}


@pytest.mark.parametrize("size", [0, 1, 8, 9, 500])
def test_batches_of_any_size_are_routed_like_single_timelines(size: int) -> None:
    routing = Routing(topology())
    keys = timelines(size)
    groups = routing.storage_groups(keys)
    assert groups == [routing.storage_group_of(bucket_of(key)) for key in keys]
    assert all(type(group) is int for group in groups)


@pytest.mark.parametrize("size", [1, 20])
@pytest.mark.parametrize("wrong", [b"", b"abc", system_timeline(1_024), b"\xff\xff\xff\xff\x00\x00"])
def test_a_key_that_names_no_bucket_of_this_cluster_is_refused_alone_and_in_a_batch(wrong: bytes, size: int) -> None:
    routing = Routing(topology(buckets=1_024))
    keys = [*timelines(size - 1, 1_024), wrong]
    with pytest.raises(InvalidRequest, match=r"timeline key|bucket="):
        routing.storage_groups(keys)
    for order in (routing.storage_order, routing.cache_order):
        with pytest.raises(InvalidRequest, match=r"timeline key|bucket="):
            order(wrong)


def test_two_short_keys_that_add_up_to_one_are_refused() -> None:
    routing = Routing(topology(buckets=1_024))
    with pytest.raises(InvalidRequest, match="no timeline key"):
        routing.storage_groups([b"\x00\x00", b"\x00\x00"] * 10)
    with pytest.raises(InvalidRequest, match="no timeline key"):
        routing.storage_groups([b"\x00\x00\x00"] * 12)


def test_numbers_outside_the_cluster_are_refused() -> None:
    routing = Routing(topology(buckets=1_024))
    for bucket in (-1, 1_024):
        for ask in (routing.storage_group_of, routing.cold_group_of, lambda b: routing.cold_order(b, 0)):
            with pytest.raises(InvalidRequest, match="buckets 0 to 1023"):
                ask(bucket)
    for group in (-1, 7):
        for ask_group in (routing.storage_nodes, routing.buckets_of_storage_group):
            with pytest.raises(InvalidRequest, match="storage groups 0 to 6"):
                ask_group(group)
    with pytest.raises(InvalidRequest, match="cold groups 0 to 2"):
        routing.buckets_of_cold_group(3)


def test_a_topology_that_cannot_be_routed_is_refused() -> None:
    for wrong in (
        topology(buckets=1_000),
        topology(buckets=1_024, storage_groups=21),
        topology(buckets=1_024, cold_groups=0),
        topology(storage_replicas=2),
        topology(cold_replicas=4),
        topology(cache_nodes=-1),
    ):
        with pytest.raises(InvalidRequest, match=r"pass|can be shared by"):
            Routing(wrong)


def test_a_cluster_keeps_the_map_that_it_was_created_with() -> None:
    kept = StaticMap.load(1_024)
    own = Routing(topology(buckets=1_024, map_checksum=kept.checksum, static_map=kept.to_bytes()))
    usual = Routing(topology(buckets=1_024))
    keys = timelines(100, 1_024)
    assert own.storage_groups(keys) == usual.storage_groups(keys)
    with pytest.raises(InvalidRequest, match="512 buckets for a cluster of 1024"):
        Routing(topology(buckets=1_024, static_map=build(512).to_bytes()))
    with pytest.raises(InvalidRequest, match="install the version that the cluster was created with"):
        Routing(topology(buckets=1_024, map_checksum="0" * 32))


# ---------------------------------------------------------------- replicas


@pytest.mark.parametrize("replicas", [1, 3])
def test_every_order_of_the_replicas_is_equally_frequent(replicas: int) -> None:
    counts = Counter(priority(key, replicas) for key in timelines(120_000))
    assert set(counts) == set(permutations(range(replicas)))
    assert_even(counts, len(counts))


def test_each_of_five_replicas_is_at_each_place_for_a_fifth() -> None:
    orders = [priority(key, 5) for key in timelines(60_000)]
    for place in range(5):
        assert_even(Counter(order[place] for order in orders), 5)


def test_priorities_are_even_within_one_bucket_too() -> None:
    # Buckets come from the timeline's hash as well: an order that depended on the same bits would be one for all.
    counts = Counter(priority(key, 3)[0] for key in timelines(200_000, 16) if bucket_of(key) == 5)
    assert_even(counts, 3)


@pytest.mark.parametrize("dead", [0, 1, 2])
def test_a_dead_replicas_load_falls_evenly_on_the_other_two(dead: int) -> None:
    routing = Routing(topology(storage_groups=1))
    gone = f"storage-0-{dead}"
    first_alive: Counter[str] = Counter()
    inherited: Counter[str] = Counter()
    for key in timelines(60_000):
        order = routing.storage_order(key)
        alive = [name for name in order if name != gone]
        first_alive[alive[0]] += 1
        if order[0] == gone:
            inherited[alive[0]] += 1
    assert_even(first_alive, 2)
    assert_even(inherited, 2)


def test_storage_order_is_the_priority_of_the_timeline_among_its_groups_replicas() -> None:
    routing = Routing(topology())
    for key in [*timelines(500), *map(system_timeline, range(100))]:
        names = routing.storage_nodes(routing.storage_group_of(bucket_of(key)))
        assert routing.storage_order(key) == [names[replica] for replica in priority(key, 3)]
    assert routing.storage_nodes(6) == ["storage-6-0", "storage-6-1", "storage-6-2"]


@pytest.mark.parametrize("groups", [1, 7])
def test_the_first_nodes_of_many_timelines_are_those_of_each(groups: int) -> None:
    routing = Routing(topology(storage_groups=groups))
    keys = timelines(500)
    assert routing.first_storage_nodes(keys) == [routing.storage_order(key)[0] for key in keys]
    assert routing.first_storage_nodes([]) == []


def test_cold_order_is_the_links_order_among_the_nodes_of_the_buckets_cold_group() -> None:
    routing = Routing(topology())
    firsts: Counter[str] = Counter()
    for bucket in range(0, 131_072, 7):
        for window_start in (-(1 << 63), -60, 0, 60):
            group = routing.cold_group_of(bucket)
            order = routing.cold_order(bucket, window_start)
            assert order == [f"cold-{group}-{replica}" for replica in cold_order(bucket, window_start, 3)]
            firsts[order[0][-1]] += 1
    assert_even(firsts, 3)


# ---------------------------------------------------------------- cache nodes


@pytest.mark.parametrize("nodes", [1, 2, 3, 4])
def test_each_cache_node_of_a_group_is_first_for_an_equal_share(nodes: int) -> None:
    routing = Routing(topology(storage_groups=1, cache_nodes=nodes))
    counts: Counter[Any] = Counter(routing.cache_order(key)[0] for key in timelines(60_000))
    assert sum(counts.values()) == 60_000
    assert set(counts) == {f"cache-0-{number}" for number in range(nodes)}
    for count in counts.values():
        assert abs(count - 60_000 / nodes) < 0.06 * 60_000 / nodes


def test_cache_order_names_every_cache_node_of_the_timelines_group_once() -> None:
    routing = Routing(topology(cache_nodes=3))
    for key in timelines(500):
        group = routing.storage_group_of(bucket_of(key))
        assert sorted(routing.cache_order(key)) == [f"cache-{group}-{number}" for number in range(3)]
    assert Routing(topology(cache_nodes=0)).cache_order(timelines(1)[0]) == []


@pytest.mark.parametrize("few", [1, 2, 3, 6])
def test_adding_or_removing_a_cache_node_moves_only_the_timelines_that_it_serves(few: int) -> None:
    smaller = Routing(topology(storage_groups=2, cache_nodes=few))
    larger = Routing(topology(storage_groups=2, cache_nodes=few + 1))
    keys = timelines(20_000)
    moved = 0
    for key in keys:
        before, after = smaller.cache_order(key), larger.cache_order(key)
        added = f"cache-{smaller.storage_group_of(bucket_of(key))}-{few}"
        assert [name for name in after if name != added] == before
        moved += after[0] == added
    assert abs(moved - len(keys) / (few + 1)) < 0.08 * len(keys) / (few + 1)


def test_callers_may_change_the_lists_that_they_get() -> None:
    routing = Routing(topology(cache_nodes=1))
    key = timelines(1)[0]
    for ask in (routing.cache_order, routing.storage_order, lambda _: routing.storage_nodes(0)):
        answer = ask(key)
        expected = list(answer)
        answer.clear()
        assert ask(key) == expected


# ---------------------------------------------------------------- tables


def test_an_unknown_table_is_refused_with_the_list_of_the_known_ones() -> None:
    other = TablePolicy(per_second=1, cold_after=1, window=1)
    routing = Routing(topology(tables={"moments": POLICY, "commits": other}))
    assert routing.policy("commits") is other
    with pytest.raises(InvalidRequest, match=r"'comits'.*commits, moments"):
        routing.policy("comits")
    with pytest.raises(InvalidRequest, match="known tables: none"):
        Routing(topology(tables={})).policy("moments")


def test_a_default_policy_serves_tables_that_are_not_listed() -> None:
    default = TablePolicy(per_second=1, cold_after=1, window=1)
    routing = Routing(topology(default_table=default))
    assert routing.policy("anything") is default
    assert routing.policy("moments") is POLICY
