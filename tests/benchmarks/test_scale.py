"""`benchmarks.scale`: what it writes is what a group would have written, and all of it works at a small size."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from timetier.benchmarks.bulk import fill
from timetier.benchmarks.nodes import NodeProcesses, open_store, topology_in
from timetier.benchmarks.scale import TABLE, Shape, make_config
from timetier.cluster.drive import drive
from timetier.cluster.verifying import VerifySettings, verify

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """Sockets lie in it, whose paths must be short."""
    with tempfile.TemporaryDirectory(prefix="sc") as folder:
        yield Path(folder)


def test_bulk_filled_replicas_are_alike_and_serve_every_item_and_take_writes(short_folder: Path) -> None:
    shape = Shape(timelines=60, items=60 * 300)
    config = make_config(short_folder, shape)
    topology = topology_in(short_folder, config)
    data = shape.data()
    fill(short_folder, topology, config, TABLE, data, replicas=3)

    async def work(nodes: NodeProcesses) -> None:
        async with open_store(nodes.folder, nodes.config) as store:
            table = store.table(TABLE)
            page = await table.timeline(data.names[7], limit=300)
            expected = [data.write(*data.key(7 * 300 + at)) for at in range(299, -1, -1)]
            assert [(item.timestamp, item.value) for item in page.items] == [(when, v) for _, when, v in expected]
            assert page.version == 300
            assert await table.put(data.names[7], data.base + 1, b"late") == 301
            report = await drive(verify(store.view.routing, settings=VerifySettings()), store.carrier)
            assert report.ok
            assert report.timelines == 60

    with NodeProcesses(short_folder, config) as nodes:
        asyncio.run(work(nodes))


def test_a_small_run_measures_every_configuration_and_every_start() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.scale", "--quick", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert len(report["shapes"]) == 2
    for shape in report["shapes"]:
        assert set(shape["workloads"]) == {"get1000x4", "get1x64", "page50", "put1000", "cold put"}
        assert all(found["per_s"] > 0 and found["cpu_us"] > 0 for found in shape["workloads"].values())
    assert [start["items"] for start in report["starts"]] == [0, 20_000, 40_000]
