"""Figures of a node in Ray's metrics, so that they stand in Prometheus beside Ray's own."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from ray.util import metrics

from ..cluster.counters import Counters

_TAGS = ("tier", "node")
PERIOD_S = 1.0


class MetricsExport:
    """Copies one set of counters into Ray's metrics, as `timetier_<prefix><name>` (Prometheus: with `ray_` before).

    The tags are the tier and the node only: an owner or a key would make a time series of every user.
    """

    def __init__(self, tier: str, node: str, prefix: str, counters: Counters) -> None:
        self._tags = {"tier": tier, "node": node}
        self._prefix = f"timetier_{prefix}"
        self._counters = counters
        self._totals: dict[str, metrics.Counter] = {}
        self._gauges: dict[str, metrics.Gauge] = {}
        self._exported: dict[str, int] = {}

    def update(self) -> None:
        """Export what has changed since the last time."""
        for name, total in self._counters.totals.items():
            grown = total - self._exported.get(name, 0)
            if grown > 0:
                if name not in self._totals:
                    self._totals[name] = metrics.Counter(self._prefix + name, description=name, tag_keys=_TAGS)
                self._totals[name].inc(grown, tags=self._tags)
                self._exported[name] = total
        for name, value in self._counters.gauges.items():
            if name not in self._gauges:
                self._gauges[name] = metrics.Gauge(self._prefix + name, description=name, tag_keys=_TAGS)
            self._gauges[name].set(value, tags=self._tags)


async def export_metrics(exports: Sequence[MetricsExport]) -> None:
    """Keep Ray's metrics up to date, until cancelled."""
    while True:
        for export in exports:
            export.update()
        await asyncio.sleep(PERIOD_S)
