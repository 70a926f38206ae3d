"""What becomes of the data when a run of the sink ends between any two of its steps.

A run is a script that yields its effects one by one. So it can be ended, or held, after each of them, and what it had
sent can be made to arrive later. The run has everything to do that a run may have: rows to sink, late writes, deletes
and a wipe to merge, files to remove and to rewrite. After each accident the next run must leave everything right:
every item is found, its blocks verified; nothing but what links name is left; no error was met.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cold_model import BUCKETS, TABLE
from sink_world import SETTINGS, Stepper, UnsyncedFiles, World
from timetier.cluster.cold.run_record import run_timeline
from timetier.cluster.cold.sink_report import SinkReport
from timetier.cluster.effects import Call, Sleep
from timetier.cluster.keys import bucket_of, is_system, timeline_key
from timetier.cluster.messages import AskVersions, FileRemove, FileWrite, Write

ENDED = "ended"  # its last effect was carried out, and nobody took note
LATE = "late"  # its last messages arrive after the next run
MIDST = "midst"  # its last messages arrive in the midst of the next run
PAUSED = "paused"  # it goes on after the next run
BESIDE = "beside"  # it goes on at once, beside another run
ACCIDENTS = (ENDED, LATE, MIDST, PAUSED, BESIDE)

_SETTINGS = replace(SETTINGS, min_live_share=0.7, merge_files=3, scan_bytes=3_000, piece_bytes=8_000)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the matrix. `left`: files right after the accident that no link named; `removed`: by the next run, of
    which `orphans` were never named; `rows`: that it sank; `fenced`: the end of the run that had the accident, if it
    went on."""

    step: int
    what: str
    accident: str
    left: int
    removed: int
    orphans: int
    rows: int
    fenced: str
    wrong: str

    def to_dict(self) -> dict[str, object]:
        """Ready for JSON."""
        return asdict(self)


def crash_matrix(accidents: tuple[str, ...] = ACCIDENTS, every: int = 1) -> Iterator[Row]:
    """All lines, step by step. `every`: only each so many steps has all accidents, in turns; `ENDED` happens at all."""
    step = 1
    while True:
        for number, accident in enumerate(accidents):
            if accident != ENDED and (step + number) % every:
                continue
            with tempfile.TemporaryDirectory(prefix="tt-crash-") as folder:
                row = asyncio.run(asyncio.wait_for(_one(Path(folder), step, accident), 60))
            if row is None:
                return
            yield row
        step += 1


async def _one(folder: Path, step: int, accident: str) -> Row | None:
    """One accident, None when the run has fewer steps."""
    world = World(folder, files=UnsyncedFiles())
    await world.start()
    try:
        await _prepare(world)
        run = Stepper(world.script(settings=_SETTINGS), world.network.carrier("sink"))
        for _ in range(step - 1):
            await run.step()
            if run.report is not None:
                return None
        what = describe(run.effect)
        if accident == ENDED:
            await run.perform()
        left = len(_files(world) - _named(world))
        following = await _go_on(world, run, accident)
        return Row(
            step,
            what,
            accident,
            left,
            following.removed_files,
            following.orphans_removed,
            following.rows,
            run.report.fenced if run.report is not None else "",
            await _wrong(world, run, following, beside=accident == BESIDE),
        )
    finally:
        await world.stop()


async def _go_on(world: World, run: Stepper, accident: str) -> SinkReport:
    """What happens after the accident; the report of the next run."""
    following = Stepper(world.script(settings=_SETTINGS), world.network.carrier("next"))
    if accident == ENDED:
        run.crash()
        return await following.finish()
    if accident == BESIDE:
        while following.report is None or run.report is None:
            for one in (following, run):
                if one.report is None:
                    await one.step()
        return following.report
    if accident == PAUSED:
        report = await following.finish()
        await run.finish()
        return report
    run.crash()
    steps = 8 if accident == MIDST else sys.maxsize
    while following.report is None and steps:
        await following.step()
        steps -= 1
    await run.perform()
    return await following.finish()


async def _wrong(world: World, run: Stepper, following: SinkReport, *, beside: bool) -> str:
    """What is not as it should be, after one more run; "" when all is well."""
    if world.visible() != world.expected:
        return "items are not what they were"
    first = run.report  # beside another one it may end before that begins
    if first is not None and not (first.fenced or first.epoch > following.epoch or (beside and not first.errors)):
        return f"the run that was overtaken was not fenced: {first.errors}"
    if following.errors and not following.fenced:
        return f"the next run: {following.errors[0]}"
    reports = [await world.run(settings=_SETTINGS) for _ in range(2)]
    errors = [error for report in reports for error in report.errors]
    if errors:
        return f"a later run: {errors[0]}"
    if world.visible() != world.expected:
        return "items are not what they were, after a later run"
    if world.hot_rows():
        return f"{world.hot_rows()} rows have not sunk"
    if not wiped_owner_is_gone(world):
        return "rows that were wiped are still in a block"
    if _files(world) != _named(world):
        return f"garbage is left: {sorted(_files(world) - _named(world))}"
    return ""


async def _prepare(world: World) -> None:
    """A cluster with something of everything to do, after a run that has crashed."""
    storage = world.storage
    world.load(4, 12)
    await world.run(settings=_SETTINGS)
    for at in range(6):
        storage.put(b"owner-2", 3 + 9 * at, b"between", 2)
    await world.run(settings=_SETTINGS)  # it replaces blocks
    crashed = Stepper(world.script(settings=_SETTINGS), world.network.carrier("crashed"))
    storage.put(b"owner-0", 2, b"late", 3)
    while describe(crashed.effect) != "write links":
        await crashed.step()
    crashed.crash()
    storage.delete(b"owner-1", 70, 3)
    storage.wipe(b"owner-3")
    for at in range(12):
        storage.put(b"other", at * 9, b"x", 3)
    world.remember()


def wiped_owner_is_gone(world: World) -> bool:
    """Whether no block holds a row of the owner that `_prepare` has wiped."""
    bucket = bucket_of(timeline_key(TABLE, b"owner-3", world.shape.buckets))
    blocks = [block for link in world.storage.links(bucket) for block in link.blocks]
    return not any(world.read(block).rows_of(b"owner-3")[0] for block in blocks)


def _files(world: World) -> set[str]:
    return {path.name for path in world.files()}


def _named(world: World) -> set[str]:
    return {block.file for link in world.storage.all_links() for block in link.blocks}


def describe(effect: list[Call] | Sleep, buckets: int = BUCKETS) -> str:
    """An effect in words. `buckets`: of the cluster."""
    if isinstance(effect, Sleep):
        return "rest"
    message, node = effect[0].message, effect[0].node
    if isinstance(message, Write):
        if not is_system(message.timelines[0]):
            return "write the record"
        return "fence buckets" if message.if_version == b"\xff" * len(message.if_version) else "write links"
    if isinstance(message, FileWrite):
        return f"copy to {node}" + (", last piece" if message.last else "")
    if isinstance(message, FileRemove):
        return "remove files" if message.files else "announce the epoch"
    if isinstance(message, AskVersions):
        return "check the epoch" if message.timelines == [run_timeline(buckets)] else "ask for versions"
    return type(message).__name__
