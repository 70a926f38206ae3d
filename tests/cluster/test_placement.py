"""Placement: replicas apart, load even over zones and machines, and nobody is moved away from the data."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
from timetier.cluster.config import ColdConfig, Config, StorageConfig, ZonesConfig
from timetier.cluster.errors import ConfigError
from timetier.cluster.placement import NodePlace, how_to_start, machines_of, place_nodes, selector

ABC = ["a", "b", "c"]


def zones_of(names: list[str], **options: Any) -> ZonesConfig:
    return ZonesConfig(names=names, **options)


def node_names(groups: int, caches: int = 1) -> list[str]:
    config = Config(
        buckets=4_096,
        storage=StorageConfig(groups=groups),
        cold=ColdConfig(groups=groups),
        cache=Config().cache.model_copy(update={"nodes": caches}),
    )
    return config.topology(cluster_id="c", namespace="n", epoch=1, addresses={}, secret="").node_names()


def one_machine_each(names: list[str]) -> list[NodePlace]:
    return [NodePlace(name) for name in names]


@pytest.mark.parametrize(("zone_count", "groups"), [(3, 1), (3, 6), (4, 8), (5, 5), (7, 21)])
def test_replicas_of_a_group_are_in_different_zones_and_each_zone_has_its_share(zone_count: int, groups: int) -> None:
    names = [f"z{number}" for number in range(zone_count)]
    places = place_nodes(zones_of(names), node_names(groups, caches=2), one_machine_each(names), {})
    for tier, group in itertools.product(("storage", "cold"), range(groups)):
        assert len({places[f"{tier}-{group}-{replica}"].zone for replica in range(3)}) == 3
    for tier in ("storage", "cold", "cache"):
        counts = Counter(place.zone for node, place in places.items() if node.startswith(tier))
        if groups % zone_count == 0:
            assert len(set(counts.values())) == 1, (tier, counts)
            firsts = Counter(places[f"{tier}-{group}-0"].zone for group in range(groups))
            assert len(set(firsts.values())) == 1, "each replica number must be spread, too"


def test_a_single_machine_of_a_zone_needs_no_label_of_its_own() -> None:
    places = place_nodes(zones_of(ABC), node_names(1), one_machine_each(ABC), {})
    assert places["storage-0-1"] == NodePlace("b")
    assert selector(zones_of(ABC), places["storage-0-1"]) == {"zone": "b"}


def test_nodes_are_spread_over_the_machines_of_a_zone() -> None:
    zones = zones_of(ABC, host_label="host")
    machines = [NodePlace(zone, f"{zone}{number}") for zone in ABC for number in (1, 2)]
    places = place_nodes(zones, node_names(4), machines, {})
    for tier in ("storage", "cold"):
        counts = Counter(place.host for node, place in places.items() if node.startswith(tier))
        assert counts == {machine.host: 2 for machine in machines}, tier
    assert all(place.host == "" for node, place in places.items() if node.startswith("cache"))
    assert selector(zones, places["storage-0-0"]) == {"zone": "a", "host": "a1"}


def test_a_node_with_a_place_keeps_it_whatever_there_is_today() -> None:
    zones = zones_of(ABC, host_label="host")
    before = place_nodes(zones, node_names(2), [NodePlace(zone, f"{zone}1") for zone in ABC], {})
    assert place_nodes(zones, node_names(2), [], before) == before, "all zones are away: nothing moves"
    machines = [NodePlace(zone, f"{zone}{number}") for zone in ABC for number in range(4)]
    after = place_nodes(zones_of(["c", "a", "b", "d"], host_label="host"), node_names(2), machines, before)
    assert after == before
    grown = place_nodes(zones, node_names(3), machines, before)
    assert {node: grown[node] for node in before} == before
    assert {grown[f"storage-2-{replica}"].host for replica in range(3)} & {"a1", "b1", "c1"} == set()


def test_a_zone_without_a_machine_is_named_with_the_command_that_mends_it() -> None:
    with pytest.raises(ConfigError) as caught:
        place_nodes(zones_of(ABC), node_names(1), one_machine_each(["a", "c"]), {})
    assert "storage-0-1 belongs in zone 'b'" in caught.value.message
    assert "(alive: a, c)" in caught.value.message
    assert "ray start --address=HEAD:PORT --labels zone=b" in caught.value.message
    with pytest.raises(ConfigError, match="--labels zone=a,rack=NAME"):
        place_nodes(zones_of(ABC, host_label="rack"), node_names(1), [], {})


def test_only_zones_that_are_needed_must_be_there() -> None:
    names = [*ABC, "d"]
    places = place_nodes(zones_of(names), node_names(1), one_machine_each(ABC), {})
    assert {place.zone for place in places.values()} == set(ABC)
    before = place_nodes(zones_of(ABC), node_names(1), one_machine_each(ABC), {})
    more = place_nodes(zones_of(ABC), node_names(1, caches=2), one_machine_each(["b"]), before)
    assert more["cache-0-1"] == NodePlace("b")


def test_two_machines_of_a_zone_that_look_alike_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"zone 'b' has 2 Ray nodes.*zones\.host_label = host"):
        place_nodes(zones_of(ABC), node_names(1), one_machine_each(["a", "b", "b", "c"]), {})


def test_a_machine_without_a_name_that_stays_holds_caches_but_no_data() -> None:
    zones = zones_of(ABC, host_label="host")
    named = [NodePlace(zone, f"{zone}1") for zone in ABC]
    before = place_nodes(zones, node_names(1), [*named, NodePlace("b"), NodePlace("b")], {})
    assert before["storage-0-1"] == before["cold-0-1"] == NodePlace("b", "b1")
    assert place_nodes(zones, node_names(1, caches=2), [NodePlace("b")], before)["cache-0-1"] == NodePlace("b")
    with pytest.raises(ConfigError, match=r"storage-0-1 belongs in zone 'b'.*--labels zone=b,host=NAME"):
        place_nodes(zones, node_names(1), [named[0], NodePlace("b"), named[2]], {})


def test_a_node_is_bound_to_its_machine_when_machines_get_names() -> None:
    before = place_nodes(zones_of(ABC), node_names(1), one_machine_each(ABC), {})
    zones = zones_of(ABC, host_label="host")
    named = [NodePlace(zone, f"{zone}1") for zone in ABC]
    after = place_nodes(zones, node_names(1), named, before)
    assert after["storage-0-1"] == after["cold-0-1"] == NodePlace("b", "b1")
    assert after["cache-0-0"] == before["cache-0-0"]
    for machines, count in ([*named, NodePlace("b", "b2")], "2"), ([named[0], NodePlace("b"), named[2]], "no"):
        with pytest.raises(ConfigError, match=f"storage-0-1 has its data.* and {count} Ray nodes there carry"):
            place_nodes(zones, node_names(1), machines, before)


def test_zones_are_shared_only_when_that_is_allowed() -> None:
    allowed = zones_of(ABC, allow_shared_zones=True)
    places = place_nodes(allowed, node_names(1), one_machine_each(["a", "b"]), {})
    assert [places[f"storage-0-{replica}"].zone for replica in range(3)] == ["a", "b", "a"]
    with pytest.raises(ConfigError, match=r"cold-0-0 and cold-0-2 are replicas of one group and both in zone 'a'"):
        place_nodes(zones_of(ABC), node_names(1), one_machine_each(ABC), places)
    with pytest.raises(ConfigError, match="none of the others"):
        place_nodes(allowed, node_names(1), [], {})


def test_replicas_that_share_a_zone_are_on_different_machines_of_it() -> None:
    zones = zones_of(["a"], allow_shared_zones=True, host_label="host")
    places = place_nodes(zones, node_names(3), [NodePlace("a", f"a{number}") for number in range(3)], {})
    for tier, group in itertools.product(("storage", "cold"), range(3)):
        assert len({places[f"{tier}-{group}-{replica}"].host for replica in range(3)}) == 3


def test_machines_are_ray_nodes_that_carry_the_labels() -> None:
    labels = [
        {"zone": "a", "host": "a1", "ray.io/node-id": "x"},
        {"zone": "b"},
        {"zone": "elsewhere", "host": "e1"},
        {"host": "b1"},
        {},
    ]
    assert machines_of(zones_of(ABC, host_label="host"), labels) == [NodePlace("a", "a1"), NodePlace("b")]
    assert machines_of(zones_of(ABC), labels) == [NodePlace("a"), NodePlace("b")]
    assert machines_of(zones_of(ABC, label="host"), labels) == []


def test_the_command_names_all_labels() -> None:
    assert how_to_start({"zone": "a", "host": "a1"}) == "`ray start --address=HEAD:PORT --labels zone=a,host=a1`"
