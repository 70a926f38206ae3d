"""Nodes that failed a client lately. *Pure*.

A suspected node is asked last. How its suspicion ends depends on whether somebody *probes*, that is, asks suspected
nodes small questions aside from all requests (`probing.py`): then by an answer, else by time alone, at the cost of a
request that waits in vain each time the node is still away.

A node that goes up and down every second or two would be trusted and fail again and again. So what failed before is
not forgotten at the first answer. After a *relapse* the suspicion is four times as long, and ends only when the node
has answered four times, a second apart. And a node *on probation* gets less time to answer than others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

_RELAPSE_FACTOR = 4.0
_ANSWERS_AFTER_RELAPSE = 4


@dataclass(slots=True)
class _Record:
    """`length_s`: of the present suspicion, or of the last one. `ends_at`: then it is over, or is to be probed.

    `needed`: answers that end it, and `missing` of them.
    """

    length_s: float
    ends_at: float
    needed: int = 1
    missing: int = 1
    active: bool = True
    trusted_at: float = 0.0


class Suspects:
    """Suspected nodes and those that were. `now`: monotonic seconds."""

    def __init__(
        self,
        now: Callable[[], float],
        *,
        first_s: float,
        longest_s: float,
        relapse_longest_s: float,
        probation_s: float,
    ) -> None:
        """A suspicion lasts `first_s`, then twice as long each time up to `longest_s`, four times as long after a
        relapse up to `relapse_longest_s`. A node that has answered for `probation_s` is as good as any other.
        """
        self.probed = False  # whether somebody asks suspected nodes; `on_suspect` wakes it
        self.on_suspect: Callable[[], None] = lambda: None
        self._now = now
        self._first_s = first_s
        self._longest_s = longest_s
        self._relapse_longest_s = relapse_longest_s
        self._probation_s = probation_s
        self._records: dict[str, _Record] = {}

    def __bool__(self) -> bool:
        """Whether any node is suspected or on probation."""
        return bool(self._records)

    def __contains__(self, node: str) -> bool:
        record = self._records.get(node)
        return record is not None and record.active and (self.probed or self._now() < record.ends_at)

    def keep(self, nodes: Collection[str]) -> None:
        """Forget all other nodes."""
        self._records = {node: record for node, record in self._records.items() if node in nodes}

    def suspect(self, node: str) -> None:
        """The node brought no answer. Calls that failed together count once."""
        now = self._now()
        record = self._records.get(node)
        if record is None or self._is_forgotten(record, now):
            self._records[node] = _Record(self._first_s, now + self._first_s)
        elif record.active:
            if now < record.ends_at:
                return
            record.length_s = min(max(2 * record.length_s, self._first_s), max(self._longest_s, record.length_s))
            record.ends_at = now + record.length_s
            record.missing = record.needed
        else:
            length_s = min(_RELAPSE_FACTOR * record.length_s, self._relapse_longest_s)
            needed = _ANSWERS_AFTER_RELAPSE
            self._records[node] = _Record(length_s, now + length_s, needed, needed)
        self.on_suspect()

    def trust(self, node: str) -> None:
        """The node answered. After a relapse that counts once a second."""
        record = self._records.get(node)
        if record is None:
            return
        now = self._now()
        if record.active:
            if record.needed > 1 and now < record.ends_at:
                return
            record.missing -= 1
            record.ends_at = now + self._first_s
            record.active = record.missing > 0
            record.trusted_at = now
        elif self._is_forgotten(record, now):
            del self._records[node]

    def on_probation(self, node: str) -> bool:
        """Whether the node was suspected a short while ago, and is not now."""
        record = self._records.get(node)
        return record is not None and not record.active and not self._is_forgotten(record, self._now())

    def due(self) -> list[str]:
        """Suspected nodes that are to be probed now."""
        now = self._now()
        return [node for node, record in self._records.items() if record.active and record.ends_at <= now]

    def next_due(self, others: Collection[str]) -> float | None:
        """When the next suspected node that is not one of `others` is to be probed, None if there is none."""
        records = self._records.items()
        return min((record.ends_at for node, record in records if record.active and node not in others), default=None)

    def any_active(self) -> bool:
        """Whether any node is suspected."""
        return any(record.active for record in self._records.values())

    def _is_forgotten(self, record: _Record, now: float) -> bool:
        return not record.active and now >= record.trusted_at + self._probation_s
