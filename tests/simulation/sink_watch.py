"""Checks of the sink's runs: epochs, fencing of cold nodes, the grace of replaced files, garbage, wiped rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from timetier.cluster.cold.block import DecodedBlock, checksum
from timetier.cluster.cold.fencing import EPOCH_FILE
from timetier.cluster.cold.link import Block, Link
from timetier.cluster.cold.run_record import decode_record, run_timeline
from timetier.cluster.keys import timeline_key
from timetier.cluster.messages import WIPE

from .plan import BUCKETS
from .trace import show_timeline
from .truth import Truth

if TYPE_CHECKING:
    from .world import World

_SUFFIX = ".arrow"


class SinkWatch:
    """The checks of one run of the simulation. `grace_s`: how long a file stays after its last block was replaced."""

    def __init__(self, world: World, truth: Truth, report: Callable[[str, str], None]) -> None:
        self.grace_s = world.plan.shape.orphan_grace_s
        self.checked_files = 0
        self._world = world
        self._truth = truth
        self._report = report
        self._epochs: dict[str, int] = {}  # by file prefix
        self._told: dict[str, int] = {}  # greatest epoch that was on the disk of each cold node
        self._began_s: dict[str, float] = {}  # by name of the run
        self._named: dict[bytes, Counter[str]] = {}  # files that the links of a bucket name, by system timeline
        self._names: Counter[str] = Counter()  # of all buckets
        self._unnamed_at: dict[str, float] = {}
        self._known: set[tuple[bytes, int, int, str]] = set()
        self._wiped: dict[bytes, list[tuple[float, int]]] = {}  # when, and up to which version

    # ------------------------------------------------------------ epochs

    def record(self, version: int) -> None:
        """An entry of the record's timeline is chosen: no epoch belongs to two runs, and none goes back."""
        history = self._truth.of(run_timeline(BUCKETS))
        for row in history.items(version).values():
            record = decode_record(row.value)
            known = self._epochs.setdefault(record.prefix, record.epoch)
            if known != record.epoch or record.epoch < max(self._epochs.values()):
                self._report("epochs of the sink", f"{record.run} writes epoch {record.epoch}: known {self._epochs}")
            elif list(self._epochs.values()).count(record.epoch) > 1:
                self._report("epochs of the sink", f"two runs have epoch {record.epoch}: {self._epochs}")
            self._began_s.setdefault(record.run, self._world.loop.now)

    def file_named(self, node: str, source: Path, path: Path) -> None:
        """A cold node has given a file its name: its run is none that a later one has fenced there.

        `source`: the name before; copies from a peer are no run's work.
        """
        told = self._told[node] = max(self._told.get(node, 0), self._on_disk(node))
        prefix = path.name.removesuffix(_SUFFIX).rpartition("-")[0]
        epoch = self._epochs.get(prefix)
        if node in self._world.lost_disks:
            return  # a disk is filled with what the peers have, garbage among it
        if not path.name.endswith(_SUFFIX) or epoch is None or source.name != path.name + ".part":
            return
        self.checked_files += 1
        if epoch < told:
            self._report("cold nodes fence stale runs", f"{node} takes {path.name} of epoch {epoch} after epoch {told}")

    def _on_disk(self, node: str) -> int:
        """The epoch on a cold node's disk."""
        for path, inode in self._world.nodes[node].cold.synced_names.items():
            if path.name == EPOCH_FILE:
                number, _, crc = bytes(inode.synced).partition(b" ")
                return int(number) if crc == f"{checksum(number):08x}".encode() else 0
        return 0

    # ------------------------------------------------------------ files

    def links_chosen(
        self, system: bytes, links: list[Link], read: Callable[[Link, Block], DecodedBlock | None]
    ) -> None:
        """The links of a bucket are these from now on."""
        before, now = self._named.get(system, Counter()), Counter(b.file for link in links for b in link.blocks)
        self._named[system] = now
        self._names += now
        self._names -= before
        for file in before:
            if file not in self._names:
                self._unnamed_at[file] = self._world.loop.now
        for link in links:
            place = system, link.window_start, link.generation, link.run
            if place not in self._known:
                self._known.add(place)
                self._no_wiped_rows(link, read)

    def file_removed(self, node: str, path: Path) -> None:
        """A cold node removes a file: no reader can need it."""
        if path.name in self._names:
            self._report("G8: every item is hot or behind a link", f"{node} removes {path.name}, which links name")
        since_s = self._world.loop.now - self._unnamed_at.get(path.name, -math.inf)
        if since_s < self.grace_s:
            self._report(
                "files outlive their readers",
                f"{node} removes {path.name} {since_s:.3f} s after its last block was replaced, not {self.grace_s:g} s",
            )

    def no_garbage(self) -> None:
        """After runs that met no error, each file is named by a link."""
        for node in self._world.nodes.values():
            clean = node.tier == "cold" and not self._world.lost_disks  # else some may stay where a disk was out
            for path in node.cold.files() if clean else []:
                if path.name.endswith(_SUFFIX) and path.name not in self._names:
                    self._report("garbage goes", f"{node.name} still has {path.name}, which no link names")

    # ------------------------------------------------------------ wiped rows

    def chosen(self, timeline: bytes, number: int) -> None:
        """An entry of a timeline is chosen."""
        entry = self._truth.of(timeline).entries[number]
        if entry.kinds is not None and WIPE in entry.kinds:
            self._wiped.setdefault(timeline, []).append((self._world.loop.now, number - 1))

    def _no_wiped_rows(self, link: Link, read: Callable[[Link, Block], DecodedBlock | None]) -> None:
        """What was wiped before a run began is not carried along by it."""
        began_s = self._began_s.get(link.run, -math.inf)
        for block in link.blocks if self._wiped else []:
            decoded = read(link, block)
            rows = decoded.all_rows() if decoded is not None else None
            for owner, version in zip(rows.owners, rows.versions, strict=True) if rows is not None else []:
                timeline = timeline_key(link.table, owner, BUCKETS)
                wiped = max([up_to for at_s, up_to in self._wiped.get(timeline, []) if at_s < began_s], default=0)
                if version <= wiped:
                    self._report(
                        "what was wiped goes with the next rewrite",
                        f"run {link.run} carries a row of {show_timeline(timeline)} of version {version} along, which "
                        f"was wiped up to {wiped} before the run began",
                    )
                    return
