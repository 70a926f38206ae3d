"""One run: a plan goes in, violations come out."""

from __future__ import annotations

import gc
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from .faults import Faults
from .linearizability import check_history
from .loop import Stuck
from .plan import Plan
from .trace import TraceLog
from .workload import Workload
from .world import World

CHECK_EFFORT = 1_000_000  # configurations of one timeline, before the checker gives up on it
MAX_VIOLATIONS = 5  # of one run; what comes after the first is mostly its consequence
START_S = 30.0
WORK_S = 90.0
SETTLE_S = 60.0
AUDIT_S = 60.0
LAST_SINKS = 6


@dataclass
class Violation:
    """A guarantee that did not hold."""

    guarantee: str
    how: str
    at_s: float

    def __str__(self) -> str:
        return f"{self.guarantee}: {self.how} (at {self.at_s:.3f} s)"


@dataclass
class Outcome:
    """What one run has shown. `digest`: of all its events; `lines`: the log, if it was asked for."""

    seed: int
    violations: list[Violation] = field(default_factory=list)
    undecided: int = 0
    digest: str = ""
    steps: int = 0
    events: int = 0
    frames: int = 0
    operations: int = 0
    refused: int = 0
    unknown: int = 0
    faults: int = 0
    crashes: int = 0
    blocks: int = 0
    checked_pages: int = 0
    checked_evictions: int = 0
    checked_answers: int = 0
    checked_versions: int = 0
    checked_warm_versions: int = 0
    virtual_s: float = 0.0
    seconds: float = 0.0
    cpu_s: float = 0.0
    counters: dict[str, int] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)


def run_plan(plan: Plan, *, verbose: bool = False, patch: Callable[[], None] | None = None) -> Outcome:
    """Run a plan. `patch` is applied before the cluster is made; it is not taken back."""
    outcome = Outcome(plan.seed)
    began, cpu_began = time.perf_counter(), time.process_time()
    if patch is not None:
        patch()
    with _quiet():
        _Run(plan, outcome, verbose).go()
    outcome.seconds = time.perf_counter() - began
    outcome.cpu_s = time.process_time() - cpu_began
    return outcome


class _Run:
    def __init__(self, plan: Plan, outcome: Outcome, verbose: bool) -> None:
        self.outcome = outcome
        self.plan = plan
        self.world = World(plan, self.report, verbose=verbose)
        self.workload = Workload(self.world)
        self.faults = Faults(self.world, self.workload)

    def report(self, guarantee: str, how: str) -> None:
        """Take down a violation."""
        self.world.trace.note("VIOLATION", f"{guarantee}: {how}")
        if len(self.outcome.violations) < MAX_VIOLATIONS:
            self.outcome.violations.append(Violation(guarantee, how, self.world.loop.now))

    def go(self) -> None:
        """Run to the end, or to the first violation that makes going on useless."""
        log = TraceLog(self.world.trace)
        logging.getLogger("timetier").addHandler(log)
        try:
            self._phases()
        except Stuck as error:
            self.report("everything completes", str(error))
        finally:
            logging.getLogger("timetier").removeHandler(log)
            self.world.close()
            self._figures()

    def _phases(self) -> None:
        world, workload = self.world, self.workload
        world.start_all()
        if not world.loop.run(lambda: not world.unready(), START_S):
            self.report("everything completes", f"after {START_S:g} s: {world.unready()}")
            return
        world.trace.note("world", "all nodes serve")
        began = world.loop.now
        workload.begin()
        self.faults.begin()
        if not world.loop.run(lambda: self._given_up() or workload.done, WORK_S):
            self.report("everything completes", f"clients or sinks did not end within {WORK_S:g} s")
        rest_s = began + max([0.0, *(fault.at_s for fault in self.plan.faults)]) - world.loop.now
        if rest_s > 0:
            world.loop.run(self._given_up, rest_s + 0.001)
        self.faults.end()
        if not self._given_up():
            self._settle()
        self._check_history()

    def _given_up(self) -> bool:
        return len(self.outcome.violations) >= MAX_VIOLATIONS

    def _settle(self) -> None:
        """Without faults everything must come to rest, be readable and be equal everywhere."""
        world = self.world
        if not world.loop.run(lambda: self._given_up() or (self.workload.done and not world.unready()), SETTLE_S):
            self.report("everything completes", f"{SETTLE_S:g} s after the last fault: {world.unready()}")
            return
        if not self._collect():
            return
        audit = self.workload.audit(self.plan.shape.owners)
        if not world.loop.run(audit.done, AUDIT_S) or audit.exception() or not audit.result():
            why = audit.exception() if audit.done() else f"no end within {AUDIT_S:g} s"
            self.report("everything completes", f"writes or reads fail although all faults are over ({why})")
            return
        if not world.loop.run(lambda: not world.unsettled(), SETTLE_S):
            self.report("everything completes", f"{SETTLE_S:g} s after the last write: {world.unsettled()}")
            return
        world.watch.early_pages()
        world.watch.all_links()
        world.watch.replicas_are_equal()
        world.watch.expired_and_wiped_rows_are_gone(sunk=False)
        if not self._given_up() and any(fault.kind == "sink" for fault in self.plan.faults):
            self._sink_once_more()

    def _sink_once_more(self) -> None:
        """When all replicas have done their chores, one more run leaves nothing in blocks that was wiped."""
        world, workload = self.world, self.workload
        workload.run_sink("sink-at-rest")
        if not world.loop.run(lambda: self._given_up() or workload.done, AUDIT_S):
            self.report("everything completes", "a sink at rest does not end")
            return
        report = workload.sink_reports[-1]
        sunk = not (report.errors or report.skipped_timelines or report.fenced_buckets)
        if not world.loop.run(lambda: not world.unsettled(), SETTLE_S):
            return  # its last entry may be unknown to replicas: then whoever comes next finds out
        world.watch.expired_and_wiped_rows_are_gone(sunk=sunk)

    def _collect(self) -> bool:
        """Run the sink until it meets no error: what crashed runs have left is gone then. Whether all runs ended."""
        world, workload = self.world, self.workload
        if not any(fault.kind == "sink" for fault in self.plan.faults):
            return True
        world.watch.sinks.grace_s = 0.0
        for number in range(LAST_SINKS):
            workload.run_sink(f"sink-last-{number}")
            if not world.loop.run(lambda: self._given_up() or workload.done, AUDIT_S):
                self.report("everything completes", "a sink after all faults does not end")
                return False
            if self._given_up():
                return False
            if number and not workload.sink_reports[-1].errors:
                break
        else:
            return True  # files that the faults have damaged can't be judged
        world.watch.sinks.no_garbage()
        return True

    def _check_history(self) -> None:
        report = check_history(self.workload.history.operations, effort=CHECK_EFFORT)
        self.outcome.undecided = len(report.undecided)
        for violation in report.violations:
            self.report("linearizable", f"timeline {violation.timeline}\n{violation.witness}")

    def _figures(self) -> None:
        world, outcome = self.world, self.outcome
        operations = self.workload.history.operations
        outcome.digest = world.trace.digest()
        outcome.steps = world.loop.steps
        outcome.events = world.trace.events
        outcome.frames = world.network.frames
        outcome.operations = len(operations)
        outcome.refused = sum(type(one.result).__name__ == "Refused" for one in operations)
        outcome.unknown = sum(one.is_unknown for one in operations)
        outcome.faults = len(self.plan.faults)
        outcome.crashes = sum(node.lives - 1 for node in world.nodes.values())
        outcome.blocks = sum(report.blocks for report in self.workload.sink_reports)
        outcome.checked_pages = world.watch.checked_pages
        outcome.checked_evictions = world.watch.checked_evictions
        outcome.checked_answers = world.watch.checked_answers
        outcome.checked_versions = world.watch.versions.answers
        outcome.checked_warm_versions = world.watch.versions.finds
        outcome.virtual_s = world.loop.now
        outcome.counters = dict(world.counters)
        outcome.lines = list(world.trace.lines)


@contextmanager
def _quiet() -> Iterator[None]:
    """No collection of dead lives in the middle of a run, and no noise from what they leave behind."""
    collects, hook = gc.isenabled(), sys.unraisablehook
    logger = logging.getLogger("timetier")
    propagates, level = logger.propagate, logger.level
    logger.propagate = False
    logger.setLevel(logging.INFO)
    sys.unraisablehook = _ignore
    gc.freeze()  # what is there before the run is not looked at by each collection
    silent = logging.NullHandler()
    logger.addHandler(silent)
    gc.disable()
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of coroutines that their lives did not live to begin
            gc.collect()
        logger.removeHandler(silent)
        sys.unraisablehook = hook
        logger.propagate = propagates
        logger.setLevel(level)
        if collects:
            gc.enable()


def _ignore(_: Any) -> None:
    """Coroutines of crashed lives complain when they are collected."""
