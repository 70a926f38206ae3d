"""Backup and restore -> storage node."""

from __future__ import annotations

from .base import Part, Request


class TimelineState(Part, gc=False):
    """A timeline as of one version, or a piece of it: the newest row of each item, tombstones too.

    `request_ids`: of its last entries, by entry; in the first piece only. `before`: rows of it in earlier pieces.
    `more`: another piece follows. `row_keys`: item key and version, increasing; `rows`: written, kind and value, both
    as in the engine. A bucket's system timeline is one among the others: its rows are the cold links.
    """

    timeline: bytes
    version: int
    wiped: int
    request_ids: list[tuple[int, list[bytes]]]
    before: int
    more: bool
    row_keys: list[bytes]
    rows: list[bytes]


class Dump(Request):
    """Backup: states of the timelines of your group from `cursor` on (a timeline key, or how one begins).

    `at`, `row_cursor`: go on with timeline `cursor` as of that version, behind the rows that came before (-1: no).
    `limit_bytes`: after so many the answer ends; a timeline that is larger comes in pieces.
    """

    cursor: bytes
    limit_bytes: int
    at: int = -1
    row_cursor: bytes = b""


class Dumped(Request):
    """Answer to `Dump`, in the order of the keys.

    `systems`: int64, parallel to `states`: version of the bucket's system timeline when that state was read. Rows that
    links up to that version cover may be missing. `cursor`, `row_cursor`: where to go on, b"" at the end. Not `whole`:
    the timeline that was to be continued has gone on too far, so it begins again here.
    """

    states: list[TimelineState]
    systems: bytes
    cursor: bytes
    row_cursor: bytes = b""
    whole: bool = True


class AskRestore(Request):
    """Restore: how far are you with it?"""


class RestoreFacts(Request):
    """Answer to `AskRestore`. `restore`, `phase`: of the restore that the node's topology tells of ("" for none).

    `begun`: of which one it holds the durable mark. `empty`: it has no row of any timeline, and nobody waits for one.
    """

    restore: str
    phase: str
    begun: str
    empty: bool


class BeginRestore(Request):
    """Restore: mark durably that this one is under way. Answered by `Pong` if the node is empty, or has the mark."""

    restore: str


class Restore(Request):
    """Have these states, each as the first thing that was ever decided. Answered by `Pong` when they are durable."""

    restore: str
    states: list[TimelineState]


class AskRestored(Request):
    """Restore: what do you hold in your buckets from `bucket` on?"""

    restore: str
    bucket: int


class RestoredBuckets(Request):
    """Answer to `AskRestored`: buckets with any timeline, increasing. `timelines`, `rows`: int64, counts.

    `digests`: 16 bytes each (`BucketDigest`). `next_bucket`: where to go on, -1 at the end.
    """

    buckets: list[int]
    timelines: bytes
    rows: bytes
    digests: bytes
    next_bucket: int
