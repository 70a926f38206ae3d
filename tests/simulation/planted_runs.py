"""Runs the simulation with each planted bug until a check fails, and prints which one and after how many seeds."""

from __future__ import annotations

import json
import multiprocessing
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

from .plan import DEFAULT_OPERATIONS, make_plan
from .planted import BUGS
from .planting import Bug
from .runner import run_plan

MAX_SEEDS = 300
HANG_S = 60.0  # of one run; a healthy one takes less than a second


@dataclass
class Finding:
    """How a bug was found. `seeds`: runs that it took; `check`: the guarantee that failed, "" if none did."""

    bug: str
    rule: str
    seeds: int
    check: str
    how: str
    seconds: float


class Hangs(BaseException):
    """A run does not end."""


def find(bug: Bug, *, max_seeds: int = MAX_SEEDS, base_seed: int = 0, operations: int = DEFAULT_OPERATIONS) -> Finding:
    """Run seeds with the bug until a check fails that does not fail without it."""
    began = time.perf_counter()
    for seed in range(base_seed, base_seed + max_seeds):
        with bug.planted():
            check, how = _violation(seed, operations)
        if check and not _violation(seed, operations)[0]:
            seconds = time.perf_counter() - began
            return Finding(bug.name, bug.rule, seed - base_seed + 1, check, f"seed {seed}: {how}", seconds)
    return Finding(bug.name, bug.rule, max_seeds, "", "", time.perf_counter() - began)


def _violation(seed: int, operations: int) -> tuple[str, str]:
    try:
        with _at_most(HANG_S):
            outcome = run_plan(make_plan(seed, operations))
    except Hangs:
        return "everything completes", f"a run takes more than {HANG_S:g} s"
    except Exception as error:  # the bug shook the simulation itself: that is noticed too
        return "no unforeseen errors", f"{type(error).__name__}: {error}"
    if not outcome.violations:
        return "", ""
    return outcome.violations[0].guarantee, outcome.violations[0].how


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    def stop(number: int, frame: Any) -> None:
        raise Hangs

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_planted(names: Sequence[str], *, max_seeds: int, base_seed: int, operations: int, jobs: int) -> int:
    """Find the bugs whose names contain one of `names` (all if there is none). Prints a table and, last, JSON.

    Exit status: 1 if one is not found.
    """
    bugs = [bug for bug in BUGS if not names or any(name in bug.name for name in names)]
    width = max((len(bug.name) for bug in bugs), default=0)
    print(f"{'bug':{width}}  seeds  seconds  found by", flush=True)
    findings = []
    for finding in _all_findings(bugs, max_seeds, base_seed, operations, jobs):
        findings.append(finding)
        found = finding.check or "NOT FOUND"
        print(f"{finding.bug:{width}}  {finding.seeds:5}  {finding.seconds:7.1f}  {found}", flush=True)
    missed = [finding.bug for finding in findings if not finding.check]
    rows = [{**asdict(finding), "how": finding.how[:200], "seconds": round(finding.seconds, 1)} for finding in findings]
    print(json.dumps({"planted": len(bugs), "found": len(bugs) - len(missed), "missed": missed, "bugs": rows}))
    return 1 if missed or not bugs else 0


def _all_findings(bugs: Sequence[Bug], max_seeds: int, base_seed: int, operations: int, jobs: int) -> Iterator[Finding]:
    """Each bug in a process of its own, so many at a time, in the order in which they end."""
    context = multiprocessing.get_context("fork")
    waiting = list(bugs)
    running: dict[Connection, Any] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            bug = waiting.pop(0)
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_find_and_tell, args=(theirs, bug, max_seeds, base_seed, operations))
            process.start()
            theirs.close()
            running[ours] = bug, process
        for ours in multiprocessing.connection.wait(list(running)):
            assert isinstance(ours, Connection)
            bug, process = running.pop(ours)
            try:
                yield ours.recv()
            except EOFError:
                yield Finding(bug.name, bug.rule, 0, "", "its process died", 0.0)
            process.join()
            ours.close()


def _find_and_tell(pipe: Connection, bug: Bug, max_seeds: int, base_seed: int, operations: int) -> None:
    pipe.send(find(bug, max_seeds=max_seeds, base_seed=base_seed, operations=operations))
    pipe.close()
