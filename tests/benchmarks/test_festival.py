"""`benchmarks.festival`: the rates are those of the plan, and a small one runs from start to end."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from timetier.benchmarks.festival import Plan
from timetier.benchmarks.festival_client import due, latency_class, quantile_ms

ROOT = Path(__file__).resolve().parent.parent.parent


def test_reads_that_are_due_are_the_area_under_the_rate() -> None:
    points = [[0.0, 100.0], [10.0, 100.0], [12.0, 500.0], [20.0, 500.0]]
    assert due(points, 0.0) == 0
    assert due(points, 10.0) == 1_000
    assert due(points, 11.0) == pytest.approx(1_000 + (100 + 300) / 2)
    assert due(points, 12.0) == pytest.approx(1_600)
    assert due(points, 99.0) == pytest.approx(1_600 + 8 * 500)


def test_all_clients_together_read_at_the_rate_of_the_plan_and_five_times_it() -> None:
    plan = Plan(rate=900.0, clients=3)
    rates = [rate * plan.clients for _, rate in plan.points()]
    assert rates == [900.0, 900.0, 4_500.0, 4_500.0, 900.0, 900.0]
    times = [at for at, _ in plan.points()]
    assert times == sorted(times)
    assert plan.calm_s + plan.rise_s < plan.add_at_s < plan.end_s


def test_quantiles_are_right_within_five_percent() -> None:
    classes = Counter(latency_class(milliseconds / 1e3) for milliseconds in range(1, 1_001))
    assert quantile_ms(classes, 0.5) == pytest.approx(500, rel=0.06)
    assert quantile_ms(classes, 0.99) == pytest.approx(990, rel=0.06)
    assert quantile_ms(Counter(), 0.99) == 0.0


def test_a_small_festival_adds_a_node_and_fails_no_read(tmp_path: Path) -> None:
    plot = tmp_path / "curves.svg"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.festival", "--quick", "--json", "--plot", str(plot)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert sum(phase["failed"] for phase in report["phases"].values()) == 0, report["errors"]
    assert report["moved"] == 0
    assert report["took_load_after_s"]["published"] is not None
    assert report["took_load_after_s"]["published"] <= 5.0
    assert plot.read_text().startswith("<svg")
