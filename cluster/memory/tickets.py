"""Who waits for the reads of one message, and for how long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from .requests import Read


class Ticket:
    """Reads of one message that go the long way: how many are left, and the bytes of answers that it holds meanwhile.
    `then` is called once: when none is left, when the time is over, or when the node stops."""

    __slots__ = ("_wanted", "is_over", "left", "nbytes", "then", "timer")

    def __init__(
        self, reads: list[Read], then: Callable[[Ticket], None], timeout_s: float, wanted: Callable[[], bool]
    ) -> None:
        self.left = len(reads)
        self.nbytes = 0
        self.is_over = False
        self.then = then
        self.timer = asyncio.get_running_loop().call_later(timeout_s, self.end)
        self._wanted = wanted
        for read in reads:
            read.ticket = self
            read.wanted = self.is_wanted

    def is_wanted(self) -> bool:
        """Whether anybody still waits for its answers."""
        return not self.is_over and self._wanted()

    def one_done(self) -> None:
        self.left -= 1
        if not self.left:
            self.end()

    def end(self) -> None:
        """Let the message be answered as it stands; answers that come later count for nobody."""
        if not self.is_over:
            self.is_over = True
            self.timer.cancel()
            self.then(self)
