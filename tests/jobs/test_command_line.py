"""The command line, as a user runs it."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from timetier.actors.launch import stop_cluster
from timetier.actors.local_ray import LocalRay, find_local_ray, stop_local_ray
from timetier.actors.processes import family
from timetier.cluster.storage.engine import RocksEngine
from timetier.jobs.cli_common import run_command
from timetier.jobs.command_line import commands

COMMAND = [sys.executable, "-m", "timetier.jobs.command_line"]
NAMESPACE = "test-commands"


@dataclass
class Shell:
    """Runs commands against one cluster. `options`: put after the command's own arguments."""

    options: list[str]
    environment: dict[str, str]
    folder: Path

    def run(self, *arguments: str, data: bytes = b"", timeout_s: float = 150) -> subprocess.CompletedProcess[bytes]:
        command, *rest = arguments
        return subprocess.run(
            [*COMMAND, command, *self.options, *rest],
            input=data,
            capture_output=True,
            env=self.environment,
            cwd=self.folder,
            timeout=timeout_s,
        )

    def json(self, *arguments: str, status: int = 0, data: bytes = b"") -> dict[str, Any]:
        command, *rest = arguments
        done = self.run(command, "--json", *rest, data=data)
        assert done.returncode == status, done.stderr.decode()
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def quick(self, *arguments: str, status: int = 0) -> dict[str, Any]:
        """As `json`, but in this process, which is connected to Ray already."""
        command, *rest = arguments
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.chdir(self.folder):
            found_status = run_command(commands, [command, "--table", "moments", "--json", *self.options, *rest])
        assert found_status == status, out.getvalue()
        found: dict[str, Any] = json.loads(out.getvalue())
        return found


def environment(**changes: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in {"RAY_ADDRESS", "TIMETIER_DATA", "TIMETIER_NAMESPACE"}}
    return {**kept, **changes}


@pytest.fixture(scope="module")
def shell(ray_session: None, local_ray: LocalRay, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    folder = tmp_path_factory.mktemp("commands")
    options = ["--address", local_ray.address, "--namespace", NAMESPACE, "--data-dir", str(folder / "data")]
    made = Shell(options, environment(TIMETIER_TABLE="moments"), folder)
    found = made.json("up")
    assert found["state"] == "serving"
    yield made
    stop_cluster(NAMESPACE)


def offline(tmp_path: Path) -> Shell:
    return Shell(["--data-dir", str(tmp_path)], environment(TIMETIER_TABLE="moments"), tmp_path)


def assert_one_error_line(done: subprocess.CompletedProcess[bytes], status: int, *words: str) -> None:
    text = done.stderr.decode()
    assert done.returncode == status, text
    assert done.stdout == b""
    assert "Traceback" not in text
    told = [line for line in text.splitlines() if line.startswith(("timetier:", "Error:"))]
    assert len(told) == 1, text
    for word in words:
        assert word in told[0]


def test_an_item_comes_back_as_it_was_put(shell: Shell) -> None:
    version = shell.json("put", "alice", "1700000000000000", "good morning", "--id", "a")["version"]
    found = shell.json("get", "alice", "1700000000000000", "--id", "a")
    assert found["found"]
    assert (found["value"], found["id"], found["version"]) == ("good morning", "a", version)
    done = shell.run("get", "alice", "1700000000000000", "--id", "a")
    assert done.stdout == b"good morning\n"


def test_bytes_that_are_no_text_come_back_as_base64_or_raw(shell: Shell) -> None:
    value = bytes(range(256))
    shell.json("put", "binary", "7", "--file", "-", data=value)
    assert base64.b64decode(shell.quick("get", "binary", "7")["value_base64"]) == value
    assert shell.run("get", "binary", "7", "--raw").stdout == value
    assert base64.b64decode(shell.run("get", "binary", "7").stdout) == value


def test_a_missing_item_is_no_success(shell: Shell) -> None:
    assert shell.quick("get", "nobody", "1", status=1) == {"found": False}
    assert_one_error_line(shell.run("get", "nobody", "1"), 1, "no such item")


def test_a_timeline_is_paged_newest_first_and_deleted(shell: Shell) -> None:
    for at in range(1, 6):
        shell.quick("put", "bob", str(at), f"v{at}\twith\ttabs")
    page = shell.quick("timeline", "bob", "--limit", "2")
    assert [item["timestamp"] for item in page["items"]] == [5, 4]
    rest = shell.quick("timeline", "bob", "--before", page["next"])
    assert [item["timestamp"] for item in rest["items"]] == [3, 2, 1]
    assert rest["next"] is None
    lines = shell.run("timeline", "bob", "--all").stdout.decode().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["5", "4", "3", "2", "1"]
    assert all(len(line.split("\t")) == 3 for line in lines)

    shell.quick("delete", "bob", "3")
    assert [item["timestamp"] for item in shell.quick("timeline", "bob")["items"]] == [5, 4, 2, 1]
    shell.quick("delete", "bob", "--all")
    assert shell.quick("timeline", "bob")["items"] == []


def test_a_conditional_write_that_conflicts_fails_with_the_present_version(shell: Shell) -> None:
    version = shell.quick("put", "carol", "1", "first", "--if-version", "0")["version"]
    assert_one_error_line(shell.run("put", "carol", "2", "x", "--if-version", "0"), 1, "VersionConflict", str(version))


def test_a_file_is_loaded_and_loading_it_again_changes_nothing(shell: Shell) -> None:
    rows = [{"who": f"u{n % 3}", "at": n, "text": f"t{n}"} for n in range(1, 101)] + [
        {"who": None, "at": 5, "text": "x"}
    ]
    (shell.folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    arguments = ["load", "rows.jsonl", "--owner", "who", "--time", "at", "--rejects", "bad.jsonl"]
    first = shell.json(*arguments)
    assert (first["rows"], first["loaded"], first["rejected"], first["timelines"]) == (101, 100, 1, 3)
    assert len((shell.folder / "bad.jsonl").read_text().splitlines()) == 1
    again = shell.quick(*arguments)
    assert (again["loaded"], again["unchanged"]) == (0, 100)
    item = shell.quick("get", "u1", "100")
    assert json.loads(item["value"]) == {"text": "t100"}


def test_a_file_of_which_nothing_can_be_loaded_is_no_success(shell: Shell) -> None:
    (shell.folder / "noise.jsonl").write_bytes(b"\xff\xfe\n{\n")
    report = shell.quick("load", "noise.jsonl", "--owner", "who", "--time", "at", status=1)
    assert (report["rows"], report["rejected"]) == (2, 2)


def test_status_shows_every_actor(shell: Shell) -> None:
    found = shell.json("status")
    assert found["state"] == "serving"
    assert found["router"]["registered"] == len(found["nodes"]) == 7
    assert any(node["figures"] for node in found["nodes"])
    text = shell.run("status").stdout.decode()
    assert all(node["node"] in text for node in found["nodes"])


def test_the_sink_is_run_and_followed_and_everything_stays_readable(shell: Shell) -> None:
    for at in range(1, 4):
        shell.quick("put", "--table", "commits", "old", str(at), f"v{at}")
    done = shell.json("sink", "--table", "commits", "--before", "3", "--by-event-time")
    assert (done["kind"], done["state"], done["rows"], done["blocks"]) == ("job", "succeeded", 2, 1)
    items = shell.quick("timeline", "--table", "commits", "old")["items"]
    assert [(item["timestamp"], item["value"]) for item in items] == [(3, "v3"), (2, "v2"), (1, "v1")]
    assert shell.json("status")["router"]["runs"][-1]["run"] == done["id"]
    assert_one_error_line(shell.run("sink", "--namespace", "nowhere"), 1, "nowhere", "timetier up")


def test_a_round_of_scrubbing_is_started_and_followed_and_restores_what_is_damaged(shell: Shell) -> None:
    assert shell.json("scrub")["nodes"]["cold-0-1"]["scrub"]["state"] == "waiting"
    path = next((shell.folder / "data" / "cold-0-1").glob("disk-*/*.arrow"))
    good = path.read_bytes()
    path.write_bytes(good[:1_000] + bytes([good[1_000] ^ 1]) + good[1_001:])
    (node,) = shell.json("scrub", "--now", "--node", "cold-0-1", "--mb-per-s", "100")["nodes"].values()
    assert (node["scrub"]["last"]["found"], node["scrub"]["last"]["files"]) == (1, 1)
    assert path.read_bytes() == good
    line = next(line for line in told_here(shell, "status").splitlines() if line.startswith("cold-0-1  waiting"))
    assert line.split()[2] == "1"
    assert_one_error_line(shell.run("scrub", "--now", "--node", "cache-0-0"), 1, "cold-0-0, cold-0-1, cold-0-2")


def told_here(shell: Shell, *arguments: str) -> str:
    """What a command prints, in this process, which is connected to Ray already."""
    command, *rest = arguments
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.chdir(shell.folder):
        status = run_command(commands, [command, *shell.options, *rest])
    assert status == 0, out.getvalue()
    return out.getvalue()


def test_explain_and_tiers_say_what_is_where(shell: Shell) -> None:
    for at in range(1, 4):
        shell.quick("put", "looked-at", str(at), f"v{at}")
    shell.quick("get", "looked-at", "2")
    found = shell.json("explain", "moments", "looked-at", "2", "--id", "")
    (item,) = found["items"]
    assert (found["version"], found["proven"]) == (3, True)
    assert (item["tier"], item["state"], item["version"]) == ("storage", "live", 2)
    assert found["next_sink"]["schedule"].startswith("by hand only")
    text = told_here(shell, "explain", "moments", "looked-at")
    assert all(f"storage-0-{replica}" in text for replica in range(3))
    assert_one_error_line(shell.run("explain", "moments", "nobody"), 1, "nobody", "nothing was ever written")

    table = json.loads(told_here(shell, "tiers", "--table", "moments", "--exact", "--json"))["tables"][0]
    assert sum(table["storage_items"]) >= 3
    assert sum(table["reads_day"]) >= 1
    assert (table["data_up_to_age"][-1], table["reads_up_to_age"][-1]) == (1.0, 1.0)
    assert "share of the data" in told_here(shell, "tiers")
    assert "timetier explain" in told_here(shell, "status")


def change_a_row(folder: Path) -> None:
    """Another value in one row of a storage node that does not run."""
    engine = RocksEngine(folder / "engine", create=False, cache_mb=8, write_buffer_mb=4)
    name, row = next((name, row) for name, row in engine.scan(b"R", b"S") if b"moments" in name and b"verified" in name)
    engine.put(name, row[:-1] + bytes((row[-1] ^ 1,)))
    engine.close()


def test_a_replica_that_was_changed_is_named_by_verify_and_mended_by_repair(shell: Shell) -> None:
    for at in range(3):
        shell.quick("put", "verified", str(at), f"v{at}")
    equal = shell.quick("verify")
    assert (equal["ok"], equal["differing"], equal["buckets_compared"]) == (True, 0, equal["buckets"])
    assert equal["timelines"] == equal["equal"] > 0

    stop_cluster(NAMESPACE)
    change_a_row(shell.folder / "data" / "storage-0-1")
    assert shell.json("up")["state"] == "serving"

    found = shell.quick("verify", status=1)
    (difference,) = found["differences"]
    assert (difference["table"], difference["owner"], difference["outliers"]) == ("moments", "verified", [1])
    assert {replica["version"] for replica in difference["replicas"]} == {3}
    digests = [replica["digest"] for replica in difference["replicas"]]
    assert digests[0] == digests[2] != digests[1]

    told = shell.run("repair", "--dry-run")
    assert told.returncode == 1, told.stderr.decode()
    assert "replica 1 differs from 0 and 2: to be mended from replica 0" in told.stdout.decode()
    assert shell.quick("repair")["mended"] == 1
    done = shell.run("verify")
    assert (done.returncode, done.stdout.decode().splitlines()[-1]) == (0, "all replicas are equal")


def test_a_table_that_is_not_configured_can_not_be_verified(shell: Shell) -> None:
    assert_one_error_line(shell.run("verify", "--table", "_none"), 1, "_none", "table")


def test_a_cache_node_is_added_and_removed_by_one_command_each(shell: Shell) -> None:
    found = shell.json("scale", "--cache-nodes", "2")
    assert (found["state"], found["cache_nodes"], found["added"]) == ("serving", 2, ["cache-0-1"])
    done = shell.run("scale", "--cache-nodes", "1")
    assert done.returncode == 0
    assert b"removed: cache-0-1" in done.stdout
    assert_one_error_line(shell.run("scale", "--cache-nodes", "0"), 2, "--cache-nodes", "1<=x<=64")


def test_starting_it_again_is_a_success(shell: Shell) -> None:
    assert shell.json("up")["state"] == "serving"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["put", "alice", "1"], ["VALUE"]),
        (["put", "alice", "soon", "x"], ["soon"]),
        (["delete", "alice"], ["TIMESTAMP"]),
        (["sink", "--before", "soon"], ["soon"]),
        (["load", "missing.csv", "--owner", "a", "--time", "b"], ["missing.csv"]),
        (["put", "alice", "1", os.fsdecode(b"\xff")], ["UTF-8", "--file"]),
    ],
)
def test_a_wrong_call_is_told_in_one_line(tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    assert_one_error_line(offline(tmp_path).run(*arguments), 2, *words)


def test_without_a_cluster_commands_say_how_to_start_one(tmp_path: Path) -> None:
    shell = offline(tmp_path)
    assert_one_error_line(shell.run("get", "alice", "1"), 1, "timetier up", str(tmp_path))
    assert shell.json("status", status=1)["state"] == "down"
    assert shell.json("down") == {"stopped": [], "ray_stopped": False}


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nonsense"])
def test_an_address_where_no_ray_listens_is_told_at_once(tmp_path: Path, address: str) -> None:
    shell = Shell(["--data-dir", str(tmp_path)], environment(RAY_ADDRESS=address), tmp_path)
    assert_one_error_line(shell.run("status", timeout_s=20), 1, "can't connect to Ray", address)


@pytest.mark.parametrize("command", ["up", "demo"])
def test_a_folder_that_can_not_be_written_is_told_in_one_line(tmp_path: Path, command: str) -> None:
    done = subprocess.run(
        [*COMMAND, command, "--data-dir", "/proc/timetier"], capture_output=True, env=environment(), timeout=60
    )
    assert_one_error_line(done, 1, "/proc/timetier", "No such file")


def test_a_wrong_configuration_names_file_field_and_remedy(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("buckets: 1000\n")
    done = offline(tmp_path).run("up", "--config", "bad.yaml")
    assert_one_error_line(done, 1, "bad.yaml", "buckets", "1024")
    assert find_local_ray(tmp_path) is None


def test_the_shipped_map_is_measured() -> None:
    done = subprocess.run([*COMMAND, "map", "--json"], capture_output=True, timeout=60)
    found = json.loads(done.stdout)
    assert done.returncode == 0
    assert found["worst_spread"] <= 0.0077
    assert found["worst_excess_moved"] == 0


def test_a_local_cluster_outlives_its_commands_and_keeps_its_data(tmp_path: Path) -> None:
    shell = offline(tmp_path)
    try:
        assert shell.json("up")["state"] == "serving"
        head = find_local_ray(tmp_path)
        assert head is not None
        assert (tmp_path / "ray" / "token").stat().st_mode & 0o777 == 0o600
        shell.json("put", "alice", "1", "kept")

        ended = shell.json("down")
        assert ended["ray_stopped"]
        assert len(ended["stopped"]) == 8
        assert find_local_ray(tmp_path) is None
        host, _, port = head.address.rpartition(":")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((host, int(port)), timeout=5).close()

        assert shell.json("up")["state"] == "serving"
        assert shell.json("get", "alice", "1")["value"] == "kept"
        shell.json("down")
    finally:
        stop_local_ray(tmp_path)


def test_an_interrupted_command_ends_with_130(tmp_path: Path) -> None:
    reading = [*COMMAND, "put", "alice", "1", "--file", "-", "--data-dir", str(tmp_path), "--table", "t"]
    with subprocess.Popen(
        reading, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    ) as process:
        assert process.stdin is not None
        _until_reads(process.pid)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=30)
    assert process.returncode == 130, told
    assert b"Traceback" not in told


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demonstration_leaves_nothing_behind(tmp_path: Path, number: signal.Signals) -> None:
    # A socket's path is short, so pytest's folder can't be the one for temporary files.
    with tempfile.TemporaryDirectory(prefix="tt", dir="/tmp") as scratch:
        with subprocess.Popen([*COMMAND, "demo"], stderr=subprocess.PIPE, env=environment(TMPDIR=scratch)) as process:
            record = until_there(Path(scratch), "timetier-demo-*/ray/head.json")
            head = json.loads(record.read_bytes())
            process.send_signal(number)
            _, told = process.communicate(timeout=120)
        assert process.returncode == 128 + number, told
        assert b"Traceback" not in told
        assert list(Path(scratch).iterdir()) == []
        assert family(head["pid"], head["started"], f"TMPDIR={head['temp_dir']}/t") == {}


def until_there(folder: Path, pattern: str) -> Path:
    import threading
    import time

    deadline = time.monotonic() + 60
    while not (found := list(folder.glob(pattern))):
        assert time.monotonic() < deadline, f"{pattern} never appears"
        threading.Event().wait(0.02)
    return found[0]


def _until_reads(pid: int) -> None:
    """Wait until the process sleeps in a read of its standard input."""
    import threading
    import time

    deadline = time.monotonic() + 30
    while True:
        call = Path(f"/proc/{pid}/syscall").read_text().split()
        if call[0] == "0" and int(call[1], 16) == 0:
            return
        assert time.monotonic() < deadline, "it never reads"
        threading.Event().wait(0.02)
