"""The sink: moves old rows of the storage tier into blocks of the cold tier. *Pure* (a script, see `effects.py`).

1. Take the next epoch (`run_record.py`): a run that is still at work is fenced by that.
2. Remove what is garbage by the record of the runs before, and choose files to be rewritten (`garbage.py`).
3. For each table, storage group and bucket that has something to do: scan the eligible rows on one replica and make
   sure that the snapshot is strong (`gathering.py`), plan (`sinking.py`, `windows.py`), merge with the blocks that get
   a next generation, and add blocks to the file of the bucket's cold group. Files are copied and linked by `filing.py`.
4. Judge the files that lost blocks, and say in the record how the run ended.

The storage nodes evict by themselves what a chosen link covers.

**A crash** leaves whole rows in the storage tier and at most files that no link names; running again is all that is
ever needed. **Two runs at once**: the later one has the greater epoch, and the earlier one stops at its next step with
what has become of its data in the hands of conditional writes: of each bucket's links one run's are applied.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

from ..client.view import View
from ..effects import Script
from ..errors import InvalidRequest, TimeTierError
from ..keys import is_internal, system_timeline, timeline_key
from ..messages import DELETE, PUT
from .cold_calls import read_block
from .filing import Filing, Pending
from .garbage import Garbage
from .gathering import Gathered, gather
from .merging import merge_window
from .pacing import Traffic, paced
from .rows import Rows
from .run_record import CLEAN, UNCLEAN, Epoch, Fenced
from .sink_calls import SinkSettings, horizon_key, wiped_versions
from .sink_report import SinkProgress, SinkReport
from .sink_run import SinkRun, TableSink
from .sinking import Window, expired_links, next_horizon, windows_of
from .windows import split_waiting, with_rewritten, with_wiped

__all__ = ["SinkProgress", "SinkReport", "TableSink", "sink"]

_FAILED_BUCKETS = 3  # one after the other, until a group is given up


def sink(
    view: View,
    tables: Sequence[TableSink],
    *,
    run: str,
    now_us: int,
    settings: SinkSettings,
    check_files: bool = False,
    progress: Callable[[SinkProgress], None] = lambda _: None,
) -> Script[SinkReport]:
    """Run the sink once.

    `run`: its name in files and links, 1 to 40 of a-z 0-9 -. `now_us`: microseconds since 1970, for the horizon of
    retention. `check_files`: compare all files with all links, whatever the record of the runs says. What goes wrong
    with a part of the data is in the report's `errors`; the rest is done.
    """
    if not run or len(run) > 40 or not set(run) <= set("abcdefghijklmnopqrstuvwxyz0123456789-"):
        raise InvalidRequest(f"run={run!r}: pass 1 to 40 of a-z 0-9 -")
    internal = [task.table.decode() for task in tables if is_internal(task.table)]
    if internal:
        raise InvalidRequest(f"table={internal[0]!r} is the store's own: it does not sink")
    report, traffic = SinkReport(run), Traffic()
    began_s = view.now()
    epoch = Epoch(view, settings, run, now_us)
    shared = SinkRun(view, settings, run, tables, now_us, began_s, epoch, report)
    yield from paced(_Run(shared, progress).go(check_files), settings.limits, view.now, traffic)
    report.seconds = view.now() - began_s
    report.calls, report.waited_s = traffic.calls, traffic.waited_s
    return report


class _Run:
    def __init__(self, run: SinkRun, progress: Callable[[SinkProgress], None]) -> None:
        self.run = run
        self.progress = progress
        self.garbage = Garbage(run)
        self.filing = Filing(run, self.garbage)
        self.buckets_done = 0

    def go(self, check_files: bool) -> Script[None]:
        run = self.run
        try:
            yield from run.timed("epoch", run.epoch.take())
        except TimeTierError as error:
            run.report.add_error(error.message)
            return
        run.report.epoch = run.epoch.number
        self.garbage.recall()
        try:
            yield from run.timed("garbage", self.garbage.begin(check_files=check_files))
            for task in run.tables:
                for group in range(run.view.routing.topology.storage_groups):
                    yield from self._sink_group(task, group)
                yield from self._rewrite_rest(task)
            yield from run.timed("garbage", self.garbage.end())
            yield from run.timed("epoch", self._close())
        except Fenced as fenced:
            run.report.fenced = str(fenced)
            run.report.add_error(f"this run has stopped: {fenced}")

    def _close(self) -> Script[None]:
        """Say in the record how the run has ended."""
        run = self.run
        state = UNCLEAN if run.unclean else CLEAN
        try:
            yield from run.epoch.write(state=state, ended_us=run.time_us(), **self.garbage.changes())
        except TimeTierError as error:
            run.report.add_error(error.message)

    # ------------------------------------------------------------ one storage group

    def _sink_group(self, task: TableSink, group: int) -> Script[None]:
        run = self.run
        buckets: list[int] = run.view.routing.buckets_of_storage_group(group).tolist()
        done_before = self.buckets_done
        at = failed = 0
        bucket, cursor = (buckets[0] if buckets else -1), b""
        while bucket >= 0:
            try:
                gathered = yield from run.timed("scan", gather(run, task, bucket, cursor))
                failed = 0 if gathered.timelines else failed
            except TimeTierError as error:
                run.report.add_error(f"bucket {bucket} can't be scanned: {error.message}")
                failed += 1
                if failed == _FAILED_BUCKETS:
                    run.report.add_error(f"storage group {group} is given up after {failed} buckets in a row")
                    break
                at = bisect_left(buckets, bucket + 1)
                bucket, cursor = (buckets[at] if at < len(buckets) else -1), b""
                continue
            bucket, cursor = yield from self._take(task, gathered)
            at = bisect_left(buckets, bucket) if bucket >= 0 else len(buckets)
            self._tell(task, done_before + at)
        yield from self.filing.flush_all(task)
        self.buckets_done = done_before + len(buckets)
        self._tell(task, self.buckets_done)

    def _tell(self, task: TableSink, done: int) -> None:
        report = self.run.report
        total = self.run.view.routing.topology.buckets * len(self.run.tables)
        self.progress(SinkProgress(task.table.decode(), done, total, report.rows, report.raw_bytes))

    def _rewrite_rest(self, task: TableSink) -> Script[None]:
        """Rewrite windows in buckets where there was nothing to sink."""
        run = self.run
        for visit in sorted(self.garbage.visits.get(task.table, ())):
            bucket, cursor = visit, b""
            while bucket == visit:
                try:
                    gathered = yield from run.timed("scan", gather(run, task, bucket, cursor, all_links=True))
                except TimeTierError as error:
                    run.report.add_error(f"bucket {bucket} can't be scanned, to be rewritten: {error.message}")
                    break
                if gathered.bucket != visit:
                    break  # its links are gone
                bucket, cursor = yield from self._take(task, gathered)
        yield from self.filing.flush_all(task)

    # ------------------------------------------------------------ one bucket

    def _take(self, task: TableSink, gathered: Gathered) -> Script[tuple[int, bytes]]:
        """Add a bucket's windows to the file of its cold group. Where the scan goes on."""
        if gathered.bucket >= 0:  # else the replica has nothing more
            yield from self._file(task, gathered)
            self.garbage.visits.get(task.table, set()).discard(gathered.bucket)
        if gathered.go_on is None:
            return gathered.next_bucket, b""
        yield from self.filing.flush_all(task)  # the next scan of this bucket must see these links
        return gathered.go_on

    def _file(self, task: TableSink, gathered: Gathered) -> Script[None]:
        run, bucket = self.run, gathered.bucket
        cold_group = run.view.routing.cold_group_of(bucket)
        if cold_group in self.filing.refused:
            return
        horizon = next_horizon(gathered.horizon, task.policy, run.now_us)
        expired = expired_links(gathered.links, horizon)
        pending = Pending(bucket, gathered.system_version, [], [(DELETE, link.key, b"") for link in expired])
        pending.replaced.update(block.file for link in expired for block in link.blocks)
        if horizon != gathered.horizon:  # first, so that no link goes before what it covers has expired
            pending.mutations.insert(0, (PUT, horizon_key(task.table), horizon.to_bytes(8, "little", signed=True)))
        wiped = {timeline.owner: timeline.wiped for timeline in gathered.timelines}
        for window in self._windows(task, gathered, horizon):
            try:
                old_rows = yield from run.timed("read blocks", self._old_rows(window))
                owners = {owner for rows in old_rows for owner in rows.owners}
                wiped |= yield from run.timed("scan", self._wiped(task, bucket, owners - wiped.keys()))
                rows = merge_window(window, old_rows, wiped, horizon)
                self.filing.add_window(task, cold_group, pending, window, rows)
            except TimeTierError as error:
                run.report.add_error(f"bucket {bucket}, window {window.start} is left alone: {error.message}")
        yield from self.filing.add(task, cold_group, pending)

    def _windows(self, task: TableSink, gathered: Gathered, horizon: int) -> list[Window]:
        """Windows that get a next generation now."""
        links, timelines = gathered.links, gathered.timelines
        windows = windows_of(timelines, links, task.policy.window, horizon)
        windows = with_wiped(windows, timelines, links, horizon)
        windows = with_rewritten(windows, links, self.garbage.rewrite, horizon)
        if task.patience is not None and gathered.whole:
            windows, waiting = split_waiting(windows, task.patience, self.run.settings.min_block_bytes)
            self.run.report.waiting_windows += waiting.windows
            self.run.report.waiting_rows += waiting.rows
        return windows

    def _old_rows(self, window: Window) -> Script[list[Rows]]:
        found: list[Rows] = []
        for block in window.old.blocks if window.old is not None else []:
            assert window.old is not None
            decoded = yield from read_block(self.run.view, window.old, block, self.run.settings)
            found.append(decoded.all_rows())
        return found

    def _wiped(self, task: TableSink, bucket: int, owners: set[bytes]) -> Script[dict[bytes, int]]:
        """Up to which version each of these owners' timelines is wiped. Raises Unavailable."""
        if not owners:
            return {}
        view = self.run.view
        timelines = {timeline_key(task.table, owner, view.routing.topology.buckets): owner for owner in sorted(owners)}
        order = view.routing.storage_order(system_timeline(bucket))
        found = yield from wiped_versions(view, order, list(timelines), self.run.settings)
        return {timelines[timeline]: wiped for timeline, wiped in found.items()}
