"""Requests of a storage node that wait for their answers, and the bound on them."""

from __future__ import annotations

from typing import NamedTuple

from ..carriers.base import Reply
from ..counters import Counters
from ..errors import OutcomeUnknown, Unavailable
from ..gate import ITEM_BYTES, REQUEST_BYTES, Gate
from ..messages import AskVersions, Check, Message, Settle, Write


class _Request(NamedTuple):
    reply: Reply
    gate: Gate
    requests: int
    nbytes: int
    is_write: bool


class Waiting:
    """Requests by token. Reads have a gate of their own: they go on when writes wait for a slow disk."""

    def __init__(self, name: str, counters: Counters, *, max_requests: int, max_bytes: int) -> None:
        """The limits are those of each `Gate`."""
        self.reads = Gate(name, counters, max_requests=max_requests, max_bytes=max_bytes)
        self.writes = Gate(name, counters, max_requests=max_requests, max_bytes=max_bytes)
        self._requests: dict[int, _Request] = {}
        self._token = 0

    def enter(self, message: Message, reply: Reply) -> int:
        """Take a request; its token. Raises Unavailable when there is no room for it."""
        is_write = isinstance(message, Write)
        gate = self.writes if is_write else self.reads
        requests, nbytes = weight(message)
        gate.enter(requests, nbytes)
        self._token += 1
        self._requests[self._token] = _Request(reply, gate, requests, nbytes, is_write)
        return self._token

    def leave(self, token: int) -> Reply | None:
        """A request waits no more; who waits for its answer, None if it has one."""
        request = self._requests.pop(token, None)
        if request is None:
            return None
        request.gate.leave(request.requests, request.nbytes)
        return request.reply

    def answer(self, token: int, answer: Message) -> None:
        """A request has its answer."""
        reply = self.leave(token)
        if reply is not None:
            reply(answer)

    def fail_all(self, reason: str) -> None:
        """No request gets its answer any more. A write may have been applied all the same."""
        for token, request in list(self._requests.items()):
            kind = OutcomeUnknown if request.is_write else Unavailable
            reply = self.leave(token)
            if reply is not None:
                reply(kind(reason))


def weight(message: Message) -> tuple[int, int]:
    """Requests in a message, and bytes that they take in memory until they are answered."""
    if isinstance(message, Write):
        count, items = len(message.timelines), len(message.keys)
        size = sum(map(len, message.values)) + sum(map(len, message.keys)) + ITEM_BYTES * items
        return count, size + REQUEST_BYTES * count
    count = len(message.timelines) if isinstance(message, (Check, AskVersions, Settle)) else 1
    return count, REQUEST_BYTES * count
