"""The command that says where a timeline and its items are, and why."""

from __future__ import annotations

import os
from pathlib import Path

import click

from .cli_common import cluster_options, open_store, show


@click.command()
@click.argument("table")
@click.argument("owner")
@click.argument("timestamp", type=int, required=False)
@click.option("--id", "item_id", help="Only the item with this id.  [default: all of that instant]")
@cluster_options
def explain(
    table: str,
    owner: str,
    timestamp: int | None,
    item_id: str | None,
    data_dir: Path | None,
    address: str | None,
    namespace: str | None,
    as_json: bool,
) -> None:
    """Say where the timeline of OWNER lies and why, and with TIMESTAMP each item at that instant.

    Replicas and their versions, rows of the storage tier by window, cold links with the copies of their blocks; of an
    item its tier, its versions, and when it may sink. Before a negative TIMESTAMP write `--`.
    """
    if timestamp is None and item_id is not None:
        raise click.UsageError("--id says which item of an instant is meant: give TIMESTAMP too")
    from .explanation_text import explanation_text

    with open_store(data_dir, address, namespace) as store:
        found = store.table(table).explain(
            os.fsencode(owner), timestamp, id=None if item_id is None else os.fsencode(item_id)
        )
    show(found.to_json(), explanation_text(found), as_json=as_json)
