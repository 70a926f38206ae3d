"""Block reads of a cache node: equal ones share a call, and all of them share one limit.

The limit is the node's, not a page's: however many pages reach into the cold tier at once, the cold nodes have a
bounded number of reads from here under way, and the others wait in line. What waits costs its node no time: a call's
own timeout begins with its turn. A read whose callers have all gone, or whose time is over, leaves the line, and its
call is given up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from ..carriers.base import Address, CallError, Carrier, Then, begin_task
from ..counters import Counters
from ..messages import BlockRead, Message

NO_TURN = "its turn among the block reads of this node did not come"
"""Reason of a failed call by which no node is to blame."""

_Place = tuple[str, str, int, int, bytes]


class _Shared:
    """One read that is under way, or in line. `callers`: who waits for it."""

    __slots__ = ("callers", "task", "turn")

    def __init__(self) -> None:
        self.callers = 0
        self.turn = asyncio.Event()
        self.task: asyncio.Task[Message]


class SharedBlockReads:
    """A carrier on which equal block reads of one moment share one call, and `most` of them are under way at a time."""

    def __init__(self, carrier: Carrier, *, most: int = 32, counters: Counters | None = None) -> None:
        """Counters: block_reads_waiting (in line, at present), block_reads_given_up (whose callers had gone)."""
        self._carrier = carrier
        self._counters = counters or Counters()
        self._turns = asyncio.Semaphore(most)
        self._under_way: dict[_Place, _Shared] = {}
        self._in_line = 0

    async def call(self, node: str, message: Message, timeout_s: float) -> Message:
        """Answer of `node`. Raises CallError when none came within `timeout_s` from the call's turn, or when that did
        not come within the message's own time."""
        if not isinstance(message, BlockRead):
            return await self._carrier.call(node, message, timeout_s)
        key = (node, message.file, message.offset, message.length, message.owner)
        shared = self._under_way.get(key)
        if shared is None:
            shared = self._under_way[key] = _Shared()
            shared.task = asyncio.create_task(self._read(shared, node, message, timeout_s))
            shared.task.add_done_callback(lambda done: self._forget(key, done))
        shared.callers += 1
        try:
            try:
                async with asyncio.timeout(message.timeout_ms / 1_000 or timeout_s):
                    await shared.turn.wait()
            except TimeoutError:
                raise CallError(NO_TURN, sent=False) from None
            try:
                async with asyncio.timeout(timeout_s):
                    return await asyncio.shield(shared.task)
            except TimeoutError:
                raise CallError(f"no block of {node} within {timeout_s:.3f} s", sent=True) from None
        finally:
            shared.callers -= 1
            if not shared.callers and not shared.task.done():
                self._counters.add("block_reads_given_up")
                shared.task.cancel()
                if self._under_way.get(key) is shared:  # whoever asks next must not join what is ending
                    del self._under_way[key]

    async def _read(self, shared: _Shared, node: str, message: BlockRead, timeout_s: float) -> Message:
        self._note_line(1)
        try:
            await self._turns.acquire()
        finally:
            self._note_line(-1)
            shared.turn.set()  # or there will be none
        try:
            return await self._carrier.call(node, message, timeout_s)
        finally:
            self._turns.release()

    def _note_line(self, change: int) -> None:
        self._in_line += change
        self._counters.set("block_reads_waiting", self._in_line)

    def _forget(self, key: _Place, task: asyncio.Task[Message]) -> None:
        if (shared := self._under_way.get(key)) is not None and shared.task is task:
            del self._under_way[key]
        if not task.cancelled():
            task.exception()  # whoever waited has it; if nobody did, it is no news

    def begin(self, node: str, message: Message, timeout_s: float, then: Then) -> None:
        """Begin a `call`."""
        if isinstance(message, BlockRead):
            begin_task(self.call(node, message, timeout_s), then)
        else:
            self._carrier.begin(node, message, timeout_s, then)

    def send(self, node: str, message: Message) -> bool:
        """Send one way."""
        return self._carrier.send(node, message)

    def update(self, addresses: Mapping[str, Address]) -> None:
        """Replace what is known of where nodes listen."""
        self._carrier.update(addresses)

    async def close(self) -> None:
        """Give up the reads under way. The carrier below belongs to whoever made it."""
        for shared in list(self._under_way.values()):
            shared.task.cancel()
