"""Real events, sunk in full and read in place by pyarrow, DuckDB and Polars: the same rows as in the file."""

from __future__ import annotations

from pathlib import Path

from open_tiers import tiers_in_thread
from storage_cluster import POLICY
from timetier.benchmarks.open_formats import COLUMNS, compare, in_order, readers, rows_of_file, sample_of
from timetier.cluster.cold.sink_calls import SinkSettings
from timetier.jobs.load import load_file
from timetier.jobs.sample import SAMPLE_COLUMNS, SAMPLE_TABLE

ROWS = 30_000


def test_real_events_that_have_sunk_are_read_in_place_as_they_were_loaded(tmp_path: Path) -> None:
    path = sample_of(tmp_path, ROWS)
    with tiers_in_thread(tmp_path, tables={SAMPLE_TABLE: POLICY}) as tiers:
        table = tiers.table(SAMPLE_TABLE)
        loaded = load_file(table, path, SAMPLE_COLUMNS).loaded
        assert loaded == ROWS
        tiers.sink_all(loaded, SAMPLE_TABLE, settings=SinkSettings())
        reads = readers(table)
        del reads["ray"]  # this cluster has no Ray; see tests/actors/test_cold_ray.py
        expected = rows_of_file(path)
        found = compare(reads, expected)
        assert [(figures["rows"], figures["equal"]) for figures in found.values()] == [(ROWS, True)] * 3
        assert in_order(table.cold_dataset(text=True).to_table(columns=COLUMNS)).equals(expected)
