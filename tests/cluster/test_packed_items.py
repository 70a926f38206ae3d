"""Packed items: what a node joins and cuts without looking into it is what a client's decoder makes items of."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from read_answers import travelled
from timetier.cluster.errors import ProtocolError
from timetier.cluster.keys import MAX_TIMESTAMP, MIN_TIMESTAMP, item_key
from timetier.cluster.messages import FoundItems, Pages, decode, encode, pack_i64
from timetier.cluster.packed_items import NO_ITEM, Item, array_head, pack_items, packed_array, unpack_items

ITEMS = st.builds(
    Item,
    st.integers(MIN_TIMESTAMP, MAX_TIMESTAMP),
    st.binary(max_size=300),
    st.one_of(st.just(b""), st.binary(max_size=255)),
    st.integers(1, MAX_TIMESTAMP),
    st.integers(0, MAX_TIMESTAMP),
)


def packed(items: list[Item]) -> list[bytes]:
    return pack_items(
        [item_key(item.timestamp, item.id) for item in items],
        [item.value for item in items],
        [item.version for item in items],
        [item.written_us for item in items],
    )


@given(st.lists(ITEMS, max_size=20))
def test_items_come_back_as_they_were_packed(items: list[Item]) -> None:
    assert unpack_items(b"".join(packed(items)), len(items)) == items


@given(st.lists(st.lists(ITEMS, max_size=6), max_size=6))
def test_pages_that_were_joined_of_packed_items_arrive_as_items(pages: list[list[Item]]) -> None:
    parts = [part for page in pages for part in (array_head(len(page)), *packed(page))]
    count = len(pages)
    found = travelled(Pages(bytes(count), pack_i64([1] * count), bytes(count), packed_array(parts, count)))
    assert found.items == pages
    assert all(type(item) is Item for page in found.items for item in page)


@given(st.lists(st.one_of(st.none(), ITEMS), max_size=20))
def test_single_items_arrive_in_their_places_and_none_where_there_is_none(items: list[Item | None]) -> None:
    parts = [NO_ITEM if item is None else packed([item])[0] for item in items]
    count = len(items)
    found = travelled(FoundItems(bytes(count), pack_i64([1] * count), packed_array(parts, count)))
    assert found.items == items


@pytest.mark.parametrize("count", [0, 1, 15, 16, 1_024, 1_025, 65_535, 65_536])
def test_the_head_of_an_array_is_that_of_messagepack(count: int) -> None:
    assert msgspec.msgpack.encode([None] * count) == array_head(count) + b"\xc0" * count


def test_an_answer_whose_items_are_cut_off_is_no_message() -> None:
    (item,) = packed([Item(1, b"value", b"", 1, 1)])
    whole = encode(FoundItems(b"\0", pack_i64([1]), packed_array([item], 1)))
    assert isinstance(decode(whole), FoundItems)
    for cut in (packed_array([item[:-1]], 1), packed_array([item], 2), packed_array([b"\x91" + item[1:]], 1)):
        with pytest.raises(ProtocolError):
            decode(encode(FoundItems(b"\0", pack_i64([1]), cut)))
