"""Keys: how timelines and items become bytes that sort as they should.

A *timeline key* is `bucket (u32, big endian) | len(table) | table | len(owner) | owner`. It names a timeline in
every message and prefixes its rows in the engine, so all timelines of a bucket lie together. The bucket's own
*system timeline* (its cold links) has an empty table and an empty owner, and so sorts first in its bucket.

An *item key* is `timestamp (i64, sign bit flipped, big endian) | id, with 00 escaped as 00 FF | 00 01`. Comparing
item keys as bytes compares (timestamp, id); the terminator keeps that true when a version follows the key.
Newest first is the exact reverse, so readers walk item keys backwards. A page token is an item key in base64.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import itertools
import re
import struct
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import xxhash

from .errors import InvalidRequest, TooLarge

MAX_OWNER_BYTES = 255
MAX_ID_BYTES = 255
MAX_TABLE_BYTES = 64
MAX_VALUE_BYTES = 1 << 20
TABLE_NAME = re.compile(rf"(?!_)[A-Za-z0-9_.-]{{1,{MAX_TABLE_BYTES}}}")
MAX_BATCH_ITEMS = 10_000
MAX_BATCH_BYTES = 16 << 20

MIN_TIMESTAMP = -(1 << 63)
MAX_TIMESTAMP = (1 << 63) - 1

_SIGN = 1 << 63
_BUCKET = struct.Struct(">I")
_U64 = struct.Struct(">Q")
_END = b"\x00\x01"
_FILLED_END = _END + b"\x00\x00"
MIN_ITEM_KEY_BYTES = 8 + len(_END)  # of an item without an id
_MAX_ITEM_KEY_BYTES = 8 + 2 * MAX_ID_BYTES + len(_END)
_PRIORITY_SEED = 0x7133  # apart from the bucket's hash, so that priority is even within every bucket

PERMUTATIONS: dict[int, list[tuple[int, ...]]] = {n: list(itertools.permutations(range(n))) for n in (1, 3, 5)}


def timeline_hash(table: bytes, owner: bytes) -> int:
    """64-bit hash of (table, owner); its low bits give the bucket."""
    return xxhash.xxh3_64_intdigest(bytes((len(table),)) + table + owner)


def timeline_key(table: bytes, owner: bytes, buckets: int) -> bytes:
    """Key of one timeline in a cluster with `buckets` (a power of two) buckets."""
    head = bytes((len(table),)) + table
    bucket = xxhash.xxh3_64_intdigest(head + owner) & (buckets - 1)
    return _BUCKET.pack(bucket) + head + bytes((len(owner),)) + owner


def system_timeline(bucket: int) -> bytes:
    """Key of the system timeline of a bucket: it holds the bucket's cold links."""
    return _BUCKET.pack(bucket) + b"\x00\x00"


def is_system(timeline: bytes) -> bool:
    """Whether a timeline key names a bucket's system timeline."""
    return len(timeline) == 6


def is_internal(table: bytes | str) -> bool:
    """Whether a table is the store's own: no application can name it, it does not sink and is not listed."""
    return table[:1] in (b"_", "_")


def bucket_of(timeline: bytes) -> int:
    """Bucket in which a timeline key lies."""
    return int(_BUCKET.unpack_from(timeline)[0])


def bucket_prefix(bucket: int) -> bytes:
    """Prefix of all timeline keys of a bucket."""
    return _BUCKET.pack(bucket)


def buckets_of(timelines: Sequence[bytes]) -> npt.NDArray[np.uint32]:
    """Buckets of many timeline keys: uint32[n]."""
    joined = b"".join([key[:4] for key in timelines])
    return np.frombuffer(joined, dtype=">u4").astype(np.uint32)


def split_timeline(timeline: bytes) -> tuple[int, bytes, bytes]:
    """(bucket, table, owner) of a timeline key. Raises InvalidRequest if the bytes are no timeline key."""
    try:
        table_end = 5 + timeline[4]
        table = timeline[5:table_end]
        owner = timeline[table_end + 1 :]
        if len(table) != timeline[4] or len(owner) != timeline[table_end]:
            raise IndexError
    except IndexError:
        raise InvalidRequest(f"{timeline!r} is no timeline key") from None
    return bucket_of(timeline), table, owner


def is_placed_right(timeline: bytes, buckets: int) -> bool:
    """Whether the bucket that a timeline key names is the one that its hash gives."""
    bucket, table, owner = split_timeline(timeline)
    return bucket < buckets and (is_system(timeline) or timeline_hash(table, owner) & (buckets - 1) == bucket)


def priority_index(timeline: bytes, replicas: int) -> int:
    """Which of `PERMUTATIONS[replicas]` is the order in which the replicas of a timeline are to be asked."""
    return xxhash.xxh3_64_intdigest(timeline, seed=_PRIORITY_SEED) % len(PERMUTATIONS[replicas])


def priority(timeline: bytes, replicas: int) -> tuple[int, ...]:
    """Replica numbers in the order in which they are to be asked; each order is equally frequent."""
    return PERMUTATIONS[replicas][priority_index(timeline, replicas)]


def first_replicas(timelines: Sequence[bytes], replicas: int) -> list[int]:
    """Replica of first priority of each timeline: `priority(timeline, replicas)[0]` of many."""
    firsts = [order[0] for order in PERMUTATIONS[replicas]]
    count, digest = len(firsts), xxhash.xxh3_64_intdigest
    return [firsts[digest(timeline, _PRIORITY_SEED) % count] for timeline in timelines]


def digest_seed(secret: str) -> int:
    """Seed of a cluster's timeline digests, from its secret: who names owners can't make two of one digest."""
    return int.from_bytes(hashlib.blake2b(secret.encode(), digest_size=8, person=b"timelines").digest(), "little")


def timeline_digest(timeline: bytes, seed: int) -> bytes:
    """16 bytes that stand for a timeline key in questions about versions. `seed`: `digest_seed` of the cluster."""
    return xxhash.xxh3_128_digest(timeline, seed)


def item_key(timestamp: int, item_id: bytes = b"") -> bytes:
    """Sortable key of an item. `timestamp`: int64; `item_id`: at most 255 bytes."""
    if b"\x00" in item_id:
        item_id = item_id.replace(b"\x00", b"\x00\xff")
    return _U64.pack(timestamp + _SIGN) + item_id + _END


def item_keys(timestamps: npt.NDArray[np.int64]) -> list[bytes]:
    """Item keys of many timestamps, with empty ids."""
    width = MIN_ITEM_KEY_BYTES
    keys = np.empty((len(timestamps), width), dtype=np.uint8)
    keys[:, :8] = (timestamps ^ MIN_TIMESTAMP).astype(">i8").view(np.uint8).reshape(-1, 8)
    keys[:, 8:] = np.frombuffer(_END, dtype=np.uint8)
    data = keys.tobytes()
    return [data[at : at + width] for at in range(0, len(data), width)]


def split_item_key(key: bytes) -> tuple[int, bytes]:
    """(timestamp, id) of an item key."""
    item_id = key[8:-2]
    if b"\x00" in item_id:
        item_id = item_id.replace(b"\x00\xff", b"\x00")
    return _U64.unpack_from(key)[0] - _SIGN, item_id


def timestamp_floor(timestamp: int) -> bytes:
    """The least byte string that no item key of an earlier instant reaches: a bound for ranges."""
    if timestamp > MAX_TIMESTAMP:
        return b"\xff" * (_MAX_ITEM_KEY_BYTES + 1)
    return _U64.pack(max(timestamp, MIN_TIMESTAMP) + _SIGN)


def item_keys_timestamps(keys: Sequence[bytes]) -> npt.NDArray[np.int64]:
    """Timestamps of many item keys: int64[n]."""
    joined = b"".join(keys)
    if len(joined) == MIN_ITEM_KEY_BYTES * len(keys):  # none has an id, as most have none
        starts = np.frombuffer(joined, dtype=np.uint8).reshape(-1, MIN_ITEM_KEY_BYTES)[:, :8]
        raw = np.ascontiguousarray(starts).view(">u8").reshape(-1).astype(np.uint64)
    else:
        raw = np.frombuffer(b"".join([key[:8] for key in keys]), dtype=">u8").astype(np.uint64)
    return (raw ^ np.uint64(_SIGN)).view(np.int64)


def item_ids(keys: Sequence[bytes]) -> list[bytes]:
    """Ids of many item keys; most have none, which shows in their length."""
    if sum(map(len, keys)) == MIN_ITEM_KEY_BYTES * len(keys):
        return [b""] * len(keys)
    return [split_item_key(key)[1] for key in keys]


def encode_token(key: bytes) -> str:
    """Page token for an item key. It stays valid for ever, in every tier: it names a place, not a cursor."""
    return base64.urlsafe_b64encode(key).decode().rstrip("=")


def encode_tokens(timestamps: Sequence[int]) -> list[str]:
    """Page tokens of the keys of items without an id: `encode_token(item_key(timestamp))` of many."""
    # Filled up to 12 bytes each, so that their base64 lies side by side; what that adds is cut off.
    joined = b"".join([_U64.pack(timestamp + _SIGN) + _FILLED_END for timestamp in timestamps])
    text = base64.urlsafe_b64encode(joined).decode()
    return [text[at : at + 14] for at in range(0, len(text), 16)]


def decode_token(token: str) -> bytes:
    """Item key of a page token. Raises InvalidRequest if it is none."""
    try:
        key = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not 10 <= len(key) <= _MAX_ITEM_KEY_BYTES or key[-2:] != _END:
        raise InvalidRequest(f"before={token!r} is no page token: pass the `next` of a page, or a timestamp")
    return key


def owner_bytes(owner: str | bytes) -> bytes:
    """Owner as bytes (str as UTF-8). Raises InvalidRequest or TooLarge."""
    if isinstance(owner, str):
        owner = _utf8(owner, "owner")
    elif not isinstance(owner, bytes):
        raise InvalidRequest(f"owner={owner!r} is a {type(owner).__name__}: pass str or bytes")
    if not owner:
        raise InvalidRequest("owner is empty: pass at least one byte")
    if len(owner) > MAX_OWNER_BYTES:
        raise TooLarge(f"owner has {len(owner)} bytes, the limit is {MAX_OWNER_BYTES} bytes", limit=MAX_OWNER_BYTES)
    return owner


def _utf8(text: str, name: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(f"{name}={text!r} is no text that UTF-8 can hold: pass bytes") from None


def check_id(item_id: bytes | str) -> bytes:
    """Item id as bytes (str as UTF-8). Raises InvalidRequest or TooLarge."""
    if isinstance(item_id, str):
        item_id = _utf8(item_id, "id")
    elif not isinstance(item_id, bytes):
        raise InvalidRequest(f"id={item_id!r} is a {type(item_id).__name__}: pass bytes or str")
    if len(item_id) > MAX_ID_BYTES:
        raise TooLarge(f"id has {len(item_id)} bytes, the limit is {MAX_ID_BYTES} bytes", limit=MAX_ID_BYTES)
    return item_id


def check_timestamp(timestamp: int) -> int:
    """Timestamp as int64. Raises InvalidRequest."""
    try:
        timestamp = timestamp.__index__()
    except (AttributeError, TypeError):
        raise InvalidRequest(f"timestamp={timestamp!r} is a {type(timestamp).__name__}: pass an int") from None
    if not MIN_TIMESTAMP <= timestamp <= MAX_TIMESTAMP:
        raise InvalidRequest(f"timestamp={timestamp} does not fit in 64 bits")
    return timestamp


def check_value(value: bytes) -> bytes:
    """A value of at most 1 MiB. Raises InvalidRequest or TooLarge."""
    if not isinstance(value, bytes):
        raise InvalidRequest(f"value is a {type(value).__name__}: pass bytes")
    if len(value) > MAX_VALUE_BYTES:
        raise TooLarge(f"value has {len(value)} bytes, the limit is {MAX_VALUE_BYTES} bytes", limit=MAX_VALUE_BYTES)
    return value
