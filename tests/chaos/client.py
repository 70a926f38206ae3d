"""One client process of a chaos run: it keeps its own pace whatever the store does, and takes everything down.

    python -m tests.chaos.client '{"folder": ..., "client": "c0", ...}'        (see `Task`; started by `clients.py`)

Operations begin at random instants at a given rate, not when the one before has ended: a store that stops answering
is noticed by as many operations as applications would have begun meanwhile. It ends when its input is closed.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path
from random import Random
from typing import IO

import msgspec
from timetier import connect_async

from ..simulation.history import Recorder, Refused
from .workload import READ, TABLE, Timing, Workload

AT_ONCE = 50  # operations under way; what would begin beyond that is counted instead
_END_S = 20.0
_READ_ALL_S = 60.0
_PROGRESS_S = 1.0


class Task(msgspec.Struct):
    """What a client process is to do.

    `folder`: where its files go. `client`: its name. `started_at`: of the run (monotonic). `per_second`: operations.
    `owners`: read these timelines from end to end, once, instead of anything else.
    """

    folder: str
    client: str
    seed: int
    namespace: str
    started_at: float
    per_second: float
    owners: list[str] | None = None

    @property
    def history(self) -> Path:
        """File of its operations."""
        return Path(self.folder) / f"history-{self.client}.jsonl"

    @property
    def timings(self) -> Path:
        """File of how long its calls took."""
        return Path(self.folder) / f"timings-{self.client}.jsonl"


class Progress(msgspec.Struct):
    """What a client tells once a second: calls that ended since, those that failed, how many are under way, and how
    many were not begun since too many were."""

    reads: int = 0
    writes: int = 0
    errors: int = 0
    under_way: int = 0
    not_begun: int = 0


class Timings:
    """Takes down how long calls took."""

    def __init__(self, path: Path) -> None:
        self._file: IO[bytes] = path.open("wb")
        self.progress = Progress()

    def note(self, timing: Timing) -> None:
        """A call has ended."""
        self._file.write(msgspec.json.encode(timing) + b"\n")
        self.progress.errors += timing.outcome != "ok"
        if timing.access == READ:
            self.progress.reads += 1
        else:
            self.progress.writes += 1

    def take(self, under_way: int) -> Progress:
        """Progress since the last time."""
        taken, self.progress = self.progress, Progress()
        taken.under_way = under_way
        return taken

    def close(self) -> None:
        """Close the file."""
        self._file.close()


async def run(task: Task, tell: IO[str]) -> None:
    """Connect, and work until the input ends. Progress is written to `tell`."""
    recorder = Recorder(time.monotonic, task.history)
    timings = Timings(task.timings)
    try:
        async with await connect_async(namespace=task.namespace) as store:
            random = Random(f"{task.seed} {task.client}")
            work = Workload(store.table(TABLE), recorder, task.client, random, task.started_at, timings.note)
            if task.owners is not None:
                await _read_all(work, task.owners, recorder)
            else:
                await _work(work, task.per_second, random, timings, tell)
    finally:
        recorder.close()
        timings.close()


async def _work(work: Workload, per_second: float, random: Random, timings: Timings, tell: IO[str]) -> None:
    loop = asyncio.get_running_loop()
    end = loop.run_in_executor(None, sys.stdin.read)
    under_way: set[asyncio.Task[None]] = set()
    next_at = told_at = loop.time()
    while not end.done():
        next_at += random.expovariate(per_second)
        await asyncio.sleep(max(0.0, next_at - loop.time()))
        if len(under_way) < AT_ONCE:
            one = loop.create_task(work.one())
            under_way.add(one)
            one.add_done_callback(under_way.discard)
        else:
            timings.progress.not_begun += 1
        if loop.time() - told_at >= _PROGRESS_S:
            told_at = loop.time()
            tell.write(msgspec.json.encode(timings.take(len(under_way))).decode() + "\n")
            tell.flush()
    if under_way:
        await asyncio.wait(under_way, timeout=_END_S)


async def _read_all(work: Workload, owners: list[str], recorder: Recorder) -> None:
    """Read each timeline until it has been read; what can't be read in time is left to whoever looks at the history."""
    deadline = time.monotonic() + _READ_ALL_S
    for owner in owners:
        while time.monotonic() < deadline:
            await work.read_all([owner])
            if not isinstance(recorder.operations[-1].result, Refused):
                break


def main() -> None:
    """The program."""
    task = msgspec.json.decode(sys.argv[1], type=Task)
    # Ray prints what it has to say of dead nodes: that goes into the log, and progress alone to the run.
    tell = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    asyncio.run(run(task, tell))


if __name__ == "__main__":
    main()
