"""The commands that back up a cluster, check a backup, and restore one.

They do the work themselves and don't start a Ray job: credentials and folders are those of who types the command,
Ctrl-C ends it, and it works where Ray has no job server. `ray job submit -- timetier backup URI` makes it one.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import click

from ..cluster.errors import InvalidRequest
from .cli_common import NAMESPACE, cluster_options, enter, note, progress, show

name_option = click.option("--name", help="Name of the backup.  [default: the time of day, or the last complete one]")
cold_from_option = click.option(
    "--cold-from", help="Folder or URI below which the cold files are that the backup only names."
)
rate_option = click.option(
    "--rate",
    "mb_per_s",
    type=click.FloatRange(min=0.1),
    help="Megabytes a second to or from the cluster, at most.  [default: no limit]",
)


@click.command()
@click.argument("uri")
@click.option(
    "--copy-cold/--reference-cold",
    default=True,
    help="Copy the cold files too, or only name them: then a restore needs the cold folders.  [default: copy]",
)
@click.option("--verify", is_flag=True, help="Back up nothing, but check a backup that is there; needs no cluster.")
@name_option
@cold_from_option
@rate_option
@cluster_options
def backup(
    uri: str,
    copy_cold: bool,
    verify: bool,
    name: str | None,
    cold_from: str | None,
    mb_per_s: float | None,
    data_dir: Path | None,
    address: str | None,
    namespace: str | None,
    as_json: bool,
) -> int:
    """Write a consistent backup to URI, a folder of backups, while reads, writes and sinks go on.

    URI is a folder, or what pyarrow has a file system for: s3://bucket/folder, gs://..., hdfs://... Cold files that
    are there from an earlier backup are not copied again.
    """
    uri = _absolute(uri)
    if verify:
        return _verify(uri, name, None if cold_from is None else _absolute(cold_from), as_json)
    if cold_from is not None:
        raise click.UsageError("--cold-from belongs to --verify and to `timetier restore`")
    enter(data_dir, address)
    from .backup import backup_text, report_json, run_backup

    with progress("backing up buckets") as tell:
        report = asyncio.run(
            run_backup(
                namespace or NAMESPACE,
                uri,
                name=name,
                copy_cold=copy_cold,
                mb_per_s=mb_per_s or 0.0,
                progress=lambda p: tell(p.buckets_done, p.buckets),
            )
        )
    show(report_json(report), backup_text(report), as_json=as_json)
    return 0


def _verify(uri: str, name: str | None, cold_from: str | None, as_json: bool) -> int:
    from .backup import check_text, report_json, run_check

    with progress("checking bytes") as tell:
        report = run_check(uri, name=name, cold_from=cold_from, progress=tell)
    show(report_json(report), check_text(report), as_json=as_json)
    return 0 if report.ok else 1


@click.command()
@click.argument("uri", required=False)
@click.option(
    "--abandon",
    is_flag=True,
    help="Give a restore up: open the cluster again, if nothing was installed; else say what to do. Needs no URI.",
)
@name_option
@cold_from_option
@rate_option
@cluster_options
def restore(
    uri: str | None,
    abandon: bool,
    name: str | None,
    cold_from: str | None,
    mb_per_s: float | None,
    data_dir: Path | None,
    address: str | None,
    namespace: str | None,
    as_json: bool,
) -> int:
    """Restore a backup in URI to an empty cluster, which may have other numbers of groups.

    Meanwhile the cluster serves nobody; it does when every replica holds what the backup has. Whatever breaks this
    off, the same command goes on.
    """
    if abandon == (uri is not None):
        raise click.UsageError("pass the URI of the backups, or --abandon")
    if uri is None:
        enter(data_dir, address)
        return _abandon(namespace or NAMESPACE, as_json)
    uri, cold_from = _absolute(uri), None if cold_from is None else _absolute(cold_from)
    enter(data_dir, address)
    from .backup import report_json, restore_text, run_restore

    with progress("restoring") as tell:
        report = asyncio.run(
            run_restore(
                namespace or NAMESPACE,
                uri,
                name=name,
                cold_from=cold_from,
                mb_per_s=mb_per_s or 0.0,
                progress=lambda what, done, total: tell(done, total),
            )
        )
    for warning in report.warnings:
        note(f"timetier: {warning}")
    show(report_json(report), restore_text(report), as_json=as_json)
    return 0


def _abandon(namespace: str, as_json: bool) -> int:
    from .backup import run_abandon

    given_up = asyncio.run(run_abandon(namespace))
    text = f"restore {given_up} is given up: the cluster is empty and serves" if given_up else "no restore is under way"
    show({"abandoned": given_up}, text, as_json=as_json)
    return 0


def _absolute(uri: str) -> str:
    """A place that stays the same when this command moves to the data folder."""
    if not uri:
        raise InvalidRequest("the URI of the backups is empty: pass a folder, or something like s3://bucket/folder")
    return uri if "://" in uri else str(Path.cwd() / Path(uri).expanduser())
