"""A client process of the festival: reads that come at given rates, whether or not earlier ones have been answered.

    python -m benchmarks.festival_client SPEC_JSON     # `festival.py` starts them

It says `ready` when it is connected, reads the start time (seconds of the monotonic clock, common to all processes of a
machine) from stdin, and then writes one JSON object for each slot of time. A read's latency counts from the moment at
which it was due, so a client or a cluster that falls behind shows it.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from timetier.actors.connecting import connect_async
from timetier.actors.ray_session import connect_ray
from timetier.cluster.client.store import AsyncTable
from timetier.jobs.bench_data import Dataset

SLOT_S = 0.5
STEP = 1.05  # two latencies of one class differ by less than this factor
_TICK_S = 0.002
_MOST_OPEN = 20_000  # reads of this client that wait at a time; those that come beyond it are counted as refused
_OWNERS_AT_ONCE = 50_000

Points = list[list[float]]
"""(second, reads a second) of the corners of a rate; straight lines between."""


def due(points: Points, at_s: float) -> float:
    """Reads that were due up to a time, by the area under the rate."""
    total = 0.0
    for (from_s, low), (to_s, high) in itertools.pairwise(points):
        if at_s <= from_s:
            break
        end_s = min(at_s, to_s)
        reached = low + (high - low) * (end_s - from_s) / (to_s - from_s)
        total += (low + reached) / 2 * (end_s - from_s)
    return total


def latency_class(seconds: float) -> int:
    """Class of a latency: its logarithm in steps of 5 %, from microseconds up."""
    return max(0, round(math.log(max(seconds * 1e6, 1.0), STEP)))


def quantile_ms(classes: Counter[int], share: float) -> float:
    """The latency that a share of the reads stayed within, in ms; 0 without any."""
    left = share * classes.total()
    for number, count in sorted(classes.items()):
        left -= count
        if left <= 0:
            return float(STEP**number / 1e3)
    return 0.0


class Reader:
    """Issues the reads, and counts by slot."""

    def __init__(self, table: AsyncTable, data: Dataset, points: Points, page_items: int, seed: int) -> None:
        self._table = table
        self._data = data
        self._points = points
        self._page_items = page_items
        self._rng = np.random.default_rng(seed)
        self._owners: list[int] = []
        self._open: set[asyncio.Task[None]] = set()
        self.slots: dict[int, dict[str, Any]] = {}

    async def run(self, start_s: float) -> None:
        """Until the last corner of the rate; each slot is printed a second after its end."""
        end_s = self._points[-1][0]
        issued = printed = 0
        while (at_s := time.monotonic() - start_s) < end_s:
            wanted = int(due(self._points, at_s))
            for _ in range(wanted - issued):
                self._issue(start_s, time.monotonic())
            issued = max(issued, wanted)
            while (printed + 1) * SLOT_S + 1.0 < at_s:
                self._print(printed)
                printed += 1
            await asyncio.sleep(_TICK_S)
        await asyncio.gather(*self._open)
        for slot in range(printed, max(self.slots, default=0) + 1):
            self._print(slot)

    def _issue(self, start_s: float, due_s: float) -> None:
        slot = self._slot(due_s - start_s)
        slot["due"] += 1
        if len(self._open) >= _MOST_OPEN:
            slot["refused"] += 1
            return
        if not self._owners:
            self._owners = self._data.zipf_owners(self._rng, _OWNERS_AT_ONCE).tolist()
        task = asyncio.get_running_loop().create_task(self._read(self._owners.pop(), start_s, due_s))
        self._open.add(task)
        task.add_done_callback(self._open.discard)

    async def _read(self, owner: int, start_s: float, due_s: float) -> None:
        right = False
        error = ""
        try:
            page = await self._table.timeline(self._data.names[owner], limit=self._page_items)
            right = len(page.items) == self._page_items
        except Exception as failed:
            error = f"{type(failed).__name__}: {failed}"  # told in the report
        now_s = time.monotonic()
        slot = self._slot(now_s - start_s)
        slot["done" if right else "failed"] += 1
        if error:
            slot["error"] = error
        slot["latencies"][latency_class(now_s - due_s)] += 1

    def _slot(self, at_s: float) -> dict[str, Any]:
        number = max(0, int(at_s / SLOT_S))
        if number not in self.slots:
            self.slots[number] = {"due": 0, "done": 0, "failed": 0, "refused": 0, "latencies": Counter()}
        return self.slots[number]

    def _print(self, number: int) -> None:
        print(json.dumps({"slot": number, **self.slots.get(number, {})}), flush=True)


async def _serve(spec: dict[str, Any]) -> None:
    data = Dataset(**spec["data"])
    async with await connect_async(namespace=spec["namespace"]) as store:
        table = store.table(spec["table"])
        await table.timeline(data.names[0], limit=1)
        print("ready", flush=True)
        start_s = float(await asyncio.to_thread(sys.stdin.readline))
        reader = Reader(table, data, spec["points"], spec["page_items"], spec["seed"])
        await reader.run(start_s)


def main() -> None:
    spec = json.loads(sys.argv[1])
    connect_ray(data_dir=Path(spec["folder"]))
    asyncio.run(_serve(spec))


if __name__ == "__main__":
    main()
