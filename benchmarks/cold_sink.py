"""Real events sunk in full: items a second, CPU, bytes of an item in each tier, and who else can read them afterwards.

The sample that ships with the package is loaded into a cluster of processes (`nodes.py`) and sinks as fast as it can:
without rests and limits, which `benchmarks.beside` looks at. The bytes of storage are those of RocksDB's files and
write buffers of one replica, as a storage node tells them, rows, log and all; the bytes of cold are one copy of the
files.

Then the rows of the files are counted in place by whatever reads Arrow here: pyarrow, and DuckDB and Polars where they
are installed. Each must find exactly what was loaded.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from timetier.cluster.client.store import AsyncStore, AsyncTable
from timetier.cluster.cold.block import read_index
from timetier.cluster.cold.sink_calls import SinkSettings
from timetier.cluster.config import Config
from timetier.jobs.rejects import Rejects
from timetier.jobs.rows import Columns, read_rows
from timetier.jobs.sources import open_source

from .nodes import NodeProcesses, open_store
from .processes import cpu_by_part
from .sink_runs import run_sink, until_evicted, until_it_answers

TABLE = "commits"
_ITEMS_A_CALL = 5_000
_CALLS_AT_ONCE = 4
_QUICK_ITEMS = 10_000
_FAR_US = 4_000_000_000_000_000  # every item is older
_TIERS = ("storage", "cold")
_GIB = 1 << 30

Tell = Callable[[str], None]


def config_in(folder: Path, buckets: int) -> Config:
    """The embedded default, with the sample's table."""
    table = {"timestamp_unit": "us", "cold_after": "730d", "window": "4y"}
    return Config.from_json(json.dumps({"buckets": buckets, "data_dir": str(folder), "tables": {TABLE: table}}))


def batches(path: Path, columns: Columns) -> Iterator[list[tuple[bytes, int, bytes, bytes]]]:
    """Items of a file, some thousand at a time."""
    with Rejects(None) as rejects:
        for batch in read_rows(open_source(path, rejects, None), columns, 1_000_000, rejects):
            rows = list(zip(batch.owners, batch.timestamps, batch.values, batch.ids, strict=True))
            for first in range(0, len(rows), _ITEMS_A_CALL):
                yield rows[first : first + _ITEMS_A_CALL]


async def load(table: AsyncTable, path: Path, columns: Columns, tell: Tell, limit: int | None) -> tuple[int, int]:
    """Write all items of a file, or about the first `limit`; (different items, their raw bytes)."""
    seen: dict[tuple[bytes, int, bytes], int] = {}
    waiting: set[asyncio.Task[list[int]]] = set()
    for number, batch in enumerate(batches(path, columns)):
        seen.update({(owner, when, item_id): len(value) for owner, when, value, item_id in batch})
        waiting.add(asyncio.create_task(table.put_many(batch)))
        if len(waiting) == _CALLS_AT_ONCE:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        if number % 10 == 9:
            tell(f"loaded {len(seen):,} items")
        if limit is not None and len(seen) >= limit:
            break
    await asyncio.gather(*waiting)
    return len(seen), sum(len(owner) + 8 + len(item_id) + size for (owner, _, item_id), size in seen.items())


async def storage_bytes(store: AsyncStore) -> float:
    """Bytes of the engine of one replica, on average."""
    nodes = (await store.status())["nodes"]
    return float(np.mean([node["engine_bytes"] for name, node in nodes.items() if name.startswith("storage")]))


async def measure(
    folder: Path, path: Path, columns: Columns, *, buckets: int, tell: Tell, quick: bool = False
) -> dict[str, Any]:
    """Load, sink, and count; figures ready for JSON. `quick`: the first items only.

    Raises RuntimeError where a count is wrong.
    """
    config = config_in(folder, buckets)
    with NodeProcesses(folder, config) as nodes:
        store = open_store(folder, config)
        tiers = {tier: [pid for name, pid in nodes.pids.items() if name.startswith(tier)] for tier in _TIERS}
        await until_it_answers(store, TABLE)
        items, raw = await load(store.table(TABLE), path, columns, tell, _QUICK_ITEMS if quick else None)
        stored = await storage_bytes(store)
        tell(f"sinking {items:,} items")
        before, began, own = cpu_by_part(tiers), time.perf_counter(), time.process_time()
        rows = runs = 0
        report = None
        while rows < items:  # a replica may not have heard of the last writes
            runs += 1
            report = await run_sink(store, TABLE, before=_FAR_US, settings=SinkSettings(), run=f"full-{runs}")
            if not report.rows:
                break
            rows += report.rows
        seconds = time.perf_counter() - began
        sink_cpu = time.process_time() - own
        await until_evicted(store)
        after = cpu_by_part(tiers)
        if rows != items:
            raise RuntimeError(f"{items} items were loaded, but {rows} sank")
        tell("counting")
        counts = await asyncio.to_thread(count_rows, folder, items)
        left = await storage_bytes(store)
        await store.close()
    cpu_us = {tier: round((after[tier] - before[tier]) / items * 1e6, 1) for tier in _TIERS}
    files = shape_of(folder)
    cold = files["file_bytes"]
    return {
        "items": items,
        "raw_bytes": raw,
        "buckets": buckets,
        "sink_runs": runs,
        "seconds": round(seconds, 2),
        "items_per_s": round(items / seconds),
        "raw_mb_per_s": round(raw / seconds / 1e6, 2),
        "cpu_us_per_item": {"sink": round(sink_cpu / items * 1e6, 1), **cpu_us},
        "bytes_per_item": {
            "raw": round(raw / items, 2),
            "storage": round(stored / items, 2),
            "storage_after": round(left / items, 2),
            "cold": round(cold / items, 2),
        },
        "cold_to_raw": round(cold / raw, 3),
        "cold_to_storage": round(cold / stored, 3),
        "files": files,
        "blocks_per_gib_raw": round(files["blocks"] / raw * _GIB),
        "blocks_per_gib_cold": round(files["blocks"] / cold * _GIB),
        "files_per_gib_raw": round(files["files"] / raw * _GIB, 1),
        "files_per_gib_cold": round(files["files"] / cold * _GIB, 1),
        "read_by": counts,
    }


def shape_of(folder: Path) -> dict[str, Any]:
    """Files and blocks of one copy of the cold data, and the sizes of the blocks."""
    paths = _files(folder)
    entries = [entry for path in paths for entry in read_index(str(path)).blocks]
    lengths, rows = [entry.length for entry in entries], [entry.rows for entry in entries]
    shares = (10, 50, 90, 99)
    return {
        "files": len(paths),
        "file_bytes": sum(path.stat().st_size for path in paths),
        "blocks": len(entries),
        "block_bytes": {f"p{share}": round(float(np.percentile(lengths, share))) for share in shares},
        "block_rows": {f"p{share}": round(float(np.percentile(rows, share))) for share in shares},
    }


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("cold-0-0/disk-*/*.arrow"))


# ---------------------------------------------------------------- who else can read it


def count_rows(folder: Path, expected: int) -> dict[str, dict[str, float]]:
    """Rows and seconds, by reader, of the files in place. Raises RuntimeError if a reader finds another number."""
    paths = [str(path) for path in _files(folder)]
    found: dict[str, dict[str, float]] = {}
    for name, count in READERS.items():
        if importlib.util.find_spec(name) is None:
            continue
        began = time.perf_counter()
        rows = count(paths)
        found[name] = {"rows": rows, "seconds": round(time.perf_counter() - began, 2)}
        if rows != expected:
            raise RuntimeError(f"{name} reads {rows} rows of the {expected} that were loaded")
    return found


def _by_pyarrow(paths: list[str]) -> int:
    import pyarrow.dataset

    return sum(batch.num_rows for batch in pyarrow.dataset.dataset(paths, format="arrow").to_batches())


def _by_duckdb(paths: list[str]) -> int:
    import duckdb
    import pyarrow.dataset

    cold = pyarrow.dataset.dataset(paths, format="arrow")
    with duckdb.connect() as connection:
        connection.register("cold", cold)
        row = connection.execute(
            "select count(*), count(distinct owner), sum(octet_length(value)) from cold"
        ).fetchone()
    assert row is not None
    return int(row[0])


def _by_polars(paths: list[str]) -> int:
    import polars

    return int(polars.scan_ipc(paths).collect().height)


READERS: dict[str, Callable[[list[str]], int]] = {
    "pyarrow": _by_pyarrow,
    "duckdb": _by_duckdb,
    "polars": _by_polars,
}


def print_sink(report: dict[str, Any]) -> None:
    """The figures of `measure`, for people."""
    size, cpu, files = report["bytes_per_item"], report["cpu_us_per_item"], report["files"]
    print(
        f"{report['items']:,} items sank in {report['seconds']} s: {report['items_per_s']:,} a second, "
        f"{report['raw_mb_per_s']} MB/s; CPU us an item: {', '.join(f'{tier} {used}' for tier, used in cpu.items())}"
    )
    print(
        f"bytes an item: raw {size['raw']}, storage {size['storage']} (one replica), cold {size['cold']} (one copy), "
        f"{report['cold_to_raw']} of raw and {report['cold_to_storage']} of storage; "
        f"{size['storage_after']} stay in storage"
    )
    print(
        f"{files['blocks']:,} blocks in {files['files']} files; {report['blocks_per_gib_raw']:,} blocks a GiB "
        f"of raw data, {report['blocks_per_gib_cold']:,} a GiB on disk; rows of a block: "
        + ", ".join(f"{share} {rows:,}" for share, rows in files["block_rows"].items())
    )
    for name, found in report["read_by"].items():
        print(f"{name} reads {found['rows']:,} rows in {found['seconds']} s")
