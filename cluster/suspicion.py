"""Who failed lately, and when to try them again (*pure*).

A node that brought no answer is *suspected*: asked last, until it has answered something. Whoever *probes* asks it one
small question aside from all requests, after a pause that doubles, so that no request waits for it. Without probes a
suspicion ends by time, at the cost of a request that waits in vain each time the node is still away.

A node that goes up and down every second or two would be trusted and fail again and again. So what failed before is
not forgotten at the first answer. After a *relapse* the pause is four times as long, and the suspicion ends only when
the node has answered four times, a second apart. And a node *on probation* gets less time to answer than others.

What fails as one is asked last as one: for a moment after a node failed, the others of its machine come after those
of other machines, since it may be the machine, or the way to it.

A node that answers "not yet" (it starts, it copies what it has lost, its disk is full) has not failed. It *rests* for
as long as it asked for, and nothing is held against it afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .effects import CallFailed
from .messages import Failure, Message, Ping
from .topology import Topology

_RELAPSE_FACTOR = 4.0
_ANSWERS_AFTER_RELAPSE = 4
_URGENT_PAUSE_S = 0.1
MAX_HINT_S = 60.0  # no node is left alone for longer because it said so
_PING = Ping()


@dataclass(slots=True)
class _Record:
    """`pause_s`: before the next probe, or the last one. `probe_at`: when the next one is, or would have been.

    `since`: when the suspicion began. `probed_at`: when the node was last asked anything. `needed`: answers that end
    the suspicion, and `missing` of them; the next one counts from `counts_at` on.
    """

    pause_s: float
    since: float
    probe_at: float
    probe: Message
    probed_at: float
    needed: int = 1
    missing: int = 1
    counts_at: float = 0.0
    suspected: bool = True
    trusted_at: float = 0.0


class Suspicion:
    """Suspected nodes, resting ones, and those that were suspected. `now`: monotonic seconds."""

    def __init__(
        self,
        now: Callable[[], float],
        *,
        first_s: float,
        longest_s: float,
        relapse_longest_s: float = 16.0,
        probation_s: float = 60.0,
        probed: bool = True,
    ) -> None:
        """A node is asked again after `first_s`, then after twice as long each time, up to `longest_s`; after a
        relapse four times as long, up to `relapse_longest_s`. Failures are forgotten after `probation_s`.

        `probed`: whether somebody asks suspected nodes (see `due`); else suspicions end by time.
        """
        self.probed = probed
        self.on_suspect: Callable[[], None] = lambda: None  # wakes who probes
        self._now = now
        self._first_s = first_s
        self._longest_s = longest_s
        self._relapse_longest_s = relapse_longest_s
        self._probation_s = probation_s
        self._records: dict[str, _Record] = {}
        self._resting: dict[str, float] = {}  # until when
        self._hosts: dict[str, str] = {}

    # ------------------------------------------------------------ who is meant

    def know(self, topology: Topology) -> None:
        """Which nodes there are, and the machine of each. What is known of other nodes is forgotten."""
        nodes = set(topology.node_names())
        hosts = {name: address.host for name, address in topology.addresses.items() if address.host}
        self._records = {node: record for node, record in self._records.items() if node in nodes}
        self._resting = {node: until for node, until in self._resting.items() if node in nodes}
        self._hosts = hosts if len(set(hosts.values())) > 1 else {}

    def __contains__(self, node: str) -> bool:
        """Whether a node is suspected, or rests."""
        return self._is_suspected(node) or self._rests(node)

    def __bool__(self) -> bool:
        """Whether any node is suspected, or rests."""
        return bool(self._resting) or any(record.suspected for record in self._records.values())

    @property
    def remembers(self) -> bool:
        """Whether any node has failed lately, or rests."""
        if self._resting:
            for node in list(self._resting):
                self._rests(node)
        return bool(self._records) or bool(self._resting)

    def names(self) -> list[str]:
        """Suspected nodes."""
        return sorted(node for node in self._records if self._is_suspected(node))

    def last(self, nodes: Sequence[str]) -> list[str]:
        """The same nodes in the same order, but the suspected and resting ones last, and before them what is near
        one that has just failed."""
        if not self.remembers:
            return list(nodes)
        near = self._just_failed_hosts()
        return sorted(nodes, key=lambda node: 2 if node in self else int(self._hosts.get(node) in near))

    def is_clean(self, node: str) -> bool:
        """Whether nothing is held against a node: it is not suspected, nor was it lately, and does not rest."""
        return node not in self._records and not self._rests(node)

    def on_probation(self, node: str) -> bool:
        """Whether the node was suspected a short while ago, and is not now."""
        record = self._records.get(node)
        return record is not None and not self._is_suspected(node) and not self._is_forgotten(record)

    def timeout_s(self, node: str, usual_s: float, probation_s: float) -> float:
        """How long a node may take: `usual_s`, or `probation_s` if it failed a short while ago."""
        return min(usual_s, probation_s) if self._records and self.on_probation(node) else usual_s

    # ------------------------------------------------------------ what nodes did

    def suspect(self, node: str, probe: Message = _PING) -> None:
        """Note that a node brought no answer. `probe`: a small question that it ought to answer. Calls that failed
        together count once."""
        now, record = self._now(), self._records.get(node)
        if record is None or self._is_forgotten(record):
            self._records[node] = _Record(self._first_s, now, now + self._first_s, probe, now)
        elif record.suspected:
            record.missing = record.needed
            if now < record.probe_at:
                return
            self._put_off(record, now)
        else:
            pause_s = min(_RELAPSE_FACTOR * record.pause_s, self._relapse_longest_s)
            needed, counts_at = _ANSWERS_AFTER_RELAPSE, now + self._first_s
            self._records[node] = _Record(pause_s, now, now + pause_s, probe, now, needed, needed, counts_at)
        self.on_suspect()

    def blame(self, node: str, answer: Message | CallFailed, probe: Message = _PING) -> None:
        """Note that a node did not answer as it should: who says when to come back is alive, and only rests."""
        seconds = hint_s(answer)
        if isinstance(answer, Failure) and answer.fields.get("busy"):
            return  # with too much to do; others would be no better off
        if seconds:
            self.rest(node, seconds)
        else:
            self.suspect(node, probe)

    def rest(self, node: str, seconds: float) -> None:
        """Note that a node asked to be left alone for that long."""
        self._resting[node] = max(self._resting.get(node, 0.0), self._now() + seconds)

    def trust(self, node: str, *, at_once: bool = False) -> None:
        """Note that a node answered. After a relapse that counts once a second, unless it is needed `at_once`."""
        record = self._records.get(node)
        if record is None:
            return
        now = self._now()
        if not record.suspected:
            if self._is_forgotten(record):
                del self._records[node]
            return
        if record.needed > 1 and not at_once:
            if now < record.counts_at:
                return
            record.missing -= 1
            record.counts_at = record.probe_at = now + self._first_s
            if record.missing:
                return
        record.suspected, record.trusted_at = False, now

    # ------------------------------------------------------------ probes

    def due(self, *, urgent: bool = False) -> list[tuple[str, Message]]:
        """Nodes that are to be probed, with the question; each is given out once per pause.

        `urgent`: one of them is needed, since too few others are left, and one may have come back long before its
        pause is over: each of them is given out ten times a second then.
        """
        if not self._records:
            return []
        now = self._now()
        ready = []
        for node, record in self._records.items():
            is_due = record.probe_at <= now
            if record.suspected and (is_due or (urgent and record.probed_at + _URGENT_PAUSE_S <= now)):
                if is_due:
                    self._put_off(record, now)
                record.probed_at = now
                ready.append((node, record.probe))
        return ready

    def next_due(self) -> float | None:
        """When the next node is to be probed, None if none is suspected."""
        return min((record.probe_at for record in self._records.values() if record.suspected), default=None)

    # ------------------------------------------------------------ inside

    def _is_suspected(self, node: str) -> bool:
        record = self._records.get(node)
        return record is not None and record.suspected and (self.probed or self._now() < record.probe_at)

    def _rests(self, node: str) -> bool:
        until = self._resting.get(node)
        if until is not None and until <= self._now():
            del self._resting[node]
            return False
        return until is not None

    def _just_failed_hosts(self) -> set[str]:
        """Machines of the nodes whose suspicion has just begun."""
        if not self._hosts:
            return set()
        newest = self._now() - self._first_s
        return {
            self._hosts[node]
            for node, record in self._records.items()
            if record.suspected and record.since > newest and node in self._hosts
        }

    def _is_forgotten(self, record: _Record) -> bool:
        return not record.suspected and self._now() >= record.trusted_at + self._probation_s

    def _put_off(self, record: _Record, now: float) -> None:
        record.pause_s = max(record.pause_s, min(2 * record.pause_s, self._longest_s))
        record.probe_at = now + record.pause_s


def hint_s(answer: Message | CallFailed) -> float:
    """Seconds after which the sender of a refusal wants to be asked again, 0 if it did not say."""
    hint = answer.fields.get("retry_after_s") if isinstance(answer, Failure) else None
    return min(float(hint), MAX_HINT_S) if isinstance(hint, int | float) and hint > 0 else 0.0
