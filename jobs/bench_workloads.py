"""The workloads of `timetier bench` and of `benchmarks.compare`, and how one slice of one of them is timed.

A workload does the same calls to any store behind a `Subject`: so many items a call, by so many callers at once.
Everything that is handed to a call is made before the clock starts.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import itertools
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import numpy as np

from .bench_data import Dataset
from .bench_mix import Mix, Step

T = TypeVar("T")

PAGE = 20
_KEYS_AHEAD = 60_000  # of reads, which go round
_KEYS_AHEAD_PER_S = 200_000  # enough for slices so short that they need fewer
_FEWEST_BATCHES = 20
_WRITES_AHEAD_PER_S = 250_000  # items; nothing here writes faster. A slice ends when they are used up
_SINGLE_WRITES_AHEAD_PER_S = 60_000
_MOST_WRITES_AHEAD = 500_000  # items, some 200 MB of them
_MIXED_AHEAD_PER_S = 150_000
_MOST_STEPS = 1_000_000
_FEWEST_STEPS = 500
_PAGES_AHEAD = 4_000
_PERCENTILES = (1, 10, 50, 90, 99)

Kind = Literal["get", "put", "page", "mix"]


class Workload(NamedTuple):
    """`per_call`: items (pages) of a call; `callers`: concurrent ones in one process."""

    name: str
    title: str
    kind: Kind
    per_call: int
    callers: int


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("get1", "single read", "get", 1, 1),
        Workload("get10", "reads, 10 a call", "get", 10, 1),
        Workload("get100", "reads, 100 a call", "get", 100, 1),
        Workload("get1000", "reads, 1,000 a call", "get", 1_000, 1),
        Workload("get100x4", "reads, 100 a call, 4 in flight", "get", 100, 4),
        Workload("get1000x4", "reads, 1,000 a call, 4 in flight", "get", 1_000, 4),
        Workload("get1x8", "single reads, 8 callers", "get", 1, 8),
        Workload("get1x64", "single reads, 64 callers", "get", 1, 64),
        Workload("page1", "newest 20", "page", 1, 1),
        Workload("page50", "newest 20, 50 timelines a call", "page", 50, 1),
        Workload("put1", "single durable write", "put", 1, 1),
        Workload("put10", "writes, 10 a call", "put", 10, 1),
        Workload("put100", "writes, 100 a call", "put", 100, 1),
        Workload("put1000", "writes, 1,000 a call", "put", 1_000, 1),
        Workload("put1x64", "single writes, 64 callers", "put", 1, 64),
        Workload("mix64", "100 reads to 1 write, Zipf, newest first, 64 callers", "mix", 1, 64),
    )
}


class Subject(Protocol):
    """A store as one client sees it. Errors are raised.

    Methods that do I/O return awaitables, or are done when they return if `blocking` is true; then several callers
    are threads. `key`, `keys`, `write`: what `get`, `get_many` and `put` want, made before the clock starts.
    `values` and `page_values` take what the reads return, and give the bytes that were read (None: nothing there).
    """

    blocking: bool

    def key(self, owner: str, timestamp: int) -> Any: ...

    def write(self, owner: str, timestamp: int, value: bytes) -> Any: ...

    def get(self, key: Any) -> Any: ...

    def get_many(self, keys: list[Any]) -> Any: ...

    def put(self, write: Any) -> Any: ...

    def put_many(self, writes: list[Any]) -> Any: ...

    def page(self, owner: str, limit: int) -> Any: ...

    def pages(self, owners: list[str], limit: int) -> Any: ...

    def values(self, answer: Any) -> list[bytes | None]: ...

    def page_values(self, answer: Any) -> list[list[bytes]]: ...


@dataclasses.dataclass(frozen=True)
class Timing:
    """One slice: `calls` of `items` items in all took `seconds`. Latencies of a call in microseconds.

    `cpu_s`: CPU seconds by part of the system, the client's among them.
    """

    calls: int
    items: int
    seconds: float
    latency_us: dict[str, float]
    cpu_s: dict[str, float]

    @property
    def items_per_s(self) -> float:
        return self.items / self.seconds


CpuClock = Callable[[], dict[str, float]]
"""CPU seconds used so far, by part."""


def client_cpu() -> dict[str, float]:
    """Of this process alone."""
    return {"client": time.process_time()}


class Bench:
    """One store under test as one client sees it, with its data; does slices of workloads."""

    def __init__(
        self,
        subject_of: Callable[[Workload], Subject],
        *,
        reads: Dataset,
        writes: Dataset,
        mix: Dataset,
        seed: int = 0,
        cpu: CpuClock = client_cpu,
    ) -> None:
        """`subject_of`: the face of the store that is fastest for a workload. All three data sets have been loaded.

        `reads` is read, the timelines of `writes` get new items, and those of `mix` both.
        """
        self._subject_of = subject_of
        self._reads, self._writes = reads, writes
        self._rng = np.random.default_rng(seed)
        self._mix = Mix(mix, self._rng)
        self._next_time = max(data.base + data.per_owner * data.step for data in (writes, mix))
        self._cpu = cpu

    async def slice(self, workload: Workload, seconds: float) -> Timing:
        """Do a workload for `seconds`, after a few calls that are not timed. Raises what calls raise."""
        subject = self._subject_of(workload)
        steps: list[Step] = []
        if workload.kind == "mix":
            count = min(_MOST_STEPS, int(seconds * _MIXED_AHEAD_PER_S) + _FEWEST_STEPS)
            steps = self._mix.steps(count, self._times(count))
        calls = _Counted(self._calls(workload, subject, seconds, steps))
        warm = list(itertools.islice(calls, 2 + workload.callers))
        await _run(subject, iter(warm), workload.callers, 3600.0)
        gc.collect()
        gc.freeze()  # what was prepared is no business of the collector during the slice
        try:
            before = self._cpu()
            began = time.perf_counter()
            latencies = await _run(subject, calls, workload.callers, seconds)
            took = time.perf_counter() - began
            used = {part: after - before[part] for part, after in self._cpu().items()}
        finally:
            gc.unfreeze()
            self._mix.did(steps[: calls.taken])
        found = np.percentile(np.array(latencies) * 1e6, _PERCENTILES)
        quantiles = {f"p{at}": round(float(value), 1) for at, value in zip(_PERCENTILES, found, strict=True)}
        return Timing(len(latencies), len(latencies) * workload.per_call, took, quantiles, used)

    def _times(self, count: int) -> int:
        """The first of `count` timestamps that nobody else has."""
        first, self._next_time = self._next_time, self._next_time + count
        return first

    def _calls(self, workload: Workload, subject: Subject, seconds: float, steps: list[Step]) -> Iterator[Call]:
        """The calls of a slice, all of them made already."""
        if workload.kind == "mix":
            return iter([_step_call(subject, step) for step in steps])
        if workload.kind == "put":
            return iter(self._write_calls(workload, subject, seconds))
        data, rng, per_call = self._reads, self._rng, workload.per_call
        ahead = min(_KEYS_AHEAD, int(seconds * _KEYS_AHEAD_PER_S))
        count = max(_FEWEST_BATCHES + workload.callers, ahead // per_call)
        if workload.kind == "page":
            drawn = rng.integers(data.owners, size=(min(count, _PAGES_AHEAD), per_call)).tolist()
            named = [[data.names[number] for number in numbers] for numbers in drawn]
            return itertools.cycle([_page_call(subject, owners) for owners in named])
        batches = [[subject.key(*key) for key in batch] for batch in data.reads(rng, count, per_call)]
        return itertools.cycle([_get_call(subject, keys) for keys in batches])

    def _write_calls(self, workload: Workload, subject: Subject, seconds: float) -> list[Call]:
        per_call = workload.per_call
        per_s = _SINGLE_WRITES_AHEAD_PER_S if per_call == 1 else _WRITES_AHEAD_PER_S
        ahead = min(_MOST_WRITES_AHEAD, int(seconds * per_s))
        count = max(_FEWEST_BATCHES, ahead // per_call) + 2 + workload.callers
        batches = self._writes.new_items(self._rng, self._times(count), count, per_call)
        made = [[subject.write(*write) for write in batch] for batch in batches]
        return [(subject.put, (writes[0],)) if per_call == 1 else (subject.put_many, (writes,)) for writes in made]


Call = tuple[Callable[..., Any], tuple[Any, ...]]


def _get_call(subject: Subject, keys: list[Any]) -> Call:
    return (subject.get, (keys[0],)) if len(keys) == 1 else (subject.get_many, (keys,))


def _page_call(subject: Subject, owners: list[str]) -> Call:
    return (subject.page, (owners[0], PAGE)) if len(owners) == 1 else (subject.pages, (owners, PAGE))


def _step_call(subject: Subject, step: Step) -> Call:
    if step.key is not None:
        return subject.get, (subject.key(*step.key),)
    assert step.write is not None, "a step reads or writes"
    return subject.put, (subject.write(*step.write),)


class _Counted(Iterator[T]):
    """An iterator that counts what was taken, and that threads may share: a generator can't be entered by two."""

    def __init__(self, inner: Iterator[T]) -> None:
        self._inner = inner
        self._lock = threading.Lock()
        self.taken = 0

    def __next__(self) -> T:
        with self._lock:
            taken = next(self._inner)
            self.taken += 1
        return taken


async def _run(subject: Subject, calls: Iterator[Call], callers: int, seconds: float) -> list[float]:
    """Latencies of the calls that `callers` callers did until the time was over, or the calls were."""
    latencies: list[float] = []
    if subject.blocking:
        if callers == 1:
            _call_blocking(calls, latencies, time.perf_counter() + seconds)
        else:
            _in_threads(calls, callers, latencies, seconds)
        return latencies
    deadline = time.perf_counter() + seconds
    await asyncio.gather(*(_call_async(calls, latencies, deadline) for _ in range(callers)))
    return latencies


async def _call_async(calls: Iterator[Call], latencies: list[float], deadline: float) -> None:
    clock, note = time.perf_counter, latencies.append
    for method, arguments in calls:
        began = clock()
        await method(*arguments)
        ended = clock()
        note(ended - began)
        if ended >= deadline:
            return


def _call_blocking(calls: Iterator[Call], latencies: list[float], deadline: float) -> None:
    clock, note = time.perf_counter, latencies.append
    for method, arguments in calls:
        began = clock()
        method(*arguments)
        ended = clock()
        note(ended - began)
        if ended >= deadline:
            return


def _in_threads(calls: Iterator[Call], callers: int, latencies: list[float], seconds: float) -> None:
    failed: list[BaseException] = []
    deadline = time.perf_counter() + seconds

    def caller() -> None:
        try:
            _call_blocking(calls, latencies, deadline)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=caller) for _ in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


# ---------------------------------------------------------------- before and beside the slices


async def done(answer: Awaitable[T] | T, subject: Subject) -> T:
    """What a method of the subject gives, however it gives it."""
    return answer if subject.blocking else await answer  # type: ignore[misc,return-value]


async def load(
    subject: Subject,
    data: Dataset,
    *,
    per_call: int = 2_000,
    in_flight: int = 2,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> float:
    """Write every item of `data`; seconds that took. Raises what calls raise."""
    batches = data.loads(per_call)
    written = 0
    began = time.perf_counter()

    async def writer() -> None:
        nonlocal written
        for batch in batches:
            await done(subject.put_many([subject.write(*item) for item in batch]), subject)
            written += len(batch)
            progress(written, len(data))

    await asyncio.gather(*(writer() for _ in range(1 if subject.blocking else in_flight)))
    return time.perf_counter() - began


async def check(subject: Subject, data: Dataset, rng: np.random.Generator, *, items: int | None = None) -> int:
    """Read items (None: all), singly too, and newest pages, and compare them; how many were wrong or missing."""
    picked = np.arange(len(data)) if items is None else rng.integers(len(data), size=items)
    wrong = 0
    for first in range(0, len(picked), 1_000):
        keys = [data.key(item) for item in picked[first : first + 1_000].tolist()]
        found = subject.values(await done(subject.get_many([subject.key(*key) for key in keys]), subject))
        wrong += sum(value != data.value(*key) for key, value in zip(keys, found, strict=True))
        wrong += sum(
            [subject.values(await done(subject.get(subject.key(*keys[0])), subject)) != [data.value(*keys[0])]]
        )
    return wrong


async def check_pages(subject: Subject, data: Dataset, rng: np.random.Generator, *, owners: int = 100) -> int:
    """Read newest pages of timelines that nobody has written to since they were loaded; how many are wrong."""
    names = [data.names[number] for number in rng.integers(data.owners, size=owners).tolist()]
    times = [data.base + at * data.step for at in reversed(range(data.per_owner))][:PAGE]
    expected = [[data.value(name, time) for time in times] for name in names]
    found = subject.page_values(await done(subject.pages(names, PAGE), subject))
    wrong = sum(a != b for a, b in zip(found, expected, strict=True))
    first = subject.page_values(await done(subject.page(names[0], PAGE), subject))
    return wrong + (first != expected[:1])
