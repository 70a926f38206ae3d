"""Keeps a client's map up to date, by long poll. When the Router is dead, everything goes on with what is known."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Protocol

from ..carriers.base import Carrier
from ..errors import TimeTierError
from ..topology import Topology
from .view import View

POLL_S = 30.0
PATIENCE_S = 10.0  # beyond POLL_S: a source that hangs is asked again
SHORTEST_PAUSE_S = 0.02  # between two polls: a source that answers at once must not spin
LONGEST_PAUSE_S = 10.0

_log = logging.getLogger(__name__)


class TopologySource(Protocol):
    """Where the topology comes from: the Router, by whatever way it is reached."""

    async def fetch(self, known_epoch: int, timeout_s: float) -> Topology | None:
        """The topology as soon as its epoch is above `known_epoch`; None if that lasts longer than `timeout_s`."""


class Follower:
    """Follows the topology for one client, until it is stopped. `last_error`: why the last poll failed, or ""."""

    def __init__(self, source: TopologySource, view: View, carrier: Carrier) -> None:
        self.last_error = ""
        self._source = source
        self._view = view
        self._carrier = carrier
        self._wanted = asyncio.Event()
        view.on_stale = self._wanted.set
        self._task = asyncio.get_running_loop().create_task(self._follow())

    async def stop(self) -> None:
        """End the background task."""
        self._view.on_stale = lambda: None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def take(self, topology: Topology) -> bool:
        """Go by this topology, if it is a later one of the same cluster. Raises if it can't be routed."""
        known = self._view.routing.topology
        if topology.cluster_id != known.cluster_id:
            raise TimeTierError(
                f"the Router of namespace {topology.namespace!r} serves cluster {topology.cluster_id}, "
                f"this client belongs to {known.cluster_id}: connect again"
            )
        if topology.epoch <= known.epoch:
            return False
        self._view.update(topology)
        self._carrier.update(topology.addresses)
        return True

    async def _follow(self) -> None:
        failures = 0
        while True:
            self._wanted.clear()
            pause_s = SHORTEST_PAUSE_S * (1 + 4 * self._view.random.random())  # clients don't all come at once
            try:
                async with asyncio.timeout(POLL_S + PATIENCE_S):
                    topology = await self._source.fetch(self._view.routing.topology.epoch, POLL_S)
                if topology is not None:
                    self.take(topology)
                failures, self.last_error = 0, ""
            except Exception as error:  # whatever it is, the client works on with the map that it has
                reason = str(error) or type(error).__name__
                if reason != self.last_error:
                    _log.warning("the topology can't be followed, going on with epoch %d: %s", self._epoch(), reason)
                self.last_error = reason
                pause_s = min(pause_s * 2.0 ** min(failures, 16), LONGEST_PAUSE_S)
                failures += 1
            await self._pause(pause_s)

    async def _pause(self, pause_s: float) -> None:
        """Wait; a node that refused the map cuts it short, but not below the shortest pause."""
        await asyncio.sleep(min(pause_s, SHORTEST_PAUSE_S))
        # Not `wait_for`: in Python 3.11 it may swallow a cancellation that comes with its result.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, pause_s - SHORTEST_PAUSE_S)):
                await self._wanted.wait()

    def _epoch(self) -> int:
        return self._view.routing.topology.epoch
