"""Asks suspected nodes whether they are back, aside from all requests, so that no request waits for one in vain."""

from __future__ import annotations

import asyncio
import contextlib

from ..carriers.base import CallError, Carrier
from ..errors import TimeTierError
from ..messages import Message
from .view import View


class Prober:
    """Probes the suspected nodes of one client, each when its suspicion is due, until it is stopped."""

    def __init__(self, view: View, carrier: Carrier) -> None:
        self._view = view
        self._carrier = carrier
        self._task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._suspicion = view.suspicion
        self._suspicion.probed, self._suspicion.on_suspect = True, self._wake

    async def stop(self) -> None:
        """End the background task. Suspicion ends by time from then on."""
        self._suspicion.probed, self._suspicion.on_suspect = False, lambda: None
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def _wake(self) -> None:
        self._changed.set()
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._probe_all())

    async def _probe_all(self) -> None:
        """As long as there are suspected nodes. Each is probed by a task of its own: one may take its time."""
        under_way: dict[str, asyncio.Task[None]] = {}
        try:
            while (due_at := self._suspicion.next_due()) is not None:
                self._changed.clear()
                for node, question in self._suspicion.due():
                    if node not in under_way:
                        under_way[node] = task = asyncio.create_task(self._probe(node, question))
                        task.add_done_callback(lambda _: self._changed.set())
                pause_s = max(0.0, (self._suspicion.next_due() or due_at) - self._view.now())
                # Not `wait_for`: in Python 3.11 it may swallow a cancellation that comes with its result.
                with contextlib.suppress(TimeoutError):  # then somebody is due
                    async with asyncio.timeout(pause_s):
                        await self._changed.wait()
                under_way = {node: task for node, task in under_way.items() if not task.done()}
        finally:
            for task in under_way.values():
                task.cancel()

    async def _probe(self, node: str, question: Message) -> None:
        try:
            await self._carrier.call(node, question, self._view.settings.attempt_timeout_s)
        except (CallError, TimeTierError):
            self._suspicion.suspect(node)
        else:
            self._suspicion.trust(node)
