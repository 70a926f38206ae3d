"""Takes a backup of a running cluster.

Bucket by bucket, group by group: whatever the parts hold of a bucket is as of one version of its links. When a link is
chosen in between (a sink is at work), or a cold file that the links name is gone already, the bucket is read again. A
bucket counts only when all files that its links name are in the backup; the manifest, which makes the backup one, is
written last. Memory holds one part at most, whatever the size of a bucket or of a timeline.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from ... import __version__
from ..carriers.base import Carrier
from ..client.view import View
from ..cold.link import RECORDS_AT, decode_link
from ..cold.sink_calls import SinkSettings
from ..drive import drive
from ..errors import Corrupt, InvalidRequest, Unavailable
from ..keys import bucket_of, bucket_prefix, is_internal, is_system, split_item_key, split_timeline
from ..messages import PUT, TimelineState
from ..paxos.rows import VERSION_BYTES, decode_row
from .cold_files import Checked, ColdTier, Pace, check_cold_file, pace_of, pieces_of, spool_file
from .dumping import GroupDump, Page, Place
from .format import (
    COLD_FOLDER,
    COPIED,
    FORMAT,
    MANIFEST,
    REFERENCED,
    ColdFile,
    Manifest,
    Part,
    check_backup_name,
    encode_cold_files,
    encode_manifest,
    encode_part,
)
from .reading import complete_backups, read_cold_files
from .target import Stored, Target

_BUCKET_ATTEMPTS = 8
_OBJECT_BYTES = 100  # that a row takes in memory beside its bytes
_RETAKE_PAUSE_S = 0.2


@dataclass(frozen=True, slots=True)
class BackupSettings:
    """`copy_cold`: cold files are copied, else only named. `bytes_per_s`: read from the cluster at most, 0 for any.
    `part_bytes`: of one part in memory, about. `calls`: patience with the nodes."""

    copy_cold: bool = True
    bytes_per_s: float = 0.0
    part_bytes: int = 32 << 20
    calls: SinkSettings = field(default_factory=lambda: SinkSettings(scan_bytes=4 << 20))


@dataclass(slots=True)
class BackupReport:
    """What was done. `bytes`: read from the cluster. `files_kept`: cold files that were there from an earlier backup.
    `buckets_again`: read more than once, because a sink was at work there."""

    name: str
    uri: str
    timelines: int = 0
    items: int = 0
    storage_bytes: int = 0
    files: int = 0
    files_copied: int = 0
    files_kept: int = 0
    cold_bytes: int = 0
    copied_bytes: int = 0
    buckets_again: int = 0
    seconds: float = 0.0
    mb_per_s: float = 0.0


@dataclass(frozen=True, slots=True)
class BackupProgress:
    """How far a backup is."""

    buckets_done: int
    buckets: int
    timelines: int
    items: int
    files: int


@dataclass(slots=True)
class _Bucket:
    """A bucket that is being read. `states`: not yet in a part; `parts`: written already, as it is a large one."""

    number: int
    system_version: int
    states: list[TimelineState] = field(default_factory=list)
    nbytes: int = 0
    parts: list[Part] = field(default_factory=list)
    files: set[str] = field(default_factory=set)
    rows_of: dict[bytes, int] = field(default_factory=dict)  # of the last timeline, in earlier pieces


class _Again(Exception):
    """A bucket has to be read again."""

    def __init__(self, why: str, bucket: _Bucket) -> None:
        super().__init__(why)
        self.bucket = bucket


async def take_backup(
    view: View,
    carrier: Carrier,
    target: Target,
    name: str,
    *,
    settings: BackupSettings | None = None,
    progress: Callable[[BackupProgress], None] = lambda _: None,
) -> BackupReport:
    """Write a backup of the whole cluster to `target`, under `name`. Raises InvalidRequest when that exists already,
    Unavailable, Corrupt when a cold file is damaged in every copy. Without its manifest it does not count."""
    return await _Taking(view, carrier, target, check_backup_name(name), settings or BackupSettings(), progress).run()


class _Taking:
    def __init__(
        self,
        view: View,
        carrier: Carrier,
        target: Target,
        name: str,
        settings: BackupSettings,
        progress: Callable[[BackupProgress], None],
    ) -> None:
        self.view = view
        self.carrier = carrier
        self.target = target
        self.name = name
        self.settings = settings
        self.progress = progress
        self.report = BackupReport(name, target.uri)
        self.pace: Pace = pace_of(settings.bytes_per_s, view.now)
        self.cold = ColdTier(view, carrier, settings.calls, self.pace)
        self.files: dict[str, ColdFile] = {}
        self.known: dict[str, ColdFile] = {}  # from earlier backups of this cluster
        self.parts: list[Part] = []
        self.waiting: list[TimelineState] = []  # of complete buckets, not yet in a part
        self.waiting_bytes = 0
        self.part_count = 0
        self.buckets_done = 0

    async def run(self) -> BackupReport:
        began_s, began_us = self.view.now(), time.time_ns() // 1_000
        await self._look_around()
        topology = self.view.routing.topology
        for group in range(topology.storage_groups):
            await self._take_group(group)
        self.parts += await self._flush()
        if not self.settings.copy_cold:
            await self._find_all_files()
        listed = await self._write("cold-files.arrow", [encode_cold_files(self.files[f] for f in sorted(self.files))])
        report = self.report
        report.files = len(self.files)
        report.cold_bytes = sum(file.size for file in self.files.values())
        report.timelines = sum(part.timeline_count for part in self.parts)
        report.items = sum(part.item_count for part in self.parts)
        manifest = Manifest(
            format=FORMAT,
            name=self.name,
            program=__version__,
            cluster_id=topology.cluster_id,
            namespace=topology.namespace,
            began_us=began_us,
            ended_us=time.time_ns() // 1_000,
            buckets=topology.buckets,
            map_checksum=topology.map_checksum,
            storage_groups=topology.storage_groups,
            storage_replicas=topology.storage_replicas,
            cold_groups=topology.cold_groups,
            cold_replicas=topology.cold_replicas,
            tables=topology.tables,
            default_table=topology.default_table,
            cold=COPIED if self.settings.copy_cold else REFERENCED,
            parts=self.parts,
            cold_files=listed,
            timelines=report.timelines,
            items=report.items,
            storage_bytes=report.storage_bytes,
            cold_file_count=report.files,
            cold_bytes=report.cold_bytes,
        )
        await self._write(MANIFEST, [encode_manifest(manifest)])
        report.seconds = self.view.now() - began_s
        report.mb_per_s = (report.storage_bytes + report.copied_bytes) / 1e6 / max(report.seconds, 1e-9)
        return report

    async def _look_around(self) -> None:
        """See what is there from earlier backups. Raises InvalidRequest when this one is."""
        folders, files = await asyncio.to_thread(self.target.entries, self.name)
        if folders or MANIFEST in files:
            raise InvalidRequest(f"a backup {self.name} exists already in {self.target.uri}: choose another name")
        for file in files:  # of one that was broken off
            await asyncio.to_thread(self.target.remove, f"{self.name}/{file}")
        for manifest in await asyncio.to_thread(complete_backups, self.target):
            if manifest.cluster_id == self.view.routing.topology.cluster_id and manifest.cold == COPIED:
                try:
                    listed = await asyncio.to_thread(read_cold_files, self.target, manifest)
                except Corrupt:
                    continue  # its files are looked at one by one
                self.known |= {file.name: file for file in listed}

    # ------------------------------------------------------------ buckets

    async def _take_group(self, group: int) -> None:
        dump = GroupDump(self.view, group, self.settings.calls)
        owned: list[int] = self.view.routing.buckets_of_storage_group(group).tolist()
        before, failing, attempts = self.buckets_done, -1, 0
        place: Place | None = Place(bucket_prefix(owned[0])) if owned else None
        bucket: _Bucket | None = None
        while place is not None:
            page = await drive(dump.page(place), self.carrier)
            try:
                bucket = await self._take_page(page, bucket)
                if page.following is None and bucket is not None:
                    await self._finish(bucket)
                place = page.following
            except _Again as again:
                attempts = attempts + 1 if failing == again.bucket.number else 1
                failing = again.bucket.number
                if attempts == _BUCKET_ATTEMPTS:
                    raise Unavailable(f"bucket {failing} can't be read: {again}") from None
                self.report.buckets_again += 1
                await self._drop(again.bucket)
                await asyncio.sleep(_RETAKE_PAUSE_S * attempts)
                dump.restart()
                place, bucket = Place(bucket_prefix(failing)), None
            if place is not None:
                self.buckets_done = before + bisect_left(owned, bucket_of(place.cursor))
                self._tell()
        self.buckets_done = before + len(owned)
        self._tell()

    def _tell(self) -> None:
        total = self.view.routing.topology.buckets
        timelines = sum(part.timeline_count for part in self.parts) + len(self.waiting)
        items = sum(part.item_count for part in self.parts)
        self.progress(BackupProgress(self.buckets_done, total, timelines, items, len(self.files)))

    async def _take_page(self, page: Page, bucket: _Bucket | None) -> _Bucket | None:
        """Take the states of a page; the bucket that goes on after it. Raises _Again with the bucket."""
        size = 0
        if not page.whole and bucket is not None:
            raise _Again("a large timeline goes on too fast", bucket)
        for state, system_version in zip(page.states, page.systems, strict=True):
            number = bucket_of(state.timeline)
            if bucket is not None and bucket.number != number:
                await self._finish(bucket)
                bucket = None
            if bucket is None:
                bucket = _Bucket(number, system_version)
                if system_version and not is_system(state.timeline):
                    raise _Again("its first links came while it was read", bucket)
            if system_version != bucket.system_version:
                raise _Again("its links change, a sink is at work", bucket)
            if not is_internal(split_timeline(state.timeline)[1]):  # what the sink notes is about this cluster's files
                size += self._add(bucket, state)
        self.report.storage_bytes += size
        await self.pace(size)
        if bucket is not None and bucket.nbytes >= self.settings.part_bytes:
            # A large one: what is complete goes first, then what there is of it, in parts of its own.
            self.parts += await self._flush()
            bucket.parts.append(await self._write_part(bucket.states))
            bucket.states, bucket.nbytes = [], 0
        return bucket

    def _add(self, bucket: _Bucket, state: TimelineState) -> int:
        state.before = bucket.rows_of.get(state.timeline, 0)
        bucket.rows_of = {state.timeline: state.before + len(state.rows)}
        bucket.states.append(state)
        if is_system(state.timeline):
            for name, row in zip(state.row_keys, state.rows, strict=True):
                _, kind, value = decode_row(row)
                if kind == PUT and split_item_key(name[:-VERSION_BYTES])[0] != RECORDS_AT:
                    bucket.files.update(block.file for block in decode_link(value).blocks)
        size = sum(map(len, state.row_keys)) + sum(map(len, state.rows))
        bucket.nbytes += size + _OBJECT_BYTES * (1 + len(state.rows))
        return size

    async def _finish(self, bucket: _Bucket) -> None:
        """A bucket is whole: secure its cold files, and keep it. Raises _Again."""
        cold_group = self.view.routing.cold_group_of(bucket.number)
        for file in sorted(bucket.files - self.files.keys()):
            found = await self._secure(file, cold_group)
            if found is None:
                raise _Again(f"its links name {file}, which is gone", bucket)
            self.files[file] = found
        self.parts += bucket.parts  # a large one's first states, before what waits of it
        self.waiting += bucket.states
        self.waiting_bytes += bucket.nbytes
        if self.waiting_bytes >= self.settings.part_bytes or bucket.parts:
            self.parts += await self._flush()

    async def _drop(self, bucket: _Bucket) -> None:
        for part in bucket.parts:
            await asyncio.to_thread(self.target.remove, part.timelines.name)
            await asyncio.to_thread(self.target.remove, part.items.name)

    # ------------------------------------------------------------ cold files

    async def _secure(self, file: str, group: int) -> ColdFile | None:
        """Have a cold file in the backup, or its facts if it is only to be named. None when the cluster has it not."""
        place = f"{COLD_FOLDER}/{file}"
        there = await asyncio.to_thread(self.target.size, place) if self.settings.copy_cold else None
        known = self.known.get(file)
        if known is not None and known.size == there:
            self.report.files_kept += 1
            return known
        with spool_file() as spool:
            if there is not None and (kept := await self._look_at(file, group, place)) is not None:
                self.report.files_kept += 1
                return kept
            found = await self.cold.fetch(file, group, spool)
            if found is None or not self.settings.copy_cold:
                return found
            stored = await asyncio.to_thread(self.target.write, place, pieces_of(spool))
        if (stored.size, stored.crc) != (found.size, found.crc):
            raise Corrupt(f"{file} has changed on its way to {self.target.uri}")
        self.report.files_copied += 1
        self.report.copied_bytes += found.size
        return found

    async def _look_at(self, file: str, group: int, place: str) -> ColdFile | None:
        """A file that a backup which was broken off has left, if it is whole."""

        def look() -> Checked:
            with spool_file() as spool:
                with spool.open("wb") as opened:
                    for piece in self.target.raw_pieces(place):
                        opened.write(piece)
                return check_cold_file(spool, file)

        try:
            checked = await asyncio.to_thread(look)
        except Corrupt:
            return None
        return ColdFile(file, checked.size, checked.crc, group)

    async def _find_all_files(self) -> None:
        """Make sure that what is only named is there to the end. Raises Unavailable."""
        groups = {file.group for file in self.files.values()}
        sizes = {group: await self.cold.sizes(group) for group in sorted(groups)}
        for file in self.files.values():
            if sizes[file.group].get(file.name) != file.size:
                raise Unavailable(
                    f"{file.name} was removed by a sink while the backup was taken: take it again while no sink runs, "
                    "or with --copy-cold"
                )

    # ------------------------------------------------------------ parts

    async def _flush(self) -> list[Part]:
        """Write what waits as a part."""
        if not self.waiting:
            return []
        part = await self._write_part(self.waiting)
        self.waiting, self.waiting_bytes = [], 0
        return [part]

    async def _write_part(self, states: list[TimelineState]) -> Part:
        self.part_count += 1
        timelines, items = await asyncio.to_thread(encode_part, states)
        return Part(
            await self._write(f"timelines-{self.part_count:05d}.arrow", [timelines]),
            await self._write(f"items-{self.part_count:05d}.arrow", [items]),
            sum(not state.before for state in states),
            sum(len(state.rows) for state in states),
        )

    async def _write(self, file: str, pieces: Iterable[bytes]) -> Stored:
        return await asyncio.to_thread(self.target.write, f"{self.name}/{file}", pieces)


def backup_name(now_us: int) -> str:
    """Name of a backup that is taken now: sorts by time, and two of one second differ."""
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now_us / 1e6)) + f"-{secrets.token_hex(2)}"
