"""What a replica answers to a backup: whole timelines, each as of one version (*pure*).

Unlike a scan of the sink it goes by the marks of timelines, not by their rows, so a timeline without a row (all of it
is sunk, or wiped) comes with its version all the same. A timeline that is too large for one answer comes in pieces, all
as of the version of the first; meanwhile its log tail stays, as during a transfer of state to a peer.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from itertools import islice

from ..errors import InvalidRequest
from ..keys import bucket_of, system_timeline
from ..messages import Dump, Dumped, TimelineState, pack_i64
from .catchup import CatchUp
from .core import Core
from .digests import NewestRows
from .rows import VERSION_BYTES, prefix_end, rows_prefix
from .slices import MAX_RESTARTS, Pinned, Slices

TIMELINES_PER_ANSWER = 1_000
MAX_ANSWER_BYTES = 16 << 20
_NAMES_AT_ONCE = 100
_TIMELINES_PER_SLICE = 10


class Dumps:
    """Answers of one replica to a backup."""

    def __init__(self, core: Core, catch_up: CatchUp) -> None:
        self._core = core
        self._catch_up = catch_up

    def slices(self, message: Dump, owned: Set[int]) -> Slices[tuple[Dumped, int]]:
        """States from the cursor on, and the engine batch that must be durable first."""
        core = self._core
        if len(message.cursor) < 4 or message.limit_bytes < 1:
            raise InvalidRequest("a Dump needs a cursor of 4 bytes at least, and room for a row")
        limit = min(message.limit_bytes, MAX_ANSWER_BYTES)
        answer = Dumped([], b"", b"")
        systems: list[int] = []
        size = after = 0
        core.mark_all()
        for key in self._names(message.cursor):
            if bucket_of(key) not in owned:
                continue
            if len(systems) >= TIMELINES_PER_ANSWER or size >= limit:
                answer.cursor = key
                break
            goes_on = key == message.cursor and message.at >= 0
            piece = _Piece(core, key, message.at if goes_on else -1, message.row_cursor if goes_on else b"", limit)
            yield from piece.read(self._catch_up)
            answer.whole &= piece.is_as_asked
            if piece.state is None:
                continue
            answer.states.append(piece.state)
            systems.append(piece.system_version)
            size += piece.size
            after = max(after, piece.dirty)
            if piece.state.more:
                answer.cursor, answer.row_cursor = key, piece.next_row
                self._catch_up.hold_tail(key, piece.state.version)
                break
            if goes_on:
                self._catch_up.let_tail_go(key, piece.state.version)
            if len(systems) % _TIMELINES_PER_SLICE == 0:
                yield
        answer.systems = pack_i64(systems)
        core.counters.add("timelines_dumped", len(systems))
        return answer, after

    def _names(self, cursor: bytes) -> Iterable[bytes]:
        """Timelines with a mark, in order; read a few at a time, because they change meanwhile."""
        at = b"M" + cursor
        while True:
            names = [name for name, _ in islice(self._core.engine.scan(at, b"N"), _NAMES_AT_ONCE)]
            yield from (name[1:] for name in names)
            if len(names) < _NAMES_AT_ONCE:
                return
            at = names[-1] + b"\x00"


class _Piece:
    """A timeline's state from `row_cursor` on, as of version `at` (-1: the present one), up to about `limit` bytes.

    `state`: None for a timeline of which nothing is chosen. `is_as_asked`: it is as of the version that was wanted.
    """

    def __init__(self, core: Core, key: bytes, at: int, row_cursor: bytes, limit: int) -> None:
        self._core = core
        self._key = key
        self._at = at
        self._row_cursor = row_cursor
        self._limit = limit
        self.state: TimelineState | None = None
        self.is_as_asked = True
        self.system_version = self.dirty = self.size = 0
        self.next_row = b""

    def read(self, catch_up: CatchUp) -> Slices[None]:
        """Read it, from the beginning again when rows of the version may have gone meanwhile."""
        for attempt in range(MAX_RESTARTS + 1):
            done = yield from self._read(catch_up, whole=attempt == MAX_RESTARTS)
            if done:
                return
            yield

    def _read(self, catch_up: CatchUp, *, whole: bool) -> Slices[bool]:
        core = self._core
        timeline = core.timeline(self._key)
        if self._at >= 0 and not max(timeline.floor, timeline.wiped + 1) <= self._at <= timeline.chosen:
            self._at, self._row_cursor, self.is_as_asked = -1, b"", False
        version = timeline.chosen if self._at < 0 else self._at
        self.state, self.size, self.next_row = None, 0, b""
        if not version:
            return True
        pinned = Pinned(core, timeline, core.timeline(system_timeline(bucket_of(self._key))), version)
        self.system_version, self.dirty = pinned.system_version, pinned.dirty
        ids = [] if self._row_cursor else catch_up.recent_ids(timeline, version)
        state = self.state = TimelineState(self._key, version, pinned.wiped, ids, 0, False, [], [])
        prefix = rows_prefix(self._key)
        newest = NewestRows(prefix, pinned.wiped, version)
        low, high = prefix + self._row_cursor, prefix_end(prefix)
        for part in pinned.rows(low, high, whole=whole):
            if part is None:
                return False
            for name, row in newest.of(part):
                if self._is_full(state, name, row):
                    return True
            if not whole and len(part) == core.settings.chore_rows:
                yield
        for name, row in newest.last():
            self._is_full(state, name, row)
        state.more, self.next_row = False, b""
        return True

    def _is_full(self, state: TimelineState, name: bytes, row: bytes) -> bool:
        state.row_keys.append(name)
        state.rows.append(row)
        self.size += len(name) + len(row)
        if self.size < self._limit:
            return False
        state.more, self.next_row = True, prefix_end(name[:-VERSION_BYTES])
        return True
