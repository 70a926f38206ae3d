"""Storage node <-> storage node: Paxos, and catching up."""

from __future__ import annotations

import msgspec

from .base import Ballot, Life, Part, Request


class Value(Part, gc=False):
    """What one log entry decides: mutations and the requests that they serve. `origin` never changes.

    The garbage collector does not look at it (`gc=False`): it is in no cycle, and there are very many.
    """

    origin: Life
    written: int  # microseconds since 1970, by the clock of the origin
    request_ids: list[bytes]
    kinds: bytes
    keys: list[bytes]
    values: list[bytes]


class _Peer(msgspec.Struct, array_like=True, tag=True):
    timeline: bytes


class _PeerStep(msgspec.Struct, array_like=True, tag=True):
    """About many timelines at once."""


class Prepare(_Peer):
    entry: int
    ballot: Ballot


class Promise(_Peer):
    """No lower ballot will be accepted. `accepted`: the highest accepted ballot, with its value."""

    entry: int
    ballot: Ballot
    accepted: Ballot
    value: Value | None


class Accept(_Peer):
    """`before`: the ballot at which entry-1 was chosen, so that a peer that accepted it there can apply it."""

    entry: int
    ballot: Ballot
    before: Ballot
    value: Value


class Accepted(_Peer):
    entry: int
    ballot: Ballot


class Accepts(_PeerStep):
    """Accepts of round 0 for many timelines (see `paxos/flights.py`): each says what an `Accept` of it alone would.

    All have the ballot (0, `life`) and values of that origin; `before` is common to all of them too. Parallel to
    `timelines`: `entries` and `written` (int64), `id_counts` and `counts` (uint32), how many of `request_ids`
    (16 bytes each) and of the flat columns `kinds`, `keys` and `values` belong to each.
    """

    number: int  # of the flight, never used twice by one life
    life: Life
    before: Ballot
    timelines: list[bytes]
    entries: bytes
    written: bytes
    id_counts: bytes
    request_ids: bytes
    counts: bytes
    kinds: bytes
    keys: list[bytes]
    values: list[bytes]


class AcceptedAll(_PeerStep):
    """All of `Accepts` `number` of `life` are accepted, but for those at `others` (uint32 column of indices), about
    which this says nothing."""

    number: int
    life: Life
    others: bytes


class ChosenAll(_PeerStep):
    """All entries of `Accepts` `number` of `life` were chosen at its ballot."""

    number: int
    life: Life


class Unheard(_PeerStep):
    """Of what was `ChosenAll`? The sender does not remember such an `Accepts`."""

    number: int
    life: Life


class Nack(_Peer):
    """Refusal of `ballot`; `promised` is what stands against it."""

    entry: int
    ballot: Ballot
    promised: Ballot


class Chosen(_Peer):
    """Entry `entry` was chosen at `ballot`: whoever accepted it at that very ballot applies it."""

    entry: int
    ballot: Ballot


class Fetch(_Peer):
    """Send me what was chosen from entry `first` on; `cursor` goes on with a state transfer."""

    first: int
    cursor: bytes = b""
    state_version: int = -1


class Entries(_Peer):
    """Chosen entries from `first` on, in order. `ballot`: the one at which the last of them was chosen."""

    first: int
    values: list[Value]
    ballot: Ballot
    chosen: int  # how far the sender is


class State(_Peer):
    """A piece of a timeline's whole state as of `version`; replaces what the receiver has, when complete.

    `needs_system`: version of the bucket's system timeline that the receiver must have applied first, because
    rows that the sender has evicted are only found through links up to there.
    """

    version: int
    ballot: Ballot
    origin: Life
    wiped: int
    needs_system: int
    request_ids: list[tuple[int, list[bytes]]]
    cursor: bytes  # where this piece starts
    next: bytes  # where the next one starts; b"" = this is the last
    row_keys: list[bytes]  # item key + version, as in the engine
    rows: list[bytes]


SingleMessage = Prepare | Promise | Accept | Accepted | Nack | Chosen | Fetch | Entries | State
PeerMessage = SingleMessage | Accepts | AcceptedAll | ChosenAll | Unheard


class PeerBatch(Request):
    """Everything that one replica has to tell another after one step, in order."""

    life: Life
    incarnation_seen: int  # the sender's view of the receiver's incarnation, so that a zombie learns its state
    boot_seen: int
    messages: list[PeerMessage]
    past: list[int] = []  # boots of the sender's earlier lives, until the receiver has confirmed the present one
    full: bool = False  # the sender's disk has no room for new values
