"""A table that takes down what it is asked and what it answers, for the linearizability checker."""

from __future__ import annotations

from collections.abc import Awaitable, Iterable, Sequence
from typing import TypeVar

from timetier.cluster.client import items as shapes
from timetier.cluster.client.store import AsyncTable
from timetier.cluster.errors import (
    InvalidRequest,
    TimeTierError,
    TooLarge,
    Unavailable,
    VersionConflict,
    WriteManyError,
)
from timetier.cluster.keys import decode_token, split_item_key

from .history import (
    Arguments,
    Conflict,
    Done,
    Get,
    Item,
    Mutation,
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
    key_of,
    put,
    text_of,
    wipe,
)

T = TypeVar("T")

SURELY_NOT_APPLIED = (Unavailable, InvalidRequest, TooLarge)


class RecordedTable:
    """The calls of an `AsyncTable`, each noted in a `Recorder` under the name of one client.

    Results and errors are those of the table. A call that ends in any other way than by a result or by an error
    that says "surely not applied" is noted as unknown, a cancelled one too. Owners and ids are `str` or `bytes`.
    """

    def __init__(self, table: AsyncTable, recorder: Recorder, client: str) -> None:
        self.table = table
        self.recorder = recorder
        self.client = client

    def timeline_of(self, owner: str | bytes) -> str:
        """Name of an owner's timeline in the history."""
        return f"{self.table.name}/{text_of(owner)}"

    async def put(
        self, owner: str, timestamp: int, value: bytes, *, id: bytes | str = b"", if_version: int | None = None
    ) -> int:
        """As `AsyncTable.put`."""
        operation = self._call(owner, "put", Write((put(timestamp, value, id),), if_version))
        return await self._one(operation, self.table.put(owner, timestamp, value, id=id, if_version=if_version))

    async def put_many(self, items: Sequence[shapes.Put]) -> list[int]:
        """As `AsyncTable.put_many`: one operation for each owner."""
        changes = [(item.owner, put(item.timestamp, item.value, item.id)) for item in items]
        return await self._many("put_many", changes, self.table.put_many(items))

    async def get(self, owner: str, timestamp: int, *, id: bytes | str = b"") -> shapes.Item | None:
        """As `AsyncTable.get`."""
        operation = self._call(owner, "get", Get(key_of(timestamp, id)))
        found = await self._read(operation, self.table.get(owner, timestamp, id=id))
        self.recorder.returned(operation, Item(_seen(found) if found is not None else None))
        return found

    async def timeline(self, owner: str, *, limit: int = 20, before: str | int | None = None) -> shapes.Page:
        """As `AsyncTable.timeline`."""
        operation = self._call(owner, "page", ReadPage(_bound(before), limit))
        page = await self._read(operation, self.table.timeline(owner, limit=limit, before=before))
        seen = tuple(_seen(item) for item in page.items)
        self.recorder.returned(operation, Page(seen, page.next is not None, page.version))
        return page

    async def delete(self, owner: str, timestamp: int, *, id: bytes | str = b"", if_version: int | None = None) -> int:
        """As `AsyncTable.delete`."""
        operation = self._call(owner, "delete", Write((delete(timestamp, id),), if_version))
        return await self._one(operation, self.table.delete(owner, timestamp, id=id, if_version=if_version))

    async def delete_many(self, keys: Sequence[shapes.ItemAddress]) -> list[int]:
        """As `AsyncTable.delete_many`: one operation for each owner."""
        changes = [(key.owner, delete(key.timestamp, key.id)) for key in keys]
        return await self._many("delete_many", changes, self.table.delete_many(keys))

    async def delete_timeline(self, owner: str, *, if_version: int | None = None) -> int:
        """As `AsyncTable.delete_timeline`."""
        operation = self._call(owner, "delete_timeline", Write((wipe(),), if_version))
        return await self._one(operation, self.table.delete_timeline(owner, if_version=if_version))

    def _call(self, owner: str | bytes, kind: str, arguments: Arguments) -> Operation:
        return self.recorder.call(self.client, self.timeline_of(owner), kind, arguments)

    async def _one(self, operation: Operation, call: Awaitable[int]) -> int:
        try:
            version = await call
        except BaseException as error:
            self.recorder.returned(operation, _result_of(error))
            raise
        self.recorder.returned(operation, Done(version))
        return version

    async def _many(
        self, kind: str, changes: Iterable[tuple[str | bytes, Mutation]], call: Awaitable[list[int]]
    ) -> list[int]:
        of_owner: dict[str | bytes, list[tuple[int, Mutation]]] = {}
        for place, (owner, mutation) in enumerate(changes):
            of_owner.setdefault(owner, []).append((place, mutation))
        operations = [
            (its[0][0], self._call(owner, kind, Write(tuple(mutation for _, mutation in its))))
            for owner, its in of_owner.items()
        ]
        try:
            versions = await call
        except WriteManyError as error:
            for place, operation in operations:
                outcome = error.results[place]
                result = _result_of(outcome) if isinstance(outcome, TimeTierError) else Done(outcome)
                self.recorder.returned(operation, result)
            raise
        except BaseException as error:
            for _, operation in operations:
                self.recorder.returned(operation, _result_of(error))
            raise
        for place, operation in operations:
            self.recorder.returned(operation, Done(versions[place]))
        return versions

    async def _read(self, operation: Operation, call: Awaitable[T]) -> T:
        try:
            return await call
        except BaseException:
            self.recorder.returned(operation, Refused())
            raise


def _result_of(error: BaseException) -> Result:
    if isinstance(error, VersionConflict):
        return Conflict(error.version)
    return Refused() if isinstance(error, SURELY_NOT_APPLIED) else Unknown()


def _seen(item: shapes.Item) -> Seen:
    return Seen(key_of(item.timestamp, item.id), text_of(item.value), item.version)


def _bound(before: str | int | None) -> tuple[int, str] | None:
    if before is None or isinstance(before, int):
        return None if before is None else (before, "")
    timestamp, item_id = split_item_key(decode_token(before))
    return key_of(timestamp, item_id)
