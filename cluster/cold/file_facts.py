"""What is known of cold files: which there are, and how much of each is alive. *Pure* (scripts, see `effects.py`).

A file is alive as far as links name its blocks. Its own footer says which buckets these can be, so only their links are
read. A file that no link names is not yet garbage: a run may be about to write its links. That can't be waited for,
since a process may be paused for any time. So each bucket that the file holds blocks of is *fenced*: an unconditional
write to its system timeline. Links are written under the condition that the system timeline has the version at which
their rows were scanned, and a file is complete only after its rows were scanned: so once every bucket of a complete
file is fenced, no further link can ever name it. What the links say as of the fence, or later, stands.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..client.scripts import WriteRequest, write
from ..effects import Call, Script
from ..errors import TimeTierError
from ..keys import system_timeline
from ..messages import (
    PUT,
    Failure,
    FileFacts,
    FileInfo,
    FileList,
    FileRemove,
    Files,
    Pong,
    unpack_i64,
    unpack_u32,
)
from .link import Link
from .run_record import Fenced
from .sink_calls import fence_key, links_since, read_links, strong_links, why_not
from .sink_run import SinkRun

_WRITES_AT_ONCE = 256
_FILES_AT_ONCE = 16


@dataclass(slots=True)
class Listed:
    """A file as nodes list it: the age is the least of them."""

    size: int
    age_s: int
    copies: int = 1


@dataclass(slots=True)
class FoundFile:
    """A file's footer and links. `alive`: bytes of blocks that links name, by bucket."""

    table: bytes
    size: int
    buckets: list[int]
    alive: dict[int, int] = field(default_factory=dict)

    @property
    def live_bytes(self) -> int:
        """Bytes of the blocks that links name."""
        return sum(self.alive.values())


def announce(run: SinkRun, groups: Iterable[int]) -> Script[set[int]]:
    """Make the run's epoch known at cold nodes. Groups of which all nodes took it: there no earlier run can write."""
    told: set[int] = set()
    for group in groups:
        nodes = run.cold_nodes(group)
        answers = yield [Call(node, FileRemove([], run.epoch.number), run.settings.call_timeout_s) for node in nodes]
        refused = _refusals(nodes, answers)
        if refused:
            run.report.add_error(f"cold group {group} may still take files of an earlier run ({'; '.join(refused)})")
        else:
            told.add(group)
    return told


def _refusals(nodes: Sequence[str], answers: Sequence[object]) -> list[str]:
    """Which nodes did not do as they were told, and why. Raises Fenced."""
    found = []
    for node, answer in zip(nodes, answers, strict=True):
        if isinstance(answer, Failure) and answer.kind == "VersionConflict":
            raise Fenced(f"fenced: {node}: {answer.message}")
        if not isinstance(answer, Pong):
            found.append(f"{node}: {why_not(answer)}")
    return found


def list_files(run: SinkRun, group: int, prefix: str = "") -> Script[tuple[dict[str, Listed], bool]]:
    """Files of a cold group whose names begin so, and whether all its nodes have told theirs."""
    files: dict[str, Listed] = {}
    whole = True
    for node in run.cold_nodes(group):
        cursor, more = prefix, True
        while more:
            (answer,) = yield [Call(node, FileList(cursor), run.settings.call_timeout_s)]
            if not isinstance(answer, Files):
                run.report.add_error(f"{node} does not list its files: {why_not(answer)}")
                whole = False
                break
            columns = zip(answer.names, unpack_i64(answer.sizes), unpack_i64(answer.ages_s), strict=True)
            for name, size, age_s in columns:
                if not name.startswith(prefix):
                    break
                known = files.get(name)
                files[name] = (
                    Listed(size, age_s)
                    if known is None
                    else Listed(max(known.size, size), min(known.age_s, age_s), known.copies + 1)
                )
            last = answer.names[-1] if answer.names else ""
            more = answer.more and last > cursor and last.startswith(prefix)
            cursor = last
    return files, whole


def look_at(run: SinkRun, files: Mapping[str, int], *, fenced: bool) -> Script[dict[str, FoundFile | None]]:
    """What is alive of each file; None for one that no node has. Files that could not be judged are missing.

    `files`: the cold group of each. `fenced`: whether links may still be on their way that name the files, from runs
    that did not end; with the fence the answer stands for ever where nothing is alive.
    """
    found: dict[str, FoundFile | None] = {}
    names = list(files)
    for start in range(0, len(names), _FILES_AT_ONCE):
        part = names[start : start + _FILES_AT_ONCE]
        firsts = [run.cold_nodes(files[name])[0] for name in part]
        answers = yield [
            Call(node, FileInfo(name), run.settings.call_timeout_s) for node, name in zip(firsts, part, strict=True)
        ]
        for name, answer in zip(part, answers, strict=True):
            if not isinstance(answer, FileFacts):
                others = run.cold_nodes(files[name])[1:]
                answer = yield from _facts_of_others(run, name, others, answer)
            if isinstance(answer, FileFacts):
                found[name] = FoundFile(answer.table, answer.size, unpack_u32(answer.buckets))
            elif answer == "":
                found[name] = None
            else:
                run.report.add_error(f"{name} is kept: {answer}")
    present = {name: file for name, file in found.items() if file is not None}
    buckets = sorted({bucket for file in present.values() for bucket in file.buckets})
    links = yield from (_fenced_links(run, buckets) if fenced else _links(run, buckets))
    for bucket, its in links.items():
        for link in its:
            for block in link.blocks:
                if block.file in present:
                    alive = present[block.file].alive
                    alive[bucket] = alive.get(bucket, 0) + block.length
    return {name: file for name, file in found.items() if file is None or links.keys() >= set(file.buckets)}


def _facts_of_others(run: SinkRun, name: str, nodes: Sequence[str], answer: object) -> Script[FileFacts | str]:
    """A file's footer from whichever node has it; "" when all say that they do not, else why nobody tells."""
    reasons = [] if _is_missing(answer) else [why_not(answer)]
    for node in nodes:
        (answer,) = yield [Call(node, FileInfo(name), run.settings.call_timeout_s)]
        if isinstance(answer, FileFacts):
            return answer
        if not _is_missing(answer):
            reasons.append(f"{node}: {why_not(answer)}")
    return "; ".join(reasons)


def _is_missing(answer: object) -> bool:
    return isinstance(answer, Failure) and answer.kind == "Corrupt" and answer.fields.get("reason") == "missing"


def _links(run: SinkRun, buckets: Sequence[int]) -> Script[dict[int, list[Link]]]:
    try:
        return (yield from strong_links(run.view, buckets, run.settings))
    except TimeTierError as error:
        run.report.add_error(error.message)
        return {}


def _fenced_links(run: SinkRun, buckets: Sequence[int]) -> Script[dict[int, list[Link]]]:
    """Links as of a fence in each bucket, or later; buckets that can't be told are missing."""
    fences = yield from _fence(run, buckets)
    try:
        return (yield from links_since(run.view, fences, run.settings))
    except TimeTierError:
        found: dict[int, list[Link]] = {}  # one by one, so that only those that fail are missing
    for bucket, version in fences.items():
        try:
            found[bucket] = yield from read_links(run.view, bucket, version, run.settings)
        except TimeTierError as error:
            run.report.add_error(error.message)
    return found


def _fence(run: SinkRun, buckets: Sequence[int]) -> Script[dict[int, int]]:
    """Version of each bucket's fence; buckets that could not be fenced are missing. Raises Fenced."""
    versions: dict[int, int] = {}
    for start in range(0, len(buckets), _WRITES_AT_ONCE):
        part = buckets[start : start + _WRITES_AT_ONCE]
        value = f"{run.run} {run.epoch.number}".encode()
        requests = [WriteRequest(system_timeline(b), bytes((PUT,)), [fence_key()], [value]) for b in part]
        outcomes = yield from write(run.view, requests, run.settings.write_timeout_s)
        for bucket, outcome in zip(part, outcomes, strict=True):
            if isinstance(outcome, TimeTierError):
                run.report.add_error(f"bucket {bucket} can't be fenced: {outcome.message}")
            else:
                versions[bucket] = outcome
    return versions


def remove_files(run: SinkRun, group: int, names: Collection[str]) -> Script[bool]:
    """Remove files from the nodes of a group. Whether all of them did so. Raises Fenced, Unavailable."""
    yield from run.epoch.check()
    nodes = run.cold_nodes(group)
    message = FileRemove(sorted(names), run.epoch.number)
    answers = yield [Call(node, message, run.settings.call_timeout_s) for node in nodes]
    kept = _refusals(nodes, answers)
    if kept:
        run.report.add_error(f"garbage may be left in cold group {group} ({'; '.join(kept)})")
    return not kept
