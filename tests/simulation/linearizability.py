"""Is a history linearizable? Timelines are independent, so each is checked by itself.

A search for an order of the operations that respects real time (what returned before another was called comes first)
and in which each result is right for a plain timeline: Wing & Gong, "Testing and Verifying Concurrent Objects" (1993),
with Lowe's memory of configurations (operations done, state), "Testing for Linearizability" (2017), as in Knossos and
Porcupine. An operation is put in order just before it must be, an unknown one only if that helps.

What an operation may answer says `plain_timeline.py`. Versions in results prune the search, but they are results like
any others: a wrong one makes the history wrong.

    python -m tests.simulation.linearizability FILE...      (JSON lines; exit status 1 on a violation)
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import msgspec

from .history import Done, Expire, Item, Key, Operation, Page, Refused, Write, load_history
from .plain_timeline import CLOSED, EMPTY, NEVER, State, after, tells_versions, told_version

DEFAULT_EFFORT = 200_000  # configurations looked at per timeline: some seconds


@dataclass
class Violation:
    """A timeline whose history no order explains. `witness`: the few operations that show it, to print."""

    timeline: str
    witness: str


@dataclass
class Report:
    """`ok`: every timeline has an order that explains it. `undecided`: timelines given up, which are not ok either."""

    ok: bool
    undecided: list[str] = field(default_factory=list)
    violations: list[Violation] = field(default_factory=list)


class _Step(NamedTuple):
    """A configuration: operations done (a bit each), the first known one that is not, the versions passed."""

    done: int
    first: int
    passed: int
    state: State


def check_history(operations: Iterable[Operation], *, effort: int = DEFAULT_EFFORT) -> Report:
    """Check every timeline of a history. `effort`: configurations to look at per timeline before giving it up.

    Raises ValueError if an operation returns before it is called.
    """
    from .witness import find_witness  # it uses this module

    timelines: dict[str, list[Operation]] = {}
    for operation in operations:
        timelines.setdefault(operation.timeline, []).append(operation)
    report = Report(ok=True)
    for timeline, its in timelines.items():
        fits = linearizable(its, effort=effort)
        if fits is None:
            report.undecided.append(timeline)
        elif not fits:
            report.violations.append(Violation(timeline, find_witness(its, effort=effort)))
    report.ok = not (report.undecided or report.violations)
    return report


def linearizable(
    operations: Sequence[Operation], *, start: State = EMPTY, gaps: bool = False, effort: int = DEFAULT_EFFORT
) -> bool | None:
    """Whether the history of one timeline is linearizable; None if the effort did not suffice to tell.

    `start`: what the timeline held before. `gaps`: there are writes that the history does not show, to other items;
    so versions may be skipped.
    """
    search = _Search(operations, gaps)
    seen: set[tuple[int, State]] = set()
    path = [search.successors(_Step(0, 0, 0, start))]
    while path:
        step = next(path[-1], None)
        if step is None:
            path.pop()
            continue
        if step.done & search.all_known == search.all_known:
            return True
        if (step.done, step.state) in seen:
            continue
        if len(seen) >= effort:
            return None
        seen.add((step.done, step.state))
        path.append(search.successors(step))
    return not search.known


def ends(operations: Sequence[Operation], *, effort: int = DEFAULT_EFFORT) -> set[tuple[State, tuple[int, ...]]] | None:
    """All states in which a history can end, each with the unknown writes that are not in it, by place in the history.

    None if the effort did not suffice.
    """
    search = _Search(operations, gaps=False)
    unknown = [operations.index(op) for op in search.unknown_as_recorded]
    found: set[tuple[State, tuple[int, ...]]] = set()
    seen: set[tuple[int, State]] = set()
    waiting = [_Step(0, 0, 0, EMPTY)]
    while waiting:
        step = waiting.pop()
        if (step.done, step.state) in seen:
            continue
        if len(seen) >= effort:
            return None
        seen.add((step.done, step.state))
        if step.done & search.all_known == search.all_known:
            left = tuple(place for bit, place in enumerate(unknown, len(search.known)) if not step.done >> bit & 1)
            found.add((step.state, left))
        waiting.extend(search.successors(step))
    return found


class _Search:
    """The operations of one timeline: those with a known outcome in order of call, then the unknown writes."""

    def __init__(self, operations: Sequence[Operation], gaps: bool) -> None:
        self.versions_matter = any(tells_versions(op) for op in operations)
        self.gaps = gaps or not self.versions_matter
        ordered = sorted(operations, key=lambda operation: operation.called_at)
        self.known = [op for op in ordered if not op.is_unknown and not isinstance(op.result, Refused)]
        self.unknown_as_recorded = [op for op in ordered if op.is_unknown and isinstance(op.arguments, Write | Expire)]
        self.unknown = _dated(self.unknown_as_recorded, ordered)
        for op in self.known:
            if op.returned_at is None or op.returned_at < op.called_at:
                raise ValueError(f"an operation with a known outcome returns before it is called: {op}")
        self.all_known = (1 << len(self.known)) - 1
        dated = [told_version(op) is not None for op in self.unknown]
        places = range(len(self.known), len(self.known) + len(self.unknown))
        self.unknown_by_likelihood = sorted(places, key=lambda place: not dated[place - len(self.known)])
        every = enumerate([*self.known, *self.unknown])
        told = [(version, index) for index, op in every if (version := told_version(op)) is not None]
        self.versions = sorted(told)

    def successors(self, step: _Step) -> Iterator[_Step]:
        """Configurations one operation further; those that are the likeliest to lead on come first."""
        candidates, deadline = self._candidates(step)
        if step.state.open_until == CLOSED:  # a look that fits changes nothing: it may come first, whatever comes later
            for index in candidates:
                op = self.known[index]
                if not op.is_write and step.state in after(step.state, op, self.gaps):
                    if (following := self._advance(step, index, step.state)) is not None:
                        yield following
                    return
        for index in candidates:
            for state in after(step.state, self.known[index], self.gaps):
                if (following := self._advance(step, index, state)) is not None:
                    yield following
        for index in self.unknown_by_likelihood:
            op = self.unknown[index - len(self.known)]
            if op.called_at <= deadline and not step.done >> index & 1:
                for state in after(step.state, op, self.gaps):
                    if (following := self._advance(step, index, state)) is not None:
                        yield following

    def _candidates(self, step: _Step) -> tuple[list[int], float]:
        """Known operations that may come next, those that must return first in front; and the latest call of any."""
        candidates: list[int] = []
        deadline = NEVER
        for index in range(step.first, len(self.known)):
            op = self.known[index]
            if op.called_at > deadline:
                break
            if not step.done >> index & 1:
                candidates.append(index)
                assert op.returned_at is not None
                deadline = min(deadline, op.returned_at)
        candidates.sort(key=lambda index: self.known[index].returned_at or 0.0)
        return candidates, deadline

    def _advance(self, step: _Step, index: int, state: State) -> _Step | None:
        """The configuration after an operation; None if one that is left has seen an older version."""
        if not self.versions_matter:
            # Else histories that differ in entries only would be looked at again.
            state = State(rows=state.rows, horizon=state.horizon)
        done = step.done | 1 << index
        passed = step.passed
        while passed < len(self.versions) and done >> self.versions[passed][1] & 1:
            passed += 1
        if passed < len(self.versions) and self.versions[passed][0] < state.version:
            return None
        first = step.first
        while first < len(self.known) and done >> first & 1:
            first += 1
        return _Step(done, first, passed, state)


def _dated(unknown: Sequence[Operation], operations: Sequence[Operation]) -> list[Operation]:
    """The unknown writes; those of which a look has seen a value with its version are told to be done at that version.

    Only if no other write has put that value at that key: then that look, in any order that explains it, proves it.
    """
    puts: dict[tuple[Key, str], list[int]] = {}
    for operation in operations:
        if isinstance(operation.arguments, Write):
            for mutation in operation.arguments.mutations:
                if mutation.action == "put" and mutation.key is not None:
                    puts.setdefault((mutation.key, mutation.value), []).append(id(operation))
    seen: dict[int, int] = {}
    for operation in operations:
        result = operation.result
        items = result.items if isinstance(result, Page) else (result.item,) if isinstance(result, Item) else ()
        for item in items:
            writers = puts.get((item.key, item.value), ()) if item is not None else ()
            if item is not None and item.version is not None and len(writers) == 1:
                seen[writers[0]] = item.version
    return [
        msgspec.structs.replace(op, result=Done(seen[id(op)]), returned_at=None) if id(op) in seen else op
        for op in unknown
    ]


def main(arguments: Sequence[str]) -> int:
    """Check history files. Exit status: 0 linearizable, 1 a violation, 2 undecided or unreadable."""
    if not arguments:
        print("usage: python -m tests.simulation.linearizability FILE...   (JSON lines)", file=sys.stderr)
        return 2
    try:
        operations = load_history([Path(argument) for argument in arguments])
        report = check_history(operations)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for violation in report.violations:
        print(f"timeline {violation.timeline}: not linearizable\n{violation.witness}\n")
    for timeline in report.undecided:
        print(f"timeline {timeline}: undecided within {DEFAULT_EFFORT} configurations")
    timelines = len({operation.timeline for operation in operations})
    print(
        f"{len(operations)} operations on {timelines} timelines: {len(report.violations)} violations, "
        f"{len(report.undecided)} undecided"
    )
    return 1 if report.violations else 2 if report.undecided else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
