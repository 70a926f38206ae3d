"""Scripts: multi-step logic without I/O.

Logic that talks to several nodes (a strong read, a client's retries, the sink) is written as a generator that
yields *effects* and is sent their results: it reads top to bottom like blocking code, imports neither asyncio nor
a clock, and runs alike under asyncio (`drive.py`), in the simulator and in a unit test that answers by hand.

    def ping_all(nodes):
        answers = yield [Call(node, Ping(), 1.0) for node in nodes]
        return [a for a in answers if not isinstance(a, CallFailed)]
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, TypeVar

from .messages import Message


@dataclass(frozen=True, slots=True)
class Call:
    """Send `message` to `node` (by name) and wait for its answer, `timeout_s` seconds at most.

    `quiet_s`: after each so many seconds without an answer, the node is asked whether it is there at all; if it does
    not say so within as many seconds, the call has failed. So a node that is slow has all its time, and one that is
    gone, or behind a link that is, costs little of it. 0: nobody asks.
    """

    node: str
    message: Message
    timeout_s: float
    quiet_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Sleep:
    """Go on after `seconds`."""

    seconds: float


@dataclass(frozen=True, slots=True)
class CallFailed:
    """Result of a `Call` that brought no answer. `sent`: False if the peer surely never saw the message."""

    node: str
    reason: str
    sent: bool


T = TypeVar("T")

Script = Generator[list[Call] | Sleep, Any, T]
"""Yields a list of calls (made in parallel) and is sent the list of their results (`Message` or `CallFailed`, in
the same order; a `Failure` message comes as it is); or yields a `Sleep` and is sent the present time in seconds
(monotonic)."""
