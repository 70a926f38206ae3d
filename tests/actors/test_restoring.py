"""A restore from a backup, as the Router remembers it."""

from __future__ import annotations

from pathlib import Path

import pytest
from timetier.actors.router_state import RouterState
from timetier.cluster.errors import InvalidRequest
from timetier.cluster.topology import BEGINNING, COPYING, Restoring


def test_a_restarted_router_keeps_the_cluster_closed_until_the_restore_is_over(tmp_path: Path) -> None:
    state = RouterState.open(tmp_path, "ns", None)
    epoch = state.epoch
    assert state.set_restoring("night-1", BEGINNING)
    assert state.set_restoring("night-1", COPYING)
    assert not state.set_restoring("night-1", BEGINNING), "a restore never goes back to its beginning"
    again = RouterState.open(tmp_path, "ns", None)
    assert again.topology().restoring == Restoring("night-1", COPYING)
    assert again.epoch == epoch + 2, "everybody hears of each change"
    assert again.set_restoring("night-1", "")
    assert RouterState.open(tmp_path, "ns", None).topology().restoring is None


def test_one_restore_at_a_time_and_in_order(tmp_path: Path) -> None:
    state = RouterState.open(tmp_path, "ns", None)
    with pytest.raises(InvalidRequest, match="can't go on so"):
        state.set_restoring("night-1", COPYING)
    state.set_restoring("night-1", BEGINNING)
    for phase in (BEGINNING, COPYING, ""):
        with pytest.raises(InvalidRequest, match="night-1 is under way"):
            state.set_restoring("night-2", phase)
    with pytest.raises(InvalidRequest, match="phase='half'"):
        state.set_restoring("night-1", "half")
    assert state.topology().restoring == Restoring("night-1", BEGINNING)
