"""Which timelines changed here, in order, so that a peer that was away compares itself by changes alone (*pure*).

A replica that lacks something learns of it by asking each peer "what has changed since the position up to which I have
compared myself with you?". The answer costs what has changed since, however much data there is: at a start, every few
seconds in between, after an outage.

| row | value |
|---|---|
| `J boot number` | keys of the timelines that were written or chosen since the row before, one row an engine batch |
| `N journal` | `_Facts`: up to where rows were removed, up to where every `M` row is right, bytes of the rows |
| `N compared peer` | the `Position` in a peer's journal up to which this replica has all that the peer had |

A row is in the same batch as the records that it tells of, and positions grow with each life, so what a crash leaves is
told: a change that is on disk has a row on disk, and a position that a peer holds is never used for another row. A
timeline comes once in a *generation*, which ends when a peer is told of it, or after a few seconds.

What was chosen is marked (`M`) half a second later, so after a crash some marks lag behind the log. They are of
timelines with a row after `settled`; those are read back before the first answer, a slice at each question.

Rows go when every peer has compared itself beyond them, and the oldest when they exceed `journal_bytes`: a peer that
was away for longer is told so, and compares all timelines, once.
"""

from __future__ import annotations

import itertools
import struct
from typing import TYPE_CHECKING

import msgspec

from ..errors import InvalidRequest
from ..messages import AskChanged, ChangedList, Position, pack_i64
from .rows import prefix_end

if TYPE_CHECKING:
    from .core import Core

JOURNAL_KEY = b"Njournal"
NOWHERE: Position = (0, 0, 0)
TIMELINES_PER_ANSWER = 5_000
READ_BACK_PER_QUESTION = 200  # each costs a read of its mark and a scan of its log
ROWS_AT_ONCE = 500  # that a slice of trimming looks at
MARKS_PER_GENERATION = 4
MAX_NOTED = 100_000  # names of the present generation that are remembered as told already
_PLACE = struct.Struct(">QQ")
_START = (0, 0)

Place = tuple[int, int]
"""(boot, number): where in the journal of one incarnation."""


class _Facts(msgspec.Struct, array_like=True):
    trimmed: Place
    settled: Place
    size: int = 0


_facts_decoder = msgspec.msgpack.Decoder(_Facts)
_names_decoder = msgspec.msgpack.Decoder(list[bytes])
_position_decoder = msgspec.msgpack.Decoder(Position)
_encoder = msgspec.msgpack.Encoder()


def journal_key(place: Place) -> bytes:
    return b"J" + _PLACE.pack(*place)


def compared_key(peer: int) -> bytes:
    return b"Ncompared" + bytes((peer,))


class Journal:
    """The journal of one replica, and how far it has compared itself with those of its peers."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._engine = core.engine
        _, self._incarnation, boot = core.life
        self._last: Place = (boot, 0)  # the last row, or where this life's rows begin
        self._pending: list[bytes] = []  # timelines that the next row names
        self._noted: set[bytes] = set()  # timelines of the present generation
        self._marks = 0
        self._acked: dict[int, Place] = {}
        self._facts = self._read_facts()
        self._unread: Place | None = self._facts.settled  # rows of former lives from here on are to be read back
        self._compared = {peer: self._read_compared(peer) for peer in core.peers}
        self._safe = dict(self._compared)
        self._unsafe: dict[int, tuple[int, Position]] = {}  # engine batch that makes a position durable

    # ---- what changes here

    def note(self, timeline: bytes) -> None:
        """The pending engine batch changes a timeline, or it was chosen."""
        if timeline not in self._noted and self._core.peers:
            if len(self._noted) >= MAX_NOTED:
                self._noted.clear()
            self._noted.add(timeline)
            self._pending.append(timeline)

    def note_all(self, timelines: list[bytes]) -> None:
        """The same for many timelines, each named once."""
        if self._noted.issuperset(timelines) or not self._core.peers:
            return
        fresh = [timeline for timeline in timelines if timeline not in self._noted]
        if len(self._noted) + len(fresh) > MAX_NOTED:
            self._noted.clear()
        self._noted.update(fresh)
        self._pending += fresh

    def marked(self) -> None:
        """All that was chosen up to here is marked in the pending batch."""
        self._marks += 1
        if self._marks % MARKS_PER_GENERATION == 0:
            self.settle()

    def settle(self) -> None:
        """End the generation, and note that everything up to the last row is marked: a start need not read it back."""
        if self._unread is None:
            self._noted.clear()
            # Not the row that is about to be written: what is still to come in this batch is named in it, too.
            if self._last != self._facts.settled:
                self._facts.settled = self._last
                self._put_facts()

    def write_row(self) -> None:
        """Before each commit: the row of this batch."""
        if self._pending:
            self._last = self._last[0], self._last[1] + 1
            row = _encoder.encode(self._pending)
            self._pending = []
            self._engine.put(journal_key(self._last), row)
            self._facts.size += len(row)

    # ---- what peers are told

    def answer(self, message: AskChanged) -> ChangedList:
        """What has changed since a peer's position. Raises InvalidRequest for who is no peer."""
        if message.replica not in self._core.peers:
            raise InvalidRequest(f"replica {message.replica} is no peer of replica {self._core.replica}")
        self._engine.commit()
        since, end = self._place_of(message.since), self._last
        if self._read_back():
            return self._told([], message.since, more=True)
        self._acked[message.replica] = min(self._place_of(message.safe), end)
        if since < self._facts.trimmed:
            self._core.counters.add("catch_up_too_old")
            return self._told([], self._position(end), whole=False)
        names: dict[bytes, None] = {}
        reached = end
        for key, row in self._engine.scan(_after(since), prefix_end(b"J")):
            if len(names) >= TIMELINES_PER_ANSWER:
                break
            names.update(dict.fromkeys(_names_decoder.decode(row)))
            reached = _place(key)
        else:
            reached = end
        self._noted.clear()  # what changes from here on comes after `reached`, whatever has changed before
        return self._told(list(names), self._position(reached), more=reached < end)

    def _told(self, names: list[bytes], reached: Position, *, more: bool = False, whole: bool = True) -> ChangedList:
        self._core.counters.add("catch_up_told", len(names))
        return ChangedList(names, pack_i64(self._core.chosen_of(names)), reached, more, whole)

    def _place_of(self, position: Position) -> Place:
        """Where a peer's position lies here; at the start, if it is of a former incarnation."""
        return position[1:] if position[0] == self._incarnation else _START

    def _position(self, place: Place) -> Position:
        return (self._incarnation, *place)

    # ---- after a start

    def _read_facts(self) -> _Facts:
        row = self._engine.get(JOURNAL_KEY)
        if row is not None:
            return _facts_decoder.decode(row)
        # Rows of a format without a journal: nobody can be told of those changes.
        is_old = next(iter(self._engine.scan(b"M", b"N")), None) is not None
        begins = self._last if is_old else _START
        facts = _Facts(begins, begins)
        self._engine.put(JOURNAL_KEY, _encoder.encode(facts))
        return facts

    def _put_facts(self) -> None:
        self._engine.put(JOURNAL_KEY, _encoder.encode(self._facts))

    def _read_back(self) -> bool:
        """Load and mark a slice of the timelines whose marks may lag. True if there are more."""
        if self._unread is None:
            return False
        names: set[bytes] = set()
        rows = self._engine.scan(_after(self._unread), journal_key((self._core.life[2], 0)))
        self._unread = None
        for key, row in rows:
            names.update(_names_decoder.decode(row))
            if len(names) >= READ_BACK_PER_QUESTION:
                self._unread = _place(key)
                break
        for name in names:
            self._core.unmarked[name] = self._core.timeline(name)
        self._core.counters.add("timelines_read_back", len(names))
        self._core.mark_all()
        return self._unread is not None

    # ---- how far this replica has compared itself

    def _read_compared(self, peer: int) -> Position:
        row = self._engine.get(compared_key(peer))
        return NOWHERE if row is None else _position_decoder.decode(row)

    def question(self, peer: int) -> AskChanged:
        """What to ask a peer next."""
        batch, position = self._unsafe.get(peer, (0, NOWHERE))
        if batch and batch <= self._core.durable:
            self._safe[peer] = position
            del self._unsafe[peer]
        return AskChanged(self._core.replica, self._compared[peer], self._safe[peer])

    def compared(self, peer: int, position: Position) -> None:
        """This replica has all that `peer` had at a position of its journal."""
        if position != self._compared[peer]:
            self._core.mark_all()  # else a crash could forget that it was chosen here, and nobody would tell again
            self._compared[peer] = position
            self._engine.put(compared_key(peer), _encoder.encode(position))
            self._unsafe[peer] = self._engine.sequence, position

    # ---- trimming

    def trim(self) -> bool:
        """Remove a slice of the rows that are of no use any more. True if there are others."""
        bound = min((self._acked.get(peer, _START) for peer in self._core.peers), default=self._last)
        over = self._facts.size > self._core.settings.journal_bytes and self._unread is None
        if not over and bound <= self._facts.trimmed:
            return False
        rows = list(itertools.islice(self._engine.scan(_after(self._facts.trimmed), prefix_end(b"J")), ROWS_AT_ONCE))
        doomed = [(key, len(row)) for key, row in rows if over or _place(key) <= bound]
        for key, size in doomed:
            self._engine.delete(key)
            self._facts.size -= size
        if not rows:
            self._facts.size = 0  # a crash may have forgotten what was removed
        reached = _place(doomed[-1][0]) if doomed else self._facts.trimmed
        more = len(doomed) == ROWS_AT_ONCE
        self._facts.trimmed = reached if more or over else max(reached, bound)
        self._put_facts()
        return more


def _place(key: bytes) -> Place:
    boot, number = _PLACE.unpack_from(key, 1)
    return boot, number


def _after(place: Place) -> bytes:
    return journal_key(place) + b"\x00"
