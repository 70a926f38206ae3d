"""Disks of a cold node fail and are changed for empty ones while clients, the sink and crashes go on."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from .plan import COLD_NODES, Fault, Plan, make_plan
from .runner import run_plan

SEEDS = range(500, 512)


def plan_of(seed: int) -> Plan:
    """Clients, five runs of the sink; two disks are changed, and one fails for a while, twice."""
    plan = make_plan(seed, 80)
    node, span = COLD_NODES[seed % 3], plan.shape.duration_s
    faults = [Fault(n, span * at, "sink") for n, at in enumerate((0.3, 0.45, 0.6, 0.75, 0.9))]
    for number, (at, lasts, amount) in enumerate(((0.2, 0.15, 2), (0.4, 0.05, 1), (0.55, 0.15, 2), (0.72, 0.05, 3))):
        fault = Fault(10 + number, span * at, "fail cold disk", node, lasts_s=span * lasts, amount=float(amount))
        faults.append(fault)
    faults.append(Fault(20, span * 0.74, "crash", node, lasts_s=0.4))
    shape = replace(plan.shape, cold_after_us=300_000)  # so that there is something on the disks
    return replace(plan, shape=shape, faults=faults)


def test_changed_disks_are_filled_again_and_every_item_stays_readable() -> None:
    counters: Counter[str] = Counter()
    for seed in SEEDS:
        outcome = run_plan(plan_of(seed))
        print(seed, outcome.blocks, outcome.violations)
        assert not outcome.violations
        counters.update(outcome.counters)
    told = {name: counters[f"cold {name}"] for name in ("disk_failures", "disks_rebuilt", "files_rebuilt")}
    print(told)
    assert min(told.values()) > 0, "the runs are worth something"
