"""Runs of the sink in clusters of processes (`nodes.py`), and what benchmarks wait for before and after them."""

from __future__ import annotations

import asyncio
import time

from timetier.cluster.client.store import AsyncStore
from timetier.cluster.cold.sink_calls import SinkSettings
from timetier.cluster.cold.sink_script import SinkReport, TableSink, sink
from timetier.cluster.cold.sinking import chosen_cut_offs
from timetier.cluster.drive import drive
from timetier.cluster.errors import TimeTierError

_START_S = 60.0
_EVICTED_S = 120.0
_POLL_S = 0.1


async def run_sink(
    store: AsyncStore, table: str, *, before: int | None, settings: SinkSettings, run: str
) -> SinkReport:
    """One run. `before`: items with an older timestamp sink, whenever they were written; None: those that are due.

    Raises RuntimeError when anything went wrong.
    """
    policy = store.view.routing.policy(table)
    assert policy is not None
    now_us = time.time_ns() // 1_000
    cut_offs = chosen_cut_offs(policy, now_us, before=before, by_event_time=before is not None)
    task = TableSink(table.encode(), policy, cut_offs)
    report = await drive(sink(store.view, [task], run=run, now_us=now_us, settings=settings), store.carrier)
    if report.errors:
        raise RuntimeError(f"the sink failed: {report.errors[0]}")
    return report


async def until_it_answers(store: AsyncStore, table: str) -> None:
    """Wait until the cluster takes reads."""
    deadline = time.monotonic() + _START_S
    while True:
        try:
            await store.table(table).timeline("nobody")
            return
        except TimeTierError:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(_POLL_S)


async def until_evicted(store: AsyncStore) -> None:
    """Wait until the storage nodes have no work left that a sink gave them."""
    deadline = time.monotonic() + _EVICTED_S
    while True:
        nodes = (await store.status())["nodes"]
        if not any(node.get("chores", 1) for name, node in nodes.items() if name.startswith("storage")):
            return
        if time.monotonic() > deadline:
            raise RuntimeError(f"the storage nodes still evict rows {_EVICTED_S:.0f} s after the sink")
        await asyncio.sleep(2 * _POLL_S)
