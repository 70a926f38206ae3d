"""What a client knows between calls: the map, who failed lately, versions it has seen, its request ids. *Pure*.

Nothing here is needed for correctness of what is stored: a client that knows an old map is told, one that knows no
version learns it from the first refusal, and suspicion only changes who is asked first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from random import Random

from ..config import ClientConfig
from ..routing import Routing
from ..topology import Topology
from .suspects import Suspects


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """Settings of one client.

    `timeout_s`: how long a request is tried, counted from the moment it is first sent; before that it may wait in
    the client's queue as long again. An error that comes later than this is a bug.
    `attempt_timeout_s`: how long one node may take before the next one is asked. Lower means faster failover, and
    more needless second attempts while a healthy node is busy.
    `suspect_s`, `suspect_max_s`: a node that failed is asked last for this long, doubling with each further failure.
    `relapse_max_s`: bound for a node that answered and failed in turns: four times as long each time.
    `probation_s`, `probation_timeout_s`: for how long after a failure a node that answers again has less time, and
    how much, before the next one is asked.
    `back_off_s`, `back_off_max_s`: pause before a repeated attempt, doubling, with jitter.
    `seen_timelines`: versions remembered, about 200 bytes each.
    `batch_items`, `batch_bytes`: calls are merged into one batch up to this many requests and bytes. `max_batches`: in
    flight at the most, of one kind of call and storage group. `patience_s`: a batch that takes longer no longer holds
    the next one back.
    `queued_items`, `queued_bytes`: what may wait in one queue (one per kind of call and storage group).
    """

    timeout_s: float = 10.0
    attempt_timeout_s: float = 2.0
    suspect_s: float = 1.0
    suspect_max_s: float = 8.0
    relapse_max_s: float = 16.0
    probation_s: float = 60.0
    probation_timeout_s: float = 0.2
    back_off_s: float = 0.005
    back_off_max_s: float = 0.5
    seen_timelines: int = 100_000
    batch_items: int = 1_000
    batch_bytes: int = 16 << 20
    max_batches: int = 32
    patience_s: float = 0.005
    queued_items: int = 100_000
    queued_bytes: int = 64 << 20


def settings_of(config: ClientConfig) -> ClientSettings:
    """The client's settings from the configuration; what is not in it has its default."""
    return ClientSettings(
        timeout_s=config.timeout_s,
        attempt_timeout_s=config.attempt_timeout_s,
        batch_items=config.batch_requests,
        batch_bytes=config.batch_mb << 20,
        max_batches=config.max_batches,
        patience_s=config.patience_ms / 1_000,
        queued_items=config.max_queued_requests,
        queued_bytes=config.max_queued_mb << 20,
    )


class View:
    """State shared by all calls of one client. `now`: monotonic seconds."""

    def __init__(
        self,
        topology: Topology,
        *,
        now: Callable[[], float],
        random: Random,
        settings: ClientSettings | None = None,
    ) -> None:
        self.routing = Routing(topology)
        self.sole_cache = _sole_cache(topology)  # the cache node that serves all timelines, if there is only one
        self.now = now
        self.random = random
        self.settings = settings or ClientSettings()
        self.stale_map = False  # a node refused our map; cleared by the next one
        self.closing = False  # calls in flight give up at their next step
        self.on_stale: Callable[[], None] = lambda: None
        self._seen: OrderedDict[bytes, int] = OrderedDict()
        self.suspects = Suspects(
            now,
            first_s=self.settings.suspect_s,
            longest_s=self.settings.suspect_max_s,
            relapse_longest_s=self.settings.relapse_max_s,
            probation_s=self.settings.probation_s,
        )
        self._resting: dict[str, float] = {}  # nodes that asked to be left alone, and until when
        self._id_prefix = random.randbytes(8)
        self._id_counter = 0

    def update(self, topology: Topology) -> None:
        """Go by another map from the next attempt on."""
        self.routing = Routing(topology)
        self.sole_cache = _sole_cache(topology)
        self.stale_map = False
        names = set(topology.node_names())
        self.suspects.keep(names)
        self._resting = {node: until for node, until in self._resting.items() if node in names}

    def mark_stale(self) -> None:
        """A node said that the map is old: have it fetched (`on_stale`)."""
        self.stale_map = True
        self.on_stale()

    def next_request_id(self) -> bytes:
        """16 bytes that no other request has: 8 random ones of this client, and a counter."""
        self._id_counter += 1
        return self._id_prefix + self._id_counter.to_bytes(8, "big")

    def next_request_ids(self, count: int) -> list[bytes]:
        """As many of them."""
        first, self._id_counter = self._id_counter + 1, self._id_counter + count
        prefix = self._id_prefix
        return [prefix + number.to_bytes(8, "big") for number in range(first, first + count)]

    @property
    def all_well(self) -> bool:
        """Whether no node is suspected or asked to be left alone: then all go to their first choice."""
        return not self.suspects and not self._resting

    def choose(self, candidates: Sequence[str], tried: Collection[str] = ()) -> str | None:
        """First candidate that is neither tried nor suspected, else the first untried; None when all were tried."""
        if not tried and not self.suspects and not self._resting:
            return candidates[0] if candidates else None
        last = None
        for node in candidates:
            if node in tried:
                continue
            if not self.is_suspect(node):
                return node
            last = last or node
        return last

    def suspect(self, node: str) -> None:
        """The node brought no answer: ask it last for a while."""
        self.suspects.suspect(node)

    def rest(self, node: str, seconds: float) -> None:
        """The node asked to be left alone for that long: ask it last until then."""
        self._resting[node] = max(self._resting.get(node, 0.0), self.now() + seconds)

    def trust(self, node: str) -> None:
        """The node answered."""
        if self.suspects:
            self.suspects.trust(node)

    def is_suspect(self, node: str) -> bool:
        """Whether the node failed lately, or asked to be left alone for now."""
        return node in self.suspects or (bool(self._resting) and self._rests(node))

    def _rests(self, node: str) -> bool:
        until = self._resting.get(node)
        if until is not None and until <= self.now():
            del self._resting[node]
            return False
        return until is not None

    def attempt_timeout_s(self, node: str, *, hasty: bool) -> float:
        """How long the node may take before the next one is asked. `hasty`: less, if it failed a short while ago."""
        settings = self.settings
        if hasty and self.suspects and self.suspects.on_probation(node):
            return min(settings.probation_timeout_s, settings.attempt_timeout_s)
        return settings.attempt_timeout_s

    def remember(self, timeline: bytes, version: int) -> None:
        """Note a version that the timeline has reached."""
        seen = self._seen
        if version > seen.get(timeline, 0):
            seen[timeline] = version
            if len(seen) > self.settings.seen_timelines:
                seen.popitem(last=False)
        if timeline in seen:
            seen.move_to_end(timeline)

    def remember_all(self, timelines: Sequence[bytes], versions: Sequence[int]) -> None:
        """Note the versions that timelines have reached."""
        seen = self._seen
        for timeline, version in zip(timelines, versions, strict=True):
            if version > seen.get(timeline, 0):
                seen[timeline] = version
            if timeline in seen:
                seen.move_to_end(timeline)
        while len(seen) > self.settings.seen_timelines:
            seen.popitem(last=False)

    def all_seen(self, timelines: Sequence[bytes]) -> list[int]:
        """Greatest version that this client knows of each timeline, 0 for none."""
        seen = self._seen
        return [seen.get(timeline, 0) for timeline in timelines]

    def seen(self, timeline: bytes) -> int:
        """Greatest version that this client knows of the timeline, 0 for none."""
        return self._seen.get(timeline, 0)

    def back_off_s(self, repeats: int) -> float:
        """Pause before attempt `repeats` + 1: doubling, jittered between a half and the whole of it."""
        longest_s = min(self.settings.back_off_s * 2.0 ** min(repeats, 32), self.settings.back_off_max_s)
        return longest_s * (0.5 + 0.5 * self.random.random())


def _sole_cache(topology: Topology) -> str | None:
    return topology.cache_node(0, 0) if topology.cache_nodes == topology.storage_groups == 1 else None
