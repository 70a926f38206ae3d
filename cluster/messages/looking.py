"""Whoever looks what is where, and why -> storage node, cache node."""

from __future__ import annotations

from .base import Ballot, Part, Request

# What is wanted of a timeline's rows.
NO_ROWS = 0
COUNTS = 1  # by window
ROWS = 2  # each row, without its value


class AskTimeline(Request):
    """What do you hold of a timeline?

    `window`: length of the windows (table's unit) by which rows are counted where no link names another. `low`, `high`:
    of the rows with low <= item key < high, and of the links that overlap these; b"" = no bound. With `NO_ROWS` no
    links are named either.
    """

    timeline: bytes
    window: int
    want: int = NO_ROWS
    low: bytes = b""
    high: bytes = b""


class BlockFacts(Part):
    """A block that may hold rows of the owner: as `Block` in `cold/link.py`."""

    file: str
    offset: int
    length: int
    crc: int
    rows: int
    low: bytes
    high: bytes


class LinkFacts(Part):
    """A cold link whose owners include the timeline's. `rows`, `raw_bytes`: of the whole link, all owners.

    `rules`: (version, event_before, written_before) by which rows of the owner may be evicted.
    """

    window_start: int
    window_end: int
    generation: int
    format: int
    run: str
    rows: int
    raw_bytes: int
    rules: list[tuple[int, int, int]]
    blocks: list[BlockFacts]


class WindowFacts(Part):
    """Rows of one timeline in the storage tier, with start <= timestamp < end.

    `items`: visible ones; `tombstones`: deletions that still mask something, or wait for the sink; `hidden`: rows that
    are superseded, wiped or expired and not yet removed. `nbytes`: of all these rows. `oldest`, `newest`: timestamps.
    `first_written`, `last_written`: microseconds since 1970.
    """

    start: int
    end: int
    items: int
    tombstones: int
    hidden: int
    nbytes: int
    oldest: int
    newest: int
    first_written: int
    last_written: int


class RowFacts(Part):
    """One row of the storage tier. `written`: microseconds since 1970; `size`: bytes of the value."""

    key: bytes
    version: int
    written: int
    kind: int
    size: int


class TimelineFacts(Request):
    """Answer to `AskTimeline`, as of one instant of this replica, but not of others.

    `chosen`, `wiped`, `horizon`: as in `Checked`. `open`: the ballot at which entry chosen+1 is accepted, `NO_BALLOT`
    for none. `system_version`: up to which it has applied the bucket's links. `links`: newest window first;
    `links_left_out`: how many more there are. `next`: the item key to go on from as `low`, b"" when that was all.
    """

    chosen: int
    open: Ballot
    wiped: int
    horizon: int
    system_version: int
    links: list[LinkFacts]
    links_left_out: int
    windows: list[WindowFacts]
    rows: list[RowFacts]
    next: bytes


class AskAges(Request):
    """How old is what lies in these buckets of a table, in the storage tier and in its cold links?

    `buckets`: uint32. `edges`: int64, increasing timestamps between bins: bin i has edges[i-1] <= timestamp < edges[i],
    so the oldest bin comes first.
    `cursor`: where to go on in the first of the buckets.
    """

    table: bytes
    buckets: bytes
    edges: bytes
    cursor: bytes = b""


class Ages(Request):
    """Answer to `AskAges`: int64 columns.

    By bin: `items` and `nbytes` of the storage tier (visible items; bytes of all rows), `cold_items`, `cold_raw` and
    `cold_bytes` (rows, bytes before and after encoding of the blocks that links name; rows of a block count as evenly
    spread over its span of time). By bucket, for those that were looked at: the sums of the same.
    `next`: how many of the buckets are complete; `cursor`: where to go on in the one after these, b"" = at its start.
    """

    items: bytes
    nbytes: bytes
    cold_items: bytes
    cold_raw: bytes
    cold_bytes: bytes
    bucket_items: bytes
    bucket_nbytes: bytes
    bucket_cold_items: bytes
    bucket_cold_raw: bytes
    bucket_cold_bytes: bytes
    next: int
    cursor: bytes


class AskHeld(Request):
    """How old is what your pages hold of a table?

    `buckets`: uint32, only pages of timelines in these; b"" = all pages. `edges`: as in `AskAges`.
    """

    table: bytes
    buckets: bytes
    edges: bytes


class Held(Request):
    """Answer to `AskHeld`. `items`, `nbytes`: int64, by bin, of the pages that were looked at, `looked_at` of them.

    `pages`, `pages_bytes`: how many pages of the table there are in all, and the memory that they take.
    """

    items: bytes
    nbytes: bytes
    looked_at: int
    pages: int
    pages_bytes: int


class AskReads(Request):
    """How old was what you were asked for lately?"""


class ReadAges(Request):
    """Answer to `AskReads`: items that were read in the last hour and in the last day, by table and age.

    `hour`, `day`: int64, the bins of the first table (youngest first, see `ages.py`), then those of the next one. A
    table named b"" stands for all that there was no room for. Where much is read these are estimates from a sample.
    """

    tables: list[bytes]
    hour: bytes
    day: bytes
