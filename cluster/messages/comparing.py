"""Storage node <-> storage node, and verifier -> storage node: comparing replicas, and learning from them."""

from __future__ import annotations

from .base import NO_LIFE, Ballot, Life, Request
from .peers import Value


class AskChosen(Request):
    """Catch-up: which timelines of `bucket` from `cursor` on (a timeline key) do you have, and how far?"""

    bucket: int
    cursor: bytes


Position = tuple[int, int, int]
"""(incarnation, boot, number): a place in one replica's journal of changes. They grow."""


class AskChanged(Request):
    """Catch-up: which timelines have changed at you since the position up to which I have compared myself with you?

    `replica`: who asks. `safe`: such a position that is durable at the asker; what was before it is of no use any more.
    """

    replica: int
    since: Position
    safe: Position


class ChangedList(Request):
    """Answer to `AskChanged`: `chosen` (int64) says how far each of the timelines is here.

    `reached`: position up to which the answer tells of every change; `more`: there are others after it. Not `whole`:
    the journal does not reach back to the position; who compares all timelines after this answer goes on from there.
    """

    timelines: list[bytes]
    chosen: bytes
    reached: Position
    more: bool
    whole: bool


class AskLives(Request):
    """Rejoin: who are you, and which lives of the replicas have you noted?"""


class Lives(Request):
    """Answer to `AskLives`. `life`: the answering replica's own; `votes`: whether it takes part in quorums, and all
    that it has noted is durable.

    `noted`: durably noted lives of the other replicas.
    """

    life: Life
    votes: bool
    noted: list[Life]


class AskAccepted(Request):
    """Rejoin: what have you promised, accepted and applied, for the timelines of `bucket` from `cursor` on?

    `life`: of the learner that asks. It must have been noted durably, so that its earlier votes count no more.
    """

    life: Life
    bucket: int
    cursor: bytes


class AcceptedList(Request):
    """Answer to `AskAccepted`, durable before it left. Of each timeline: `chosen` (int64), and of entry chosen+1 the
    promise, the accepted ballot and its value (None where there is none). `next`: as in `ChosenList`.
    """

    timelines: list[bytes]
    chosen: bytes
    promised: list[Ballot]
    accepted: list[Ballot]
    values: list[Value | None]
    next_bucket: int
    next_cursor: bytes
    life: Life = NO_LIFE  # that answers


class AskDigests(Request):
    """Digests of the timelines of `bucket` from `cursor` on; or, if `timelines` are named, of these.

    `at`: int64, parallel to `timelines`: the version as of which each digest is wanted; -1 for the present one.
    """

    bucket: int
    cursor: bytes
    timelines: list[bytes] = []
    at: bytes = b""


class Digests(Request):
    """Answer to `AskDigests`. Two replicas that answer the same version and system version have the same digest.

    `versions`: int64, as of which each digest is; -1 where this replica can't tell (it has not applied that version,
    or no longer has all rows of it). `systems`: int64, version of the bucket's system timeline: rows behind its links
    do not count. `digests`: 16 bytes each. `next`: as in `ChosenList`.
    """

    timelines: list[bytes]
    versions: bytes
    systems: bytes
    digests: bytes
    next_bucket: int
    next_cursor: bytes
    life: Life = NO_LIFE  # that answers


class Mend(Request):
    """Replace what you have of these timelines by the whole state that replica `source` of your group has.

    Answered by `Pong` once it was asked for; versions never go back, and promises and votes stay.
    """

    timelines: list[bytes]
    source: int


class AskTables(Request):
    """Which tables have rows in this replica's buckets from `bucket` on?"""

    bucket: int


class Tables(Request):
    """Answer to `AskTables`. `next_bucket`: where to go on, -1 at the end."""

    names: list[bytes]
    next_bucket: int


class ChosenList(Request):
    """Answer to `AskChosen`. `next`: where the rest starts, as (bucket, cursor); bucket -1 = no more."""

    timelines: list[bytes]
    chosen: bytes
    next_bucket: int
    next_cursor: bytes
