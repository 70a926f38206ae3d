"""A whole cluster of real actors: start, kill, refuse, restart."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from timetier import InvalidRequest, Unavailable
from timetier.actors.connecting import ClusterStore, connect_async
from timetier.actors.jobs_client import ENDED, FAILED, SUCCEEDED, SinkOptions, start_sink
from timetier.actors.jobs_client import _Task as as_task
from timetier.actors.launch import cluster_status, start_cluster, stop_cluster
from timetier.actors.local_ray import LocalRay
from timetier.actors.router_state import RouterState
from timetier.actors.shell import SERVES
from timetier.actors.sink_runs import run_name
from timetier.cluster.config import Config, load_config

NODES = ["storage-0-0", "storage-0-1", "storage-0-2", "cache-0-0", "cold-0-0", "cold-0-1", "cold-0-2"]
NAMESPACE = "test-launch"
WAIT = threading.Event()  # never set: its `wait` is the pause between two looks


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    loaded = load_config(None, data_dir=tmp_path_factory.mktemp("launch"))
    return loaded.model_copy(update={"namespace": NAMESPACE})


@pytest.fixture(scope="module")
def module_cluster(ray_session: None, config: Config) -> Iterator[None]:
    yield
    stop_cluster(NAMESPACE)


@pytest.fixture
def cluster(module_cluster: None, config: Config) -> None:
    """The cluster runs and serves; what an earlier test has ended is started again."""
    assert start_cluster(config)["state"] == "serving"


def in_store(work: Callable[[ClusterStore], Any], **options: Any) -> Any:
    async def body() -> Any:
        async with await connect_async(namespace=NAMESPACE, **options) as store:
            return await work(store)

    return asyncio.run(asyncio.wait_for(body(), 90))


def states() -> dict[str, dict[str, Any]]:
    return {node["node"]: node for node in cluster_status(NAMESPACE)["nodes"]}


def until(condition: Callable[[], Any], what: str, timeout_s: float = 45.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not in time: {what}; {states()}"
        WAIT.wait(0.1)
    return found


def kill_and_wait(node: str) -> dict[str, Any]:
    """kill -9 the process of an actor, wait until its successor serves; its status."""
    before = states()[node]["pid"]
    os.kill(before, signal.SIGKILL)
    found: dict[str, Any] = until(lambda: _successor(node, before), f"{node} is back")
    return found


def _successor(node: str, before: int) -> dict[str, Any] | None:
    found = states()[node]
    return found if found["state"] in SERVES and found["pid"] != before else None


def test_starting_twice_leaves_running_actors_alone(cluster: None, config: Config) -> None:
    first = cluster_status(NAMESPACE)
    again = start_cluster(config)
    assert [node["node"] for node in again["nodes"]] == NODES
    assert [node["pid"] for node in again["nodes"]] == [node["pid"] for node in first["nodes"]]
    assert all(node["state"] in SERVES for node in again["nodes"])


@pytest.mark.parametrize("carrier", ["direct", "ray"])
def test_what_is_written_is_read_back_over_each_carrier(cluster: None, carrier: str) -> None:
    async def work(store: ClusterStore) -> None:
        table = store.table("moments")
        items = [("alice-" + carrier, at, f"{at}".encode()) for at in range(1, 301)]
        await table.put_many(items)
        page = await table.timeline("alice-" + carrier, limit=300)
        assert [item.value for item in page.items] == [value for _, _, value in reversed(items)]
        item = await table.get("alice-" + carrier, 7)
        assert item is not None
        assert item.value == b"7"

    in_store(work, carrier=carrier)


def test_a_ray_client_needs_no_open_ports(cluster: None, local_ray: LocalRay) -> None:
    code = (
        "import sys, timetier\n"
        "from timetier.actors.ray_carrier import RayCarrier\n"
        "with timetier.connect(sys.argv[1], namespace=sys.argv[2]) as store:\n"
        "    assert isinstance(store._store.carrier, RayCarrier)\n"
        "    table = store.table('moments')\n"
        "    table.put('outside', 5, b'hello')\n"
        "    print(table.get('outside', 5).value.decode())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, local_ray.client_address, NAMESPACE], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "hello\n"


@pytest.mark.parametrize("node", ["storage-0-1", "cache-0-0", "cold-0-2"])
def test_nothing_acknowledged_is_lost_when_an_actor_is_killed_under_load(cluster: None, node: str) -> None:
    async def work(store: ClusterStore) -> tuple[dict[str, Any], int]:
        table = store.table("moments")
        acknowledged: list[tuple[str, int]] = []
        stop = asyncio.Event()

        async def write(owner: str) -> None:
            at = 0
            while not stop.is_set():
                at += 1
                await table.put(owner, at, f"{owner}{at}".encode())
                acknowledged.append((owner, at))
                found = await table.get(owner, at)
                assert found is not None, f"{owner} {at} was acknowledged and is not there"

        writers = [asyncio.create_task(write(f"{node}-{number}")) for number in range(8)]
        killed = asyncio.create_task(asyncio.to_thread(kill_and_wait, node))
        await asyncio.wait([killed, *writers], return_when=asyncio.FIRST_COMPLETED)
        stop.set()
        await asyncio.gather(*writers)
        items = await table.get_many(acknowledged)
        for (owner, at), item in zip(acknowledged, items, strict=True):
            assert item is not None, f"{owner} {at} is lost"
            assert item.value == f"{owner}{at}".encode()
        return await killed, len(acknowledged)

    status, written = in_store(work)
    assert written > 0
    if node != "cache-0-0":
        assert status["boot"] >= 2


def test_reads_and_writes_go_on_and_nodes_restart_while_the_router_is_dead(cluster: None, config: Config) -> None:
    async def work(store: ClusterStore) -> None:
        table = store.table("moments")
        await table.put("orphan", 1, b"before")
        ray.kill(ray.get_actor("router", namespace=NAMESPACE), no_restart=True)
        await table.put("orphan", 2, b"without")
        pid = states()["storage-0-2"]["pid"]
        os.kill(pid, signal.SIGKILL)
        await asyncio.to_thread(until, lambda: _successor("storage-0-2", pid), "storage-0-2 is back")
        await table.put("orphan", 3, b"still without")
        assert [item.timestamp for item in (await table.timeline("orphan")).items] == [3, 2, 1]

    in_store(work)
    assert cluster_status(NAMESPACE)["router"]["state"] == "absent"
    epoch = start_cluster(config)["router"]["epoch"]
    assert epoch > 1


def test_a_replica_without_its_data_and_one_with_an_old_folder_copy_it_from_their_peers(
    cluster: None, config: Config
) -> None:
    in_store(lambda store: store.table("moments").put("kept", 1, b"value"))
    stop_cluster(NAMESPACE)
    folder = Path(config.data_dir) / "storage-0-1"
    aside = folder.with_name("aside")
    folder.rename(aside)

    async def work(store: ClusterStore) -> None:
        table = store.table("moments")
        for at in range(2, 30):
            await table.put("kept", at, b"more")
        assert len((await table.timeline("kept", limit=100)).items) == 29

    try:
        assert start_cluster(config)["state"] == "serving"
        status = states()["storage-0-1"]
        assert status["incarnation"] == 2
        assert "rejoin" not in status
        in_store(work)
        stop_cluster(NAMESPACE)
        shutil.rmtree(folder)
    finally:
        if not folder.exists():
            aside.rename(folder)
    start_cluster(config)
    until(lambda: states()["storage-0-1"].get("incarnation") == 3, "it is a later incarnation")
    until(lambda: states()["storage-0-1"]["state"] == "voting", "it votes again")


def test_nodes_do_not_follow_a_router_that_has_lost_its_state(cluster: None, config: Config, tmp_path: Path) -> None:
    in_store(lambda store: store.table("moments").put("faithful", 1, b"value"))
    stop_cluster(NAMESPACE)
    RouterState.open(tmp_path, NAMESPACE, config)  # as if it could not see the data, which are on other machines
    kept = Path(config.data_dir) / "router"
    aside = kept.with_name("router-aside")
    kept.rename(aside)
    shutil.copytree(tmp_path / "router", kept)
    try:
        with pytest.raises(Unavailable, match=r"7 of 7 nodes do not serve: .*storage-0-2: it holds data of "):
            start_cluster(config)
    finally:
        stop_cluster(NAMESPACE)
        shutil.rmtree(kept)
        aside.rename(kept)
    assert start_cluster(config)["state"] == "serving"
    found = in_store(lambda store: store.table("moments").get("faithful", 1))
    assert found.value == b"value"


def test_a_restart_of_the_whole_cluster_keeps_everything(cluster: None, config: Config) -> None:
    async def write(store: ClusterStore) -> list[int]:
        return await store.table("moments").put_many([(f"u{n % 50}", n, b"v%d" % n) for n in range(2_000)])

    async def read(store: ClusterStore) -> list[Any]:
        return await store.table("moments").get_many([(f"u{n % 50}", n) for n in range(2_000)])

    in_store(write)
    assert sorted([*NODES, "router"]) == stop_cluster(NAMESPACE)
    assert cluster_status(NAMESPACE)["state"] == "down"
    (Path(config.data_dir) / "storage-0-0" / "topology.json").write_bytes(b"{")  # only a copy: the Router has it
    start_cluster(config)
    items = in_store(read)
    assert [item.value for item in items] == [b"v%d" % n for n in range(2_000)]


def test_ending_a_cluster_leaves_other_actors_alone(cluster: None, config: Config) -> None:
    class Other:
        def ping(self) -> str:
            return "here"

    other: Any = ray.remote(num_cpus=0)(Other).options(name="storage-of-mine", namespace=NAMESPACE).remote()
    assert ray.get(other.ping.remote()) == "here"
    stop_cluster(NAMESPACE)
    assert ray.get(other.ping.remote()) == "here"
    ray.kill(other)


@pytest.mark.parametrize("kind", ["job", "task"])
def test_the_sink_runs_and_reports_under_its_id(cluster: None, kind: str) -> None:
    owner = f"ages-{kind}"
    options = SinkOptions(before=100, by_event_time=True, table="commits")

    async def fill(store: ClusterStore) -> None:
        await store.table("commits").put_many([(owner, at, b"v%d" % at) for at in range(200)])

    async def read(store: ClusterStore) -> tuple[list[Any], list[Any]]:
        page = await store.table("commits").timeline(owner, limit=1_000)
        return await store.router_call("runs"), page.items

    in_store(fill)
    # The session's Ray has a dashboard, so a task is started where the Router would do it without one.
    name = run_name(time.time())
    run = start_sink(NAMESPACE, options, name) if kind == "job" else as_task(options.arguments(NAMESPACE, name))
    assert run.kind == kind
    state, reason = until(lambda: (found := run.state())[0] in ENDED and found, "the sink ends")
    assert (state, reason) == (SUCCEEDED, "")
    runs, items = in_store(read)
    report = next(found for found in runs if found["run"] == name)
    assert report["state"] == "succeeded"
    assert report["rows"] == 100
    assert report["blocks"] > 0
    assert [item.value for item in items] == [b"v%d" % at for at in reversed(range(200))]


def test_a_sink_that_fails_says_why(ray_session: None, namespace: str) -> None:
    run = start_sink(namespace, SinkOptions(), run_name(time.time()))
    state, reason = until(lambda: (found := run.state())[0] in ENDED and found, "the sink ends")
    assert state == FAILED
    assert f"no cluster runs in the Ray namespace '{namespace}'" in reason


def test_the_sink_runs_on_schedule(cluster: None, config: Config) -> None:
    stop_cluster(NAMESPACE)
    sinking = config.model_copy(update={"sink": config.sink.model_copy(update={"every": 1.0})})
    known = {run["run"] for run in start_cluster(sinking)["router"]["runs"]}

    def later() -> list[dict[str, Any]]:
        runs = cluster_status(NAMESPACE)["router"]["runs"]
        return [run for run in runs if run["run"] not in known and run["state"] == "succeeded"]

    assert until(later, "a scheduled run has succeeded")
    stop_cluster(NAMESPACE)


def test_a_namespace_without_a_cluster_is_told_with_the_remedy(ray_session: None, namespace: str) -> None:
    with pytest.raises(Unavailable, match="timetier up"):
        asyncio.run(connect_async(namespace=namespace))


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense"])
def test_a_connected_process_is_not_given_the_store_of_another_ray_than_it_names(
    cluster: None, local_ray: LocalRay, address: str
) -> None:
    with pytest.raises(InvalidRequest, match="one at a time"):
        asyncio.run(connect_async(address, namespace=NAMESPACE))
    in_store(lambda store: store.table("moments").get("nobody", 1), address=local_ray.address)


def test_figures_are_exported_as_metrics_with_few_tags(cluster: None) -> None:
    in_store(lambda store: store.table("moments").put("metric", 1, b"value"))
    list_nodes: Any = ray.nodes
    node = list_nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

    def exported() -> list[str]:
        with urllib.request.urlopen(url, timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        return [line for line in lines if line.startswith("ray_timetier_") and 'node="storage-0-0"' in line]

    lines = until(exported, "metrics are exported", 60.0)
    assert all('tier="storage"' in line for line in lines)
    assert not any("metric" in line.partition("{")[2] and 'owner="' in line for line in lines)
