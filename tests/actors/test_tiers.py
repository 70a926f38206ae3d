"""All three tiers with real actors: what sinks stays readable, whole and right, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from timetier import Store, Table, connect
from timetier.actors.jobs_client import ENDED, SUCCEEDED, RunningSink, SinkOptions, start_sink
from timetier.actors.launch import cluster_status, start_cluster, stop_cluster
from timetier.actors.shell import SERVES
from timetier.cluster.cold.block import read_index
from timetier.cluster.config import Config, load_config
from timetier.jobs.cli_sink import follow_sink

NAMESPACE = "test-tiers"
TABLE = "commits"
OWNERS = [f"owner-{number}" for number in range(40)]
ITEMS = 50
WAIT = threading.Event()  # never set: its `wait` is the pause between two looks

Model = dict[str, dict[int, bytes]]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    loaded = load_config(None, data_dir=tmp_path_factory.mktemp("tiers"))
    return loaded.model_copy(update={"namespace": NAMESPACE, "buckets": 64})


@pytest.fixture(scope="module")
def store(ray_session: None, config: Config) -> Iterator[Store]:
    start_cluster(config)
    with connect(namespace=NAMESPACE) as opened:
        yield opened
    stop_cluster(NAMESPACE)


@pytest.fixture
def table(store: Store) -> Table:
    until(lambda: all(node["state"] in SERVES for node in nodes().values()), "all nodes serve")
    return store.table(TABLE)


def nodes() -> dict[str, dict[str, Any]]:
    return {node["node"]: node for node in cluster_status(NAMESPACE)["nodes"]}


def until(condition: Callable[[], Any], what: str, timeout_s: float = 60.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not in time: {what}"
        WAIT.wait(0.1)
    return found


def fill(table: Table, prefix: str, model: Model) -> None:
    """50 items for each of 40 owners, of timestamps 0 to 49."""
    for owner in OWNERS:
        model[prefix + owner] = {at: f"{owner} at {at}".encode() * 5 for at in range(ITEMS)}
    table.put_many([(owner, at, value) for owner, items in model.items() for at, value in items.items()])


def sink(before: int) -> dict[str, Any]:
    """Run the sink by event time and wait; its report."""
    options = SinkOptions(before=before, by_event_time=True, table=TABLE)
    found = asyncio.run(follow_sink(NAMESPACE, options, lambda done, total: None))
    assert found["state"] == SUCCEEDED, found["reason"]
    return found


def check(table: Table, model: Model) -> None:
    """Every timeline, page by page, and single items equal the model."""
    for owner, items in model.items():
        expected = [items[at] for at in sorted(items, reverse=True)]
        assert [item.value for item in table.iterate(owner, limit_per_page=17)] == expected
    owner = random.Random(len(model)).choice(list(model))
    for at, item in zip(range(ITEMS), table.get_many([(owner, at) for at in range(ITEMS)]), strict=True):
        assert (item.value if item else None) == model[owner].get(at)


def cold_files(config: Config) -> dict[str, dict[str, bytes]]:
    """Content of each cold file by node."""
    found: dict[str, dict[str, bytes]] = {}
    for node in ("cold-0-0", "cold-0-1", "cold-0-2"):
        for path in (Path(config.data_dir) / node).glob("disk-*/*.arrow"):
            found.setdefault(path.name, {})[node] = path.read_bytes()
    return found


def test_what_sinks_lies_in_three_identical_files_and_reads_the_same(table: Table, config: Config) -> None:
    model: Model = {}
    fill(table, "same-", model)
    check(table, model)
    token = table.timeline("same-owner-1", limit=10).next
    report = sink(30)
    assert report["rows"] == len(OWNERS) * 30
    check(table, model)
    older = table.timeline("same-owner-1", limit=25, before=token).items
    assert [item.timestamp for item in older] == list(range(39, 14, -1)), "a token goes on across tiers after a sink"
    figures = cluster_status(NAMESPACE)["router"]["figures"]
    assert (figures["sunk_items"], figures["sunk_bytes"]) == (report["rows"], report["cold_bytes"])
    files = cold_files(config)
    assert files
    for copies in files.values():
        assert len(copies) == 3
        assert len(set(copies.values())) == 1, "the three copies of a file must have the same bytes"
    again = sink(30)
    assert again["rows"] == 0, "what has sunk does not sink again"


def test_late_writes_and_deletes_win_over_blocks_and_sink_with_the_next_run(table: Table) -> None:
    model: Model = {}
    fill(table, "late-", model)
    sink(40)
    for number, owner in enumerate(model):
        if number % 3 == 0:
            table.put(owner, 5, b"late")
            model[owner][5] = b"late"
        elif number % 3 == 1:
            table.delete(owner, 7)
            del model[owner][7]
    wiped = list(model)[2]
    table.delete_timeline(wiped)
    model[wiped] = {}
    check(table, model)
    sink(40)
    check(table, model)
    table.put(wiped, 3, b"begins anew")
    model[wiped] = {3: b"begins anew"}
    check(table, model)


def test_a_flipped_bit_in_a_block_is_noticed_and_repaired_and_the_right_bytes_come_back(
    table: Table, config: Config
) -> None:
    model: Model = {}
    fill(table, "flip-", model)
    sink(50)
    damaged: list[Path] = []
    for path in sorted((Path(config.data_dir) / "cold-0-1").glob("disk-*/*.arrow")):
        content = bytearray(path.read_bytes())
        for entry in read_index(bytes(content)).blocks:
            content[entry.offset + entry.length - 9] ^= 0x10
        path.write_bytes(content)
        damaged.append(path)
    failures = nodes()["cold-0-1"]["figures"].get("crc_failures", 0)
    check(table, model)
    assert until(lambda: nodes()["cold-0-1"]["figures"].get("crc_failures", 0) > failures, "the damage to be noticed")
    until(lambda: nodes()["cold-0-1"]["figures"].get("blocks_repaired", 0) > 0, "a block to be repaired")
    check(table, model)


def test_two_sinks_at_once_and_killed_actors_lose_nothing(table: Table) -> None:
    seed = 20
    print(f"seed {seed}")
    model: Model = {}
    fill(table, "both-", model)
    options = SinkOptions(before=25, by_event_time=True, table=TABLE, take_over=True)
    runs: list[RunningSink] = [start_sink(NAMESPACE, options, f"sink-{name}") for name in ("first", "second")]
    victims = [random.Random(seed).choice(["storage-0-0", "storage-0-1", "storage-0-2"]), "cold-0-2"]
    pids = {name: node["pid"] for name, node in nodes().items()}
    until(lambda: any(run.state()[0] not in ("pending",) for run in runs), "a run to begin")
    for victim in victims:
        os.kill(pids[victim], signal.SIGKILL)
    check(table, model)
    until(lambda: all(run.state()[0] in ENDED for run in runs), "the runs to end", 120)
    check(table, model)
    until(lambda: all(node["state"] in SERVES for node in nodes().values()), "killed actors to serve again")
    sink(25)
    check(table, model)
    assert sink(25)["rows"] == 0
