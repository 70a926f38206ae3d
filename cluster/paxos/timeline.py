"""What a replica holds of a timeline in memory: its state, the proposal for it, and who waits for an answer.

Data only: `acceptor.py`, `proposer.py` and `catchup.py` say how it changes, `core.py` loads, keeps and drops it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, cast

import msgspec

from ..messages import NO_BALLOT, NO_LIFE, Accept, Ballot, Life, Prepare, Value
from .rows import Meta, Record

NOT_NOTED = -2  # of a timeline that has just come into memory
PREPARE, ACCEPT, BACKOFF, CATCH_UP = "prepare", "accept", "backoff", "catch-up"
FLIGHT = "flight"  # of an own vote: for all entries of a flight


class Waiter(msgspec.Struct, gc=False, eq=False):
    """One write request that waits for its entry.

    `sent`: an Accept with it may have left this replica, and may still be completed by somebody. `asked_peers`: they
    were asked for entries that its sender has seen and this replica has not. `prepared`: ballot of the last Prepare
    that was sent while it waited. `confirmed`: a majority has told, since it came, that it has no entry after ours.
    """

    request_id: bytes
    seen: int
    if_version: int
    kinds: bytes
    keys: list[bytes]
    values: list[bytes]
    size: int
    deadline: float
    jobs: list[tuple[Job, int]]
    sent: bool = False
    asked_peers: bool = False
    prepared: Ballot = NO_BALLOT
    confirmed: bool = False


@dataclass(slots=True)
class Job:
    """A `Write` or `Settle` message on its way: answered when every request in it has an outcome."""

    token: int
    outcomes: bytearray
    versions: list[int]
    open: int
    after: int = 0
    settle: bool = False


@dataclass(slots=True)
class SettleWaiter:
    """A question whether `entry` was chosen. `prepared`: ballot of the last Prepare that was sent while it waited;
    promises of an earlier one may be older than the question, and then tell nothing about it."""

    entry: int
    deadline: float
    job: Job
    index: int
    prepared: Ballot = NO_BALLOT


class Proposal(msgspec.Struct, eq=False):
    """This replica's attempt to have `entry` decided. Votes are by replica, with the incarnation that gave them.

    `flight`: with which it was sent, whose votes count for it too.
    """

    entry: int
    ballot: Ballot
    phase: str
    due: float
    value: Value | None = None
    votes: dict[int, int] = {}
    promises: dict[int, tuple[Ballot, Value | None, int]] = {}
    attempts: int = 0
    resends: int = 0
    flight: Any = None  # Flight | None


@dataclass(slots=True)
class Incoming:
    """A state transfer in progress: pieces of a timeline's state, installed together when complete.

    `expected`: the cursor of the piece that comes next; any other would leave a gap. `due`: when it should be there.
    """

    version: int
    expected: bytes = b""
    due: float = 0.0
    rows: list[tuple[bytes, bytes]] = field(default_factory=list)
    size: int = 0
    needs_system: int = 0
    complete: bool = False
    ballot: Ballot = NO_BALLOT
    origin: Life = NO_LIFE
    wiped: int = 0
    request_ids: list[tuple[int, list[bytes]]] = field(default_factory=list)


Facts = tuple[int, bytes, int, bytes]
"""(written, request id, kind, item key) of an accepted value with one of each, proposed by its ballot's own life."""


class Timeline:
    """What a replica knows of one timeline, as acceptor and as proposer.

    `chosen`, `ballot`, `origin`: the last chosen entry, the ballot at which it was chosen and who first proposed it.
    `promised`, `accepted`, `record` (or `facts`): of entry chosen+1, the only one that can be open. `learned`: that it
    was accepted is copied knowledge, not a vote of this replica. `dirty`: number of the engine batch that must be
    durable before others may be told of this state. `digest`, `noted`: its name in the version cache, and what that
    was told last.
    """

    __slots__ = (
        "accepted",
        "asked_until",
        "backoff_s",
        "ballot",
        "by_id",
        "chosen",
        "digest",
        "dirty",
        "facts",
        "floor",
        "held",
        "ids",
        "incoming",
        "key",
        "learned",
        "linked",
        "linked_at",
        "log_bytes",
        "log_low",
        "log_mark",
        "mending",
        "noted",
        "open_bytes",
        "origin",
        "promised",
        "proposal",
        "settles",
        "waiting",
        "wakes_at",
        "wiped",
    )

    def __init__(self, key: bytes, meta: Meta, digest: bytes = b"") -> None:
        self.key = key
        self.digest = digest
        self.noted = NOT_NOTED
        self.chosen = meta.chosen
        self.floor = meta.floor
        self.log_low = meta.log_low
        self.log_mark = meta.log_mark
        self.log_bytes = meta.log_bytes
        self.open_bytes = 0  # of entry chosen+1: record and values
        self.wiped = meta.wiped
        self.ballot: Ballot = NO_BALLOT
        self.origin: Life = NO_LIFE
        self.promised: Ballot = NO_BALLOT
        self.accepted: Ballot = NO_BALLOT
        self.facts: Facts | Record | None = None
        self.learned = False
        self.dirty = 0
        self.ids: dict[bytes, int] | None = None  # of the last W entries, oldest first
        self.proposal: Proposal | None = None
        self.waiting: dict[bytes, Waiter] = {}
        self.settles: list[SettleWaiter] = []
        self.backoff_s = 0.0
        self.held: tuple[int, Prepare | Accept] | None = None
        self.asked_until = 0.0
        self.linked = 0  # greatest version that cold links rely on, as of version `linked_at` of the system timeline
        self.linked_at = -1
        self.incoming: Incoming | None = None
        self.mending = False  # its state is to be replaced, also by one of the same version
        self.wakes_at = math.inf  # of its earliest timer

    @property
    def record(self) -> Record | None:
        """The accepted entry without its values, None if there is none."""
        facts = self.facts
        if type(facts) is tuple:
            written, request_id, kind, item = facts
            return Record(self.accepted, self.accepted[1], written, [request_id], bytes((kind,)), [item])
        return cast("Record | None", facts)

    @record.setter
    def record(self, record: Record | None) -> None:
        self.facts = record

    @property
    def busy(self) -> bool:
        """Whether something is under way that lives only in memory and that nobody would repeat."""
        return bool(self.proposal or self.waiting or self.settles or self.incoming)

    @property
    def is_occupied(self) -> bool:
        """Whether a request that comes has to wait for something."""
        return self.proposal is not None or bool(self.waiting or self.settles) or self.incoming is not None

    def all_waiters(self) -> list[Waiter | SettleWaiter]:
        """Requests and questions that have no answer yet."""
        return [*self.waiting.values(), *self.settles]

    def meta(self) -> Meta:
        entry = self.chosen + 1 if self.promised != NO_BALLOT else 0
        return Meta(
            self.chosen,
            self.floor,
            self.log_low,
            self.wiped,
            entry,
            self.promised,
            self.log_mark,
            self.log_bytes,
        )
