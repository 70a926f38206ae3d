"""The commands that compare the replicas of every group, and mend what differs."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .cli_common import NAMESPACE, bytes_text, cluster_options, enter, one_line, progress, show, table_of

if TYPE_CHECKING:
    from ..cluster.comparing import Difference
    from ..cluster.verifying import VerifyReport

_DIGEST_CHARS = 12  # of the digest in a table; JSON has all of it

only_table = click.option("--table", help="Only this table.  [default: all, and the cold links]")
rate_option = click.option(
    "--rate",
    "timelines_per_s",
    type=click.FloatRange(min=1.0),
    default=20_000.0,
    show_default=True,
    help="Timelines a second, at most.",
)
named_option = click.option(
    "--named",
    type=click.IntRange(min=1, max=100_000),
    default=1_000,
    show_default=True,
    help="Differences to list; the others are counted.",
)


@click.command()
@only_table
@rate_option
@named_option
@cluster_options
def verify(
    table: str | None,
    timelines_per_s: float,
    named: int,
    data_dir: Path | None,
    address: str | None,
    namespace: str | None,
    as_json: bool,
) -> int:
    """Compare all replicas of every storage group by digest, while reads and writes go on.

    The exit status is 0 if all of them were compared and hold the same.
    """
    return _run("comparing", table, timelines_per_s, named, False, data_dir, address, namespace, as_json)


@click.command()
@click.option("--dry-run", is_flag=True, help="Only say what would be mended, and from where.")
@only_table
@rate_option
@named_option
@cluster_options
def repair(
    dry_run: bool,
    table: str | None,
    timelines_per_s: float,
    named: int,
    data_dir: Path | None,
    address: str | None,
    namespace: str | None,
    as_json: bool,
) -> int:
    """Compare all replicas, and replace what one of them has where a majority of the others has something else.

    Where no majority agrees nothing is touched. The exit status is 0 if all replicas hold the same afterwards.
    """
    what = "comparing" if dry_run else "mending"
    return _run(what, table, timelines_per_s, named, not dry_run, data_dir, address, namespace, as_json)


def _run(
    what: str,
    table: str | None,
    timelines_per_s: float,
    named: int,
    mend: bool,
    data_dir: Path | None,
    address: str | None,
    namespace: str | None,
    as_json: bool,
) -> int:
    enter(data_dir, address)
    from ..cluster.verifying import VerifySettings
    from .verify import report_json, run_verify, summary

    settings = VerifySettings(timelines_per_s=timelines_per_s, named=named)
    with progress(f"{what} buckets") as tell:
        report = asyncio.run(
            run_verify(
                namespace or NAMESPACE,
                table=table,
                mend=mend,
                settings=settings,
                progress=lambda p: tell(p.buckets_done, p.buckets),
            )
        )
    found: dict[str, Any] = report_json(report)
    show(found, _differences(report) + summary(report), as_json=as_json)
    return 0 if report.ok else 1


def _differences(report: VerifyReport) -> str:
    """A table of the timelines that differ, with an empty line after it; "" if there are none."""
    if not report.differences:
        return ""
    numbers = sorted({replica for difference in report.differences for replica in difference.told})
    headings = ["table", "owner", "group", *(f"replica {number}" for number in numbers), "verdict"]
    rows = [
        [
            bytes_text(difference.table) or "(cold links)",
            one_line(bytes_text(difference.owner)) if difference.owner else f"bucket {difference.bucket}",
            str(difference.group),
            *(_told(difference, number) for number in numbers),
            _verdict(difference),
        ]
        for difference in report.differences
    ]
    counted = report.differing + report.behind + report.undecided + report.mended
    more = counted - len(report.differences)
    return table_of(headings, rows) + (f"\nand {more:,} more" if more else "") + "\n\n"


def _told(difference: Difference, replica: int) -> str:
    told = difference.told.get(replica)
    if told is None:
        return "no answer"
    return f"v{told.version} {told.digest.hex()[:_DIGEST_CHARS]}" if told.known else "can't tell"


def _verdict(difference: Difference) -> str:
    if difference.mended:
        return f"{difference.in_words()}: mended from replica {difference.source}"
    if difference.mended is None and difference.outliers:
        return f"{difference.in_words()}: to be mended from replica {difference.source}"
    return difference.in_words() + (": it could not be mended" if difference.mended is False else "")
