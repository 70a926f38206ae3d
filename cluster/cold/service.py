"""A cold node: serves blocks, takes files, heals itself from its peers.

Disks are slow and may hang, so all I/O runs in threads, and each disk has its own, in lanes: reads share `read_threads`
threads behind a bounded queue, everything else has one thread, so neither a long file nor another disk delays a read.

A block whose checksum is wrong, or whose file is missing or truncated, is answered with Corrupt (the reader goes on
to the next replica) and joins the *repair queue* (`repairs.py`).
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ..carriers.base import Carrier, Reply
from ..carriers.connection import host_id
from ..counters import Counters
from ..errors import Corrupt, InvalidRequest, TimeTierError, Unavailable
from ..messages import (
    AskDisks,
    AskPlaces,
    BlockBytes,
    BlockRead,
    DiskList,
    DiskReplace,
    DiskRetry,
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
    Places,
    Pong,
    ScrubNow,
    Status,
    StatusRequest,
    pack_i64,
    pack_u32,
)
from ..topology import Topology
from .block import DecodedBlock, checksum, decode_block
from .block_cache import BlockCache
from .disk_keeper import DiskKeeper
from .disk_lane import DiskLanes
from .disk_marks import Owner
from .fencing import EpochFence
from .files import Files as FileAccess
from .files import SystemFiles
from .mending import MISSING, Repair
from .repairs import Repairs
from .scrub_round import ScrubSettings
from .scrubber import Scrubber
from .store import ColdStore, check_name

MAX_QUEUED_READS = 1_024
MAX_QUEUED_WRITES = 64

logger = logging.getLogger(__name__)
T = TypeVar("T")


class ColdService:
    """One replica of a cold group (see `service.py` for the methods).

    `folder`: its data folder, with a folder for each of its `disks`. `read_threads`: block reads at the same time.
    `block_cache_bytes`: of decoded blocks, which readers of other owners in them find in memory; 0 keeps none.
    `scrub`: when all files are read and checked; None for never.
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
        disk_dirs: Sequence[Path] | None = None,
        disk_timeout_s: float = 30.0,
        rebuild_mb_per_s: float = 64.0,
        lost: bool = False,
        on_whole: Callable[[], None] = lambda: None,
        block_cache_bytes: int = 16 << 20,
        scrub: ScrubSettings | None = None,
        files: FileAccess | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        """`disk_dirs`, `files`, `clock`, `wall_s`: as in `ColdStore`. `disk_timeout_s`: after which a disk counts as
        hanging. `lost`: the node's folder was, so its disks are filled by the peers; `on_whole`: called when they are.
        Raises InvalidRequest.
        """
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
        self._files = ColdStore(
            self.folder,
            disks,
            disk_dirs=disk_dirs,
            owner=Owner(topology.cluster_id, name),
            files=files,
            clock=clock,
            wall_s=wall_s,
        )
        self._reads = DiskLanes(f"{name}-read", disks, read_threads, MAX_QUEUED_READS)
        self._writes = DiskLanes(f"{name}-write", disks, 1, MAX_QUEUED_WRITES)
        self._epochs = EpochFence(files or SystemFiles(), self.folder)
        self._store: ColdStore | None = None
        self._decoded: BlockCache[DecodedBlock] = BlockCache(block_cache_bytes)
        self._decoding: dict[tuple[str, int, int, int], asyncio.Task[DecodedBlock]] = {}
        self._wanted_until: dict[tuple[str, int, int, int], float] = {}  # of those, by the clock
        self._clock = clock
        self._state, self._reason = "starting", ""
        self._upkeep = DiskLanes(f"{name}-upkeep", disks, 1, MAX_QUEUED_WRITES)
        self.keeper = DiskKeeper(
            name,
            self._files,
            self._reads,
            self._writes,
            self._upkeep,
            carrier,
            counters,
            peers=self._peers,
            rebuild_mb_per_s=rebuild_mb_per_s,
            timeout_s=disk_timeout_s,
            clock=clock,
            wall_s=wall_s,
            on_whole=on_whole,
        )
        self._lost = lost
        self._log_files = files or SystemFiles()
        self.repairs = Repairs(name, carrier, counters, self._upkeep, peers=self._peers, clock=clock, wall_s=wall_s)
        self.scrubber = Scrubber(
            name,
            carrier,
            counters,
            self._reads,
            self._upkeep,
            self.repairs,
            scrub or ScrubSettings(),
            peers=self._peers,
            share=(replica + 1) / (topology.cold_replicas + 1),
            clock=clock,
            wall_s=wall_s,
        )

    async def start(self) -> None:
        """Find the files and begin to serve; a folder that can't be used leaves the node refusing."""
        try:
            await self.keeper.open(lost=self._lost)
        except TimeTierError as error:
            self._state, self._reason = "refused", error.message
            logger.error("%s refuses to serve: %s", self.name, error.message)
            return
        self._store = self._files
        self._state = "serving"
        await self.repairs.start(self._store, self._log_files)
        await self.scrubber.start(self._store, self._log_files)

    async def stop(self) -> None:
        """End background work; reads that are under way end first."""
        self._state, self._reason = "stopped", "stopped"
        await self.scrubber.stop()
        await self.repairs.stop()
        await self.keeper.stop()
        for lane in (self._reads, self._writes, self._upkeep):
            await lane.close()
        await asyncio.gather(*self._decoding.values(), return_exceptions=True)

    def update(self, topology: Topology) -> None:
        """Go by another shape of the cluster."""
        self.topology = topology

    def status(self) -> dict[str, Any]:
        """State, files, bytes, queues and counters."""
        files, size = self._store.totals() if self._store is not None else (0, 0)
        self.counters.set("files", files)
        self.counters.set("file_bytes", size)
        self.counters.set("repair_queue", len(self.repairs))
        self.counters.set("read_queue", self._reads.waiting)
        state, reason = self.keeper.state() if self._state == "serving" else (self._state, self._reason)
        disks = self.keeper.tell()
        return {
            "name": self.name,
            "tier": "cold",
            "state": state,
            "reason": reason,
            "alarms": self.keeper.alarms() + self.repairs.alarms(),
            "files": files,
            "bytes": size,
            "disks": disks,
            "repair_queue": len(self.repairs),
            "repairs": self.repairs.status(),
            "scrub": self.scrubber.status(),
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
        if isinstance(message, ScrubNow):
            self.scrubber.begin(message.mb_per_s)
            return Pong()
        if isinstance(message, AskDisks):
            return self.keeper.answer()
        if isinstance(message, DiskList):
            return self.keeper.list(message)
        if isinstance(message, DiskReplace):
            return await self.keeper.replace(message)
        if isinstance(message, DiskRetry):
            return await self.keeper.retry(message)
        if isinstance(message, AskPlaces):
            paths = [store.place(file) for file in message.files]
            return Places(host_id(), [str(path) if path is not None else "" for path in paths])
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
            return BlockBytes(await self._read_checked(store, message, bytes, self._until(message)))
        block = self._decoded.get(message.file, message.offset)
        if block is None:
            block = await self._decode_once(store, message)
        part = block.part_of(message.owner)
        return BlockBytes(part, True, checksum(part))

    async def _decode_once(self, store: ColdStore, message: BlockRead) -> DecodedBlock:
        """A decoded block; who asks for a block that is being read waits for that read."""
        place = message.file, message.offset, message.length, message.crc
        until = self._wanted_until[place] = max(self._wanted_until.get(place, 0.0), self._until(message))
        task = self._decoding.get(place)
        if task is None:
            decode = partial(decode_block, format=message.format)
            task = self._decoding[place] = asyncio.create_task(self._read_checked(store, message, decode, until))
            task.add_done_callback(lambda done: self._keep(place, done))
        return await asyncio.shield(task)

    def _until(self, message: BlockRead) -> float:
        """Until when somebody waits for a block, by the clock."""
        return self._clock() + message.timeout_ms / 1_000 if message.timeout_ms else math.inf

    def _keep(self, place: tuple[str, int, int, int], task: asyncio.Task[DecodedBlock]) -> None:
        del self._decoding[place], self._wanted_until[place]
        if not task.cancelled() and task.exception() is None:
            self._decoded.put(place[0], place[1], task.result())

    async def _read_checked(self, store: ColdStore, message: BlockRead, then: Callable[[bytes], T], until: float) -> T:
        """What `then` makes of a block's bytes, in the thread that has read and checked them.

        What nobody waits for any more, when a thread comes to it, is not read: behind many others it would have those
        wait that somebody still wants.
        """
        place = message.file, message.offset, message.length, message.crc

        def work() -> T | Corrupt | Unavailable:
            if self._clock() > max(until, self._wanted_until.get(place, 0.0)):
                return Unavailable("its time was over before a thread was free for it")
            try:
                data = store.read_block(message.file, message.offset, message.length, message.crc)
            except Corrupt as error:
                return error
            return then(data)

        found: T | Corrupt | Unavailable
        try:
            found = await self._on_disk_of(self._reads, store, message.file, work)
        except Corrupt as error:
            found = error
        if isinstance(found, Corrupt):
            self.counters.add("crc_failures")
            whole = found.fields.get("reason") != "checksum"
            self.repairs.add(Repair(message.file, message.offset, message.length, message.crc, whole))
            raise found
        if isinstance(found, Unavailable):
            self.counters.add("abandoned_reads")
            raise found
        self.counters.add("block_read_bytes", message.length)
        return found

    async def _write(self, store: ColdStore, message: FileWrite) -> FileWritten:
        def work() -> tuple[int, int]:
            with self._epochs.admitted(message.epoch):
                return store.write_piece(
                    message.file, message.disk, message.offset, message.data, last=message.last, crc=message.crc
                )

        size, crc = await self._writes.run(work, len(message.data), disk=store.disk(message.disk).ordinal)
        self.counters.add("file_write_bytes", len(message.data))
        if message.last:
            self.counters.add("files_written")
        return FileWritten(size, crc)

    async def _list(self, store: ColdStore, message: FileList) -> Files:
        entries, more = store.list_files(message.cursor)
        return Files(
            names=[entry.name for entry in entries],
            sizes=pack_i64([entry.size for entry in entries]),
            ages_s=pack_i64([entry.age_s for entry in entries]),
            more=more,
        )

    async def _describe(self, store: ColdStore, message: FileInfo) -> FileFacts:
        try:
            stored, index = await self._on_disk_of(self._reads, store, message.file, lambda: store.index(message.file))
        except Corrupt as error:
            if error.fields.get("reason") != MISSING:
                self.repairs.add(Repair.of_file(message.file))
            raise
        buckets = sorted({entry.bucket for entry in index.blocks})
        return FileFacts(stored.size, stored.disk, index.table, pack_u32(buckets), len(index.blocks))

    async def _read_piece(self, store: ColdStore, message: FileRead) -> FilePiece:
        stored, data = await self._on_disk_of(
            self._reads, store, message.file, lambda: store.read_piece(message.file, message.offset, message.length)
        )
        return FilePiece(stored.size, stored.disk, checksum(data), data)

    async def _remove(self, store: ColdStore, message: FileRemove) -> Pong:
        for file in message.files:
            check_name(file)  # all or nothing, as far as names go

        def work(file: str) -> bool:
            with self._epochs.admitted(message.epoch):
                return bool(file) and store.remove(file)

        for file in message.files or [""]:  # the epoch counts also without a file
            found = await self._writes.run(partial(work, file), disk=store.disk_of(file))
            self.repairs.forget(file)
            if found:
                self.counters.add("files_removed")
        return Pong()

    @staticmethod
    async def _on_disk_of(lanes: DiskLanes, store: ColdStore, file: str, work: Callable[[], T]) -> T:
        """Result of work in a thread of the disk that has the file. Raises Corrupt, Unavailable as `store.find`."""
        return await lanes.run(work, disk=store.find(file).disk)

    def _peers(self) -> list[str]:
        replicas = range(self.topology.cold_replicas)
        return [self.topology.cold_node(self.group, replica) for replica in replicas if replica != self.replica]
