"""Counters and gauges of a node: plain numbers, so that counting costs nothing on a hot path.

The Ray actor around a node exports them through `ray.util.metrics` once in a while; `status` shows the same.
"""

from __future__ import annotations


class Counters:
    """Named totals (`add`) and present values (`set`). Names end in their unit where they have one."""

    def __init__(self) -> None:
        self.totals: dict[str, int] = {}
        self.gauges: dict[str, float] = {}

    def add(self, name: str, amount: int = 1) -> None:
        """Add to a total, which only grows."""
        self.totals[name] = self.totals.get(name, 0) + amount

    def set(self, name: str, value: float) -> None:
        """Set a present value, such as the length of a queue."""
        self.gauges[name] = value

    def read(self) -> dict[str, float]:
        """All figures by name."""
        return {**self.totals, **self.gauges}
