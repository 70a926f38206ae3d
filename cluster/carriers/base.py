"""What a carrier is: it takes a frame to a node by name and brings the answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, Protocol

import msgspec

from ..errors import TimeTierError
from ..messages import Message, Pong, decode, encode, failure

_PONG = Pong()

Handler = Callable[[Message], Awaitable[Message | None]]
"""A node's front door: takes a message, answers with one (None for a one-way message)."""

Then = Callable[[Message | Exception], None]
"""Is told, once, what a call has brought: the answer (a `Failure` as it is), or CallError when none came."""

Reply = Callable[[Message | Exception | None], None]
"""Takes the answer to a message, once: as a `Handler` gives or raises it."""

Begin = Callable[[Message, Reply], bool]
"""A node's fast door: takes a message that needs no task, and answers at once or later by `Reply`. False, and nothing
has happened, for any other message: that is for the `Handler`. Raises what is wrong with the message."""


class Address(msgspec.Struct, frozen=True):
    """Where a node listens. `host`: identity of the machine (boot id), so that a Unix path is tried only there."""

    name: str
    host: str = ""
    unix_path: str = ""
    tcp_host: str = ""
    tcp_port: int = 0
    actor: str = ""  # name of the Ray actor


class CallError(TimeTierError):
    """A call brought no answer. `sent`: False if the peer surely never saw the frame."""

    sent: bool = True


class Carrier(Protocol):
    """Moves frames. All methods are called on one event loop."""

    async def call(self, node: str, message: Message, timeout_s: float) -> Message:
        """Answer of `node`, a `Failure` as it is. Raises CallError when none came within `timeout_s` seconds.

        The frame reaches the node once at the most. Writes rely on that: were it to come again when W further entries
        are there, the answer "stale" would look as if nothing had been applied.
        """

    def begin(self, node: str, message: Message, timeout_s: float, then: Then) -> None:
        """Begin a `call`. `then` may be called before this returns."""

    def send(self, node: str, message: Message) -> bool:
        """Send one way, best effort, in order per node. False if it was dropped (no connection, full queue)."""

    def update(self, addresses: Mapping[str, Address]) -> None:
        """Replace what is known of where nodes listen; connections to unchanged addresses stay."""

    async def close(self) -> None:
        """Close all connections; calls in flight end with CallError."""


def no_fast_door(message: Message, reply: Reply) -> bool:
    """A `Begin` that leaves every message to the handler."""
    return False


def still_wanted(reply: Reply) -> Callable[[], bool]:
    """A look at whether anybody waits for an answer, as far as the carrier knows: a caller that went away takes none.

    A `Reply` may have it as `is_wanted`; of others it is not known, so they are wanted.
    """
    look: Callable[[], bool] = getattr(reply, "is_wanted", _always)
    return look


def _always() -> bool:
    return True


class _FutureReply:
    """A `Reply` that gives a future its result."""

    __slots__ = ("_answer",)

    def __init__(self, answer: asyncio.Future[Any]) -> None:
        self._answer = answer

    def __call__(self, outcome: Message | Exception | None) -> None:
        settle(self._answer, outcome)

    def is_wanted(self) -> bool:
        return not self._answer.done()


def settle(answer: asyncio.Future[Any], outcome: Message | Exception | None) -> None:
    """Give a future what came of a call or of a message, unless whoever waited has gone."""
    if answer.done():
        return
    if isinstance(outcome, Exception):
        answer.set_exception(outcome)
    else:
        answer.set_result(outcome)


async def at_fast_door(begin: Begin, message: Message) -> Message | None:
    """Answer of a fast door to a message that it takes, as a `Handler` gives or raises it."""
    answer: asyncio.Future[Message | None] = asyncio.get_running_loop().create_future()
    if not begin(message, _FutureReply(answer)):
        raise AssertionError(f"the fast door does not take a {type(message).__name__}")
    return await answer


_begun: set[asyncio.Task[Message]] = set()  # the loop itself keeps only weak references to tasks


def begin_task(call: Coroutine[Any, Any, Message], then: Then) -> None:
    """Make a call that is a coroutine in a task of its own."""
    task = asyncio.get_running_loop().create_task(call)
    _begun.add(task)

    def tell(done: asyncio.Task[Message]) -> None:
        _begun.discard(done)
        if done.cancelled():
            then(CallError("the call was given up", sent=True))
        else:
            error = done.exception()
            then(error if isinstance(error, Exception) else done.result())

    task.add_done_callback(tell)


async def answer_frame(handler: Handler, frame: bytes | memoryview) -> bytes:
    """Decode a frame, have the handler answer it, encode the answer (b"" for none).

    Raises ProtocolError for a malformed frame only: errors of the handler travel back as `Failure`.
    """
    message = decode(frame)
    reply: Message | Exception | None
    try:
        reply = await handler(message)
    except Exception as error:
        reply = error
    return encode_reply(reply)


def encode_reply(reply: Message | Exception | None) -> bytes:
    """Frame of an answer; b"" for none. An error travels as `Failure`, also that of an answer that is too large."""
    try:
        if reply is None:
            return b""
        return encode(failure(reply) if isinstance(reply, Exception) else reply)
    except Exception as error:
        return encode(failure(error))


def decode_answer(frame: bytes | memoryview) -> Message:
    """Message of a reply frame; an empty one, to a message that needs no answer, is a `Pong`."""
    return decode(frame) if len(frame) else _PONG
