"""Cold reads: single items that have sunk, beside a raw read and decode of the very same block.

Each block is read once for the figures "from disk" or "page cache", so it is in nobody's memory, and then once more
for "decoded", which finds it in the cache node. Before a read from disk the kernel is told to forget the pages of the
block's files.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from timetier.actors.connecting import ClusterStore
from timetier.cluster.client.store import AsyncTable
from timetier.cluster.cold.block import decode_block, read_index
from timetier.cluster.keys import bucket_of, timeline_key
from timetier.jobs.bench_data import Dataset
from timetier.jobs.cli_sink import follow_sink

TABLE = "bench-cold"
_PER_OWNER = 128
_STEP_US = 60_000_000
_WINDOWS_AGO = 24
_OWNERS_PER_CALL = 64

Tell = Callable[[int, int | None], None]


@dataclass(frozen=True)
class ColdBlock:
    """Where a block lies in each copy of its file, and the owners in it."""

    files: list[Path]
    offset: int
    length: int
    rows: int
    owners: list[str]


class ColdReads:
    """Loads old items into some buckets only, so that their blocks are of full size, and sinks them."""

    def __init__(self, store: ClusterStore, folder: Path, namespace: str, seed: int) -> None:
        self._store, self._folder, self._namespace = store, folder, namespace
        self._table: AsyncTable = store.table(TABLE)
        self._random = random.Random(seed)
        self._blocks: list[ColdBlock] = []
        self._data: Dataset

    async def prepare(self, blocks: int, rows: int, tell: Tell) -> dict[str, Any]:
        """Load and sink `blocks` blocks of about `rows` rows; figures of what came out."""
        window = self._table.policy.window
        start = (int(time.time() * 1e6) // window - _WINDOWS_AGO) * window
        owners = self._owners(blocks, max(2, rows // _PER_OWNER))
        names = [name for bucket in owners.values() for name in bucket]
        numbers = max(int(name[-8:]) for name in names) + 1
        self._data = Dataset("cold-", numbers, start, _STEP_US, per_owner=_PER_OWNER)
        times = [start + at * _STEP_US for at in range(_PER_OWNER)]
        for first in range(0, len(names), _OWNERS_PER_CALL):
            chunk = names[first : first + _OWNERS_PER_CALL]
            await self._table.put_many([self._data.write(name, at) for name in chunk for at in times])
            tell(first + len(chunk), len(names))
        from timetier.actors.jobs_client import SUCCEEDED, SinkOptions  # imports Ray, which is connected by now

        options = SinkOptions(before=start + window, by_event_time=True, table=TABLE)
        found = await follow_sink(self._namespace, options, lambda done, total: None)
        if found["state"] != SUCCEEDED:
            raise RuntimeError(f"the sink failed: {found['reason']}")
        self._blocks = self._find(owners)
        return {
            "blocks": len(self._blocks),
            "rows": len(names) * _PER_OWNER,
            "rows_a_block": round(float(np.mean([block.rows for block in self._blocks]))),
            "bytes_a_block": round(float(np.mean([block.length for block in self._blocks]))),
        }

    async def measure(self, part: int, parts: int) -> dict[str, list[float]]:
        """Read the blocks of part number `part` of `parts`: half of them from disk, half from the page cache.

        Microseconds of each read, by way of reading. Raises RuntimeError for a wrong value.
        """
        found: dict[str, list[float]] = {}
        mine = self._blocks[part::parts]
        for at, block in enumerate(mine):
            from_disk = at % 2 == 0
            how = "disk" if from_disk else "page_cache"
            first, second = self._random.sample(block.owners, 2)
            raw = self._raw(block, from_disk)
            (_drop if from_disk else _read)(block.files)
            read = await self._get(first)
            decoded = await self._get(second)
            for name, took in ((f"raw_{how}", raw), (how, read), ("decoded", decoded)):
                found.setdefault(name, []).append(round(took * 1e6, 1))
        return found

    def _owners(self, blocks: int, owners_a_block: int) -> dict[int, list[str]]:
        """Owners by bucket, for so many buckets."""
        buckets = self._store.view.routing.topology.buckets
        if blocks > buckets:
            raise ValueError(f"{blocks} blocks of {buckets} buckets: there is one a bucket")
        wanted = set(self._random.sample(range(buckets), blocks))
        found: dict[int, list[str]] = {bucket: [] for bucket in wanted}
        number, left = 0, blocks * owners_a_block
        while left:
            name = f"cold-{number:08d}"
            mine = found.get(bucket_of(timeline_key(TABLE.encode(), name.encode(), buckets)))
            if mine is not None and len(mine) < owners_a_block:
                mine.append(name)
                left -= 1
            number += 1
        return found

    def _find(self, owners: dict[int, list[str]]) -> list[ColdBlock]:
        """The blocks, as the files tell of them."""
        copies: dict[str, list[Path]] = {}
        for path in self._folder.glob("cold-*/disk-*/*.arrow"):
            copies.setdefault(path.name, []).append(path)
        found = []
        for paths in copies.values():
            index = read_index(str(paths[0]))
            if index.table == TABLE.encode():
                found += [
                    ColdBlock(paths, entry.offset, entry.length, entry.rows, owners[entry.bucket])
                    for entry in index.blocks
                    if entry.rows == len(owners[entry.bucket]) * _PER_OWNER  # a split one holds who knows whom
                ]
        self._random.shuffle(found)
        return found

    def _raw(self, block: ColdBlock, from_disk: bool) -> float:
        """Seconds of a `pread` of the block and its decoding, in this process."""
        (_drop if from_disk else _read)(block.files)
        file = os.open(block.files[0], os.O_RDONLY)
        try:
            began = time.perf_counter()
            decode_block(os.pread(file, block.length, block.offset))
            return time.perf_counter() - began
        finally:
            os.close(file)

    async def _get(self, owner: str) -> float:
        at = self._data.base + self._random.randrange(_PER_OWNER) * _STEP_US
        began = time.perf_counter()
        item = await self._table.get(owner, at)
        took = time.perf_counter() - began
        if item is None or item.value != self._data.value(owner, at):
            raise RuntimeError(f"the item of {owner} at {at} was not read as it had been written")
        return took


def _drop(files: list[Path]) -> None:
    """Have the kernel forget what it holds of the files."""
    for path in files:
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def _read(files: list[Path]) -> None:
    for path in files:
        path.read_bytes()
