"""The bound on what a node has under way for its callers.

A request enters with its number of parts and its bytes, and leaves when its answer does: so what waits for a slow disk
or a slow peer counts as long as it takes memory. Beyond the limits the node refuses at once, before it has done any
work for the request, with `Unavailable` and a hint when to come back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .counters import Counters
from .errors import Unavailable

RETRY_AFTER_S = 0.1
"""When to come back to a node that has too much under way. Clients double it, with jitter, when it did not help."""

REQUEST_BYTES = 700  # what a request takes in memory beside its keys and values
ITEM_BYTES = 150  # the same of a key and its value


class Gate:
    """Counts the requests and bytes under way in a node. All methods are called from one thread."""

    def __init__(self, name: str, counters: Counters, *, max_requests: int, max_bytes: int) -> None:
        """`name`: of the node, for error messages. Counter: overload_refusals (requests)."""
        self.max_requests = max_requests
        self.max_bytes = max_bytes
        self.requests = 0
        self.nbytes = 0
        self._name = name
        self._counters = counters

    @contextmanager
    def entered(self, requests: int, nbytes: int) -> Iterator[None]:
        """Count a call for as long as it is under way. Raises Unavailable when there is no room for it."""
        self.enter(requests, nbytes)
        try:
            yield
        finally:
            self.leave(requests, nbytes)

    def enter(self, requests: int, nbytes: int) -> None:
        """Count a call until it leaves. Raises Unavailable when there is no room for it.

        An idle gate takes any call: one that is too large for good must be refused for that by somebody else.
        """
        too_much = self.requests + requests > self.max_requests or self.nbytes + nbytes > self.max_bytes
        if too_much and self.requests:
            self._counters.add("overload_refusals", requests)
            raise overloaded(
                f"{self._name} has too much to do: {self.requests} requests of {self.nbytes} bytes are under way, "
                f"the limits are {self.max_requests} and {self.max_bytes}"
            )
        self.requests += requests
        self.nbytes += nbytes

    def leave(self, requests: int, nbytes: int) -> None:
        """A call is not under way any more."""
        self.requests -= requests
        self.nbytes -= nbytes


def overloaded(message: str) -> Unavailable:
    """The refusal of a node that has too much to do, by which callers know that others may be no better off."""
    return Unavailable(message, retry_after_s=RETRY_AFTER_S, busy=1)
