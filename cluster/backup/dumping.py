"""Timelines of one storage group for a backup, each at a strong snapshot. *Pure* (scripts, see `effects.py`).

A page comes from one replica. It counts when it has every timeline that a majority of the replicas knows in its range,
each at a version that nothing acknowledged before the question exceeds: names are compared with those of so many other
replicas that together they are a majority, then a majority is asked for versions, as for a strong read. A replica that
lacks something is asked again, and another one after it. A timeline that is written all the time passes, because what
comes then is compared with the first question.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

from ..client.view import View
from ..cold.sink_calls import SinkSettings, ask_first, strong_versions, why_not
from ..effects import Call, Script, Sleep
from ..errors import ProtocolError, Unavailable
from ..keys import bucket_of
from ..messages import AskChosen, ChosenList, Dump, Dumped, TimelineState, unpack_i64

_PATIENCE = 4  # times `SinkSettings.attempts`
_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 1.0
_VERSIONS_AT_ONCE = 1_000
_END = b"\xff" * 8


class Place(NamedTuple):
    """Where a dump goes on: at a timeline's key (or how one begins); within it, if `version` is not -1."""

    cursor: bytes
    version: int = -1
    row_cursor: bytes = b""


class Page(NamedTuple):
    """`systems`: version of its bucket's links as of which each state was read. `following`: None at the end. Not
    `whole`: the timeline that was to be continued begins again, so what came of it before counts no more."""

    states: list[TimelineState]
    systems: list[int]
    following: Place | None
    whole: bool


class GroupDump:
    """Reads one storage group, page by page."""

    def __init__(self, view: View, group: int, settings: SinkSettings) -> None:
        self._view = view
        self._settings = settings
        self._nodes = view.routing.storage_nodes(group)
        self._others = len(self._nodes) // 2  # that make a majority with the one which sends the page
        self._names: dict[str, _Names] = {}

    def restart(self) -> None:
        """The next page is not the one that follows."""
        self._names.clear()

    def page(self, place: Place) -> Script[Page]:
        """States from a place on. Raises Unavailable when no strong snapshot is to be had, ProtocolError."""
        floors: dict[bytes, int] = {}
        reason = "replicas lag behind"
        for attempt in range(_PATIENCE * self._settings.attempts):
            if attempt:
                yield Sleep(min(_PAUSE_S * 2 ** (attempt - 1), _LONGEST_PAUSE_S))
            try:
                page = yield from self._attempt(place, attempt % len(self._nodes), floors)
            except Unavailable as error:
                reason = error.message
                continue
            if page is not None:
                for others in self._names.values():
                    others.forget_before(page.following.cursor if page.following is not None else _END)
                return page
        raise Unavailable(f"no strong snapshot of the timelines from {place.cursor!r} on: {reason}")

    def _attempt(self, place: Place, turn: int, floors: dict[bytes, int]) -> Script[Page | None]:
        """A page, first asked of replica `turn`; None if it lacks something. `floors`: versions that it must have
        reached, as far as they were asked for."""
        view, settings = self._view, self._settings
        message = Dump(place.cursor, settings.scan_bytes, place.version, place.row_cursor)
        nodes = self._nodes[turn:] + self._nodes[:turn]
        node, answer = yield from ask_first(view, nodes, message, Dumped, settings)
        page = _page_of(answer, place)
        names = yield from self._known_to_others(node, place.cursor, page.following)
        held = {state.timeline: state.version for state in page.states}
        if place.version >= 0 and page.whole:
            floors[place.cursor] = 0  # its version was found strong with its first piece
        unknown = sorted(name for name in {*names, *held} if name not in floors)
        for start in range(0, len(unknown), _VERSIONS_AT_ONCE):
            part = unknown[start : start + _VERSIONS_AT_ONCE]
            floors.update((yield from strong_versions(view, self._nodes, part, settings)))
        return page if all(held.get(name, 0) >= floors[name] for name in {*names, *held}) else None

    def _known_to_others(self, asked: str, start: bytes, following: Place | None) -> Script[list[bytes]]:
        """Timelines in the range of a page that enough other replicas know; together with `asked` a majority."""
        end = _END if following is None else following.cursor
        if following is not None and following.version >= 0:
            end += b"\x00"  # the page has a piece of that timeline
        found: list[bytes] = []
        answered = 0
        for node in sorted(self._nodes, key=self._view.is_suspect):
            if answered == self._others:
                break
            if node == asked:
                continue
            names = self._names.setdefault(node, _Names(node, start))
            try:
                found += yield from names.between(start, end, self._settings)
                answered += 1
            except Unavailable:
                self._view.suspect(node)
                del self._names[node]
        if answered < self._others:
            raise Unavailable("no majority of the replicas tells its timelines")
        return found


class _Names:
    """Timelines that one replica knows, in order, read ahead."""

    def __init__(self, node: str, start: bytes) -> None:
        self._node = node
        self._names: list[bytes] = []
        self._next: bytes | None = start

    def between(self, start: bytes, end: bytes, settings: SinkSettings) -> Script[list[bytes]]:
        """Timelines with start <= key < end. Raises Unavailable."""
        while self._next is not None and (not self._names or self._names[-1] < end):
            question = AskChosen(bucket_of(self._next), self._next)
            (answer,) = yield [Call(self._node, question, settings.call_timeout_s)]
            if not isinstance(answer, ChosenList):
                raise Unavailable(f"{self._node}: {why_not(answer)}")
            if answer.next_bucket >= 0 and answer.next_cursor <= self._next:
                raise Unavailable(f"{self._node}: its list of timelines does not go on")
            self._names += answer.timelines
            self._next = answer.next_cursor if answer.next_bucket >= 0 else None
        return self._names[bisect_left(self._names, start) : bisect_left(self._names, end)]

    def forget_before(self, start: bytes) -> None:
        """No page before this one is asked for any more."""
        del self._names[: bisect_left(self._names, start)]


def _page_of(answer: Dumped, place: Place) -> Page:
    """An answer as a page. Raises ProtocolError if it is unfit."""
    systems = unpack_i64(answer.systems)
    keys = [state.timeline for state in answer.states]
    if len(systems) != len(keys) or any(key < place.cursor for key in keys[:1]) or not _grows(keys):
        raise ProtocolError("an unfit answer to Dump")
    if not answer.cursor:
        return Page(answer.states, systems, None, answer.whole)
    version = answer.states[-1].version if answer.row_cursor and answer.states else -1
    following = Place(answer.cursor, version, answer.row_cursor)
    if following == place or answer.cursor < place.cursor or (answer.row_cursor and keys[-1:] != [answer.cursor]):
        raise ProtocolError("a dump does not go on")
    return Page(answer.states, systems, following, answer.whole)


def _grows(keys: Sequence[bytes]) -> bool:
    return all(low < high for low, high in itertools.pairwise(keys))
