"""Commands about data: put, get, timeline, delete, load."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import IO, Any

import click

from ..cluster.client.faces import Table
from ..cluster.client.items import Item, Page
from ..cluster.keys import MAX_VALUE_BYTES
from .cli_common import (
    bytes_text,
    cluster_options,
    note,
    one_line,
    open_store,
    progress,
    results,
    show,
    table_option,
    value_fields,
)

id_option = click.option("--id", "item_id", default="", help="Id of the item, beside its timestamp.")
if_version_option = click.option("--if-version", type=int, help="Write only if the timeline has this version.")
_PAGE_ITEMS = 1_000


@click.command()
@click.argument("owner")
@click.argument("timestamp", type=int)
@click.argument("value", required=False)
@click.option("--file", "source", type=click.File("rb"), help="Read the value from a file; - is standard input.")
@id_option
@if_version_option
@table_option
@cluster_options
def put(
    owner: str,
    timestamp: int,
    value: str | None,
    source: IO[bytes] | None,
    item_id: str,
    if_version: int | None,
    table: str,
    data_dir: Path | None,
    address: str | None,
    namespace: str | None,
    as_json: bool,
) -> None:
    """Write one item. Before a negative TIMESTAMP write `--`."""
    if (value is None) == (source is None):
        raise click.UsageError("give the value either as VALUE or by --file")
    data = os.fsencode(value) if value is not None else source.read(MAX_VALUE_BYTES + 1) if source else b""
    with open_store(data_dir, address, namespace) as store:
        version = store.table(table).put(
            os.fsencode(owner), timestamp, data, id=os.fsencode(item_id), if_version=if_version
        )
    show({"version": version}, f"version {version}", as_json=as_json)


@click.command()
@click.argument("owner")
@click.argument("timestamp", type=int)
@click.option("--raw", is_flag=True, help="Print exactly the bytes of the value.")
@id_option
@table_option
@cluster_options
def get(
    owner: str,
    timestamp: int,
    raw: bool,
    item_id: str,
    table: str,
    data_dir: Path | None,
    address: str | None,
    namespace: str | None,
    as_json: bool,
) -> int:
    """Print one item: its value, as base64 where it is no UTF-8. The exit status is 1 if there is none."""
    if raw and as_json:
        raise click.UsageError("--raw and --json exclude each other")
    with open_store(data_dir, address, namespace) as store:
        item = store.table(table).get(os.fsencode(owner), timestamp, id=os.fsencode(item_id))
    if item is None:
        if as_json:
            show({"found": False}, "", as_json=True)
        else:
            note("timetier: there is no such item")
        return 1
    if raw:
        results().buffer.write(item.value)
    else:
        show({"found": True, **_item_fields(item)}, bytes_text(item.value), as_json=as_json)
    return 0


@click.command()
@click.argument("owner")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1, 10_000), help="Items at most.")
@click.option("--before", help="Only older items: the `next` of a page, or a timestamp.")
@click.option("--all", "everything", is_flag=True, help="All items (--limit does not count).")
@table_option
@cluster_options
def timeline(
    owner: str,
    limit: int,
    before: str | None,
    everything: bool,
    table: str,
    data_dir: Path | None,
    address: str | None,
    namespace: str | None,
    as_json: bool,
) -> None:
    """Print the newest items of a timeline, newest first: timestamp, id, value."""
    with open_store(data_dir, address, namespace) as store:
        moments = store.table(table)
        page = moments.timeline(os.fsencode(owner), limit=_PAGE_ITEMS if everything else limit, before=_bound(before))
        if everything:
            page = _rest(moments, os.fsencode(owner), page)
    items = [_item_fields(item) for item in page.items]
    lines = [f"{item.timestamp}\t{_cell(item.id)}\t{_cell(item.value)}" for item in page.items]
    if as_json or lines:
        show({"version": page.version, "items": items, "next": page.next}, "\n".join(lines), as_json=as_json)
    if not as_json:
        note(
            f"version {page.version}, {len(items)} items" + (f"; older ones: --before {page.next}" if page.next else "")
        )


@click.command()
@click.argument("owner")
@click.argument("timestamp", type=int, required=False)
@click.option("--all", "everything", is_flag=True, help="Delete the whole timeline.")
@id_option
@if_version_option
@table_option
@cluster_options
def delete(
    owner: str,
    timestamp: int | None,
    everything: bool,
    item_id: str,
    if_version: int | None,
    table: str,
    data_dir: Path | None,
    address: str | None,
    namespace: str | None,
    as_json: bool,
) -> None:
    """Delete one item, or with --all a whole timeline. It is no error if there is none."""
    if (timestamp is None) != everything or (everything and item_id):
        raise click.UsageError("give either TIMESTAMP (and --id), or --all")
    with open_store(data_dir, address, namespace) as store:
        moments = store.table(table)
        if timestamp is None:
            version = moments.delete_timeline(os.fsencode(owner), if_version=if_version)
        else:
            version = moments.delete(os.fsencode(owner), timestamp, id=os.fsencode(item_id), if_version=if_version)
    show({"version": version}, f"version {version}", as_json=as_json)


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, resolve_path=True, path_type=Path))
@click.option("--owner", required=True, help="Column of the owner.")
@click.option("--time", required=True, help="Column of the timestamp.")
@click.option("--id", "id_columns", default="", help="Columns that make up the id, separated by commas.")
@click.option("--format", "file_format", help="parquet, arrow, csv or jsonl.  [default: by the file's name]")
@click.option(
    "--rejects",
    type=click.Path(dir_okay=False, resolve_path=True, path_type=Path),
    help="Write rows that can't be loaded to this file, with the reason.",
)
@table_option
@cluster_options
def load(
    file: Path,
    owner: str,
    time: str,
    id_columns: str,
    file_format: str | None,
    rejects: Path | None,
    table: str,
    data_dir: Path | None,
    address: str | None,
    namespace: str | None,
    as_json: bool,
) -> int:
    """Load a Parquet, Arrow, CSV or JSON lines file. Other columns become the value, as JSON.

    Rows that can't be loaded are counted and told; loading a file again changes nothing. The exit status is 1 if
    every row was rejected.
    """
    from .load import load_file
    from .rows import Columns

    columns = Columns(owner, time, tuple(name.strip() for name in id_columns.split(",") if name.strip()))
    with open_store(data_dir, address, namespace) as store, progress("loading") as tell:
        report = load_file(store.table(table), file, columns, file_format=file_format, rejects=rejects, progress=tell)
    fields = dataclasses.asdict(report)
    lines = [f"{name}: {value:,}" for name, value in fields.items() if isinstance(value, int)]
    lines += [f"rejected: {count:,} {reason}" for reason, count in report.reasons.items()]
    show(fields, "\n".join(lines), as_json=as_json)
    if 0 < report.rows == report.rejected:
        note("timetier: no row of the file could be loaded: look at the reasons, and at --owner, --time and --format")
        return 1
    return 0


def _item_fields(item: Item) -> dict[str, Any]:
    names = {name.replace("value", "id"): text for name, text in value_fields(item.id).items()}
    return {
        "timestamp": item.timestamp,
        **names,
        **value_fields(item.value),
        "version": item.version,
        "written_us": item.written_us,
    }


def _cell(value: bytes) -> str:
    return one_line(bytes_text(value))


def _bound(before: str | None) -> str | int | None:
    """A timestamp or a page token; no token looks like a number, for each ends in the bytes 00 01: A, B, E or Q."""
    try:
        return None if before is None else int(before)
    except ValueError:
        return before


def _rest(moments: Table, owner: bytes, page: Page) -> Page:
    items = list(page.items)
    while page.next is not None:
        page = moments.timeline(owner, limit=_PAGE_ITEMS, before=page.next)
        items += page.items
    return Page(items, page.version, None)
