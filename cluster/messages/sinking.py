"""Sink -> storage node."""

from __future__ import annotations

from ..keys import MIN_TIMESTAMP
from .base import Part, Request


class Scan(Request):
    """Rows that may sink: of `table` in `bucket`, from `cursor` on.

    Eligible is the newest version of an item when its timestamp < `event_before` (table's unit) and it was
    written < `written_before` (microseconds). All eligible rows of one timeline come in one answer.

    A bucket without eligible rows is answered too when something of it has expired since its horizon was moved
    (rows or links older than `expire_before`, and a horizon that is older by `expire_step` at least; table's unit),
    when a timeline was wiped that its blocks still hold, and with `all_links` whenever it has links.
    """

    bucket: int
    table: bytes
    event_before: int
    written_before: int
    cursor: bytes
    limit_bytes: int
    expire_before: int = MIN_TIMESTAMP
    expire_step: int = 1
    all_links: bool = True


class Scanned(Request):
    """Answer to `Scan`. Requests are timelines here: `counts[i]` eligible rows of `timelines[i]`, oldest first; none of
    one that was wiped and has no other reason to be named. Such a one is named until no link holds rows of it that were
    wiped (`Link.holds_wiped` with its `wiped`): each window that does needs a next generation, whose link names the
    owner at the version of this answer, or not at all.

    `links`: encoded `Link`s of this table that the replica has applied. `system_version`: to be named in
    `if_version` when links are written. `scanned_bucket`: answers may skip empty buckets; it is the bucket that the
    rows are of, `next_bucket`/`next_cursor` say where to go on (-1: the replica has no further bucket).
    """

    scanned_bucket: int
    timelines: list[bytes]
    timeline_versions: bytes
    wiped: bytes
    counts: bytes
    kinds: bytes
    keys: list[bytes]
    values: list[bytes]
    versions: bytes
    written: bytes
    links: list[bytes]
    system_version: int
    horizon: int
    next_bucket: int
    next_cursor: bytes


class AskOverlay(Request):
    """What hides rows of cold blocks: of `table` in `buckets` (uint32, increasing).

    `cursor`: the timeline to go on from in the first of them, b"" = from its beginning. `limit_bytes`: of the answer,
    about; at least one timeline is answered.
    """

    table: bytes
    buckets: bytes
    cursor: bytes
    limit_bytes: int


class BucketOverlay(Part):
    """Links of one table in one bucket, and what the storage tier has that is newer than their blocks.

    Requests are timelines here: `counts[i]` items of `timelines[i]`, `keys` with `versions` (int64): rows of these
    items in blocks are hidden when their version is lower. Tombstones are among them, rows that a link covers are not.
    `wiped`: int64, rows of the timeline up to this version are deleted. `horizon`: as in `Checked`.
    `opens`, `open_entries` (int64): timelines of which this replica has accepted that entry and does not know whether
    it was chosen, where it would hide something; the bucket's system timeline among them.
    `links`: empty in what goes on from a cursor.
    """

    bucket: int
    system_version: int
    horizon: int
    links: list[bytes]
    timelines: list[bytes]
    wiped: bytes
    counts: bytes
    keys: list[bytes]
    versions: bytes
    opens: list[bytes]
    open_entries: bytes


class Overlay(Request):
    """Answer to `AskOverlay`: the first of the buckets that were asked for. What is told of a timeline is of one
    instant of this replica, and all of a part as of one version of the bucket's links.

    `next_cursor`: where to go on in the last of them, b"" when it is complete. `incarnations`: as in `Versions`.
    """

    parts: list[BucketOverlay]
    next_cursor: bytes
    incarnations: list[int]
