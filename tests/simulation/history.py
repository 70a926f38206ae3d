"""Histories: who asked for what and when, and what came back. Written as JSON lines, one file a process.

An operation is called at one instant and returns at another; somewhere between the two it must seem to have happened
at once (`linearizability.py` checks that). A write whose outcome is unknown may happen at any time after its call, or
never, so it has no `returned_at`. A write that was refused has surely not happened.

Times are seconds of one clock for all processes: `time.monotonic` on one machine, virtual time in a simulation.
Timelines are strings, item keys are `(timestamp, id)`. Ids and values are text: bytes as Latin-1, which keeps their
order and is easy to read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Literal

import msgspec

Key = tuple[int, str]


class Mutation(msgspec.Struct, frozen=True, array_like=True):
    """One change of a write. `key` is None for a wipe, `value` is empty for all but a put."""

    action: Literal["put", "delete", "wipe"]
    key: Key | None = None
    value: str = ""


class Seen(msgspec.Struct, frozen=True, array_like=True):
    """An item as a read saw it. `version`: of the timeline when the item was written, None if it was not told."""

    key: Key
    value: str
    version: int | None = None


# ---- what was asked for


class Write(msgspec.Struct, frozen=True, tag=True):
    """Mutations that happen together, in that order; with `if_version`, only at that version of the timeline."""

    mutations: tuple[Mutation, ...]
    if_version: int | None = None


class Get(msgspec.Struct, frozen=True, tag=True):
    """Read one item."""

    key: Key


class ReadPage(msgspec.Struct, frozen=True, tag=True):
    """Read the newest `limit` items that are strictly older than `before` (None: all are).

    `down_to`: and not older than this; only in witnesses, where most items are left out.
    """

    before: Key | None
    limit: int
    down_to: Key | None = None


class Expire(msgspec.Struct, frozen=True, tag=True):
    """Nobody sees items with a timestamp below `before` any more, also ones that are written later. No client does
    this: who knows when a retention horizon was chosen writes it down."""

    before: int


# ---- what came back


class Done(msgspec.Struct, frozen=True, tag=True):
    """A write was applied. `version`: of the timeline after it, None if it was not told."""

    version: int | None = None


class Conflict(msgspec.Struct, frozen=True, tag=True):
    """A conditional write met another version: `version`, if it was told."""

    version: int | None = None


class Unknown(msgspec.Struct, frozen=True, tag=True):
    """A write may have been applied, may still be, or never."""


class Refused(msgspec.Struct, frozen=True, tag=True):
    """A write was surely not applied, or a read has no answer."""


class Item(msgspec.Struct, frozen=True, tag=True):
    """Answer to `Get`: the item or None. `version`: of the timeline, if it was told."""

    item: Seen | None
    version: int | None = None


class Page(msgspec.Struct, frozen=True, tag=True):
    """Answer to `ReadPage`. `more`: there is a token to go on with; a page may hold fewer items than its limit then."""

    items: tuple[Seen, ...]
    more: bool
    version: int | None = None


Arguments = Write | Get | ReadPage | Expire
Result = Done | Conflict | Unknown | Refused | Item | Page


class Operation(msgspec.Struct):
    """One call of a client. `kind`: name for readers (`put_many`); `number`: tells the calls of one client apart.

    `result` None: in flight when the record ended, so unknown. `returned_at` None: may happen at any later time.
    """

    client: str
    timeline: str
    kind: str
    arguments: Arguments
    result: Result | None
    called_at: float
    returned_at: float | None
    number: int = 0

    @property
    def is_write(self) -> bool:
        """Whether it may change the timeline: a refused write and one that met a conflict may not."""
        return isinstance(self.arguments, Write | Expire) and not isinstance(self.result, (Conflict, Refused))

    @property
    def is_unknown(self) -> bool:
        """Whether its outcome is unknown: it may happen at any time after its call, or never."""
        return self.result is None or isinstance(self.result, Unknown)


def put(timestamp: int, value: str | bytes, item_id: str | bytes = "") -> Mutation:
    """Mutation that writes an item."""
    return Mutation("put", key_of(timestamp, item_id), text_of(value))


def delete(timestamp: int, item_id: str | bytes = "") -> Mutation:
    """Mutation that deletes an item."""
    return Mutation("delete", key_of(timestamp, item_id))


def wipe() -> Mutation:
    """Mutation that deletes all items of a timeline."""
    return Mutation("wipe")


def key_of(timestamp: int, item_id: str | bytes = "") -> Key:
    """Key of an item."""
    return (timestamp, text_of(item_id))


def text_of(value: str | bytes) -> str:
    """Bytes as text of the same order."""
    return value.decode("latin-1") if isinstance(value, bytes) else value


class Recorder:
    """Takes down operations as they happen, in memory and, if `path` is given, in a file as JSON lines.

    Times are made strictly increasing, so what happened one after the other in this process stays so although its
    clock stood still, as virtual clocks do. An operation is written when it is called and again when it returns: the
    calls of a process that was killed are not forgotten.
    """

    def __init__(self, clock: Callable[[], float], path: Path | None = None) -> None:
        self.operations: list[Operation] = []
        self._clock = clock
        self._last = -math.inf
        self._file: IO[bytes] | None = path.open("ab") if path is not None else None
        self._encoder = msgspec.json.Encoder()

    def call(self, client: str, timeline: str, kind: str, arguments: Arguments) -> Operation:
        """Note a call. Give the operation back to `returned` with its result."""
        operation = Operation(client, timeline, kind, arguments, None, self._now(), None, len(self.operations))
        self.operations.append(operation)
        self._write(operation)
        return operation

    def happened(self, client: str, timeline: str, kind: str, arguments: Arguments, since: float) -> None:
        """Note something that is known to have happened between `since` and now."""
        number = len(self.operations)
        self.operations.append(Operation(client, timeline, kind, arguments, Done(), since, self._now(), number))
        self._write(self.operations[-1])

    def returned(self, operation: Operation, result: Result) -> None:
        """Note what came back."""
        operation.result = result
        operation.returned_at = None if isinstance(result, Unknown) else self._now()
        self._write(operation)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _now(self) -> float:
        now = self._clock()
        self._last = now if now > self._last else math.nextafter(self._last, math.inf)
        return self._last

    def _write(self, operation: Operation) -> None:
        if self._file is not None:
            self._file.write(self._encoder.encode(operation) + b"\n")
            self._file.flush()  # to the operating system: a kill of this process loses nothing


def save_history(operations: Iterable[Operation], path: Path) -> None:
    """Write operations as JSON lines."""
    encoder = msgspec.json.Encoder()
    with path.open("wb") as file:
        for operation in operations:
            file.write(encoder.encode(operation) + b"\n")


def load_history(paths: Sequence[Path]) -> list[Operation]:
    """Merge the operations of several files, in order of their calls.

    Each file is of one process. Of two lines about one operation the later counts; a last line that was cut off by a
    kill is left out. Raises ValueError with file and line if another one can't be read.
    """
    decoder = msgspec.json.Decoder(Operation)
    merged: list[Operation] = []
    for path in paths:
        known: dict[tuple[str, int, float], Operation] = {}
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            if not line:
                continue
            try:
                operation = decoder.decode(line)
            except msgspec.DecodeError as error:
                if number == len(lines):
                    break  # no newline after it: the process was killed while it wrote
                raise ValueError(f"{path}:{number}: no operation: {error}") from None
            known[operation.client, operation.number, operation.called_at] = operation
        merged.extend(known.values())
    return sorted(merged, key=lambda operation: operation.called_at)
