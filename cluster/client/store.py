"""The client for asyncio: `AsyncStore` and its tables.

A call checks its arguments (`items.py`), waits for its lane (`lanes.py`), flies in a batch (`scripts.py`),
and is turned back into items. The synchronous face in `faces.py` runs exactly this on a thread of its own.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence, Sized
from dataclasses import replace
from functools import partial
from random import Random
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from ..carriers.base import Carrier
from ..drive import drive, run_from_thread
from ..effects import CallFailed
from ..errors import Corrupt, InvalidRequest, TimeTierError, WriteManyError
from ..explanation import Explanation, SinkOutlook
from ..keys import check_id, owner_bytes
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

if TYPE_CHECKING:
    import pyarrow.dataset as ds

    from .cold_data import LiveData

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

    async def sink_outlook(self) -> SinkOutlook:
        """When the sink runs next, as far as this store can tell: without a Router it can't."""
        return SinkOutlook(reason="this store has no Router to ask")

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
            raise _first_error(results.errors, len(results), lambda: shapes.to_pages(results))
        return results

    async def read_all_items(self, queries: ItemQueries) -> ItemResults:
        """Items in the order of the queries. Raises the first error there is."""
        results = await self._items.submit(self._groups(queries.timelines), queries)
        if results.errors:
            raise _first_error(results.errors, len(results), lambda: results.items)
        return results

    async def read_item(self, timeline: bytes, key: bytes) -> ItemResults:
        """One item. Raises its error."""
        (group,) = self._groups([timeline])
        results = await self._items.lane(group).submit(ItemQueries([timeline], [key]), _QUERY_BYTES)
        if results.errors:
            raise results.errors[0]
        return results

    async def ray_dataset(self, data: LiveData, parallelism: int) -> Any:
        """A `ray.data.Dataset` of live rows, where the store knows Ray. Raises InvalidRequest."""
        raise InvalidRequest("this store was not opened by timetier.connect(), which is the one that knows Ray")

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
        """Items by `(owner, timestamp)` or `(owner, timestamp, id)`, in that order, at most 10,000 a call.

        `Corrupt` for items of which no copy is good has the other ones in `results`.
        """
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

        Each page is consistent by itself; two pages may be of different instants. `Corrupt` for a page of which some
        item has no good copy has the other ones in `results`.
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

    async def cold_dataset(self, *, text: bool = False, times: bool = False) -> ds.Dataset:
        """What has sunk to the cold tier, as a `pyarrow.dataset.Dataset` that pyarrow, DuckDB and Polars read in place.

        It has the rows that had sunk by some instant after this call, each timeline as of one instant, without those
        that were replaced, deleted or had expired by then; what is in the storage tier is not in it. Columns: `owner`
        (binary; `text`: string), `timestamp`, `id`, `value`, `version`, `written` (int64; `times`: timestamps in UTC).
        Blocks are read when they are needed; a filter on `timestamp` leaves out those that it can.

        A dataset does not change. Once a later run of the sink has replaced files and their grace period
        (`sink.orphan_grace`) is over, reading them raises `Unavailable`: then take the dataset again. It is read in
        threads, and by way of this store's event loop: under asyncio by `await asyncio.to_thread(dataset.to_table)`.
        """
        from .cold_data import dataset_of  # pyarrow.dataset takes a while to import, and most clients need none

        return await dataset_of(self, text=text, times=times, run=partial(run_from_thread, asyncio.get_running_loop()))

    async def cold_ray_dataset(self, *, text: bool = False, times: bool = False, parallelism: int = -1) -> Any:
        """The same rows as a `ray.data.Dataset`, read by tasks of the Ray cluster, each from a copy on its own machine
        if there is one. `parallelism`: read tasks, -1 to leave that to Ray."""
        from .cold_data import live_data_of

        return await self.store.ray_dataset(await live_data_of(self, text=text, times=times), parallelism)

    async def explain(
        self, owner: str | bytes, timestamp: int | None = None, *, id: bytes | str | None = None
    ) -> Explanation:
        """Where the timeline of an owner lies, and why: replicas and versions, windows in the storage tier, cold links.

        With a `timestamp` also each item at that instant (`id`: only the one with this id): its tier, all its versions,
        its block on each cold node, and when it may sink. It asks all replicas, and reads the blocks in question from
        each of them: meant for people, not for programs that are in a hurry. Raises InvalidRequest for an owner of whom
        nothing was ever written.
        """
        from ..explaining import explain  # with pyarrow, for which no other call has to wait

        owner = owner_bytes(owner)
        if timestamp is None and id is not None:
            raise InvalidRequest(f"id={id!r} without a timestamp: give both, or neither")
        at = None if timestamp is None else shapes.checked_timestamp(timestamp)
        item_id = None if id is None else check_id(id)
        now_us = time.time_ns() // 1_000
        script = explain(self.store.view, self.name, owner, at, item_id, now_us=now_us)
        found = await drive(script, self.store.carrier)
        return replace(found, next_sink=await self.store.sink_outlook())

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


def _first_error(errors: dict[int, TimeTierError], count: int, found: Callable[[], Sequence[Any]]) -> TimeTierError:
    """What a call of `count` reads raises. `found`: answers by index; those of failed reads are not looked at.

    Nobody can mend a damaged read by calling again, so its error has what was found of the others.
    """
    error = errors[min(errors)]
    if isinstance(error, Corrupt) and count > 1:
        results = [errors.get(index, answer) for index, answer in enumerate(found())]
        return Corrupt(error.message, **error.fields, results=results)
    return error


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
