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
from ..suspicion import Suspicion
from ..topology import Topology

_JOINING_S = 10.0  # a node that the map has added may take so long until it can be reached
_JOIN_PAUSE_S = 0.2


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """Settings of one client.

    `timeout_s`: how long a request is tried, counted from the moment it is first sent; before that it may wait in
    the client's queue as long again. An error that comes later than this is a bug.
    `attempt_timeout_s`: how long one node may take before the next one is asked, a millisecond longer for each read in
    the message. Lower means faster failover, and more needless second attempts while a healthy node is busy.
    `quiet_s`: a node that leaves a read unanswered for so long is asked whether it is there; if it stays silent for as
    long again, the next one gets the read.
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
    quiet_s: float = 0.1
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
        self.suspicion = Suspicion(
            now,
            first_s=self.settings.suspect_s,
            longest_s=self.settings.suspect_max_s,
            relapse_longest_s=self.settings.relapse_max_s,
            probation_s=self.settings.probation_s,
            probed=False,
        )
        self.suspicion.know(topology)
        self._joined: dict[str, float] = {}  # nodes that later maps have added, and when
        self._id_prefix = random.randbytes(8)
        self._id_counter = 0

    def update(self, topology: Topology) -> None:
        """Go by another map from the next attempt on."""
        known, now = set(self.routing.topology.node_names()), self.now()
        added = {name: now for name in topology.node_names() if name not in known}
        self._joined = {name: at for name, at in self._joined.items() if at > now - _JOINING_S} | added
        self.routing = Routing(topology)
        self.sole_cache = _sole_cache(topology)
        self.stale_map = False
        self.suspicion.know(topology)

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
        return not self.suspicion.remembers

    def is_well(self, node: str) -> bool:
        """Whether the node is neither suspected nor on probation, nor asked to be left alone."""
        return self.suspicion.is_clean(node)

    def choose(self, candidates: Sequence[str], tried: Collection[str] = ()) -> str | None:
        """First candidate that is neither tried nor suspected (nor near one that just failed), else the first untried;
        None when all were tried."""
        untried = [node for node in candidates if node not in tried] if tried else candidates
        return next(iter(self.suspicion.last(untried)), None)

    def unreachable(self, node: str) -> None:
        """The node could not even be asked. One that the map has just begun to name may not listen yet: that is soon
        tried again, and no failure."""
        if self.now() < self._joined.get(node, float("-inf")) + _JOINING_S:
            self.suspicion.rest(node, _JOIN_PAUSE_S)
        else:
            self.suspect(node)

    def suspect(self, node: str) -> None:
        """The node brought no answer: ask it last for a while."""
        self.suspicion.suspect(node)

    def rest(self, node: str, seconds: float) -> None:
        """The node asked to be left alone for that long: ask it last until then."""
        self.suspicion.rest(node, seconds)

    def trust(self, node: str) -> None:
        """The node answered."""
        self.suspicion.trust(node)

    def is_suspect(self, node: str) -> bool:
        """Whether the node failed lately, or asked to be left alone for now."""
        return node in self.suspicion

    def attempt_timeout_s(self, node: str, *, hasty: bool) -> float:
        """How long the node may take before the next one is asked. `hasty`: less, if it failed a short while ago."""
        settings = self.settings
        if not hasty:
            return settings.attempt_timeout_s
        return self.suspicion.timeout_s(node, settings.attempt_timeout_s, settings.probation_timeout_s)

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
