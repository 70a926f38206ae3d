"""Sink -> storage node."""

from __future__ import annotations

from .base import Request


class Scan(Request):
    """Rows that may sink: of `table` in `bucket`, from `cursor` on.

    Eligible is the newest version of an item when its timestamp < `event_before` (table's unit) and it was
    written < `written_before` (microseconds). All eligible rows of one timeline come in one answer.
    """

    bucket: int
    table: bytes
    event_before: int
    written_before: int
    cursor: bytes
    limit_bytes: int


class Scanned(Request):
    """Answer to `Scan`. Requests are timelines here: `counts[i]` eligible rows of `timelines[i]`, oldest first.

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
