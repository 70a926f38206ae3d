"""`benchmarks.cold`: every part works at a small size, and tells what it promises."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from timetier.benchmarks.cold_encodings import CHOSEN, LAYOUTS, Study, as_it_sinks, one_bucket, raw_bytes, rocks_bytes
from timetier.cluster.cold.rows import Rows
from timetier.cluster.keys import item_key

ROOT = Path(__file__).resolve().parent.parent.parent


def test_a_small_run_tells_the_figures_of_the_sink_of_reads_and_of_idle_runs() -> None:
    parts = ["--part", "sink", "--part", "reads", "--part", "rebuild", "--part", "idle"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.cold", "--quick", "--json", *parts],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    sink, reads, idle = report["sink"], report["reads"], report["idle"]
    assert sink["items"] >= 10_000
    assert sink["items_per_s"] > 0
    assert 0 < sink["bytes_per_item"]["cold"] < sink["bytes_per_item"]["raw"]
    assert sink["read_by"]["pyarrow"]["rows"] == sink["items"]
    assert sink["files"]["blocks"] > 0
    for how in ("disk", "page_cache"):
        assert reads["file_reads"][how]["median"] == 1, "a cold read is one read of a file"
        assert 0 < reads["us"][how]["median"] <= reads["us"][how]["p99"]
    assert reads["file_reads"]["decoded"]["median"] == 0
    assert report["rebuild"]["mb_per_s"] > 0
    assert idle["timelines"] == 1_000
    assert idle["idle_s"]["median"] > 0


@pytest.fixture(scope="module")
def rows() -> Rows:
    rng = random.Random(5)
    found = Rows()
    for owner in range(40):
        for at in range(50):
            value = b" ".join(rng.choices([b"modified", b"added", b"deleted"], k=4))
            found.append(b"owner-%02d" % owner, item_key(at * 1_000, b"id%d" % (at % 3)), value, at + 1, at)
    return found


@pytest.mark.parametrize("layout", [None, *LAYOUTS])
def test_every_layout_is_measured_and_is_smaller_than_raw(rows: Rows, layout: str | None, tmp_path: Path) -> None:
    study = Study(rows, tmp_path, seed=1)
    blocks = one_bucket(rows, 64)
    found = study.measure(layout or "plain", CHOSEN, 64, blocks, LAYOUTS[layout] if layout else None)
    assert found.blocks == len(blocks)
    assert 0 < found.ratio < 1
    assert found.bytes_per_item == pytest.approx(found.ratio * raw_bytes(rows) / len(rows), rel=0.05)
    assert found.read_disk_us > 0


def test_blocks_of_a_study_hold_every_row_once(rows: Rows, tmp_path: Path) -> None:
    for blocks in (one_bucket(rows, 64), as_it_sinks(rows, 64, 10_000)):
        held = [(owner, key) for block in blocks for owner, key in zip(block.owners, block.keys, strict=True)]
        assert sorted(held) == list(zip(rows.owners, rows.keys, strict=True))
    assert 0 < rocks_bytes(rows, tmp_path / "engine") < raw_bytes(rows) / len(rows)
