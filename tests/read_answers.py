"""What tests look at in the answers of reads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from timetier.cluster.keys import item_key
from timetier.cluster.messages import Message, decode, encode
from timetier.cluster.packed_items import Item

M = TypeVar("M", bound=Message)


def keys_of(items: Iterable[Item]) -> list[bytes]:
    """Item keys."""
    return [item_key(item.timestamp, item.id) for item in items]


def values_of(items: Iterable[Item | None]) -> list[bytes | None]:
    """Values, None where there is no item."""
    return [None if item is None else item.value for item in items]


def travelled(message: M) -> M:
    """A message as who receives it sees it: a node packs its items for the encoder only."""
    found = decode(encode(message))
    assert isinstance(found, type(message))
    return found
