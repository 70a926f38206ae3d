"""What a replica keeps on disk: keys and values of its engine rows.

| key | value | meaning |
|---|---|---|
| `L timeline entry` | `Record` | the entry that was accepted last at this position of the log: no values, only keys |
| `R timeline item-key version` | written, kind, value | one version of an item; `version` is the entry that wrote it |
| `M timeline` | `Meta` | promise, and how far the log was known to be chosen when this was written |
| `C timeline entry` | b"" | a chore (evict, purge) is due once that entry is chosen |
| `Q bucket table` | three times | what is younger than these has not to be scanned, see `quiet.py` |
| `B bucket` | horizons, first windows | what the bucket's links come to, see `standings.py` |
| `V timeline`, `W timeline` | version | wiped once; wiped, and blocks still hold it: see `wipes.py` |
| `X bucket table` | b"" | has rows that have expired, maybe: see `expiry.py` |
| `J boot number` | timeline keys | which timelines an engine batch changed, see `journal.py` |
| `N name` | | facts of the replica itself: identity, the greatest life seen of each peer |

A value is written once, in its `R` row, at accept time. A row above the chosen version is invisible. `M` may lag:
an accepted entry e proves that e-1 is chosen, so what `M` has not yet noted is found in the log itself.
"""

from __future__ import annotations

import struct

import msgspec

from ..messages import DELETE, NO_BALLOT, PUT, Ballot, Life, Value

_U64 = struct.Struct(">Q")
_META = struct.Struct("<11q")
_ROW_HEAD = struct.Struct("<qB")
ROW_HEAD_BYTES = _ROW_HEAD.size
VERSION_BYTES = 8


class Record(msgspec.Struct, array_like=True, gc=False):
    """One accepted log entry without its values. A record without keys may stand for a trimmed entry's ids.

    Like `Value` it is none of the garbage collector's business.

    `vote`: False if it is only known that somebody accepted it, because this replica copied it when it had lost its
    data: knowledge to be told in a Promise, never a vote.
    """

    ballot: Ballot
    origin: Life
    written: int
    request_ids: list[bytes]
    kinds: bytes
    keys: list[bytes]
    vote: bool = True


class Meta(msgspec.Struct):
    """Facts of one timeline that its log records do not hold.

    `floor`: entries up to this one can't be sent as log entries any more, because rows they refer to were evicted,
    superseded or replaced by a state transfer. `log_low`: the oldest record still there. `wiped`: items of a version
    up to this one are deleted. `promised`: valid for entry `promised_entry` only. `log_mark`, `log_bytes`: where the
    younger part of the log tail begins, and its bytes; see `Chores.trim`.
    """

    chosen: int = 0
    floor: int = 0
    log_low: int = 1
    wiped: int = 0
    promised_entry: int = 0
    promised: Ballot = NO_BALLOT
    log_mark: int = 1
    log_bytes: int = 0

    def encode(self) -> bytes:
        number, life = self.promised
        log = self.log_mark, self.log_bytes
        return _META.pack(self.chosen, self.floor, self.log_low, self.wiped, self.promised_entry, number, *life, *log)

    @classmethod
    def decode(cls, row: bytes) -> Meta:
        numbers = _META.unpack(row.ljust(_META.size, b"\x00"))  # rows of an earlier format end before `log_mark`
        chosen, floor, log_low, wiped, entry, number, replica, incarnation, boot, mark, size = numbers
        return cls(chosen, floor, log_low, wiped, entry, (number, (replica, incarnation, boot)), mark, size)


_record_encoder = msgspec.msgpack.Encoder()
_record_decoder = msgspec.msgpack.Decoder(Record)

# MessagePack of a record with one request id and one item, as `record_head`, the id, `AFTER_ID`, the item, `VOTE`. Put
# together so, a record costs a quarter of what the encoder takes.
_NOTHING = b"\x90\xc4\x00\x90\xc3"  # no ids, no kinds, no keys, and a vote
_ONE_ID = b"\x91\xc4\x10"
SHORT_ITEM = 255  # longer ones begin otherwise
AFTER_ID = [[bytes((0xC4, 1, kind, 0x91, 0xC4, size)) for size in range(SHORT_ITEM + 1)] for kind in (PUT, DELETE)]
"""By kind and by length of the item's key."""
VOTE = b"\xc3"


def meta_key(timeline: bytes) -> bytes:
    return b"M" + timeline


def log_key(timeline: bytes, entry: int) -> bytes:
    return b"L" + timeline + _U64.pack(entry)


def log_entry(key: bytes) -> int:
    """Entry number of a log key."""
    return int(_U64.unpack_from(key, len(key) - 8)[0])


def chore_key(timeline: bytes, entry: int) -> bytes:
    return b"C" + timeline + _U64.pack(entry)


def rows_prefix(timeline: bytes) -> bytes:
    return b"R" + timeline


def row_key(timeline: bytes, key: bytes, version: int) -> bytes:
    return b"R" + timeline + key + _U64.pack(version)


def version_of(key: bytes) -> int:
    """Version in the key of a row."""
    return int(_U64.unpack_from(key, len(key) - VERSION_BYTES)[0])


def life_key(replica: int) -> bytes:
    return b"Nlife" + bytes((replica,))


IDENTITY_KEY = b"Nidentity"
LEARNING_KEY = b"Nlearning"  # how far a learner has copied
RESTORE_KEY = b"Nrestore"  # which restore this replica takes part in, or has taken part in


def row_head(written: int, kind: int) -> bytes:
    """What comes before the value in a row."""
    return _ROW_HEAD.pack(written, kind)


def encode_row(written: int, kind: int, value: bytes) -> bytes:
    return _ROW_HEAD.pack(written, kind) + value


def decode_row(row: bytes) -> tuple[int, int, bytes]:
    """(written in microseconds, kind, value) of a row."""
    written, kind = _ROW_HEAD.unpack_from(row)
    return written, kind, row[ROW_HEAD_BYTES:]


def record_of(ballot: Ballot, value: Value, *, vote: bool = True) -> Record:
    """A value that was accepted at `ballot`, without its contents."""
    return Record(ballot, value.origin, value.written, value.request_ids, value.kinds, value.keys, vote)


def encode_record(record: Record) -> bytes:
    return _record_encoder.encode(record)


def record_head(ballot: Ballot, written: int) -> bytes:
    """How the record of a value begins that the ballot's own life has proposed, with one request and one item."""
    origin = ballot[1]
    return _record_encoder.encode(Record(ballot, origin, written, [], b"", []))[: -len(_NOTHING)] + _ONE_ID


def ids_record(ballot: Ballot, origin: Life, request_ids: list[bytes]) -> bytes:
    """Record that stands for an entry of which only the request ids are known."""
    return _record_encoder.encode(Record(ballot, origin, 0, request_ids, b"", []))


def decode_record(row: bytes) -> Record:
    return _record_decoder.decode(row)


def prefix_end(prefix: bytes) -> bytes:
    """The least byte string above all that start with `prefix` (a prefix of bytes 0xff is never used here)."""
    return (int.from_bytes(prefix, "big") + 1).to_bytes(len(prefix), "big")
