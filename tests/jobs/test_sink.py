"""The sink's program: what it is told on its command line becomes what is sunk."""

from __future__ import annotations

import json

import msgspec
import pytest
from click.testing import CliRunner
from cold_model import POLICY, topology
from timetier.cluster.cold.sinking import CutOffs
from timetier.cluster.errors import InvalidRequest
from timetier.cluster.keys import MAX_TIMESTAMP
from timetier.jobs.sink import main, run_name, tables_to_sink


def test_tables_sink_by_their_own_rule_or_by_a_cut_off_that_is_given() -> None:
    shape = topology()
    assert tables_to_sink(shape, (), None, False, 1_000_000_000) == []
    (task,) = tables_to_sink(shape, ("t",), None, False, 1_000_000_000)
    assert (task.table, task.policy, task.cut_offs) == (b"t", POLICY, CutOffs(900, 900_000_000))
    (task,) = tables_to_sink(shape, ("t",), 77, True, 1_000_000_000)
    assert task.cut_offs == CutOffs(77, MAX_TIMESTAMP)
    with pytest.raises(InvalidRequest, match="known: t"):
        tables_to_sink(shape, ("other",), None, False, 0)
    internal = msgspec.structs.replace(shape, default_table=POLICY)
    assert tables_to_sink(internal, ("other",), None, False, 0)
    with pytest.raises(InvalidRequest, match="_timetier"):
        tables_to_sink(internal, ("_timetier",), None, False, 0)


def test_rows_wait_by_the_standing_rule_and_never_when_a_cut_off_is_given_by_hand() -> None:
    shape, now_us = topology(), 1_000_000_000
    (task,) = tables_to_sink(shape, ("t",), None, False, now_us, 60.0)
    assert task.patience == CutOffs(840, 840_000_000)
    for before, by_event_time in ((77, False), (None, True)):
        (task,) = tables_to_sink(shape, ("t",), before, by_event_time, now_us, 60.0)
        assert task.patience is None
    assert tables_to_sink(shape, ("t",), None, False, now_us)[0].patience is None


def test_a_run_is_named_like_its_ray_job(monkeypatch: pytest.MonkeyPatch) -> None:
    job = {"metadata": {"job_submission_id": "raysubmit_Ab1"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    assert run_name() == "raysubmit_Ab1"
    for other in ("", "{}", "no json", '{"metadata": null}'):
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", other)
        assert run_name().startswith("sink-")
    assert run_name() != run_name()


def test_the_program_explains_its_options() -> None:
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0
    for option in ("--namespace", "--table", "--before", "--by-event-time", "--run", "--check-files"):
        assert option in result.output
