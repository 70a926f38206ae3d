"""The record of the sink's runs, and the epoch that it gives to each. *Pure* (scripts, see `effects.py`).

One item of an internal timeline, so decided by Paxos like any other. A run takes the next *epoch* by a conditional
write of this record before it does anything else. From then on every write to it needs the version that this run has
left, so a run that another one has followed can't write it, and learns so when it looks. Cold nodes take the epoch as a
fencing token (Kleppmann, "How to do distributed locking", 2016). What a stale run still sends to storage nodes is
harmless by itself: links are written on condition that nobody else has written links of the bucket meanwhile.

The record also says what the next run has to look at, so that it need not compare all files with all links:

- `unclean`: prefixes of the files of runs that did not end, or whose last writes may still be on their way.
- `lost`: files that lost blocks to a next generation or to retention. They are noted *before* the links that replace
  the blocks are written, so no crash can hide one. `dead_us` is the time at which a run found, behind a fence, that no
  link names the file: since then no link ever will, and readers with an old link have `orphan_grace` from then on.
- `small`: files that are worth merging when there are many of them.
- `full`: all files have to be compared with all links: there was no record, or more than it has room for.
  `overflowed`: files may have been lost without a note.
"""

from __future__ import annotations

from typing import Any

import msgspec

from ..client.item_reads import ItemQueries
from ..client.scripts import WriteRequest, read_items, write
from ..client.view import View
from ..effects import Script
from ..errors import OutcomeUnknown, ProtocolError, TimeTierError, Unavailable, VersionConflict
from ..keys import item_key, timeline_key
from ..messages import PUT
from .sink_calls import SinkSettings, strong_versions

FORMAT = 1
RUNNING, CLEAN, UNCLEAN = "running", "clean", "unclean"
MAX_UNCLEAN = 64
MAX_LOST = 4_096
MAX_SMALL = 4_096
_TABLE, _OWNER = b"_timetier", b"sink"
_KEY = item_key(0, b"run")
_ATTEMPTS = 5


class Fenced(Exception):
    """Another run has taken a later epoch: this one must stop. No `TimeTierError`: nothing goes on after it."""


class UncleanRun(msgspec.Struct, frozen=True):
    """A run whose files have to be looked at. `since_us`: when the next run found it so (its clock)."""

    prefix: str
    run: str
    epoch: int
    since_us: int


class LostFile(msgspec.Struct, frozen=True):
    """A file that lost blocks, or may soon. `dead_us`: 0 unless it is known that no link names it, nor ever will.

    `doubtful`: the run that noted it did not end cleanly, so its links may still be on their way.
    """

    file: str
    group: int
    noted_us: int
    size: int = 0
    dead_us: int = 0
    doubtful: bool = False


class SmallFile(msgspec.Struct, frozen=True):
    """A file that is smaller than most."""

    file: str
    table: str
    group: int
    size: int


class RunRecord(msgspec.Struct, frozen=True):
    """What the last run did, and what it left to the next. Times: microseconds since 1970, of the run's clock."""

    format: int = FORMAT
    epoch: int = 0
    run: str = ""
    prefix: str = ""
    state: str = CLEAN
    started_us: int = 0
    ended_us: int = 0
    full: bool = True
    overflowed: bool = False
    unclean: list[UncleanRun] = []
    lost: list[LostFile] = []
    small: list[SmallFile] = []

    def following(self, run: str, prefix: str, now_us: int) -> RunRecord:
        """The record of the run that comes next, at its start."""
        unclean, lost = list(self.unclean), list(self.lost)
        if self.state != CLEAN:
            unclean.append(UncleanRun(self.prefix, self.run, self.epoch, now_us))
            lost = [file if file.dead_us else msgspec.structs.replace(file, doubtful=True) for file in lost]
        follower = RunRecord(
            epoch=self.epoch + 1,
            run=run,
            prefix=prefix,
            state=RUNNING,
            started_us=now_us,
            full=self.full,
            overflowed=self.overflowed,
            unclean=unclean,
            lost=lost,
            small=self.small,
        )
        return follower.bounded()

    def bounded(self) -> RunRecord:
        """The same with at most as many notes as there is room for."""
        over = len(self.unclean) > MAX_UNCLEAN or len(self.lost) > MAX_LOST
        if not over and len(self.small) <= MAX_SMALL:
            return self
        return msgspec.structs.replace(
            self,
            full=self.full or over,
            overflowed=self.overflowed or over,
            unclean=self.unclean[-MAX_UNCLEAN:],
            lost=self.lost[-MAX_LOST:],
            small=self.small[-MAX_SMALL:],
        )


_decoder = msgspec.json.Decoder(RunRecord)


def decode_record(value: bytes) -> RunRecord:
    """Record of an item's value. Raises ProtocolError if it is none, or of a later format."""
    try:
        record = _decoder.decode(value)
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"malformed record of the sink's runs: {error}") from None
    if record.format > FORMAT:
        raise ProtocolError(f"a record of the sink's runs of format {record.format}; this version reads {FORMAT}")
    return record


def run_timeline(buckets: int) -> bytes:
    """Key of the timeline that holds the record, in a cluster with so many buckets."""
    return timeline_key(_TABLE, _OWNER, buckets)


def read_record(view: View, settings: SinkSettings) -> Script[tuple[RunRecord, int]]:
    """The record as of now, and the version of its timeline; an empty one with 0 before the first run.

    Raises Unavailable, ProtocolError.
    """
    timeline = run_timeline(view.routing.topology.buckets)
    results = yield from read_items(view, ItemQueries([timeline], [_KEY]), settings.write_timeout_s)
    (found,) = results.rows()
    if isinstance(found, TimeTierError):
        raise Unavailable(f"the record of the sink's runs can't be read: {found.message}")
    record = RunRecord() if found.item is None else decode_record(found.item.value)
    return record, found.timeline_version


class Epoch:
    """The epoch of one run, and its hold on the record."""

    def __init__(self, view: View, settings: SinkSettings, run: str, now_us: int) -> None:
        """`now_us`: microseconds since 1970."""
        self.record = RunRecord()
        self._view = view
        self._settings = settings
        self._run = run
        self._now_us = now_us
        self._version = 0
        self._timeline = run_timeline(view.routing.topology.buckets)

    @property
    def number(self) -> int:
        """The epoch, from 1; 0 until it is taken."""
        return self.record.epoch

    @property
    def prefix(self) -> str:
        """With which the names of the run's files begin: no two runs have the same, not even under one name."""
        return self.record.prefix

    def take(self) -> Script[None]:
        """Take the next epoch; a run that is still at work is fenced by that. Raises Unavailable, ProtocolError."""
        tried: set[str] = set()  # an attempt of unknown fate may have been followed by another run, so each has its own
        for _ in range(_ATTEMPTS):
            last, version = yield from read_record(self._view, self._settings)
            if last.prefix in tried:
                self.record, self._version = last, version
                return
            prefix = f"{self._run}-{self._view.random.randbytes(4).hex()}"
            tried.add(prefix)
            record = last.following(self._run, prefix, self._now_us)
            outcome = yield from self._put(record, version)
            if isinstance(outcome, int):
                self.record, self._version = record, outcome
                return
            if not isinstance(outcome, VersionConflict | OutcomeUnknown):
                raise Unavailable(f"the run can't take an epoch: {outcome.message}")
        raise Unavailable("the run can't take an epoch: other runs begin all the time")

    def check(self) -> Script[None]:
        """Make sure that no later run has begun. Raises Fenced; Unavailable when a majority does not answer."""
        nodes = self._view.routing.storage_order(self._timeline)
        found = yield from strong_versions(self._view, nodes, [self._timeline], self._settings)
        if found[self._timeline] != self._version:
            yield from self._look()

    def write(self, **changes: Any) -> Script[None]:
        """Change fields of the record, which is also a check. Raises Fenced, Unavailable."""
        record = msgspec.structs.replace(self.record, **changes).bounded()
        for _ in range(_ATTEMPTS):
            outcome = yield from self._put(record, self._version)
            if isinstance(outcome, int):
                self.record, self._version = record, outcome
                return
            if not isinstance(outcome, VersionConflict | OutcomeUnknown):
                raise Unavailable(f"the record of the run can't be written: {outcome.message}")
            yield from self._look()
            if self.record == record:
                return
        raise Unavailable("the record of the run can't be written: nobody tells whether it was")

    def _look(self) -> Script[None]:
        """Read the record again: it is this run's, or Fenced is raised."""
        last, version = yield from read_record(self._view, self._settings)
        if last.prefix != self.prefix:
            raise Fenced(f"fenced by run {last.run}, epoch {last.epoch}")
        self.record, self._version = last, version

    def _put(self, record: RunRecord, version: int) -> Script[int | TimeTierError]:
        value = msgspec.json.encode(record)
        request = WriteRequest(self._timeline, bytes((PUT,)), [_KEY], [value], if_version=version)
        (outcome,) = yield from write(self._view, [request], self._settings.write_timeout_s)
        return outcome
