"""Removal of cold files that no link names. *Pure* (scripts, see `effects.py`).

A run that crashed, or was fenced, leaves files behind; so does a window's next generation. A file that no link names
is not yet garbage: a run that has written it may be about to write its links. That can't be waited for, since a
process may be paused for any time. So each bucket that the file holds blocks of is *fenced* first: an unconditional
write to its system timeline. Links are written under the condition that the system timeline has the version at which
their rows were scanned, and a file is complete only after its rows were scanned: so once every bucket of a complete
file is fenced, no further link can ever name it. Then the links are read again, as of the fence or later, and what is
still not named goes.

A file that was replaced by this very run is spared until the next one, because its links were seen when the run began:
readers that hold the old link still find it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from ..client.scripts import WriteRequest, write
from ..client.view import View
from ..effects import Call, Script
from ..errors import TimeTierError
from ..keys import system_timeline
from ..messages import PUT, FileFacts, FileInfo, FileList, FileRemove, Files, Pong, unpack_i64, unpack_u32
from .sink_calls import SinkSettings, ask_first, fence_key, read_links, why_not

MAX_CANDIDATES = 1_000  # a run; the next one goes on
_WRITES_AT_ONCE = 256
_REMOVALS_AT_ONCE = 100


@dataclass(slots=True)
class Orphans:
    """What was done. `kept`: files that could not be judged stay; `errors` say why."""

    removed: int = 0
    errors: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Candidate:
    nodes: list[str]
    age_s: int
    buckets: list[int] = field(default_factory=list)


def remove_orphans(
    view: View, run: str, referenced: Collection[str], tables: Collection[bytes], settings: SinkSettings
) -> Script[Orphans]:
    """Remove files of `tables` that no link names, of all cold groups.

    `referenced`: files that links of these tables were seen to name during this run, in all buckets. It only saves
    work: what decides is read after the fence.
    """
    result = Orphans()
    for group in range(view.routing.topology.cold_groups):
        files = yield from _list_files(view, group, result)
        old = [
            name for name in sorted(files) if name not in referenced and files[name].age_s >= settings.orphan_grace_s
        ]
        candidates: dict[str, _Candidate] = {}
        for name in old[:MAX_CANDIDATES]:
            try:
                _, facts = yield from ask_first(
                    view, files[name].nodes, FileInfo(name), FileFacts, settings, attempts=1
                )
            except TimeTierError as error:
                result.errors.append(f"{name} is kept: {error.message}")
                continue
            if facts.table in tables:
                files[name].buckets = unpack_u32(facts.buckets)
                candidates[name] = files[name]
        yield from _remove_unnamed(view, run, group, candidates, settings, result)
    return result


def _list_files(view: View, group: int, result: Orphans) -> Script[dict[str, _Candidate]]:
    topology = view.routing.topology
    files: dict[str, _Candidate] = {}
    for node in (topology.cold_node(group, replica) for replica in range(topology.cold_replicas)):
        cursor, more = "", True
        while more:
            (answer,) = yield [Call(node, FileList(cursor), 10.0)]
            if not isinstance(answer, Files):
                result.errors.append(f"{node} does not list its files: {why_not(answer)}")
                break
            for name, age_s in zip(answer.names, unpack_i64(answer.ages_s), strict=True):
                candidate = files.setdefault(name, _Candidate([], age_s))
                candidate.nodes.append(node)
                candidate.age_s = min(candidate.age_s, age_s)
            more = answer.more and bool(answer.names) and answer.names[-1] > cursor
            cursor = answer.names[-1] if answer.names else cursor
    return files


def _remove_unnamed(
    view: View, run: str, group: int, candidates: dict[str, _Candidate], settings: SinkSettings, result: Orphans
) -> Script[None]:
    buckets = sorted({bucket for candidate in candidates.values() for bucket in candidate.buckets})
    fences = yield from _fence(view, run, buckets, settings, result)
    named: set[str] = set()
    judged: set[int] = set()
    for bucket, version in fences.items():
        try:
            links = yield from read_links(view, bucket, version, settings)
        except TimeTierError as error:
            result.errors.append(error.message)
            continue
        judged.add(bucket)
        named.update(block.file for link in links for block in link.blocks)
    garbage = [name for name, file in candidates.items() if name not in named and judged.issuperset(file.buckets)]
    for start in range(0, len(garbage), _REMOVALS_AT_ONCE):
        part = garbage[start : start + _REMOVALS_AT_ONCE]
        nodes = sorted({node for name in part for node in candidates[name].nodes})
        answers = yield [Call(node, FileRemove(part), settings.call_timeout_s) for node in nodes]
        for node, answer in zip(nodes, answers, strict=True):
            if not isinstance(answer, Pong):
                result.errors.append(f"{node} may have kept garbage: {why_not(answer)}")
        result.removed += len(part)


def _fence(
    view: View, run: str, buckets: Iterable[int], settings: SinkSettings, result: Orphans
) -> Script[dict[int, int]]:
    """Version of each bucket's fence; buckets that could not be fenced are missing."""
    versions: dict[int, int] = {}
    buckets = list(buckets)
    for start in range(0, len(buckets), _WRITES_AT_ONCE):
        part = buckets[start : start + _WRITES_AT_ONCE]
        requests = [WriteRequest(system_timeline(b), bytes((PUT,)), [fence_key()], [run.encode()]) for b in part]
        outcomes = yield from write(view, requests, settings.write_timeout_s)
        for bucket, outcome in zip(part, outcomes, strict=True):
            if isinstance(outcome, TimeTierError):
                result.errors.append(f"bucket {bucket} can't be fenced: {outcome.message}")
            else:
                versions[bucket] = outcome
    return versions
