"""What a chaos run has shown: figures from the timings of its clients, and violations from its history.

Every call belongs to a phase by the instant at which it began: `healthy` before the first fault, `between` two faults
(when all nodes serve, but connections may still be mending), or of one kind of fault the `first_second`, the time
`after` it until the fault is removed, or `healing` until all nodes serve again.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

from ..simulation.history import Done, Operation, Page, Seen, Write
from .faults import Window
from .workload import ALL, READ, WRITE, Timing

FIRST_S = 1.0
LONGEST_WAIT_S = 1.0  # the aim: no operation waits longer with one replica down, paused or cut off
P99_FACTOR = 2.0  # the aim: p99 after the first second is under this many times the healthy one
AIMS = ("kill-storage", "pause-storage", "wipe-storage", "restart-storage", "kill-zone", "cut-zone")
HEALTHY, BETWEEN = "healthy", "between"
FIRST, AFTER, HEALING = "first_second", "after", "healing"
_MS = 1_000


def load_timings(paths: Iterable[Path]) -> list[Timing]:
    """Timings of all clients, in the order in which the calls began. A line cut off at the end is left out."""
    decoder = msgspec.json.Decoder(Timing)
    found: list[Timing] = []
    for path in paths:
        for line in path.read_bytes().split(b"\n")[:-1]:
            found.append(decoder.decode(line))
    return sorted(found, key=lambda timing: timing.called_at)


def figures(timings: Sequence[Timing], windows: Sequence[Window]) -> dict[str, Any]:
    """Counts, latencies and gaps, ready for JSON. `windows`: in the order of time, healed."""
    phases = _sort(timings, windows)
    healthy, between = (
        {access: _latencies(phases.get((phase, "", access), [])) for access in (READ, WRITE)}
        for phase in (HEALTHY, BETWEEN)
    )
    faults = {}
    for kind in dict.fromkeys(window.kind for window in windows):
        faults[kind] = _fault_figures(kind, timings, [w for w in windows if w.kind == kind], phases, healthy)
    slowest = max(timings, key=lambda t: t.ended_at - t.called_at, default=None)
    errors = Counter(f"{t.access} {t.outcome}" for t in timings if t.outcome != "ok")
    return {
        "operations": len(timings),
        "reads": sum(t.access == READ for t in timings),
        "writes": sum(t.access == WRITE for t in timings),
        "errors": dict(sorted(errors.items())),
        HEALTHY: healthy,
        BETWEEN: between,
        "faults": faults,
        "slowest": None if slowest is None else _told(slowest, windows),
    }


def _phase(at: float, windows: Sequence[Window], begins: list[float]) -> tuple[str, str]:
    """(phase, kind of fault) of an instant."""
    place = bisect_right(begins, at) - 1
    if place < 0:
        return HEALTHY, ""
    window = windows[place]
    if at >= window.healed:
        return BETWEEN, ""
    if at < window.began + FIRST_S:
        return FIRST, window.kind
    return (AFTER if at < window.removed else HEALING), window.kind


def _sort(timings: Iterable[Timing], windows: Sequence[Window]) -> dict[tuple[str, str, str], list[Timing]]:
    begins = [window.began for window in windows]
    found: dict[tuple[str, str, str], list[Timing]] = {}
    for timing in timings:
        found.setdefault((*_phase(timing.called_at, windows, begins), timing.access), []).append(timing)
    return found


def _fault_figures(
    kind: str,
    timings: Sequence[Timing],
    windows: Sequence[Window],
    phases: dict[tuple[str, str, str], list[Timing]],
    healthy: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "times": len(windows),
        "lasted_s": round(sum(w.removed - w.began for w in windows), 1),
        "healing_s": [round(w.healed - w.removed, 1) for w in windows],
    }
    notes = [f"{window.target}: {window.note}" for window in windows if window.note]
    if notes:
        found["notes"] = notes
    met = kind in AIMS or kind.startswith("flap")
    for access in (READ, WRITE):
        its = {phase: phases.get((phase, kind, access), []) for phase in (FIRST, AFTER, HEALING)}
        found[access] = {
            "longest_gap_s": round(max((_longest_gap(timings, access, w) for w in windows), default=0.0), 3),
            **{phase: _latencies(each) for phase, each in its.items()},
        }
        waits = [t.ended_at - t.called_at for each in its.values() for t in each]
        found[access]["slowest_s"] = round(max(waits, default=0.0), 3)
        p99, normal = found[access][AFTER]["p99_ms"], healthy[access]["p99_ms"]
        if met:
            found[access]["aim_longest_wait"] = max(waits, default=0.0) <= LONGEST_WAIT_S
            if p99 is not None and normal is not None:
                found[access]["aim_p99"] = p99 < P99_FACTOR * normal
    return found


def _latencies(timings: Sequence[Timing]) -> dict[str, Any]:
    took = sorted(t.ended_at - t.called_at for t in timings)
    return {
        "count": len(took),
        "failed": sum(t.outcome != "ok" for t in timings),
        "p50_ms": _percentile_ms(took, 0.5),
        "p99_ms": _percentile_ms(took, 0.99),
        "over_1s": sum(each > LONGEST_WAIT_S for each in took),
    }


def _percentile_ms(ordered: Sequence[float], share: float) -> float | None:
    if not ordered:
        return None
    return round(ordered[max(0, math.ceil(share * len(ordered)) - 1)] * _MS, 2)


def _longest_gap(timings: Iterable[Timing], access: str, window: Window) -> float:
    """Longest time in which no operation succeeded, while the fault lasted or its consequences did."""
    ended = sorted(t.ended_at for t in timings if t.access == access and t.outcome == "ok")
    inside = [at for at in ended if window.began < at < window.healed]
    return max(later - earlier for earlier, later in pairwise([window.began, *inside, window.healed]))


def _told(timing: Timing, windows: Sequence[Window]) -> dict[str, Any]:
    phase, kind = _phase(timing.called_at, windows, [window.began for window in windows])
    return {
        "kind": timing.kind,
        "took_s": round(timing.ended_at - timing.called_at, 3),
        "outcome": timing.outcome,
        "phase": f"{kind} {phase}".strip(),
    }


# ---------------------------------------------------------------- acknowledged writes


def missing_writes(history: Sequence[Operation], final: Sequence[Operation]) -> list[str]:
    """Acknowledged writes that are not there at the end, in words, one a line.

    `final`: reads of whole timelines, made when nothing else ran. A put at version v must be there, unless something
    that may have come later is: the same item at a greater version, or a delete or wipe that may have.
    """
    found: dict[str, dict[Any, Seen]] = {}
    for read in final:
        if isinstance(read.result, Page):
            assert not read.result.more and len(read.result.items) < ALL, "a final read is of a whole timeline"
            found[read.timeline] = {seen.key: seen for seen in read.result.items}
    missing: list[str] = []
    removals = _removals(history)
    for operation in history:
        if not isinstance(operation.result, Done) or not isinstance(operation.arguments, Write):
            continue
        version = operation.result.version
        assert version is not None, "the client tells versions"
        if operation.timeline not in found:
            missing.append(f"{operation.timeline} can't be read; {operation.kind} got version {version}")
            continue
        for mutation in operation.arguments.mutations:
            if mutation.action != "put":
                continue
            seen = found[operation.timeline].get(mutation.key)
            if seen is not None and seen.version is not None and seen.version >= version:
                continue
            lasts = [removals.get((operation.timeline, key), -1.0) for key in (mutation.key, None)]
            if seen is None and max(lasts) >= version:
                continue
            missing.append(f"{operation.timeline}: {mutation} of version {version} is not there; there is {seen}")
    return missing


def _removals(history: Iterable[Operation]) -> dict[tuple[str, Any], float]:
    """Greatest version of a delete by (timeline, key), and of a wipe by (timeline, None); infinite if unknown."""
    found: dict[tuple[str, Any], float] = {}
    for operation in history:
        if not operation.is_write or not isinstance(operation.arguments, Write):
            continue
        version = operation.result.version if isinstance(operation.result, Done) else None
        for mutation in operation.arguments.mutations:
            if mutation.action != "put":
                place = (operation.timeline, mutation.key)
                found[place] = max(found.get(place, -1.0), math.inf if version is None else float(version))
    return found
