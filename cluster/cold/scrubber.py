"""The scrubber of a cold node: reads all that lies on its disks, so that damage is found while there are good copies.

Round after round it goes through the files by name: end and head, name, and each block against the file's own index
(`pieces.py`). What is damaged joins the repair queue. Files that all other replicas have and this node has not join it
too; a file that only one of them has may be garbage whose removal that node has missed, and is left to the sink.

It has the lowest priority: threads and a rate of its own; before each step it waits while reads are under way, for a
second at most, so that it gets on under any load; and what it has read does not stay in the page cache, nor does it
read from there, since the disk is what is to be checked. How far it is survives a restart.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from ..carriers.base import CallError, Carrier
from ..counters import Counters
from ..errors import Corrupt, TimeTierError
from ..messages import FileList, unpack_i64
from ..messages import Files as FilesAnswer
from .disk_lane import DiskLanes
from .files import Files
from .mending import MISSING, DiskWork, OwnCopy, Repair, anatomy_of
from .pieces import GUESSED_TAIL_BYTES, Piece, parts_to_read
from .repair_log import Place
from .repairs import MAX_REPAIRS, Repairs
from .scrub_round import Round, ScrubSettings, ScrubState, read_state, write_state
from .store import ColdStore

USUAL_MB_PER_S = 10.0  # of a round that is asked for where the configuration says 0
_STEP_BYTES = 1 << 20
_PATIENCE_S = 1.0  # that a step waits for reads
_LOOK_EVERY_S = 0.01
_BURST_S = 0.1  # of idle time that may be made up for
_SAVE_EVERY_S = 10.0
_PEER_TIMEOUT_S = 10.0
_PAGE = 1_000

logger = logging.getLogger(__name__)


class Scrubber:
    """Checks the files of one node. `reads`: the lanes of readers, who come first. `lanes`: for its own disk work.

    `share`: of `every_s`, after which the very first round begins: replicas differ in it, so they are not busy at once.
    """

    def __init__(
        self,
        name: str,
        carrier: Carrier,
        counters: Counters,
        reads: DiskLanes,
        lanes: DiskLanes,
        repairs: Repairs,
        settings: ScrubSettings,
        *,
        peers: Callable[[], list[str]],
        share: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        """`clock`: monotonic seconds. `wall_s`: seconds since 1970."""
        self.name = name
        self.settings = settings
        self._carrier = carrier
        self._counters = counters
        self._reads = reads
        self._lanes = lanes
        self._repairs = repairs
        self._peers = peers
        self._share = share
        self._clock = clock
        self._wall_s = wall_s
        self._state = ScrubState()
        self._found: set[Place] = set()  # in the last round, and still to be repaired
        self._store: ColdStore | None = None
        self._files: Files | None = None
        self._asked = asyncio.Event()
        self._free_at = 0.0  # monotonic seconds from which on the rate allows more
        self._saved_at = 0.0
        self._began = (0.0, 0)  # monotonic seconds, and bytes done, when this life took up the round
        self._waits = False
        self._task: asyncio.Task[None] | None = None

    async def start(self, store: ColdStore, files: Files) -> None:
        """Begin, from where the node was. `files`: where the state lies, in the folder of `store`."""
        self._store, self._files = store, files
        try:
            self._state = await self._lanes.run(lambda: read_state(files, store.folder))
        except (OSError, TimeTierError) as error:
            logger.error("%s: the state of scrubbing can't be read: %s", self.name, error)
        self._plan()
        self._repairs.on_end = self._repaired
        self._task = asyncio.create_task(self._scrub_for_ever(DiskWork(store, self._lanes)), name=f"{self.name}-scrub")

    async def stop(self) -> None:
        """End background work."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            await self._save()

    def begin(self, mb_per_s: float = 0.0) -> bool:
        """Start a round at once, at the configured rate or another. False if one is under way: it takes the rate."""
        rate = mb_per_s or (0.0 if self.settings.mb_per_s else USUAL_MB_PER_S)
        fresh = self._state.now is None
        if self._state.now is None:
            self._state.now = Round(self._wall_s(), mb_per_s=rate)
        elif rate:
            self._state.now.mb_per_s = rate
        self._asked.set()
        return fresh

    def status(self) -> dict[str, Any]:
        """Progress of the round under way, figures of the last one, when the next one begins."""
        state = self._state
        files, nbytes = self._store.totals() if self._store is not None else (0, 0)
        now = state.now
        told: dict[str, Any] = {
            "state": ("paused" if self._waits else "running") if now and self._rate() else self._idle_state(),
            "mb_per_s_limit": self._rate(),
            "next_at": round(state.next_at, 3) if self.settings.mb_per_s else None,
            "last": state.last.figures() if state.last else None,
        }
        if now is not None:
            told["round"] = {
                "began_at": round(now.began_at, 3),
                "files": now.files,
                "files_total": max(files, now.files),
                "bytes": now.nbytes,
                "bytes_total": max(nbytes, now.nbytes),
                "mb_per_s": round(self._speed(now), 3),
                "found": now.found,
                "repaired": now.repaired,
                "errors": now.errors,
            }
        return told

    # ------------------------------------------------------------ when

    def _idle_state(self) -> str:
        return "waiting" if self.settings.mb_per_s else "off"

    def _rate(self) -> float:
        now = self._state.now
        return (now.mb_per_s if now is not None else 0.0) or self.settings.mb_per_s

    def _speed(self, now: Round) -> float:
        """MB/s of this life's part of the round."""
        began_s, before = self._began
        return (now.nbytes - before) / max(self._clock() - began_s, 1e-3) / 1e6 if began_s else 0.0

    def _plan(self) -> None:
        """Say when the next round is due: also for a clock that was put back meanwhile."""
        now, every_s = self._wall_s(), self.settings.every_s
        if not self._state.next_at:
            self._state.next_at = now + every_s * self._share
        self._state.next_at = min(self._state.next_at, now + every_s)

    async def _scrub_for_ever(self, work: DiskWork) -> None:
        await self._save()
        while True:
            try:
                await self._until_due()
                await self._round(work)
            except TimeTierError as error:  # the node does not serve just now
                logger.warning("%s: scrubbing is put off: %s", self.name, error)
                await asyncio.sleep(_SAVE_EVERY_S)

    async def _until_due(self) -> None:
        while not (self._state.now is not None and self._rate()):
            self._asked.clear()
            wait_s = self._state.next_at - self._wall_s() if self.settings.mb_per_s else None
            if wait_s is not None and wait_s <= 0:
                self.begin()
                return
            try:
                await asyncio.wait_for(self._asked.wait(), wait_s)
            except TimeoutError:
                continue  # it is due

    async def _round(self, work: DiskWork) -> None:
        now = self._state.now
        assert now is not None, "a round was begun"
        self._found = {one for one in self._found if one in self._repairs}
        self._began = self._clock(), now.nbytes
        if not now.compared:
            await self._compare(work.store, now)
            now.compared = True
        while True:
            names, more = work.store.list_files(now.cursor, _PAGE)
            for entry in names:
                start = now.nbytes
                await self._check(work, now, entry.name, entry.size)
                now.cursor, now.files = entry.name, now.files + 1
                now.nbytes = start + entry.size
                if self._clock() >= self._saved_at + _SAVE_EVERY_S:
                    await self._save()
            if not more:
                break
        now.ended_at = self._wall_s()
        self._counters.add("scrub_rounds")
        self._state.now, self._state.last = None, now
        self._state.next_at = max(now.began_at + self.settings.every_s, now.ended_at)
        self._plan()
        await self._save()
        logger.info("%s: scrubbed %d files of %d bytes, found %d", self.name, now.files, now.nbytes, now.found)

    async def _save(self) -> None:
        store, files = self._store, self._files
        assert store is not None and files is not None, "it was started"
        self._saved_at = self._clock()
        try:
            await self._lanes.run(lambda: write_state(files, store.folder, self._state))
        except (OSError, TimeTierError) as error:
            logger.error("%s: the state of scrubbing can't be written: %s", self.name, error)

    # ------------------------------------------------------------ one file

    async def _check(self, work: DiskWork, now: Round, file: str, size: int) -> None:
        """Read one file, and have repaired what is damaged."""
        try:
            await self._turn(min(size, GUESSED_TAIL_BYTES))
            anatomy = await anatomy_of(OwnCopy(work, file), file)
            if not anatomy.sealed and await self._repairs.mender.compare(work, file):
                raise Corrupt(f"the other replicas agree on another content of {file}", reason="content")
            for run in parts_to_read(anatomy, _STEP_BYTES):
                length = run[-1].end - run[0].offset
                await self._turn(length)
                for piece in await work.on_file(file, lambda store, run=run: _damaged(store, file, run)):  # type: ignore[misc]
                    self._report(now, Repair(file, piece.offset, piece.length, piece.crc or 0, False))
                now.nbytes += length
                self._counters.add("scrub_bytes", length)
        except Corrupt as error:
            if error.fields.get("reason") != MISSING or _should_be_here(work.store, file):
                self._report(now, Repair.of_file(file))
        except TimeTierError as error:
            now.errors += 1
            self._counters.add("scrub_errors")
            logger.warning("%s: %s is not scrubbed: %s", self.name, file, error)
        else:
            self._counters.add("scrub_files")

    def _report(self, now: Round, repair: Repair) -> None:
        if repair.place in self._found:
            return
        now.found += 1
        self._counters.add("scrub_found")
        if self._repairs.add(repair) and len(self._found) < MAX_REPAIRS:
            self._found.add(repair.place)

    def _repaired(self, place: Place, repaired: bool) -> None:
        round_ = self._state.now or self._state.last
        if place in self._found:
            self._found.discard(place)
            if round_ is not None:
                round_.repaired += repaired

    async def _turn(self, nbytes: int) -> None:
        """Wait until readers have theirs, and the rate allows so many bytes."""
        deadline = self._clock() + _PATIENCE_S
        while self._reads.waiting and self._clock() < deadline:
            self._waits = True
            await asyncio.sleep(_LOOK_EVERY_S)
        self._waits = False
        now = self._clock()
        self._free_at = max(self._free_at, now - _BURST_S) + nbytes / (self._rate() * 1e6)
        if self._free_at > now:
            await asyncio.sleep(self._free_at - now)

    # ------------------------------------------------------------ what is missing

    async def _compare(self, store: ColdStore, now: Round) -> None:
        """Have restored what all other replicas have, and this one has not."""
        peers = self._peers()
        cursor, more = "", True
        while more and len(peers) > 1:
            pages = [await self._list_of(peer, cursor) for peer in peers]
            if any(page is None for page in pages):
                logger.info("%s: not all other replicas tell what they have: nothing is compared", self.name)
                return
            lists = [page for page in pages if page is not None]
            # As far as all of them have told: beyond that a name may be on one's next page.
            ends = [max(names) for names, goes_on in lists if goes_on]
            cursor, more = min(ends, default=""), bool(ends)
            for file in sorted(set.intersection(*(set(names) for names, _ in lists))):
                sizes = {names[file][0] for names, _ in lists}
                young = min(names[file][1] for names, _ in lists) < self.settings.grace_s
                if len(sizes) == 1 and not young and (not more or file <= cursor) and _is_missing(store, file):
                    self._report(now, Repair.of_file(file, sure=False))

    async def _list_of(self, peer: str, cursor: str) -> tuple[dict[str, tuple[int, int]], bool] | None:
        """({name: (size, age in seconds)}, whether it goes on) of a peer's files after `cursor`; None if it is away."""
        try:
            answer = await self._carrier.call(peer, FileList(cursor), _PEER_TIMEOUT_S)
        except (CallError, TimeoutError):
            return None
        if not isinstance(answer, FilesAnswer):
            return None
        facts = zip(unpack_i64(answer.sizes), unpack_i64(answer.ages_s), strict=True)
        return dict(zip(answer.names, facts, strict=True)), answer.more and bool(answer.names)


def _damaged(store: ColdStore, file: str, run: list[Piece]) -> list[Piece]:
    """Neighbouring pieces of a file that are not what they should be."""
    start = run[0].offset
    _, data = store.read_from_disk(file, start, run[-1].end - start)
    view = memoryview(data)
    return [piece for piece in run if not piece.fits(view[piece.offset - start : piece.end - start])]


def _should_be_here(store: ColdStore, file: str) -> bool:
    """Whether the node believes to have the file: else it was removed meanwhile."""
    try:
        store.find(file)
    except TimeTierError:
        return False
    return True


def _is_missing(store: ColdStore, file: str) -> bool:
    """Whether the file is on no disk, and would be found if it were."""
    try:
        store.find(file)
    except Corrupt:
        return True
    except TimeTierError:
        return False  # it may lie on a disk that is out
    return False
