"""The few operations that show why a history is not linearizable, and a picture of them.

Only steps that keep the proof are taken, so that nothing that is left is wrong because of what was taken away:

- what was called after some instant is cut off, and what was in flight then becomes unknown;
- looks go, since a good history stays good without them;
- all items but one or two go, from writes and from pages; versions may have gaps then;
- a write goes that another one had overwritten before anybody that is left looked;
- operations before an instant at which nothing was in flight become the one state in which they end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

import msgspec

from .history import (
    Conflict,
    Done,
    Expire,
    Get,
    Item,
    Key,
    Operation,
    Page,
    ReadPage,
    Refused,
    Unknown,
    Write,
)
from .linearizability import ends, linearizable
from .plain_timeline import CLOSED, EMPTY, State, told_version

EFFORT = 20_000  # configurations to look at for one try at a smaller witness
TRIES = 300  # pairs of items that are tried
SHOWN = 40  # operations in a picture


def find_witness(operations: Sequence[Operation], *, effort: int = EFFORT) -> str:
    """A picture of a small part of one timeline's history that is not linearizable by itself."""
    operations = _first_bad_prefix(operations, effort)
    for keys in _choices_of_keys(operations):
        projected = [part for operation in operations if (part := _project(operation, keys)) is not None]
        if _is_bad(projected, gaps=True):
            shrunk = _shrink(projected, gaps=True)
            names = " and ".join(_show_key(key) for key in keys)
            note = f"of item {names}" if keys else "by versions alone"
            return f"no order of these explains their results ({note}; other writes may lie between):\n" + draw(shrunk)
    start, operations = _cut_start(operations)
    shrunk = _shrink(operations, start=start)
    return f"no order of these explains their results; before them: {show_state(start)}\n" + draw(shrunk)


def _is_bad(operations: Sequence[Operation], *, gaps: bool = False, start: State = EMPTY, effort: int = EFFORT) -> bool:
    return linearizable(operations, gaps=gaps, start=start, effort=effort) is False


def _first_bad_prefix(operations: Sequence[Operation], effort: int) -> list[Operation]:
    """What was called before the first return at which the history was beyond saving."""
    returns = sorted({op.returned_at for op in operations if op.returned_at is not None})
    low, high = 0, len(returns) - 1
    while low < high:
        middle = (low + high) // 2
        if _is_bad(_until(operations, returns[middle]), effort=effort):
            high = middle
        else:
            low = middle + 1
    return _until(operations, returns[high])


def _until(operations: Sequence[Operation], instant: float) -> list[Operation]:
    """The history up to an instant; a read in flight then is left out, a write is unknown."""
    kept: list[Operation] = []
    for operation in sorted(operations, key=lambda op: op.called_at):
        if operation.called_at > instant or isinstance(operation.result, Refused):
            continue
        if operation.returned_at is not None and operation.returned_at <= instant:
            kept.append(operation)
        elif isinstance(operation.arguments, Write | Expire) and not isinstance(operation.result, Conflict):
            kept.append(msgspec.structs.replace(operation, result=Unknown(), returned_at=None))
    return kept


def _choices_of_keys(operations: Sequence[Operation]) -> Iterator[tuple[Key, ...]]:
    """No item at all (versions tell enough, or not), then each item, then pairs of them."""
    keys: set[Key] = set()
    for operation in operations:
        if isinstance(operation.arguments, Write):
            keys.update(mutation.key for mutation in operation.arguments.mutations if mutation.key is not None)
        elif isinstance(operation.arguments, Get):
            keys.add(operation.arguments.key)
        elif isinstance(operation.result, Page):
            keys.update(seen.key for seen in operation.result.items)
    yield ()
    for key in sorted(keys):
        yield (key,)
    for pair, _ in zip(combinations(sorted(keys), 2), range(TRIES), strict=False):
        yield pair


def _project(operation: Operation, keys: tuple[Key, ...]) -> Operation | None:
    """An operation as far as it is about some items; None if it tells nothing then."""
    arguments, result = operation.arguments, operation.result
    told = told_version(operation) is not None
    if isinstance(arguments, Expire):
        return operation
    if isinstance(arguments, Write):
        mutations = tuple(m for m in arguments.mutations if m.key is None or m.key in keys)
        if not mutations and not told:
            return None
        return msgspec.structs.replace(operation, arguments=msgspec.structs.replace(arguments, mutations=mutations))
    if isinstance(arguments, Get):
        if arguments.key in keys:
            return operation
        empty = ReadPage(arguments.key, 0, arguments.key)
        looked = Page((), False, told_version(operation))
        return msgspec.structs.replace(operation, arguments=empty, result=looked) if told else None
    if not isinstance(result, Page):
        return None
    down_to = result.items[-1].key if result.more and result.items else None
    covered = [
        key
        for key in keys
        if (down_to is None or key >= down_to) and (arguments.before is None or key < arguments.before)
    ]
    if not covered and not told:
        return None
    # A bound below every key stands for "all the rest".
    asked = ReadPage(arguments.before, arguments.limit, down_to or (-(1 << 63), ""))
    seen = tuple(seen for seen in result.items if seen.key in keys)
    return msgspec.structs.replace(operation, arguments=asked, result=Page(seen, result.more, result.version))


def _shrink(operations: Sequence[Operation], *, gaps: bool = False, start: State = EMPTY) -> list[Operation]:
    """Take operations away, the latest first, as long as what is left is bad and proves as much."""
    kept = list(operations)
    removed = True
    while removed:
        removed = False
        for operation in reversed(list(kept)):
            rest = [op for op in kept if op is not operation]
            hidden = gaps and isinstance(operation.arguments, Write) and _is_hidden(operation, rest)
            free = not operation.is_write or hidden
            if free and _is_bad(rest, gaps=gaps, start=start):
                kept, removed = rest, True
    return kept


def _is_hidden(write: Operation, rest: Sequence[Operation]) -> bool:
    """Whether nobody in `rest` can have seen what a write changed: each look came after a later write of the same.

    Sound only if versions may have gaps.
    """
    assert isinstance(write.arguments, Write)
    if any(mutation.action == "put" and _is_seen(mutation.value, rest) for mutation in write.arguments.mutations):
        return False  # it may go, but a reader wants to know where a value is from
    if write.is_unknown or write.returned_at is None:
        return not write.arguments.mutations
    return all(_is_overwritten(write.returned_at, mutation.key, rest) for mutation in write.arguments.mutations)


def _is_overwritten(returned_at: float, key: Key | None, rest: Sequence[Operation]) -> bool:
    """Whether each operation that may see an item was called after a write of it that came after `returned_at`."""
    overwritten_at = min(
        (
            other.returned_at
            for other in rest
            if isinstance(other.arguments, Write)
            and isinstance(other.result, Done)
            and other.called_at > returned_at
            and other.returned_at is not None
            and any(mutation.key is None or mutation.key == key for mutation in other.arguments.mutations)
        ),
        default=None,
    )
    if key is None:
        return False  # a wipe hides all items, and they may have been overwritten at different times
    return overwritten_at is not None and all(
        other.called_at > overwritten_at or not _may_see(other, key) for other in rest
    )


def _is_seen(value: str, rest: Sequence[Operation]) -> bool:
    for operation in rest:
        result = operation.result
        if isinstance(result, Item) and result.item is not None and result.item.value == value:
            return True
        if isinstance(result, Page) and any(seen.value == value for seen in result.items):
            return True
    return False


def _may_see(operation: Operation, key: Key) -> bool:
    if isinstance(operation.arguments, Get):
        return operation.arguments.key == key
    return isinstance(operation.arguments, ReadPage)


def _cut_start(operations: Sequence[Operation]) -> tuple[State, list[Operation]]:
    """Replace as many operations as possible at the start by the one state in which they end."""
    ordered = sorted(operations, key=lambda op: op.called_at)
    for place in range(len(ordered) - 1, 0, -1):
        before, after = ordered[:place], ordered[place:]
        if any(op.returned_at is not None and op.returned_at >= after[0].called_at for op in before):
            continue
        found = ends(before, effort=EFFORT)
        if found is not None and len(found) == 1:
            (state, left), *_ = found
            state = state._replace(open_until=CLOSED)
            rest = [before[index] for index in left] + after
            if _is_bad(rest, start=state):
                return state, rest
    return EMPTY, ordered


# ---- pictures


def draw(operations: Sequence[Operation]) -> str:
    """A line per operation, in order of their calls: client, when it was open, what it asked and got.

    Time runs to the right, a column for each instant at which something was called (`[`) or returned (`]`).
    """
    ordered = sorted(operations, key=lambda op: op.called_at)
    left_out = max(len(ordered) - SHOWN, 0)
    ordered = ordered[left_out:]
    instants = sorted({op.called_at for op in ordered} | {op.returned_at for op in ordered if op.returned_at})
    column = {instant: place for place, instant in enumerate(instants)}
    width = max((len(op.client) for op in ordered), default=0)
    lines = [f"  ({left_out} earlier operations are not shown)"] if left_out else []
    for op in ordered:
        low = column[op.called_at]
        high = len(instants) if op.returned_at is None else column[op.returned_at]
        bar = " " * low + "[" + "-" * (high - low - 1) + (">" if op.returned_at is None else "]" if high > low else "")
        lines.append(f"  {op.client:{width}} {bar:{len(instants) + 1}} {show_operation(op)}")
    return "\n".join(lines)


def show_operation(operation: Operation) -> str:
    """An operation and its result in words."""
    return f"{_show_arguments(operation)} -> {_show_result(operation)}"


def show_state(state: State) -> str:
    """Version and items of a timeline, newest first."""
    rows = ", ".join(f"{_show_key(row.key)}={row.value!r}" for row in reversed(state.rows))
    return f"version {state.version}, " + (rows or "no item")


def _show_key(key: Key) -> str:
    return f"{key[0]}:{key[1]}" if key[1] else str(key[0])


def _show_arguments(operation: Operation) -> str:
    arguments = operation.arguments
    if isinstance(arguments, Get):
        return f"{operation.kind} {_show_key(arguments.key)}"
    if isinstance(arguments, Expire):
        return f"{operation.kind} before {arguments.before}"
    if isinstance(arguments, ReadPage):
        below = f" before {_show_key(arguments.before)}" if arguments.before is not None else ""
        return f"{operation.kind}{below}, limit {arguments.limit}"
    changes = ", ".join(
        mutation.action
        if mutation.key is None
        else f"{_show_key(mutation.key)}={mutation.value!r}"
        if mutation.action == "put"
        else f"-{_show_key(mutation.key)}"
        for mutation in arguments.mutations
    )
    condition = f" if version {arguments.if_version}" if arguments.if_version is not None else ""
    return f"{operation.kind} {changes or 'of other items'}{condition}"


def _show_result(operation: Operation) -> str:
    result = operation.result
    version = told_version(operation)
    at = f" at version {version}" if version is not None else ""
    if isinstance(result, Item):
        return (_show_seen(result.item.key, result.item.value, result.item.version) if result.item else "nothing") + at
    if isinstance(result, Page):
        items = ", ".join(_show_seen(seen.key, seen.value, seen.version) for seen in result.items)
        return f"[{items}{' ...' if result.more else ''}]{at}"
    if isinstance(result, Done):
        return f"done{at}"
    if isinstance(result, Conflict):
        return f"conflict{at}"
    return "refused" if isinstance(result, Refused) else "unknown"


def _show_seen(key: Key, value: str, version: int | None) -> str:
    return f"{_show_key(key)}={value!r}" + (f" (of {version})" if version is not None else "")
