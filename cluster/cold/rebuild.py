"""Filling one disk of a cold node with the files that its peers have on the disk of the same ordinal.

The files wanted are those that any peer lists. Each is put together and checked by `mending.py`: every piece by the
file's own checksums, from whichever peer has it right, read back from the disk before it gets its name. So what has
its name need not be copied again after a restart; what was half copied is. That the disk is being filled is in its
marker, so a node that starts again goes on by itself, and only when a look at the peers finds nothing more to copy is
that taken back.

All copying of a node goes through one token bucket, however many disks wait to be filled; they take turns.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from ..carriers.base import Address, Carrier, Then
from ..errors import Corrupt, TimeTierError, Unavailable
from ..messages import DiskList, FilePiece, Files, Message, raise_failure, unpack_i64
from ..messages.cold import DISK_REPLACING
from .disk import DISK_REASON, Disk
from .disk_lane import DiskLanes
from .mending import MISSING, DiskWork, Gone, Mender, Repair
from .pacing import TokenBucket
from .store import ColdStore

PEER_TIMEOUT_S = 10.0
FIRST_PAUSE_S = 0.5  # after a pass that left something; doubles
LONGEST_PAUSE_S = 30.0
WAITING = "waiting"  # phase: for peers, or to begin
MAX_TRIES = 3  # of a file of which no peer has all pieces right

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(slots=True)
class Progress:
    """How far the filling of a disk is. `peer`: who gave the last bytes; `reason`: why it waits, "" if it does not.

    `files`, `bytes`: wanted, 0 until the peers have listed them; `..._done`: there. `given_up`: files that are damaged
    on every peer. `mb_per_s`: MiB copied a second since this process has begun.
    """

    phase: str = WAITING
    peer: str = ""
    files: int = 0
    files_done: int = 0
    bytes: int = 0
    bytes_done: int = 0
    given_up: int = 0
    mb_per_s: float = 0.0
    reason: str = ""

    def tell(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


class _PacedCarrier:
    """A carrier whose answers with pieces of files are counted, and paid for before the next question."""

    def __init__(self, inner: Carrier, pay: Callable[[str, int], Any]) -> None:
        self._inner = inner
        self._pay = pay

    async def call(self, node: str, message: Message, timeout_s: float) -> Message:
        answer = await self._inner.call(node, message, timeout_s)
        if isinstance(answer, FilePiece):
            await self._pay(node, len(answer.data))
        return answer

    def begin(self, node: str, message: Message, timeout_s: float, then: Then) -> None:
        self._inner.begin(node, message, timeout_s, then)

    def send(self, node: str, message: Message) -> bool:
        return self._inner.send(node, message)

    def update(self, addresses: Mapping[str, Address]) -> None:
        self._inner.update(addresses)

    async def close(self) -> None:
        await self._inner.close()


class _FillingWork(DiskWork):
    """Upkeep of a disk that is being filled: what it lacks is not there for us, though away for readers."""

    async def on_file(self, file: str, work: Callable[[ColdStore], T]) -> T:
        try:
            return await super().on_file(file, work)
        except Unavailable as error:
            if error.fields.get("reason") != DISK_REASON:
                raise
            raise Corrupt(f"{file} is not there yet", reason=MISSING) from None


class Rebuild:
    """Fills `disk` of `store`. `peers`: names of the other replicas, as they are now; `clock`: monotonic seconds."""

    def __init__(
        self,
        store: ColdStore,
        disk: Disk,
        carrier: Carrier,
        lanes: DiskLanes,
        bucket: TokenBucket,
        *,
        peers: Callable[[], Sequence[str]],
        clock: Callable[[], float],
        wall_s: Callable[[], float],
    ) -> None:
        self.disk = disk
        self.progress = Progress()
        self.copied = 0  # files
        self._store = store
        self._carrier = carrier
        self._lanes = lanes
        self._work = _FillingWork(store, lanes)
        self._bucket = bucket
        self._peers = peers
        self._clock = clock
        self._wall_s = wall_s
        self._mender = Mender(_PacedCarrier(carrier, self._pay), peers=peers)
        self._failed: Counter[str] = Counter()  # tries of files that no peer has right
        self._nbytes = 0
        self._began_s = clock()

    async def run(self) -> None:
        """Return when the disk serves, or was taken out."""
        pause_s = FIRST_PAUSE_S
        while self.disk.state == DISK_REPLACING:
            try:
                copied, left = await self._pass()
                if not copied and not left:
                    self.progress.phase = "done"
                    await self._lanes.run(lambda: self._store.end_rebuild(self.disk), disk=self.disk.ordinal)
                    return
            except TimeTierError as error:
                self.progress.reason, copied = error.message, 0
            if not copied:
                self.progress.phase = WAITING
                logger.warning("disk %d waits to be filled: %s", self.disk.ordinal, self.progress.reason)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _pass(self) -> tuple[int, int]:
        """Copy what the peers have and this disk has not. Files that were copied, and that could not be."""
        progress = self.progress
        progress.phase = "listing"
        wanted = await self._list()
        self._store.expect(self.disk, wanted)
        lacking = self._store.lacking(self.disk)
        progress.phase, progress.reason = "copying", ""
        progress.files, progress.bytes = len(wanted), sum(size for size, _ in wanted.values())
        progress.files_done = len(wanted) - len(lacking)
        progress.bytes_done = progress.bytes - sum(wanted[name][0] for name in lacking)
        copied = left = 0
        for name in sorted(lacking):
            if self._failed[name] >= MAX_TRIES:
                continue
            size, age_s = wanted[name]
            if await self._copy(name, self._wall_s() - age_s):
                copied += 1
                self.copied += 1
                progress.files_done += 1
                progress.bytes_done += size
            elif self._failed[name] < MAX_TRIES:
                left += 1
        progress.given_up = sum(tries >= MAX_TRIES for tries in self._failed.values())
        return copied, left

    async def _copy(self, name: str, modified_s: float) -> bool:
        """Copy one file. Whether it is there, or no longer wanted. Raises Unavailable when the disk is out."""

        def wanted() -> bool:
            return self._store.is_expected(self.disk, name)

        try:
            await self._mender.mend(self._work, Repair.of_file(name), wanted)
            await self._lanes.run(lambda: self._store.set_modified(name, modified_s), disk=self.disk.ordinal)
        except Gone:
            self._store.forget_away(self.disk, name)
        except Corrupt as error:
            self._failed[name] += 1
            self.progress.reason = error.message
            if self._failed[name] >= MAX_TRIES:
                logger.error("disk %d: %s is not copied: %s", self.disk.ordinal, name, error.message)
            return False
        except TimeTierError as error:
            if self.disk.state != DISK_REPLACING:
                raise
            self.progress.reason = f"{name}: {error.message}"
            return False
        return True

    async def _list(self) -> dict[str, tuple[int, int]]:
        """(size, age in seconds) of each file that some peer has on this disk. Raises Unavailable if none can tell."""
        found: dict[str, tuple[int, int]] = {}
        reasons = []
        peers = self._peers()
        for peer in peers:
            try:
                for name, size, age_s in await self._list_of(peer):
                    known_age_s = found[name][1] if name in found else 0
                    found[name] = size, max(age_s, known_age_s)
            except TimeTierError as error:
                reasons.append(f"{peer}: {error.message}")
        if len(reasons) == len(peers) and peers:
            raise Unavailable(f"no other replica has disk {self.disk.ordinal} in service ({'; '.join(reasons)})")
        return found

    async def _list_of(self, peer: str) -> list[tuple[str, int, int]]:
        files: list[tuple[str, int, int]] = []
        cursor, more = "", True
        while more:
            answer = await self._carrier.call(peer, DiskList(self.disk.ordinal, cursor), PEER_TIMEOUT_S)
            raise_failure(answer)
            if not isinstance(answer, Files):
                raise Unavailable(f"an unfit answer to DiskList: {type(answer).__name__}")
            files += zip(answer.names, unpack_i64(answer.sizes), unpack_i64(answer.ages_s), strict=True)
            more = answer.more and bool(answer.names) and answer.names[-1] > cursor
            cursor = answer.names[-1] if answer.names else cursor
        return files

    async def _pay(self, peer: str, nbytes: int) -> None:
        """Wait until these bytes are within the rate."""
        self._bucket.take(nbytes, self._clock())
        self._nbytes += nbytes
        self.progress.peer = peer
        wait_s = self._bucket.wait_s(self._clock())
        if wait_s > 0:
            await asyncio.sleep(wait_s)
        took_s = self._clock() - self._began_s
        self.progress.mb_per_s = round(self._nbytes / (1 << 20) / took_s, 1) if took_s > 0 else 0.0
