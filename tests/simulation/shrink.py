"""Shrinks a failing plan: the fewest faults and operations that still violate the same guarantee.

Parts are left out by halves first, then one by one (delta debugging; Zeller and Hildebrandt, "Simplifying and Isolating
Failure-Inducing Input", 2002).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from .plan import Plan
from .runner import Outcome, run_plan

MAX_RUNS = 600


def shrink(
    plan: Plan, *, seconds: float = 60.0, tell: Callable[[str], None] = lambda _: None
) -> tuple[Plan, Outcome | None]:
    """A smaller plan that violates the same guarantee, and its outcome; (plan, None) if this one violates none."""
    outcome = run_plan(plan)
    if not outcome.violations:
        return plan, None
    guarantee = outcome.violations[0].guarantee
    search = _Search(plan, outcome, guarantee, time.monotonic() + seconds, tell)
    size = -1
    while size != search.size:
        size = search.size
        search.reduce("faults")
        search.reduce("operations")
    return search.plan, search.outcome


class _Search:
    def __init__(self, plan: Plan, outcome: Outcome, guarantee: str, ends: float, tell: Callable[[str], None]) -> None:
        self.plan = plan
        self.outcome = outcome
        self.runs = 0
        self._guarantee = guarantee
        self._ends = ends
        self._tell = tell

    @property
    def size(self) -> int:
        """Number of parts that are left."""
        return len(self.plan.faults) + len(self.plan.operations)

    def reduce(self, what: str) -> None:
        """Leave out faults, or operations."""
        part = max(1, len(self._numbers(what)) // 2)
        while True:
            numbers = self._numbers(what)
            for start in range(0, len(numbers), part):
                if self._out_of_time():
                    return
                self._try(what, numbers[start : start + part])
            if part == 1:
                return
            part = max(1, part // 2)

    def _numbers(self, what: str) -> Sequence[int]:
        return [one.number for one in (self.plan.faults if what == "faults" else self.plan.operations)]

    def _out_of_time(self) -> bool:
        return self.runs >= MAX_RUNS or time.monotonic() > self._ends

    def _try(self, what: str, numbers: Sequence[int]) -> None:
        left_out = set(numbers)
        smaller = self.plan.without(**{what: left_out})
        self.runs += 1
        outcome = run_plan(smaller)
        if any(violation.guarantee == self._guarantee for violation in outcome.violations):
            self.plan, self.outcome = smaller, outcome
            self._tell(f"{len(smaller.faults)} faults and {len(smaller.operations)} operations still fail")
