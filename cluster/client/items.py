"""Items as callers see them, and how arguments become the columns of requests.

All arguments are checked here, before anything is sent; every error names the value and what to pass instead.
"""

from __future__ import annotations

import datetime
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ..errors import InvalidRequest, Rejected, TooLarge
from ..keys import (
    MAX_BATCH_BYTES,
    MAX_BATCH_ITEMS,
    MAX_OWNER_BYTES,
    MAX_TABLE_BYTES,
    MAX_TIMESTAMP,
    MAX_VALUE_BYTES,
    MIN_ITEM_KEY_BYTES,
    MIN_TIMESTAMP,
    TABLE_NAME,
    check_id,
    check_timestamp,
    check_value,
    decode_token,
    encode_token,
    encode_tokens,
    item_key,
    item_keys,
    owner_bytes,
    timeline_key,
    timestamp_floor,
)
from ..messages import DELETE, PUT, WIPE
from ..packed_items import Item as Item
from .item_reads import ItemQueries
from .page_reads import PageQueries, PageResults
from .scripts import REQUEST_BYTES, WriteRequest

T = TypeVar("T")

MAX_LIMIT = 10_000


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


_new_page: Callable[[tuple[list[Item], int, str | None]], Page] = partial(tuple.__new__, Page)  # as `_make`, but in C

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
        timeline_of(table, owner, buckets),
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
    timeline, key = item_address(table, buckets, address)
    return WriteRequest(timeline, bytes((DELETE,)), [key], [b""], checked_if_version(if_version))


def wipe_request(table: bytes, buckets: int, owner: str | bytes, if_version: int | None) -> WriteRequest:
    """Request that deletes a whole timeline. Raises InvalidRequest or TooLarge."""
    timeline = timeline_of(table, owner, buckets)
    return WriteRequest(timeline, bytes((WIPE,)), [b""], [b""], checked_if_version(if_version))


def put_requests(table: bytes, buckets: int, items: Iterable[PutLike]) -> ManyWrites:
    """Requests that write many items; of two with one key the later wins. Raises InvalidRequest or TooLarge."""
    items = list(islice(_each("items", items), MAX_BATCH_ITEMS + 1))
    quick = _plain_puts(table, buckets, items)
    if quick is not None:
        return quick
    grouping = _Grouping(table, buckets, PUT)
    for item in items:
        try:
            if type(item) is tuple and len(item) == 3:
                owner, timestamp, value = item
                key = checked_key(timestamp, b"")
            else:
                owner, timestamp, value, item_id = item if type(item) is Put else Put(*item)
                key = checked_key(timestamp, item_id)
            if type(value) is not bytes or len(value) > MAX_VALUE_BYTES:
                check_value(value)
            grouping.add(owner, key, value)
        except TypeError:
            raise grouping.at(InvalidRequest(f"{_shown(item)}: pass Put(owner, timestamp, value, id=b'')")) from None
        except Rejected as error:
            raise grouping.at(error) from None
    return grouping.writes()


def _plain_puts(table: bytes, buckets: int, items: list[Any]) -> ManyWrites | None:
    """The same for items of different timelines without ids, column by column; None if there is anything else among
    them."""
    count = len(items)
    kinds = set(map(type, items))
    if not 0 < count <= MAX_BATCH_ITEMS or not (kinds == {Put} or (kinds == {tuple} and set(map(len, items)) == {3})):
        return None
    owners, timestamps, values, *ids = zip(*items, strict=True)
    if not _are_plain(owners, timestamps) or set(map(type, values)) != {bytes} or (ids and set(ids[0]) != {b""}):
        return None
    sizes = list(map(len, values))
    most = sum(sizes) + count * (MIN_ITEM_KEY_BYTES + MAX_OWNER_BYTES)
    if max(sizes) > MAX_VALUE_BYTES or most > MAX_BATCH_BYTES:
        return None
    try:
        timelines = [_kept_timeline(table, owner, buckets) for owner in owners]
    except Rejected:
        return None  # the other way says which one it was
    if len(set(timelines)) < count:
        return None
    keys = item_keys(np.array(timestamps, dtype=np.int64))
    kind = bytes((PUT,))
    fixed = REQUEST_BYTES + MIN_ITEM_KEY_BYTES
    columns = zip(timelines, keys, values, sizes, strict=True)
    requests = [
        WriteRequest(timeline, kind, [key], [value], -1, b"", fixed + len(timeline) + size)
        for timeline, key, value, size in columns
    ]
    return ManyWrites(requests, list(range(count)))


def _are_plain(owners: Sequence[Any], timestamps: Sequence[Any]) -> bool:
    """Whether columns of arguments hold owners and timestamps that need no further check but that of the owners."""
    return (
        set(map(type, owners)) <= {str, bytes}
        and set(map(type, timestamps)) == {int}
        and min(timestamps) >= MIN_TIMESTAMP
        and max(timestamps) <= MAX_TIMESTAMP
    )


def delete_requests(table: bytes, buckets: int, addresses: Iterable[AddressLike]) -> ManyWrites:
    """Requests that delete many items. Raises InvalidRequest or TooLarge."""
    grouping = _Grouping(table, buckets, DELETE)
    for address in _each("keys", addresses):
        owner, timestamp, item_id = _unpack(len(grouping.places), address)
        try:
            grouping.add(owner, checked_key(timestamp, item_id), b"")
        except Rejected as error:
            raise grouping.at(error) from None
    return grouping.writes()


def item_address(table: bytes, buckets: int, address: tuple[str | bytes, int, bytes | str]) -> tuple[bytes, bytes]:
    """Timeline key and item key of one item. Raises InvalidRequest or TooLarge."""
    owner, timestamp, item_id = address
    key = checked_key(timestamp, item_id)
    return timeline_of(table, owner, buckets), key


def item_queries(table: bytes, buckets: int, addresses: Iterable[AddressLike]) -> ItemQueries:
    """Queries for many items. Raises InvalidRequest or TooLarge."""
    addresses = list(_each("keys", addresses))
    quick = _plain_addresses(table, buckets, addresses)
    if quick is not None:
        return quick
    timelines: list[bytes] = []
    keys: list[bytes] = []
    known: dict[str | bytes, bytes] = {}  # many items of one owner are common
    for address in addresses:
        if type(address) is tuple and len(address) == 2:
            owner, timestamp = address
            item_id: bytes | str = b""
        else:
            owner, timestamp, item_id = _unpack(len(keys), address)
        try:
            key = checked_key(timestamp, item_id)
            timeline = known.get(owner) if isinstance(owner, (str, bytes)) else None
            if timeline is None:
                timeline = known[owner] = timeline_of(table, owner, buckets)
        except Rejected as error:
            raise _at(len(keys), error) from None
        timelines.append(timeline)
        keys.append(key)
        if len(keys) > MAX_BATCH_ITEMS:
            _check_count(len(keys))
    return ItemQueries(timelines, keys)


def _plain_addresses(table: bytes, buckets: int, addresses: list[Any]) -> ItemQueries | None:
    """The same for plain tuples of owner and timestamp, column by column; None if there is anything else among them."""
    count = len(addresses)
    if not 0 < count <= MAX_BATCH_ITEMS or set(map(type, addresses)) != {tuple} or set(map(len, addresses)) != {2}:
        return None
    owners, timestamps = map(list, zip(*addresses, strict=True))
    if not _are_plain(owners, timestamps):
        return None
    try:
        timelines = [_kept_timeline(table, owner, buckets) for owner in owners]
    except Rejected:
        return None  # the other way says which one it was
    return ItemQueries(timelines, item_keys(np.array(timestamps, dtype=np.int64)))


def timeline_of(table: bytes, owner: str | bytes, buckets: int) -> bytes:
    """Timeline key of an owner. Raises InvalidRequest or TooLarge."""
    try:
        return _kept_timeline(table, owner, buckets)
    except TypeError:  # what can't be hashed is no owner
        return timeline_key(table, owner_bytes(owner), buckets)


def _timeline_at(position: int, table: bytes, owner: str | bytes, buckets: int) -> bytes:
    try:
        return timeline_of(table, owner, buckets)
    except Rejected as error:
        raise _at(position, error) from None


@lru_cache(maxsize=1 << 15)  # about 10 MB when it is full; callers ask for the same owners again and again
def _kept_timeline(table: bytes, owner: str | bytes, buckets: int) -> bytes:
    return timeline_key(table, owner_bytes(owner), buckets)


def page_queries(table: bytes, buckets: int, owners: Iterable[str | bytes], limit: int) -> PageQueries:
    """Queries for the newest pages of many timelines. Raises InvalidRequest or TooLarge."""
    if isinstance(owners, (str, bytes)):
        raise InvalidRequest(f"owners={owners!r} is one owner: pass a list of them")
    asked = list(islice(_each("owners", owners), MAX_BATCH_ITEMS + 1))
    try:
        timelines = [_kept_timeline(table, owner, buckets) for owner in asked]
    except (Rejected, TypeError):  # one by one, to say which one it is
        timelines = [_timeline_at(position, table, owner, buckets) for position, owner in enumerate(asked)]
    _check_count(len(timelines))
    return PageQueries(timelines, [b""] * len(timelines), [limit] * len(timelines))


def to_pages(results: PageResults) -> list[Page]:
    """Pages of answers."""
    lasts = [items[-1] for items, more in zip(results.items, results.more, strict=True) if more]
    if any(last.id for last in lasts):
        tokens = [encode_token(item_key(last.timestamp, last.id)) for last in lasts]
    else:
        tokens = encode_tokens([last.timestamp for last in lasts])
    each = iter(tokens)
    nexts = each if len(lasts) == len(results) else [next(each) if more else None for more in results.more]
    return list(map(_new_page, zip(results.items, results.versions, nexts, strict=True)))


class _Grouping:
    """One request per timeline, in the order of first appearance; of two items with one key the later wins.

    Most timelines of a large call have one item in it, so only those with more get a dictionary.
    """

    def __init__(self, table: bytes, buckets: int, kind: int) -> None:
        self.places: list[int] = []
        self._table = table
        self._buckets = buckets
        self._kind = bytes((kind,))
        self._requests: list[WriteRequest] = []
        self._place_of_owner: dict[str | bytes, int] = {}
        self._place_of_timeline: dict[bytes, int] = {}
        self._several: dict[int, dict[bytes, bytes]] = {}  # items of the timelines that have more than one
        self._size_bytes = 0

    def add(self, owner: str | bytes, key: bytes, value: bytes) -> None:
        """Add a mutation. Raises InvalidRequest or TooLarge, for the owner or for the number of items."""
        count = len(self.places)
        if count >= MAX_BATCH_ITEMS:
            _check_count(count + 1)
        place = self._place_of_owner.get(owner) if isinstance(owner, (str, bytes)) else None
        if place is None:
            timeline = timeline_key(self._table, owner_bytes(owner), self._buckets)
            place = self._place_of_owner[owner] = self._place_of_timeline.setdefault(timeline, len(self._requests))
        size = len(key) + len(value)
        self._size_bytes += len(owner) + size
        self.places.append(place)
        if place == len(self._requests):
            size += REQUEST_BYTES + len(timeline)
            self._requests.append(WriteRequest(timeline, self._kind, [key], [value], known_size_bytes=size))
            return
        request = self._requests[place]
        request.known_size_bytes += size
        column = self._several.get(place)
        if column is None:
            column = self._several[place] = {request.keys[0]: request.values[0]}
        column[key] = value

    def at(self, error: Rejected) -> Rejected:
        """An error of the item that comes next, with its position."""
        return error if len(self.places) >= MAX_BATCH_ITEMS else _at(len(self.places), error)

    def writes(self) -> ManyWrites:
        """The requests. Raises TooLarge when they are more than a call takes."""
        if self._size_bytes > MAX_BATCH_BYTES:
            raise TooLarge(
                f"{len(self.places)} items of {self._size_bytes} bytes: a call takes at most {MAX_BATCH_BYTES} bytes: "
                "split it",
                limit=MAX_BATCH_BYTES,
            )
        for place, column in self._several.items():
            request = self._requests[place]
            request.kinds = self._kind * len(column)
            request.keys, request.values = [*column], [*column.values()]
        return ManyWrites(self._requests, self.places)


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
