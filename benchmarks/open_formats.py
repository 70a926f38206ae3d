"""Real events, sunk in full and read in place by pyarrow, DuckDB, Polars and Ray Data, each compared with the file.

    python -m benchmarks.open_formats [--json] [--rows N]

Starts a Ray and a cluster of its own in a temporary folder, loads the sample (264,513 events), sinks all of it, and
reads the cold dataset with each of the four: rows, whether they are those of the file, and seconds. The exit status is
1 if any differs. What goes on is told on stderr.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pyarrow as pa
import pyarrow.parquet as pq
from timetier.cluster.client.faces import Store, Table
from timetier.jobs.load import load_file
from timetier.jobs.rejects import Rejects
from timetier.jobs.rows import read_rows
from timetier.jobs.sample import SAMPLE, SAMPLE_COLUMNS, SAMPLE_ROWS, SAMPLE_TABLE
from timetier.jobs.sources import open_source

NAMESPACE = "timetier-open"
COLUMNS = ["owner", "timestamp", "id", "value"]
_PER_SECOND = 1_000_000

Read = Callable[[], pa.Table]


def sample_of(folder: Path, rows: int) -> Path:
    """The sample, or a file with the first `rows` of it."""
    if rows >= SAMPLE_ROWS:
        return SAMPLE
    path = folder / "sample.parquet"
    pq.write_table(pq.read_table(SAMPLE).slice(0, rows), path)
    return path


def rows_of_file(path: Path) -> pa.Table:
    """What a dataset must have: COLUMNS, sorted."""
    batches = []
    with Rejects(None) as rejects:
        for batch in read_rows(open_source(path, rejects, None), SAMPLE_COLUMNS, _PER_SECOND, rejects):
            columns = [pa.array(c, pa.binary()) for c in (batch.owners, batch.ids, batch.values)]
            owners, ids, values = columns
            batches.append(pa.table([owners, pa.array(batch.timestamps, pa.int64()), ids, values], names=COLUMNS))
    return in_order(pa.concat_tables(batches))


def in_order(table: pa.Table) -> pa.Table:
    """COLUMNS of a table with their own types, sorted, so that equal content compares equal."""
    types = [pa.binary(), pa.int64(), pa.binary(), pa.binary()]
    plain = pa.table([table[name].cast(kind) for name, kind in zip(COLUMNS, types, strict=True)], names=COLUMNS)
    return plain.sort_by([(name, "ascending") for name in COLUMNS[:3]]).combine_chunks()


def readers(table: Table) -> dict[str, Read]:
    """The four ways to read all cold data of a table. Each takes a dataset of its own."""

    def by_duckdb() -> pa.Table:
        import duckdb

        cold = table.cold_dataset()
        found = duckdb.connect().from_arrow(cold).to_arrow_table()
        return found if isinstance(found, pa.Table) else found.read_all()

    def by_polars() -> pa.Table:
        import polars

        return polars.scan_pyarrow_dataset(table.cold_dataset()).collect().to_arrow()

    def by_ray() -> pa.Table:
        import ray

        blocks = table.cold_ray_dataset().to_arrow_refs()
        return pa.concat_tables(ray.get(blocks))

    return {
        "pyarrow": lambda: table.cold_dataset().to_table(),
        "duckdb": by_duckdb,
        "polars": by_polars,
        "ray": by_ray,
    }


def compare(reads: dict[str, Read], expected: pa.Table) -> dict[str, dict[str, Any]]:
    """For each reader: rows, seconds, and whether it found exactly what was expected."""
    found: dict[str, dict[str, Any]] = {}
    for name, read in reads.items():
        began = time.perf_counter()
        table = read()
        seconds = time.perf_counter() - began
        found[name] = {
            "rows": table.num_rows,
            "equal": in_order(table).equals(expected),
            "seconds": round(seconds, 2),
            "rows_per_s": round(table.num_rows / seconds),
        }
    return found


@contextlib.contextmanager
def own_cluster(folder: Path) -> Iterator[Store]:
    """A Ray and a cluster in it that end with this."""
    from timetier import connect
    from timetier.actors.launch import start_cluster
    from timetier.actors.local_ray import start_local_ray, stop_local_ray
    from timetier.actors.ray_session import connect_ray

    try:
        start_local_ray(folder)
        connect_ray(data_dir=folder)
        start_cluster(None, namespace=NAMESPACE, data_dir=folder)
        with connect(namespace=NAMESPACE) as store:
            yield store
    finally:
        import ray

        ray.shutdown()
        stop_local_ray(folder)


def sink_all(rows: int) -> dict[str, Any]:
    """Sink until so many rows have sunk; reports of the runs, added up."""
    from timetier.actors.jobs_client import SUCCEEDED, SinkOptions
    from timetier.jobs.cli_sink import follow_sink

    total: dict[str, Any] = {"rows": 0, "blocks": 0, "files": 0, "cold_bytes": 0, "raw_bytes": 0, "runs": 0}
    while total["rows"] < rows and total["runs"] < 5:  # what was written a moment ago may be left for the next run
        options = SinkOptions(before=1 << 62, by_event_time=True, table=SAMPLE_TABLE)
        report = asyncio.run(follow_sink(NAMESPACE, options, lambda done, total: None))
        if report["state"] != SUCCEEDED:
            raise SystemExit(f"the sink failed: {report['reason']}")
        for name in ("rows", "blocks", "files", "cold_bytes", "raw_bytes"):
            total[name] += report[name]
        total["runs"] += 1
    return total


def measure(folder: Path, rows: int) -> dict[str, Any]:
    """The whole run."""
    path = sample_of(folder, rows)
    expected = rows_of_file(path)
    with own_cluster(folder) as store:
        table = store.table(SAMPLE_TABLE)
        print("loading", file=sys.stderr)
        loaded = load_file(table, path, SAMPLE_COLUMNS)
        print("sinking", file=sys.stderr)
        sunk = sink_all(loaded.loaded)
        print("reading", file=sys.stderr)
        return {"loaded": loaded.loaded, "sunk": sunk, "readers": compare(readers(table), expected)}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--rows", type=click.IntRange(1, SAMPLE_ROWS), default=SAMPLE_ROWS, show_default=True, help="Events.")
def main(as_json: bool, rows: int) -> None:
    """Load real events, sink all of them, and read them with pyarrow, DuckDB, Polars and Ray Data."""
    with tempfile.TemporaryDirectory(prefix="timetier-open-") as folder:
        found = measure(Path(folder), rows)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        print(f"{found['loaded']:,} rows loaded, {found['sunk']['rows']:,} sunk in {found['sunk']['blocks']:,} blocks")
        for name, figures in found["readers"].items():
            word = "equal" if figures["equal"] else "DIFFERENT"
            print(f"{name:8} {figures['rows']:>9,} rows  {word}  {figures['seconds']} s")
    sys.exit(0 if all(figures["equal"] for figures in found["readers"].values()) else 1)


if __name__ == "__main__":
    main()
