"""Backs up and restores a running cluster: connects, drives `cluster/backup/`, and words the reports."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from ..actors.connecting import ClusterStore, connect_async
from ..cluster.backup.checking import CheckReport, check_backup
from ..cluster.backup.reading import find_backup
from ..cluster.backup.restoring import RestoreReport, RestoreSettings, abandon_restore, restore_backup
from ..cluster.backup.taking import BackupProgress, BackupReport, BackupSettings, backup_name, take_backup
from ..cluster.backup.target import Target

_MB = 1_000_000
_FOLLOW_S = 20.0


class RouterControl:
    """The Router, for a restore; the view follows what it says."""

    def __init__(self, store: ClusterStore) -> None:
        self._store = store

    async def set_restoring(self, restore: str, phase: str) -> None:
        """Close the cluster, or open it; see `RouterState.set_restoring`."""
        await self._store.router_call("set_restoring", restore, phase)


async def run_backup(
    namespace: str,
    uri: str,
    *,
    name: str | None = None,
    copy_cold: bool = True,
    mb_per_s: float = 0.0,
    progress: Callable[[BackupProgress], None] = lambda _: None,
) -> BackupReport:
    """Back up the cluster of a Ray namespace to a folder of backups. `name`: None for one by the time of day."""
    target = Target.of(uri)
    settings = BackupSettings(copy_cold=copy_cold, bytes_per_s=mb_per_s * _MB)
    chosen = name or backup_name(time.time_ns() // 1_000)
    store = await connect_async(namespace=namespace)
    try:
        return await take_backup(store.view, store.carrier, target, chosen, settings=settings, progress=progress)
    finally:
        await store.close()


async def run_restore(
    namespace: str,
    uri: str,
    *,
    name: str | None = None,
    cold_from: str | None = None,
    mb_per_s: float = 0.0,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> RestoreReport:
    """Restore a backup (`name`; None: the last complete one) to the empty cluster of a Ray namespace."""
    target = Target.of(uri)
    elsewhere = None if cold_from is None else Target.of(cold_from)
    manifest = await asyncio.to_thread(find_backup, target, name)
    store = await connect_async(namespace=namespace)
    try:
        settings = RestoreSettings(
            bytes_per_s=mb_per_s * _MB, request_id_entries=store.config.storage.request_id_entries
        )
        return await restore_backup(
            store.view,
            store.carrier,
            RouterControl(store),
            target,
            manifest,
            elsewhere=elsewhere,
            settings=settings,
            progress=progress,
        )
    finally:
        await store.close()


async def run_abandon(namespace: str) -> str:
    """Open a cluster that was closed for a restore of which nothing was installed. The restore's name, "" if none."""
    store = await connect_async(namespace=namespace)
    try:
        return await abandon_restore(store.view, store.carrier, RouterControl(store))
    finally:
        await store.close()


def run_check(
    uri: str, *, name: str | None, cold_from: str | None, progress: Callable[[int, int], None]
) -> CheckReport:
    """Read all of a backup and check it; needs no cluster."""
    target = Target.of(uri)
    elsewhere = None if cold_from is None else Target.of(cold_from)
    began_s = time.monotonic()
    report = check_backup(target, find_backup(target, name), elsewhere=elsewhere, progress=progress)
    report.seconds = time.monotonic() - began_s
    return report


# ---------------------------------------------------------------- words


def report_json(report: BackupReport | RestoreReport | CheckReport) -> dict[str, Any]:
    """A report as one JSON object."""
    found = asdict(report)
    if isinstance(report, CheckReport):
        found = {"ok": report.ok, **found}
    return {key: round(value, 3) if isinstance(value, float) else value for key, value in found.items()}


def backup_text(report: BackupReport) -> str:
    """What a backup holds and cost, for people."""
    again = f"; {report.buckets_again} buckets were read again, as a sink was at work" if report.buckets_again else ""
    return (
        f"backup {report.name} in {report.uri}: {report.timelines:,} timelines, {report.items:,} items in the storage "
        f"tier ({_size(report.storage_bytes)}), {report.files:,} cold files ({_size(report.cold_bytes)}; "
        f"{report.files_copied:,} copied, {report.files_kept:,} kept){again}\n"
        f"{report.seconds:.1f} s, {report.mb_per_s:.1f} MB/s"
    )


def restore_text(report: RestoreReport) -> str:
    """What a restore brought, for people."""
    return (
        f"restored backup {report.name}: {report.timelines:,} timelines, {report.items:,} items in the storage tier, "
        f"{report.files:,} cold files ({report.files_written:,} written); every replica was read back and compared\n"
        f"{_size(report.bytes)} in {report.seconds:.1f} s, {report.mb_per_s:.1f} MB/s"
    )


def check_text(report: CheckReport) -> str:
    """What a check found, for people."""
    cold = f"{report.files:,} cold files"
    if report.files_not_checked:
        cold = f"{report.files_not_checked:,} cold files that it only names (to check them too: --cold-from)"
    verdict = "is whole" if report.ok else "is DAMAGED"
    lines = [
        f"backup {report.name} in {report.uri} {verdict}: {report.timelines:,} timelines, {report.items:,} items, "
        f"{report.links:,} links, {cold}; {_size(report.bytes)} in {report.seconds:.1f} s",
        *report.errors,
    ]
    return "\n".join(lines)


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f} MB"
