"""Keeps the disks of a cold node: opens them, watches them, has them filled again.

Each disk has threads of its own (`disk_lane.py`), so one that is slow to open, or hangs, keeps nobody from the others.
A disk whose read takes longer than `timeout_s` is taken out like one that fails, and whoever waits for it is answered.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from ..carriers.base import Carrier
from ..counters import Counters
from ..errors import InvalidRequest, TimeTierError
from ..messages import AskDisks, DiskList, DiskReplace, DiskRetry, Disks, Files, Pong, pack_i64
from ..messages.cold import DISK_ABSENT, DISK_FAILED, DISK_REPLACING, DISK_SERVES
from .disk import STATES, Disk
from .disk_lane import DiskLanes
from .pacing import TokenBucket
from .rebuild import WAITING, Rebuild
from .store import ColdStore

TICK_S = 1.0
MEASURE_TICKS = 10  # between two looks at the free space
WRITE_TIMES = 10  # so much longer than a read may a write take: it may have to wait for an fsync of a large file
_PEER_TIMEOUT_S = 5.0

logger = logging.getLogger(__name__)


class DiskKeeper:
    """The disks of one node, and the lanes of all that uses them. `on_whole`: called when all disks serve after some
    were filled."""

    def __init__(
        self,
        name: str,
        store: ColdStore,
        reads: DiskLanes,
        writes: DiskLanes,
        upkeep: DiskLanes,
        carrier: Carrier,
        counters: Counters,
        *,
        peers: Callable[[], Sequence[str]],
        rebuild_mb_per_s: float,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
        wall_s: Callable[[], float] = time.time,
        on_whole: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self._store = store
        self._reads = reads
        self._writes = writes
        self._lanes = (reads, writes, upkeep)
        self._carrier = carrier
        self._counters = counters
        self._peers = peers
        self._timeout_s = timeout_s
        self._clock = clock
        self._wall_s = wall_s
        self._on_whole = on_whole
        self._bucket = TokenBucket(rebuild_mb_per_s * (1 << 20), clock())
        self._rebuilds: dict[int, Rebuild] = {}
        self._kick = asyncio.Event()
        self._background: set[asyncio.Task[Any]] = set()
        self._replacing = asyncio.Lock()
        store.on_failure = lambda: counters.add("disk_failures")

    # ------------------------------------------------------------ life

    async def open(self, *, lost: bool) -> None:
        """Open the disks side by side; one that takes long is opened while the others serve. See `ColdStore.begin`.

        Raises Unavailable, InvalidRequest when it is not known which disks there should be.
        """
        await self._writes.run(lambda: self._store.begin(lost=lost))
        opening = [self._keep(self._open(disk)) for disk in self._store.disks]
        await asyncio.wait(opening, timeout=self._timeout_s)
        self._keep(self._watch())
        self._keep(self._rebuild_for_ever())

    async def stop(self) -> None:
        """End background work."""
        tasks = tuple(self._background)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _open(self, disk: Disk) -> None:
        try:
            await self._writes.run(lambda: self._store.open_disk(disk), disk=disk.ordinal)
        except TimeTierError as error:
            logger.error("%s: disk %d was not opened: %s", self.name, disk.ordinal, error.message)
        self._kick.set()

    def _keep(self, work: Any) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    # ------------------------------------------------------------ watching

    async def _watch(self) -> None:
        ticks = 0
        while True:
            await asyncio.sleep(TICK_S)
            ticks += 1
            for disk in self._store.disks:
                self._look_at(disk)
                if ticks % MEASURE_TICKS == 0 and disk.readable:
                    self._keep(self._measure(disk))

    def _look_at(self, disk: Disk) -> None:
        """Take a disk out that hangs."""
        read_s = TICK_S * self._reads.tick(disk.ordinal)
        write_s = TICK_S * self._writes.tick(disk.ordinal)
        if disk.readable and (read_s > self._timeout_s or write_s > WRITE_TIMES * self._timeout_s):
            disk.fail(f"it hangs: no answer for {max(read_s, write_s):.0f} s")
            self._release(disk)

    async def _measure(self, disk: Disk) -> None:
        try:
            await self._writes.run(lambda: self._store.measure(disk), disk=disk.ordinal)
        except TimeTierError as error:
            logger.info("%s: free space of disk %d: %s", self.name, disk.ordinal, error.message)

    # ------------------------------------------------------------ telling

    def disk(self, ordinal: int) -> Disk:
        """A disk by its ordinal. Raises InvalidRequest."""
        return self._store.disk(ordinal)

    def tell(self) -> list[dict[str, Any]]:
        """State of each disk, ready for JSON."""
        disks = self._store.disks
        self._counters.set("disks_out", sum(disk.state != DISK_SERVES for disk in disks))
        return [
            {
                "disk": disk.ordinal,
                "folder": str(disk.folder),
                "state": STATES[disk.state],
                "reason": disk.reason,
                "files": disk.files,
                "bytes": disk.nbytes,
                "free_bytes": disk.free_bytes,
                **({"rebuild": self._rebuild_of(disk)} if disk.state == DISK_REPLACING else {}),
            }
            for disk in disks
        ]

    def _rebuild_of(self, disk: Disk) -> dict[str, Any]:
        rebuild = self._rebuilds.get(disk.ordinal)
        return rebuild.progress.tell() if rebuild is not None and rebuild.disk is disk else {"phase": WAITING}

    def state(self) -> tuple[str, str]:
        """State of the node as far as its disks decide it, and why: it serves as long as one of them does."""
        out = [disk for disk in self._store.disks if disk.state != DISK_SERVES]
        reason = "; ".join(f"disk {disk.ordinal} is {STATES[disk.state]}: {disk.reason}" for disk in out)
        usable = len(out) < len(self._store.disks) or any(disk.readable for disk in out)
        return "serving" if usable else "refused", reason

    def alarms(self) -> list[str]:
        """What somebody should look at."""
        told = []
        for disk in self._store.disks:
            if disk.state in (DISK_FAILED, DISK_ABSENT):
                told.append(f"disk {disk.ordinal} is {STATES[disk.state]}: {disk.reason}")
            elif disk.state == DISK_REPLACING:
                rebuild = self._rebuild_of(disk)
                if rebuild.get("given_up"):
                    told.append(f"disk {disk.ordinal}: {rebuild['given_up']} files are damaged on every other replica")
                if rebuild["phase"] == WAITING and rebuild.get("reason"):
                    told.append(f"disk {disk.ordinal} waits to be filled: {rebuild['reason']}")
        return told

    def answer(self) -> Disks:
        """Answer to `AskDisks`."""
        disks = self._store.disks
        return Disks(
            bytes(disk.state for disk in disks),
            pack_i64([disk.free_bytes for disk in disks]),
            [disk.reason for disk in disks],
        )

    def list(self, message: DiskList) -> Files:
        """Files of one disk. Raises InvalidRequest, Unavailable unless it has all of them."""
        self._store.disk(message.disk).require()
        entries, more = self._store.list_files(message.cursor, disk=message.disk)
        return Files(
            names=[entry.name for entry in entries],
            sizes=pack_i64([entry.size for entry in entries]),
            ages_s=pack_i64([entry.age_s for entry in entries]),
            more=more,
        )

    # ------------------------------------------------------------ replacing

    async def retry(self, message: DiskRetry) -> Disks:
        """Look again at a disk that is out. Raises InvalidRequest, Unavailable."""
        disk = self._store.disk(message.disk)
        if not disk.readable:
            self._release(disk)
            await self._writes.run(lambda: self._store.reopen_disk(disk.ordinal), disk=disk.ordinal)
            self._kick.set()
        return self.answer()

    async def replace(self, message: DiskReplace) -> Pong:
        """Begin to fill a disk from the peers. Raises InvalidRequest, Unavailable."""
        disk = self._store.disk(message.disk)
        if disk.state == DISK_REPLACING and not message.erase:
            return Pong()  # it is under way
        async with self._replacing:
            if message.erase:
                await self._require_peer(disk)
            self._release(disk)
            await self._writes.run(
                lambda: self._store.replace_disk(disk.ordinal, erase=message.erase), disk=disk.ordinal
            )
        logger.warning("%s: disk %d is replaced and filled from the other replicas", self.name, disk.ordinal)
        self._counters.add("disks_replaced")
        self._kick.set()
        return Pong()

    def _release(self, disk: Disk) -> None:
        """Let go of threads that hang in a disk that is out."""
        if not disk.readable:
            for lanes in self._lanes:
                lanes.release(disk.ordinal, disk.out())

    async def _require_peer(self, disk: Disk) -> None:
        """Raises InvalidRequest unless another replica has the files that are to be removed here."""
        reasons = []
        for peer in self._peers():
            try:
                answer = await self._carrier.call(peer, AskDisks(), _PEER_TIMEOUT_S)
            except TimeTierError as error:
                reasons.append(f"{peer}: {error.message}")
                continue
            if isinstance(answer, Disks) and answer.states[disk.ordinal : disk.ordinal + 1] == bytes((DISK_SERVES,)):
                return
            told = answer.reasons[disk.ordinal] if isinstance(answer, Disks) else type(answer).__name__
            reasons.append(f"{peer}: {told}")
        raise InvalidRequest(
            f"disk {disk.ordinal} is not erased: no other replica has that disk in service, so nothing could be copied "
            f"back ({'; '.join(reasons) or 'there is no other replica'})"
        )

    async def _rebuild_for_ever(self) -> None:
        """Have each disk filled that waits for it."""
        while True:
            for disk in self._store.disks:
                known = self._rebuilds.get(disk.ordinal)
                if disk.state == DISK_REPLACING and disk.mark is not None and (known is None or known.disk is not disk):
                    rebuild = self._rebuilds[disk.ordinal] = self._rebuild_for(disk)
                    self._keep(self._fill(rebuild))
            self._kick.clear()
            await self._kick.wait()

    def _rebuild_for(self, disk: Disk) -> Rebuild:
        return Rebuild(
            self._store,
            disk,
            self._carrier,
            self._writes,
            self._bucket,
            peers=self._peers,
            clock=self._clock,
            wall_s=self._wall_s,
        )

    async def _fill(self, rebuild: Rebuild) -> None:
        disk = rebuild.disk
        try:
            await rebuild.run()
        except Exception as error:  # whatever it is, it must be seen
            disk.fail(f"it can't be filled: {error}")
            logger.exception("%s: disk %d can't be filled", self.name, disk.ordinal)
        self._counters.add("files_rebuilt", rebuild.copied)
        if disk.state != DISK_SERVES:
            return
        self._counters.add("disks_rebuilt")
        logger.warning("%s: disk %d is filled: %d files", self.name, disk.ordinal, rebuild.progress.files_done)
        if all(disk.state == DISK_SERVES for disk in self._store.disks):
            self._on_whole()
