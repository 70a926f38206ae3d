"""The commands for the disks of cold nodes: list them, have one looked at again, have one replaced."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .cli_common import NAMESPACE, cluster_options, enter, note, one_line, progress, show, table_of

if TYPE_CHECKING:
    from .disks import Replacing

_MIB = 1 << 20


@click.group()
def disk() -> None:
    """List, retry and replace the disks of cold nodes."""


@disk.command("list")
@cluster_options
def list_command(data_dir: Path | None, address: str | None, namespace: str | None, as_json: bool) -> int:
    """Show the disks of all cold nodes. The exit status is 0 if all of them serve."""
    enter(data_dir, address)
    from .disks import list_disks

    disks = asyncio.run(list_disks(namespace or NAMESPACE))
    show({"disks": disks}, disks_table(disks), as_json=as_json)
    return 0 if all(one["state"] == "serving" for one in disks) else 1


@disk.command()
@click.argument("node")
@click.argument("ordinal", type=click.IntRange(min=0))
@cluster_options
def retry(
    node: str, ordinal: int, data_dir: Path | None, address: str | None, namespace: str | None, as_json: bool
) -> int:
    """Have NODE look again at disk ORDINAL, which failed or was absent: it may work, or be mounted, again."""
    enter(data_dir, address)
    from .disks import retry_disk

    disks = asyncio.run(retry_disk(namespace or NAMESPACE, node, ordinal))
    found = disks[ordinal]
    told = f"disk {ordinal} of {node} is {found['state']}"
    show({"node": node, **found}, told + (f": {found['reason']}" if found["reason"] else ""), as_json=as_json)
    return 0 if found["state"] in ("serving", "replacing") else 1


@disk.command()
@click.argument("node")
@click.argument("ordinal", type=click.IntRange(min=0), required=False)
@click.option("--all", "whole", is_flag=True, help="All disks that do not serve, and a node whose folder was lost.")
@click.option("--erase", is_flag=True, help="Remove first what is on the disk. With --all also disks that serve.")
@click.option("--yes", is_flag=True, help="Do not ask before something is erased.")
@click.option("--no-wait", is_flag=True, help="Only begin; `timetier disk list` shows how far it is.")
@cluster_options
def replace(
    node: str,
    ordinal: int | None,
    whole: bool,
    erase: bool,
    yes: bool,
    no_wait: bool,
    data_dir: Path | None,
    address: str | None,
    namespace: str | None,
    as_json: bool,
) -> int:
    """Have NODE (such as cold-0-1) fill disk ORDINAL with the files that its other replicas have on that disk.

    Put an empty, mounted disk in the place of the old one first, or have the old one emptied by --erase. The node
    does the work by itself, also after a restart; this command only follows it. The exit status is 0 when the disk
    serves, or without waiting when it has begun.
    """
    if (ordinal is None) != whole:
        raise click.UsageError("give the number of a disk, or --all")
    if erase and not yes:
        what = f"disk {ordinal}" if ordinal is not None else "all disks"
        if as_json:
            raise click.UsageError("--erase with --json needs --yes")
        click.confirm(
            f"remove everything on {what} of {node}, and copy it from the other replicas?", abort=True, err=True
        )
    enter(data_dir, address)
    if whole:
        from ..actors.rebuilding import begin_again

        if begin_again(node, namespace or NAMESPACE):
            note(f"{node} has begun again with an empty folder")
    result = _follow(namespace or NAMESPACE, node, ordinal, erase=erase, wait=not no_wait)
    found = {"node": node, "done": result.done, "seconds": round(result.seconds, 3)}
    show({**found, "replaced": result.replaced, "disks": result.disks}, _in_words(result), as_json=as_json)
    return 0 if result.done or (no_wait and not result.failed) else 1


def _follow(namespace: str, node: str, ordinal: int | None, *, erase: bool, wait: bool) -> Replacing:
    from .disks import replace_disks

    with progress(f"filling disks of {node}, bytes") as draw:

        def tell(disks: list[dict[str, Any]]) -> None:
            rebuilds = [one.get("rebuild") for one in disks]
            known = [r for r in rebuilds if r is not None and r.get("bytes")]
            if known:
                done = sum(one["bytes"] for one in disks if "rebuild" not in one)
                draw(done + sum(r["bytes_done"] for r in known), done + sum(r["bytes"] for r in known))

        return asyncio.run(replace_disks(namespace, node, ordinal, erase=erase, wait=wait, tell=tell))


def _in_words(result: Replacing) -> str:
    text = disks_table([{"node": result.node, **one} for one in result.disks])
    if result.done:
        held = sum(one["bytes"] for one in result.disks) / _MIB
        text += f"\n\n{held:,.1f} MiB are there after {result.seconds:.1f} s"
    return text


def disks_table(disks: list[dict[str, Any]]) -> str:
    """Disks as text: one line each, and how far those are that are being filled."""
    headings = ["node", "disk", "state", "files", "MiB", "free MiB", "folder", "about"]
    return table_of(headings, [_row(one) for one in disks])


def _row(one: dict[str, Any]) -> list[str]:
    if one["disk"] is None:
        return [one["node"], "", one["state"], "", "", "", "", one_line(one["reason"])]
    figures = [f"{one['files']:,}", f"{one['bytes'] / _MIB:,.1f}", f"{one['free_bytes'] / _MIB:,.0f}"]
    about = one["reason"] if "rebuild" not in one else _progress(one["rebuild"])
    return [one["node"], str(one["disk"]), one["state"], *figures, one["folder"], one_line(about)]


def _progress(rebuild: dict[str, Any]) -> str:
    """How far the filling of a disk is."""
    if not rebuild.get("files"):
        told = str(rebuild["phase"])
    else:
        told = (
            f"{rebuild['files_done']:,} of {rebuild['files']:,} files, {rebuild['bytes_done'] / _MIB:,.1f} of "
            f"{rebuild['bytes'] / _MIB:,.1f} MiB, {rebuild['mb_per_s']:,.1f} MiB/s"
        )
        told += f" from {rebuild['peer']}" if rebuild["peer"] else ""
    return told + (f"; {rebuild['reason']}" if rebuild.get("reason") else "")
