"""The sink as a process that is killed (SIGKILL) at named steps, over real node processes.

    python -m tests.crash_kills FOLDER RUN STEP WHEN     # one run that ends itself so; `kill_matrix` starts them

A run kills itself right before the messages of a step leave (`before`), or while they are on their way (`sent`): the
nodes then go on with what has arrived. After each kill everything must be readable, and the next run must sink the
rest, remove the garbage and count it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from timetier.benchmarks.nodes import NodeProcesses, open_store
from timetier.cluster.client.store import AsyncStore
from timetier.cluster.cold.sink_calls import SinkSettings, settings_of, strong_links
from timetier.cluster.cold.sink_script import SinkReport, TableSink, sink
from timetier.cluster.cold.sinking import chosen_cut_offs
from timetier.cluster.config import Config
from timetier.cluster.drive import drive
from timetier.cluster.effects import Script

BEFORE, SENT = "before", "sent"
KILLS = [
    ("write the record", SENT),
    ("check the epoch", BEFORE),
    ("copy to cold-0-0", SENT),
    ("copy to cold-0-1", BEFORE),
    ("copy to cold-0-2, last piece", SENT),
    ("write links", BEFORE),
    ("write links", SENT),
    ("fence buckets", SENT),
    ("remove files", SENT),
]
TABLE = "t"
OWNERS = 24
ROOT = Path(__file__).resolve().parent.parent
_MINUTE_US = 60_000_000
_LAST_SIGHT_S = 0.001
_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class KillRow:
    """One line of the matrix: see `crash_steps.Row`. `wrong`: what is not as it should be, "" when all is well."""

    what: str
    when: str
    killed: bool
    orphans: int
    removed: int
    rows: int
    wrong: str

    def to_dict(self) -> dict[str, object]:
        """Ready for JSON."""
        return asdict(self)


def small_config() -> Config:
    """Three storage nodes and three cold ones, with few buckets."""
    return Config.model_validate(
        {
            "buckets": 64,
            "storage": {"engine_cache_mb": 8, "engine_write_buffer_mb": 4},
            "cold": {"disks": 2},
            "sink": {"rest": 0},
            "tables": {},
            "default_table": {"timestamp_unit": "us", "cold_after": "1d", "window": "1d", "retention": None},
        }
    )


def settings() -> SinkSettings:
    """Small files in many pieces, and no grace."""
    return replace(settings_of(small_config().sink), piece_bytes=2_000, file_bytes=1 << 20, orphan_grace_s=0.0)


def script_of(store: AsyncStore, run: str, before: int) -> Script[SinkReport]:
    """A run that sinks what is older than `before`."""
    policy = store.view.routing.policy(TABLE)
    cut_offs = chosen_cut_offs(policy, 0, before=before, by_event_time=True)
    task = TableSink(TABLE.encode(), policy, cut_offs)
    return sink(store.view, [task], run=run, now_us=0, settings=settings())


# ---------------------------------------------------------------- the process that is killed


def killed_at(script: Script[SinkReport], what: str, when: str) -> Script[SinkReport]:
    """The script, whose process ends at the first step that is described so."""
    from crash_steps import describe  # this may be a program of its own: see the end

    effect = next(script)
    while True:
        if describe(effect, small_config().buckets) == what:
            _end(when)
        result = yield effect
        try:
            effect = script.send(result)
        except StopIteration as stop:
            report: SinkReport = stop.value
            return report


def _end(when: str) -> None:
    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if when == BEFORE:
        kill()
    asyncio.get_running_loop().call_later(_LAST_SIGHT_S, kill)


async def _run_and_die(folder: Path, run: str, before: int, what: str, when: str) -> None:
    store = open_store(folder, small_config())
    await drive(killed_at(script_of(store, run, before), what, when), store.carrier)


# ---------------------------------------------------------------- the matrix


def kill_matrix(kills: list[tuple[str, str]] = KILLS) -> Iterator[KillRow]:
    """All lines. One cluster for all of them; each run has rows to sink, and blocks of earlier ones to replace."""
    with tempfile.TemporaryDirectory(prefix="tt-kill-") as name:
        folder = Path(name)
        with NodeProcesses(folder, small_config(), tiers=("storage", "cold")):
            yield from asyncio.run(_kill_all(folder, kills))


async def _kill_all(folder: Path, kills: list[tuple[str, str]]) -> list[KillRow]:
    store = open_store(folder, small_config())
    expected: dict[tuple[str, int], bytes] = {}
    rows = []
    try:
        await _fill(store, expected, 0)
        await drive(script_of(store, "first", 10**15), store.carrier)
        for number, (what, when) in enumerate(kills, start=1):
            await _fill(store, expected, number)
            if what in ("fence buckets", "remove files"):  # a run that did not end has left a file
                await _start(folder, f"before-{number}", "write links", BEFORE)
            status, said = await _start(folder, f"killed-{number}", what, when)
            wrong = await _differs(store, expected)
            report = await drive(script_of(store, f"next-{number}", 10**15), store.carrier)
            last = await drive(script_of(store, f"last-{number}", 10**15), store.carrier)
            wrong = wrong or "; ".join(report.errors + last.errors) or await _differs(store, expected)
            named = await _named(store)
            wrong = wrong or await asyncio.to_thread(_garbage, folder, named) or said[-300:]
            killed = status == -signal.SIGKILL
            rows.append(KillRow(what, when, killed, report.orphans_removed, report.removed_files, report.rows, wrong))
    finally:
        await store.close()
    return rows


async def _start(folder: Path, run: str, what: str, when: str) -> tuple[int | None, str]:
    """Start a run that ends itself; how it ended, and what it said of errors."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.crash_kills",
        *(str(folder), run, str(10**15), what, when),
        cwd=ROOT,
        stderr=subprocess.PIPE,
    )
    _, said = await asyncio.wait_for(process.communicate(), _TIMEOUT_S)
    return process.returncode, said.decode()


async def _fill(store: AsyncStore, expected: dict[tuple[str, int], bytes], number: int) -> None:
    """Items that come late into windows that have sunk, and items of one more window."""
    items = [
        (f"owner-{owner}", day * 1_440 * _MINUTE_US + number * _MINUTE_US + owner, os.urandom(200))
        for owner in range(OWNERS)
        for day in (0, number)
    ]
    await store.table(TABLE).put_many(items)
    expected.update({(owner, timestamp): value for owner, timestamp, value in items})


async def _differs(store: AsyncStore, expected: dict[tuple[str, int], bytes]) -> str:
    """Which items are not what was written, "" when all are."""
    keys = list(expected)
    found = await store.table(TABLE).get_many(keys)
    values = [None if item is None else item.value for item in found]
    wrong = [key for key, value in zip(keys, values, strict=True) if value != expected[key]]
    return f"{len(wrong)} items are wrong, such as {wrong[0]}" if wrong else ""


async def _named(store: AsyncStore) -> set[str]:
    """Files that links name."""
    found = await drive(strong_links(store.view, range(small_config().buckets), settings()), store.carrier)
    return {block.file for links in found.values() for link in links for block in link.blocks}


def _garbage(folder: Path, named: set[str]) -> str:
    """Which files are not what links name, "" when all are."""
    for replica in range(3):
        files = {path.name for path in folder.glob(f"cold-0-{replica}/disk-*/*.arrow")}
        if files != named:
            return f"cold-0-{replica} has {sorted(files - named)} too much, and lacks {sorted(named - files)}"
    return ""


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    asyncio.run(_run_and_die(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5]))
