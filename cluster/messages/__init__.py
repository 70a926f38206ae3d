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

import msgspec

from .. import errors
from ..errors import ProtocolError, TimeTierError
from .backup import (
    AskRestore,
    AskRestored,
    BeginRestore,
    Dump,
    Dumped,
    Restore,
    RestoredBuckets,
    RestoreFacts,
    TimelineState,
)
from .base import (
    CONFLICT,
    CORRUPT,
    DELETE,
    DELTA,
    INVALID,
    MISPLACED,
    NO_BALLOT,
    NO_LIFE,
    OK,
    POINT,
    PUT,
    RANGE,
    SAME,
    STALE,
    UNAVAILABLE,
    UNKNOWN,
    WIPE,
    Ballot,
    Failure,
    Life,
    Part,
    Ping,
    Pong,
    Request,
    Status,
    StatusRequest,
)
from .clients import (
    Damage,
    FoundItems,
    Pages,
    ReadItems,
    ReadPages,
    Write,
    Written,
)
from .cold import (
    DISK_ABSENT,
    DISK_FAILED,
    DISK_REPLACING,
    DISK_SERVES,
    AskDisks,
    AskPlaces,
    BlockBytes,
    BlockRead,
    DiskList,
    DiskReplace,
    DiskRetry,
    Disks,
    FileFacts,
    FileInfo,
    FileList,
    FilePiece,
    FileRead,
    FileRemove,
    Files,
    FileWrite,
    FileWritten,
    Places,
    ScrubNow,
)
from .columns import (
    pack_i64,
    pack_u32,
    unpack_i64,
    unpack_u32,
)
from .comparing import (
    AcceptedList,
    AskAccepted,
    AskChanged,
    AskChosen,
    AskDigests,
    AskLives,
    AskTables,
    ChangedList,
    ChosenList,
    Digests,
    Lives,
    Mend,
    Position,
    Tables,
)
from .looking import (
    COUNTS,
    NO_ROWS,
    ROWS,
    Ages,
    AskAges,
    AskHeld,
    AskReads,
    AskTimeline,
    BlockFacts,
    Held,
    LinkFacts,
    ReadAges,
    RowFacts,
    TimelineFacts,
    WindowFacts,
)
from .peers import (
    Accept,
    Accepted,
    AcceptedAll,
    Accepts,
    Chosen,
    ChosenAll,
    Entries,
    Fetch,
    Nack,
    PeerBatch,
    PeerMessage,
    Prepare,
    Promise,
    SingleMessage,
    State,
    Unheard,
    Value,
)
from .readers import (
    AskSame,
    AskVersions,
    Check,
    Checked,
    Known,
    LinkRef,
    Links,
    Open,
    Same,
    Settle,
    Settled,
    Versions,
)
from .sinking import (
    AskOverlay,
    BucketOverlay,
    Overlay,
    Scan,
    Scanned,
)

__all__ = [
    "CONFLICT",
    "CORRUPT",
    "COUNTS",
    "DELETE",
    "DELTA",
    "DISK_ABSENT",
    "DISK_FAILED",
    "DISK_REPLACING",
    "DISK_SERVES",
    "INVALID",
    "MAX_FRAME_BYTES",
    "MISPLACED",
    "NO_BALLOT",
    "NO_LIFE",
    "NO_ROWS",
    "OK",
    "POINT",
    "PUT",
    "RANGE",
    "ROWS",
    "SAME",
    "STALE",
    "UNAVAILABLE",
    "UNKNOWN",
    "WIPE",
    "Accept",
    "Accepted",
    "AcceptedAll",
    "AcceptedList",
    "Accepts",
    "Ages",
    "AskAccepted",
    "AskAges",
    "AskChanged",
    "AskChosen",
    "AskDigests",
    "AskDisks",
    "AskHeld",
    "AskLives",
    "AskOverlay",
    "AskPlaces",
    "AskReads",
    "AskRestore",
    "AskRestored",
    "AskSame",
    "AskTables",
    "AskTimeline",
    "AskVersions",
    "Ballot",
    "BeginRestore",
    "BlockBytes",
    "BlockFacts",
    "BlockRead",
    "BucketOverlay",
    "ChangedList",
    "Check",
    "Checked",
    "Chosen",
    "ChosenAll",
    "ChosenList",
    "Damage",
    "Digests",
    "DiskList",
    "DiskReplace",
    "DiskRetry",
    "Disks",
    "Dump",
    "Dumped",
    "Entries",
    "Failure",
    "Fetch",
    "FileFacts",
    "FileInfo",
    "FileList",
    "FilePiece",
    "FileRead",
    "FileRemove",
    "FileWrite",
    "FileWritten",
    "Files",
    "FoundItems",
    "Held",
    "Known",
    "Life",
    "LinkFacts",
    "LinkRef",
    "Links",
    "Lives",
    "Mend",
    "Message",
    "Nack",
    "Open",
    "Overlay",
    "Pages",
    "Part",
    "PeerBatch",
    "PeerMessage",
    "Ping",
    "Places",
    "Pong",
    "Position",
    "Prepare",
    "Promise",
    "ReadAges",
    "ReadItems",
    "ReadPages",
    "Request",
    "Restore",
    "RestoreFacts",
    "RestoredBuckets",
    "RowFacts",
    "Same",
    "Scan",
    "Scanned",
    "ScrubNow",
    "Settle",
    "Settled",
    "SingleMessage",
    "State",
    "Status",
    "StatusRequest",
    "Tables",
    "TimelineFacts",
    "TimelineState",
    "Unheard",
    "Value",
    "Versions",
    "WindowFacts",
    "Write",
    "Written",
    "decode",
    "encode",
    "failure",
    "pack_i64",
    "pack_u32",
    "raise_failure",
    "unpack_i64",
    "unpack_u32",
]

MAX_FRAME_BYTES = 64 << 20  # the largest frame that a carrier takes; batches stay far below it

Message = (
    Failure
    | Dump
    | Dumped
    | AskRestore
    | RestoreFacts
    | BeginRestore
    | Restore
    | AskRestored
    | RestoredBuckets
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
    | AskOverlay
    | Overlay
    | AskTimeline
    | TimelineFacts
    | AskAges
    | Ages
    | AskHeld
    | Held
    | AskReads
    | ReadAges
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
    | AskDisks
    | Disks
    | DiskList
    | DiskReplace
    | DiskRetry
    | AskPlaces
    | Places
    | ScrubNow
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
