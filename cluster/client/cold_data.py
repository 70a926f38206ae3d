"""Cold datasets of a table: what `AsyncTable.cold_dataset` and its kin do."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow.dataset as ds

from ..cold.block_source import BlockSource
from ..cold.dataset import Shape, open_dataset
from ..cold.live import Fragment, live_blocks
from ..cold.overlays import LookSettings
from ..drive import drive

if TYPE_CHECKING:
    from .store import AsyncTable

Run = Callable[[Coroutine[Any, Any, Any]], Any]
"""Runs a coroutine on the event loop of a store, and waits for its result. Called from other threads."""


class LiveData(NamedTuple):
    """What a dataset of a table is made of: data alone, for whoever reads it, wherever that is."""

    table: str
    fragments: list[Fragment]
    shape: Shape


async def live_data_of(table: AsyncTable, *, text: bool, times: bool, settings: LookSettings | None = None) -> LiveData:
    """The live blocks of a table as of an instant after the call. Raises InvalidRequest, Unavailable."""
    shape = Shape(table.policy, text=text, times=times)
    fragments = await drive(live_blocks(table.store.view, table.name.encode(), settings), table.store.carrier)
    return LiveData(table.name, fragments, shape)


def source_of(table: AsyncTable, run: Run) -> BlockSource:
    """Reads live blocks of a table, from any thread but that of its event loop."""
    return BlockSource(table.store.view, table.store.carrier, run, table.name.encode())


async def dataset_of(
    table: AsyncTable, *, text: bool, times: bool, run: Run, settings: LookSettings | None = None
) -> ds.Dataset:
    """A dataset of the live rows of a table. Raises InvalidRequest, Unavailable."""
    data = await live_data_of(table, text=text, times=times, settings=settings)
    return open_dataset(data.table, data.fragments, data.shape, source_of(table, run).read)
