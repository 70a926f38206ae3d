"""What the clients of a chaos run do: a mix of writes and reads, each of them taken down in the history.

Timelines come in generations: while one is young it is written and read a lot (a few *hot* timelines take half of it,
so that writers of different processes meet), later it is read now and then, also where the sink has been. So each
timeline's history stays small enough to be checked, however long the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from timetier import AsyncTable, OutcomeUnknown, Rejected, TimeTierError, Unavailable, VersionConflict, WriteManyError
from timetier import Item as StoredItem
from timetier import Page as StoredPage

from ..simulation.history import (
    Arguments,
    Conflict,
    Done,
    Get,
    Item,
    Operation,
    Page,
    ReadPage,
    Recorder,
    Refused,
    Result,
    Seen,
    Unknown,
    Write,
    delete,
    put,
    text_of,
    wipe,
)

TABLE = "chaos"
GENERATION_S = 12.0
HOT, MILD = 2, 16  # timelines of a generation
TIMESTAMPS = 40
SINK_BEFORE = 20  # the older half of the timestamps is what sinks
IDS = (b"", b"x")
PAGE = 15
ALL = 10_000  # items of a page that is a whole timeline

READ, WRITE = "read", "write"
_MIX = (
    ("put", 24),
    ("put_many", 6),
    ("put_if", 6),
    ("delete", 3),
    ("wipe", 0.3),
    ("get", 26),
    ("page", 24),
    ("older", 10),
    ("pages", 3),
)


@dataclass(slots=True)
class Timing:
    """When a call of the client began and ended (monotonic seconds), and how: "ok" or the name of the error."""

    kind: str
    access: str
    called_at: float
    ended_at: float
    outcome: str


class Workload:
    """Operations of one client process on a table. `started_at`: of the run, for all processes (monotonic)."""

    def __init__(
        self,
        table: AsyncTable,
        recorder: Recorder,
        client: str,
        random: Random,
        started_at: float,
        done: Callable[[Timing], None],
    ) -> None:
        """`done` is told of each call that has ended."""
        self._table = table
        self._recorder = recorder
        self._client = client
        self._random = random
        self._started_at = started_at
        self._done = done
        self._written = 0
        self._versions: dict[str, int] = {}

    async def one(self) -> None:
        """One operation, drawn by chance."""
        (name,) = self._random.choices([name for name, _ in _MIX], [weight for _, weight in _MIX])
        await getattr(self, f"_{name}")()

    async def read_all(self, owners: Sequence[str]) -> None:
        """Read timelines from end to end."""
        for owner in owners:
            await self._page_of(owner, None, ALL)

    # ------------------------------------------------------------ writes

    async def _put(self) -> None:
        owner, (timestamp, item_id), value = self._owner(), self._key(), self._value()
        arguments = Write((put(timestamp, value, item_id),))
        await self._write(owner, "put", arguments, self._table.put(owner, timestamp, value, id=item_id))

    async def _put_if(self) -> None:
        owner, (timestamp, item_id), value = self._owner(), self._key(), self._value()
        version = self._versions.get(owner, 0)
        arguments = Write((put(timestamp, value, item_id),), version)
        call = self._table.put(owner, timestamp, value, id=item_id, if_version=version)
        await self._write(owner, "put_if", arguments, call)

    async def _delete(self) -> None:
        owner, (timestamp, item_id) = self._owner(), self._key()
        arguments = Write((delete(timestamp, item_id),))
        await self._write(owner, "delete", arguments, self._table.delete(owner, timestamp, id=item_id))

    async def _wipe(self) -> None:
        owner = self._owner()
        await self._write(owner, "wipe", Write((wipe(),)), self._table.delete_timeline(owner))

    async def _put_many(self) -> None:
        """Several items in one or two timelines; those of one timeline are written together."""
        owners = list({self._owner(), self._owner()})
        items = {
            owner: {self._key(): self._value() for _ in range(self._random.randint(1, 4))} for owner in sorted(owners)
        }
        flat = [(owner, key[0], value, key[1]) for owner, each in items.items() for key, value in each.items()]
        operations = [
            self._call(owner, "put_many", Write(tuple(put(key[0], value, key[1]) for key, value in each.items())))
            for owner, each in items.items()
        ]
        began = time.monotonic()
        outcome = "ok"
        try:
            results: Sequence[int | TimeTierError] = await self._table.put_many(flat)
        except WriteManyError as error:
            results = error.results
            outcome = next(type(each).__name__ for each in results if isinstance(each, TimeTierError))
        except Exception as error:  # whatever it is: it is reported, and the run goes on
            results = [error if isinstance(error, TimeTierError) else OutcomeUnknown(repr(error))] * len(flat)
            outcome = type(error).__name__
        place = 0
        for operation, (owner, each) in zip(operations, items.items(), strict=True):
            found = results[place]
            place += len(each)
            if isinstance(found, TimeTierError):
                self._recorder.returned(operation, _failed_write(found))
            else:
                self._saw(owner, found)
                self._recorder.returned(operation, Done(found))
        self._done(Timing("put_many", WRITE, began, time.monotonic(), outcome))

    async def _write(self, owner: str, kind: str, arguments: Write, call: Coroutine[Any, Any, int]) -> None:
        operation = self._call(owner, kind, arguments)
        began = time.monotonic()
        outcome = "ok"
        result: Result
        try:
            version = await call
            self._saw(owner, version)
            result = Done(version)
        except VersionConflict as error:
            self._saw(owner, error.version)
            # A right answer. Its version is one that the timeline has reached, not always the present one: a replica
            # that is behind can tell that a condition is older still. The one that was wanted makes no sense.
            result = Conflict(error.version if error.version == arguments.if_version else None)
        except Exception as error:  # whatever it is: it is reported, and the run goes on
            outcome, result = type(error).__name__, _failed_write(error)
        self._recorder.returned(operation, result)
        self._done(Timing(kind, WRITE, began, time.monotonic(), outcome))

    # ------------------------------------------------------------ reads

    async def _get(self) -> None:
        owner, (timestamp, item_id) = self._owner(), self._key()
        operation = self._call(owner, "get", Get((timestamp, text_of(item_id))))

        async def read() -> list[Result]:
            item = await self._table.get(owner, timestamp, id=item_id)
            return [Item(None if item is None else _seen(item))]

        await self._read("get", [operation], read)

    async def _page(self) -> None:
        await self._page_of(self._owner(), None, PAGE)

    async def _older(self) -> None:
        await self._page_of(self._owner(), self._random.randrange(5, TIMESTAMPS), PAGE)

    async def _pages(self) -> None:
        """The newest pages of several timelines by one call; each is of its own instant."""
        owners = sorted({self._owner() for _ in range(3)})
        operations = [self._call(owner, "pages", ReadPage(None, PAGE)) for owner in owners]

        async def read() -> list[Result]:
            pages = await self._table.timelines(owners, limit=PAGE)
            return [self._page_result(owner, page) for owner, page in zip(owners, pages, strict=True)]

        await self._read("pages", operations, read)

    async def _page_of(self, owner: str, before: int | None, limit: int) -> None:
        kind = "page" if before is None else "older"
        operation = self._call(owner, kind, ReadPage(None if before is None else (before, ""), limit))

        async def read() -> list[Result]:
            return [self._page_result(owner, await self._table.timeline(owner, limit=limit, before=before))]

        await self._read(kind, [operation], read)

    def _page_result(self, owner: str, page: StoredPage) -> Page:
        self._saw(owner, page.version)
        return Page(tuple(map(_seen, page.items)), page.next is not None, page.version)

    async def _read(
        self, kind: str, operations: list[Operation], read: Callable[[], Coroutine[Any, Any, list[Result]]]
    ) -> None:
        began = time.monotonic()
        outcome = "ok"
        results: list[Result]
        try:
            results = await read()
        except Exception as error:  # whatever it is: it is reported, and the run goes on
            outcome, results = type(error).__name__, [Refused()] * len(operations)
        for operation, result in zip(operations, results, strict=True):
            self._recorder.returned(operation, result)
        self._done(Timing(kind, READ, began, time.monotonic(), outcome))

    # ------------------------------------------------------------ chances

    def _call(self, owner: str, kind: str, arguments: Arguments) -> Operation:
        return self._recorder.call(self._client, owner, kind, arguments)

    def _saw(self, owner: str, version: int) -> None:
        self._versions[owner] = max(version, self._versions.get(owner, 0))

    def _owner(self) -> str:
        """Mostly of this generation; one of ten of an earlier one."""
        generation = int((time.monotonic() - self._started_at) / GENERATION_S)
        if generation and self._random.random() < 0.1:
            generation = self._random.randrange(generation)
        if self._random.random() < 0.5:
            return f"hot-{generation}-{self._random.randrange(HOT)}"
        return f"mild-{generation}-{self._random.randrange(MILD)}"

    def _key(self) -> tuple[int, bytes]:
        return self._random.randrange(TIMESTAMPS), self._random.choice(IDS)

    def _value(self) -> bytes:
        """No two writes have the same one."""
        self._written += 1
        return f"{self._client}:{self._written}".encode()


def _failed_write(error: Exception) -> Result:
    """What an error says of a write: surely not applied, or unknown."""
    return Refused() if isinstance(error, Unavailable | Rejected) else Unknown()


def _seen(item: StoredItem) -> Seen:
    return Seen((item.timestamp, text_of(item.id)), text_of(item.value), item.version)
