"""Which cold files go, and which are rewritten first. *Pure* (scripts, see `effects.py`).

The record of the runs (`run_record.py`) names the only files that can be garbage; so this costs what changed, not what
there is. A file takes these steps:

1. *noted* (`note`), before links are written that replace blocks of it, or end them.
2. *judged* (`_judge`), at the end of the run, or by the next one if that did not come so far: behind a fence in each
   of its buckets if links of a run that did not end may still arrive. Without any live block it is dead. With few it is
   rewritten by the next run, and judged again. Else it is left alone, until it loses another block.
3. *removed*, when it has been dead for `orphan_grace_s`: readers with an old link have had that time. It is counted
   from the moment at which it was found dead, which is after the last link was replaced, whenever that was: a run may
   have been paused between its note and its links.

Files of a run that did not end are looked for by their prefix. What no link names was never named, else it were noted:
nobody reads it, and it goes as soon as it is old enough not to be of a run that is merely slow. Before that all cold
nodes are told the present epoch, so that nothing of that run can arrive any more. Its prefix is forgotten only when all
of them took it, and no doubtful file is left.

`compare_all` is for when the record does not know: all files against all links.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import log2

import msgspec

from ..effects import Script
from ..errors import TimeTierError
from .file_facts import FoundFile, Listed, announce, list_files, look_at, remove_files
from .run_record import LostFile, SmallFile, UncleanRun
from .sink_calls import strong_links
from .sink_run import SinkRun

_JUDGED_AT_ONCE = 64
_REMOVED_AT_ONCE = 100
_BUCKETS_AT_ONCE = 256
_SMALL_SHARE = 4  # of a whole file's size: below it a file is small


class Garbage:
    """The files that one run looks after. `rewrite`: those whose live blocks it moves; `visits`: in which buckets these
    lie, by table."""

    def __init__(self, run: SinkRun) -> None:
        self.rewrite: set[str] = set()
        self.visits: dict[bytes, set[int]] = {}
        self._run = run
        self._tables = {task.table for task in run.tables}
        self._low: dict[str, FoundFile] = {}  # files of which too little is alive
        self.recall()

    def recall(self) -> None:
        """Know what the record knows, once the run has taken its epoch."""
        record = self._run.epoch.record
        self._lost = {file.file: file for file in record.lost}
        self._small = {file.file: file for file in record.small}
        self._unclean: list[UncleanRun] = list(record.unclean)
        self._full, self._overflowed = record.full, record.overflowed

    # ------------------------------------------------------------ the course of a run

    def begin(self, *, check_files: bool) -> Script[None]:
        """Remove what may go, and choose what is to be rewritten. Raises Fenced."""
        if check_files or self._full:
            yield from self.compare_all()
        if self._unclean:
            yield from self._remove_orphans()
        yield from self._judge([file for file in self._lost.values() if not file.dead_us])
        yield from self._remove_dead()
        yield from self._choose()
        yield from self._save()

    def note(self, files: Mapping[str, int]) -> Script[None]:
        """These files (with their cold groups) are about to lose blocks. Raises Fenced, Unavailable."""
        now_us = self._run.time_us()
        fresh = [file for file in files if file not in self._lost]
        for file in fresh:
            self._lost[file] = LostFile(file, files[file], now_us)
        if fresh:
            yield from self._run.epoch.write(lost=list(self._lost.values()))
            self._overflowed |= self._run.epoch.record.overflowed
        else:
            yield from self._run.epoch.check()

    def note_small(self, file: str, table: bytes, group: int, size: int) -> None:
        """A file of this run has its links."""
        if size < self._run.settings.file_bytes // _SMALL_SHARE:
            self._small[file] = SmallFile(file, table.decode(), group, size)

    def end(self) -> Script[None]:
        """Judge what this run has replaced. Raises Fenced."""
        run = self._run
        if not run.unclean:
            waiting = [file for file in self._lost.values() if not file.dead_us]
            yield from self._judge(waiting)
            yield from self._remove_dead()
        gone = self.rewrite - {name for name, file in self._lost.items() if not file.dead_us}
        run.report.rewritten_files = len(gone)
        run.report.waiting_files = sum(file.dead_us > 0 for file in self._lost.values())

    def changes(self) -> dict[str, object]:
        """Fields of the record as they are to be."""
        small = [file for file in self._small.values() if file.file not in self._lost]
        return {
            "lost": list(self._lost.values()),
            "small": small,
            "unclean": self._unclean,
            "full": self._full or self._overflowed,
            "overflowed": self._overflowed,
        }

    def _save(self) -> Script[None]:
        record = self._run.epoch.record
        if any(getattr(record, name) != value for name, value in self.changes().items()):
            try:
                yield from self._run.epoch.write(**self.changes())
            except TimeTierError as error:  # it is written again at the end
                self._run.report.add_error(error.message)

    # ------------------------------------------------------------ judging and removing

    def _judge(self, suspects: list[LostFile]) -> Script[None]:
        """Find out which files are dead, and of which too little is alive."""
        for start in range(0, len(suspects), _JUDGED_AT_ONCE):
            part = {file.file: file for file in suspects[start : start + _JUDGED_AT_ONCE]}
            for fenced in (False, True):
                files = {name: file.group for name, file in part.items() if self._may_be_named(file) == fenced}
                for name, found in (yield from look_at(self._run, files, fenced=fenced)).items():
                    self._settle(part[name], found)

    def _may_be_named(self, file: LostFile) -> bool:
        """Whether links may still be on their way that name a file, or take its blocks away."""
        prefixes = [run.prefix + "-" for run in self._unclean]
        if self._run.unclean:
            prefixes.append(self._run.epoch.prefix + "-")
        return file.doubtful or file.file.startswith(tuple(prefixes))

    def _settle(self, file: LostFile, found: FoundFile | None) -> None:
        """Take down what was found of a file."""
        if found is None:
            del self._lost[file.file]
        elif not found.live_bytes:
            dead_us = self._run.time_us()
            self._lost[file.file] = msgspec.structs.replace(file, dead_us=dead_us, size=found.size, doubtful=False)
        elif found.live_bytes < self._run.settings.min_live_share * found.size:
            self._lost[file.file] = msgspec.structs.replace(file, size=found.size, doubtful=False)
            self._low[file.file] = found
        else:
            del self._lost[file.file]

    def _remove_dead(self) -> Script[None]:
        """Remove files that have been dead for long enough."""
        run = self._run
        latest_us = run.time_us() - int(run.settings.orphan_grace_s * 1e6)
        due = [file for file in self._lost.values() if file.dead_us and file.dead_us <= latest_us]
        for group in sorted({file.group for file in due}):
            of_group = {file.file: file.size for file in due if file.group == group}
            for removed in (yield from self._remove(group, of_group)):
                del self._lost[removed]

    def _remove(self, group: int, files: Mapping[str, int]) -> Script[list[str]]:
        """Remove files (with their sizes) of a group; those that are gone from all its nodes."""
        run, gone = self._run, []
        names = sorted(files)
        for start in range(0, len(names), _REMOVED_AT_ONCE):
            part = names[start : start + _REMOVED_AT_ONCE]
            try:
                if not (yield from remove_files(run, group, part)):
                    continue
            except TimeTierError as error:
                run.report.add_error(f"garbage is kept: {error.message}")
                continue
            gone += part
            run.report.removed_files += len(part)
            run.report.removed_bytes += sum(files[name] for name in part)
            for name in part:
                self._small.pop(name, None)
        return gone

    # ------------------------------------------------------------ runs that did not end

    def _remove_orphans(self) -> Script[None]:
        """Remove what no link names of runs that did not end, and forget the runs of which nothing is left to judge."""
        groups = range(self._run.view.routing.topology.cold_groups)
        told = yield from announce(self._run, groups)
        open_runs = set() if told >= set(groups) else {run.prefix for run in self._unclean}
        for group in sorted(told):
            for unclean in self._unclean:
                files, whole = yield from list_files(self._run, group, unclean.prefix + "-")
                if not whole or not (yield from self._remove_unnamed(group, files)):
                    open_runs.add(unclean.prefix)
        self._unclean = [run for run in self._unclean if run.prefix in open_runs]

    def _remove_unnamed(self, group: int, files: Mapping[str, Listed]) -> Script[bool]:
        """Remove those of the files that no link has ever named. Whether none of them is left in doubt."""
        run = self._run
        fresh = {name: file for name, file in files.items() if name not in self._lost}
        old = {name: group for name, file in fresh.items() if file.age_s >= run.settings.orphan_grace_s}
        found = yield from look_at(run, old, fenced=False)
        found |= yield from look_at(run, {name: group for name in old if _is_empty(found, name)}, fenced=True)
        for name, file in found.items():
            low = file is not None and 0 < file.live_bytes < run.settings.min_live_share * file.size
            if low or (self._overflowed and _is_empty(found, name)):
                self._lost[name] = LostFile(name, group, run.time_us(), size=fresh[name].size)
        unnamed = {name: fresh[name].size for name in found if _is_empty(found, name) and name not in self._lost}
        gone = yield from self._remove(group, unnamed)
        run.report.orphans_removed += len(gone)
        return len(found) == len(fresh) and len(gone) == len(unnamed)

    def compare_all(self) -> Script[None]:
        """Compare all files with all links, and note what looks like garbage. Raises Fenced."""
        run = self._run
        groups = range(run.view.routing.topology.cold_groups)
        told = yield from announce(run, groups)
        whole = told >= set(groups)
        listed: dict[str, tuple[int, Listed]] = {}
        for group in groups:
            files, all_told = yield from list_files(run, group)
            whole &= all_told
            listed.update({name: (group, file) for name, file in files.items()})
        try:
            alive = yield from self._alive_everywhere()
        except TimeTierError as error:
            run.report.add_error(f"the files can't be compared with the links: {error.message}")
            return
        prefixes = tuple(unclean.prefix + "-" for unclean in self._unclean)
        for name, (group, file) in listed.items():
            live_bytes = alive.get(name, 0)
            is_low = live_bytes < run.settings.min_live_share * file.size
            if (not live_bytes or is_low) and name not in self._lost and not name.startswith(prefixes):
                self._lost[name] = LostFile(name, group, run.time_us(), size=file.size)
        if whole:
            replicas = run.view.routing.topology.cold_replicas
            copies = sum(listed[name][1].copies for name in alive if name in listed)
            run.report.missing_copies = replicas * len(alive) - copies
            self._full = self._overflowed = False

    def _alive_everywhere(self) -> Script[dict[str, int]]:
        """Bytes of blocks that links name, by file, of all buckets. Raises Unavailable, ProtocolError."""
        run, alive = self._run, dict[str, int]()
        for start in range(0, run.view.routing.topology.buckets, _BUCKETS_AT_ONCE):
            part = range(start, min(start + _BUCKETS_AT_ONCE, run.view.routing.topology.buckets))
            links = yield from strong_links(run.view, part, run.settings)
            for block in (block for its in links.values() for link in its for block in link.blocks):
                alive[block.file] = alive.get(block.file, 0) + block.length
        return alive

    # ------------------------------------------------------------ what to rewrite

    def _choose(self) -> Script[None]:
        """Choose files to be rewritten: those of which least is alive, then small ones of which there are many."""
        room = self._run.settings.rewrite_bytes
        ranked = sorted(self._low.items(), key=lambda pair: pair[1].live_bytes / max(1, pair[1].size))
        for name, file in ranked:
            room = self._take(name, file, room)
        for crowd in self._crowds():
            found = yield from look_at(self._run, {file.file: file.group for file in crowd}, fenced=False)
            for name in [file.file for file in crowd]:
                its = found.get(name)
                if its is not None and its.live_bytes:
                    room = self._take(name, its, room)
                elif name in found:
                    del self._small[name]

    def _take(self, name: str, file: FoundFile, room: int) -> int:
        """Have a file rewritten if there is room for its blocks; how much room is left."""
        if file.live_bytes > room or file.table not in self._tables:
            return room
        self.rewrite.add(name)
        self.visits.setdefault(file.table, set()).update(file.alive)
        return room - file.live_bytes

    def _crowds(self) -> Iterable[list[SmallFile]]:
        """Small files that are worth merging: enough of one table, group and power of four in size."""
        crowds: dict[tuple[str, int, int], list[SmallFile]] = {}
        for file in self._small.values():
            if file.file not in self._lost and file.table.encode() in self._tables:
                place = file.table, file.group, int(log2(max(1, file.size))) // 2
                crowds.setdefault(place, []).append(file)
        return [crowd for crowd in crowds.values() if len(crowd) >= self._run.settings.merge_files]


def _is_empty(found: Mapping[str, FoundFile | None], name: str) -> bool:
    """Whether nothing of a file that could be judged is alive."""
    file = found.get(name)
    return file is not None and not file.live_bytes
