"""Replacing disks of cold nodes in a running cluster: has a node begin, and follows it. The node does the work."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..actors.connecting import ClusterStore, connect_async
from ..cluster.carriers.base import CallError
from ..cluster.errors import InvalidRequest, TimeTierError, Unavailable
from ..cluster.messages import DiskReplace, DiskRetry, Message, Status, StatusRequest, raise_failure

POLL_S = 0.3
CALL_S = 30.0
ERASE_S = 600.0  # to remove many files takes a while
AWAY_S = 120.0  # a node that gives no answer for so long is not waited for: it goes on by itself when it is back
ALL = None

Disk = dict[str, Any]
Tell = Callable[[list[Disk]], None]


@dataclass
class Replacing:
    """What was done. `replaced`: ordinals of disks that this began with; `disks`: those that were meant, as the node
    told of them last."""

    node: str
    replaced: list[int] = field(default_factory=list)
    disks: list[Disk] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def failed(self) -> list[Disk]:
        """Disks that were taken out meanwhile."""
        return [disk for disk in self.disks if disk["state"] in ("failed", "absent")]

    @property
    def done(self) -> bool:
        """Whether all of them serve."""
        return all(disk["state"] == "serving" for disk in self.disks)


async def list_disks(namespace: str) -> list[Disk]:
    """All disks of all cold nodes, each with its `node`; a node that does not answer has one line without a disk.

    Raises Unavailable when there is no such cluster.
    """
    store = await connect_async(namespace=namespace)
    try:
        names = [name for name in store.view.routing.topology.node_names() if name.startswith("cold-")]
        found = await asyncio.gather(*(_disks_or_why(store, name) for name in names))
        return [disk for disks in found for disk in disks]
    finally:
        await store.close()


async def replace_disks(
    namespace: str, node: str, ordinal: int | None, *, erase: bool, wait: bool, tell: Tell
) -> Replacing:
    """Have one disk of a node replaced, or all that do not serve (`ALL`; with `erase` also those that do).

    Returns when they are filled, or one is taken out, or at once without `wait`. `tell` is given the disks that are
    being filled, from time to time. Raises InvalidRequest, Unavailable.
    """
    began_s = time.monotonic()
    store = await connect_async(namespace=namespace)
    try:
        disks = await _disks_of(store, node)
        if ordinal is not ALL and not 0 <= ordinal < len(disks):
            raise InvalidRequest(f"disk {ordinal}: {node} has disks 0 to {len(disks) - 1}")
        chosen = [ordinal] if ordinal is not ALL else [d["disk"] for d in disks if erase or d["state"] != "serving"]
        for number in chosen:
            if erase or disks[number]["state"] != "replacing":
                await _ask(store, node, DiskReplace(number, erase))
        meant = range(len(disks)) if ordinal is ALL else [ordinal]
        result = Replacing(node, chosen)
        while True:
            result.disks = [disk for disk in await _patiently(store, node) if disk["disk"] in meant]
            tell(result.disks)
            if not wait or result.done or result.failed:
                break
            await asyncio.sleep(POLL_S)
        result.seconds = time.monotonic() - began_s
        return result
    finally:
        await store.close()


async def retry_disk(namespace: str, node: str, ordinal: int) -> list[Disk]:
    """Have a node look again at a disk that is out; its disks as they are then. Raises InvalidRequest, Unavailable."""
    store = await connect_async(namespace=namespace)
    try:
        await _ask(store, node, DiskRetry(ordinal))
        return await _disks_of(store, node)
    finally:
        await store.close()


async def _ask(store: ClusterStore, node: str, message: Message) -> Message:
    names = [name for name in store.view.routing.topology.node_names() if name.startswith("cold-")]
    if node not in names:
        raise InvalidRequest(f"{node!r} is no cold node: write one of {', '.join(names)}")
    try:
        answer = await store.carrier.call(node, message, ERASE_S if isinstance(message, DiskReplace) else CALL_S)
    except CallError as error:
        raise Unavailable(f"{node} does not answer: {error.message}") from None
    raise_failure(answer)
    return answer


async def _disks_of(store: ClusterStore, node: str) -> list[Disk]:
    """Raises Unavailable when the node does not serve, with its reason."""
    answer = await _ask(store, node, StatusRequest())
    if not isinstance(answer, Status):
        raise Unavailable(f"{node} answered StatusRequest with {type(answer).__name__}")
    status = json.loads(answer.body)
    if "disks" not in status:
        raise Unavailable(f"{node} is {status['state']}: {status.get('reason', '')}")
    disks: list[Disk] = status["disks"]
    return disks


async def _disks_or_why(store: ClusterStore, node: str) -> list[Disk]:
    try:
        return [{"node": node, **disk} for disk in await _disks_of(store, node)]
    except TimeTierError as error:
        return [{"node": node, "disk": None, "state": "unknown", "reason": error.message}]


async def _patiently(store: ClusterStore, node: str) -> list[Disk]:
    """Its disks, also when it starts again meanwhile: then it goes on where it was. Raises Unavailable."""
    deadline = time.monotonic() + AWAY_S
    while True:
        try:
            return await _disks_of(store, node)
        except Unavailable as error:
            if time.monotonic() > deadline:
                reason = f"{node} has not answered for {AWAY_S:.0f} s; it goes on by itself when it is back"
                raise Unavailable(f"{reason} ({error.message})") from None
            await asyncio.sleep(POLL_S)
