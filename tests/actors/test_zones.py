"""A cluster over three zones of real Ray nodes, one zone with two machines: placement, and losing a whole zone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zone_traffic
from ray_zones import HEAD, RayZones, ZoneDriver
from timetier.actors.launch import cluster_status, start_cluster, stop_cluster
from timetier.actors.shell import SERVES
from timetier.cluster.config import CacheConfig, Config, NetworkConfig, StorageConfig, TableConfig, ZonesConfig
from timetier.cluster.errors import Unavailable
from timetier.cluster.identity import Refused
from timetier.jobs.status_text import describe

NAMESPACE = "test-zones"
MACHINES = {"a1": "a", "a2": "a", "b1": "b", "c1": "c"}
WAIT = threading.Event()  # never set: its `wait` is the pause between two looks


class Zones:
    """The Ray of these tests, and the cluster in it."""

    def __init__(self, folder: Path, ray: RayZones, driver: ZoneDriver) -> None:
        self.folder, self.ray, self.driver = folder, ray, driver
        self.config = Config(
            namespace=NAMESPACE,
            data_dir=folder / "data",
            storage=StorageConfig(groups=2),
            cache=CacheConfig(nodes=1, budget_mb=16),
            zones=ZonesConfig(names=["a", "b", "c"], host_label="host"),
            network=NetworkConfig(tcp_host="auto"),
            default_table=TableConfig(),
        )

    def status(self) -> dict[str, dict[str, Any]]:
        found = self.driver.call(cluster_status, NAMESPACE)
        return {state["node"]: state for state in [found["router"], *found["nodes"]]}

    def until(self, condition: Callable[[dict[str, dict[str, Any]]], bool], what: str, timeout_s: float = 60.0) -> Any:
        """The status that meets a condition."""
        deadline = time.monotonic() + timeout_s
        while not condition(found := self.status()):
            told = {node: (state["state"], state["reason"]) for node, state in found.items()}
            assert time.monotonic() < deadline, f"not in time: {what}; {told}"
            WAIT.wait(0.2)
        return found


@pytest.fixture(scope="module")
def zones(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zones]:
    folder = tmp_path_factory.mktemp("zones")
    labels = {machine: {"zone": zone, "host": machine} for machine, zone in MACHINES.items()}
    with RayZones(folder / "ray", MACHINES, labels=labels, health_check_s=0.3) as ray, ZoneDriver(ray) as driver:
        yield Zones(folder, ray, driver)


@pytest.fixture(scope="module")
def started(zones: Zones) -> dict[str, Any]:
    """The status of the cluster when it had just begun."""
    return zones.driver.call(start_cluster, zones.config)


@pytest.fixture
def serving(zones: Zones, started: dict[str, Any]) -> dict[str, Any]:
    """The status of the cluster with all zones; what an earlier test has ended is started again."""
    for machine in set(MACHINES) - set(zones.ray.running):
        zones.ray.start(machine)
    return zones.driver.call(start_cluster, zones.config)


def test_a_cluster_does_not_begin_while_one_of_its_zones_has_no_machine(zones: Zones) -> None:
    folder = zones.folder / "elsewhere"
    missing = ZonesConfig(names=["a", "b", "z"], host_label="host")
    config = zones.config.model_copy(update={"namespace": "not-begun", "data_dir": folder, "zones": missing})
    with pytest.raises(Refused) as caught:
        zones.driver.call(start_cluster, config)
    assert "'z'" in caught.value.message
    assert "ray start --address=HEAD:PORT --labels zone=z,host=NAME" in caught.value.message
    assert zones.driver.call(cluster_status, "not-begun")["state"] == "down"
    assert not folder.exists()


def test_each_replica_runs_in_its_zone_and_the_machines_of_a_zone_share_it(
    zones: Zones, started: dict[str, Any]
) -> None:
    assert started["state"] == "serving"
    where = {node["node"]: zones.ray.zone_of(node["pid"]) for node in started["nodes"]}
    for node in started["nodes"]:
        machine = where[node["node"]]
        assert machine is not None
        assert MACHINES[machine] == node["zone"]
        assert node["host"] in ("", machine)
        assert node["address"]["tcp_host"] == zones.ray.addresses[machine], "it is reached at its own machine"
    assert [MACHINES[str(where[f"storage-0-{replica}"])] for replica in range(3)] == ["a", "b", "c"]
    assert [MACHINES[str(where[f"storage-1-{replica}"])] for replica in range(3)] == ["b", "c", "a"]
    assert (where["storage-0-0"], where["storage-1-2"]) == ("a1", "a2")
    assert zones.ray.zone_of(started["router"]["pid"]) == HEAD, "where its state lies"


def test_status_shows_the_zone_and_the_machine_of_each_node(started: dict[str, Any]) -> None:
    nodes = {node["node"]: (node["zone"], node["host"]) for node in started["nodes"]}
    assert nodes["storage-1-2"] == ("a", "a2")
    assert nodes["cache-1-0"] == ("b", "")
    line = next(line for line in describe(started).splitlines() if line.startswith("storage-1-2"))
    assert line.split()[:3] == ["storage-1-2", "a/a2", "voting"]


def test_a_lost_zone_is_survived_and_its_nodes_come_back_to_their_own_data(
    zones: Zones, serving: dict[str, Any]
) -> None:
    before = {node["node"]: node for node in serving["nodes"]}
    lost = {node for node, state in before.items() if state["zone"] == "a"}
    assert {"storage-0-0", "storage-1-2", "cold-0-0"} <= lost
    zones.driver.call(zone_traffic.begin_traffic, NAMESPACE)
    written = _more_writes(zones, 100)

    for machine in ("a1", "a2"):
        assert len(zones.ray.kill(machine)) > 1
    away = zones.until(lambda now: _state_of(now, lost, {"away"}), "the nodes of zone a are away, and no others")
    assert "zone a, machine a1, has no Ray node that is alive" in away["storage-0-0"]["reason"]
    work = {node: away[node]["figures"]["requests_proposed"] for node in ("storage-0-1", "storage-0-2")}
    _more_writes(zones, 600)
    now = zones.status()
    shares = [now[node]["figures"]["requests_proposed"] - count for node, count in work.items()]
    assert 0.35 < shares[0] / sum(shares) < 0.65, f"the load of a dead replica falls evenly on the others: {shares}"

    zones.ray.start("a2")
    partly = zones.until(lambda now: now["storage-1-2"]["state"] in SERVES, "machine a2 is back")
    assert zones.ray.zone_of(partly["storage-1-2"]["pid"]) == "a2"
    assert partly["storage-0-0"]["state"] == "away", "zone a has a machine again, but not the one with these data"
    zones.ray.start("a1")
    after = zones.until(lambda now: all(state["state"] in SERVES for state in now.values()), "all is well")
    for node, state in before.items():
        assert after[node].get("incarnation") == state.get("incarnation"), f"{node} came back without its data"
        if node in lost:
            place = zones.ray.zone_of(after[node]["pid"])
            assert place == state["host"] or (state["host"] == "" and place in ("a1", "a2"))
        else:
            assert after[node]["pid"] == state["pid"]
    assert after["storage-0-0"]["boot"] == before["storage-0-0"]["boot"] + 1

    report = zones.driver.call(zone_traffic.end_traffic, NAMESPACE)
    assert report.wrong == []
    assert report.failed == []
    assert len(report.acknowledged) > written
    print(f"longest operation while a zone was lost and came back: {report.longest_s:.2f} s")
    assert report.longest_s < 5.0


def test_a_cluster_starts_again_with_a_zone_missing_and_the_zone_joins_later(
    zones: Zones, serving: dict[str, Any]
) -> None:
    call = zones.driver.call
    call(zone_traffic.begin_traffic, NAMESPACE)
    _more_writes(zones, 100)
    written = call(zone_traffic.end_traffic, NAMESPACE).acknowledged
    zones.ray.kill("b1")
    b1 = {"storage-0-1", "storage-1-0", "cold-0-1", "cache-1-0"}
    zones.until(lambda now: _state_of(now, b1, {"away"}), "the nodes of zone b are away, and no others")
    assert {"storage-0-0", "storage-0-1", "router"} <= set(call(stop_cluster, NAMESPACE))
    begun = time.monotonic()
    with pytest.raises(Unavailable, match=r"4 of 11 nodes do not serve: .*storage-0-1.*: zone b, machine b1, has no"):
        call(start_cluster, None, namespace=NAMESPACE, data_dir=zones.config.data_dir)
    assert time.monotonic() - begun < 30, "it must not wait for a zone that is away"
    assert call(zone_traffic.lost, NAMESPACE, written) == []
    zones.ray.start("b1")
    zones.until(lambda now: all(state["state"] in SERVES for state in now.values()), "all is well")
    assert call(zone_traffic.lost, NAMESPACE, written) == []


def _state_of(now: dict[str, dict[str, Any]], nodes: set[str], states: set[str]) -> bool:
    """Whether these nodes are in one of `states`, and all others serve."""
    return all(found["state"] in (states if node in nodes else SERVES) for node, found in now.items())


def _more_writes(zones: Zones, count: int) -> int:
    """Wait until that many more writes were acknowledged; how many they are in all."""
    first = zones.driver.call(zone_traffic.acknowledged, NAMESPACE)
    deadline = time.monotonic() + 60.0
    while (present := zones.driver.call(zone_traffic.acknowledged, NAMESPACE)) < first + count:
        assert time.monotonic() < deadline, f"only {present - first} writes"
        WAIT.wait(0.1)
    return int(present)
