"""What all parts of one run of the sink share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..client.view import View
from ..effects import Script
from ..topology import TablePolicy
from .run_record import Epoch
from .sink_calls import SinkSettings
from .sink_report import SinkReport
from .sinking import CutOffs

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TableSink:
    """One table to sink, and how far.

    `patience`: rows older than these cut-offs do not wait for a window to fill (`SinkSettings.min_block_bytes`); None:
    none waits.
    """

    table: bytes
    policy: TablePolicy
    cut_offs: CutOffs
    patience: CutOffs | None = None


@dataclass(slots=True)
class SinkRun:
    """One run. `now_us`: microseconds since 1970, when it began, and `began_s`: the same on the clock of the view.
    `unclean`: it does not know what has become of something that it has written.
    """

    view: View
    settings: SinkSettings
    run: str
    tables: Sequence[TableSink]
    now_us: int
    began_s: float
    epoch: Epoch
    report: SinkReport
    unclean: bool = False

    def time_us(self) -> int:
        """Microseconds since 1970."""
        return self.now_us + int((self.view.now() - self.began_s) * 1e6)

    def cold_nodes(self, group: int) -> list[str]:
        """Names of the nodes of a cold group."""
        topology = self.view.routing.topology
        return [topology.cold_node(group, replica) for replica in range(topology.cold_replicas)]

    def timed(self, step: str, script: Script[T]) -> Script[T]:
        """The same script; its time is noted under `step`, less that of steps within it."""
        spent = self.report.step_seconds
        began_s = self.view.now()
        inner_s = sum(spent.values())
        try:
            return (yield from script)
        finally:
            inner_s = sum(spent.values()) - inner_s
            spent[step] = spent.get(step, 0.0) + self.view.now() - began_s - inner_s
