"""Items as callers see them, and how arguments become the columns of requests.

All arguments are checked here, before anything is sent; every error names the value and what to pass instead.
"""

from __future__ import annotations

import datetime
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ..errors import InvalidRequest, Rejected, TooLarge
from ..keys import (
    MAX_BATCH_BYTES,
    MAX_BATCH_ITEMS,
    MAX_TABLE_BYTES,
    MAX_TIMESTAMP,
    MIN_TIMESTAMP,
    TABLE_NAME,
    check_id,
    check_timestamp,
    check_value,
    decode_token,
    encode_token,
    item_key,
    item_keys_timestamps,
    owner_bytes,
    split_item_key,
    timeline_key,
    timestamp_floor,
)
from ..messages import DELETE, PUT, WIPE
from .scripts import ItemQuery, ItemResult, PageQuery, PageResult, WriteRequest

T = TypeVar("T")

MAX_LIMIT = 10_000


class Item(NamedTuple):
    """One item. `timestamp`: in the table's unit. `version`: of the timeline, when the item was written.

    `written_us`: time at which it was written, microseconds since 1970.
    """

    timestamp: int
    value: bytes
    id: bytes
    version: int
    written_us: int


class Page(NamedTuple):
    """Items of a timeline, newest first, as of `version`. `next`: pass it as `before` for older ones; None at the end.

    A page may hold fewer items than the limit although `next` is set, when they are large.
    """

    items: list[Item]
    version: int
    next: str | None


class Put(NamedTuple):
    """An item to write.

    >>> Put("alice", 1_700_000_000_000_000, b"hello")
    Put(owner='alice', timestamp=1700000000000000, value=b'hello', id=b'')
    """

    owner: str | bytes
    timestamp: int
    value: bytes
    id: bytes | str = b""


class ItemAddress(NamedTuple):
    """Which item: what `get_many` and `delete_many` take; a plain tuple of two or three does as well."""

    owner: str | bytes
    timestamp: int
    id: bytes | str = b""


AddressLike = ItemAddress | tuple[str | bytes, int] | tuple[str | bytes, int, bytes | str]
PutLike = Put | tuple[str | bytes, int, bytes] | tuple[str | bytes, int, bytes, bytes | str]


class ManyWrites(NamedTuple):
    """Writes of many items: one atomic request per timeline, and for each item the place of its request."""

    requests: list[WriteRequest]
    places: list[int]


def table_bytes(name: str) -> bytes:
    """Name of a table as bytes. Raises InvalidRequest or TooLarge."""
    if not isinstance(name, str):
        raise InvalidRequest(f"table={name!r} is a {type(name).__name__}: pass str")
    if not name:
        raise InvalidRequest("table is empty: pass its name")
    try:
        raw = name.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(f"table={name!r} is no text that UTF-8 can hold") from None
    if len(raw) > MAX_TABLE_BYTES:
        raise TooLarge(f"table has {len(raw)} bytes, the limit is {MAX_TABLE_BYTES} bytes", limit=MAX_TABLE_BYTES)
    if not TABLE_NAME.fullmatch(name):
        raise InvalidRequest(f"table={name!r}: write it with A-Z a-z 0-9 _ . - only, not beginning with _")
    return raw


def checked_timestamp(timestamp: int) -> int:
    """Timestamp as int64; anything with `__index__` but bool will do. Raises InvalidRequest."""
    if type(timestamp) is int and MIN_TIMESTAMP <= timestamp <= MAX_TIMESTAMP:
        return timestamp
    if isinstance(timestamp, (bool, np.bool_)):
        raise InvalidRequest(f"timestamp={timestamp!r} is a bool: pass an int")
    if isinstance(timestamp, (datetime.date, np.datetime64)):
        raise InvalidRequest(
            f"timestamp={timestamp!r} is a {type(timestamp).__name__}: pass an int in the table's unit, for a datetime "
            "`when` and a table of microseconds int(when.timestamp() * 1_000_000)"
        )
    return check_timestamp(timestamp)


def checked_key(timestamp: int, item_id: bytes | str) -> bytes:
    """Item key of arguments. Raises InvalidRequest or TooLarge."""
    if type(timestamp) is not int or not MIN_TIMESTAMP <= timestamp <= MAX_TIMESTAMP:
        timestamp = checked_timestamp(timestamp)
    if type(item_id) is not bytes or item_id:
        return item_key(timestamp, check_id(item_id))
    return item_key(timestamp)


def checked_if_version(if_version: int | None) -> int:
    """-1 for None. Raises InvalidRequest."""
    if if_version is None:
        return -1
    version = _as_int(if_version)
    if version is None or not 0 <= version <= MAX_TIMESTAMP:
        raise InvalidRequest(f"if_version={if_version!r}: pass a version (0 for an empty timeline), or None")
    return version


def checked_limit(limit: int) -> int:
    """Limit of a page. Raises InvalidRequest or TooLarge."""
    items = _as_int(limit)
    if items is None or items < 1:
        raise InvalidRequest(f"limit={limit!r}: pass an int from 1 to {MAX_LIMIT}")
    if items > MAX_LIMIT:
        raise TooLarge(f"limit={limit}: a page has at most {MAX_LIMIT} items", limit=MAX_LIMIT)
    return items


def before_bound(before: str | int | None) -> bytes:
    """Bound of a page, exclusive: of a page token, of an instant, or none. Raises InvalidRequest."""
    if before is None:
        return b""
    if isinstance(before, str):
        return decode_token(before)
    try:
        return timestamp_floor(checked_timestamp(before))
    except InvalidRequest:
        raise InvalidRequest(f"before={before!r}: pass the `next` of a page, or a timestamp (int)") from None


def put_request(
    table: bytes,
    buckets: int,
    item: tuple[str | bytes, int, bytes, bytes | str],
    if_version: int | None,
) -> WriteRequest:
    """Request that writes one item. Raises InvalidRequest or TooLarge."""
    owner, timestamp, value, item_id = item
    return WriteRequest(
        timeline_key(table, owner_bytes(owner), buckets),
        bytes((PUT,)),
        [checked_key(timestamp, item_id)],
        [check_value(value)],
        checked_if_version(if_version),
    )


def delete_request(
    table: bytes,
    buckets: int,
    address: tuple[str | bytes, int, bytes | str],
    if_version: int | None,
) -> WriteRequest:
    """Request that deletes one item. Raises InvalidRequest or TooLarge."""
    timeline, key = item_query(table, buckets, address)
    return WriteRequest(timeline, bytes((DELETE,)), [key], [b""], checked_if_version(if_version))


def wipe_request(table: bytes, buckets: int, owner: str | bytes, if_version: int | None) -> WriteRequest:
    """Request that deletes a whole timeline. Raises InvalidRequest or TooLarge."""
    timeline = timeline_key(table, owner_bytes(owner), buckets)
    return WriteRequest(timeline, bytes((WIPE,)), [b""], [b""], checked_if_version(if_version))


def put_requests(table: bytes, buckets: int, items: Iterable[PutLike]) -> ManyWrites:
    """Requests that write many items; of two with one key the later wins. Raises InvalidRequest or TooLarge."""
    rows: list[tuple[str | bytes, bytes, bytes]] = []
    for item in _each("items", items):
        _check_count(len(rows) + 1)
        try:
            owner, timestamp, value, item_id = item if type(item) is Put else Put(*item)
            rows.append((owner, checked_key(timestamp, item_id), check_value(value)))
        except TypeError:
            raise _at(len(rows), InvalidRequest(f"{_shown(item)}: pass Put(owner, timestamp, value, id=b'')")) from None
        except Rejected as error:
            raise _at(len(rows), error) from None
    return _grouped(table, buckets, rows, PUT)


def delete_requests(table: bytes, buckets: int, addresses: Iterable[AddressLike]) -> ManyWrites:
    """Requests that delete many items. Raises InvalidRequest or TooLarge."""
    rows: list[tuple[str | bytes, bytes, bytes]] = []
    for address in _each("keys", addresses):
        _check_count(len(rows) + 1)
        owner, timestamp, item_id = _unpack(len(rows), address)
        try:
            rows.append((owner, checked_key(timestamp, item_id), b""))
        except Rejected as error:
            raise _at(len(rows), error) from None
    return _grouped(table, buckets, rows, DELETE)


def item_query(table: bytes, buckets: int, address: tuple[str | bytes, int, bytes | str]) -> ItemQuery:
    """Query for one item. Raises InvalidRequest or TooLarge."""
    owner, timestamp, item_id = address
    key = checked_key(timestamp, item_id)
    return ItemQuery(timeline_key(table, owner_bytes(owner), buckets), key)


def item_queries(table: bytes, buckets: int, addresses: Iterable[AddressLike]) -> list[ItemQuery]:
    """Queries for many items. Raises InvalidRequest or TooLarge."""
    queries: list[ItemQuery] = []
    timelines: dict[str | bytes, bytes] = {}  # many items of one owner are common
    for address in _each("keys", addresses):
        if type(address) is tuple and len(address) == 2:
            owner, timestamp = address
            item_id: bytes | str = b""
        else:
            owner, timestamp, item_id = _unpack(len(queries), address)
        try:
            key = checked_key(timestamp, item_id)
            timeline = timelines.get(owner) if isinstance(owner, (str, bytes)) else None
            if timeline is None:
                timeline = timelines[owner] = timeline_key(table, owner_bytes(owner), buckets)
        except Rejected as error:
            raise _at(len(queries), error) from None
        queries.append(ItemQuery(timeline, key))
        _check_count(len(queries))
    return queries


def page_query(table: bytes, buckets: int, owner: str | bytes, before: bytes, limit: int) -> PageQuery:
    """Query for one page; `before` and `limit` are checked already. Raises InvalidRequest or TooLarge."""
    return PageQuery(timeline_key(table, owner_bytes(owner), buckets), before, limit)


def page_queries(table: bytes, buckets: int, owners: Iterable[str | bytes], limit: int) -> list[PageQuery]:
    """Queries for the newest pages of many timelines. Raises InvalidRequest or TooLarge."""
    if isinstance(owners, (str, bytes)):
        raise InvalidRequest(f"owners={owners!r} is one owner: pass a list of them")
    queries: list[PageQuery] = []
    for owner in _each("owners", owners):
        _check_count(len(queries) + 1)
        try:
            queries.append(page_query(table, buckets, owner, b"", limit))
        except Rejected as error:
            raise _at(len(queries), error) from None
    return queries


def to_item(key: bytes, result: ItemResult) -> Item | None:
    """Item of an answer, None if there is none."""
    if not result.found:
        return None
    timestamp, item_id = split_item_key(key)
    return Item(timestamp, result.value, item_id, result.version, result.written_us)


def to_items(keys: Sequence[bytes], results: Sequence[ItemResult]) -> list[Item | None]:
    """Items of answers, None where there is none."""
    timestamps: list[int] = item_keys_timestamps(keys).tolist()
    return [
        Item(timestamp, result.value, _item_id(key), result.version, result.written_us) if result.found else None
        for timestamp, key, result in zip(timestamps, keys, results, strict=True)
    ]


def to_page(result: PageResult) -> Page:
    """Page of an answer."""
    keys = result.keys
    timestamps: list[int] = item_keys_timestamps(keys).tolist() if keys else []
    columns = zip(timestamps, result.values, map(_item_id, keys), result.versions, result.written_us, strict=True)
    token = encode_token(keys[-1]) if result.more else None
    return Page(list(map(Item._make, columns)), result.version, token)


def _item_id(key: bytes) -> bytes:
    item_id = key[8:-2]
    return item_id if b"\x00" not in item_id else split_item_key(key)[1]


def _grouped(table: bytes, buckets: int, rows: Sequence[tuple[str | bytes, bytes, bytes]], kind: int) -> ManyWrites:
    """One request per timeline, in the order of first appearance."""
    place_of_owner: dict[str | bytes, int] = {}
    place_of_timeline: dict[bytes, int] = {}
    columns: list[dict[bytes, bytes]] = []
    places: list[int] = []
    size_bytes = 0
    for position, (owner, key, value) in enumerate(rows):
        place = place_of_owner.get(owner) if isinstance(owner, (str, bytes)) else None
        if place is None:
            try:
                timeline = timeline_key(table, owner_bytes(owner), buckets)
            except Rejected as error:
                raise _at(position, error) from None
            place = place_of_owner[owner] = place_of_timeline.setdefault(timeline, len(columns))
            if place == len(columns):
                columns.append({})
        columns[place][key] = value
        places.append(place)
        size_bytes += len(owner) + len(key) + len(value)
    if size_bytes > MAX_BATCH_BYTES:
        raise TooLarge(
            f"{len(rows)} items of {size_bytes} bytes: a call takes at most {MAX_BATCH_BYTES} bytes: split it",
            limit=MAX_BATCH_BYTES,
        )
    requests = [
        WriteRequest(timeline, bytes((kind,)) * len(column), list(column), list(column.values()))
        for timeline, column in zip(place_of_timeline, columns, strict=True)
    ]
    return ManyWrites(requests, places)


def _unpack(position: int, address: AddressLike) -> ItemAddress:
    try:
        return ItemAddress(*address)
    except TypeError:
        raise _at(
            position, InvalidRequest(f"{_shown(address)}: pass (owner, timestamp) or (owner, timestamp, id)")
        ) from None


def _each(name: str, values: Iterable[T]) -> Iterator[T]:
    try:
        return iter(values)
    except TypeError:
        raise InvalidRequest(f"{name}={_shown(values)}: pass a list, or something else to iterate over") from None


def _check_count(count: int) -> None:
    if count > MAX_BATCH_ITEMS:
        raise TooLarge(
            f"more than {MAX_BATCH_ITEMS} items: a call takes at most that many: split it", limit=MAX_BATCH_ITEMS
        )


def _at(position: int, error: Rejected) -> Rejected:
    return type(error)(f"item {position}: {error.message}", **error.fields)


def _as_int(value: Any) -> int | None:
    """Value as an int, None if it is none; a bool is none here."""
    if isinstance(value, (bool, np.bool_)):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
