"""Chores: what a replica does to its rows after entries are chosen, a slice at a time.

* trim: log records beyond the kept tail go, and with them the rows that newer versions have superseded;
* purge: rows that a WIPE hides are deleted;
* evict: rows that a committed cold link holds are deleted, exactly those, by the rule in `Link`;
* expire: rows below a retention horizon are deleted, see `expiry.py`, which has its own notes on disk.

Evict and purge are noted on disk when their entry is accepted (`C` rows), so a crash does not forget them. All are
idempotent. Each deletes rows and raises the timeline's `floor` in the same write, so the log is never asked for a
value that is gone.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable, Generator, Iterator

from ..cold.link import Link, evict_up_to
from ..errors import ProtocolError
from ..keys import bucket_of, bucket_prefix, is_system, split_item_key, split_timeline, timeline_hash, timestamp_floor
from ..messages import NO_BALLOT
from .acceptor import Acceptor
from .core import Core
from .links import LinkIndex
from .quiet import place_in
from .rows import (
    VERSION_BYTES,
    Meta,
    chore_key,
    decode_record,
    decode_row,
    ids_record,
    log_entry,
    log_key,
    prefix_end,
    rows_prefix,
    version_of,
)
from .timeline import Timeline

logger = logging.getLogger(__name__)

RETRY_S = 0.5
MAX_IN_MEMORY = 10_000  # chores; the others wait on disk


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
        self._later: deque[tuple[float, bytes]] = deque()
        self._retried: set[bytes] = set()
        self._unread: bytes | None = None  # where the chores begin that are on disk and not in memory
        self._missed = False  # there are others before
        self._running: Iterator[bool] | None = None
        self._current = b""

    def recover(self) -> None:
        """Find the chores that an earlier life left undone."""
        self._unread = b"C"
        self._read_more()

    def _read_more(self) -> None:
        """Take chores from disk, as many as memory may hold; all of them are noted there until they are done."""
        if self._unread is None and self._missed:
            self._unread, self._missed = b"C", False
        if self._unread is None:
            return
        names = [name for name, _ in itertools.islice(self.core.engine.scan(self._unread, b"D"), MAX_IN_MEMORY)]
        self._unread = names[-1] + b"\x00" if len(names) == MAX_IN_MEMORY else None
        self._ready.extend(names)

    @property
    def pending(self) -> int:
        """Chores in memory that are not done yet, and one for those that are only on disk."""
        on_disk = self._unread is not None or self._missed
        known = len(self.core.chores_due) + len(self._ready) + len(self._later) + self.core.expiry.pending
        return known + (self._running is not None) + on_disk

    def run(self, now: float) -> bool:
        """Do one slice. True if there is more to do at once."""
        room = max(0, MAX_IN_MEMORY - len(self._ready))
        self._ready.extend(chore_key(key, entry) for key, entry in self.core.chores_due[:room])
        self._missed |= len(self.core.chores_due) > room
        self.core.chores_due.clear()
        while self._later and self._later[0][0] <= now:
            self._ready.append(self._later.popleft()[1])
        if self._running is None:
            if not self._ready and len(self._later) < MAX_IN_MEMORY:
                self._read_more()
            if self._ready:
                self._current = self._ready.popleft()
                self._running = self._chore(self._current, now)
            elif (place := self.core.expiry.next(now)) is not None:
                self._current = b""
                self._running = self.core.expiry.sweep(place, now, self._delete, self.settle)
            else:
                return False
        try:
            done = next(self._running, None)
        except ProtocolError as error:
            # A link of a later format: it waits until this program can read it, and holds up no other chore.
            logger.warning("chore %r is put off: %s", self._current, error)
            done = False
        if done is None:
            self._running = None
            self._retried.discard(self._current)
            if self._current:
                self.core.engine.delete(self._current)
        elif not done:
            self._running = None
            if len(self._later) < MAX_IN_MEMORY:
                self._later.append((now + RETRY_S, self._current))
            else:
                self._missed = True
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
            bucket = bucket_of(key)
            yield from self._evict_bucket(bucket, entry, now)
            yield from self._check_wipes(bucket, entry)
            self.links.refresh(bucket)
            self.core.standings.settled(bucket)
        else:
            yield from self._purge(key)
            self._note_wipe(key)

    def _check_wipes(self, bucket: int, entry: int) -> Iterator[bool]:
        """Blocks may hold rows of wiped timelines that they did not hold before, or hold them no longer."""
        if not entry:
            self._note_old_wipes(bucket)
        prefix = bucket_prefix(bucket)
        tables = {*self.links.of_bucket(bucket).tables, *self.core.wipes.tables_of(prefix)}
        for table in sorted(tables):
            links = self.links.of_table(bucket, table).links
            yield from self.core.wipes.check_all(place_in(prefix, table), links)

    def _note_old_wipes(self, bucket: int) -> None:
        """Wipes of a time at which none were noted are found in the marks."""
        prefix = b"M" + bucket_prefix(bucket)
        for name, row in list(self.core.engine.scan(prefix, prefix_end(prefix))):
            if not is_system(name[1:]) and Meta.decode(row).wiped:
                self._note_wipe(name[1:])

    def _note_wipe(self, key: bytes) -> None:
        """For as long as links hold what it hides; see `wipes.py`."""
        wiped = self.core.timeline(key).wiped
        if wiped:
            bucket, table, _ = split_timeline(key)
            self.core.wipes.note(key, wiped, self.links.of_table(bucket, table).links)

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
                complete &= yield from self._evict_timeline(self.core.timeline(timeline_key), link, now)
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

    def _evict_timeline(self, timeline: Timeline, link: Link, now: float) -> Generator[bool, None, bool]:
        """Delete the rows of one timeline that the link's blocks hold. False if this replica is behind.

        The rows of one item go in one slice, and so in one write.
        """
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
        seen = 0
        rows = self.core.engine.scan(low, high)
        for name, versions in itertools.groupby(rows, key=lambda row: row[0][:-VERSION_BYTES]):
            known = [(version_of(row_name), decode_row(row)[0]) for row_name, row in versions]
            seen += len(known)
            known = [row for row in known if row[0] <= timeline.chosen]
            timestamp = split_item_key(name[len(prefix) :])[0]
            last = evict_up_to(rules, timestamp, known[::-1])
            doomed += [name + version.to_bytes(VERSION_BYTES, "big") for version, _ in known if version <= last]
            if seen >= self.core.settings.chore_rows:
                self._evict(timeline.key, doomed)
                doomed, seen = [], 0
                yield True
        self._evict(timeline.key, doomed)
        return True

    def _evict(self, key: bytes, doomed: list[bytes]) -> None:
        if doomed:
            self._delete(self.core.timeline(key), doomed, max(map(version_of, doomed)))
            self.core.counters.add("rows_evicted", len(doomed))

    # ---- trim

    def tail_is_long(self, timeline: Timeline) -> bool:
        """Whether `trim` has something to do."""
        settings = self.core.settings
        too_many = timeline.chosen - timeline.log_low >= 2 * settings.log_keep_entries
        return too_many or timeline.log_bytes >= settings.log_keep_bytes

    def trim(self, timeline: Timeline) -> None:
        """Keep the log tail bounded, by number and by bytes: called after each chosen entry when the tail is long.

        By number: beyond twice `log_keep_entries` of them, so many stay. By bytes the tail has an older and a younger
        part; when the younger one, which begins at `log_mark`, has `log_keep_bytes` of keys and values, the older one
        is emptied and another part begins. So at least as much stays, about twice as much at most, for two numbers a
        timeline. Emptied entries keep their request ids until they go by number.
        """
        settings = self.core.settings
        if timeline.log_bytes >= settings.log_keep_bytes:
            self._empty(timeline, timeline.log_mark, keep_ids=True)
            timeline.log_mark, timeline.log_bytes = timeline.chosen + 1, 0
            self.core.mark(timeline)
        if timeline.chosen - timeline.log_low >= 2 * settings.log_keep_entries:
            first_kept = timeline.chosen - settings.log_keep_entries + 1
            self._empty(timeline, first_kept, keep_ids=False)
            timeline.log_low = first_kept
            self.core.mark(timeline)

    def _empty(self, timeline: Timeline, first_kept: int, *, keep_ids: bool) -> None:
        """Leave of the entries before `first_kept` only their ids, or nothing, and no row that is superseded by then.

        The caller marks the timeline in the same write.
        """
        engine, key = self.core.engine, timeline.key
        records = {
            name: decode_record(encoded)
            for name, encoded in engine.scan(log_key(key, timeline.log_low), log_key(key, first_kept))
        }
        # All reads come first: each one would commit what is pending, and a crash between two commits would leave a
        # log with a gap, which looks like one that is shorter.
        superseded: dict[bytes, None] = {}
        for record in records.values():
            for item in record.keys:
                if item:
                    superseded.update(dict.fromkeys(self._superseded(timeline, item, first_kept)))
        for name, record in records.items():
            if not keep_ids:
                engine.delete(name)
                self.core.counters.add("entries_trimmed")
            elif record.keys:
                engine.put(name, ids_record(record.ballot, record.origin, record.request_ids))
                self.core.counters.add("entries_emptied")
        for name in superseded:
            engine.delete(name)
        timeline.floor = max(timeline.floor, first_kept - 1)

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
