"""Reader -> storage node: versions, and what a reader lacks of a timeline."""

from __future__ import annotations

from .base import Ballot, Part, Request


class Known(Part):
    """A reader's proof that entry `entry` of the request's timeline was chosen at `ballot`."""

    index: int
    entry: int
    ballot: Ballot


class Open(Part):
    """Request `index`: this replica has accepted entry chosen+1 at `ballot`."""

    index: int
    ballot: Ballot


class LinkRef(Part):
    """Where one block lies, as far as one reader needs it for one timeline."""

    bucket: int  # with `window_start` it gives the order in which the replicas are to be asked
    window_start: int
    format: int
    file: str
    offset: int
    length: int
    crc: int
    low: bytes  # every row of the block has low <= item key < high
    high: bytes


class Check(Request):
    """For each timeline: "I have version `have`; tell me what I need". `have` is -1 for nothing.

    `wants`: DELTA (answer SAME, DELTA or, if the log tail is too short, RANGE), RANGE or POINT.
    `bounds`: for RANGE `before` (exclusive, b"" = newest), for POINT the item key.
    `limits`: uint32, live items wanted by a RANGE.
    """

    timelines: list[bytes]
    have: bytes
    wants: bytes
    bounds: list[bytes]
    limits: bytes
    known: list[Known] = []


class Links(Part):
    """Blocks that may hold items of request `index` within the answered range, newest window first."""

    index: int
    refs: list[LinkRef]


class Checked(Request):
    """Answer to `Check`, all of it from one instant of this replica.

    `chosen`: int64, the version up to which this replica has applied the timeline, and as of which it answers; -1
    when it can't tell (it knows that it is behind): then it is neither a vote nor data.
    `payloads`: SAME, DELTA, RANGE or POINT. Items are newest first in a RANGE, in log order in a DELTA.
    `wiped`: int64, items (also in blocks) of a version up to this one are deleted.
    `floors`: for a RANGE the item key down to which hot rows and links are complete; b"" = to the oldest.
    `horizons`: int64, items with a timestamp below this have expired, as far as this replica has applied it. One that
    has accepted a horizon, and does not know whether it was chosen, tells none for that table in the bucket.
    `incarnations`: see `Versions`.
    """

    chosen: bytes
    opens: list[Open]
    payloads: bytes
    counts: bytes
    kinds: bytes
    keys: list[bytes]
    values: list[bytes]
    versions: bytes
    written: bytes
    wiped: bytes
    horizons: bytes
    floors: list[bytes]
    links: list[Links]
    incarnations: list[int] = []
    mark: int = 0  # see `Same`


class AskVersions(Request):
    """Ask only for versions; the cheap half of a strong read."""

    timelines: list[bytes]


class Versions(Request):
    """Answer to `AskVersions`. `chosen`: int64. `horizons`: as in `Checked`, b"" when no table has any; `unsure`:
    uint32, requests of which this replica can't tell the horizon. `mark`: see `Same`.

    `incarnations`: by replica, the greatest one that this replica has seen (0 for none; its own for itself). What a
    replica answered counts only if no other answer of the same read has seen a later incarnation of it.
    """

    chosen: bytes
    opens: list[Open]
    incarnations: list[int] = []
    horizons: bytes = b""
    unsure: bytes = b""
    mark: int = 0


class AskSame(Request):
    """Is each of these timelines still at the version that I have? Fixed-size columns, so that many cost little.

    `digests`: 16 bytes a timeline (`timeline_digest`). `versions`: int64 column.
    """

    digests: bytes
    versions: bytes


class Same(Request):
    """Answer to `AskSame`: each timeline is at the very version that was named, and nothing has been accepted after it,
    but for those at `others` (uint32 column of indices), about which this says nothing.

    `mark`: a number of this life of the replica, never one that another replica or life uses, that changes whenever it
    accepts or applies a retention horizon. A page that was read when a majority had these marks has no expired
    items while a majority has them.
    `incarnations`: as in `Versions`.
    """

    others: bytes
    mark: int
    incarnations: list[int] = []


class Settle(Request):
    """Have the replica find out, by Prepare, whether `entries[i]` of `timelines[i]` was chosen; complete it if so."""

    timelines: list[bytes]
    entries: bytes
    timeout_ms: int


class Settled(Request):
    """Answer to `Settle`: outcomes (OK, UNAVAILABLE) and versions that are now known to be chosen."""

    outcomes: bytes
    versions: bytes
