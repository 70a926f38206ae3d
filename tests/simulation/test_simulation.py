"""The simulator itself: it finds planted bugs, finds none that are not there, and repeats a run event by event."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from timetier.cluster.paxos.timeline import Timeline

from .__main__ import main
from .plan import make_plan
from .runner import run_plan
from .shrink import shrink

ROOT = Path(__file__).parents[2]


@pytest.fixture
def forgets_fsync(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A planted bug: promises and acceptances are answered before they are on disk."""

    def touch(self: object, timeline: Timeline) -> int:
        return 0

    monkeypatch.setattr("timetier.cluster.paxos.core.Core.touch", touch)
    yield


def test_a_dozen_seeds_violate_nothing() -> None:
    outcomes = [run_plan(make_plan(seed, 60)) for seed in range(12)]
    for outcome in outcomes:
        print(outcome.seed, outcome.operations, outcome.crashes, outcome.violations)
    assert not [violation for outcome in outcomes for violation in outcome.violations]
    assert sum(outcome.undecided for outcome in outcomes) == 0
    # The runs are worth something: nodes crash, blocks are written, and the checks have looked at them.
    assert sum(outcome.crashes for outcome in outcomes) > 10
    assert sum(outcome.blocks for outcome in outcomes) > 10
    assert sum(outcome.checked_answers for outcome in outcomes) > 500
    assert sum(outcome.checked_versions for outcome in outcomes) > 300
    assert sum(outcome.checked_warm_versions for outcome in outcomes) > 20
    assert sum(outcome.checked_pages for outcome in outcomes) > 50
    assert sum(outcome.checked_evictions for outcome in outcomes) > 50


@pytest.mark.parametrize("seed", [3, 14])
def test_one_seed_is_one_run_also_in_a_process_of_its_own(seed: int) -> None:
    script = (
        "from tests.simulation.plan import make_plan\n"
        "from tests.simulation.runner import run_plan\n"
        f"outcomes = [run_plan(make_plan({seed}, 60)) for _ in range(2)]\n"
        "print(*[f'{outcome.digest} {outcome.steps}' for outcome in outcomes], sep='\\n')\n"
    )
    digests = []
    for _ in range(2):
        ended = subprocess.run(
            [sys.executable, "-c", script],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": "0"},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        digests += ended.stdout.split("\n")[:2]
    assert len(set(digests)) == 1, digests


def test_seeds_differ() -> None:
    assert run_plan(make_plan(1, 30)).digest != run_plan(make_plan(2, 30)).digest


def test_leaving_out_a_part_of_a_plan_keeps_the_rest() -> None:
    plan = make_plan(7, 40)
    smaller = plan.without(operations={3, 5}, faults={0})
    assert [one.number for one in smaller.operations] == [n for n in range(40) if n not in (3, 5)]
    assert set(smaller.operations) < set(plan.operations)
    assert smaller.shape == plan.shape


@pytest.mark.usefixtures("forgets_fsync")
def test_a_planted_bug_is_found_and_shrunk() -> None:
    plan = next(plan for plan in (make_plan(seed, 40) for seed in range(20)) if run_plan(plan).violations)
    told: list[str] = []
    smaller, outcome = shrink(plan, seconds=20, tell=told.append)
    assert outcome is not None and outcome.violations[0].guarantee == "answers after the fsync"
    assert len(smaller.operations) < 10 and len(smaller.faults) <= len(plan.faults)
    assert told


def test_a_plan_without_violation_is_not_shrunk() -> None:
    plan = make_plan(1, 20)
    assert shrink(plan) == (plan, None)


def test_the_command_ends_with_one_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "3", "--base-seed", "40", "--operations", "30"]) == 0
    lines = capsys.readouterr().out.splitlines()
    figures = json.loads(lines[-1])
    assert figures["runs"] == 3 and figures["violations"] == 0 and figures["base_seed"] == 40
    assert figures["steps"] > 1_000 and figures["steps_per_s"] > 0 and figures["operations"] >= 90


@pytest.mark.usefixtures("forgets_fsync")
def test_the_command_names_failing_seeds_and_how_to_replay_them(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["--seeds", "2", "--base-seed", "40", "--operations", "30"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1])["failed_runs"] == 2
    failure = next(line for line in lines if line.startswith("seed 40 "))
    assert "answers after the fsync" in failure
    assert failure.endswith("python -m tests.simulation --replay 40 --operations 30")
    log = tmp_path / "log"
    assert main(["--replay", "40", "--operations", "30", "--log", str(log)]) == 1
    text = log.read_text()
    assert "VIOLATION" in text and "Accepted" in text
    assert capsys.readouterr().out.startswith("seed 40: ")
