"""Which windows of a bucket get a next generation besides those with rows to sink, and which wait. *Pure*.

- *Wiped.* Rows that `delete_timeline` has deleted are hidden at once, and go with the next generation. A scan names a
  timeline that was wiped since the blocks were written, with or without rows; each window that holds something of it is
  rewritten. The scan says for such a timeline that at its version nothing is eligible but what the scan brought, so
  the run has read it, in the sense of `sinking.py`: the next link's rule for it is (its version, the run's cut-offs).
- *Rewritten.* Windows of a file of which little is alive, or that is small, go into a file of this run, so that the old
  one can go. Nothing is read from storage for it, so the link keeps the rules, and the cut-offs, that it has.
- *Waiting.* A window with little to sink waits until it has more, but only so long: a block of a few rows costs as
  much of a link, a footer and a read as a full one, and a next generation for a few rows writes all the others again.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from ..keys import item_keys_timestamps, split_timeline, timeline_hash
from .link import Link
from .sinking import CutOffs, Timeline, Window


class Waiting(NamedTuple):
    """What waits for the next run."""

    windows: int
    rows: int


def with_wiped(
    windows: Sequence[Window], timelines: Sequence[Timeline], links: Sequence[Link], horizon: int
) -> list[Window]:
    """The windows, and those that have not expired and may hold rows that their timeline has wiped; oldest first."""
    found = {window.start: window for window in windows}
    for timeline in timelines:
        if not timeline.wiped:
            continue
        owner_hash = timeline_hash(split_timeline(timeline.key)[1], timeline.owner)
        for link in links:
            if link.window_end <= horizon or not link.holds_wiped(owner_hash, timeline.wiped):
                continue
            window = found.setdefault(link.window_start, Window(link.window_start, link.window_end, link))
            window.due = True
            if all(part.key != timeline.key for part, _, _ in window.parts):
                window.parts.append((timeline, 0, 0))
    return [found[start] for start in sorted(found)]


def with_rewritten(
    windows: Sequence[Window], links: Sequence[Link], files: Collection[str], horizon: int
) -> list[Window]:
    """The windows, and those with a block in one of `files` that have not expired; oldest first."""
    found = {window.start: window for window in windows}
    for link in links:
        if link.window_end > horizon and any(block.file in files for block in link.blocks):
            window = found.setdefault(link.window_start, Window(link.window_start, link.window_end, link))
            window.due = True
    return [found[start] for start in sorted(found)]


def split_waiting(windows: Sequence[Window], patience: CutOffs, min_bytes: int) -> tuple[list[Window], Waiting]:
    """(windows that sink, what waits): a window waits while it has less than `min_bytes` of owners, keys and values to
    sink, unless it is due or a row of it is older than `patience`."""
    now: list[Window] = []
    waiting = rows = 0
    for window in windows:
        if window.due or _is_old(window, patience) or _eligible_bytes(window, min_bytes) >= min_bytes:
            now.append(window)
        else:
            waiting += 1
            rows += sum(high - low for _, low, high in window.parts)
    return now, Waiting(waiting, rows)


def _is_old(window: Window, patience: CutOffs) -> bool:
    for timeline, low, high in window.parts:
        if min(timeline.written[low:high]) >= patience.written_before:
            continue
        timestamps = item_keys_timestamps(timeline.keys[low:high])
        old = zip(timestamps.tolist(), timeline.written[low:high], strict=True)
        if any(at < patience.event_before and written < patience.written_before for at, written in old):
            return True
    return False


def _eligible_bytes(window: Window, enough: int) -> int:
    size = 0
    for timeline, low, high in window.parts:
        size += (high - low) * len(timeline.owner)
        size += sum(map(len, timeline.keys[low:high])) + sum(map(len, timeline.values[low:high]))
        if size >= enough:
            break
    return size
