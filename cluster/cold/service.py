"""A cold node: serves blocks, takes files, heals itself from its peers.

Disks are slow and may hang, so all I/O runs in threads of its own, in two lanes: reads share `read_threads` threads
behind a bounded queue, everything else has one thread, so a long file never delays a read by more than its disk does.

A block whose checksum is wrong, or whose file is missing or truncated, is answered with Corrupt (the reader goes on
to the next replica) and joins the *repair queue*. One background task takes from it: it reads the bytes from another
replica, checks them against the checksum that the reader's link named, and writes them in place; a missing or
truncated file is copied as a whole and checked by its own index. A peer is asked for raw bytes, which has no side
effects there: two nodes that both lack a file do not send each other in circles.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ..carriers.base import CallError, Carrier, Reply
from ..counters import Counters
from ..errors import Corrupt, InvalidRequest, TimeTierError, Unavailable
from ..gate import overloaded
from ..messages import (
    BlockBytes,
    BlockRead,
    FileFacts,
    FileInfo,
    FileList,
    FilePiece,
    FileRead,
    FileRemove,
    Files,
    FileWrite,
    FileWritten,
    Message,
    Ping,
    Pong,
    Status,
    StatusRequest,
    pack_i64,
    pack_u32,
    raise_failure,
)
from ..topology import Topology
from .block import DecodedBlock, checksum, decode_block
from .block_cache import BlockCache
from .files import Files as FileAccess
from .store import ColdStore, check_name

MAX_QUEUED_READS = 1_024
MAX_QUEUED_WRITES = 64
MAX_QUEUED_BYTES = 128 << 20  # of pieces to be written
MAX_REPAIRS = 10_000
REPAIR_ATTEMPTS = 5
_COPY_PIECE_BYTES = 4 << 20
_PEER_TIMEOUT_S = 10.0
_BACK_OFF_S = 0.05  # doubles with each attempt

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Repair(NamedTuple):
    """Bytes that are damaged here, and what they should be. `whole`: the file is missing or truncated."""

    file: str
    offset: int
    length: int
    crc: int
    whole: bool


@dataclass(slots=True)
class _Lane:
    """A bounded queue in front of some threads."""

    pool: ThreadPoolExecutor
    limit: int
    waiting: int = 0
    nbytes: int = 0

    async def run(self, work: Callable[[], T], nbytes: int = 0) -> T:
        """Result of `work` in a thread, which holds `nbytes` meanwhile. Raises Unavailable when too much waits."""
        if self.waiting >= self.limit or (self.nbytes and self.nbytes + nbytes > MAX_QUEUED_BYTES):
            raise overloaded(f"{self.waiting} requests of {self.nbytes} bytes wait for the disks of this node")
        self.waiting += 1
        self.nbytes += nbytes
        try:
            return await asyncio.get_running_loop().run_in_executor(self.pool, work)
        finally:
            self.waiting -= 1
            self.nbytes -= nbytes


class ColdService:
    """One replica of a cold group (see `service.py` for the methods).

    `folder`: its data folder, with a folder for each of its `disks`. `read_threads`: block reads at the same time.
    `block_cache_bytes`: of decoded blocks, which readers of other owners in them find in memory; 0 keeps none.
    """

    def __init__(
        self,
        name: str,
        group: int,
        replica: int,
        folder: Path | str,
        topology: Topology,
        carrier: Carrier,
        *,
        disks: int,
        read_threads: int,
        counters: Counters,
        block_cache_bytes: int = 16 << 20,
        files: FileAccess | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        """`files`, `clock`, `wall_s`: as in `ColdStore`. Raises InvalidRequest."""
        if read_threads < 1:
            raise InvalidRequest(f"read_threads={read_threads}: pass 1 or more")
        self.name = name
        self.group = group
        self.replica = replica
        self.folder = Path(folder)
        self.topology = topology
        self.carrier = carrier
        self.disks = disks
        self.counters = counters
        self._reads = _Lane(ThreadPoolExecutor(read_threads, f"{name}-read"), MAX_QUEUED_READS)
        self._writes = _Lane(ThreadPoolExecutor(1, f"{name}-write"), MAX_QUEUED_WRITES)
        self._open = lambda: ColdStore(self.folder, disks, files=files, clock=clock, wall_s=wall_s)
        self._store: ColdStore | None = None
        self._decoded: BlockCache[DecodedBlock] = BlockCache(block_cache_bytes)
        self._decoding: dict[tuple[str, int, int, int], asyncio.Task[DecodedBlock]] = {}
        self._state, self._reason = "starting", ""
        self._repairs: deque[Repair] = deque()
        self._queued: set[Repair] = set()  # those in the deque, and the one being repaired
        self._work = asyncio.Event()
        self._repairer: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Find the files and begin to serve; a folder that can't be used leaves the node refusing."""
        try:
            self._store = await self._writes.run(self._open)
        except TimeTierError as error:
            self._state, self._reason = "refused", error.message
            logger.error("%s refuses to serve: %s", self.name, error.message)
            return
        self._state = "serving"
        self._repairer = asyncio.create_task(self._repair_for_ever(), name=f"{self.name}-repair")

    async def stop(self) -> None:
        """End background work; reads that are under way end first."""
        self._state, self._reason = "stopped", "stopped"
        if self._repairer is not None:
            self._repairer.cancel()
            await asyncio.gather(self._repairer, return_exceptions=True)
        for lane in (self._reads, self._writes):
            await asyncio.to_thread(lane.pool.shutdown, wait=True, cancel_futures=True)
        await asyncio.gather(*self._decoding.values(), return_exceptions=True)

    def update(self, topology: Topology) -> None:
        """Go by another shape of the cluster."""
        self.topology = topology

    def status(self) -> dict[str, Any]:
        """State, files, bytes, queues and counters."""
        files, size = self._store.totals() if self._store is not None else (0, 0)
        self.counters.set("files", files)
        self.counters.set("file_bytes", size)
        self.counters.set("repair_queue", len(self._queued))
        self.counters.set("read_queue", self._reads.waiting)
        return {
            "name": self.name,
            "tier": "cold",
            "state": self._state,
            "reason": self._reason,
            "files": files,
            "bytes": size,
            "disks": self.disks,
            "repair_queue": len(self._queued),
            "reads": self.counters.totals.get("block_reads", 0),
            "crc_failures": self.counters.totals.get("crc_failures", 0),
            "counters": self.counters.read(),
        }

    # ------------------------------------------------------------ requests

    def begin(self, message: Message, reply: Reply) -> bool:
        """Nothing is answered without a task: all needs the disk."""
        return False

    async def handle(self, message: Message) -> Message | None:
        """Answer one message. Raises InvalidRequest for one that is not for a cold node."""
        if isinstance(message, BlockRead):
            return await self._read_block(message)
        if isinstance(message, Ping):
            return Pong()
        if isinstance(message, StatusRequest):
            return Status(json.dumps(self.status()).encode())
        store = self._open_store()
        if isinstance(message, FileWrite):
            return await self._write(store, message)
        if isinstance(message, FileList):
            return await self._list(store, message)
        if isinstance(message, FileInfo):
            return await self._describe(store, message)
        if isinstance(message, FileRead):
            return await self._read_piece(store, message)
        if isinstance(message, FileRemove):
            return await self._remove(store, message)
        raise InvalidRequest(f"{self.name} is a cold node: it takes no {type(message).__name__} message")

    def _open_store(self) -> ColdStore:
        if self._store is None or self._state != "serving":
            raise Unavailable(f"{self.name} does not serve: {self._reason or self._state}")
        return self._store

    async def _read_block(self, message: BlockRead) -> BlockBytes:
        """A block as it is, or the part of it that one owner has. Raises Corrupt, InvalidRequest, Unavailable."""
        store = self._open_store()
        self.counters.add("block_reads")
        if not message.owner:
            return BlockBytes(await self._read_checked(store, message, bytes))
        block = self._decoded.get(message.file, message.offset)
        if block is None:
            block = await self._decode_once(store, message)
        part = block.part_of(message.owner)
        return BlockBytes(part, True, checksum(part))

    async def _decode_once(self, store: ColdStore, message: BlockRead) -> DecodedBlock:
        """A decoded block; who asks for a block that is being read waits for that read."""
        place = message.file, message.offset, message.length, message.crc
        task = self._decoding.get(place)
        if task is None:
            decode = partial(decode_block, format=message.format)
            task = self._decoding[place] = asyncio.create_task(self._read_checked(store, message, decode))
            task.add_done_callback(lambda done: self._keep(place, done))
        return await asyncio.shield(task)

    def _keep(self, place: tuple[str, int, int, int], task: asyncio.Task[DecodedBlock]) -> None:
        del self._decoding[place]
        if not task.cancelled() and task.exception() is None:
            self._decoded.put(place[0], place[1], task.result())

    async def _read_checked(self, store: ColdStore, message: BlockRead, then: Callable[[bytes], T]) -> T:
        """What `then` makes of a block's bytes, in the thread that has read and checked them."""

        def work() -> T | Corrupt:
            try:
                data = store.read_block(message.file, message.offset, message.length, message.crc)
            except Corrupt as error:
                return error
            return then(data)

        found = await self._reads.run(work)
        if isinstance(found, Corrupt):
            self.counters.add("crc_failures")
            whole = found.fields.get("reason") != "checksum"
            self._queue(Repair(message.file, message.offset, message.length, message.crc, whole))
            raise found
        self.counters.add("block_read_bytes", message.length)
        return found

    async def _write(self, store: ColdStore, message: FileWrite) -> FileWritten:
        size, crc = await self._writes.run(
            lambda: store.write_piece(
                message.file, message.disk, message.offset, message.data, last=message.last, crc=message.crc
            ),
            len(message.data),
        )
        self.counters.add("file_write_bytes", len(message.data))
        if message.last:
            self.counters.add("files_written")
        return FileWritten(size, crc)

    async def _list(self, store: ColdStore, message: FileList) -> Files:
        entries, more = await self._writes.run(lambda: store.list_files(message.cursor))
        return Files(
            names=[entry.name for entry in entries],
            sizes=pack_i64([entry.size for entry in entries]),
            ages_s=pack_i64([entry.age_s for entry in entries]),
            more=more,
        )

    async def _describe(self, store: ColdStore, message: FileInfo) -> FileFacts:
        stored, index = await self._reads.run(lambda: store.index(message.file))
        buckets = sorted({entry.bucket for entry in index.blocks})
        return FileFacts(stored.size, stored.disk, index.table, pack_u32(buckets), len(index.blocks))

    async def _read_piece(self, store: ColdStore, message: FileRead) -> FilePiece:
        stored, data = await self._reads.run(lambda: store.read_piece(message.file, message.offset, message.length))
        return FilePiece(stored.size, stored.disk, checksum(data), data)

    async def _remove(self, store: ColdStore, message: FileRemove) -> Pong:
        for file in message.files:
            check_name(file)  # all or nothing, as far as names go
        for file in message.files:
            if await self._writes.run(lambda name=file: store.remove(name)):  # type: ignore[misc]
                self.counters.add("files_removed")
        return Pong()

    # ------------------------------------------------------------ repair

    def _queue(self, repair: Repair) -> None:
        if repair in self._queued:
            return
        if len(self._queued) >= MAX_REPAIRS:
            self.counters.add("repairs_dropped")  # the next read of these bytes finds them again
            return
        self._queued.add(repair)
        self._repairs.append(repair)
        self._work.set()

    async def _repair_for_ever(self) -> None:
        while True:
            while not self._repairs:
                self._work.clear()
                await self._work.wait()
            repair = self._repairs.popleft()
            try:
                await self._repair_patiently(repair)
            except Exception:  # whatever it is, the next repair must have its turn
                self.counters.add("repairs_failed")
                logger.exception("%s: repair of %s failed", self.name, repair.file)
            finally:
                self._queued.discard(repair)

    async def _repair_patiently(self, repair: Repair) -> None:
        reason = "no other replica"
        for attempt in range(REPAIR_ATTEMPTS):
            for peer in self._peers():
                try:
                    await self._repair_from(peer, repair)
                except (TimeTierError, TimeoutError) as error:
                    reason = f"{peer}: {error}"
                    continue
                what = "files_repaired" if repair.whole else "blocks_repaired"
                self.counters.add(what)
                logger.warning("%s: restored %s at %d from %s", self.name, repair.file, repair.offset, peer)
                return
            await asyncio.sleep(_BACK_OFF_S * 2**attempt)
        self.counters.add("repairs_failed")
        logger.error("%s: can't restore %s at %d: %s", self.name, repair.file, repair.offset, reason)

    def _peers(self) -> list[str]:
        replicas = range(self.topology.cold_replicas)
        return [self.topology.cold_node(self.group, replica) for replica in replicas if replica != self.replica]

    async def _repair_from(self, peer: str, repair: Repair) -> None:
        store = self._open_store()
        if await self._is_good(store, repair):
            return
        piece = await self._fetch(peer, repair.file, repair.offset, repair.length)
        if len(piece.data) != repair.length or checksum(piece.data) != repair.crc:
            raise Corrupt(f"{repair.file}: {repair.length} bytes at {repair.offset} are damaged there too")
        if repair.whole:
            await self._copy_whole(store, peer, repair.file, piece.disk, piece.size)
        else:
            await self._writes.run(lambda: store.restore(repair.file, repair.offset, piece.data))
        if not await self._is_good(store, repair):
            raise Corrupt(f"{repair.file}: bytes at {repair.offset} are damaged again right after they were restored")

    async def _is_good(self, store: ColdStore, repair: Repair) -> bool:
        """Whether the bytes are right: an earlier repair may have covered them."""
        try:
            await self._reads.run(lambda: store.read_block(repair.file, repair.offset, repair.length, repair.crc))
        except Corrupt:
            return False
        return True

    async def _fetch(self, peer: str, file: str, offset: int, length: int) -> FilePiece:
        """A piece of a peer's file, intact as sent. Raises TimeTierError."""
        answer = await self.carrier.call(peer, FileRead(file, offset, length), _PEER_TIMEOUT_S)
        raise_failure(answer)
        if not isinstance(answer, FilePiece) or checksum(answer.data) != answer.crc:
            raise CallError(f"{peer} sent an unfit answer to FileRead")
        return answer

    async def _copy_whole(self, store: ColdStore, peer: str, file: str, disk: int, size: int) -> None:
        """Copy the whole file of a peer, piece by piece. Raises TimeTierError."""
        offset = 0
        try:
            while offset < size:
                length = min(_COPY_PIECE_BYTES, size - offset)
                piece = await self._fetch(peer, file, offset, length)
                if len(piece.data) != length:
                    raise Corrupt(f"{file} is truncated on {peer} too", reason="short")
                await asyncio.to_thread(store.add_to_copy, file, disk, offset, piece.data)
                offset += length
            await asyncio.to_thread(store.finish_copy, file, disk)
        finally:
            await asyncio.to_thread(store.drop_copy, file, disk)
