"""A network in memory for tests: the same frames, no sockets, and faults on demand."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import ProtocolError
from ..messages import Message, encode
from .base import Address, CallError, Handler, Then, answer_frame, begin_task, decode_answer

MAX_HELD = 10_000  # messages on one held link; further ones are lost


@dataclass(eq=False)
class _Exchange:
    """One frame on its way, and the way back of its answer (None for a one-way message)."""

    source: str
    target: str
    frame: bytes
    answer: asyncio.Future[Message] | None
    reply: bytes | None = None  # once the handler has answered

    def fail(self, reason: str) -> None:
        if self.answer is not None and not self.answer.done():
            self.answer.set_exception(CallError(reason, sent=True))


class MemoryNetwork:
    """Nodes by name, on one event loop. Every frame is encoded and decoded, as on a socket.

    Faults between two nodes act in both directions:
    `cut`   connections end: calls in flight fail at once (they may have been executed), further ones surely not sent
    `hold`  messages and answers are kept, in order, until `heal`: callers see their own deadline, nothing else
    `kill`  a node's handlers are cancelled, its calls in flight fail; it is back when it is registered again
    """

    def __init__(self) -> None:
        self._handlers: dict[str, Handler] = {}
        self._cut: set[frozenset[str]] = set()
        self._held: dict[frozenset[str], list[_Exchange]] = {}
        self._under_way: dict[_Exchange, None] = {}
        self._tasks: dict[asyncio.Task[None], str] = {}  # handlers at work, and the node of each

    def register(self, name: str, handler: Handler) -> None:
        """Have `handler` answer for the node `name`, also after a `kill`."""
        self._handlers[name] = handler

    def carrier(self, name: str) -> MemoryCarrier:
        """The carrier of the node or client `name`."""
        return MemoryCarrier(self, name)

    def cut(self, a: str, b: str) -> None:
        """End the connection of two nodes and let no further one come up."""
        self._cut.add(frozenset((a, b)))
        for exchange in list(self._under_way):
            if {exchange.source, exchange.target} == {a, b}:
                self._lose(exchange, f"the connection of {a} and {b} ended")

    def hold(self, a: str, b: str) -> None:
        """Keep what two nodes tell each other until `heal`."""
        self._held.setdefault(frozenset((a, b)), [])

    def heal(self) -> None:
        """End all cuts and holds; what was held is delivered in order."""
        self._cut.clear()
        held, self._held = self._held, {}
        for exchanges in held.values():
            for exchange in exchanges:
                if exchange in self._under_way:
                    self._go_on(exchange)

    def kill(self, name: str) -> None:
        """End a node in mid-air."""
        self._handlers.pop(name, None)
        for task, node in self._tasks.items():
            if node == name:
                task.cancel()
        for exchange in list(self._under_way):
            if exchange.target == name:
                self._lose(exchange, f"the connection to {name} ended")
            elif exchange.source == name:
                self._lose(exchange, f"{name} was killed")

    # ------------------------------------------------------------ for the carriers

    def unreachable(self, source: str, target: str) -> str | None:
        """Why no connection can come up, or None if one can."""
        if target not in self._handlers:
            return f"{target} does not run"
        if frozenset((source, target)) in self._cut:
            return f"{source} is cut off from {target}"
        return None

    def deliver(self, exchange: _Exchange) -> None:
        """Take a frame to its target, now or after `heal`."""
        self._under_way[exchange] = None
        self._go_on(exchange)

    def end_calls(self, source: str) -> None:
        """Fail the calls of a carrier that closes."""
        for exchange in list(self._under_way):
            if exchange.source == source:
                self._lose(exchange, "the carrier is closed")

    def _lose(self, exchange: _Exchange, reason: str) -> None:
        """Forget an exchange; a handler that works on it runs on."""
        self._under_way.pop(exchange, None)
        exchange.fail(reason)

    def _go_on(self, exchange: _Exchange) -> None:
        held = self._held.get(frozenset((exchange.source, exchange.target)))
        if held is not None:
            if len(held) < MAX_HELD:
                held.append(exchange)
            else:
                self._lose(exchange, "too many messages are held")
        elif exchange.reply is None:
            task = asyncio.get_running_loop().create_task(self._answer(exchange))
            self._tasks[task] = exchange.target
            task.add_done_callback(self._tasks.pop)
        else:
            self._hand_over(exchange, exchange.reply)

    async def _answer(self, exchange: _Exchange) -> None:
        handler = self._handlers.get(exchange.target)
        if handler is None:  # killed since
            self._lose(exchange, f"the connection to {exchange.target} ended")
            return
        try:
            exchange.reply = await answer_frame(handler, exchange.frame)
        except ProtocolError as error:
            self._lose(exchange, f"the connection to {exchange.target} ended: {error}")
            return
        if exchange not in self._under_way:
            return
        if exchange.answer is None:
            self._under_way.pop(exchange)
        else:
            self._go_on(exchange)

    def _hand_over(self, exchange: _Exchange, reply: bytes) -> None:
        self._under_way.pop(exchange, None)
        answer = exchange.answer
        if answer is None or answer.done():  # given up by the caller
            return
        try:
            answer.set_result(decode_answer(reply))
        except ProtocolError as error:
            exchange.fail(f"the connection to {exchange.target} ended: {error}")


class MemoryCarrier:
    """Implements `Carrier` on a `MemoryNetwork`."""

    def __init__(self, network: MemoryNetwork, name: str) -> None:
        self._network = network
        self._name = name
        self._closed = False

    async def call(self, node: str, message: Message, timeout_s: float) -> Message:
        """Answer of `node`. Raises CallError when none came in time."""
        frame = encode(message)
        reason = "the carrier is closed" if self._closed else self._network.unreachable(self._name, node)
        if reason is not None:
            raise CallError(reason, sent=False)
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._network.deliver(_Exchange(self._name, node, frame, answer))
        try:
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError:
            raise CallError(f"no answer of {node} within {timeout_s:.3f} s", sent=True) from None

    def begin(self, node: str, message: Message, timeout_s: float, then: Then) -> None:
        """Begin a `call`."""
        begin_task(self.call(node, message, timeout_s), then)

    def send(self, node: str, message: Message) -> bool:
        """Send one way, in order per node."""
        frame = encode(message)
        if self._closed or self._network.unreachable(self._name, node) is not None:
            return False
        self._network.deliver(_Exchange(self._name, node, frame, None))
        return True

    def update(self, addresses: Mapping[str, Address]) -> None:
        """Nothing to note: on this network a name is the address."""

    async def close(self) -> None:
        """End the calls in flight with CallError."""
        self._closed = True
        self._network.end_calls(self._name)
