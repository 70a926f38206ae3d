"""Checks of retention and of wiped timelines: what has expired or was wiped stays away, and goes from the disks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from timetier.cluster.cold.block import DecodedBlock
from timetier.cluster.cold.link import RECORDS_AT, Block, Link
from timetier.cluster.cold.sink_calls import horizon_key
from timetier.cluster.keys import (
    MIN_TIMESTAMP,
    bucket_of,
    is_system,
    split_item_key,
    split_timeline,
    system_timeline,
    timeline_hash,
)
from timetier.cluster.messages import WIPE
from timetier.cluster.paxos.rows import VERSION_BYTES, rows_prefix

from .disk import Batch
from .plan import TABLE
from .trace import show_key, show_timeline
from .truth import Truth

if TYPE_CHECKING:
    from .world import World

_HORIZON_KEY = horizon_key(TABLE.encode())
Read = Callable[[Link, Block], DecodedBlock | None]


class ExpiryWatch:
    """`on_chosen(bucket, horizon, since_s)` is called when a replica knows, first of all, that a horizon is chosen:
    that happened between `since_s` and now."""

    def __init__(self, world: World, truth: Truth, report: Callable[[str, str], None]) -> None:
        self.on_chosen: Callable[[int, int, float], None] = lambda _bucket, _horizon, _since_s: None
        self._world = world
        self._truth = truth
        self._report = report
        self._accepted_s: dict[bytes, float] = {}  # by the name of the horizon's row, when a disk had it first

    # ------------------------------------------------------------ horizons

    def committed(self, batch: Batch) -> None:
        """A replica has handed rows to its engine."""
        for name, row in batch:
            is_system_row = row is not None and name[:1] == b"R" and name[5:7] == b"\x00\x00"
            if is_system_row and name[7:-VERSION_BYTES] == _HORIZON_KEY:
                self._accepted_s.setdefault(name, self._world.loop.now)

    def chosen(self, system: bytes, known: int) -> None:
        """Entries of a system timeline after `known` are chosen."""
        history = self._truth.of(system)
        for version in range(known + 1, history.version + 1):
            row = history.items(version).get(_HORIZON_KEY)
            if row is not None and row.version == version:
                name = rows_prefix(system) + _HORIZON_KEY + version.to_bytes(VERSION_BYTES, "big")
                horizon, since_s = _decoded(row.value), self._accepted_s.get(name, 0.0)
                if horizon < self.horizon(system, version - 1):
                    self._report("horizons never decrease", f"{show_timeline(system)}: {horizon} at version {version}")
                self.on_chosen(bucket_of(system), horizon, since_s)

    def horizon(self, system: bytes, version: int | None = None) -> int:
        """Of a bucket, as of a version of its system timeline, or the last one."""
        history = self._truth.of(system)
        at = history.version if version is None else min(version, history.version)
        row = history.items(at).get(_HORIZON_KEY)
        return MIN_TIMESTAMP if row is None else _decoded(row.value)

    def horizon_of(self, timeline: bytes, version: int | None = None) -> int:
        """The same for the items of a timeline."""
        is_plain = not is_system(timeline) and split_timeline(timeline)[1] == TABLE.encode()
        return self.horizon(system_timeline(bucket_of(timeline)), version) if is_plain else MIN_TIMESTAMP

    # ------------------------------------------------------------ at rest

    def rows_are_gone(self) -> None:
        """No replica has a row that has expired."""
        for name, node in self._world.nodes.items():
            found = self._world.replica(name) if node.tier == "storage" else None
            for timeline in sorted(self._truth.timelines) if found is not None else []:
                horizon, prefix = self.horizon_of(timeline), rows_prefix(timeline)
                for row in found[1].peek_range(prefix, prefix[:-1] + bytes((prefix[-1] + 1,))) if found else []:
                    key = row[len(prefix) : -VERSION_BYTES]
                    if RECORDS_AT <= split_item_key(key)[0] < horizon:
                        self._report(
                            "what has expired is freed",
                            f"{name} has a row of {show_key(key)} of {show_timeline(timeline)}, horizon {horizon}",
                        )
                        return

    def wipes_are_noted(self, links: Callable[[bytes, int], list[Link]]) -> None:
        """Each replica knows of each timeline of which blocks hold what was wiped."""
        for timeline, wiped, link in self._held(links):
            for name in self._world.voters(timeline):
                found = self._world.replica(name)
                if found is not None and found[1].peek(b"W" + timeline) is None:
                    self._report(
                        "wiped timelines are not forgotten",
                        f"{name} has no note of {show_timeline(timeline)}, which was wiped up to {wiped}; the link of "
                        f"window {link.window_start} holds it as of {link.rules_of(_hash(timeline))}",
                    )
                    return

    def wiped_rows_are_gone(self, links: Callable[[bytes, int], list[Link]], read: Read) -> None:
        """No block that is linked holds a row that was wiped, or one that has expired with all of its window."""
        for timeline, wiped, link in self._held(links):
            for block in link.blocks_of(split_timeline(timeline)[2]):
                decoded = read(link, block)
                versions = decoded.rows_of(split_timeline(timeline)[2])[2] if decoded is not None else []
                if versions and min(versions) <= wiped:
                    self._report(
                        "what was wiped goes with the next run",
                        f"a block of window {link.window_start} holds version {min(versions)} of "
                        f"{show_timeline(timeline)}, which was wiped up to {wiped}",
                    )
                    return

    def _held(self, links: Callable[[bytes, int], list[Link]]) -> Iterator[tuple[bytes, int, Link]]:
        """(timeline, wiped, link) where a link says that its blocks may hold wiped rows."""
        for timeline, history in sorted(self._truth.timelines.items()):
            if is_system(timeline):
                continue
            kinds = {number: entry.kinds for number, entry in history.entries.items() if entry.keys is not None}
            wiped = max([number - 1 for number, of_entry in kinds.items() if WIPE in of_entry], default=0)
            system = system_timeline(bucket_of(timeline))
            for link in links(system, self._truth.of(system).version) if wiped else []:
                if link.table == split_timeline(timeline)[1] and link.holds_wiped(_hash(timeline), wiped):
                    yield timeline, wiped, link


def _hash(timeline: bytes) -> int:
    _, table, owner = split_timeline(timeline)
    return timeline_hash(table, owner)


def _decoded(value: bytes) -> int:
    return int.from_bytes(value, "little", signed=True)
