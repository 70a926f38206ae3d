"""`timetier disk`, against real actors: a disk and a whole node are lost, and come back."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cold_model import cold_file
from timetier.actors.connecting import connect_async
from timetier.actors.launch import cluster_status, start_cluster, stop_cluster
from timetier.cluster.cold.block import checksum
from timetier.cluster.cold.disk_marks import MARK_FILE
from timetier.cluster.config import Config, load_config
from timetier.cluster.messages import FileWrite, FileWritten
from timetier.jobs.cli_common import run_command
from timetier.jobs.command_line import commands
from timetier.jobs.status_text import describe

NAMESPACE = "test-disks"
FILES = {f"f{number}": number % 2 for number in range(6)}  # and the disk of each
WAIT = threading.Event()  # never set: its `wait` is the pause between two looks


@pytest.fixture(scope="module")
def config(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Config]:
    folder = tmp_path_factory.mktemp("disks")
    loaded = load_config(None, data_dir=folder / "data")
    places = [folder / "a", folder / "b"]
    for place in places:
        place.mkdir()
    cold = loaded.cold.model_copy(update={"disks": 2, "disk_dirs": places})
    found = loaded.model_copy(update={"namespace": NAMESPACE, "buckets": 64, "cold": cold})
    start_cluster(found)
    asyncio.run(write_files())
    yield found
    stop_cluster(NAMESPACE)


async def write_files() -> None:
    store = await connect_async(namespace=NAMESPACE)
    for file, disk in FILES.items():
        data = cold_file(file)
        for replica in range(3):
            message = FileWrite(file, disk, 0, data, True, checksum(data))
            answer = await store.carrier.call(f"cold-0-{replica}", message, 10.0)
            assert isinstance(answer, FileWritten), answer
    await store.close()


def command(config: Config, *arguments: str, status: int = 0) -> dict[str, Any]:
    """What a command prints with `--json`."""
    out, err = io.StringIO(), io.StringIO()
    options = ["--json", "--data-dir", str(config.data_dir), "--namespace", NAMESPACE]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        found_status = run_command(commands, ["disk", *arguments, *options])
    assert found_status == status, (out.getvalue(), err.getvalue())
    return dict(json.loads(out.getvalue() or json.dumps({"error": err.getvalue()})))


def disks(config: Config, node: str, status: int = 0) -> dict[int, dict[str, Any]]:
    return {one["disk"]: one for one in command(config, "list", status=status)["disks"] if one["node"] == node}


def check(config: Config, replica: int) -> None:
    """The node's disks hold the files, each with the bytes that it should have, and nothing else."""
    assert config.cold.disk_dirs is not None
    for disk, place in enumerate(config.cold.disk_dirs):
        found = {path.name: path.read_bytes() for path in (place / f"cold-0-{replica}").iterdir()}
        assert found.pop(MARK_FILE)
        assert found == {file: cold_file(file) for file, on in FILES.items() if on == disk}


def restart(node: str) -> None:
    """Have a node end; Ray starts it again."""
    import ray

    before = node_status(node)["pid"]
    ray.kill(ray.get_actor(node, namespace=NAMESPACE), no_restart=False)
    until(lambda: node_status(node).get("pid", before) != before, "another process")
    until(lambda: node_status(node)["state"] in ("serving", "refused"), "the node to be up")


def node_status(node: str) -> dict[str, Any]:
    return next(one for one in cluster_status(NAMESPACE)["nodes"] if one["node"] == node)


def until(condition: Callable[[], Any], what: str, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what}"
        WAIT.wait(0.1)


def test_a_lost_disk_is_shown_and_replaced_by_one_command(config: Config) -> None:
    assert config.cold.disk_dirs is not None
    assert {one["state"] for one in command(config, "list")["disks"]} == {"serving"}
    shutil.rmtree(config.cold.disk_dirs[1] / "cold-0-1")
    restart("cold-0-1")
    found = disks(config, "cold-0-1", status=1)
    assert (found[0]["state"], found[1]["state"]) == ("serving", "absent")
    status = cluster_status(NAMESPACE)
    assert status["state"] == "serving", "a node with one disk that is out still serves"
    text = describe(status)
    assert "ALARM cold-0-1: disk 1 is absent" in text
    assert any(line.split()[:3] == ["cold-0-1", "1", "absent"] for line in text.splitlines())
    told = command(config, "replace", "cold-0-1", "1")
    assert (told["done"], told["disks"][0]["files"]) == (True, 3)
    check(config, 1)
    assert {one["state"] for one in command(config, "list")["disks"]} == {"serving"}


def test_a_disk_that_serves_is_erased_only_with_a_yes(config: Config) -> None:
    assert "serves" in command(config, "replace", "cold-0-2", "0", status=1)["error"]
    assert "--yes" in command(config, "replace", "cold-0-2", "0", "--erase", status=2)["error"]
    check(config, 2)
    told = command(config, "replace", "cold-0-2", "0", "--erase", "--yes")
    assert (told["done"], told["disks"][0]["files"]) == (True, 3)
    check(config, 2)


def test_calls_that_make_no_sense_are_told_so(config: Config) -> None:
    assert "cold-0-0, cold-0-1" in command(config, "replace", "cold-0-7", "0", status=1)["error"]
    assert "disks 0 to 1" in command(config, "replace", "cold-0-1", "5", status=1)["error"]
    assert "--all" in command(config, "replace", "cold-0-1", status=2)["error"]
    assert "no cold node" in command(config, "replace", "storage-0-1", "--all", status=1)["error"]


def test_a_node_that_lost_everything_is_refused_until_it_is_told_to_begin_again(config: Config) -> None:
    assert config.cold.disk_dirs is not None
    for place in (Path(config.data_dir), *config.cold.disk_dirs):
        shutil.rmtree(place / "cold-0-0")
    restart("cold-0-0")
    assert node_status("cold-0-0")["state"] == "refused"
    assert "refused" in command(config, "replace", "cold-0-0", "0", status=1)["error"]
    assert not (config.cold.disk_dirs[0] / "cold-0-0").exists()
    told = command(config, "replace", "cold-0-0", "--all")
    assert (told["done"], [one["files"] for one in told["disks"]]) == (True, [3, 3])
    check(config, 0)
    until(lambda: node_status("cold-0-0")["state"] == "serving", "the node to serve")
    assert command(config, "replace", "cold-0-0", "--all")["replaced"] == []
    shutil.rmtree(Path(config.data_dir) / "cold-0-0")
    restart("cold-0-0")
    assert node_status("cold-0-0")["state"] == "refused", "the word to begin again held for one time"
    assert command(config, "replace", "cold-0-0", "--all")["done"]
    check(config, 0)
