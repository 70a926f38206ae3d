"""Random histories of one timeline: right ones, from a store that is simple enough to be believed, and spoilt ones.

The store takes requests into log entries one after the other, several writes to an entry if they are in flight at the
same time, and answers later. Some clients give up waiting: what they asked for is done later, or never.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import msgspec

from .history import (
    Arguments,
    Conflict,
    Done,
    Get,
    Item,
    Key,
    Operation,
    Page,
    ReadPage,
    Result,
    Seen,
    Unknown,
    Write,
    delete,
    put,
    wipe,
)


@dataclass
class _Request:
    operation: Operation
    result: Result | None = None
    given_up: bool = False


@dataclass
class SimpleStore:
    """One timeline: `items` by key with value and version; `told_share`: how often a result tells its version."""

    random: Random
    told_share: float = 1.0
    version: int = 0
    items: dict[Key, tuple[str, int]] = field(default_factory=dict)

    def take(self, requests: list[_Request]) -> None:
        """Carry out requests at one instant: the writes among them as one entry, then the looks."""
        writes = [request for request in requests if isinstance(request.operation.arguments, Write)]
        self.version += bool(writes)
        for request in writes:
            assert isinstance(request.operation.arguments, Write)
            self._apply(request.operation.arguments)
            request.result = Done(self._told())
        for request in requests:
            if isinstance(request.operation.arguments, Get | ReadPage):
                request.result = self._look(request.operation.arguments)

    def take_conditional(self, request: _Request) -> None:
        """Carry out a conditional write, alone in its entry, or find a conflict."""
        arguments = request.operation.arguments
        assert isinstance(arguments, Write)
        if arguments.if_version == self.version:
            self.take([request])
        else:
            request.result = Conflict(self._told())

    def _apply(self, write: Write) -> None:
        for mutation in write.mutations:
            if mutation.key is None:
                self.items = {}
            elif mutation.action == "put":
                self.items = {**self.items, mutation.key: (mutation.value, self.version)}
            else:
                self.items = {key: row for key, row in self.items.items() if key != mutation.key}

    def _look(self, asked: Get | ReadPage) -> Result:
        if isinstance(asked, Get):
            row = self.items.get(asked.key)
            return Item(self._seen(asked.key) if row is not None else None, self._told())
        keys = sorted((key for key in self.items if asked.before is None or key < asked.before), reverse=True)
        page = tuple(self._seen(key) for key in keys[: asked.limit])
        return Page(page, len(keys) > asked.limit, self._told())

    def _seen(self, key: Key) -> Seen:
        value, version = self.items[key]
        return Seen(key, value, version if self.random.random() < self.told_share else None)

    def _told(self) -> int | None:
        return self.version if self.random.random() < self.told_share else None


def good_history(
    random: Random,
    count: int,
    *,
    clients: int = 4,
    keys: int = 4,
    give_up_share: float = 0.05,
    told_share: float = 1.0,
) -> list[Operation]:
    """A history that is linearizable because one store made it, in one order. Ends when nobody waits any more."""
    store = SimpleStore(random, told_share)
    open_requests: list[_Request] = []
    made: list[Operation] = []
    lives = [0] * clients  # who gave up comes back under another name
    instant = 0
    while len(made) < count or any(not request.given_up for request in open_requests):
        instant += 1
        turn = random.random()
        busy = {request.operation.client for request in open_requests}
        idle = [name for name in (f"c{n}.{lives[n]}" for n in range(clients)) if name not in busy]
        if turn < 0.4 and idle and len(made) < count:
            kind, arguments = _random_arguments(random, len(made), keys, store.version)
            name = random.choice(idle)
            made.append(Operation(name, "t", kind, arguments, None, float(instant), None, len(made)))
            open_requests.append(_Request(made[-1]))
        elif turn < 0.7:
            _carry_out(random, store, [request for request in open_requests if request.result is None])
        elif open_requests:
            request = random.choice(open_requests)
            if not request.given_up and random.random() < give_up_share:
                request.given_up = True
                request.operation.result = Unknown()
                number, life = request.operation.client[1:].split(".")
                lives[int(number)] = int(life) + 1
            elif request.result is not None:
                open_requests.remove(request)
                if not request.given_up:
                    request.operation.result = request.result
                    request.operation.returned_at = float(instant)
    return made


def _random_arguments(random: Random, number: int, keys: int, version: int) -> tuple[str, Arguments]:
    """Something to ask for; values are unique."""
    key: Key = (random.randrange(keys), "")
    turn = random.random()
    if turn < 0.3:
        condition = max(version - random.randrange(2), 0) if random.random() < 0.25 else None
        return "put", Write((put(key[0], f"v{number}"),), condition)
    if turn < 0.4:
        chosen = random.sample(range(keys), min(2, keys))
        return "put_many", Write(tuple(put(place, f"v{number}") for place in chosen))
    if turn < 0.5:
        return "delete", Write((delete(key[0]),))
    if turn < 0.53:
        return "delete_timeline", Write((wipe(),))
    if turn < 0.75:
        return "get", Get(key)
    before = None if random.random() < 0.6 else key
    return "page", ReadPage(before, random.randint(1, keys))


def _carry_out(random: Random, store: SimpleStore, waiting: list[_Request]) -> None:
    """Carry out some of what waits, at one instant."""
    if not waiting:
        return
    chosen = random.sample(waiting, random.randint(1, min(len(waiting), 3)))
    conditional = [
        request
        for request in chosen
        if isinstance(request.operation.arguments, Write) and request.operation.arguments.if_version is not None
    ]
    if conditional:
        store.take_conditional(conditional[0])
    else:
        store.take(chosen)


def spoilt(random: Random, history: list[Operation]) -> list[Operation]:
    """The history with one result changed at random; it may happen to be right all the same."""
    changed = [msgspec.structs.replace(operation) for operation in history]
    told = [operation for operation in changed if not operation.is_unknown]
    values = [m.value for op in changed if isinstance(op.arguments, Write) for m in op.arguments.mutations if m.value]
    if not told:
        return changed
    operation = random.choice(told)
    result = operation.result
    if isinstance(result, Item):
        value = random.choice(values) if values else "nobody's"
        item = None if result.item is not None and random.random() < 0.5 else _some_item(operation, value)
        operation.result = Item(item, result.version)
    elif isinstance(result, Page) and result.items and random.random() < 0.7:
        place = random.randrange(len(result.items))
        operation.result = Page(result.items[:place] + result.items[place + 1 :], result.more, result.version)
    elif isinstance(result, (Done, Conflict, Page)):
        version = random.choice([None, max((result.version or 0) + random.choice([-1, 1]), 0)])
        operation.result = msgspec.structs.replace(result, version=version)
    return changed


def _some_item(operation: Operation, value: str) -> Seen:
    assert isinstance(operation.arguments, Get)
    return Seen(operation.arguments.key, value)
