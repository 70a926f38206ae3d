"""Writers and readers that go on while zones come and go. Runs in the process of a `ZoneDriver`."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from dataclasses import dataclass, field

from timetier.actors.connecting import ClusterStore, connect_async
from timetier.cluster.errors import TimeTierError

_WORKERS = 8
_PAUSE_S = 0.02  # of a worker between two operations: the machine is to start Ray nodes besides
_END_S = 60.0


@dataclass
class Report:
    """`acknowledged`: owner and timestamp of each write. `longest_s`: of an operation. `failed`, `wrong`: in words."""

    acknowledged: list[tuple[str, int]] = field(default_factory=list)
    longest_s: float = 0.0
    failed: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


class _Traffic:
    def __init__(self, namespace: str) -> None:
        self.report = Report()
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self._run(namespace)), daemon=True)
        self.thread.start()

    async def _run(self, namespace: str) -> None:
        async with await connect_async(namespace=namespace) as store:
            await asyncio.gather(*(self._work(store, f"traffic-{number}") for number in range(_WORKERS)))
            self.report.wrong += await _lost(store, self.report.acknowledged)

    async def _work(self, store: ClusterStore, worker: str) -> None:
        """One operation after the other: a write to one of many timelines, then a read of it."""
        table = store.table("moments")
        for at in itertools.count(1):
            if self.stopping.is_set():
                return
            await asyncio.sleep(_PAUSE_S)
            owner = f"{worker}-{at % 40}"
            try:
                begun = time.monotonic()
                await table.put(owner, at, b"%d" % at)
                self.report.acknowledged.append((owner, at))
                written = time.monotonic()
                item = await table.get(owner, at)
            except TimeTierError as error:
                self.report.failed.append(f"{owner} {at}: {error!r}")
                continue
            if item is None or item.value != b"%d" % at:
                self.report.wrong.append(f"{owner} {at} was acknowledged, and a read gave {item}")
            self.report.longest_s = max(self.report.longest_s, written - begun, time.monotonic() - written)


async def _lost(store: ClusterStore, written: list[tuple[str, int]]) -> list[str]:
    found = await store.table("moments").get_many(written)
    return [
        f"{key} was acknowledged and is lost"
        for key, item in zip(written, found, strict=True)
        if item is None or item.value != b"%d" % key[1]
    ]


def lost(namespace: str, written: list[tuple[str, int]]) -> list[str]:
    """Which of these acknowledged writes can't be read back, in words."""

    async def read() -> list[str]:
        async with await connect_async(namespace=namespace) as store:
            return await _lost(store, written)

    return asyncio.run(read())


_running: dict[str, _Traffic] = {}


def begin_traffic(namespace: str) -> None:
    """Start to write and read, in the background."""
    _running[namespace] = _Traffic(namespace)


def acknowledged(namespace: str) -> int:
    """Writes that were acknowledged so far."""
    return len(_running[namespace].report.acknowledged)


def end_traffic(namespace: str) -> Report:
    """End it, and read once more whatever was acknowledged. Raises AssertionError when it does not end."""
    traffic = _running.pop(namespace)
    traffic.stopping.set()
    traffic.thread.join(_END_S)
    assert not traffic.thread.is_alive(), "the traffic does not end"
    return traffic.report
