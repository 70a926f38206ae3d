"""Cold links of a restored cluster, when its cold groups are other ones than those of the backup.

Each bucket's blocks go into files of the cold group that owns the bucket there, byte by byte as they are, and the links
name them there. The same backup and the same shape give the same files, so a restore that was broken off finds those
that it had written.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import google_crc32c
import msgspec

from ..cold.block import FileBuilder, checksum
from ..cold.link import FORMAT, RECORDS_AT, Link, decode_link, encode_link
from ..errors import Corrupt, InvalidRequest
from ..keys import split_item_key
from ..messages import PUT, TimelineState
from ..paxos.rows import VERSION_BYTES, decode_row, encode_row
from ..routing import Routing
from .cold_files import ColdTier, Pace
from .format import ColdFile, Manifest
from .reading import ColdSource

FILE_BYTES = 64 << 20
_RUN_BYTES = 40  # of a run's name


class LinkMover:
    """Moves blocks into files of the cluster's own cold groups. `files`: how many were written."""

    def __init__(
        self, routing: Routing, manifest: Manifest, source: ColdSource, cold: ColdTier, pace: Pace, file_bytes: int
    ) -> None:
        self.files = 0
        self.nbytes = 0
        self._routing = routing
        self._manifest = manifest
        self._source = source
        self._cold = cold
        self._pace = pace
        self._file_bytes = file_bytes
        self._open: dict[tuple[bytes, int], FileBuilder] = {}
        self._begun = 0
        self._prefix = f"restored-{google_crc32c.value(manifest.restore_name.encode()):08x}"

    async def moved(self, state: TimelineState) -> TimelineState:
        """The state of a bucket's own timeline, with links to where its blocks come to lie. Raises Corrupt."""
        rows = [await self._moved_row(name, row) for name, row in zip(state.row_keys, state.rows, strict=True)]
        return msgspec.structs.replace(state, rows=rows)

    async def finish(self) -> None:
        """Write the files that are open."""
        for place in sorted(self._open):
            await self._write(place)

    async def _moved_row(self, name: bytes, row: bytes) -> bytes:
        written, kind, value = decode_row(row)
        if kind != PUT or split_item_key(name[:-VERSION_BYTES])[0] == RECORDS_AT:
            return row
        link = decode_link(value)
        if link.format != FORMAT:
            raise InvalidRequest(
                f"the backup has cold blocks of format {link.format}, and files of this version have format {FORMAT}: "
                "restore it to a cluster with as many cold groups as the backup was taken from"
            )
        return encode_row(written, kind, encode_link(await self._moved_link(link)))

    async def _moved_link(self, link: Link) -> Link:
        place = link.table, self._routing.cold_group_of(link.bucket)
        builder = self._open.get(place)
        if builder is None:
            builder = self._open[place] = self._begin(*place)
        blocks = []
        for block in link.blocks:
            data = await asyncio.to_thread(self._source.block, block.file, block.offset, block.length)
            if len(data) != block.length or checksum(data) != block.crc:
                raise Corrupt(f"cold file {block.file} of the backup is damaged: its block at {block.offset}")
            blocks.append(
                builder.add_encoded(
                    data,
                    block,
                    bucket=link.bucket,
                    window_start=link.window_start,
                    window_end=link.window_end,
                    generation=link.generation,
                )
            )
            await self._pace(len(data))
        if builder.size >= self._file_bytes:
            await self._write(place)
        elif sum(builder.size for builder in self._open.values()) >= 4 * self._file_bytes:
            await self._write(max(sorted(self._open), key=lambda at: self._open[at].size))
        return msgspec.structs.replace(link, blocks=blocks)

    def _begin(self, table: bytes, group: int) -> FileBuilder:
        self._begun += 1
        policy = self._manifest.tables.get(table.decode(), self._manifest.default_table)
        return FileBuilder(
            f"{self._prefix}-{self._begun:06d}.arrow",
            table=table,
            per_second=policy.per_second if policy is not None else 1,
            cold_group=group,
            run=self._prefix[:_RUN_BYTES],
        )

    async def _write(self, place: tuple[bytes, int]) -> None:
        builder = self._open.pop(place)
        if not builder.entries:
            return
        data = await asyncio.to_thread(builder.finish)
        file = ColdFile(builder.file, len(data), checksum(data), place[1])
        await self._cold.put(file, lambda: _pieces(data))
        self.files += 1
        self.nbytes += len(data)


def _pieces(data: bytes) -> Iterator[bytes]:
    for start in range(0, len(data), 2 << 20):
        yield data[start : start + (2 << 20)]
