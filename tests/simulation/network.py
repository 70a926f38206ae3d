"""The network between the simulated processes: every frame is encoded and decoded, and a seed makes it unreliable.

Frames are delayed, dropped, doubled and overtaken; links may be cut in one or both directions, or slow. A frame that
was sent by a life that has died meanwhile still arrives, and one sent to it reaches whoever has its name by then:
worse than any real carrier, so whatever holds here holds there. Only what every carrier promises is kept: the frame
of a call comes at most once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random

from timetier.cluster.carriers.base import (
    Address,
    CallError,
    Handler,
    Then,
    answer_frame,
    begin_task,
    decode_answer,
)
from timetier.cluster.errors import ProtocolError
from timetier.cluster.messages import Message, PeerBatch, encode

from .loop import WORLD, Life, SimLoop
from .trace import Trace


@dataclass(frozen=True)
class Weather:
    """How unreliable the network is. Shares are of all frames; `late_s`: how late a straggler may be."""

    low_s: float = 0.0002
    high_s: float = 0.001
    dropped: float = 0.0
    doubled: float = 0.0
    straggling: float = 0.0
    late_s: float = 1.0


CALM = Weather()


class Exchange:
    """One call: its frame on the way there, and its answer on the way back."""

    __slots__ = ("answer", "frame", "source", "target")

    def __init__(self, source: str, target: str, frame: bytes, answer: asyncio.Future[Message] | None) -> None:
        self.source = source
        self.target = target
        self.frame = frame
        self.answer = answer

    def fail(self, reason: str) -> None:
        """End the call without an answer."""
        if self.answer is not None and not self.answer.done():
            self.answer.set_exception(CallError(reason, sent=True))


class SimNetwork:
    """Nodes by name. `weather` may be changed at any time; so may cuts and slow links."""

    def __init__(self, loop: SimLoop, random: Random, trace: Trace) -> None:
        self.weather = CALM
        self.frames = 0
        self._loop = loop
        self._random = random
        self._trace = trace
        self._doors: dict[str, tuple[Life, Handler]] = {}
        self._cut: set[tuple[str, str]] = set()
        self._slow: dict[tuple[str, str], float] = {}
        self._last: dict[tuple[str, str], float] = {}

    # ------------------------------------------------------------ who is there

    def register(self, life: Life, handler: Handler) -> None:
        """Have `handler` answer for the node of this life from now on."""
        self._doors[life.name] = life, handler

    def carrier(self, life: Life) -> SimCarrier:
        """The carrier of one process."""
        return SimCarrier(self, self._loop, life)

    # ------------------------------------------------------------ faults

    def cut(self, source: str, target: str) -> None:
        """Lose all frames from `source` to `target`."""
        self._cut.add((source, target))

    def mend(self, source: str, target: str) -> None:
        """End a cut."""
        self._cut.discard((source, target))

    def slow_down(self, source: str, target: str, more_s: float) -> None:
        """Delay all frames from `source` to `target`; 0 ends it."""
        if more_s:
            self._slow[source, target] = more_s
        else:
            self._slow.pop((source, target), None)

    def heal(self) -> None:
        """End all cuts, slow links and bad weather."""
        self._cut.clear()
        self._slow.clear()
        self.weather = CALM

    # ------------------------------------------------------------ for the carriers

    def refusal(self, source: str, target: str) -> str | None:
        """Why no connection comes up, None if the frame may leave. A cut is mostly noticed by silence only."""
        door = self._doors.get(target)
        if door is None or door[0].dead:
            return f"{target} does not run"
        if (source, target) in self._cut and self._random.random() < 0.2:
            return f"{source} gets no connection to {target}"
        return None

    def deliver(self, exchange: Exchange) -> None:
        """Take a frame to its target."""
        delays_s = self._delays(exchange.source, exchange.target, "sends", exchange.frame)
        if exchange.answer is not None:
            del delays_s[1:]
        for delay_s in delays_s:
            self._loop.call_later(delay_s, self._arrive, exchange, context=WORLD)

    def _delays(self, source: str, target: str, what: str, frame: bytes) -> list[float]:
        """After how long the frame arrives, each time that it does."""
        self.frames += 1
        weather, draw = self.weather, self._random.random
        if draw() < weather.dropped:
            self._trace.frame("loses", source, target, frame)
            return []
        self._trace.frame(what, source, target, frame)
        link = source, target
        delay_s = weather.low_s + draw() * (weather.high_s - weather.low_s) + self._slow.get(link, 0.0)
        now = self._loop.now
        if draw() < weather.straggling:
            delay_s += draw() * weather.late_s
        else:
            delay_s = max(delay_s, self._last.get(link, 0.0) - now)
            self._last[link] = now + delay_s
        if draw() < weather.doubled:
            return [delay_s, delay_s + draw() * weather.late_s]
        return [delay_s]

    def _arrive(self, exchange: Exchange) -> None:
        source, target = exchange.source, exchange.target
        if (source, target) in self._cut:
            return
        door = self._doors.get(target)
        if door is None or door[0].dead:
            if self._random.random() < 0.5:  # else nobody tells, and the caller waits
                exchange.fail(f"the connection to {target} ended")
            return
        life, handler = door
        self._loop.call_soon(self._begin, exchange, life, handler, context=life.context)

    def _begin(self, exchange: Exchange, life: Life, handler: Handler) -> None:
        self._trace.frame("comes to", exchange.source, exchange.target, b"")
        self._loop.spawn(life, self._answer(exchange, life, handler))

    async def _answer(self, exchange: Exchange, life: Life, handler: Handler) -> None:
        try:
            reply = await answer_frame(handler, exchange.frame)
        except ProtocolError as error:
            self._trace.note(life.name, f"drops a connection: {error}")
            return
        if exchange.answer is None or life.dead:
            return
        for delay_s in self._delays(exchange.target, exchange.source, "answers", reply):
            self._loop.call_later(delay_s, self._hand_over, exchange, reply, context=WORLD)

    def _hand_over(self, exchange: Exchange, reply: bytes) -> None:
        answer = exchange.answer
        if (exchange.target, exchange.source) in self._cut or answer is None or answer.done():
            return
        try:
            answer.set_result(decode_answer(reply))
        except ProtocolError as error:
            exchange.fail(f"the connection to {exchange.target} ended: {error}")


class SimCarrier:
    """Implements `Carrier` for one life."""

    def __init__(self, network: SimNetwork, loop: SimLoop, life: Life) -> None:
        self._network = network
        self._loop = loop
        self._life = life
        self._closed = False
        self.on_peer_batch: Callable[[str, PeerBatch], None] = _nothing

    async def call(self, node: str, message: Message, timeout_s: float) -> Message:
        """Answer of `node`. Raises CallError when none came in time."""
        frame = encode(message)
        reason = "the carrier is closed" if self._closed else self._network.refusal(self._life.name, node)
        if reason is not None:
            raise CallError(reason, sent=False)
        answer: asyncio.Future[Message] = self._loop.create_future()
        exchange = Exchange(self._life.name, node, frame, answer)
        timer = self._loop.call_later(timeout_s, exchange.fail, f"no answer of {node} within {timeout_s:.3f} s")
        if not self._life.dead:
            self._network.deliver(exchange)
        try:
            return await answer
        finally:
            timer.cancel()

    def begin(self, node: str, message: Message, timeout_s: float, then: Then) -> None:
        """Begin a `call`."""
        begin_task(self.call(node, message, timeout_s), then)

    def send(self, node: str, message: Message) -> bool:
        """Send one way."""
        frame = encode(message)
        if self._closed or self._life.dead or self._network.refusal(self._life.name, node) is not None:
            return False
        if isinstance(message, PeerBatch):
            self.on_peer_batch(node, message)
        self._network.deliver(Exchange(self._life.name, node, frame, None))
        return True

    def update(self, addresses: Mapping[str, Address]) -> None:
        """Nothing to note: on this network a name is the address."""

    async def close(self) -> None:
        """Take no further calls."""
        self._closed = True


def _nothing(node: str, message: PeerBatch) -> None:
    """What a carrier does beside sending, unless a check looks on."""
