"""The version cache: versions of many timelines in one array, for questions that must not touch the engine (*pure*).

Version questions are by far the most frequent, and most of them are "still at version v?". An entry is a timeline's
digest (128 bits, seeded; see `keys.timeline_digest`) and its version: 24 bytes, and one byte as its share of its row's
sequence word. Each digest has one row of `WAYS` entries, and within a row *the order is the LRU order*: a look-up or a
note moves its entry to the front, what comes in pushes the last one out. All of a batch is done by array operations.

What an entry says. A version >= 0 is *clean*: the replica has applied exactly that version, durably, and accepted
nothing after it. `DIRTY` says nothing, and neither does an absent entry: then the replica itself is asked. The owner
marks an entry dirty before the engine is handed what changes the timeline, and notes the version again when that is
chosen and fsync'd (`paxos/versions.py`). So at every instant a clean entry is true of what is on disk.

The array lies in memory that may outlive the process (`version_home.py`), and a process may be killed between any two
stores. Therefore:

* each row has a sequence word, odd while its entries move; an odd row is emptied when the memory is taken over;
* marking dirty is one store of eight bytes, which is never torn;
* the header names format, shape, seed and owner, and the life that last used it. Who takes the memory over must be the
  life that follows that one; else everything is emptied. So neither another node, nor a folder of the past, nor a new
  incarnation finds anything in it.

Layout, little-endian: the header's page, then the columns `sequence` (u64 a row), `low`, `high` (u64 an entry: the
digest's halves), `versions` (i64 an entry). A free entry has a digest of zeros and is dirty. Of two digests with equal
low halves a row holds one only, so that half finds an entry.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import InvalidRequest

WAYS = 8  # entries of a row: the halves of its digests are one line of the processor's cache each
DIRTY = -1
DIGEST_BYTES = 16
HEADER_BYTES = 4096
ROW_BYTES = 8 + WAYS * (DIGEST_BYTES + 8)

_MAGIC = b"TTversion\x00\x00\x01"
_HEADER = struct.Struct("<12sIQQ32sqq")  # magic, ways, rows, seed, owner, life, 1 if whole
_WHOLE = struct.Struct("<q")
_LIFE_AT = struct.calcsize("<12sIQQ32s")
_WHOLE_AT = _LIFE_AT + 8

_HALF = np.uint64(32)

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

_MOVES = np.array([[p, *[w for w in range(WAYS) if w != p]] for p in range(WAYS)], dtype=np.int64)
"""By the place of an entry: which entry comes to each place when that one moves to the front."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose versions they are. `name`: 32 bytes that no other owner has. `life`: number of the life that takes the
    memory over. `past`: that of the one before it, None if there was none. `seed`: of the digests.
    """

    name: bytes
    life: int
    past: int | None
    seed: int


def rows_in(size_bytes: int) -> int:
    """Rows that so much memory has room for."""
    return max(0, size_bytes - HEADER_BYTES) // ROW_BYTES


class VersionCache:
    """Versions in `memory`, a writable buffer with room for one row at least; other processes must not use it.

    `warm`: entries that were taken over from the life before. `entries`: in use.
    """

    few = 24  # up to so many entries are looked at one by one: array operations begin to pay above that

    def __init__(self, memory: memoryview | bytearray, owner: Owner) -> None:
        self.rows = rows_in(len(memory))
        if not self.rows:
            raise ValueError(f"a version cache needs {HEADER_BYTES + ROW_BYTES} bytes, here are {len(memory)}")
        self.seed = owner.seed
        self._row_count = np.uint64(self.rows)
        self._memory = memoryview(memory)
        columns = {"sequence": 1, "low": WAYS, "high": WAYS, "versions": WAYS}
        at = HEADER_BYTES
        views: dict[str, memoryview] = {}
        for name, width in columns.items():
            size = 8 * width * self.rows
            views[name] = self._memory[at : at + size]
            at += size
        # Each column twice: as an array for batches, and as plain memory for single entries, which NumPy is slow at.
        self._low_of, self._high_of = views["low"].cast("Q"), views["high"].cast("Q")
        self._version_of, self._sequence_of = views["versions"].cast("q"), views["sequence"].cast("Q")
        self._sequence: Words = np.frombuffer(views["sequence"], "<u8")
        self._low: Words = np.frombuffer(views["low"], "<u8").reshape(self.rows, WAYS)
        self._high: Words = np.frombuffer(views["high"], "<u8").reshape(self.rows, WAYS)
        self._versions: Ints = np.frombuffer(views["versions"], "<i8").reshape(self.rows, WAYS)
        self._flat_low, self._flat_high = self._low.reshape(-1), self._high.reshape(-1)
        self._flat_versions = self._versions.reshape(-1)
        self._claims = np.zeros(self.rows, dtype=np.int32)  # of a batch: which entry has a row's turn
        self._take_over(owner)
        self.entries = self.warm = int(np.count_nonzero(self._low))

    @property
    def capacity(self) -> int:
        """Entries that there is room for."""
        return self.rows * WAYS

    # ------------------------------------------------------------ whose memory it is

    def _take_over(self, owner: Owner) -> None:
        """Keep what the life before has left, if it is whole and of this owner; else empty everything."""
        name = owner.name.ljust(32, b"\x00")
        head = (_MAGIC, WAYS, self.rows, owner.seed, name)
        found = _HEADER.unpack_from(self._memory)
        if owner.past is None or found != (*head, owner.past, 1):
            _WHOLE.pack_into(self._memory, _WHOLE_AT, 0)  # first: killed in the middle, it is empty for the next one
            self._sequence[:] = 0
            self._low[:] = 0
            self._high[:] = 0
            self._versions[:] = DIRTY
            _HEADER.pack_into(self._memory, 0, *head, owner.life, 0)
            _WHOLE.pack_into(self._memory, _WHOLE_AT, 1)
            return
        torn = np.flatnonzero(self._sequence & np.uint64(1))
        self._low[torn] = 0
        self._high[torn] = 0
        self._versions[torn] = DIRTY
        self._sequence[torn] = 0
        struct.pack_into("<q", self._memory, _LIFE_AT, owner.life)

    # ------------------------------------------------------------ batches

    def look_up(self, digests: bytes) -> Ints:
        """Versions of the timelines with these digests (16 bytes each): int64[n], `DIRTY` where it is not known."""
        count = len(digests) // DIGEST_BYTES
        if len(digests) % DIGEST_BYTES:
            raise InvalidRequest(f"a column of digests has {len(digests)} bytes: each has {DIGEST_BYTES}")
        if count <= self.few:
            return np.array(self.look_up_few(digests), dtype=np.int64)
        found = self._find(*_halves(digests))
        versions = np.where(found.there, self._flat_versions.take(found.places), DIRTY)
        # What lies at the front of its row needs no move, unless another one of the batch moves there.
        if (found.there & (found.ways > 0)).any():
            self._in_turns(found.at(np.flatnonzero(found.there)), None)
        return versions

    def look_up_few(self, digests: bytes) -> list[int]:
        """The same for a few, one by one."""
        return [self._look_at(*pair) for pair in _pairs(digests)]

    def note(self, digests: bytes, versions: Ints) -> None:
        """The timelines with these digests are at these versions, clean. Of one that comes twice the later counts."""
        if len(versions) <= self.few:
            self.note_few(digests, versions.tolist())
            return
        self._in_turns(self._find(*_halves(digests)), np.asarray(versions, dtype=np.int64))

    def note_few(self, digests: bytes, versions: list[int]) -> None:
        """The same for a few, one by one."""
        for pair, version in zip(_pairs(digests), versions, strict=True):
            self._note_one(*pair, version)

    def mark_dirty(self, digests: bytes) -> None:
        """The timelines with these digests are about to change. Who is not here stays away."""
        if len(digests) <= self.few * DIGEST_BYTES:
            for low, high in _pairs(digests):
                row = self._row_of(low)
                place = self._place_of(row, low)
                if place >= 0 and self._high_of[place] == high:
                    self._version_of[place] = DIRTY
            return
        found = self._find(*_halves(digests))
        self._flat_versions[found.places[found.there]] = DIRTY

    def _find(self, low: Words, high: Words) -> _Found:
        """Where digests are. `take` is some times faster than the same by an index."""
        rows = ((low >> _HALF) * self._row_count >> _HALF).astype(np.int64)
        places = rows * WAYS
        ways: Ints = np.zeros_like(rows)
        if not (self._flat_low.take(places) == low).all():  # else all are at the front, as what was used just now is
            ways = (self._low.take(rows, axis=0) == low[:, None]).argmax(axis=1)
            places += ways
        there = (self._flat_low.take(places) == low) & (self._flat_high.take(places) == high)
        return _Found(low, high, rows, ways, places, there)

    def _in_turns(self, asked: _Found, versions: Ints | None) -> None:
        """Bring entries to the front of their rows, in order; with `versions` also who is not there yet.

        Two entries of one row must not move at once: a turn takes the first one of each row that is left. Rows that
        so many entries of the batch share that turns get short are gone through one by one.
        """
        turn, left = self._first_of_each_row(asked.rows, np.arange(len(asked.rows)))
        moving = asked if not len(left) else asked.at(turn)
        while len(turn) > self.few and len(turn) * 16 > len(left):
            self._move(moving, None if versions is None else versions[turn])
            if not len(left):
                return
            turn, left = self._first_of_each_row(asked.rows, left)
            moving = self._find(asked.low[turn], asked.high[turn])
        for index in np.sort(np.concatenate((turn, left))).tolist():
            if versions is None:
                self._look_at(int(asked.low[index]), int(asked.high[index]))
            else:
                self._note_one(int(asked.low[index]), int(asked.high[index]), int(versions[index]))

    def _first_of_each_row(self, rows: Ints, left: Ints) -> tuple[Ints, Ints]:
        """Of the entries with indices `left`: the first one of each row, and the others."""
        mine = rows[left]
        self._claims[mine[::-1]] = left[::-1]  # of entries with one index the last assignment stays
        first = self._claims.take(mine) == left
        return (left, left[:0]) if first.all() else (left[first], left[~first])

    def _move(self, asked: _Found, versions: Ints | None) -> None:
        """One entry for each of different rows: to the front."""
        if versions is None:
            # Those of a later turn may be there no more, or at the front already.
            asked = asked.at(np.flatnonzero(asked.there & (asked.ways > 0)))
            ways, versions = asked.ways, self._flat_versions.take(asked.places)
        else:
            known = self._flat_low.take(asked.places) == asked.low
            ways = np.where(known, asked.ways, WAYS - 1)
            self.entries += int(np.count_nonzero(self._low[asked.rows, ways] == 0))
        sources = _MOVES.take(ways, axis=0)
        sources += (asked.rows * WAYS)[:, None]
        low, high = self._flat_low.take(sources), self._flat_high.take(sources)
        moved = self._flat_versions.take(sources)
        low[:, 0], high[:, 0], moved[:, 0] = asked.low, asked.high, versions
        self._store(asked.rows, low, high, moved)

    def _store(self, rows: Ints, low: Words, high: Words, versions: Ints) -> None:
        """Replace rows, so that whoever finds them half replaced can tell."""
        self._sequence[rows] += np.uint64(1)
        self._low[rows] = low
        self._high[rows] = high
        self._versions[rows] = versions
        self._sequence[rows] += np.uint64(1)

    # ------------------------------------------------------------ single entries

    def _row_of(self, low: int) -> int:
        return (low >> 32) * self.rows >> 32

    def _place_of(self, row: int, low: int) -> int:
        """Place of a digest in the flat columns, -1 if it is not there."""
        first = row * WAYS
        try:
            return first + self._low_of[first : first + WAYS].tolist().index(low)
        except ValueError:
            return -1

    def _look_at(self, low: int, high: int) -> int:
        row = self._row_of(low)
        place = self._place_of(row, low)
        if place < 0 or self._high_of[place] != high:
            return DIRTY
        version = self._version_of[place]
        if place > row * WAYS:
            self._put_first(row, place, low, high, version)
        return version

    def _note_one(self, low: int, high: int, version: int) -> None:
        row = self._row_of(low)
        place = self._place_of(row, low)
        if place < 0:
            place = row * WAYS + WAYS - 1
            self.entries += not self._low_of[place]
        elif place == row * WAYS and self._high_of[place] == high:
            self._version_of[place] = version
            return
        self._put_first(row, place, low, high, version)

    def _put_first(self, row: int, place: int, low: int, high: int, version: int) -> None:
        first = row * WAYS
        self._sequence_of[row] += 1
        for column, value in ((self._low_of, low), (self._high_of, high), (self._version_of, version)):
            column[first + 1 : place + 1] = column[first:place]
            column[first] = value
        self._sequence_of[row] += 1


@dataclass(slots=True)
class _Found:
    """Digests of a batch, and where they are: `places` in the flat columns, if `there`; `ways` within their rows."""

    low: Words
    high: Words
    rows: Ints
    ways: Ints
    places: Ints
    there: npt.NDArray[np.bool_]

    def at(self, chosen: Ints) -> _Found:
        return _Found(*(getattr(self, name).take(chosen) for name in self.__slots__))


def _halves(digests: bytes) -> tuple[Words, Words]:
    """Low and high halves of digests: u64[n] each."""
    both: Words = np.frombuffer(digests, "<u8").reshape(-1, 2)
    return np.ascontiguousarray(both[:, 0]), np.ascontiguousarray(both[:, 1])


def _pairs(digests: bytes) -> list[tuple[int, int]]:
    return list(struct.iter_unpack("<QQ", digests))
