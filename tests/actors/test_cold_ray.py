"""Cold data as a Ray dataset: read tasks connect by themselves and find every live row."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from page_examples import examples, fill, run_examples
from timetier import Store, connect
from timetier.actors.jobs_client import SUCCEEDED, SinkOptions
from timetier.actors.launch import start_cluster, stop_cluster
from timetier.benchmarks.open_formats import compare, readers, rows_of_file, sample_of
from timetier.cluster.client.cold_data import live_data_of
from timetier.cluster.config import load_config
from timetier.cluster.errors import InvalidRequest
from timetier.jobs.cli_sink import follow_sink
from timetier.jobs.load import load_file
from timetier.jobs.sample import SAMPLE_COLUMNS, SAMPLE_TABLE

NAMESPACE = "test-cold-ray"
ROWS = 10_000


@pytest.fixture(scope="module")
def store(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    config = load_config(None, data_dir=tmp_path_factory.mktemp("ray"))
    start_cluster(config.model_copy(update={"namespace": NAMESPACE, "buckets": 64}))
    with connect(namespace=NAMESPACE) as opened:
        yield opened
    stop_cluster(NAMESPACE)


def sink_all(table: str, rows: int) -> None:
    options = SinkOptions(before=1 << 62, by_event_time=True, table=table)
    sunk = runs = 0
    while sunk < rows:
        assert runs < 5, f"{sunk} of {rows} rows sank"
        found: dict[str, Any] = asyncio.run(follow_sink(NAMESPACE, options, lambda done, total: None))
        assert found["state"] == SUCCEEDED, found["reason"]
        sunk, runs = sunk + found["rows"], runs + 1


def test_ray_data_reads_what_was_loaded_less_what_was_deleted_since(store: Store, tmp_path: Path) -> None:
    path = sample_of(tmp_path, ROWS)
    table = store.table(SAMPLE_TABLE)
    assert load_file(table, path, SAMPLE_COLUMNS).loaded == ROWS
    sink_all(SAMPLE_TABLE, ROWS)
    expected = rows_of_file(path)
    found = compare({"ray": readers(table)["ray"]}, expected)["ray"]
    assert (found["rows"], found["equal"]) == (ROWS, True)

    first = expected.slice(0, 1).to_pylist()[0]
    table.delete(first["owner"], first["timestamp"], id=first["id"])
    dataset = table.cold_ray_dataset(text=True, times=True, parallelism=3)
    assert dataset.count() == ROWS - 1
    assert str(dataset.schema().base_schema.field("owner").type) == "string"

    data = store.run(live_data_of(table.asynchronous, text=False, times=False))
    assert pickle.loads(pickle.dumps(data)).fragments == data.fragments
    with pytest.raises(InvalidRequest, match="parallelism=0"):
        table.cold_ray_dataset(parallelism=0)


def test_the_examples_with_ray_give_what_the_page_says(store: Store) -> None:
    moments = store.table("moments")
    sink_all("moments", fill(moments))
    moments.delete("carol", 0)
    run_examples(examples(ray=True), moments=moments)
