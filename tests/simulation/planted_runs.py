"""Runs the simulation with each planted bug until a check fails, and prints which one and after how many seeds."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import multiprocessing.connection
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from .biased import PLANS
from .plan import Plan
from .planted import BUGS
from .planting import Bug
from .runner import run_plan

MAX_SEEDS = 200
HANG_S = 60.0  # of one run; a healthy one takes about a second
TESTS = Path(__file__).parents[1]
SCRIPTS = TESTS / "cluster" / "testdata"


@dataclass
class Finding:
    """How a bug was found. `seeds`: runs that it took; `check`: the guarantee that failed, "" if none did.

    `schedule`: an interaction script, if it took a directed schedule; then `seeds` have not found it.
    """

    bug: str
    rule: str
    plans: str
    seeds: int
    check: str
    how: str
    seconds: float
    schedule: str = ""


class Hangs(BaseException):
    """A run does not end."""


def find(bug: Bug, *, max_seeds: int = MAX_SEEDS, base_seed: int = 0) -> Finding:
    """Run seeds with the bug until a check fails that does not fail without it; else its directed schedule."""
    began = time.perf_counter()
    finding = Finding(bug.name, bug.rule, bug.plans, max_seeds, "", "", 0.0)
    for seed in range(base_seed, base_seed + max_seeds):
        plan = PLANS[bug.plans](seed)
        with bug.planted():
            check, how = _violation(plan)
        if check and not _violation(plan)[0]:
            finding.seeds, finding.check, finding.how = seed - base_seed + 1, check, f"seed {seed}: {how}"
            break
    else:
        for script in bug.scripts:
            with bug.planted():
                differs = not plays_as_written(script)
            if differs and plays_as_written(script):
                finding.schedule, finding.check = script, f"directed schedule {script}.txt"
                break
    finding.seconds = time.perf_counter() - began
    return finding


def plays_as_written(script: str) -> bool:
    """Whether an interaction script of `tests/cluster/testdata` does what it says. `script`: its name, no number."""
    (path,) = SCRIPTS.glob(f"[0-9]*_{script}.txt")
    text = path.read_text()
    try:
        with _at_most(HANG_S):
            return bool(_player().play(text) == text)
    except (Exception, Hangs):
        return False


@cache
def _player() -> Any:
    """The module that plays interaction scripts; the helpers beside it are imported by their short names."""
    folder = str(TESTS)
    if folder not in sys.path:
        sys.path.append(folder)
    spec = importlib.util.spec_from_file_location("interaction_player", TESTS / "cluster" / "test_interactions.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _violation(plan: Plan) -> tuple[str, str]:
    try:
        with _at_most(HANG_S):
            outcome = run_plan(plan)
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


def run_planted(names: Sequence[str], *, max_seeds: int, base_seed: int, jobs: int) -> int:
    """Find the bugs whose names contain one of `names` (all if there is none). Prints a table and, last, JSON.

    Exit status: 1 if one is not found.
    """
    bugs = [bug for bug in BUGS if not names or any(name in bug.name for name in names)]
    width = max((len(bug.name) for bug in bugs), default=0)
    print(f"{'bug':{width}}  {'plans':10}  {'seeds':>6}  {'s':>6}  found by", flush=True)
    findings = []
    for finding in _all_findings(bugs, max_seeds, base_seed, jobs):
        findings.append(finding)
        seeds = f"> {finding.seeds}" if finding.schedule or not finding.check else str(finding.seeds)
        found = finding.check or "NOT FOUND"
        print(f"{finding.bug:{width}}  {finding.plans:10}  {seeds:>6}  {finding.seconds:6.1f}  {found}", flush=True)
    missed = [finding.bug for finding in findings if not finding.check]
    directed = [finding.bug for finding in findings if finding.schedule]
    rows = [{**asdict(finding), "how": finding.how[:200], "seconds": round(finding.seconds, 1)} for finding in findings]
    summary = {"planted": len(bugs), "found": len(bugs) - len(missed), "directed": directed, "missed": missed}
    print(json.dumps({**summary, "base_seed": base_seed, "bugs": rows}), flush=True)
    return 1 if missed or not bugs else 0


def _all_findings(bugs: Sequence[Bug], max_seeds: int, base_seed: int, jobs: int) -> Iterator[Finding]:
    """Each bug in a process of its own, so many at a time, in the order in which they end."""
    context = multiprocessing.get_context("fork")
    waiting = list(bugs)
    running: dict[Connection, Any] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            bug = waiting.pop(0)
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_find_and_tell, args=(theirs, bug, max_seeds, base_seed))
            process.start()
            theirs.close()
            running[ours] = bug, process
        ready = multiprocessing.connection.wait(list(running))
        for ours in [pipe for pipe in running if pipe in ready]:
            bug, process = running.pop(ours)
            try:
                yield ours.recv()
            except EOFError:
                yield Finding(bug.name, bug.rule, bug.plans, 0, "", "its process died", 0.0)
            process.join()
            ours.close()


def _find_and_tell(pipe: Connection, bug: Bug, max_seeds: int, base_seed: int) -> None:
    pipe.send(find(bug, max_seeds=max_seeds, base_seed=base_seed))
    pipe.close()
