"""The synchronous face: the same store, run on an event loop in a thread of its own.

Threads that call at the same time share messages like tasks do, so one `Store` for all threads is right. From inside
a running event loop these calls work, but block that loop: use `timetier.connect_async()` there.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from ..errors import InvalidRequest, OutcomeUnknown, TimeTierError
from ..explanation import Explanation, SinkOutlook
from ..topology import TablePolicy
from .items import AddressLike, Item, Page, PutLike
from .store import AsyncStore, AsyncTable

if TYPE_CHECKING:
    import pyarrow.dataset as ds

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

_JOIN_S = 5.0


def _documented_by(source: Callable[..., Any]) -> Callable[[F], F]:
    """Take the docstring over from the asynchronous method of the same name."""

    def take_over(method: F) -> F:
        method.__doc__ = source.__doc__
        return method

    return take_over


class LoopThread:
    """An event loop in a daemon thread, and the way into it from other threads."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._stopping = False
        self._thread = threading.Thread(target=self._run_loop, name="timetier-client", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Result of a coroutine that runs on the loop. An interrupt (Ctrl-C) while waiting cancels it."""
        try:
            future = self._submit(coroutine)
        except BaseException:
            coroutine.close()
            raise
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise OutcomeUnknown("the store was closed during the call: read before you retry a write") from None
        except BaseException:
            future.cancel()  # without effect if the error is the call's own
            raise

    def stop(self) -> None:
        """Cancel what runs and end the thread. Without effect in a forked process, and the second time."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
            self._loop.call_soon_threadsafe(lambda: self._loop.create_task(self._wind_up()))
        if not self.is_current():  # a garbage collector may call from anywhere
            self._thread.join(_JOIN_S)

    def is_current(self) -> bool:
        """Whether the caller runs on this very thread."""
        return threading.current_thread() is self._thread

    def _submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        if os.getpid() != self._pid:
            raise InvalidRequest(f"the store was opened by process {self._pid}: connect again after a fork")
        if self.is_current():
            raise InvalidRequest("a call from the store's own thread would wait for itself: use connect_async()")
        with self._lock:
            if self._stopping:
                raise InvalidRequest("the store is closed: connect again")
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    async def _wind_up(self) -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._loop.shutdown_asyncgens()
        self._loop.stop()


class Store:
    """A connection to one cluster, for any number of threads. Get one by `timetier.connect()`.

    Close it with `store.close()`, or use it in `with`. After a fork the child must connect again.
    """

    def __init__(self, store: AsyncStore, thread: LoopThread) -> None:
        """`store` lives on the loop of `thread`; both end with this object."""
        self._store = store
        self._thread = thread
        self._end = weakref.finalize(self, _shut, store, thread)

    @classmethod
    def open(cls, connect: Callable[[], Coroutine[Any, Any, AsyncStore]]) -> Store:
        """Start a thread and have `connect` open the asynchronous store there."""
        thread = LoopThread()
        try:
            return cls(thread.run(connect()), thread)
        except BaseException:
            thread.stop()
            raise

    @_documented_by(AsyncStore.table)
    def table(self, name: str) -> Table:
        return Table(self, self._store.table(name))

    @_documented_by(AsyncStore.status)
    def status(self, *, timeout_s: float = 2.0) -> dict[str, Any]:
        return self.run(self._store.status(timeout_s=timeout_s))

    @_documented_by(AsyncStore.sink_outlook)
    def sink_outlook(self) -> SinkOutlook:
        return self.run(self._store.sink_outlook())

    @_documented_by(AsyncStore.close)
    def close(self) -> None:
        self._end()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the store's own event loop and wait for its result."""
        return self._thread.run(coroutine)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Table:
    """Timelines of one table. Get one by `store.table(name)`; it lives as long as the store.

    >>> moments.put("alice", 1_700_000_000_000_000, b"good morning")
    1
    >>> moments.put_many([("alice", 1_700_000_060_000_000, b"coffee"), ("alice", 1_700_000_120_000_000, b"tea")])
    [2, 2]
    >>> moments.get("alice", 1_700_000_060_000_000).value
    b'coffee'
    >>> page = moments.timeline("alice", limit=2)
    >>> [item.value for item in page.items]
    [b'tea', b'coffee']
    >>> [item.value for item in moments.timeline("alice", before=page.next).items]
    [b'good morning']
    >>> moments.put("alice", 1_700_000_180_000_000, b"too late", if_version=1)
    Traceback (most recent call last):
        ...
    VersionConflict: timeline of owner 'alice' in table 'moments' has version 2, not if_version=1
    """

    def __init__(self, store: Store, table: AsyncTable) -> None:
        self.store = store
        self._table = table

    @property
    def name(self) -> str:
        """Name of the table."""
        return self._table.name

    @property
    def asynchronous(self) -> AsyncTable:
        """The same table for coroutines that run on the store's own event loop (`store.run`)."""
        return self._table

    @property
    def policy(self) -> TablePolicy:
        """Policy of the table; `policy.per_second` gives the unit of its timestamps."""
        return self._table.policy

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    @_documented_by(AsyncTable.put)
    def put(
        self,
        owner: str | bytes,
        timestamp: int,
        value: bytes,
        *,
        id: bytes | str = b"",
        if_version: int | None = None,
    ) -> int:
        return self.store.run(self._table.put(owner, timestamp, value, id=id, if_version=if_version))

    @_documented_by(AsyncTable.put_many)
    def put_many(self, items: Iterable[PutLike]) -> list[int]:
        return self.store.run(self._table.put_many(items))

    @_documented_by(AsyncTable.get)
    def get(self, owner: str | bytes, timestamp: int, *, id: bytes | str = b"") -> Item | None:
        return self.store.run(self._table.get(owner, timestamp, id=id))

    @_documented_by(AsyncTable.get_many)
    def get_many(self, keys: Iterable[AddressLike]) -> list[Item | None]:
        return self.store.run(self._table.get_many(keys))

    @_documented_by(AsyncTable.timeline)
    def timeline(self, owner: str | bytes, *, limit: int = 20, before: str | int | None = None) -> Page:
        return self.store.run(self._table.timeline(owner, limit=limit, before=before))

    @_documented_by(AsyncTable.timelines)
    def timelines(self, owners: Iterable[str | bytes], *, limit: int = 20) -> list[Page]:
        return self.store.run(self._table.timelines(owners, limit=limit))

    @_documented_by(AsyncTable.iterate)
    def iterate(self, owner: str | bytes, *, limit_per_page: int = 1_000) -> Iterator[Item]:
        before: str | None = None
        while True:
            page = self.timeline(owner, limit=limit_per_page, before=before)
            yield from page.items
            if page.next is None:
                return
            before = page.next

    @_documented_by(AsyncTable.delete)
    def delete(
        self, owner: str | bytes, timestamp: int, *, id: bytes | str = b"", if_version: int | None = None
    ) -> int:
        return self.store.run(self._table.delete(owner, timestamp, id=id, if_version=if_version))

    @_documented_by(AsyncTable.delete_many)
    def delete_many(self, keys: Iterable[AddressLike]) -> list[int]:
        return self.store.run(self._table.delete_many(keys))

    @_documented_by(AsyncTable.delete_timeline)
    def delete_timeline(self, owner: str | bytes, *, if_version: int | None = None) -> int:
        return self.store.run(self._table.delete_timeline(owner, if_version=if_version))

    @_documented_by(AsyncTable.explain)
    def explain(
        self, owner: str | bytes, timestamp: int | None = None, *, id: bytes | str | None = None
    ) -> Explanation:
        return self.store.run(self._table.explain(owner, timestamp, id=id))

    @_documented_by(AsyncTable.cold_dataset)
    def cold_dataset(self, *, text: bool = False, times: bool = False) -> ds.Dataset:
        from .cold_data import dataset_of

        # The dataset reads by way of this store, and so keeps it alive.
        return self.store.run(dataset_of(self._table, text=text, times=times, run=self.store.run))

    @_documented_by(AsyncTable.cold_ray_dataset)
    def cold_ray_dataset(self, *, text: bool = False, times: bool = False, parallelism: int = -1) -> Any:
        return self.store.run(self._table.cold_ray_dataset(text=text, times=times, parallelism=parallelism))


def _shut(store: AsyncStore, thread: LoopThread) -> None:
    """Close a store and its thread; also when the process ends or the store is garbage."""
    try:
        if not thread.is_current():
            thread.run(store.close())
    except TimeTierError:
        pass  # closed already, or a forked process: there is nothing to close here
    finally:
        thread.stop()
