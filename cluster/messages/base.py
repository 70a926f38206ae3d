"""What all messages have in common, and those that any node takes."""

from __future__ import annotations

import msgspec

# What a mutation or a stored row is.
PUT, DELETE, WIPE = 0, 1, 2  # WIPE hides everything of the timeline that is older than itself

# Outcomes of one request in a batch.
OK = 0
CONFLICT = 1  # conditional write met another version; `versions` has one that the timeline has reached
STALE = 2  # the sender's version is older than the remembered request ids: surely not applied by this attempt
UNAVAILABLE = 3
UNKNOWN = 4
INVALID = 5
MISPLACED = 6  # this group does not own the bucket: the sender's map is old
CORRUPT = 7

# Payload of one timeline in `Checked`.
SAME, DELTA, RANGE, POINT = 0, 1, 2, 3

Life = tuple[int, int, int]
"""(replica, incarnation, boot): one life of one replica. Compare only lives of one replica."""

Ballot = tuple[int, Life]
"""(round, life). Totally ordered, and never used by two lives."""

NO_LIFE: Life = (-1, 0, 0)
NO_BALLOT: Ballot = (-1, NO_LIFE)


class Request(msgspec.Struct, array_like=True, tag=True):
    """Base of the messages."""


class Part(msgspec.Struct, array_like=True):
    """Base of what messages consist of."""


class Failure(Request):
    """The request as a whole failed. `kind`: name of the error class in `errors.py`."""

    kind: str
    message: str
    fields: dict[str, float | int | str | None] = {}


class Ping(Request):
    """Is anybody there? Answered by `Pong`."""


class Pong(Request):
    """Answer to `Ping`, and to messages that need no other answer."""


class StatusRequest(Request):
    """Ask a node for its state."""


class Status(Request):
    """State and counters of a node: one JSON object."""

    body: bytes
