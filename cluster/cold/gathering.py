"""What the sink reads of a bucket: eligible rows at a strong snapshot, links and horizon. *Pure* (scripts).

**A strong snapshot.** A timeline's rows are used only when they were scanned at a version that nothing acknowledged
before the question exceeds: a majority is asked after the scan, and what turned out to be behind is scanned again.
A timeline that is written all the time passes too, because the second scan is compared with the first question.
What is still behind goes in the next run and is counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..effects import Script
from ..errors import ProtocolError, Unavailable
from ..keys import MIN_TIMESTAMP, system_timeline
from ..messages import Scan, Scanned
from .link import Link, decode_link
from .sink_calls import ask_first, rest, strong_versions
from .sink_run import SinkRun, TableSink
from .sinking import Timeline, horizon_step, split_stale, timelines_of, wanted_horizon

_SCANS = 3  # of one page, until its snapshot is strong


@dataclass(slots=True)
class Gathered:
    """What the scans of one bucket brought. `go_on`: its bucket and cursor, when the bucket was too large.

    `whole`: this is all of the bucket that is eligible.
    """

    bucket: int
    next_bucket: int
    timelines: list[Timeline]
    links: list[Link]
    system_version: int
    horizon: int
    go_on: tuple[int, bytes] | None = None
    whole: bool = True


def gather(run: SinkRun, task: TableSink, bucket: int, cursor: bytes, *, all_links: bool = False) -> Script[Gathered]:
    """The first bucket from `bucket` on that has something to do. Raises TimeTierError.

    `all_links`: also one that only has links.
    """
    found: Gathered | None = None
    size = 0
    begun_at = cursor
    while True:
        page, timelines = yield from _scan_page(run, task, bucket, cursor, all_links=all_links)
        if page.next_bucket == page.scanned_bucket and not page.next_cursor:
            # The replica stopped before this bucket, after many with nothing to sink.
            if timelines or found is not None or page.next_bucket <= bucket:
                raise ProtocolError(f"a scan of bucket {bucket} does not go on")
            bucket = page.next_bucket
            continue
        if found is None:
            links = [decode_link(value) for value in page.links]
            found = Gathered(page.scanned_bucket, page.next_bucket, [], links, page.system_version, page.horizon)
            found.whole = not begun_at
        elif page.scanned_bucket != found.bucket:
            raise ProtocolError(f"a scan of bucket {found.bucket} went on in bucket {page.scanned_bucket}")
        elif page.system_version != found.system_version:
            raise Unavailable("its links changed during the scan: another run is at work")
        usable, stale = split_stale(timelines, found.links)
        run.report.skipped_timelines += len(stale)
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
        if size >= run.settings.bucket_bytes:
            found.go_on = (bucket, cursor)
            found.whole = False
            return found


def _scan_page(
    run: SinkRun, task: TableSink, bucket: int, cursor: bytes, *, all_links: bool
) -> Script[tuple[Scanned, list[Timeline]]]:
    """A page of rows, and those of its timelines whose snapshot is strong. Raises TimeTierError."""
    view, settings, policy = run.view, run.settings, task.policy
    order = view.routing.storage_order(system_timeline(bucket))
    message = Scan(
        bucket,
        task.table,
        task.cut_offs.event_before,
        task.cut_offs.written_before,
        cursor,
        settings.scan_bytes,
        expire_before=wanted_horizon(policy, run.now_us) if policy.retention else MIN_TIMESTAMP,
        expire_step=horizon_step(policy),
        all_links=all_links,
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
            run.report.skipped_timelines += len(timelines) - len(strong)
            return page, strong
