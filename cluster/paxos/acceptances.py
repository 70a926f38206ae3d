"""Acceptances of many timelines in one step, a column at a time (*pure*).

Nearly every entry has one item and serves one request, is proposed in round 0 by the life that proposed the entry
before, and meets an acceptor that has nothing open. For such entries `Acceptances` does exactly what
`Acceptor.accept` does for each, without an object an entry: rows are put together from what the whole step has in
common. Every other entry goes the way of `Acceptor.accept`; who uses this sees to it that nothing is read from the
engine between the first `add` and `close`, since a read commits what is pending.
"""

from __future__ import annotations

from ..messages import DELETE, PUT, Ballot
from .core import Core
from .rows import AFTER_ID, VERSION_BYTES, VOTE, record_head, row_head
from .timeline import Timeline


class Acceptances:
    """Acceptances at one ballot of round 0, all in the pending engine batch, number `batch`."""

    def __init__(self, core: Core, ballot: Ballot) -> None:
        self.timelines: list[Timeline] = []
        self._core = core
        self._ballot = ballot
        self.batch = core.engine.sequence
        self._names: list[bytes] = []
        self._rows: list[bytes] = []
        self._written = -1
        self._record_head = b""
        self._row_heads = (b"", b"")
        self._watches_age = core.quiet.watches or core.expiry.watches

    def add(self, timeline: Timeline, written: int, request_id: bytes, kind: int, item: bytes, content: bytes) -> None:
        """Accept a value for entry chosen+1 of a timeline. It is a PUT or DELETE of an item with a key of at most
        `SHORT_ITEM` bytes; the timeline is no system timeline, has an entry, and has accepted nothing after it."""
        if written != self._written:
            self._written = written
            self._record_head = record_head(self._ballot, written)
            self._row_heads = row_head(written, PUT), row_head(written, DELETE)
        key = timeline.key
        version = (timeline.chosen + 1).to_bytes(VERSION_BYTES, "big")
        record = self._record_head + request_id + AFTER_ID[kind][len(item)] + item + VOTE
        self._names += (b"L" + key + version, b"R" + key + item + version)
        self._rows += (record, self._row_heads[kind] + content)
        timeline.facts = written, request_id, kind, item
        timeline.open_bytes = len(record) + len(content)
        timeline.accepted = self._ballot
        timeline.dirty = self.batch
        self.timelines.append(timeline)
        if self._watches_age:
            self._core.quiet.note(key, written, (item,))
            self._core.expiry.note(key, (item,))

    def close(self) -> int:
        """Write what was added. Number of the engine batch that holds it, 0 if that is nothing."""
        timelines = self.timelines
        if not timelines:
            return 0
        core = self._core
        core.engine.put_all(self._names, self._rows)
        core.versions.changed += timelines
        core.journal.note_all([timeline.key for timeline in timelines])
        return self.batch
