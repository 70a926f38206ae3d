"""Cold files out of a cluster, for a backup, and into one, for a restore: in pieces, checked on the way."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import google_crc32c

from ..carriers.base import CallError, Carrier
from ..client.view import View
from ..cold.block import checksum, read_index
from ..cold.cold_calls import choose_disk
from ..cold.pacing import TokenBucket
from ..cold.sink_calls import SinkSettings
from ..drive import drive
from ..errors import Corrupt, ProtocolError, TimeTierError, Unavailable
from ..messages import (
    FileFacts,
    FileInfo,
    FileList,
    FilePiece,
    FileRead,
    Files,
    FileWrite,
    FileWritten,
    Message,
    raise_failure,
    unpack_i64,
)
from .format import ColdFile

_PIECE_BYTES = 2 << 20
_ATTEMPTS = 3
_PAUSE_S = 0.5
_LAST_PIECE_PATIENCE = 6  # it is answered after fsync and reading the whole file again

Pace = Callable[[int], Awaitable[None]]
"""Called with bytes that went through; returns when there may be more."""


def pace_of(bytes_per_s: float, now: Callable[[], float]) -> Pace:
    """A pace of so many bytes a second, 0 for any."""
    tokens = TokenBucket(bytes_per_s, now())

    async def pace(nbytes: int) -> None:
        tokens.take(nbytes, now())
        if wait_s := tokens.wait_s(now()):
            await asyncio.sleep(wait_s)

    return pace


@contextmanager
def spool_file() -> Iterator[Path]:
    """A file on the local disk, removed afterwards: cold files are larger than what should be held in memory."""
    descriptor, name = tempfile.mkstemp(prefix="timetier-backup-")
    os.close(descriptor)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def pieces_of(path: Path) -> Iterator[bytes]:
    """A local file in pieces."""
    with path.open("rb") as opened:
        while piece := opened.read(_PIECE_BYTES):
            yield piece


class Checked(NamedTuple):
    """What a whole cold file is. `blocks`: offset and CRC32C of each."""

    size: int
    crc: int
    blocks: set[tuple[int, int]]


def check_cold_file(path: Path, name: str) -> Checked:
    """Check that every block of a cold file is what the file's own index says. Raises Corrupt."""
    try:
        entries = read_index(str(path)).blocks
    except (Corrupt, OSError) as error:
        raise Corrupt(f"{name} is damaged: {error}") from None
    crc = size = 0
    with path.open("rb") as opened:
        for entry in entries:
            opened.seek(entry.offset)
            if checksum(opened.read(entry.length)) != entry.crc:
                raise Corrupt(f"{name} is damaged: its block at {entry.offset} has another checksum")
    for piece in pieces_of(path):
        crc = int(google_crc32c.extend(crc, piece))
        size += len(piece)
    return Checked(size, crc, {(entry.offset, entry.crc) for entry in entries})


class ColdTier:
    """The cold nodes of a running cluster, as a backup or a restore uses them."""

    def __init__(self, view: View, carrier: Carrier, settings: SinkSettings, pace: Pace) -> None:
        self._view = view
        self._carrier = carrier
        self._settings = settings
        self._pace = pace
        self._listed: dict[str, dict[str, int]] = {}  # size by file, of each node that was asked

    def nodes(self, group: int) -> list[str]:
        """Names of the nodes of a cold group."""
        topology = self._view.routing.topology
        return [topology.cold_node(group, replica) for replica in range(topology.cold_replicas)]

    # ------------------------------------------------------------ out

    async def fetch(self, file: str, group: int, spool: Path) -> ColdFile | None:
        """A file from whichever node has it whole and intact, into a local file. None when all say that there is none.

        Raises Unavailable, Corrupt.
        """
        reason: TimeTierError = Unavailable(f"cold group {group} has no nodes")
        for attempt in range(_ATTEMPTS):
            if attempt:
                await asyncio.sleep(_PAUSE_S * 2 ** (attempt - 1))
            missing = 0
            for node in sorted(self.nodes(group), key=self._view.is_suspect):
                try:
                    await self._fetch_from(node, file, spool)
                    checked = await asyncio.to_thread(check_cold_file, spool, file)
                    return ColdFile(file, checked.size, checked.crc, group)
                except TimeTierError as error:
                    reason = error
                    missing += isinstance(error, Corrupt) and error.fields.get("reason") == "missing"
            if missing == len(self.nodes(group)):
                return None
        raise reason

    async def _fetch_from(self, node: str, file: str, spool: Path) -> None:
        offset, size = 0, 1
        with spool.open("wb") as opened:
            while offset < size:
                piece = await self._call(node, FileRead(file, offset, _PIECE_BYTES))
                if not isinstance(piece, FilePiece) or checksum(piece.data) != piece.crc or not piece.data:
                    raise Unavailable(f"{node}: an unfit answer to FileRead")
                await asyncio.to_thread(opened.write, piece.data)
                size = piece.size
                offset += len(piece.data)
                await self._pace(len(piece.data))

    async def sizes(self, group: int) -> dict[str, int]:
        """Size of each file that any node of a group has. Raises Unavailable."""
        found: dict[str, int] = {}
        for node in self.nodes(group):
            found |= await self._list(node)
        return found

    # ------------------------------------------------------------ in

    async def put(self, file: ColdFile, open_pieces: Callable[[], Iterator[bytes]]) -> bool:
        """Have a file on all nodes of its group, verified on their disks. Whether any of them lacked it.

        `open_pieces`: the file's bytes from the beginning; may raise Corrupt. Raises what a node refuses it for.
        """
        nodes = self.nodes(file.group)
        lacking = [node for node in nodes if (await self._list(node)).get(file.name) != file.size]
        if not lacking:
            return False
        having = [node for node in nodes if node not in lacking]
        disk = await self._disk_of(file, nodes, having)
        for node in lacking:
            await self._put_on(node, file, disk, open_pieces)
            self._listed[node][file.name] = file.size
        return True

    async def _disk_of(self, file: ColdFile, nodes: list[str], having: list[str]) -> int:
        """The same ordinal on all of them; where one has the file already, it has chosen."""
        if having:
            facts = await self._call(having[0], FileInfo(file.name))
            if not isinstance(facts, FileFacts):
                raise ProtocolError(f"{having[0]}: an unfit answer to FileInfo")
            return facts.disk
        return await drive(choose_disk(self._view, nodes, file.name, file.size, self._settings), self._carrier)

    async def _put_on(self, node: str, file: ColdFile, disk: int, open_pieces: Callable[[], Iterator[bytes]]) -> None:
        error: TimeTierError = Unavailable(f"{node}: not tried")
        for attempt in range(_ATTEMPTS):
            if attempt:
                await asyncio.sleep(_PAUSE_S * 2 ** (attempt - 1))
            try:
                await self._send(node, file, disk, open_pieces())
                return
            except Unavailable as failed:
                error = failed
        raise error

    async def _send(self, node: str, file: ColdFile, disk: int, pieces: Iterator[bytes]) -> None:
        offset = 0
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            last = offset + len(piece) == file.size
            patience = _LAST_PIECE_PATIENCE if last else 1
            answer = await self._call(node, FileWrite(file.name, disk, offset, piece, last, file.crc), patience)
            if not isinstance(answer, FileWritten) or (last and (answer.size, answer.crc) != (file.size, file.crc)):
                raise Unavailable(f"{node}: an unfit answer to FileWrite")
            offset += len(piece)
            await self._pace(len(piece))

    # ------------------------------------------------------------ calls

    async def _list(self, node: str) -> dict[str, int]:
        """Size of each file that a node has; asked once."""
        if node not in self._listed:
            found: dict[str, int] = {}
            cursor, more = "", True
            while more:
                answer = await self._call(node, FileList(cursor))
                if not isinstance(answer, Files):
                    raise ProtocolError(f"{node}: an unfit answer to FileList")
                found.update(zip(answer.names, unpack_i64(answer.sizes), strict=True))
                more = answer.more and bool(answer.names) and answer.names[-1] > cursor
                cursor = answer.names[-1] if answer.names else cursor
            self._listed[node] = found
        return self._listed[node]

    async def _call(self, node: str, message: Message, patience: int = 1) -> Message:
        try:
            answer = await self._carrier.call(node, message, self._settings.call_timeout_s * patience)
        except CallError as error:
            raise Unavailable(f"{node}: {error.message}") from None
        raise_failure(answer)
        return answer
