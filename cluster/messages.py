"""The messages that nodes exchange, and their codec.

One schema (`msgspec` structs, tagged, as MessagePack arrays) serves all carriers. Batches are columns: variable
length fields are lists of bytes, fixed ones are packed little-endian arrays (`pack_i64` and its kin). Decoding
checks the schema, so a frame either is a message or raises `ProtocolError`; nothing is ever unpickled.

Column names that come back in several messages:

`timelines`   list of timeline keys (see `keys.py`), one per request
`keys`        list of item keys
`values`      list of values, b"" where `kinds` says tombstone
`versions`    int64 array: the version (log entry) that wrote the item
`written`     int64 array: microseconds since 1970, the time at which the item was written
`kinds`       bytes, one `PUT`, `DELETE` or `WIPE` each
`counts`      uint32 array: how many items of the flat columns belong to each request, in order
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from . import errors
from .errors import ProtocolError, TimeTierError
from .packed_items import Item

MAX_FRAME_BYTES = 64 << 20  # the largest frame that a carrier takes; batches stay far below it

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


# Short columns go without NumPy: a single read has a dozen of them, and waking NumPy for each costs more than all else.
_SHORT = 32
_I64 = [struct.Struct(f"<{count}q") for count in range(_SHORT + 1)]
_U32 = [struct.Struct(f"<{count}I") for count in range(_SHORT + 1)]


def pack_i64(values: Iterable[int] | npt.NDArray[Any]) -> bytes:
    """int64 column as bytes."""
    if not isinstance(values, np.ndarray):
        values = values if isinstance(values, list) else list(values)
        if len(values) <= _SHORT:
            return _I64[len(values)].pack(*values)
    return np.asarray(values, dtype="<i8").tobytes()


def unpack_i64(column: bytes) -> list[int]:
    """int64 column as a list. Raises ProtocolError when the length is off."""
    if len(column) % 8:
        raise ProtocolError(f"an int64 column of {len(column)} bytes")
    if len(column) <= 8 * _SHORT:
        return list(_I64[len(column) // 8].unpack(column))
    values: list[int] = np.frombuffer(column, dtype="<i8").tolist()
    return values


def pack_u32(values: Iterable[int]) -> bytes:
    """uint32 column as bytes."""
    values = values if isinstance(values, list) else list(values)
    if len(values) <= _SHORT:
        return _U32[len(values)].pack(*values)
    return np.asarray(values, dtype="<u4").tobytes()


def unpack_u32(column: bytes) -> list[int]:
    """uint32 column as a list. Raises ProtocolError when the length is off."""
    if len(column) % 4:
        raise ProtocolError(f"a uint32 column of {len(column)} bytes")
    if len(column) <= 4 * _SHORT:
        return list(_U32[len(column) // 4].unpack(column))
    values: list[int] = np.frombuffer(column, dtype="<u4").tolist()
    return values


class _Message(msgspec.Struct, array_like=True, tag=True):
    pass


class _Part(msgspec.Struct, array_like=True):
    pass


# ---------------------------------------------------------------- any node


class Failure(_Message):
    """The request as a whole failed. `kind`: name of the error class in `errors.py`."""

    kind: str
    message: str
    fields: dict[str, float | int | str | None] = {}


class Ping(_Message):
    """Is anybody there? Answered by `Pong`."""


class Pong(_Message):
    """Answer to `Ping`, and to messages that need no other answer."""


class StatusRequest(_Message):
    """Ask a node for its state."""


class Status(_Message):
    """State and counters of a node: one JSON object."""

    body: bytes


# ---------------------------------------------------------------- client -> storage


class Write(_Message):
    """Atomic write requests, one per element of `timelines`; request i owns `counts[i]` mutations."""

    epoch: int
    timelines: list[bytes]
    request_ids: list[bytes]  # 16 bytes each
    seen: bytes  # int64: the greatest version that the sender knows of that timeline
    if_version: bytes  # int64: -1 = unconditional
    counts: bytes
    kinds: bytes
    keys: list[bytes]
    values: list[bytes]
    timeout_ms: int


class Written(_Message):
    """Answer to `Write`. `versions`: int64, the entry that applied it, or the present version."""

    outcomes: bytes
    versions: bytes


# ---------------------------------------------------------------- client -> cache (or storage, which reads too)


class ReadPages(_Message):
    """Newest items of each timeline that are older than `before` (an item key, exclusive; b"" = from the newest)."""

    epoch: int
    timelines: list[bytes]
    before: list[bytes]
    limits: bytes  # uint32
    timeout_ms: int


class Pages(_Message):
    """Answer to `ReadPages`. `items`: of each page, oldest first (a node packs them, see `packed_items`). `more`: 1
    where older items may exist."""

    outcomes: bytes
    timeline_versions: bytes
    more: bytes
    items: list[list[Item]]


class ReadItems(_Message):
    """Single items; the same timeline may come several times."""

    epoch: int
    timelines: list[bytes]
    keys: list[bytes]
    timeout_ms: int


class FoundItems(_Message):
    """Answer to `ReadItems`. `items`: None where there is none (a node packs them, see `packed_items`)."""

    outcomes: bytes
    timeline_versions: bytes
    items: list[Item | None]


# ---------------------------------------------------------------- reader -> storage


class Known(_Part):
    """A reader's proof that entry `entry` of the request's timeline was chosen at `ballot`."""

    index: int
    entry: int
    ballot: Ballot


class Open(_Part):
    """Request `index`: this replica has accepted entry chosen+1 at `ballot`."""

    index: int
    ballot: Ballot


class LinkRef(_Part):
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


class Check(_Message):
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


class Links(_Part):
    """Blocks that may hold items of request `index` within the answered range, newest window first."""

    index: int
    refs: list[LinkRef]


class Checked(_Message):
    """Answer to `Check`, all of it from one instant of this replica.

    `chosen`: int64, the version up to which this replica has applied the timeline, and as of which it answers; -1
    when it can't tell (it knows that it is behind): then it is neither a vote nor data.
    `payloads`: SAME, DELTA, RANGE or POINT. Items are newest first in a RANGE, in log order in a DELTA.
    `wiped`: int64, items (also in blocks) of a version up to this one are deleted.
    `floors`: for a RANGE the item key down to which hot rows and links are complete; b"" = to the oldest.
    `horizons`: int64, items with a timestamp below this have expired.
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


class AskVersions(_Message):
    """Ask only for versions; the cheap half of a strong read."""

    timelines: list[bytes]


class Versions(_Message):
    """Answer to `AskVersions`. `chosen`: int64.

    `incarnations`: by replica, the greatest one that this replica has seen (0 for none; its own for itself). What a
    replica answered counts only if no other answer of the same read has seen a later incarnation of it.
    """

    chosen: bytes
    opens: list[Open]
    incarnations: list[int] = []


class AskSame(_Message):
    """Is each of these timelines still at the version that I have? Fixed-size columns, so that many cost little.

    `digests`: 16 bytes a timeline (`timeline_digest`). `versions`: int64 column.
    """

    digests: bytes
    versions: bytes


class Same(_Message):
    """Answer to `AskSame`: each timeline is at the very version that was named, and nothing has been accepted after it,
    but for those at `others` (uint32 column of indices), about which this says nothing.

    `mark`: a number of this life of the replica, never one that another replica or life uses, that changes whenever a
    table's retention horizon moves on here. A page that was proven current at one mark has no expired items at it.
    `incarnations`: as in `Versions`.
    """

    others: bytes
    mark: int
    incarnations: list[int] = []


class Settle(_Message):
    """Have the replica find out, by Prepare, whether `entries[i]` of `timelines[i]` was chosen; complete it if so."""

    timelines: list[bytes]
    entries: bytes
    timeout_ms: int


class Settled(_Message):
    """Answer to `Settle`: outcomes (OK, UNAVAILABLE) and versions that are now known to be chosen."""

    outcomes: bytes
    versions: bytes


# ---------------------------------------------------------------- storage <-> storage


class Value(_Part, gc=False):
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


class PeerBatch(_Message):
    """Everything that one replica has to tell another after one step, in order."""

    life: Life
    incarnation_seen: int  # the sender's view of the receiver's incarnation, so that a zombie learns its state
    boot_seen: int
    messages: list[PeerMessage]
    past: list[int] = []  # boots of the sender's earlier lives, until the receiver has confirmed the present one
    full: bool = False  # the sender's disk has no room for new values


class AskChosen(_Message):
    """Catch-up: which timelines of `bucket` from `cursor` on (a timeline key) do you have, and how far?"""

    bucket: int
    cursor: bytes


Position = tuple[int, int, int]
"""(incarnation, boot, number): a place in one replica's journal of changes. They grow."""


class AskChanged(_Message):
    """Catch-up: which timelines have changed at you since the position up to which I have compared myself with you?

    `replica`: who asks. `safe`: such a position that is durable at the asker; what was before it is of no use any more.
    """

    replica: int
    since: Position
    safe: Position


class ChangedList(_Message):
    """Answer to `AskChanged`: `chosen` (int64) says how far each of the timelines is here.

    `reached`: position up to which the answer tells of every change; `more`: there are others after it. Not `whole`:
    the journal does not reach back to the position; who compares all timelines after this answer goes on from there.
    """

    timelines: list[bytes]
    chosen: bytes
    reached: Position
    more: bool
    whole: bool


class AskLives(_Message):
    """Rejoin: who are you, and which lives of the replicas have you noted?"""


class Lives(_Message):
    """Answer to `AskLives`. `life`: the answering replica's own; `votes`: whether it takes part in quorums, and all
    that it has noted is durable.

    `noted`: durably noted lives of the other replicas.
    """

    life: Life
    votes: bool
    noted: list[Life]


class AskAccepted(_Message):
    """Rejoin: what have you promised, accepted and applied, for the timelines of `bucket` from `cursor` on?

    `life`: of the learner that asks. It must have been noted durably, so that its earlier votes count no more.
    """

    life: Life
    bucket: int
    cursor: bytes


class AcceptedList(_Message):
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


class AskDigests(_Message):
    """Digests of the timelines of `bucket` from `cursor` on; or, if `timelines` are named, of these.

    `at`: int64, parallel to `timelines`: the version as of which each digest is wanted; -1 for the present one.
    """

    bucket: int
    cursor: bytes
    timelines: list[bytes] = []
    at: bytes = b""


class Digests(_Message):
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


class Mend(_Message):
    """Replace what you have of these timelines by the whole state that replica `source` of your group has.

    Answered by `Pong` once it was asked for; versions never go back, and promises and votes stay.
    """

    timelines: list[bytes]
    source: int


class AskTables(_Message):
    """Which tables have rows in this replica's buckets from `bucket` on?"""

    bucket: int


class Tables(_Message):
    """Answer to `AskTables`. `next_bucket`: where to go on, -1 at the end."""

    names: list[bytes]
    next_bucket: int


class ChosenList(_Message):
    """Answer to `AskChosen`. `next`: where the rest starts, as (bucket, cursor); bucket -1 = no more."""

    timelines: list[bytes]
    chosen: bytes
    next_bucket: int
    next_cursor: bytes


# ---------------------------------------------------------------- sink -> storage


class Scan(_Message):
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


class Scanned(_Message):
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


# ---------------------------------------------------------------- cold nodes


class BlockRead(_Message):
    """Read `length` bytes at `offset` of `file` and check them against `crc` (CRC32C).

    `owner`: only the rows of this owner are wanted, of a block of `format`; b"" for the block as it is.
    """

    file: str
    offset: int
    length: int
    crc: int
    owner: bytes = b""
    format: int = 0


class BlockBytes(_Message):
    """`part`: the data is a block of its own, with the rows of the owner that was asked for; `crc`: its CRC32C."""

    data: bytes
    part: bool = False
    crc: int = 0


class FileWrite(_Message):
    """A piece of a new file at `offset`. The last piece makes it durable under its name, if `crc` agrees."""

    file: str
    disk: int
    offset: int
    data: bytes
    last: bool
    crc: int  # CRC32C of the whole file, as the writer computed it


class FileWritten(_Message):
    """`crc`: CRC32C of the whole file as re-read from the disk (0 before the last piece)."""

    size: int
    crc: int


class FileList(_Message):
    """Ask for the files of a cold node whose names come after `cursor`."""

    cursor: str


class Files(_Message):
    """Names, sizes (int64), ages in seconds (int64); `more` tells that the list goes on."""

    names: list[str]
    sizes: bytes
    ages_s: bytes
    more: bool


class FileRemove(_Message):
    """Remove files. Answered by `Pong`; a file that is not there is no error."""

    files: list[str]


class FileInfo(_Message):
    """Ask what a cold file holds, as its own footer says."""

    file: str


class FileFacts(_Message):
    """Answer to `FileInfo`. `table`: whose rows they are; `buckets`: uint32, increasing; `blocks`: how many."""

    size: int
    disk: int
    table: bytes
    buckets: bytes
    blocks: int


class FileRead(_Message):
    """Read a piece of a file as it is, to copy the file as a whole."""

    file: str
    offset: int
    length: int


class FilePiece(_Message):
    """Answer to `FileRead`. `size`: of the whole file, `disk`: the ordinal of its disk, `crc`: of `data`."""

    size: int
    disk: int
    crc: int
    data: bytes


Message = (
    Failure
    | Ping
    | Pong
    | StatusRequest
    | Status
    | Write
    | Written
    | ReadPages
    | Pages
    | ReadItems
    | FoundItems
    | Check
    | Checked
    | AskVersions
    | Versions
    | AskSame
    | Same
    | Settle
    | Settled
    | PeerBatch
    | AskChosen
    | ChosenList
    | AskChanged
    | ChangedList
    | AskLives
    | Lives
    | AskAccepted
    | AcceptedList
    | AskDigests
    | Digests
    | Mend
    | AskTables
    | Tables
    | Scan
    | Scanned
    | BlockRead
    | BlockBytes
    | FileWrite
    | FileWritten
    | FileList
    | Files
    | FileRemove
    | FileInfo
    | FileFacts
    | FileRead
    | FilePiece
)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """Frame of a message. Raises TooLarge above the frame limit."""
    frame = _encoder.encode(message)
    if len(frame) > MAX_FRAME_BYTES:
        raise errors.TooLarge(
            f"a {type(message).__name__} message of {len(frame)} bytes exceeds the frame limit of {MAX_FRAME_BYTES}",
            limit=MAX_FRAME_BYTES,
        )
    return frame


def decode(frame: bytes | memoryview) -> Message:
    """Message of a frame. Raises ProtocolError if it is none."""
    try:
        return _decoder.decode(frame)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ProtocolError(f"malformed frame of {len(frame)} bytes: {error}") from None


def failure(error: BaseException) -> Failure:
    """Message that carries an error to the caller.

    Unforeseen errors become `Unavailable` with their text and the field `internal`: nobody knows how far the
    request had come, so a write that ends so may have been applied.
    """
    if isinstance(error, TimeTierError):
        plain = {k: v for k, v in error.fields.items() if v is None or isinstance(v, (int, float, str))}
        return Failure(type(error).__name__, error.message, plain)
    return Failure("Unavailable", f"internal error: {type(error).__name__}: {error}", {"internal": 1})


def raise_failure(reply: Message) -> None:
    """Raise the error that a `Failure` carries; do nothing for any other message."""
    if isinstance(reply, Failure):
        kind = getattr(errors, reply.kind, errors.Unavailable)
        if not (isinstance(kind, type) and issubclass(kind, TimeTierError)):
            kind = errors.Unavailable
        raise kind(reply.message, **reply.fields)
