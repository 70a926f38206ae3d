"""The command that shows how much of which age lies in which tier, what is read of it, and what that costs."""

from __future__ import annotations

import asyncio
from pathlib import Path

import click

from .cli_common import NAMESPACE, cluster_options, enter, progress, show


@click.command()
@click.option("--table", help="Only this table.  [default: all that have data]")
@click.option("--exact", is_flag=True, help="Ask for every bucket, instead of a sample of them.")
@click.option(
    "--error",
    type=click.FloatRange(min=0.0, max=1.0, min_open=True),
    default=0.05,
    show_default=True,
    help="Relative error up to which the sample grows.",
)
@cluster_options
def tiers(
    table: str | None,
    exact: bool,
    error: float,
    data_dir: Path | None,
    address: str | None,
    namespace: str | None,
    as_json: bool,
) -> None:
    """Show by age what each tier holds, how much of it is read, and what it costs.

    Ages go by event time. Storage and cold figures come from a sample of buckets, as exact as --error says.
    """
    enter(data_dir, address)
    from .tiers import run_tiers
    from .tiers_text import survey_json, survey_text

    with progress("asking buckets") as tell:
        found, prices, shape = asyncio.run(
            run_tiers(namespace or NAMESPACE, table=table, exact=exact, error=error, progress=tell)
        )
    show(survey_json(found, prices, shape), survey_text(found, prices, shape), as_json=as_json)
