"""Long answers, made a slice at a time, so that a replica is never held for more than a millisecond or two (*pure*).

An answer over many rows is a generator that yields after each slice. Between two slices the replica does whatever
else there is: entries are chosen, rows evicted, timelines wiped. So each part of an answer that must be of one instant
(the rows of one timeline, say) is pinned to a version when it begins, and checked at each slice: if the replica may
have removed rows of that version meanwhile, the part begins again. A timeline to which that happens `MAX_RESTARTS`
times is read in one slice, however long.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from itertools import islice
from typing import TypeVar

from .core import Core
from .timeline import Timeline

MAX_RESTARTS = 3

T = TypeVar("T")
Slices = Generator[None, None, T]
"""Yields after each slice; returns the result."""


class Pinned:
    """A timeline's rows as of one version, read in slices.

    `version`, `wiped`, `dirty`: of the timeline when it was pinned; `system_version`: the same of its bucket's links.
    """

    def __init__(self, core: Core, timeline: Timeline, system: Timeline, version: int) -> None:
        self.key = timeline.key
        self.version = version
        self.wiped = timeline.wiped
        self.dirty = timeline.dirty
        self.system_version = system.chosen
        self._core = core
        self._system_key = system.key

    def holds(self) -> bool:
        """Whether all rows of the version are still there, but for those that links known when it was pinned cover.

        Trimming and a transfer of state raise the floor above the versions whose rows they remove, purging comes after
        a wipe, and an eviction after a link.
        """
        core = self._core
        timeline = core.timeline(self.key)
        return (
            timeline.floor <= self.version
            and timeline.wiped == self.wiped
            and core.timeline(self._system_key).chosen == self.system_version
        )

    def rows(self, low: bytes, high: bytes, *, whole: bool) -> Iterator[list[tuple[bytes, bytes]] | None]:
        """Rows of the engine with low <= name < high in slices; the last one is None if they don't hold any more.

        `whole`: all in one slice.
        """
        at_most = self._core.settings.chore_rows
        while True:
            scan = self._core.engine.scan(low, high)
            part = list(scan if whole else islice(scan, at_most))
            yield part
            if whole or len(part) < at_most:
                return
            low = part[-1][0] + b"\x00"
            if not self.holds():
                yield None
                return


def in_one_slice(slices: Slices[T]) -> T:
    """The result, without a break."""
    while True:
        try:
            next(slices)
        except StopIteration as stop:
            result: T = stop.value
            return result


def until_it_holds(read: Callable[[bool], Slices[T | None]]) -> Slices[T]:
    """Result of a part that is pinned and may have to begin again. `read(whole)` gives None when it has to.

    With `whole` it yields nothing, so it can't be overtaken.
    """
    for _ in range(MAX_RESTARTS):
        found = yield from read(False)
        if found is not None:
            return found
        yield
    found = yield from read(True)
    assert found is not None, "nothing happens within one slice"
    return found
