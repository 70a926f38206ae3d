"""The client for asyncio: `AsyncStore` and its tables.

A call checks its arguments (`items.py`), waits for its lane (`lanes.py`), flies in a batch (`scripts.py`),
and is turned back into items. The synchronous face in `faces.py` runs exactly this on a thread of its own.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Sequence, Sized
from random import Random
from types import TracebackType
from typing import Any, Self, TypeVar

from ..carriers.base import Carrier
from ..drive import drive
from ..effects import CallFailed
from ..errors import InvalidRequest, TimeTierError, WriteManyError
from ..messages import Failure, Message, Status
from ..topology import TablePolicy, Topology
from . import items as shapes
from .following import Follower, TopologySource
from .item_reads import ItemColumns, ItemQueries, ItemResults
from .items import AddressLike, Item, ManyWrites, Page, PutLike
from .lanes import LaneLimits, Lanes
from .page_reads import PageColumns, PageQueries, PageResults
from .probing import Prober
from .scripts import (
    WriteRequest,
    ask_status,
    read_items,
    read_pages,
    write,
)
from .view import ClientSettings, View

R = TypeVar("R")

_QUERY_BYTES = 150  # what a waiting query holds in memory, roughly


class AsyncStore:
    """A connection to one cluster, for one event loop. Get one by `await timetier.connect_async()`.

    All calls made at the same time share messages, so many tasks on one store are fast. Close it with
    `await store.close()`, or use it in `async with`.
    """

    def __init__(
        self,
        carrier: Carrier,
        topology: Topology,
        source: TopologySource,
        *,
        settings: ClientSettings | None = None,
        random: Random | None = None,
    ) -> None:
        """Needs a running event loop. `source` is asked for later topologies; the store closes `carrier`.

        `random`: gives the client's request ids, so no two clients may have equal ones; None for one of its own.
        """
        loop = asyncio.get_running_loop()
        self.carrier = carrier
        self.view = View(topology, now=loop.time, random=random or Random(), settings=settings)
        carrier.update(topology.addresses)
        known = self.view.settings
        limits = LaneLimits(
            batch_items=known.batch_items,
            batch_bytes=known.batch_bytes,
            max_batches=known.max_batches,
            patience_s=known.patience_s,
            queued_items=known.queued_items,
            queued_bytes=known.queued_bytes,
            max_wait_s=known.timeout_s,
        )
        self._writes = Lanes(self._write_batch, _write_bytes, limits)
        self._pages = Lanes(self._page_batch, _query_bytes, limits, shape=PageColumns())
        self._items = Lanes(self._item_batch, _query_bytes, limits, shape=ItemColumns())
        self._follower = Follower(source, self.view, carrier)
        self._prober = Prober(self.view, carrier)
        self._closed = False

    def table(self, name: str) -> AsyncTable:
        """The table of that name. Raises InvalidRequest if it is not configured; the message lists those that are."""
        self._check_open()
        raw = shapes.table_bytes(name)
        return AsyncTable(self, name, raw, self.view.routing.policy(name))

    async def status(self, *, timeout_s: float = 2.0) -> dict[str, Any]:
        """State of the cluster as this client sees it, ready for JSON.

        `nodes` has the status of every node by name. One that does not answer within `timeout_s` seconds has the
        state "unreachable", one that answers something else "unknown", both with a reason.
        """
        self._check_open()
        topology = self.view.routing.topology
        answers = await drive(ask_status(topology.node_names(), timeout_s), self.carrier)
        return {
            "cluster_id": topology.cluster_id,
            "namespace": topology.namespace,
            "epoch": topology.epoch,
            "topology_error": self._follower.last_error,
            "tables": sorted(topology.tables),
            "client": {
                "writes": self._writes.figures(),
                "pages": self._pages.figures(),
                "items": self._items.figures(),
            },
            "nodes": {node: _node_status(answer) for node, answer in answers.items()},
        }

    async def close(self) -> None:
        """End the connection. Calls in flight end with Unavailable, writes of unknown fate with OutcomeUnknown."""
        if self._closed:
            return
        self._closed = True
        self.view.closing = True
        await self._follower.stop()
        await self._prober.stop()
        await self.carrier.close()
        for lanes in (self._writes, self._pages, self._items):
            await lanes.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    # ------------------------------------------------------------ for the tables

    async def write_all(self, requests: list[WriteRequest]) -> list[int | TimeTierError]:
        """Version or error of each request."""
        return await self._writes.submit(self._groups([request.timeline for request in requests]), requests)

    async def write_one(self, request: WriteRequest) -> int:
        """Version of one request. Raises its error."""
        (group,) = self._groups([request.timeline])
        (outcome,) = await self._writes.lane(group).submit([request], request.size_bytes)
        if isinstance(outcome, TimeTierError):
            raise outcome
        version: int = outcome
        return version

    async def read_all_pages(self, queries: PageQueries) -> PageResults:
        """Pages in the order of the queries. Raises the first error there is."""
        results = await self._pages.submit(self._groups(queries.timelines), queries)
        if results.errors:
            raise results.errors[min(results.errors)]
        return results

    async def read_all_items(self, queries: ItemQueries) -> ItemResults:
        """Items in the order of the queries. Raises the first error there is."""
        results = await self._items.submit(self._groups(queries.timelines), queries)
        if results.errors:
            raise results.errors[min(results.errors)]
        return results

    async def read_item(self, timeline: bytes, key: bytes) -> ItemResults:
        """One item. Raises its error."""
        (group,) = self._groups([timeline])
        results = await self._items.lane(group).submit(ItemQueries([timeline], [key]), _QUERY_BYTES)
        if results.errors:
            raise results.errors[0]
        return results

    def _groups(self, timelines: list[bytes]) -> list[int]:
        self._check_open()
        routing = self.view.routing
        if routing.topology.storage_groups == 1:
            return [0] * len(timelines)
        return routing.storage_groups(timelines)

    def _check_open(self) -> None:
        if self._closed:
            raise InvalidRequest("the store is closed: connect again")

    async def _write_batch(self, requests: list[WriteRequest]) -> list[int | TimeTierError]:
        return await drive(write(self.view, requests, self.view.settings.timeout_s), self.carrier)

    async def _page_batch(self, queries: PageQueries) -> PageResults:
        return await drive(read_pages(self.view, queries, self.view.settings.timeout_s), self.carrier)

    async def _item_batch(self, queries: ItemQueries) -> ItemResults:
        return await drive(read_items(self.view, queries, self.view.settings.timeout_s), self.carrier)


class AsyncTable:
    """Timelines of one table. Get one by `store.table(name)`; it lives as long as the store.

    Owners and ids are `str` (UTF-8) or `bytes`, at most 255 bytes; an owner has at least one. Timestamps are ints in
    the table's unit (`policy.per_second` of them make a second). Values are `bytes`, at most 1 MiB.

    Every read sees every write that was acknowledged before the read began, by whomever. Every write that returns
    has been made durable by a majority of the replicas. All methods raise `InvalidRequest` or `TooLarge` for
    arguments that can't be right, before anything is sent, and `Unavailable` when the cluster could not answer in
    time; writes raise `OutcomeUnknown` when they may or may not have been applied.
    """

    def __init__(self, store: AsyncStore, name: str, raw_name: bytes, policy: TablePolicy) -> None:
        self.store = store
        self.name = name
        self.policy = policy
        self._raw = raw_name
        self._buckets = store.view.routing.topology.buckets  # fixed for the life of a cluster

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    async def put(
        self,
        owner: str | bytes,
        timestamp: int,
        value: bytes,
        *,
        id: bytes | str = b"",
        if_version: int | None = None,
    ) -> int:
        """Write one item, over the one with the same timestamp and id if there is one. Returns the timeline's version.

        `if_version`: write only if this is the timeline's version (0: it is empty); else `VersionConflict`, whose
        `version` the timeline has reached (it may be at a later one: to read it is surer).
        """
        request = shapes.put_request(self._raw, self._buckets, (owner, timestamp, value, id), if_version)
        return await self._write_one(request)

    async def put_many(self, items: Iterable[PutLike]) -> list[int]:
        """Write many items (`Put`, or tuples like it). Returns for each the version of its timeline.

        The items of one timeline become one atomic entry: all of them are seen, or none. Of two items with one key
        the later wins. A call takes at most 10,000 items and 16 MiB (`TooLarge` beyond). Timelines succeed or fail
        one by one: `WriteManyError` says which, in `results`.
        """
        return await self._write_many(shapes.put_requests(self._raw, self._buckets, items))

    async def get(self, owner: str | bytes, timestamp: int, *, id: bytes | str = b"") -> Item | None:
        """The item with this timestamp and id, None if there is none."""
        timeline, key = shapes.item_address(self._raw, self._buckets, (owner, timestamp, id))
        return (await self.store.read_item(timeline, key)).items[0]

    async def get_many(self, keys: Iterable[AddressLike]) -> list[Item | None]:
        """Items by `(owner, timestamp)` or `(owner, timestamp, id)`, in that order, at most 10,000 a call."""
        queries = shapes.item_queries(self._raw, self._buckets, keys)
        return (await self.store.read_all_items(queries)).items if queries else []

    async def timeline(self, owner: str | bytes, *, limit: int = 20, before: str | int | None = None) -> Page:
        """The newest items of a timeline, newest first, across all tiers.

        `before`: the `next` of an earlier page, or a timestamp: only items strictly older. A token stays valid for
        ever. `limit`: 1 to 10,000 items.
        """
        bound, limit = shapes.before_bound(before), shapes.checked_limit(limit)
        query = PageQueries([shapes.timeline_of(self._raw, owner, self._buckets)], [bound], [limit])
        return shapes.to_pages(await self.store.read_all_pages(query))[0]

    async def timelines(self, owners: Iterable[str | bytes], *, limit: int = 20) -> list[Page]:
        """The newest page of each of many timelines (at most 10,000), in the order of the owners.

        Each page is consistent by itself; two pages may be of different instants.
        """
        queries = shapes.page_queries(self._raw, self._buckets, owners, shapes.checked_limit(limit))
        if not queries:
            return []
        return shapes.to_pages(await self.store.read_all_pages(queries))

    async def iterate(self, owner: str | bytes, *, limit_per_page: int = 1_000) -> AsyncIterator[Item]:
        """All items of a timeline, newest first, page by page.

        Each page is as of its own instant: items that are written above the place reached are not seen.
        """
        before: str | None = None
        while True:
            page = await self.timeline(owner, limit=limit_per_page, before=before)
            for item in page.items:
                yield item
            if page.next is None:
                return
            before = page.next

    async def delete(
        self, owner: str | bytes, timestamp: int, *, id: bytes | str = b"", if_version: int | None = None
    ) -> int:
        """Delete one item; it is no error if there is none. Returns the timeline's version.

        `if_version` as in `put`.
        """
        return await self._write_one(
            shapes.delete_request(self._raw, self._buckets, (owner, timestamp, id), if_version)
        )

    async def delete_many(self, keys: Iterable[AddressLike]) -> list[int]:
        """Delete many items by `(owner, timestamp)` or `(owner, timestamp, id)`. Rules and errors as in `put_many`."""
        return await self._write_many(shapes.delete_requests(self._raw, self._buckets, keys))

    async def delete_timeline(self, owner: str | bytes, *, if_version: int | None = None) -> int:
        """Delete all items of a timeline, atomically. Versions go on from where they were. `if_version` as in `put`."""
        return await self._write_one(shapes.wipe_request(self._raw, self._buckets, owner, if_version))

    async def _write_one(self, request: WriteRequest) -> int:
        return await self.store.write_one(request)

    async def _write_many(self, writes: ManyWrites) -> list[int]:
        if not writes.requests:
            return []
        outcomes = await self.store.write_all(writes.requests)
        versions = [outcome for outcome in outcomes if not isinstance(outcome, TimeTierError)]
        if len(versions) < len(outcomes):
            raise WriteManyError.of([outcomes[place] for place in writes.places])
        return [versions[place] for place in writes.places]


def _all_or_raise(results: Sequence[R | TimeTierError]) -> list[R]:
    good: list[R] = []
    for result in results:
        if isinstance(result, TimeTierError):
            raise result
        good.append(result)
    return good


def _write_bytes(requests: list[WriteRequest]) -> int:
    return sum([request.size_bytes for request in requests])


def _query_bytes(requests: Sized) -> int:
    return _QUERY_BYTES * len(requests)


def _node_status(answer: Message | CallFailed) -> dict[str, Any]:
    if isinstance(answer, CallFailed):
        return {"state": "unreachable", "reason": answer.reason}
    if isinstance(answer, Failure):
        return {"state": "unknown", "reason": answer.message}
    try:
        status = json.loads(answer.body) if isinstance(answer, Status) else None
    except ValueError:
        status = None
    return status if isinstance(status, dict) else {"state": "unknown", "reason": "its answer is no JSON object"}
