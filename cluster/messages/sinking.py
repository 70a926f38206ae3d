"""Sink -> storage node."""

from __future__ import annotations

from ..keys import MIN_TIMESTAMP
from .base import Request


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
    one that was wiped and has no other reason to be named.

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
