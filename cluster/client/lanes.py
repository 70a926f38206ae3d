"""Request merging: calls that come while a batch is in flight form the next one.

A single call on an idle lane leaves at once, so merging costs no latency; under load the batches grow by themselves
to what arrives in one round trip, and the cost of a message is shared by all requests in it. A window of time would
only add waiting: it measured no better.

Each storage group has its own lane, so a group that is in trouble delays only its own calls. Within a lane a batch
may be slow too (it met the cold tier, or a node that hangs), so a call waits for the batch before it no longer than
`patience_s`. Big calls gain nothing from merging: a few of them fly side by side.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from ..errors import InvalidRequest, TimeTierError, Unavailable
from ..gate import RETRY_AFTER_S


class Sliced(Sized, Protocol):
    """Results in the order of their requests, as a list or as columns."""

    def __getitem__(self, part: slice, /) -> Any:
        """A part of them, of the same kind."""


Q = TypeVar("Q", bound=Sized)
R = TypeVar("R", bound=Sliced)


class Shape(Protocol[Q, R]):
    """How the requests of calls are put together, and results taken apart: `Q` holds requests, `R` results."""

    def merged(self, calls: Sequence[Q]) -> Q:
        """Requests of several calls as those of one."""

    def taken(self, requests: Q, indices: Sequence[int]) -> Q:
        """The requests at these indices."""

    def gathered(self, count: int, parts: Iterable[tuple[Sequence[int], R]]) -> R:
        """`count` results from parts of them, each with the indices at which its results belong."""

    def failed(self, count: int, error: TimeTierError) -> R:
        """The same error for all."""


class Rows:
    """Requests and results as plain lists."""

    def merged(self, calls: Sequence[list[Any]]) -> list[Any]:
        return [one for call in calls for one in call]

    def taken(self, requests: list[Any], indices: Sequence[int]) -> list[Any]:
        return [requests[index] for index in indices]

    def gathered(self, count: int, parts: Iterable[tuple[Sequence[int], list[Any]]]) -> list[Any]:
        results: list[Any] = [None] * count
        for indices, part in parts:
            for index, result in zip(indices, part, strict=True):
                results[index] = result
        return results

    def failed(self, count: int, error: TimeTierError) -> list[Any]:
        return [error] * count


ROWS = Rows()


@dataclass(frozen=True, slots=True)
class LaneLimits:
    """Bounds of one lane.

    `batch_items`, `batch_bytes`: calls are merged up to this many requests and bytes (a single call may have more).
    `big_items`: from this many waiting requests on, up to `big_batches` batches fly side by side. `max_batches`: bound
    on all batches in flight. `patience_s`: a batch that takes longer no longer holds the next one back.
    `queued_items`, `queued_bytes`: what may wait. `max_wait_s`: how long a call may wait before it fails.
    """

    batch_items: int = 1_000
    batch_bytes: int = 16 << 20
    big_items: int = 256
    big_batches: int = 4
    max_batches: int = 32
    patience_s: float = 0.005
    queued_items: int = 100_000
    queued_bytes: int = 64 << 20
    max_wait_s: float = 10.0


@dataclass(slots=True)
class _Waiting(Generic[Q, R]):
    requests: Q
    size_bytes: int
    since: float
    answer: asyncio.Future[R]


class Lane(Generic[Q, R]):
    """Merges calls into batches. `run_batch` takes requests and returns their results in the same order; `shape` puts
    requests together and takes results apart."""

    def __init__(
        self,
        run_batch: Callable[[Q], Awaitable[R]],
        limits: LaneLimits | None = None,
        *,
        shape: Shape[Any, Any] = ROWS,
    ) -> None:
        self._shape = shape
        self.limits = limits or LaneLimits()
        self.queued_items = 0
        self.queued_bytes = 0
        self.flying = 0
        self._run_batch = run_batch
        self._queue: deque[_Waiting[Q, R]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._closed = False
        self._gathering = False

    async def submit(self, requests: Q, size_bytes: int = 0) -> R:
        """Results of the requests. Raises Unavailable, with nothing sent, when the queue is full.

        A caller that is cancelled before its requests were sent takes them back; afterwards only their results go.
        """
        if self._closed:
            raise InvalidRequest("the store is closed: connect again")
        if not self._queue and not self._gathering and self._may_start(len(requests)):
            self._took_off()
            try:
                return await self._run_batch(requests)
            finally:
                self._landed()
                self._start_waiting()
        limits = self.limits
        items = self.queued_items + len(requests)
        if items > limits.queued_items or self.queued_bytes + size_bytes > limits.queued_bytes:
            raise Unavailable(
                f"the client's queue is full ({self.queued_items} requests, {self.queued_bytes} bytes): "
                "call less at once, or wait for earlier calls",
                retry_after_s=RETRY_AFTER_S,
            )
        loop = asyncio.get_running_loop()
        waiting: _Waiting[Q, R] = _Waiting(requests, size_bytes, loop.time(), loop.create_future())
        self._queue.append(waiting)
        self.queued_items, self.queued_bytes = items, self.queued_bytes + size_bytes
        if self._timer is None:
            self._timer = loop.call_later(limits.patience_s, self._tick)
        return await waiting.answer

    async def close(self, grace_s: float = 1.0) -> None:
        """Fail what waits, give batches in flight `grace_s` seconds to end, and cancel the rest."""
        self._closed = True
        while self._queue:
            self._refuse(self._pop(), "the store was closed")
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        try:
            await asyncio.wait_for(self._idle.wait(), grace_s)
        except TimeoutError:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _may_start(self, items: int) -> bool:
        if self.flying == 0:
            return True
        return items >= self.limits.big_items and self.flying < self.limits.big_batches

    def _took_off(self) -> None:
        self.flying += 1
        self._idle.clear()

    def _landed(self) -> None:
        self.flying -= 1
        if not self.flying:
            self._idle.set()

    def _gather(self, landed: int) -> None:
        """A batch of so many calls has landed. Their callers may come with the next ones in this very turn of the loop:
        were the few that wait to leave without them, they would wait a round trip for those."""
        if len(self._queue) >= landed:
            self._start_waiting()
        elif not self._gathering:
            self._gathering = True
            asyncio.get_running_loop().call_soon(self._gathered)

    def _gathered(self) -> None:
        self._gathering = False
        self._start_waiting()

    def _start_waiting(self) -> None:
        while self._queue and self._may_start(self.queued_items):
            self._start_next()

    def _tick(self) -> None:
        """A call has waited for `patience_s`: start without waiting for the batches in flight."""
        self._timer = None
        if not self._queue:
            return
        limits = self.limits
        loop = asyncio.get_running_loop()
        now = loop.time()
        while self._queue and now - self._queue[0].since > limits.max_wait_s:
            self._refuse(self._pop(), f"it waited {limits.max_wait_s:g} s behind slow requests of the same group")
        if self._queue and now - self._queue[0].since >= limits.patience_s and self.flying < limits.max_batches:
            self._start_next()
        if self._queue:
            rest_s = limits.patience_s - (now - self._queue[0].since)
            self._timer = loop.call_later(max(rest_s, limits.patience_s / 4), self._tick)

    def _pop(self) -> _Waiting[Q, R]:
        waiting = self._queue.popleft()
        self.queued_items -= len(waiting.requests)
        self.queued_bytes -= waiting.size_bytes
        return waiting

    def _refuse(self, waiting: _Waiting[Q, R], reason: str) -> None:
        if not waiting.answer.done():
            waiting.answer.set_exception(Unavailable(f"not sent: {reason}", retry_after_s=RETRY_AFTER_S))

    def _start_next(self) -> None:
        calls: list[_Waiting[Q, R]] = []
        items = size = 0
        while self._queue and (not calls or self._fits(self._queue[0], items, size)):
            waiting = self._pop()
            if not waiting.answer.done():  # else its caller has gone
                calls.append(waiting)
                items += len(waiting.requests)
                size += waiting.size_bytes
        if calls:
            self._took_off()
            task = asyncio.get_running_loop().create_task(self._fly(calls))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _fits(self, waiting: _Waiting[Q, R], items: int, size: int) -> bool:
        """Whether a call may join a batch that has `items` requests of `size` bytes."""
        limits = self.limits
        return items + len(waiting.requests) <= limits.batch_items and size + waiting.size_bytes <= limits.batch_bytes

    async def _fly(self, calls: list[_Waiting[Q, R]]) -> None:
        requests = calls[0].requests
        if len(calls) > 1:
            requests = self._shape.merged([call.requests for call in calls])
        try:
            results = await self._run_batch(requests)
        except asyncio.CancelledError:
            for call in calls:
                call.answer.cancel()
            raise
        except Exception as error:  # each caller gets it: nothing is swallowed
            for call in calls:
                if not call.answer.done():
                    call.answer.set_exception(error)
        else:
            low = 0
            for call in calls:
                high = low + len(call.requests)
                if not call.answer.done():
                    call.answer.set_result(results[low:high])
                low = high
        finally:
            self._landed()
            self._gather(len(calls))


class Lanes(Generic[Q, R]):
    """One lane for each storage group."""

    def __init__(
        self,
        run_batch: Callable[[Q], Awaitable[R]],
        size_bytes: Callable[[Q], int],
        limits: LaneLimits | None = None,
        *,
        shape: Shape[Any, Any] = ROWS,
    ) -> None:
        self._run_batch = run_batch
        self._size_bytes = size_bytes
        self._shape = shape
        self._limits = limits or LaneLimits()
        self._lanes: dict[int, Lane[Q, R]] = {}

    async def submit(self, groups: Sequence[int], requests: Q) -> R:
        """Results of the requests, `groups[i]` being the group of the request at index i.

        A full queue is an error in the results of its group only: other groups may have been written to.
        """
        first = groups[0]
        if groups.count(first) == len(groups):
            return await self._submit_part(first, requests)
        parts: dict[int, list[int]] = {}
        for index, group in enumerate(groups):
            parts.setdefault(group, []).append(index)
        shape = self._shape
        answers = await asyncio.gather(
            *[self._submit_part(group, shape.taken(requests, indices)) for group, indices in parts.items()]
        )
        results: R = shape.gathered(len(requests), zip(parts.values(), answers, strict=True))
        return results

    def lane(self, group: int) -> Lane[Q, R]:
        """The lane of one group, for who has requests of that group only."""
        lane = self._lanes.get(group)
        if lane is None:
            lane = self._lanes[group] = Lane(self._run_batch, self._limits, shape=self._shape)
        return lane

    async def _submit_part(self, group: int, requests: Q) -> R:
        try:
            return await self.lane(group).submit(requests, self._size_bytes(requests))
        except Unavailable as error:
            results: R = self._shape.failed(len(requests), error)
            return results

    def figures(self) -> dict[str, int]:
        """Requests that wait, and batches in flight, over all groups."""
        lanes = list(self._lanes.values())  # in one step: other threads may ask too
        return {
            "queued_items": sum(lane.queued_items for lane in lanes),
            "batches_in_flight": sum(lane.flying for lane in lanes),
        }

    async def close(self, grace_s: float = 1.0) -> None:
        """Close all lanes."""
        await asyncio.gather(*[lane.close(grace_s) for lane in self._lanes.values()])
