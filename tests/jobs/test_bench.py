"""Benchmarks: what they write, time and count; and `timetier bench` on a cluster of real actors."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from timetier import connect
from timetier.actors.launch import start_cluster, stop_cluster
from timetier.actors.local_ray import LocalRay
from timetier.actors.processes import family
from timetier.cluster.config import load_config
from timetier.jobs.bench_data import Dataset
from timetier.jobs.bench_mix import READS_PER_WRITE, Mix
from timetier.jobs.bench_report import figures, merging
from timetier.jobs.bench_workloads import WORKLOADS, Bench, Timing, check, check_pages, load
from timetier.jobs.cli_common import run_command
from timetier.jobs.command_line import commands

ROOT = Path(__file__).resolve().parent.parent.parent
NAMESPACE = "test-bench"
WAIT = threading.Event()  # never set: its `wait` is the pause between two looks
DATA = Dataset("data-", 40, 1_000_000, 10)
NEW = Dataset("new-", 1_000, 1_000_000, 10, per_owner=1)
MIX = Dataset("mix-", 10, 1_000_000, 10)


class DictSubject:
    """A store in memory; `blocking` says how it is called. It forgets `lost` items, and counts calls."""

    def __init__(self, *, blocking: bool, lost: int = 0) -> None:
        self.blocking = blocking
        self.items: dict[tuple[str, int], bytes] = {}
        self.lost = lost
        self.most_at_once = self.at_once = 0

    def key(self, owner: str, timestamp: int) -> tuple[str, int]:
        return owner, timestamp

    def write(self, owner: str, timestamp: int, value: bytes) -> tuple[str, int, bytes]:
        return owner, timestamp, value

    def get(self, key: Any) -> Any:
        return self._give([self.items.get(key)])

    def get_many(self, keys: list[Any]) -> Any:
        return self._give([self.items.get(key) for key in keys])

    def put(self, write: Any) -> Any:
        return self.put_many([write])

    def put_many(self, writes: list[Any]) -> Any:
        for owner, timestamp, value in writes:
            assert (owner, timestamp) not in self.items, "an item is written once"
            if self.lost:
                self.lost -= 1
                continue
            self.items[owner, timestamp] = value
        return self._give(None)

    def page(self, owner: str, limit: int) -> Any:
        return self.pages([owner], limit)

    def pages(self, owners: list[str], limit: int) -> Any:
        found = []
        for wanted in owners:
            mine = sorted(((at, value) for (owner, at), value in self.items.items() if owner == wanted), reverse=True)
            found.append([value for _, value in mine[:limit]])
        return self._give(found)

    def values(self, answer: Any) -> list[bytes | None]:
        found: list[bytes | None] = answer
        return found

    def page_values(self, answer: Any) -> list[list[bytes]]:
        found: list[list[bytes]] = answer
        return found

    def _give(self, answer: Any) -> Any:
        return answer if self.blocking else self._later(answer)

    async def _later(self, answer: Any) -> Any:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(0)
        self.at_once -= 1
        return answer


def loaded(subject: DictSubject, seed: int = 0) -> Bench:
    for data in (DATA, NEW, MIX):
        asyncio.run(load(subject, data))
    return Bench(lambda _: subject, reads=DATA, writes=NEW, mix=MIX, seed=seed)


def test_the_values_of_a_data_set_tell_their_keys_apart() -> None:
    items = [item for batch in DATA.loads(100) for item in batch]
    assert (
        len(items) == len(DATA) == len({(owner, at) for owner, at, _ in items}) == len({value for *_, value in items})
    )
    assert {len(value) for *_, value in items} == {200}
    assert [(owner, at) for owner, at, _ in items] == [DATA.key(number) for number in range(len(DATA))]


@pytest.mark.parametrize("owners", [1_000, 1_001, 1_024])
def test_a_batch_of_new_items_has_as_many_owners_as_items(owners: int) -> None:
    data = Dataset("x-", owners, 0, 1)
    for batch in data.new_items(np.random.default_rng(owners), 7, 20, 1_000):
        assert len({owner for owner, *_ in batch}) == 1_000


def test_a_mix_reads_only_what_was_written_and_new_items_most() -> None:
    rng = np.random.default_rng(3)
    mix = Mix(MIX, rng)
    known = {(owner, at) for batch in MIX.loads(100) for owner, at, _ in batch}
    first_time, reads, writes, newest = 10_000_000, 0, 0, 0
    for done in (9_000, 123, 7_000):
        steps = mix.steps(10_000, first_time)
        for step in steps[:done]:
            if step.write is not None:
                writes += 1
                known.add(step.write[:2])
            else:
                assert step.key in known
                reads += 1
                newest += step.key[1] >= 10_000_000
        mix.did(steps[:done])
        first_time += len(steps)
    assert abs(reads / writes - READS_PER_WRITE) < 5
    assert newest > reads / 2, "with ten owners most of the newest items are those of the mix itself"


@pytest.mark.parametrize("blocking", [False, True])
@pytest.mark.parametrize("name", WORKLOADS)
def test_every_workload_does_its_calls_and_is_timed(name: str, blocking: bool) -> None:
    workload = WORKLOADS[name]
    subject = DictSubject(blocking=blocking)
    bench = loaded(subject)
    before = len(subject.items)
    for _ in range(2):
        timing = asyncio.run(bench.slice(workload, 0.02))
        assert timing.items == timing.calls * workload.per_call > 0
        assert 0 < timing.latency_us["p1"] <= timing.latency_us["p50"] <= timing.latency_us["p99"]
        assert timing.cpu_s["client"] > 0
    assert (len(subject.items) > before) == (workload.kind in ("put", "mix"))
    if not blocking:
        assert subject.most_at_once == workload.callers


def test_a_call_that_fails_in_a_thread_fails_the_slice() -> None:
    subject = DictSubject(blocking=True)
    bench = loaded(subject)
    subject.get = None  # type: ignore[method-assign,assignment]
    with pytest.raises(TypeError):
        asyncio.run(bench.slice(WORKLOADS["get1x8"], 0.02))


def test_items_that_a_store_has_lost_are_found() -> None:
    rng = np.random.default_rng(0)
    for lost in (0, 1, 3):
        subject = DictSubject(blocking=False, lost=lost)
        asyncio.run(load(subject, DATA))
        wrong = asyncio.run(check(subject, DATA, rng))
        assert wrong >= lost
        assert (wrong == 0) == (lost == 0)
    subject = DictSubject(blocking=False)
    asyncio.run(load(subject, DATA))
    assert asyncio.run(check_pages(subject, DATA, rng)) == 0
    for owner, at in [key for key in subject.items if key[1] == DATA.base + 24 * DATA.step]:
        del subject.items[owner, at]
    assert asyncio.run(check_pages(subject, DATA, rng)) > 0


def test_figures_are_medians_with_the_least_and_the_most() -> None:
    made = [
        Timing(10, 100, seconds, {"p50": seconds * 1e5, "p99": 9.0}, {"client": 0.001, "servers": 0.003})
        for seconds in (0.5, 1.0, 0.25)
    ]
    found = figures(made)
    assert found["per_s"] == {"median": 200, "min": 100, "max": 400}
    assert found["p50_us"] == {"median": 50_000, "min": 25_000, "max": 100_000}
    assert found["cpu_us"]["median"] == 40
    assert found["cpu_us_by_part"] == {"client": 10, "servers": 30}


def test_merging_counts_what_a_batch_costs_a_replica() -> None:
    first = {"fsyncs": 10.0, "write_batches": 5.0, "items_written": 100.0, "peer_batches": 7.0}
    then = {"fsyncs": 40.0, "write_batches": 15.0, "items_written": 1_100.0, "peer_batches": 47.0, "prepares": 1.0}
    before, after = ({f"storage-0-{replica}": figures for replica in range(3)} for figures in (first, then))
    assert merging(before, after, replicas=3) == {
        "items_per_batch": 100.0,
        "fsyncs_per_batch": 1.0,
        "messages_per_batch": 1.0,
        "prepares_per_1000": 1.0,
    }
    with pytest.raises(KeyError):
        merging(before, {"storage-0-0": {}}, replicas=3)


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def cluster(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its namespace. Only the table `scratch` is configured."""
    config = load_config(None, data_dir=tmp_path_factory.mktemp("bench"))
    tables = {"scratch": config.default_table}
    start_cluster(
        config.model_copy(update={"namespace": NAMESPACE, "buckets": 64, "tables": tables, "default_table": None})
    )
    yield NAMESPACE
    stop_cluster(NAMESPACE)


def bench(local_ray: LocalRay, tmp_path: Path, *arguments: str) -> tuple[int, str, str]:
    """Status, stdout and stderr of `timetier bench` in this process, which is connected to Ray already."""
    out, errors = io.StringIO(), io.StringIO()
    where = ["--address", local_ray.address, "--namespace", NAMESPACE, "--data-dir", str(tmp_path)]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors), contextlib.chdir(tmp_path):
        status = run_command(commands, ["bench", *where, *arguments])
    return status, out.getvalue(), errors.getvalue()


def test_a_cluster_is_measured_and_nothing_stays_in_its_table(
    cluster: str, local_ray: LocalRay, tmp_path: Path
) -> None:
    arguments = ["--table", "scratch", "--items", "1000", "--seconds", "0.05", "--repeats", "2", "--json"]
    status, out, errors = bench(local_ray, tmp_path, *arguments)
    assert status == 0, errors
    found = json.loads(out)
    assert list(found["workloads"]) == list(WORKLOADS)
    for name, one in found["workloads"].items():
        assert len(one["samples"]) == 2, name
        assert 0 < one["per_s"]["min"] <= one["per_s"]["median"] <= one["per_s"]["max"]
        assert 0 < one["p50_us"]["median"] <= one["p99_us"]["max"]
    assert list(found["merging"]) == [name for name, workload in WORKLOADS.items() if workload.kind in ("put", "mix")]
    assert found["merging"]["put1000"]["items_per_batch"] > 1
    assert found["merging"]["put1"]["fsyncs_per_batch"] > 0
    with connect(local_ray.address, namespace=NAMESPACE) as store:
        table = store.table("scratch")
        owners = [f"{found['prefix']}-{kind}-{number:08d}" for kind in "rwm" for number in range(1_000)]
        pages = [page for first in range(0, len(owners), 100) for page in table.timelines(owners[first : first + 100])]
        assert [page.items for page in pages] == [[]] * len(owners)
        assert any(page.version for page in pages), "the owners are those that were written to"


def test_one_workload_is_shown_as_a_table(cluster: str, local_ray: LocalRay, tmp_path: Path) -> None:
    arguments = ["--table", "scratch", "--items", "100", "--seconds", "0.02", "--repeats", "1", "--only", "put1000"]
    status, out, errors = bench(local_ray, tmp_path, *arguments)
    assert status == 0, errors
    assert "writes, 1,000 a call" in out
    assert "fsyncs of a replica" in out


def test_a_table_that_is_not_configured_is_told_in_one_line(cluster: str, local_ray: LocalRay, tmp_path: Path) -> None:
    status, out, errors = bench(local_ray, tmp_path)
    assert (status, out) == (1, "")
    (line,) = [line for line in errors.splitlines() if line.startswith("timetier:")]
    assert "bench" in line
    assert "scratch" in line


def test_a_workload_that_does_not_exist_is_told_with_those_that_do(tmp_path: Path, local_ray: LocalRay) -> None:
    status, _, errors = bench(local_ray, tmp_path, "--only", "fly")
    assert status == 2
    assert "fly" in errors
    assert "get1000" in errors


# ---------------------------------------------------------------- beside the peers


def path_without_peers(folder: Path) -> str:
    """A PATH with every program there is, but the servers of the peers: Ray needs some."""
    folder.mkdir()
    for place in os.environ["PATH"].split(os.pathsep):
        for program in Path(place).iterdir() if Path(place).is_dir() else ():
            if program.name not in ("redis-server", "etcd") and not (folder / program.name).is_symlink():
                (folder / program.name).symlink_to(program)
    return str(folder)


def test_without_the_peers_the_comparison_says_which_columns_are_missing_and_goes_on(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": path_without_peers(tmp_path / "bin")}
    plot = tmp_path / "plot.svg"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.compare", "--quick", "--json", "--plot", str(plot), "--no-keep-awake"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr.decode()
    report = json.loads(done.stdout)
    assert "apt-get install redis-server" in report["missing"]["redis"]
    assert "apt-get install etcd-server" in report["missing"]["etcd"]
    assert "redis-server" in done.stderr.decode()
    assert list(report["figures"]) == list(WORKLOADS)
    assert all(set(found) == {"timetier"} for found in report["figures"].values())
    assert {"disk", "raw_disk", "decoded"} <= set(report["cold"]["us"])
    assert report["memory"]["timetier"]["after"] > 0
    met = {aim["aim"]: aim["met"] for aim in report["aims"]}
    assert met["Prepares for 1,000 writes"] is not None
    assert met["newest 20, 50 timelines a call, to Redis piped"] is None
    assert plot.read_text().startswith("<svg")


def test_an_interrupted_comparison_leaves_nothing_behind() -> None:
    # A socket's path is short, so pytest's folder can't be the one for temporary files.
    with tempfile.TemporaryDirectory(prefix="tt", dir="/tmp") as scratch:
        command = [sys.executable, "-m", "benchmarks.compare", "--system", "timetier"]
        environment = {**os.environ, "TMPDIR": scratch}
        with subprocess.Popen(command, stderr=subprocess.PIPE, cwd=ROOT, env=environment) as process:
            head = json.loads(until_there(Path(scratch), "tt-compare-*/timetier/ray/head.json").read_bytes())
            process.send_signal(signal.SIGINT)
            _, told = process.communicate(timeout=120)
        assert process.returncode == 130, told
        assert b"Traceback" not in told
        assert list(Path(scratch).iterdir()) == []
        assert family(head["pid"], head["started"], f"TMPDIR={head['temp_dir']}/t") == {}


def until_there(folder: Path, pattern: str) -> Path:
    deadline = time.monotonic() + 60
    while not (found := list(folder.glob(pattern))):
        assert time.monotonic() < deadline, f"{pattern} never appears"
        WAIT.wait(0.02)
    return found[0]


def test_a_comparison_of_nothing_but_missing_peers_fails(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.compare", "--system", "redis", "--system", "etcd"],
        cwd=ROOT,
        env={**os.environ, "PATH": str(tmp_path)},
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stdout == b""
    assert b"nothing to measure" in done.stderr
    assert b"Traceback" not in done.stderr


def made_report(rates: dict[str, float]) -> dict[str, Any]:
    """Three repeats of every workload with these rates; latencies are what one item takes."""
    samples = [
        {
            "workload": name,
            "system": system,
            "repeat": repeat,
            "items_per_s": rate * factor,
            "latency_us": {"p50": 1e6 / rate, "p99": 2e6 / rate},
        }
        for name in WORKLOADS
        for system, rate in rates.items()
        for repeat, factor in enumerate((1.0, 0.5, 2.0))
    ]
    timings = {
        system: [
            Timing(100, 100, 100 / rate / factor, {"p50": 1e6 / rate, "p99": 2e6 / rate}, {"client": 0.01})
            for factor in (1.0, 0.5, 2.0)
        ]
        for system, rate in rates.items()
    }
    return {
        "figures": {name: {system: figures(found) for system, found in timings.items()} for name in WORKLOADS},
        "samples": samples,
        "options": {"repeats": 3, "seconds": 1.0, "items": 200_000},
        "machine": {"cores": 2, "cpu": "fast", "file_system": "ext4", "load_before": 0.1},
        "cores_kept_awake": 2,
        "idle_cores": dict.fromkeys(rates, 0.01),
        "cold": {
            "blocks": 2,
            "rows_a_block": 4_096,
            "bytes_a_block": 700_000,
            "us": {"disk": {"median": 900, "min": 800, "max": 1_000}},
            "samples": {"disk": [800.0, 1_000.0], "raw_disk": [400.0, 600.0]},
        },
        "memory": {
            "items": 1_000,
            "timetier": {"before": 0, "after": 80_000, "bytes_an_item": 80},
            "redis": {"before": 0, "after": 300_000, "bytes_an_item": 300},
        },
        "merging": {"put1000": {"fsyncs_per_batch": {"median": 0.8, "min": 0.7, "max": 1.2}}},
        "missing": {"etcd": "`apt-get install etcd-server`"},
        "errors": ["redis, slice: it failed"],
    }


def printed(module: str, tmp_path: Path, report: dict[str, Any], *arguments: str) -> str:
    """What `python -m MODULE report.json ...` prints."""
    (tmp_path / "report.json").write_text(json.dumps(report))
    command = [sys.executable, "-m", module, str(tmp_path / "report.json"), *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, timeout=60, capture_output=True, text=True).stdout


def test_a_report_says_which_aims_are_met_missed_and_not_measured(tmp_path: Path) -> None:
    told = printed("benchmarks.tables", tmp_path, made_report({"timetier": 3_000.0, "redis": 1_000.0}))
    lines = {line.split("  ")[0].strip(): line for line in told[told.index("\naims\n") :].splitlines()}
    for title in (
        "reads, 1,000 a call, to Redis MGET",
        "cold read from disk, p50, to pread and decode",
        "fsyncs of a replica for a batch of writes",
    ):
        assert lines[title].endswith(" met"), told
        assert not lines[title].endswith("not met")
    assert "3.00x" in lines["reads, 1,000 a call, to Redis MGET"]
    assert "1.80x" in lines["cold read from disk, p50, to pread and decode"]
    for title in ("single strong read, p50", "memory added by an item, storage node to Redis"):
        assert lines[title].endswith("not met"), told
    assert "not measured" in lines["single durable write, p50, to etcd"]
    assert "not measured" in lines["Prepares for 1,000 writes"]
    assert "3,000 (1,500 - 6,000)" in told
    assert "etcd is missing: `apt-get install etcd-server`" in told
    assert "failed: redis, slice: it failed" in told


def test_a_report_is_drawn_the_same_each_time(tmp_path: Path) -> None:
    report = made_report({"timetier": 3_000.0, "redis": 1_000.0})
    drawn = []
    for name in ("a.svg", "b.svg"):
        printed("benchmarks.plot", tmp_path, report, str(tmp_path / name))
        drawn.append((tmp_path / name).read_bytes())
    assert drawn[0] == drawn[1]
    assert drawn[0].count(b"<polyline") == 4
    assert b"prefers-color-scheme: dark" in drawn[0]
