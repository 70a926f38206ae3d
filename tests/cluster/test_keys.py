"""Keys sort as timelines and items do, come back as they went in, and bad ones are refused."""

from __future__ import annotations

import base64
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from timetier.cluster import keys
from timetier.cluster.errors import InvalidRequest, TooLarge

settings.register_profile("unhurried", deadline=None)  # a busy machine is no failure
settings.load_profile("unhurried")

TIMESTAMPS = st.integers(keys.MIN_TIMESTAMP, keys.MAX_TIMESTAMP)
# Few different bytes make common prefixes and escapes frequent; NUL, 01 and FF are those that escapes are made of.
TRICKY = st.lists(st.sampled_from([0, 1, 2, 0x61, 0xFE, 0xFF]), max_size=8).map(bytes)
IDS = TRICKY | st.binary(max_size=keys.MAX_ID_BYTES)
ITEMS = st.tuples(st.integers(-2, 2) | TIMESTAMPS, IDS)
TABLES = st.binary(min_size=1, max_size=keys.MAX_TABLE_BYTES)
OWNERS = TRICKY.filter(bool) | st.binary(min_size=1, max_size=keys.MAX_OWNER_BYTES)
BUCKETS = st.integers(0, 20).map(lambda power: 1 << power)

ALICE = "0001bc2d076d6f6d656e747305616c696365"
ALICES_REPLICAS = (1, 0, 2)


# ---------------------------------------------------------------- items


@given(ITEMS, ITEMS)
@example((0, b""), (0, b"\x00"))
@example((0, b"\x00"), (0, b"\x00\x00"))
@example((0, b"\x00"), (0, b"\x01"))
@example((0, b"a\x00\xff"), (0, b"a\x00"))
@example((-1, b"\xff" * 255), (0, b""))
def test_item_keys_compare_as_timestamp_and_id(a: tuple[int, bytes], b: tuple[int, bytes]) -> None:
    key_a, key_b = keys.item_key(*a), keys.item_key(*b)
    assert (key_a < key_b) == (a < b)
    assert (key_a == key_b) == (a == b)


@given(ITEMS, ITEMS, st.binary(max_size=9), st.binary(max_size=9))
def test_whatever_follows_an_item_key_does_not_change_the_order(
    a: tuple[int, bytes], b: tuple[int, bytes], after_a: bytes, after_b: bytes
) -> None:
    if a != b:
        assert (keys.item_key(*a) + after_a < keys.item_key(*b) + after_b) == (a < b)


@given(ITEMS)
def test_items_come_back_from_their_keys(item: tuple[int, bytes]) -> None:
    key = keys.item_key(*item)
    assert keys.split_item_key(key) == item
    assert len(key) <= 8 + 2 * keys.MAX_ID_BYTES + 2


@given(st.lists(ITEMS, max_size=20))
def test_timestamps_of_many_keys_are_those_of_each(items: list[tuple[int, bytes]]) -> None:
    column = keys.item_keys_timestamps([keys.item_key(*item) for item in items])
    assert column.dtype == np.int64
    assert column.tolist() == [timestamp for timestamp, _ in items]


@given(ITEMS, st.integers(-2, 2) | TIMESTAMPS)
@example((keys.MAX_TIMESTAMP, b"\xff" * 255), keys.MAX_TIMESTAMP)
@example((keys.MIN_TIMESTAMP, b""), keys.MIN_TIMESTAMP)
def test_a_floor_lies_between_the_earlier_items_and_the_others(item: tuple[int, bytes], floor: int) -> None:
    assert (keys.item_key(*item) < keys.timestamp_floor(floor)) == (item[0] < floor)


@pytest.mark.parametrize("beyond", [keys.MAX_TIMESTAMP + 1, 1 << 80])
@pytest.mark.parametrize("item_id", [b"", b"\x00" * 255, b"\xff", b"\xff" * 255])
def test_the_floor_after_all_time_is_above_every_item(beyond: int, item_id: bytes) -> None:
    assert keys.item_key(keys.MAX_TIMESTAMP, item_id) < keys.timestamp_floor(beyond)


def test_the_floor_before_all_time_is_below_every_item() -> None:
    assert keys.timestamp_floor(keys.MIN_TIMESTAMP - 1) <= keys.item_key(keys.MIN_TIMESTAMP)


# ---------------------------------------------------------------- tokens


@given(ITEMS)
def test_tokens_name_the_item_that_they_were_made_of_and_fit_in_a_url(item: tuple[int, bytes]) -> None:
    key = keys.item_key(*item)
    token = keys.encode_token(key)
    assert keys.decode_token(token) == key
    assert token.replace("-", "").replace("_", "").isalnum()


@given(st.lists(st.integers(keys.MIN_TIMESTAMP, keys.MAX_TIMESTAMP), max_size=8))
def test_many_tokens_are_those_of_single_keys(timestamps: list[int]) -> None:
    assert keys.encode_tokens(timestamps) == [keys.encode_token(keys.item_key(one)) for one in timestamps]


@pytest.mark.parametrize(
    "token",
    [
        "",
        "!",
        "A",
        "naïve",
        "2024-05-01",
        "AAAA AAAA",
        base64.urlsafe_b64encode(b"\x00" * 8).decode(),
        base64.urlsafe_b64encode(b"\x00" * 9 + b"\x02").decode(),
        base64.urlsafe_b64encode(b"\x01" * 7 + b"\x00\x01").decode(),
        keys.encode_token(b"\x01" * 600 + b"\x00\x01"),
    ],
)
def test_what_is_no_token_is_refused(token: str) -> None:
    with pytest.raises(InvalidRequest, match="no page token"):
        keys.decode_token(token)


@given(st.text(max_size=30))
def test_any_text_is_a_token_or_refused(text: str) -> None:
    try:
        key = keys.decode_token(text)
    except InvalidRequest:
        return
    assert keys.decode_token(keys.encode_token(key)) == key


# ---------------------------------------------------------------- timelines


@given(TABLES, OWNERS, BUCKETS)
def test_timelines_come_back_from_their_keys(table: bytes, owner: bytes, buckets: int) -> None:
    key = keys.timeline_key(table, owner, buckets)
    bucket = keys.timeline_hash(table, owner) & (buckets - 1)
    assert keys.split_timeline(key) == (bucket, table, owner)
    assert keys.bucket_of(key) == bucket
    assert key.startswith(keys.bucket_prefix(bucket))
    assert keys.is_placed_right(key, buckets)
    assert not keys.is_system(key)


@given(TABLES, OWNERS, TABLES, OWNERS, BUCKETS)
@example(b"a", b"b\x01c", b"a\x01b", b"c", 1)
def test_different_timelines_have_different_keys_and_none_is_the_beginning_of_another(
    table_a: bytes, owner_a: bytes, table_b: bytes, owner_b: bytes, buckets: int
) -> None:
    key_a = keys.timeline_key(table_a, owner_a, buckets)
    key_b = keys.timeline_key(table_b, owner_b, buckets)
    assert (key_a == key_b) == ((table_a, owner_a) == (table_b, owner_b))
    if key_a != key_b:
        assert not key_a.startswith(key_b)
        assert not key_b.startswith(key_a)


@given(TABLES, OWNERS)
def test_a_buckets_system_timeline_comes_first_in_its_bucket_and_after_all_buckets_before(
    table: bytes, owner: bytes
) -> None:
    key = keys.timeline_key(table, owner, 1_024)
    bucket = keys.bucket_of(key)
    system = keys.system_timeline(bucket)
    assert system < key < keys.system_timeline(bucket + 1)
    assert keys.is_system(system)
    assert keys.split_timeline(system) == (bucket, b"", b"")
    assert keys.is_placed_right(system, 1_024)
    assert not keys.is_placed_right(keys.system_timeline(1_024), 1_024)


@given(TABLES, OWNERS, st.integers(0, 1_023))
def test_a_timeline_in_a_bucket_that_is_not_its_own_is_noticed(table: bytes, owner: bytes, bucket: int) -> None:
    right = keys.timeline_key(table, owner, 1_024)
    moved = keys.bucket_prefix(bucket) + right[4:]
    assert keys.is_placed_right(moved, 1_024) == (moved == right)


def test_a_key_with_an_owner_but_no_table_is_not_at_home_in_every_bucket() -> None:
    at_home = [keys.is_placed_right(keys.bucket_prefix(b) + b"\x00\x05owner", 1_024) for b in range(1_024)]
    assert at_home.count(True) == 1


@given(st.lists(st.tuples(TABLES, OWNERS), max_size=20), BUCKETS)
def test_buckets_of_many_keys_are_those_of_each(pairs: list[tuple[bytes, bytes]], buckets: int) -> None:
    many = [keys.timeline_key(table, owner, buckets) for table, owner in pairs]
    column = keys.buckets_of(many)
    assert column.dtype == np.uint32
    assert column.tolist() == [keys.bucket_of(key) for key in many]


@given(TABLES, OWNERS)
def test_every_cut_or_lengthened_timeline_key_is_refused(table: bytes, owner: bytes) -> None:
    key = keys.timeline_key(table, owner, 1_024)
    for length in range(len(key)):
        with pytest.raises(InvalidRequest, match="no timeline key"):
            keys.split_timeline(key[:length])
    with pytest.raises(InvalidRequest, match="no timeline key"):
        keys.split_timeline(key + b"\x00")


def test_placement_never_changes_because_clusters_have_stored_by_it() -> None:
    assert keys.timeline_key(b"moments", b"alice", 131_072).hex() == ALICE
    assert keys.priority(bytes.fromhex(ALICE), 3) == ALICES_REPLICAS
    assert keys.item_key(-1, b"a\x00").hex() == "7fffffffffffffff6100ff0001"


def test_owners_fill_the_buckets_evenly() -> None:
    counts = np.bincount(keys.buckets_of([keys.timeline_key(b"t", b"%d" % i, 64) for i in range(64_000)]), minlength=64)
    assert abs(counts - 1_000).max() < 6 * 1_000**0.5


@given(st.binary(min_size=4, max_size=40), st.sampled_from([1, 3, 5]))
def test_a_priority_is_an_order_of_all_replicas_and_always_the_same(timeline: bytes, replicas: int) -> None:
    order = keys.priority(timeline, replicas)
    assert order in set(itertools.permutations(range(replicas)))
    assert keys.priority(timeline, replicas) == order


# ---------------------------------------------------------------- limits


def test_owners_and_ids_at_the_limit_pass_and_beyond_it_the_limit_is_named() -> None:
    assert keys.owner_bytes("é" * 127) == "é".encode() * 127
    assert keys.owner_bytes(b"\x00" * 255) == b"\x00" * 255
    assert keys.check_id("") == b""
    assert keys.check_id(b"\xff" * 255) == b"\xff" * 255
    assert keys.check_value(bytes(1 << 20)) == bytes(1 << 20)
    for check, size, limit in (
        (keys.owner_bytes, 256, 255),
        (keys.check_id, 256, 255),
        (keys.check_value, (1 << 20) + 1, 1 << 20),
    ):
        with pytest.raises(TooLarge, match=f"{size} bytes, the limit is {limit} bytes") as caught:
            check(bytes(size))
        assert caught.value.limit == limit
    with pytest.raises(TooLarge):
        keys.owner_bytes("é" * 128)  # the limit counts bytes, not characters


@pytest.mark.parametrize("check", [keys.owner_bytes, keys.check_id])
@pytest.mark.parametrize("wrong", [None, 7, bytearray(b"x"), ["x"], "\ud800"])
def test_owners_and_ids_of_another_type_are_refused(check: Any, wrong: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"pass .*bytes"):
        check(wrong)


@pytest.mark.parametrize("wrong", ["", b""])
def test_an_empty_owner_is_refused(wrong: Any) -> None:
    with pytest.raises(InvalidRequest, match="owner is empty"):
        keys.owner_bytes(wrong)


@pytest.mark.parametrize("wrong", ["text", bytearray(b"x"), None])
def test_values_of_another_type_are_refused(wrong: Any) -> None:
    with pytest.raises(InvalidRequest, match="pass bytes"):
        keys.check_value(wrong)


def test_timestamps_are_64_bit_integers_of_any_integer_type() -> None:
    for right in (keys.MIN_TIMESTAMP, -1, 0, keys.MAX_TIMESTAMP):
        assert keys.check_timestamp(right) == right
    of_numpy: Any = np.int64(5)
    assert type(keys.check_timestamp(of_numpy)) is int


@pytest.mark.parametrize("wrong", [1.5, "1", None, b"1", int, np.zeros(2)])
def test_timestamps_that_are_no_integer_are_refused(wrong: Any) -> None:
    with pytest.raises(InvalidRequest, match="pass an int"):
        keys.check_timestamp(wrong)


@pytest.mark.parametrize("wrong", [keys.MIN_TIMESTAMP - 1, keys.MAX_TIMESTAMP + 1])
def test_timestamps_beyond_64_bits_are_refused(wrong: int) -> None:
    with pytest.raises(InvalidRequest, match="64 bits"):
        keys.check_timestamp(wrong)


@given(st.lists(TIMESTAMPS))
def test_item_keys_of_many_timestamps_are_those_of_each(timestamps: list[int]) -> None:
    assert keys.item_keys(np.array(timestamps, dtype=np.int64)) == [keys.item_key(stamp) for stamp in timestamps]
