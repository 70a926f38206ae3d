"""Cache nodes are added to and removed from a running cluster: nothing moves, nothing fails."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from timetier.actors.connecting import ClusterStore, connect_async
from timetier.actors.launch import cluster_status, start_cluster, stop_cluster
from timetier.actors.router_state import RouterState
from timetier.actors.scaling import scale_cluster
from timetier.cluster.config import Config, load_config
from timetier.cluster.errors import InvalidRequest, Unavailable

NAMESPACE = "test-scaling"
OWNERS = [f"owner-{number}" for number in range(200)]
WAIT = threading.Event()  # never set: its `wait` is the pause between two looks


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    loaded = load_config(None, data_dir=tmp_path_factory.mktemp("scaling"))
    # One replica of each: what is tested is the cache tier, and actors are dear.
    storage = loaded.storage.model_copy(update={"replicas": 1})
    cold = loaded.cold.model_copy(update={"replicas": 1})
    return loaded.model_copy(update={"namespace": NAMESPACE, "storage": storage, "cold": cold})


@pytest.fixture(scope="module")
def module_cluster(ray_session: None, config: Config) -> Iterator[None]:
    yield
    stop_cluster(NAMESPACE)


@pytest.fixture
def cluster(module_cluster: None, config: Config) -> None:
    """The cluster serves, with one cache node."""
    assert start_cluster(config)["state"] == "serving"
    assert scale_cluster(NAMESPACE, cache_nodes=1)["state"] == "serving"


def nodes() -> dict[str, dict[str, Any]]:
    return {node["node"]: node for node in cluster_status(NAMESPACE)["nodes"]}


def cache_names() -> list[str]:
    return sorted(name for name in nodes() if name.startswith("cache"))


def reads_of(name: str) -> float:
    return float(nodes()[name]["figures"].get("requests", 0))


class Load:
    """Reads without a pause from a thread with an event loop, until the end of the block. `failed`: their errors."""

    def __init__(self) -> None:
        self.reads = 0
        self.failed: list[BaseException] = []
        self._ended = threading.Event()
        self._began = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._work()))

    def __enter__(self) -> Load:
        self._thread.start()
        assert self._began.wait(60), "the load did not begin"
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(60)
        assert not self._thread.is_alive()

    async def _work(self) -> None:
        async with await connect_async(namespace=NAMESPACE) as store:
            table = store.table("moments")
            await table.put_many([(owner, 1, b"v") for owner in OWNERS])
            self._began.set()
            await asyncio.gather(*(self._read(store, number) for number in range(8)))

    async def _read(self, store: ClusterStore, number: int) -> None:
        table = store.table("moments")
        at = number
        while not self._ended.is_set():
            try:
                item = await table.get(OWNERS[at % len(OWNERS)], 1)
                assert item is not None
                assert item.value == b"v"
                self.reads += 1
            except Exception as error:
                self.failed.append(error)
            at += 7


def until(condition: Callable[[], bool], what: str, timeout_s: float) -> float:
    """Seconds that it took."""
    began_s = time.monotonic()
    while not condition():
        assert time.monotonic() - began_s < timeout_s, f"not in time: {what}"
        WAIT.wait(0.05)
    return time.monotonic() - began_s


def test_an_added_cache_node_is_read_within_five_seconds_and_a_removed_one_costs_no_read(cluster: None) -> None:
    storage_before = nodes()["storage-0-0"]["figures"].get("items_written", 0)
    with Load() as load:
        found = scale_cluster(NAMESPACE, cache_nodes=2)
        assert (found["added"], found["removed"]) == (["cache-0-1"], [])
        until(lambda: reads_of("cache-0-1") > 0, "the added node is asked", 5.0)
        assert nodes()["storage-0-0"]["figures"]["items_written"] - storage_before <= len(OWNERS), "nothing is moved"
        seen = load.reads
        until(lambda: load.reads > seen + 100, "reads go on", 10.0)
        found = scale_cluster(NAMESPACE, cache_nodes=1)
        assert (found["added"], found["removed"]) == ([], ["cache-0-1"])
        assert found["state"] == "serving"
        seen = load.reads
        until(lambda: load.reads > seen + 100, "reads go on", 10.0)
    assert load.failed == []
    assert cache_names() == ["cache-0-0"]


def test_the_number_stays_over_a_restart_of_the_router_and_of_the_cluster(cluster: None, config: Config) -> None:
    scale_cluster(NAMESPACE, cache_nodes=2)
    router = cluster_status(NAMESPACE)["router"]["pid"]
    os.kill(router, signal.SIGKILL)
    until(lambda: cluster_status(NAMESPACE)["router"].get("pid", router) != router, "the Router is back", 45.0)
    assert cluster_status(NAMESPACE)["router"]["cache_nodes"] == 2
    stop_cluster(NAMESPACE)
    found = start_cluster(config)
    assert found["state"] == "serving"
    assert cache_names() == ["cache-0-0", "cache-0-1"]


def test_scaling_to_what_is_there_changes_nothing(cluster: None) -> None:
    epoch = cluster_status(NAMESPACE)["router"]["epoch"]
    found = scale_cluster(NAMESPACE, cache_nodes=1)
    assert (found["added"], found["removed"], found["router"]["epoch"]) == ([], [], epoch)


@pytest.mark.parametrize("count", [0, 65, -1])
def test_a_number_that_cannot_be_is_refused(cluster: None, count: int) -> None:
    with pytest.raises(InvalidRequest, match="pass 1 to 64"):
        scale_cluster(NAMESPACE, cache_nodes=count)
    assert cache_names() == ["cache-0-0"]


def test_without_a_cluster_the_error_says_what_to_do(ray_session: None) -> None:
    with pytest.raises(Unavailable, match="timetier up"):
        scale_cluster("test-nobody-home", cache_nodes=2)


def test_another_configured_number_replaces_the_scaled_one_and_the_same_one_does_not(tmp_path: Path) -> None:
    config = load_config(None, data_dir=tmp_path)
    state = RouterState.open(tmp_path, "n", config)
    assert state.publish_cache_nodes(3)
    assert RouterState.open(tmp_path, "n", None).topology().cache_nodes == 3
    unrelated = config.model_copy(update={"client": config.client.model_copy(update={"timeout_s": 7.0})})
    assert RouterState.open(tmp_path, "n", unrelated).topology().cache_nodes == 3
    changed = unrelated.model_copy(update={"cache": config.cache.model_copy(update={"nodes": 2})})
    opened = RouterState.open(tmp_path, "n", changed)
    assert opened.topology().cache_nodes == 2
    assert "cache-0-2" not in opened.topology().node_names()
