"""What the sink decides: which rows go into which window's next generation, and what its link says. *Pure*.

One bucket and one table at a time. The input is what `Scan` brought (`Timeline`s with their eligible rows), the
links that the bucket has, and the rows of the blocks of those windows that get a next generation. Block and overlay
are merged by (owner, item key), the greater version wins. Tombstones, rows that their timeline has wiped and rows
older than the horizon are left out. A window with no eligible row is left alone.

**What may be evicted.** A replica evicts by *rules* (`link.Rule`), one or more for each owner in a link: a rule
(V, E, W) lets an item of the window go, with all it supersedes, when its newest row of a version <= V has a
timestamp < E and was written < W (microseconds). What makes this safe is one invariant, for every rule of a link:

    whatever the rule lets go was merged into the blocks of this generation or of one before it.

- An owner that this run read at version C, with the run's cut-offs (E, W): the scan brought the newest row (up to C)
  of every item that satisfies E and W, so the rule (C, E, W) has the invariant. It would not have it with greater
  cut-offs, such as the maximum of this run's and an earlier run's: a row between them was never scanned.
- An owner that the blocks hold from an earlier generation, but of which this run read nothing in this window (there
  was nothing eligible, or the snapshot could not be confirmed): the rule (V0, E0, W0) of the earlier link stays true,
  because merging removes nothing that it covers. With this run's cut-offs it would not be: a row of a version <= V0
  that was too young for the earlier run may be old enough for this one, and was not read. So such an owner keeps its
  old rule, cut-offs and all (`Link.carried`), and only its own version 0 stands beside this run's cut-offs.
- A rule of a generation before is dropped for an owner that was read again with cut-offs and a version that are as
  great or greater. When this run's cut-offs are lower it stays beside the owner's other rule: each is true by itself.
- A link has at most `MAX_CARRIED` sets of cut-offs. Beyond that the oldest two become one with the lower cut-offs of
  both. Lower is always safe: it lets less go. What a rule does not let go stays twice, in storage and in a block,
  with one version, until a later run reads it.

**Why a stale scan does harm.** A generation leaves tombstones out. If a scan then went to a replica that had missed
the tombstone and still had the item, the merge would bring the item back. So a timeline that was scanned at a version
below that of any rule in the bucket's links is left out (`split_stale`), besides the confirmation by a majority.

**Windows never overlap**, so that a tombstone always meets the row that it deletes. Where a table's `window` has been
changed, rows go into the existing window that covers them, and windows of the changed length fill the gaps between.
The first and the last instant of int64 stay in the storage tier: links have no place for them.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import ProtocolError
from ..keys import (
    MAX_TIMESTAMP,
    MIN_TIMESTAMP,
    item_keys_timestamps,
    split_timeline,
    timeline_hash,
)
from ..messages import Scanned, unpack_i64, unpack_u32
from ..topology import TablePolicy
from .link import FORMAT, Block, Carried, Link
from .rows import Rows

MAX_CARRIED = 8


class CutOffs(NamedTuple):
    """Rows with a timestamp < `event_before` (table's unit) that were written < `written_before` (us) may sink."""

    event_before: int
    written_before: int


class Timeline(NamedTuple):
    """Eligible rows of one timeline, oldest first, as one replica had them at `version`."""

    key: bytes
    owner: bytes
    version: int
    wiped: int
    kinds: bytes
    keys: list[bytes]
    values: list[bytes]
    versions: list[int]
    written: list[int]


@dataclass(slots=True)
class Window:
    """A window that gets a next generation. `parts`: for each timeline which of its rows lie in the window.

    `due`: it does not wait for more rows.
    """

    start: int
    end: int
    old: Link | None
    parts: list[tuple[Timeline, int, int]] = field(default_factory=list)
    due: bool = False

    @property
    def generation(self) -> int:
        """Number of the next generation, from 1."""
        return self.old.generation + 1 if self.old is not None else 1


def standing_cut_offs(policy: TablePolicy, now_us: int) -> CutOffs:
    """Cut-offs of the standing rule: event time and write time are both older than `cold_after`."""
    now = now_us * policy.per_second // 1_000_000
    cold_after_us = policy.cold_after * 1_000_000 // policy.per_second
    return CutOffs(_clipped(now - policy.cold_after), now_us - cold_after_us)


def chosen_cut_offs(policy: TablePolicy, now_us: int, *, before: int | None, by_event_time: bool) -> CutOffs:
    """Cut-offs of one run. `before`: an instant in the table's unit in the place of now - `cold_after`.

    `by_event_time`: only the timestamp counts, whenever the row was written.
    """
    standing = standing_cut_offs(policy, now_us)
    if before is None:
        return CutOffs(standing.event_before, MAX_TIMESTAMP) if by_event_time else standing
    written_before = MAX_TIMESTAMP if by_event_time else _clipped(before * 1_000_000 // policy.per_second)
    return CutOffs(before, written_before)


def patience_of(policy: TablePolicy, now_us: int, max_wait_s: float) -> CutOffs:
    """Cut-offs from which rows wait no longer for others: the standing rule's, so many seconds before."""
    standing = standing_cut_offs(policy, now_us)
    wait = int(max_wait_s * policy.per_second)
    return CutOffs(_clipped(standing.event_before - wait), _clipped(standing.written_before - int(max_wait_s * 1e6)))


def next_horizon(present: int, policy: TablePolicy, now_us: int) -> int:
    """Horizon (table's unit) to go by: the present one, unless a step worth writing down has passed.

    It never decreases. A step is a window or a hundredth of the retention, whichever is less.
    """
    if not policy.retention:
        return present
    wanted = wanted_horizon(policy, now_us)
    return wanted if wanted >= present + horizon_step(policy) else present


def wanted_horizon(policy: TablePolicy, now_us: int) -> int:
    """Timestamp (table's unit) before which items have expired by a clock, for a table with retention."""
    return _clipped(now_us * policy.per_second // 1_000_000 - policy.retention)


def horizon_step(policy: TablePolicy) -> int:
    """By how much (table's unit) the horizon moves at least."""
    return max(1, min(policy.window, policy.retention // 100))


def timelines_of(scanned: Scanned, table: bytes, cut_offs: CutOffs) -> list[Timeline]:
    """Timelines of an answer. Raises ProtocolError when it is not what was asked for."""
    counts = unpack_u32(scanned.counts)
    versions, wiped = unpack_i64(scanned.timeline_versions), unpack_i64(scanned.wiped)
    row_versions, written = unpack_i64(scanned.versions), unpack_i64(scanned.written)
    rows = {sum(counts), len(scanned.kinds), len(scanned.keys), len(scanned.values), len(row_versions), len(written)}
    if len(rows) > 1 or len({len(scanned.timelines), len(counts), len(versions), len(wiped)}) > 1:
        raise ProtocolError("the columns of a Scanned message differ in length")
    if scanned.keys and bool((item_keys_timestamps(scanned.keys) >= cut_offs.event_before).any()):
        raise ProtocolError("a Scanned message has rows that are younger than was asked for")
    if written and max(written) >= cut_offs.written_before:
        raise ProtocolError("a Scanned message has rows that were written later than was asked for")
    found = []
    low = 0
    for at, key in enumerate(scanned.timelines):
        high = low + counts[at]
        cut = slice(low, high)
        bucket, of_table, owner = split_timeline(key)
        keys = scanned.keys[cut]
        if bucket != scanned.scanned_bucket or of_table != table:
            raise ProtocolError("a Scanned message has timelines of another bucket or table")
        if any(a >= b for a, b in zip(keys, keys[1:], strict=False)):  # noqa: RUF007 (a copy of a list is cheaper)
            raise ProtocolError("a Scanned message has rows that are not in order")
        found.append(
            Timeline(
                key,
                owner,
                versions[at],
                wiped[at],
                scanned.kinds[cut],
                keys,
                scanned.values[cut],
                row_versions[cut],
                written[cut],
            )
        )
        low = high
    return found


def split_stale(timelines: Sequence[Timeline], links: Sequence[Link]) -> tuple[list[Timeline], list[Timeline]]:
    """(usable, stale): stale ones were scanned at a version below one that a link was made from."""
    hashes = np.array([timeline_hash(split_timeline(t.key)[1], t.owner) for t in timelines], dtype=np.uint64)
    needed = np.zeros(len(timelines), dtype=np.int64)
    for link in links:
        for rule in _rules(link):
            owners, versions = np.frombuffer(rule.owners, "<u8"), np.frombuffer(rule.versions, "<i8")
            if len(owners):
                at = np.minimum(np.searchsorted(owners, hashes), len(owners) - 1)
                needed = np.maximum(needed, np.where(owners[at] == hashes, versions[at], 0))
    usable: list[Timeline] = []
    stale: list[Timeline] = []
    for timeline, version in zip(timelines, needed.tolist(), strict=True):
        (usable if timeline.version >= version else stale).append(timeline)
    return usable, stale


def windows_of(timelines: Sequence[Timeline], links: Sequence[Link], window: int, horizon: int) -> list[Window]:
    """Windows in which there are eligible rows, oldest first. Those that have expired as a whole are left out."""
    links = sorted(links, key=lambda link: link.window_start)
    starts = [link.window_start for link in links]
    found: dict[int, Window] = {}
    for timeline in timelines:
        if not timeline.keys:
            continue
        timestamps: list[int] = item_keys_timestamps(timeline.keys).tolist()
        low = 0
        while low < len(timestamps):
            start, end, old = _window_of(timestamps[low], window, links, starts)
            high = bisect_left(timestamps, end, lo=low)
            if not start <= timestamps[low] < end:  # the first or last instant of all
                low += 1
                continue
            if end > horizon:
                found.setdefault(start, Window(start, end, old)).parts.append((timeline, low, high))
            low = high
    return [found[start] for start in sorted(found)]


def _window_of(
    timestamp: int, window: int, links: Sequence[Link], starts: Sequence[int]
) -> tuple[int, int, Link | None]:
    at = bisect_right(starts, timestamp)
    if at and timestamp < links[at - 1].window_end:
        old = links[at - 1]
        return old.window_start, old.window_end, old
    start = timestamp // window * window
    floor = links[at - 1].window_end if at else MIN_TIMESTAMP + 1
    ceiling = starts[at] if at < len(starts) else MAX_TIMESTAMP
    return max(start, floor), min(start + window, ceiling), None


def expired_links(links: Iterable[Link], horizon: int) -> list[Link]:
    """Links of windows that have expired as a whole."""
    return [link for link in links if link.window_end <= horizon]


def make_link(
    window: Window, *, bucket: int, table: bytes, cut_offs: CutOffs, run: str, rows: Rows, blocks: list[Block]
) -> Link:
    """Link of the window's next generation, which `blocks` hold."""
    event_before = min(cut_offs.event_before, window.end)  # the same rows, and fewer different cut-offs
    written_before = cut_offs.written_before
    read: dict[int, int] = {}
    for timeline, _, _ in window.parts:
        owner_hash = timeline_hash(table, timeline.owner)
        read[owner_hash] = min(timeline.version, read.get(owner_hash, timeline.version))
    own = dict(read)
    carried: list[tuple[int, int, dict[int, int]]] = []
    known = dict.fromkeys(read, 0)
    for rule in _rules(window.old) if window.old is not None else []:
        owners = dict(
            zip(np.frombuffer(rule.owners, "<u8").tolist(), np.frombuffer(rule.versions, "<i8").tolist(), strict=True)
        )
        known.update(dict.fromkeys(owners, 0))
        covered = rule.event_before <= event_before and rule.written_before <= written_before
        kept = {h: v for h, v in owners.items() if v > 0 and not (covered and v <= read.get(h, -1))}
        if (rule.event_before, rule.written_before) == (event_before, written_before):
            own.update({h: max(v, own.get(h, 0)) for h, v in kept.items()})
        elif kept:
            carried.append((rule.event_before, rule.written_before, kept))
    owners_column, versions_column = _columns({**known, **own})
    return Link(
        format=FORMAT,
        bucket=bucket,
        table=table,
        window_start=window.start,
        window_end=window.end,
        generation=window.generation,
        event_before=event_before,
        written_before=written_before,
        owners=owners_column,
        versions=versions_column,
        rows=len(rows),
        raw_bytes=rows.raw_bytes(),
        run=run,
        blocks=blocks,
        carried=[Carried(event, written, *_columns(owners)) for event, written, owners in _folded(carried)],
    )


def _rules(link: Link) -> list[Carried]:
    return [Carried(link.event_before, link.written_before, link.owners, link.versions), *link.carried]


def _folded(carried: list[tuple[int, int, dict[int, int]]]) -> list[tuple[int, int, dict[int, int]]]:
    """At most MAX_CARRIED of them, newest first; the oldest become one with the lowest cut-offs."""
    while len(carried) > MAX_CARRIED:
        (event_a, written_a, a), (event_b, written_b, b) = carried[-2:]
        both = {h: max(a.get(h, 0), b.get(h, 0)) for h in (*a, *b)}
        carried = [*carried[:-2], (min(event_a, event_b), min(written_a, written_b), both)]
    return carried


def _columns(versions: dict[int, int]) -> tuple[bytes, bytes]:
    hashes: npt.NDArray[np.uint64] = np.array(sorted(versions), dtype="<u8")
    return hashes.tobytes(), np.array([versions[h] for h in hashes.tolist()], dtype="<i8").tobytes()


def _clipped(timestamp: int) -> int:
    return max(MIN_TIMESTAMP, min(timestamp, MAX_TIMESTAMP))
