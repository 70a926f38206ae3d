"""What a carrier is: it takes a frame to a node by name and brings the answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

import msgspec

from ..errors import TimeTierError
from ..messages import Failure, Message, Pong, decode, encode, failure

_PONG = Pong()

Handler = Callable[[Message], Awaitable[Message | None]]
"""A node's front door: takes a message, answers with one (None for a one-way message)."""


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

    def start(self, node: str, message: Message, timeout_s: float) -> asyncio.Future[Message]:
        """Begin a `call`, for whoever makes several at once; await the future, or cancel it, as one would the call."""

    def send(self, node: str, message: Message) -> bool:
        """Send one way, best effort, in order per node. False if it was dropped (no connection, full queue)."""

    def update(self, addresses: Mapping[str, Address]) -> None:
        """Replace what is known of where nodes listen; connections to unchanged addresses stay."""

    async def close(self) -> None:
        """Close all connections; calls in flight end with CallError."""


async def answer_frame(handler: Handler, frame: bytes | memoryview) -> bytes:
    """Decode a frame, have the handler answer it, encode the answer (b"" for none).

    Raises ProtocolError for a malformed frame only: errors of the handler travel back as `Failure`.
    """
    return await answer_message(handler, decode(frame))


async def answer_message(handler: Handler, message: Message) -> bytes:
    """Have the handler answer a message, encode the answer (b"" for none); errors travel back as `Failure`."""
    try:
        reply = await handler(message)
        return b"" if reply is None else encode(reply)
    except Exception as error:
        reply_failure: Failure = failure(error)
        return encode(reply_failure)


def decode_answer(frame: bytes | memoryview) -> Message:
    """Message of a reply frame; an empty one, to a message that needs no answer, is a `Pong`."""
    return decode(frame) if len(frame) else _PONG
