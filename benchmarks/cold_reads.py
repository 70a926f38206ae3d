"""Cold reads: single items that have sunk, beside a raw read and decode of the very same block.

Each block is read once for the figures "from disk" or "page cache", so it is in nobody's memory, and then once more
for "decoded", for another owner, which finds it decoded in the cold node. Before a read from disk the kernel is told
to forget the pages of the block. `benchmarks.compare` does this in its own cluster; `benchmarks.cold` starts one of
processes (`nodes.py`) and tells the CPU of each tier as well, how often the cold nodes read from a file for a read (by
the kernel's own count of their system calls), and what the read of an item whose page is in memory takes there.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from timetier.cluster.client.store import AsyncStore, AsyncTable
from timetier.cluster.cold.block import decode_block, read_index
from timetier.cluster.cold.sink_calls import SinkSettings
from timetier.cluster.config import Config
from timetier.cluster.keys import bucket_of, item_keys_timestamps, timeline_key
from timetier.jobs.bench_data import Dataset
from timetier.jobs.bench_report import spread

from .nodes import NodeProcesses, open_store
from .processes import cpu_by_part
from .sink_runs import run_sink, until_evicted, until_it_answers

TABLE = "bench-cold"
_PER_OWNER = 128
_STEP_US = 60_000_000
_WINDOWS_AGO = 24
_OWNERS_PER_CALL = 64
_AROUND_BYTES = 1 << 20
_DONTNEED = os.POSIX_FADV_DONTNEED
TIERS = ("client", "cache", "storage", "cold")

Tell = Callable[[int, int | None], None]
Sink = Callable[[str, int], Awaitable[None]]
"""Moves a table's items older than an instant (its unit) to the cold tier. Raises RuntimeError."""
Cpu = Callable[[], dict[str, float]]


@dataclass(frozen=True)
class ColdBlock:
    """Where a block lies in each copy of its file, and two items (owner and timestamp) in it."""

    files: list[Path]
    offset: int
    length: int
    rows: int
    items: list[tuple[str, int]]


class ColdReads:
    """Loads old items into some buckets only, so that their blocks are of full size, and sinks them."""

    def __init__(
        self,
        store: AsyncStore,
        folder: Path,
        sink_table: Sink,
        seed: int,
        *,
        cpu: Cpu | None = None,
        file_reads: Callable[[], int] | None = None,
    ) -> None:
        """`folder`: where the cold nodes' folders are. Read before and after each read: `cpu`, seconds by part, and
        `file_reads`, how often cold nodes have read from a file."""
        self.cpu_us: dict[str, list[dict[str, float]]] = {}  # of each read, by way of reading and part
        self.file_reads: dict[str, list[int]] = {}  # the same
        self._store, self._folder, self._sink = store, folder, sink_table
        self._table: AsyncTable = store.table(TABLE)
        self._random = random.Random(seed)
        self._cpu = cpu
        self._file_reads = file_reads
        self._blocks: list[ColdBlock] = []
        self._data: Dataset

    async def prepare(self, blocks: int, rows: int, tell: Tell) -> dict[str, Any]:
        """Load and sink about `rows` rows in each of `blocks` buckets; figures of what came out."""
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
        await self._sink(TABLE, start + window)
        await until_evicted(self._store)
        self._blocks = self._find()
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
            first, second = block.items
            raw = self._raw(block, from_disk)
            (_drop if from_disk else _read)(block)
            read = await self.get(*first, how)
            decoded = await self.get(*second, "decoded")
            for name, took in ((f"raw_{how}", raw), (how, read), ("decoded", decoded)):
                found.setdefault(name, []).append(round(took * 1e6, 1))
        return found

    async def get(self, owner: str, timestamp: int, how: str) -> float:
        """Read one item; seconds that it took. CPU is noted under `how`. Raises RuntimeError for a wrong value."""
        before = self._cpu() if self._cpu is not None else {}
        reads = self._file_reads() if self._file_reads is not None else 0
        began = time.perf_counter()
        item = await self._table.get(owner, timestamp)
        took = time.perf_counter() - began
        if self._cpu is not None:
            self.cpu_us.setdefault(how, []).append(
                {name: 1e6 * (spent - before[name]) for name, spent in self._cpu().items()}
            )
        if self._file_reads is not None:
            self.file_reads.setdefault(how, []).append(self._file_reads() - reads)
        if item is None or item.value != self._data.value(owner, timestamp):
            raise RuntimeError(f"the item of {owner} at {timestamp} was not read as it had been written")
        return took

    async def in_memory(self, reads: int) -> list[float]:
        """Microseconds of reads of an item whose page the cache node has."""
        owner, timestamp = f"{self._data.prefix}{self._data.owners:08d}", self._data.base
        await self._table.put(owner, timestamp, self._data.value(owner, timestamp))
        await self._table.timeline(owner)
        return [round(1e6 * await self.get(owner, timestamp, "memory"), 1) for _ in range(reads)]

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

    def _find(self) -> list[ColdBlock]:
        """One block of each bucket, the largest, as the files tell of them."""
        copies: dict[str, list[Path]] = {}
        for path in self._folder.glob("cold-*/disk-*/*.arrow"):
            copies.setdefault(path.name, []).append(path)
        found: dict[int, ColdBlock] = {}
        for paths in copies.values():
            index = read_index(str(paths[0]))
            if index.table != TABLE.encode():
                continue
            for entry in index.blocks:
                known = found.get(entry.bucket)
                if known is None or known.rows < entry.rows:
                    items = self._items_of(paths[0], entry.offset, entry.length)
                    found[entry.bucket] = ColdBlock(paths, entry.offset, entry.length, entry.rows, items)
        blocks = list(found.values())
        self._random.shuffle(blocks)
        return blocks

    def _items_of(self, path: Path, offset: int, length: int) -> list[tuple[str, int]]:
        """Two items of a block, of two owners if it has them."""
        rows = decode_block(_pread(path, offset, length)).all_rows()
        timestamps = item_keys_timestamps(rows.keys)
        by_owner: dict[str, list[int]] = {}
        for owner, timestamp in zip(rows.owners, timestamps.tolist(), strict=True):
            by_owner.setdefault(owner.decode(), []).append(timestamp)
        names = self._random.sample(sorted(by_owner), min(2, len(by_owner)))
        return [(name, self._random.choice(by_owner[name])) for name in (names[0], names[-1])]

    @staticmethod
    def _raw(block: ColdBlock, from_disk: bool) -> float:
        """Seconds of a `pread` of the block and its decoding, in this process."""
        (_drop if from_disk else _read)(block)
        began = time.perf_counter()
        decode_block(_pread(block.files[0], block.offset, block.length))
        return time.perf_counter() - began


def _pread(path: Path, offset: int, length: int) -> bytes:
    file = os.open(path, os.O_RDONLY)
    try:
        return os.pread(file, length, offset)
    finally:
        os.close(file)


def _drop(block: ColdBlock) -> None:
    """Have the kernel forget what it holds of a block, and of its neighbours, which it may have read along."""
    for path in block.files:
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, max(0, block.offset - _AROUND_BYTES), block.length + 2 * _AROUND_BYTES, _DONTNEED)
        os.close(file)


def _read(block: ColdBlock) -> None:
    for path in block.files:
        _pread(path, block.offset, block.length)


# ---------------------------------------------------------------- in a cluster of its own


async def measure(
    folder: Path, blocks: int, rows: int, settings: SinkSettings, seed: int, tell: Tell
) -> dict[str, Any]:
    """All figures, in a cluster in `folder`; ready for JSON."""
    config = Config.from_json(json.dumps({"data_dir": str(folder), "default_table": {"timestamp_unit": "us"}}))
    with NodeProcesses(folder, config) as nodes:
        store = open_store(folder, config)
        tiers = {tier: [pid for name, pid in nodes.pids.items() if name.startswith(tier)] for tier in TIERS}
        tiers["client"] = [os.getpid()]

        async def sink_table(table: str, before: int) -> None:
            report = await run_sink(store, table, before=before, settings=settings, run="cold")
            if report.rows != blocks * max(2, rows // _PER_OWNER) * _PER_OWNER:
                raise RuntimeError(f"the sink moved {report.rows} rows")

        await until_it_answers(store, TABLE)
        reads = ColdReads(
            store,
            folder,
            sink_table,
            seed,
            cpu=lambda: cpu_by_part(tiers),
            file_reads=lambda: file_reads(tiers["cold"]),
        )
        about = await reads.prepare(blocks, rows, tell)
        memory = await reads.in_memory(200)
        times = {**await reads.measure(0, 1), "memory": memory[20:]}
        await store.close()
    cpu = {
        how: {tier: round(float(np.median([one[tier] for one in found])), 1) for tier in TIERS}
        for how, found in reads.cpu_us.items()
    }
    return {
        **about,
        "us": {name: _spread(found) for name, found in times.items()},
        "cpu_us": cpu,
        "file_reads": {how: spread(found, 0) for how, found in reads.file_reads.items()},
        "samples": times,
    }


def file_reads(pids: list[int]) -> int:
    """System calls of processes that read from files, as the kernel has counted them; sockets do not count."""
    total = 0
    for pid in pids:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
        total += next(int(line.split()[1]) for line in lines if line.startswith("syscr:"))
    return total


def _spread(times: list[float]) -> dict[str, float]:
    at = {f"p{share}": round(float(np.percentile(times, share)), 1) for share in (90, 99)}
    return {**spread(times), **at}


def print_reads(report: dict[str, Any]) -> None:
    """The figures of `measure`, for people."""
    print(f"{report['blocks']} blocks of {report['rows_a_block']:,} rows, {report['bytes_a_block']:,} bytes on disk")
    print(
        f"{'us':32} {'p50':>8} {'p99':>8} {'min':>8} {'file reads':>10}   CPU us: {' '.join(f'{t:>8}' for t in TIERS)}"
    )
    for name, title in (
        ("raw_disk", "pread and decode, from disk"),
        ("disk", "cold read, from disk"),
        ("raw_page_cache", "pread and decode, page cache"),
        ("page_cache", "cold read, page cache"),
        ("decoded", "cold read, block decoded already"),
        ("memory", "read of a page in memory"),
    ):
        found = report["us"][name]
        cpu = report["cpu_us"].get(name, {})
        told = " ".join(f"{cpu[tier]:8,.0f}" for tier in TIERS) if cpu else ""
        counted = f"{report['file_reads'][name]['median']:.0f}" if name in report["file_reads"] else ""
        times = " ".join(f"{found[name]:8,.0f}" for name in ("median", "p99", "min"))
        print(f"{title:32} {times} {counted:>10}           {told}")
    for how in ("disk", "page_cache"):
        ratio = report["us"][how]["median"] / report["us"][f"raw_{how}"]["median"]
        print(f"cold read to pread and decode, {how.replace('_', ' ')}: {ratio:.1f}x")
