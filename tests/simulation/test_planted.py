"""Planted bugs are found, by the check that guards their rule, and are gone afterwards."""

from __future__ import annotations

import json

import pytest

from .biased import PLANS
from .planted import BUGS
from .planted_runs import SCRIPTS, find, plays_as_written, run_planted
from .planting import Edit, NotPlanted
from .runner import run_plan

QUICK = {
    "answer before fsync": {"answers after the fsync"},
    "one vote suffices": {"chosen by a majority", "acknowledged writes survive"},
    "delta skips an entry": {"cached pages are true", "linearizable"},
    "linked before all copies": {"G8: every item is hot or behind a link"},
}
BY_NAME = {bug.name: bug for bug in BUGS}


@pytest.mark.parametrize("name", QUICK)
def test_a_planted_bug_is_found_by_the_check_of_its_rule(name: str) -> None:
    finding = find(BY_NAME[name], max_seeds=25)
    print(finding)
    assert finding.check in QUICK[name]
    assert not finding.schedule


def test_a_rule_that_seeds_seldom_meet_has_a_directed_schedule() -> None:
    bug = BY_NAME["promise forgotten in a restart"]
    assert all(plays_as_written(script) for script in bug.scripts)
    with bug.planted():
        assert not all(plays_as_written(script) for script in bug.scripts)


def test_every_bug_can_be_planted_and_is_taken_back() -> None:
    assert len(BUGS) == len(BY_NAME) >= 16
    for bug in BUGS:
        edits = [change for change in bug.changes if isinstance(change, Edit)]
        before = [edit.function().__code__ for edit in edits]
        with bug.planted():
            assert all(edit.function().__code__ is not code for edit, code in zip(edits, before, strict=True))
        assert all(edit.function().__code__ is code for edit, code in zip(edits, before, strict=True))
        assert bug.plans in PLANS
        assert all(len(list(SCRIPTS.glob(f"[0-9]*_{script}.txt"))) == 1 for script in bug.scripts)


def test_a_line_that_is_gone_is_an_error() -> None:
    with pytest.raises(NotPlanted), Edit("paxos.core:Core.touch", "no such line", "").planted():
        pass


@pytest.mark.parametrize("name", [name for name in PLANS if name != "everything"])
def test_leaning_plans_violate_nothing(name: str) -> None:
    outcomes = [run_plan(PLANS[name](seed)) for seed in range(3)]
    assert not [violation for outcome in outcomes for violation in outcome.violations]
    assert sum(outcome.operations for outcome in outcomes) > 100


def test_a_bug_that_is_not_found_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_planted(["evicted before the link"], max_seeds=30, base_seed=0, jobs=1) == 0
    assert run_planted(["conditional write shares"], max_seeds=1, base_seed=0, jobs=1) == 1
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1])["missed"] == ["conditional write shares an entry"]
