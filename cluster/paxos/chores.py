"""Chores: what a replica does to its rows after entries are chosen, a slice at a time.

* trim: log records beyond the kept tail go, and with them the rows that newer versions have superseded;
* purge: rows that a WIPE hides are deleted;
* evict: rows that a committed cold link holds are deleted, exactly those, by the rule in `Link`.

Evict and purge are noted on disk when their entry is accepted (`C` rows), so a crash does not forget them. All are
idempotent. Each deletes rows and raises the timeline's `floor` in the same write, so the log is never asked for a
value that is gone.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterator

from ..cold.link import Link, evict_up_to
from ..errors import ProtocolError
from ..keys import bucket_of, bucket_prefix, is_system, split_item_key, split_timeline, timeline_hash, timestamp_floor
from ..messages import NO_BALLOT
from .acceptor import Acceptor
from .core import Core, Timeline
from .links import LinkIndex
from .rows import (
    VERSION_BYTES,
    chore_key,
    decode_record,
    decode_row,
    log_entry,
    log_key,
    prefix_end,
    rows_prefix,
    version_of,
)

logger = logging.getLogger(__name__)

RETRY_S = 0.5


class Chores:
    """Background work on the rows of one replica; `run` does a bounded slice of it."""

    def __init__(
        self, core: Core, acceptor: Acceptor, links: LinkIndex, settle: Callable[[Timeline, float], None]
    ) -> None:
        self.core = core
        self.acceptor = acceptor
        self.links = links
        self.settle = settle
        self._ready: deque[bytes] = deque()  # chore keys
        self._later: list[tuple[float, bytes]] = []
        self._retried: set[bytes] = set()
        self._running: Iterator[bool] | None = None
        self._current = b""

    def recover(self) -> None:
        """Find the chores that an earlier life left undone."""
        self._ready.extend(name for name, _ in self.core.engine.scan(b"C", b"D"))

    @property
    def pending(self) -> int:
        """Chores that are not done yet."""
        return len(self.core.chores_due) + len(self._ready) + len(self._later) + (self._running is not None)

    def run(self, now: float) -> bool:
        """Do one slice. True if there is more to do at once."""
        self._ready.extend(chore_key(key, entry) for key, entry in self.core.chores_due)
        self.core.chores_due.clear()
        while self._later and self._later[0][0] <= now:
            self._ready.append(self._later.pop(0)[1])
        if self._running is None:
            if not self._ready:
                return False
            self._current = self._ready.popleft()
            self._running = self._chore(self._current, now)
        try:
            done = next(self._running, None)
        except ProtocolError as error:
            # A link of a later format: it waits until this program can read it, and holds up no other chore.
            logger.warning("chore %r is put off: %s", self._current, error)
            done = False
        if done is None:
            self._running = None
            self._retried.discard(self._current)
            self.core.engine.delete(self._current)
        elif not done:
            self._running = None
            self._later.append((now + RETRY_S, self._current))
        return self._running is not None or bool(self._ready)

    def _chore(self, name: bytes, now: float) -> Iterator[bool]:
        """Yields True after each slice; False when it must be tried again later."""
        key, entry = name[1:-8], log_entry(name)
        timeline = self.core.timeline(key)
        if timeline.chosen < entry:
            if timeline.record is not None:
                # Accepted, not known to be chosen. After a restart nobody may remember: then find out.
                if name in self._retried:
                    self.settle(timeline, now)
                self._retried.add(name)
                yield False
            return
        if is_system(key):
            # The engine's log keeps its order: if an eviction survives a crash, so does the link being chosen.
            self.core.mark(timeline)
            yield from self._evict_bucket(bucket_of(key), entry, now)
        else:
            yield from self._purge(key)

    # ---- purge

    def _purge(self, key: bytes) -> Iterator[bool]:
        prefix = rows_prefix(key)
        wiped = self.core.timeline(key).wiped
        doomed: list[bytes] = []
        for seen, (name, _) in enumerate(self.core.engine.scan(prefix, prefix_end(prefix)), 1):
            if version_of(name) <= wiped:
                doomed.append(name)
            if seen % self.core.settings.chore_rows == 0:
                self._delete(self.core.timeline(key), doomed, wiped)
                doomed = []
                yield True
        self._delete(self.core.timeline(key), doomed, wiped)

    def _delete(self, timeline: Timeline, names: list[bytes], floor: int) -> None:
        if not names:
            return
        for name in names:
            self.core.engine.delete(name)
        timeline.floor = max(timeline.floor, floor)
        self.core.mark(timeline)

    # ---- evict

    def _evict_bucket(self, bucket: int, entry: int, now: float) -> Iterator[bool]:
        tables = self.links.of_bucket(bucket).tables.values()
        links = [link for table in tables for link, at in zip(table.links, table.entries, strict=True) if at == entry]
        complete = True
        for link in links:
            for timeline_key in self._timelines_of(link):
                yield True
                complete &= self._evict_timeline(self.core.timeline(timeline_key), link, now)
        if not complete:
            yield False

    def _timelines_of(self, link: Link) -> Iterator[bytes]:
        """Timelines of the link that still have rows here; skips from one to the next by seeking."""
        prefix = b"R" + bucket_prefix(link.bucket) + bytes((len(link.table),)) + link.table
        at, end = prefix, prefix_end(prefix)
        while True:
            row = next(iter(self.core.engine.scan(at, end)), None)
            if row is None:
                return
            owner_at = len(prefix)
            key = row[0][1 : owner_at + 1 + row[0][owner_at]]
            if link.rules_of(timeline_hash(link.table, split_timeline(key)[2])):
                yield key
            at = prefix_end(rows_prefix(key))

    def _evict_timeline(self, timeline: Timeline, link: Link, now: float) -> bool:
        """Delete the rows of one timeline that the link's blocks hold. False if this replica is behind."""
        rules = link.rules_of(timeline_hash(link.table, split_timeline(timeline.key)[2]))
        if timeline.chosen < max([rule.version for rule in rules], default=0):
            # Behind, or all replicas have restarted and none remembers that its last entry was chosen.
            for peer in self.core.peers:
                timeline.asked_until = 0.0
                self.acceptor.fetch(timeline, peer, now)
            if timeline.accepted != NO_BALLOT:
                self.settle(timeline, now)
            return False
        prefix = rows_prefix(timeline.key)
        low = prefix + timestamp_floor(link.window_start)
        high = prefix + timestamp_floor(link.window_end)
        doomed: list[bytes] = []
        rows = self.core.engine.scan(low, high)
        for name, versions in itertools.groupby(rows, key=lambda row: row[0][:-VERSION_BYTES]):
            known = [(version_of(row_name), decode_row(row)[0]) for row_name, row in versions]
            known = [row for row in known if row[0] <= timeline.chosen]
            timestamp = split_item_key(name[len(prefix) :])[0]
            last = evict_up_to(rules, timestamp, known[::-1])
            doomed += [name + version.to_bytes(VERSION_BYTES, "big") for version, _ in known if version <= last]
        if doomed:
            self._delete(timeline, doomed, max(map(version_of, doomed)))
            self.core.counters.add("rows_evicted", len(doomed))
        return True

    # ---- trim

    def trim(self, timeline: Timeline) -> None:
        """Keep the log tail bounded: called after each chosen entry, works once per `log_keep_entries` of them."""
        keep = self.core.settings.log_keep_entries
        if timeline.chosen - timeline.log_low < 2 * keep:
            return
        first_kept = timeline.chosen - keep + 1
        key = timeline.key
        doomed: list[bytes] = []
        superseded: list[bytes] = []
        for name, encoded in list(self.core.engine.scan(log_key(key, timeline.log_low), log_key(key, first_kept))):
            doomed.append(name)
            for item in decode_record(encoded).keys:
                if item:
                    superseded += self._superseded(timeline, item, first_kept)
        for name in dict.fromkeys(doomed + superseded):
            self.core.engine.delete(name)
        timeline.log_low = first_kept
        timeline.floor = max(timeline.floor, first_kept - 1)
        self.core.mark(timeline)
        self.core.counters.add("entries_trimmed", len(doomed))

    def _superseded(self, timeline: Timeline, item: bytes, first_kept: int) -> list[bytes]:
        """Rows of one item that another row hides at every version from `first_kept` - 1 on.

        So the rows are whole as of each version from the floor on, which a state transfer in several pieces relies on.
        """
        prefix = rows_prefix(timeline.key) + item
        versions = [
            name
            for name, _ in self.core.engine.scan(prefix, prefix + first_kept.to_bytes(VERSION_BYTES, "big"))
            if len(name) == len(prefix) + VERSION_BYTES
        ]
        return versions[:-1]
