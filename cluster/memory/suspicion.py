"""Who failed lately, and when to try them again (*pure*).

A node that brought no answer is asked last. It stays suspected until it has answered something: one small question
of its own finds that out, so that no request waits for it.

A node that goes up and down every second or two would be trusted and fail again and again. So what failed before is
not forgotten at once. After a *relapse* the pause before the next question is four times as long, and the suspicion
ends only when the node has answered four times, a second apart. And a node *on probation* gets less time to answer.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..messages import Message

_RELAPSE_FACTOR = 4
_ANSWERS_AFTER_RELAPSE = 4
_URGENT_PAUSE_S = 0.1


@dataclass(slots=True)
class _Record:
    """`pause_s`: before the next probe, or the last one. `probe_at`: when the next one is, or would have been.

    `probed_at`: when it was last asked anything. `needed`: answers that end the suspicion, and `missing` of them;
    the next one counts from `counts_at` on.
    """

    pause_s: float
    probe_at: float
    probe: Message
    probed_at: float
    needed: int = 1
    missing: int = 1
    counts_at: float = 0.0
    suspected: bool = True


class Suspicion:
    """Suspected nodes. Times are monotonic seconds."""

    def __init__(
        self, *, first_s: float, longest_s: float, relapse_longest_s: float = 16.0, probation_s: float = 60.0
    ) -> None:
        """A node is asked again after `first_s`, then after twice as long each time, up to `longest_s`; after a
        relapse four times as long, up to `relapse_longest_s`. Failures are forgotten after `probation_s`.
        """
        self._first_s = first_s
        self._longest_s = longest_s
        self._relapse_longest_s = relapse_longest_s
        self._probation_s = probation_s
        self._records: dict[str, _Record] = {}
        self._suspected = 0  # records of nodes that are suspected

    def __contains__(self, node: str) -> bool:
        record = self._records.get(node)
        return record is not None and record.suspected

    def __bool__(self) -> bool:
        """Whether any node is suspected."""
        return self._suspected > 0

    @property
    def remembers(self) -> bool:
        """Whether any node has failed, lately or long ago."""
        return bool(self._records)

    def names(self) -> list[str]:
        """Suspected nodes."""
        return sorted(node for node, record in self._records.items() if record.suspected)

    def suspect(self, node: str, now: float, probe: Message) -> None:
        """Note that a node brought no answer. `probe`: a small question that it ought to answer."""
        record = self._records.get(node)
        if record is None:
            self._records[node] = _Record(self._first_s, now + self._first_s, probe, now)
        elif record.suspected:
            record.missing = record.needed
            if now >= record.probe_at:
                self._put_off(record, now)
            return
        elif now < record.probe_at + self._probation_s:
            pause_s = min(record.pause_s * _RELAPSE_FACTOR, self._relapse_longest_s)
            needed = _ANSWERS_AFTER_RELAPSE
            self._records[node] = _Record(pause_s, now + pause_s, probe, now, needed, needed, now + self._first_s)
        else:
            self._records[node] = _Record(self._first_s, now + self._first_s, probe, now)
        self._suspected += 1

    def trust(self, node: str, now: float, *, at_once: bool = False) -> None:
        """Note that a node answered. After a relapse that counts once a second, unless it is needed `at_once`."""
        if not self._suspected or node not in self:
            return
        record = self._records[node]
        if record.needed > 1 and not at_once:
            if now < record.counts_at:
                return
            record.missing -= 1
            if record.missing:
                record.counts_at = record.probe_at = now + self._first_s
                return
        record.suspected = False
        self._suspected -= 1

    def timeout_s(self, node: str, now: float, usual_s: float, probation_s: float) -> float:
        """How long a node may take: `usual_s`, or `probation_s` if it failed a short while ago."""
        record = self._records.get(node) if self._records else None
        if record is None or record.suspected or now >= record.probe_at + self._probation_s:
            return usual_s
        return min(usual_s, probation_s)

    def due(self, now: float, *, urgent: bool = False) -> list[tuple[str, Message]]:
        """Nodes that are to be probed, with the question; each is given out once per pause.

        `urgent`: one of them is needed, since too few others are left, and one may have come back long before its
        pause is over: each of them is given out ten times a second then.
        """
        if not self._suspected:
            return []
        ready = []
        for node, record in self._records.items():
            if record.suspected and (record.probe_at <= now or (urgent and record.probed_at + _URGENT_PAUSE_S <= now)):
                if record.probe_at <= now:
                    self._put_off(record, now)
                record.probed_at = now
                ready.append((node, record.probe))
        return ready

    def last(self, nodes: list[str]) -> list[str]:
        """The same nodes in the same order, but the suspected ones last."""
        if not self._suspected or not any(node in self for node in nodes):
            return nodes
        return [n for n in nodes if n not in self] + [n for n in nodes if n in self]

    def _put_off(self, record: _Record, now: float) -> None:
        record.pause_s = max(record.pause_s, min(record.pause_s * 2, self._longest_s))
        record.probe_at = now + record.pause_s
