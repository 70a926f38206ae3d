"""The plain timeline that a history is compared with: what each operation may answer, one after the other.

It is a map of items and a version, which each log entry raises by one. Several writes may share an entry and so a
version: those that overlap, since an entry is chosen at one instant. Nobody may see the timeline between two of them,
so a look *closes* the entry. A conditional write is alone in its entry. A missing version is not looked at.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

from .history import Conflict, Done, Expire, Get, Item, Key, Operation, Page, ReadPage, Seen, Write

NEVER = float("inf")
CLOSED = -NEVER


class Row(NamedTuple):
    """An item of the plain timeline. `version` None: not known, fits any."""

    key: Key
    value: str
    version: int | None


class State(NamedTuple):
    """The plain timeline: rows in ascending order of their keys.

    `open_until`: a write that was called later can't be in the last entry, since one of the entry had returned then.
    `horizon`: items with an older timestamp have expired.
    """

    version: int = 0
    open_until: float = CLOSED
    rows: tuple[Row, ...] = ()
    horizon: float = -NEVER


EMPTY = State()


def told_version(operation: Operation) -> int | None:
    """Version of the timeline that a result tells, None if it tells none."""
    result = operation.result
    return result.version if isinstance(result, (Done, Conflict, Item, Page)) else None


def tells_versions(operation: Operation) -> bool:
    """Whether an operation or its result names any version."""
    if isinstance(operation.arguments, Write) and operation.arguments.if_version is not None:
        return True
    result = operation.result
    seen = result.items if isinstance(result, Page) else (result.item,) if isinstance(result, Item) else ()
    return told_version(operation) is not None or any(item is not None and item.version is not None for item in seen)


def after(state: State, operation: Operation, gaps: bool = False) -> list[State]:
    """States in which the plain timeline can be after an operation with this result; none if it can't be right."""
    arguments, result = operation.arguments, operation.result
    if isinstance(arguments, Expire):
        horizon = max(state.horizon, arguments.before)
        return [state._replace(rows=tuple(row for row in state.rows if row.key[0] >= horizon), horizon=horizon)]
    if isinstance(arguments, Write) and not isinstance(result, Conflict):
        return _after_write(state, operation, arguments, gaps)
    looked = _look(state, told_version(operation), gaps)
    if looked is None:
        return []
    if isinstance(arguments, Write):
        fits = arguments.if_version is not None and arguments.if_version != looked.version
    elif isinstance(arguments, Get):
        fits = isinstance(result, Item) and _has_item(looked.rows, arguments.key, result)
    else:
        fits = isinstance(result, Page) and _has_page(looked.rows, arguments, result)
    return [looked] if fits else []


def _look(state: State, version: int | None, gaps: bool) -> State | None:
    """The state that a look finds, which nobody may join any more; None if it can't be at that version."""
    if version is None or version == state.version:
        return state._replace(open_until=CLOSED)
    if gaps and version > state.version:
        return state._replace(version=version, open_until=CLOSED)
    return None


def _after_write(state: State, operation: Operation, write: Write, gaps: bool) -> list[State]:
    version = told_version(operation)
    until = NEVER if operation.returned_at is None or operation.is_unknown else operation.returned_at
    claim = version if version is not None or gaps else state.version + 1
    states: list[State] = []
    if write.if_version is not None:
        reachable = state.version == write.if_version or (gaps and state.version < write.if_version)
        if reachable and version in (None, write.if_version + 1):
            states.append(_apply(state, write, write.if_version + 1, CLOSED, write.if_version + 1))
        return states
    if version in (None, state.version + 1) or (gaps and version is not None and version > state.version):
        states.append(_apply(state, write, version or state.version + 1, until, claim))
    if operation.called_at <= state.open_until and version in (None, state.version):
        claim = version if gaps else state.version
        states.append(_apply(state, write, state.version, min(until, state.open_until), claim))
    return states


def _apply(state: State, write: Write, version: int, open_until: float, claim: int | None) -> State:
    """The state after a write, at `version`. `claim`: version of its rows, None if `version` is but the least it is."""
    changed = {row.key: row for row in state.rows}
    for mutation in write.mutations:
        if mutation.key is None:
            changed.clear()
        elif mutation.action == "put" and mutation.key[0] >= state.horizon:
            changed[mutation.key] = Row(mutation.key, mutation.value, claim)
        else:
            changed.pop(mutation.key, None)
    return State(version, open_until, tuple(sorted(changed.values(), key=lambda row: row.key)), state.horizon)


def _has_item(rows: tuple[Row, ...], key: Key, result: Item) -> bool:
    position = bisect_left(rows, key, key=lambda row: row.key)
    row = rows[position] if position < len(rows) and rows[position].key == key else None
    return row is None if result.item is None else row is not None and _same(row, result.item)


def _has_page(rows: tuple[Row, ...], asked: ReadPage, page: Page) -> bool:
    """Whether a page is the newest items before its bound, without a gap; all of them, or down to its last one."""
    high = len(rows) if asked.before is None else bisect_left(rows, asked.before, key=lambda row: row.key)
    low = high - len(page.items)
    if asked.down_to is not None:
        complete = low == bisect_left(rows, asked.down_to, key=lambda row: row.key)
    else:
        complete = low == 0 or (low > 0 and page.more)
    return (
        complete
        and len(page.items) <= asked.limit
        and all(_same(row, seen) for row, seen in zip(reversed(rows[low:high]), page.items, strict=True))
    )


def _same(row: Row, seen: Seen) -> bool:
    versions_fit = row.version is None or seen.version is None or row.version == seen.version
    return row.key == seen.key and row.value == seen.value and versions_fit
