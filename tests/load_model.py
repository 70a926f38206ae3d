"""A table in memory and small files, for tests of the file loader."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.csv
import pyarrow.ipc
import pyarrow.parquet
from timetier.cluster.client.items import AddressLike, Item, PutLike
from timetier.cluster.topology import TablePolicy
from timetier.jobs.load import LoadReport, load_file
from timetier.jobs.rows import Columns

Key = tuple[bytes, int, bytes]
COLUMNS = Columns("who", "at", ("id",))


class MemoryTable:
    """Keeps items in a dict, and lets a test make calls fail."""

    def __init__(self, per_second: int = 1_000_000) -> None:
        self.policy = TablePolicy(per_second, 0, 1)
        self.items: dict[Key, bytes] = {}
        self.puts = 0
        self.largest_call = (0, 0)
        self.before_put: Callable[[Sequence[PutLike]], None] = lambda items: None
        self._lock = threading.Lock()

    def put_many(self, items: Sequence[PutLike]) -> list[int]:
        with self._lock:
            sizes = [len(item[0]) + len(item[2]) for item in items]
            self.largest_call = max(self.largest_call[0], len(items)), max(self.largest_call[1], sum(sizes))
            self.before_put(items)
            for item in items:
                self.put(item)
            return [1] * len(items)

    def put(self, item: PutLike) -> None:
        owner, timestamp, value, item_id = (*item, b"")[:4]
        assert isinstance(owner, bytes)
        assert isinstance(item_id, bytes)
        self.items[owner, timestamp, item_id] = value
        self.puts += 1

    def get_many(self, keys: Sequence[AddressLike]) -> list[Item | None]:
        with self._lock:
            found = [self.items.get(cast(Key, key)) for key in keys]
        return [None if value is None else Item(0, value, b"", 1, 0) for value in found]


def accounted(report: LoadReport) -> int:
    return report.loaded + report.unchanged + report.duplicates + report.overwritten + report.rejected


def write_table(folder: Path, table: pa.Table, name: str) -> Path:
    path = folder / name
    if name.endswith(".parquet"):
        pa.parquet.write_table(table, path)
    elif name.endswith(".arrow"):
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    elif name.endswith(".arrows"):
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    elif name.endswith(".csv"):
        pa.csv.write_csv(table, path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    return path


def load_rows(folder: Path, rows: dict[str, Any], columns: Columns = COLUMNS, **options: Any) -> Loaded:
    return load_path(write_table(folder, pa.table(rows), "rows.parquet"), columns, **options)


class Loaded:
    def __init__(self, report: LoadReport, items: dict[Key, bytes], rejects: list[dict[str, Any]]) -> None:
        self.report = report
        self.items = items
        self.rejects = rejects
        self.reasons = [(entry["row"], entry["reason"]) for entry in rejects]
        assert accounted(report) == report.rows
        assert report.rejected == len(rejects)


def load_path(path: Path, columns: Columns = COLUMNS, *, per_second: int = 1_000_000, **options: Any) -> Loaded:
    table = MemoryTable(per_second)
    rejects = path.parent / "rejects.jsonl"
    report = load_file(table, path, columns, rejects=rejects, **options)
    return Loaded(report, table.items, [json.loads(line) for line in rejects.read_text().splitlines()])
