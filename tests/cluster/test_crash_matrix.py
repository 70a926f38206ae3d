"""A run of the sink may end between any two of its steps, or go on when it should not: nothing is lost or left over."""

from __future__ import annotations

from crash_kills import KILLS, kill_matrix
from crash_steps import ACCIDENTS, ENDED, crash_matrix


def test_after_a_crash_at_any_step_everything_is_readable_and_the_next_run_leaves_no_garbage() -> None:
    rows = list(crash_matrix(every=8))
    assert [row for row in rows if row.wrong] == []
    ended = [row for row in rows if row.accident == ENDED]
    assert len(ended) > 30, "every step of the run"
    assert {row.accident for row in rows} == set(ACCIDENTS)
    done = {row.what for row in rows}
    assert {"write the record", "check the epoch", "write links", "fence buckets", "remove files"} <= done
    assert {f"copy to cold-0-{replica}, last piece" for replica in range(3)} <= done
    orphans = [row for row in ended if row.orphans]
    assert orphans, "some crashes leave files that were never linked, and the next run counts them"
    assert all(row.orphans <= row.left for row in orphans)
    assert all(row.fenced for row in rows if row.accident == "paused" and row.step > 2)


def test_a_sink_that_is_killed_at_any_named_step_loses_nothing_and_the_next_one_cleans_up() -> None:
    rows = list(kill_matrix())
    assert [row for row in rows if row.wrong] == []
    assert [(row.what, row.when) for row in rows if row.killed] == KILLS
    assert sum(row.orphans for row in rows) >= 3
    assert all(row.rows for row in rows if row.what in ("check the epoch", "copy to cold-0-0"))
