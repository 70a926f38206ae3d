"""The command that shows all three tiers at work on real events."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from .cli_common import json_option, note, progress, show, table_of


@click.command()
@click.option(
    "--data-dir",
    type=click.Path(file_okay=False, resolve_path=True, path_type=Path),
    help="A fresh folder, which is kept.  [default: a temporary one]",
)
@click.option("--seed", default=0, show_default=True, help="Decides which items are read singly, which actors killed.")
@json_option
def demo(data_dir: Path | None, seed: int, as_json: bool) -> int:
    """Load, read, age and compare a quarter of a million real events, with actors killed on the way.

    Starts a cluster of its own and leaves nothing running. The exit status is 1 if anything is lost or different.
    """
    from .demo import DemoReport, run_demo

    report: DemoReport = run_demo(data_dir, progress, seed=seed)
    fields = dataclasses.asdict(report)
    rows = [
        [name, f"{value:,}" if isinstance(value, (int, float)) else ", ".join(value)] for name, value in fields.items()
    ]
    show(fields, table_of(["figure", "value"], rows), as_json=as_json)
    if not report.good:
        note("timetier: the demonstration found items that are lost or different")
    return 0 if report.good else 1
