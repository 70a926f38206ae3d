"""Items in the bytes in which they travel from a cache node's memory to a client (*pure*).

A packed item is the MessagePack array `[timestamp, value, id, version, written_us]`. Nodes join packed items and cut
them apart, but never look into them; a client's decoder makes an `Item` of each, in C. So an answer with many items is
a join of slices for the node, and one pass over the frame for the client.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from .keys import item_ids, item_keys_timestamps, split_item_key


class Item(NamedTuple):
    """One item. `timestamp`: in the table's unit. `version`: of the timeline, when the item was written.

    `written_us`: time at which it was written, microseconds since 1970.
    """

    timestamp: int
    value: bytes
    id: bytes
    version: int
    written_us: int


NO_ITEM = b"\xc0"  # MessagePack's nil: it stands where there is none

_FEW = 16  # items; array operations begin to pay above that

_encode = msgspec.msgpack.Encoder().encode
_decoder = msgspec.msgpack.Decoder(list[Item])


def pack_items(
    keys: Sequence[bytes], values: Sequence[bytes], versions: Sequence[int], written: Sequence[int]
) -> list[bytes]:
    """Packed items of parallel columns. `keys`: item keys."""
    if len(keys) <= _FEW:
        parts = [split_item_key(key) for key in keys]
    else:
        parts = list(zip(item_keys_timestamps(keys).tolist(), item_ids(keys), strict=True))
    rows = zip(parts, values, versions, written, strict=True)
    return [_encode((timestamp, value, id, version, at)) for (timestamp, id), value, version, at in rows]


def unpack_items(packed: bytes, count: int) -> list[Item]:
    """The items of `count` packed ones that follow one another."""
    return _decoder.decode(array_head(count) + packed)


def _array_head(count: int) -> bytes:
    if count < 16:
        return bytes((0x90 | count,))
    return b"\xdc" + count.to_bytes(2, "big") if count < 1 << 16 else b"\xdd" + count.to_bytes(4, "big")


_HEADS = [_array_head(count) for count in range(1_025)]


def array_head(count: int) -> bytes:
    """What a MessagePack array of `count` elements begins with."""
    return _HEADS[count] if count < len(_HEADS) else _array_head(count)


def packed_array(parts: list[bytes], count: int) -> Any:
    """`count` packed elements, whole or in parts, as a list: for a field of a message that is to be encoded. Nobody can
    look into it before."""
    return msgspec.Raw(b"".join([array_head(count), *parts]))
