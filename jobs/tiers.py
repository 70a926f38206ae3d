"""Looks at all tiers of a running cluster (`cluster/tiering.py`)."""

from __future__ import annotations

import time
from collections.abc import Callable

from ..actors.connecting import connect_async
from ..cluster.config import PricesConfig
from ..cluster.drive import drive
from ..cluster.tiering import Survey, survey
from ..cluster.topology import Topology


async def run_tiers(
    namespace: str,
    *,
    table: str | None = None,
    exact: bool = False,
    error: float = 0.05,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> tuple[Survey, PricesConfig, Topology]:
    """The survey of the cluster in a Ray namespace, its prices and its shape.

    Raises Unavailable when there is no such cluster or a storage group does not answer, InvalidRequest for an unknown
    table.
    """
    store = await connect_async(namespace=namespace)
    try:
        if table is not None:
            store.table(table)
        now_us = time.time_ns() // 1_000
        script = survey(store.view, now_us=now_us, table=table, exact=exact, error=error, progress=progress)
        return await drive(script, store.carrier), store.config.prices, store.view.routing.topology
    finally:
        await store.close()
