"""What every node is to whoever runs it: a Ray actor, or a test."""

from __future__ import annotations

from typing import Any, Protocol

from .carriers.base import Reply
from .counters import Counters
from .messages import Message
from .topology import Topology


class Service(Protocol):
    """A node without its surroundings: messages in, messages out, over the carrier it was given."""

    counters: Counters

    async def start(self) -> None:
        """Open the data and begin background work. A node that must not serve starts too and says so in `status`."""

    async def handle(self, message: Message) -> Message | None:
        """Answer one message (None for a one-way message). Raises a TimeTierError, which goes to the caller."""

    def begin(self, message: Message, reply: Reply) -> bool:
        """Answer one message without a task, at once or later. False for one that is to go to `handle`."""

    def update(self, topology: Topology) -> None:
        """Take note of a changed topology."""

    def status(self) -> dict[str, Any]:
        """State (`state`: one word, `reason`: why, when it does not serve) and figures, ready for JSON."""

    async def stop(self) -> None:
        """End background work and close the data."""
