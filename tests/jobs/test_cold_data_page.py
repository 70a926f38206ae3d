"""The examples in `docs/cold-data.md` give what the page says; for those with Ray see `actors/test_cold_ray.py`."""

from __future__ import annotations

from pathlib import Path

from open_tiers import tiers_in_thread
from page_examples import examples, fill, run_examples
from storage_cluster import POLICY


def test_the_examples_with_pyarrow_duckdb_and_polars_give_what_the_page_says(tmp_path: Path) -> None:
    with tiers_in_thread(tmp_path, tables={"moments": POLICY}) as tiers:
        moments = tiers.table("moments")
        tiers.sink_all(fill(moments), "moments")
        run_examples(examples(ray=False), moments=moments)
