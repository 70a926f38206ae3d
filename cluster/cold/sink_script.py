"""The sink: moves old rows of the storage tier into blocks of the cold tier. *Pure* (a script, see `effects.py`).

For each table, storage group and bucket: scan the eligible rows on one replica, make sure that the snapshot is strong,
plan (`sinking.py`), read the blocks that get a next generation, add the blocks to the file of the bucket's cold group.
When a file is full, or the group is done: copy the file to its cold nodes, one after the other, and only when all of
them have it verified on disk write the links. All links of a bucket go in one conditional write on the bucket's system
timeline, with the version at which it was scanned. The storage nodes evict by themselves what a chosen link covers.

**A crash** leaves whole rows in the storage tier and at most files that no link names; running again is all that is
ever needed, and `orphans.py` removes the files. **Two runs at once** scan the same rows; of each bucket's conditional
writes one is applied, and the other meets a VersionConflict: that run's blocks of the bucket are garbage (`fenced`).

**A strong snapshot.** A timeline's rows are used only when they were scanned at a version that nothing acknowledged
before the question exceeds: a majority is asked after the scan, and what turned out to be behind is scanned again.
A timeline that is written all the time passes too, because the second scan is compared with the first question.
What is still behind goes in the next run and is counted.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field

import xxhash

from ..client.scripts import WriteRequest, write
from ..client.view import View
from ..effects import Script
from ..errors import InvalidRequest, ProtocolError, TimeTierError, TooLarge, Unavailable, VersionConflict
from ..keys import MAX_VALUE_BYTES, system_timeline
from ..messages import DELETE, PUT, Scan, Scanned
from ..topology import TablePolicy
from .block import FileBuilder, Rows, checksum
from .link import Link, decode_link, encode_link
from .orphans import remove_orphans
from .sink_calls import SinkSettings, ask_first, copy_file, horizon_key, read_block, rest, strong_versions
from .sinking import (
    CutOffs,
    Timeline,
    Window,
    expired_links,
    make_link,
    merge_window,
    next_horizon,
    split_stale,
    timelines_of,
    windows_of,
)

MAX_ERRORS = 100
_SCANS = 3  # of one page, until its snapshot is strong
_FAILED_BUCKETS = 3  # one after the other, until a group is given up
_WRITES_AT_ONCE = 256
_WRITE_BYTES = 4 << 20  # of one conditional write
_WRITE_ITEMS = 1_000
_PENDING_FILES = 4  # files' worth of blocks held in memory, over all cold groups


@dataclass(frozen=True, slots=True)
class TableSink:
    """One table to sink, and how far."""

    table: bytes
    policy: TablePolicy
    cut_offs: CutOffs


@dataclass(slots=True)
class SinkReport:
    """What a run did.

    `rows`: rows that left the storage tier, tombstones included. `raw_bytes`, `cold_bytes`: of the rows in the blocks
    that were linked, before and after encoding. `fenced_buckets`: another run was faster there.
    `skipped_timelines`: no strong snapshot was to be had.
    """

    run: str
    rows: int = 0
    raw_bytes: int = 0
    cold_bytes: int = 0
    blocks: int = 0
    files: int = 0
    buckets: int = 0
    fenced_buckets: int = 0
    skipped_timelines: int = 0
    orphans_removed: int = 0
    seconds: float = 0.0
    errors: list[str] = field(default_factory=list)

    def add_error(self, text: str) -> None:
        """Note an error; beyond a bound only that there were more."""
        if len(self.errors) < MAX_ERRORS:
            self.errors.append(text)
        elif len(self.errors) == MAX_ERRORS:
            self.errors.append("further errors are not listed")

    def to_json(self) -> str:
        """One JSON object with the fields."""
        return json.dumps(asdict(self))


@dataclass(frozen=True, slots=True)
class SinkProgress:
    """How far a run is. Buckets are counted over all its tables."""

    table: str
    buckets_done: int
    buckets_total: int
    rows: int
    raw_bytes: int


@dataclass(slots=True)
class _Gathered:
    """What the scans of one bucket brought. `go_on`: its bucket and cursor, when the bucket was too large."""

    bucket: int
    next_bucket: int
    timelines: list[Timeline]
    links: list[Link]
    system_version: int
    horizon: int
    go_on: tuple[int, bytes] | None = None


@dataclass(slots=True)
class _Pending:
    """Links of a bucket whose file is not yet written."""

    bucket: int
    system_version: int
    links: list[Link]
    mutations: list[tuple[int, bytes, bytes]]
    rows: int


@dataclass(slots=True)
class _Open:
    """The file of one cold group that is being filled, and the links that wait for it."""

    builder: FileBuilder
    pending: list[_Pending] = field(default_factory=list)


def sink(
    view: View,
    tables: Sequence[TableSink],
    *,
    run: str,
    now_us: int,
    settings: SinkSettings,
    progress: Callable[[SinkProgress], None] = lambda _: None,
) -> Script[SinkReport]:
    """Run the sink once.

    `run`: its name in files and links, 1 to 40 of a-z 0-9 -. `now_us`: microseconds since 1970, for the horizon of
    retention. Whatever goes wrong with a part of the data is in the report's `errors`; the rest is done.
    """
    if not run or len(run) > 40 or not set(run) <= set("abcdefghijklmnopqrstuvwxyz0123456789-"):
        raise InvalidRequest(f"run={run!r}: pass 1 to 40 of a-z 0-9 -")
    return (yield from _Run(view, tables, run, now_us, settings, progress).go())


class _Run:
    def __init__(
        self,
        view: View,
        tables: Sequence[TableSink],
        run: str,
        now_us: int,
        settings: SinkSettings,
        progress: Callable[[SinkProgress], None],
    ) -> None:
        self.view = view
        self.tables = tables
        self.run = run
        self.now_us = now_us
        self.settings = settings
        self.progress = progress
        self.report = SinkReport(run)
        self.referenced: set[str] = set()
        self.complete = True  # every bucket was scanned, so `referenced` has every file that links name
        self.refused: set[int] = set()  # cold groups that did not take a file
        self.open: dict[int, _Open] = {}
        self.buckets_done = 0
        # No two processes share file names, not even under one run's name.
        self.file_prefix = f"{run}-{view.random.randbytes(4).hex()}"
        self.file_count = 0

    def go(self) -> Script[SinkReport]:
        started_s = self.view.now()
        for task in self.tables:
            for group in range(self.view.routing.topology.storage_groups):
                yield from self._sink_group(task, group)
        if self.complete:
            tables = {task.table for task in self.tables}
            orphans = yield from remove_orphans(self.view, self.run, self.referenced, tables, self.settings)
            self.report.orphans_removed = orphans.removed
            for error in orphans.errors:
                self.report.add_error(error)
        self.report.seconds = self.view.now() - started_s
        return self.report

    # ------------------------------------------------------------ one storage group

    def _sink_group(self, task: TableSink, group: int) -> Script[None]:
        buckets: list[int] = self.view.routing.buckets_of_storage_group(group).tolist()
        done_before = self.buckets_done
        at = failed = 0
        bucket, cursor = (buckets[0] if buckets else -1), b""
        while bucket >= 0:
            try:
                gathered = yield from self._gather(task, bucket, cursor)
                failed = 0 if gathered.timelines else failed
            except TimeTierError as error:
                self._fail(f"bucket {bucket} can't be scanned: {error.message}")
                failed += 1
                if failed == _FAILED_BUCKETS:
                    self._fail(f"storage group {group} is given up after {failed} buckets in a row")
                    break
                at = bisect_left(buckets, bucket + 1)
                bucket, cursor = (buckets[at] if at < len(buckets) else -1), b""
                continue
            yield from self._take(task, gathered)
            if gathered.go_on is not None:
                yield from self._flush_all(task)  # the next scan of this bucket must see these links
                bucket, cursor = gathered.go_on
            else:
                bucket, cursor = gathered.next_bucket, b""
            at = bisect_left(buckets, bucket) if bucket >= 0 else len(buckets)
            self._tell(task, done_before + at)
        yield from self._flush_all(task)
        self.buckets_done = done_before + len(buckets)
        self._tell(task, self.buckets_done)

    def _tell(self, task: TableSink, done: int) -> None:
        total = self.view.routing.topology.buckets * len(self.tables)
        self.progress(SinkProgress(task.table.decode(), done, total, self.report.rows, self.report.raw_bytes))

    def _fail(self, text: str) -> None:
        self.report.add_error(text)
        self.complete = False

    # ------------------------------------------------------------ scanning

    def _gather(self, task: TableSink, bucket: int, cursor: bytes) -> Script[_Gathered]:
        """Rows of the first bucket from `bucket` on that has any. Raises TimeTierError."""
        found: _Gathered | None = None
        size = 0
        while True:
            page, timelines = yield from self._scan_page(task, bucket, cursor)
            if page.next_bucket == page.scanned_bucket and not page.next_cursor:
                # The replica stopped before this bucket, after many with nothing to sink.
                if timelines or found is not None or page.next_bucket <= bucket:
                    raise ProtocolError(f"a scan of bucket {bucket} does not go on")
                bucket = page.next_bucket
                continue
            if found is None:
                links = [decode_link(value) for value in page.links]
                self.referenced.update(block.file for link in links for block in link.blocks)
                found = _Gathered(page.scanned_bucket, page.next_bucket, [], links, page.system_version, page.horizon)
            elif page.scanned_bucket != found.bucket:
                raise ProtocolError(f"a scan of bucket {found.bucket} went on in bucket {page.scanned_bucket}")
            elif page.system_version != found.system_version:
                raise Unavailable("its links changed during the scan: another run is at work")
            usable, stale = split_stale(timelines, found.links)
            self.report.skipped_timelines += len(stale)
            found.timelines += usable
            size += sum(map(len, page.values)) + sum(map(len, page.keys))
            found.next_bucket = page.next_bucket
            if page.next_bucket < 0 or page.next_bucket != page.scanned_bucket:
                if 0 <= page.next_bucket < page.scanned_bucket:
                    raise ProtocolError(f"a scan of bucket {bucket} went back to bucket {page.next_bucket}")
                return found
            if (page.next_bucket, page.next_cursor) == (bucket, cursor):
                raise ProtocolError("a scan does not go on")
            bucket, cursor = page.next_bucket, page.next_cursor
            if size >= self.settings.bucket_bytes:
                found.go_on = (bucket, cursor)
                return found

    def _scan_page(self, task: TableSink, bucket: int, cursor: bytes) -> Script[tuple[Scanned, list[Timeline]]]:
        """A page of rows, and those of its timelines whose snapshot is strong. Raises TimeTierError."""
        view, settings = self.view, self.settings
        order = view.routing.storage_order(system_timeline(bucket))
        message = Scan(
            bucket, task.table, task.cut_offs.event_before, task.cut_offs.written_before, cursor, settings.scan_bytes
        )
        floors: dict[bytes, int] = {}
        attempts = 0
        while True:
            attempts += 1
            began_s = view.now()
            _, page = yield from ask_first(view, order, message, Scanned, settings)
            timelines = timelines_of(page, task.table, task.cut_offs)
            unknown = [timeline.key for timeline in timelines if timeline.key not in floors]
            if unknown:
                floors.update((yield from strong_versions(view, order, unknown, settings)))
            strong = [timeline for timeline in timelines if timeline.version >= floors[timeline.key]]
            if page.keys:
                yield from rest(view, began_s, settings)
            if len(strong) == len(timelines) or attempts == _SCANS:
                self.report.skipped_timelines += len(timelines) - len(strong)
                return page, strong

    # ------------------------------------------------------------ planning one bucket

    def _take(self, task: TableSink, gathered: _Gathered) -> Script[None]:
        """Add a bucket's windows to the file of its cold group."""
        if gathered.bucket < 0:  # the replica has nothing more
            return
        cold_group = self.view.routing.cold_group_of(gathered.bucket)
        if cold_group in self.refused:
            return
        horizon = next_horizon(gathered.horizon, task.policy, self.now_us)
        mutations = [(DELETE, link.key, b"") for link in expired_links(gathered.links, horizon)]
        if horizon != gathered.horizon:  # first, so that no link goes before what it covers has expired
            mutations.insert(0, (PUT, horizon_key(task.table), horizon.to_bytes(8, "little", signed=True)))
        pending = _Pending(gathered.bucket, gathered.system_version, [], mutations, 0)
        opened = self._open_file(task, cold_group)
        wiped = {timeline.owner: timeline.wiped for timeline in gathered.timelines}
        for window in windows_of(gathered.timelines, gathered.links, task.policy.window, horizon):
            try:
                old_rows = yield from self._old_rows(window)
                rows = merge_window(window, old_rows, wiped, horizon)
                link = self._add(task, opened.builder, gathered.bucket, window, rows)
            except TimeTierError as error:
                self._fail(f"bucket {gathered.bucket}, window {window.start} is left alone: {error.message}")
                continue
            pending.links.append(link)
            pending.mutations.append((PUT, link.key, encode_link(link)))
            pending.rows += sum(high - low for _, low, high in window.parts)
        if pending.mutations:
            opened.pending.append(pending)
        if opened.builder.size >= self.settings.file_bytes:
            yield from self._flush(task, cold_group)
        elif sum(file.builder.size for file in self.open.values()) >= _PENDING_FILES * self.settings.file_bytes:
            yield from self._flush(task, max(self.open, key=lambda group: self.open[group].builder.size))

    def _old_rows(self, window: Window) -> Script[list[Rows]]:
        found: list[Rows] = []
        for block in window.old.blocks if window.old is not None else []:
            assert window.old is not None
            decoded = yield from read_block(self.view, window.old, block, self.settings)
            found.append(decoded.all_rows())
        return found

    def _add(self, task: TableSink, builder: FileBuilder, bucket: int, window: Window, rows: Rows) -> Link:
        blocks = builder.add(
            rows,
            bucket=bucket,
            window_start=window.start,
            window_end=window.end,
            generation=window.generation,
            block_rows=self.settings.block_rows,
            block_bytes=self.settings.block_bytes,
        )
        link = make_link(
            window,
            bucket=bucket,
            table=task.table,
            cut_offs=task.cut_offs,
            run=self.run,
            rows=rows,
            blocks=blocks,
        )
        size = len(encode_link(link))
        if size > MAX_VALUE_BYTES:
            raise TooLarge(
                f"its link has {size} bytes, the limit is {MAX_VALUE_BYTES}: make the table's window shorter",
                limit=MAX_VALUE_BYTES,
            )
        return link

    # ------------------------------------------------------------ files and links

    def _open_file(self, task: TableSink, cold_group: int) -> _Open:
        opened = self.open.get(cold_group)
        if opened is None:
            self.file_count += 1
            name = f"{self.file_prefix}-{self.file_count:05d}.arrow"
            builder = FileBuilder(
                name, table=task.table, per_second=task.policy.per_second, cold_group=cold_group, run=self.run
            )
            opened = self.open[cold_group] = _Open(builder)
        return opened

    def _flush_all(self, task: TableSink) -> Script[None]:
        for cold_group in sorted(self.open):
            yield from self._flush(task, cold_group)

    def _flush(self, task: TableSink, cold_group: int) -> Script[None]:
        """Copy the file to its cold nodes, then write the links that wait for it."""
        opened = self.open.pop(cold_group)
        if opened.builder.entries:
            try:
                yield from self._copy(opened.builder, cold_group)
            except TimeTierError as error:
                self.refused.add(cold_group)
                self._fail(f"cold group {cold_group} did not take {opened.builder.file}: {error.message}")
                return
        for start in range(0, len(opened.pending), _WRITES_AT_ONCE):
            yield from self._link(opened.pending[start : start + _WRITES_AT_ONCE])

    def _copy(self, builder: FileBuilder, cold_group: int) -> Script[None]:
        topology = self.view.routing.topology
        data = builder.finish()
        disk = xxhash.xxh3_64_intdigest(builder.file.encode()) % topology.cold_disks
        nodes = [topology.cold_node(cold_group, replica) for replica in range(topology.cold_replicas)]
        yield from copy_file(self.view, nodes, builder.file, disk, data, checksum(data), self.settings)
        self.referenced.add(builder.file)
        self.report.files += 1

    def _link(self, waiting: list[_Pending]) -> Script[None]:
        """Write the links of some buckets; a bucket's go in one write, or in a chain of them if they are many."""
        chains = [(pending, list(_parts(pending.mutations))) for pending in waiting]
        while chains:
            requests = [
                WriteRequest(
                    system_timeline(pending.bucket),
                    bytes(kind for kind, _, _ in parts[0]),
                    [key for _, key, _ in parts[0]],
                    [value for _, _, value in parts[0]],
                    if_version=pending.system_version,
                )
                for pending, parts in chains
            ]
            outcomes = yield from write(self.view, requests, self.settings.write_timeout_s)
            rest = []
            for (pending, parts), outcome in zip(chains, outcomes, strict=True):
                if isinstance(outcome, VersionConflict):
                    self.report.fenced_buckets += 1
                elif isinstance(outcome, TimeTierError):
                    self._fail(f"bucket {pending.bucket}: its links may not have been written: {outcome.message}")
                elif len(parts) > 1:
                    pending.system_version = outcome
                    rest.append((pending, parts[1:]))
                else:
                    self._count(pending)
            chains = rest

    def _count(self, pending: _Pending) -> None:
        report = self.report
        report.buckets += bool(pending.links)
        report.rows += pending.rows
        for link in pending.links:
            report.raw_bytes += link.raw_bytes
            report.blocks += len(link.blocks)
            report.cold_bytes += sum(block.length for block in link.blocks)


def _parts(mutations: list[tuple[int, bytes, bytes]]) -> Iterator[list[tuple[int, bytes, bytes]]]:
    """Mutations in parts that one write takes."""
    part: list[tuple[int, bytes, bytes]] = []
    size = 0
    for mutation in mutations:
        more = len(mutation[1]) + len(mutation[2])
        if part and (size + more > _WRITE_BYTES or len(part) == _WRITE_ITEMS):
            yield part
            part, size = [], 0
        part.append(mutation)
        size += more
    if part:
        yield part
