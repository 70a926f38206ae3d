"""Deterministic simulation of the whole store.

    python -m tests.simulation --seeds 2000 --jobs 2        a line for each failure, last one line of JSON
    python -m tests.simulation --seconds 150 --jobs 2       as many seeds as fit
    python -m tests.simulation --replay SEED [--log FILE]   the same run again, event by event
    python -m tests.simulation --shrink SEED [--log FILE]   the fewest faults and operations that still fail
    python -m tests.simulation --planted [--only NAME]      seeds that it takes to find each of the planted bugs

Exit status 1 on any violation, and on a planted bug that is not found. A seed stands for one run exactly, with the
same `--operations`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .campaign import run_seeds
from .plan import DEFAULT_OPERATIONS, Plan, make_plan
from .planted_runs import MAX_SEEDS, run_planted
from .runner import Outcome, run_plan
from .shrink import shrink

MAX_FAILURES = 50  # of one campaign

COVERAGE = (
    "storage fast_accepts",
    "storage flights",
    "storage prepares",
    "storage settles",
    "storage entries_fetched",
    "storage states_installed",
    "storage entries_trimmed",
    "storage rows_evicted",
    "storage rows_expired",
    "storage horizons_in_doubt",
    "storage quiet_buckets",
    "storage rejoins",
    "storage outdated_lives_refused",
    "storage lives_ended_by_errors",
    "cache hits",
    "cache misses",
    "cache cold_reads",
    "cold files_repaired",
    "cold blocks_repaired",
    "cold scrub_rounds",
    "cold scrub_found",
    "cold disks_replaced",
    "cold disks_rebuilt",
    "cold files_removed",
)
"""Counters of the services that say that the rare things did happen."""

_SUMMED = (
    "steps",
    "events",
    "frames",
    "operations",
    "refused",
    "unknown",
    "faults",
    "crashes",
    "blocks",
    "checked_pages",
    "checked_evictions",
    "checked_answers",
    "checked_versions",
    "checked_warm_versions",
    "undecided",
)


def main(arguments: Sequence[str]) -> int:
    """Run what the arguments ask for. Exit status."""
    options = _parser().parse_args(arguments)
    if options.replay is not None:
        return _replay(make_plan(options.replay, options.operations), options.log)
    if options.planted:
        base_seed = options.base_seed or 0
        return run_planted(options.only, max_seeds=options.max_seeds, base_seed=base_seed, jobs=options.jobs)
    if options.shrink is not None:
        return _shrink(make_plan(options.shrink, options.operations), options.seconds or 60.0, options.log)
    return _campaign(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.simulation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=_positive, help="number of runs (default: 100, or what fits in --seconds)")
    parser.add_argument("--seconds", type=float, help="begin no further run after so many seconds")
    parser.add_argument("--jobs", type=_positive, default=1, help="processes")
    parser.add_argument("--base-seed", type=int, help="first seed (default: one from the clock, printed)")
    parser.add_argument("--operations", type=_positive, default=DEFAULT_OPERATIONS, help="client operations of a run")
    parser.add_argument("--replay", type=int, metavar="SEED", help="run one seed and write its log")
    parser.add_argument("--shrink", type=int, metavar="SEED", help="reduce a failing seed")
    parser.add_argument("--planted", action="store_true", help="find planted bugs (--base-seed: 0 if not given)")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="bugs with this in their name")
    parser.add_argument("--max-seeds", type=_positive, default=MAX_SEEDS, help="runs for each planted bug")
    parser.add_argument("--log", type=Path, help="file for the log (default: standard output)")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


def _campaign(options: argparse.Namespace) -> int:
    base_seed = options.base_seed if options.base_seed is not None else time.time_ns() // 1_000_000 % 10**9 * 1_000
    count = options.seeds if options.seeds or options.seconds else 100
    print(f"base seed {base_seed}", flush=True)
    began = time.perf_counter()
    totals: Counter[str] = Counter()
    runs = failed = 0
    cpu_s = 0.0
    counters: Counter[str] = Counter()
    seeds = itertools.count(base_seed)
    chosen = iter(range(base_seed, base_seed + count)) if count else seeds
    for outcome in run_seeds(chosen, operations=options.operations, jobs=options.jobs, seconds=options.seconds):
        runs += 1
        failed += bool(outcome.violations)
        totals.update({name: getattr(outcome, name) for name in _SUMMED})
        totals["violations"] += len(outcome.violations)
        cpu_s += outcome.cpu_s
        counters.update({name: outcome.counters.get(name, 0) for name in COVERAGE})
        if outcome.violations:
            _print_failure(outcome, options.operations)
        elif outcome.undecided:
            print(f"seed {outcome.seed}: the checker gave up on {outcome.undecided} timelines", flush=True)
        if failed == MAX_FAILURES:
            print(f"stopped after {failed} failures", flush=True)
            break
    seconds = time.perf_counter() - began
    summary = _summary(totals, runs, failed, base_seed, seconds, cpu_s)
    print(json.dumps({**summary, "coverage": counters}), flush=True)
    return 1 if failed else 0


def _print_failure(outcome: Outcome, operations: int) -> None:
    first = " ".join(str(outcome.violations[0]).split())[:400]
    more = "" if operations == DEFAULT_OPERATIONS else f" --operations {operations}"
    replay = f"python -m tests.simulation --replay {outcome.seed}{more}"
    print(f"seed {outcome.seed} violates {first} | replay: {replay}", flush=True)


def _summary(
    totals: Counter[str], runs: int, failed: int, base_seed: int, seconds: float, cpu_s: float
) -> dict[str, Any]:
    return {
        "runs": runs,
        "failed_runs": failed,
        "violations": totals["violations"],
        "base_seed": base_seed,
        "seconds": round(seconds, 1),
        "runs_per_s": round(runs / seconds, 2),
        "runs_per_cpu_s": round(runs / max(cpu_s, 1e-9), 2),
        "steps_per_s": round(totals["steps"] / seconds),
        **{name: totals[name] for name in _SUMMED},
    }


def _replay(plan: Plan, log: Path | None) -> int:
    outcome = run_plan(plan, verbose=True)
    _write_log(outcome, log)
    print(f"seed {plan.seed}: {outcome.steps} steps, digest {outcome.digest}, {len(outcome.violations)} violations")
    for violation in outcome.violations:
        print(violation)
    return 1 if outcome.violations else 0


def _shrink(plan: Plan, seconds: float, log: Path | None) -> int:
    smaller, outcome = shrink(plan, seconds=seconds, tell=lambda text: print(text, flush=True))
    if outcome is None:
        print(f"seed {plan.seed} violates nothing")
        return 0
    outcome = run_plan(smaller, verbose=True)
    _write_log(outcome, log)
    print(f"seed {plan.seed} still fails with:")
    for fault in smaller.faults:
        print(f"  {fault.at_s:8.3f} s  {fault}")
    for planned in smaller.operations:
        owners = " ".join(planned.owners)
        print(
            f"  {planned.at_s:8.3f} s  client-{planned.client} {planned.kind} {owners} {planned.keys} {planned.values}"
        )
    for violation in outcome.violations:
        print(violation)
    return 1


def _write_log(outcome: Outcome, log: Path | None) -> None:
    text = "\n".join(outcome.lines) + "\n"
    if log is None:
        sys.stdout.write(text)
    else:
        log.write_text(text, errors="backslashreplace")


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":  # sets of bytes would have another order in each process
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "tests.simulation", *sys.argv[1:]])
    sys.exit(main(sys.argv[1:]))
