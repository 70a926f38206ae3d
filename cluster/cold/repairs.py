"""The repair queue of a cold node: what is damaged here, until it is right again.

Reads and the scrubber put into it what they find. It survives a restart and a kill (`repair_log.py`); the log is
written behind the reads that find damage, not before their answers. One task takes from the queue, what is due first,
and mends it (`mending.py`).

What can't be repaired stays, with its last reason, and is tried again after pauses that double up to a bound: a replica
may come back, and so may a disk. Who reads the damaged bytes again has the next attempt made sooner. A repair ends
when the bytes are right, when the file is removed here, or when no other replica has it any more: then it was removed
there, and this copy is garbage of which the sink will hear.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from ..carriers.base import Carrier
from ..counters import Counters
from ..errors import TimeTierError
from .disk_lane import DiskLanes
from .files import Files
from .mending import NOTHING, DiskWork, Gone, Mender, Repair
from .repair_log import OpenRepair, Place, RepairLog, added, done, failed
from .store import ColdStore

MAX_REPAIRS = 10_000
QUICK_ATTEMPTS = 5  # after so many a repair counts as one that failed
_BACK_OFF_S = 0.1  # doubles with each attempt
_LONGEST_BACK_OFF_S = 900.0
_WANTED_AGAIN_S = 5.0  # until the next attempt, when its bytes are read again
_RETRY_LOG_S = 5.0
_SHOWN = 10  # failing repairs that `status` lists

logger = logging.getLogger(__name__)


class Repairs:
    """Restores what is put into it, one after another.

    `lanes`: for what needs the disks. `peers`: names of the other replicas, as they are at that time. `on_end(place,
    repaired)`: told of each repair that is over.
    """

    def __init__(
        self,
        name: str,
        carrier: Carrier,
        counters: Counters,
        lanes: DiskLanes,
        *,
        peers: Callable[[], list[str]],
        clock: Callable[[], float] = time.monotonic,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        """`clock`: monotonic seconds. `wall_s`: seconds since 1970."""
        self.name = name
        self.mender = Mender(carrier, peers=peers)
        self.on_end: Callable[[Place, bool], None] = lambda place, repaired: None
        self._counters = counters
        self._lanes = lanes
        self._clock = clock
        self._wall_s = wall_s
        self._open: dict[Place, OpenRepair] = {}  # in the order of their coming
        self._lines: list[bytes] = []  # of the log, to be written
        self._log: RepairLog | None = None
        self._removed = ""  # the file that is under repair, once it was removed
        self._under_way = ""
        self._work = asyncio.Event()
        self._to_write = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, place: Place) -> bool:
        return place in self._open

    async def start(self, store: ColdStore, files: Files) -> None:
        """Begin to repair the files of `store`, with what its folder's log has. `files`: where the log lies."""
        self._log = RepairLog(files, store.folder)
        try:
            found = await self._lanes.run(self._log.read)
        except (OSError, TimeTierError) as error:
            logger.error("%s: the repair queue can't be read: %s", self.name, error)
            found = []
        for one in found[:MAX_REPAIRS]:
            self._open.setdefault(one.repair.place, one)
        self._tasks = [
            asyncio.create_task(self._repair_for_ever(DiskWork(store, self._lanes)), name=f"{self.name}-repair"),
            asyncio.create_task(self._write_for_ever(self._log), name=f"{self.name}-repair-log"),
        ]

    async def stop(self) -> None:
        """End background work; what is not on disk yet is written."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._log is not None and self._tasks:
            try:
                await self._lanes.run(lambda: self._rewrite(list(self._open.values())))
            except (OSError, TimeTierError) as error:
                logger.error("%s: the repair queue can't be written: %s", self.name, error)

    def add(self, repair: Repair) -> bool:
        """Have these bytes restored. False if there is no room."""
        known = self._open.get(repair.place)
        if known is not None:
            known.due_s = min(known.due_s, self._clock() + _WANTED_AGAIN_S)
            if (repair.sure, repair.length) > (known.repair.sure, known.repair.length):
                known.repair = repair  # it knows more of what the file must have
            self._work.set()
            return True
        if len(self._open) >= MAX_REPAIRS:
            self._counters.add("repairs_dropped")  # the next read of these bytes finds them again
            return False
        self._open[repair.place] = one = OpenRepair(repair, self._wall_s(), due_s=self._clock())
        self._note(added(one))
        self._work.set()
        return True

    def forget(self, file: str) -> None:
        """The file is being removed: nothing of it is to be repaired, nor brought back."""
        if self._under_way == file:
            self._removed = file
        for place in [place for place in self._open if place[0] == file]:
            self._counters.add("repairs_removed")
            self._end(place, repaired=False)

    def status(self) -> dict[str, Any]:
        """How many wait, how many have failed, and some of these with their last reason."""
        failing = [one for one in self._open.values() if one.attempts >= QUICK_ATTEMPTS]
        now = self._clock()
        return {
            "queued": len(self._open),
            "failing": len(failing),
            "oldest_s": round(max((self._wall_s() - one.since for one in self._open.values()), default=0.0), 1),
            "last_reasons": [
                {
                    "file": one.repair.file,
                    "offset": -1 if one.repair.whole else one.repair.offset,
                    "attempts": one.attempts,
                    "next_s": round(max(0.0, one.due_s - now), 1),
                    "reason": one.reason,
                }
                for one in failing[:_SHOWN]
            ],
        }

    def alarms(self) -> list[str]:
        """What somebody should look at: repairs that don't succeed."""
        failing = [one for one in self._open.values() if one.attempts >= QUICK_ATTEMPTS]
        if not failing:
            return []
        one = failing[0]
        where = one.repair.file if one.repair.whole else f"{one.repair.file} at {one.repair.offset}"
        return [f"{len(failing)} repairs fail; {where}: {one.reason}"]

    # ------------------------------------------------------------ repairing

    async def _repair_for_ever(self, work: DiskWork) -> None:
        while True:
            one = min(self._open.values(), key=lambda one: one.due_s, default=None)
            wait_s = None if one is None else one.due_s - self._clock()
            if one is not None and wait_s is not None and wait_s <= 0:
                await self._attempt(work, one)
                continue
            self._work.clear()
            try:
                await asyncio.wait_for(self._work.wait(), wait_s)
            except TimeoutError:
                continue  # the next one is due

    async def _attempt(self, work: DiskWork, one: OpenRepair) -> None:
        repair = one.repair
        self._under_way, self._removed = repair.file, ""
        try:
            did = await self.mender.mend(work, repair, lambda: self._removed != repair.file)
        except Gone as error:
            self._counters.add("repairs_gone")
            logger.info("%s: %s: not repaired any more", self.name, error)
            self._end(repair.place, repaired=False)
        except TimeTierError as error:
            self._put_off(one, error.message)
        except Exception as error:  # whatever it is, the next repair must have its turn
            logger.exception("%s: repair of %s failed", self.name, repair.file)
            self._put_off(one, f"{type(error).__name__}: {error}")
        else:
            self._counters.add(did)
            if did != NOTHING:
                logger.warning("%s: restored %s at %d", self.name, repair.file, repair.offset)
            self._end(repair.place, repaired=True)
        finally:
            self._under_way = ""

    def _put_off(self, one: OpenRepair, reason: str) -> None:
        one.attempts += 1
        one.reason = reason
        one.due_s = self._clock() + min(_BACK_OFF_S * 2 ** min(one.attempts, 30), _LONGEST_BACK_OFF_S)
        if one.attempts == QUICK_ATTEMPTS:
            self._counters.add("repairs_failed")
            logger.error("%s: can't restore %s at %d: %s", self.name, one.repair.file, one.repair.offset, reason)
        if one.attempts >= QUICK_ATTEMPTS and one.repair.place in self._open:
            self._note(failed(one))

    def _end(self, place: Place, *, repaired: bool) -> None:
        if self._open.pop(place, None) is not None:
            self._note(done(place))
            self.on_end(place, repaired)

    # ------------------------------------------------------------ the log

    def _note(self, line: bytes) -> None:
        self._lines.append(line)
        self._to_write.set()

    async def _write_for_ever(self, log: RepairLog) -> None:
        anew = True  # whatever a crash has left at its end is not written behind
        while True:
            await self._to_write.wait()
            self._to_write.clear()
            lines, self._lines = self._lines, []
            repairs = list(self._open.values())
            try:
                if anew or log.is_long():
                    anew = True
                    await self._lanes.run(lambda repairs=repairs: log.rewrite(repairs))  # type: ignore[misc]
                    anew = False
                else:
                    await self._lanes.run(lambda lines=lines: log.append(lines))  # type: ignore[misc]
            except (OSError, TimeTierError) as error:
                anew = True
                self._counters.add("repair_log_errors")
                logger.error("%s: the repair queue can't be written: %s", self.name, error)
                await asyncio.sleep(_RETRY_LOG_S)
                self._to_write.set()

    def _rewrite(self, repairs: list[OpenRepair]) -> None:
        assert self._log is not None, "it was started"
        self._log.rewrite(repairs)
