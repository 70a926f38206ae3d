"""Folders that are lost, damaged or put back at the worst moments: schedules that random faults seldom meet."""

from __future__ import annotations

from dataclasses import replace

import pytest
from timetier.cluster.paxos.replica import LEARNING

from .plan import Plan, make_plan
from .workload import Workload
from .world import World

NODE = "storage-0-1"

# Coroutines of crashed lives complain when they are collected.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


class Lab:
    """A cluster without faults, with some writes in it."""

    def __init__(self, seed: int) -> None:
        plan = make_plan(seed, 40)
        shape = replace(plan.shape, groups=1, caches=1, dropped=0.0, doubled=0.0, straggling=0.0)
        self.violations: list[str] = []
        self.world = World(Plan(seed, shape, plan.operations), lambda *how: self.violations.append(": ".join(how)))
        self.world.start_all()
        self.until_ready()
        workload = Workload(self.world)
        workload.begin()
        assert self.world.loop.run(lambda: workload.done, 100.0)
        self.disk = self.world.nodes[NODE].disk

    def until_ready(self) -> None:
        """Run until every node serves and votes."""
        assert self.world.loop.run(lambda: not self.world.unready(), 60.0), self.world.unready()

    def restart(self) -> None:
        """Crash the node and start it again."""
        self.world.crash(NODE)
        self.world.start(NODE)

    def until_learning(self) -> None:
        """Run until the node has begun to copy under a new incarnation."""

        def learns() -> bool:
            found = self.world.replica(NODE)
            return found is not None and found[0].state == LEARNING and bool(self.disk.engine.synced)

        assert self.world.loop.run(learns, 60.0), self.world.unready()

    def close(self) -> None:
        """Nothing was violated meanwhile."""
        assert self.world.loop.run(lambda: not self.world.unsettled(), 60.0), self.world.unsettled()
        self.world.watch.replicas_are_equal()
        assert not self.violations
        self.world.close()


def test_a_learners_folder_from_the_past_is_found_out_and_copied_again() -> None:
    for seed in range(3):
        lab = Lab(seed)
        lab.world.crash(NODE)
        lab.disk.wipe()
        lab.world.start(NODE)
        lab.until_learning()
        saved = lab.disk.copy_folder()
        assert saved[1] is not None and saved[1]["learning"]
        lab.until_ready()
        lab.restart()
        lab.until_ready()
        lab.world.crash(NODE)
        lab.disk.put_folder(saved)
        lab.world.start(NODE)
        lab.until_ready()
        assert lab.disk.identity is not None and lab.disk.identity["incarnation"] == 3
        lab.close()


def test_a_learner_that_is_wiped_or_damaged_begins_again() -> None:
    for seed in range(3):
        lab = Lab(seed)
        for damage in ("wipe", "flip log", "flip row"):
            lab.world.crash(NODE)
            lab.disk.wipe()
            lab.world.start(NODE)
            lab.until_learning()
            lab.world.crash(NODE)
            if damage == "wipe":
                lab.disk.wipe()
            elif damage == "flip log":
                lab.disk.engine.damaged = True
            else:
                lab.disk.engine.flip_row_bit(lab.disk.random)
            lab.world.start(NODE)
            lab.until_ready()
        lab.close()


def test_a_row_that_is_damaged_where_a_life_begins_to_read_is_copied_from_the_peers() -> None:
    lab = Lab(4)
    lab.world.crash(NODE)
    lab.disk.engine.damaged_rows.update(lab.disk.engine.synced)
    lab.world.start(NODE)
    lab.until_ready()
    assert lab.disk.identity is not None and lab.disk.identity["incarnation"] == 2
    lab.close()
