"""One answered range of a timeline: hot rows and links of one instant, and the blocks behind the links (*pure*).

Rows and links come from one answer of one replica, so together they are everything that was visible in the range at
the answer's version. A block is immutable and its file is never rewritten under the same name; it may be read at
any later time and still belongs to that instant. So hot rows, plus blocks that are read afterwards, are one
consistent answer, with nothing to check again. (A file that is gone says that the link is old: then all starts over.)
"""

from __future__ import annotations

from dataclasses import dataclass

from ..cold.block import DecodedBlock
from ..keys import timestamp_floor
from ..messages import PUT, LinkRef
from .pages import Page, Rows, merge

_CHUNK_ITEMS = 64  # rows taken from a block beyond what is missing, because some may be hidden


class StartOver(Exception):
    """The links of an answer can't be used: the read begins again, at another replica. `file`, `offset`: a block that
    no cold node has."""

    def __init__(self, reason: str, *, file: str = "", offset: int = 0) -> None:
        super().__init__(reason)
        self.file = file
        self.offset = offset


@dataclass(slots=True)
class _Source:
    """A block, read or not, or what it has of the owner. Its rows with key >= `edge` are in the range already."""

    ref: LinkRef
    edge: bytes
    block: DecodedBlock | None = None


class HotRange:
    """The range [floor, before) of one timeline as of `version`; blocks are read newest first, while they are needed.

    `owner`: whose rows the blocks are searched for. `limit`: visible items wanted, 0 to have no block read. Blocks of
    one window overlap in time (they are sorted by owner first), so an item counts only above the edge of every block.
    """

    def __init__(
        self,
        owner: bytes,
        hot: Rows,
        refs: list[LinkRef],
        *,
        version: int,
        floor: bytes,
        before: bytes,
        limit: int,
        wiped: int,
        horizon: int,
    ) -> None:
        self.version = version
        self.before = before
        self._owner = owner
        self._floor = floor
        self._limit = limit
        self._wiped = wiped
        self._horizon = horizon
        self._hot = hot
        self._cold: list[Rows] = []
        self._visible: Rows | None = None
        low = max(floor, timestamp_floor(horizon))
        self._sources = [_Source(ref, ref.high) for ref in refs if ref.high > low and (not before or ref.low < before)]

    def needed(self) -> list[LinkRef]:
        """Blocks to be read next: the one with the newest items, and those of its window that overlap it in time.
        Empty when the limit is met.

        Raises StartOver when a block holds what the replica that named it has not applied yet.
        """
        while self._sources and self._limit:
            first = max(self._sources, key=lambda source: source.edge)
            keys = self._merged().keys
            if len(keys) >= self._limit and keys[self._limit - 1] >= first.edge:
                return []
            if first.block is None:
                low, window = first.ref.low, first.ref.window_start
                beside = [s.ref for s in self._sources if s.block is None and s.ref.high > low]
                return [ref for ref in beside if ref.window_start == window]
            self._pull(first, first.block)
        return []

    def add(self, ref: LinkRef, block: DecodedBlock) -> None:
        """Take the block of a needed reference."""
        for source in self._sources:
            if source.ref == ref:
                source.block = block

    def page(self) -> Page:
        """The piece of the range that is complete, from its newer end. Call it when nothing is needed."""
        low = max([self._floor, *[source.edge for source in self._sources]])
        return Page.of(self._merged(), version=self.version, low=low, high=self.before, horizon=self._horizon)

    def _merged(self) -> Rows:
        if self._visible is None:
            self._visible = merge(self._hot, self._cold, wiped=self._wiped, horizon=self._horizon)
        return self._visible

    def _pull(self, source: _Source, block: DecodedBlock) -> None:
        """Take the next rows of a block; a large block of one owner is not turned into objects as a whole."""
        before = min(source.edge, self.before) if self.before else source.edge
        want = self._limit + _CHUNK_ITEMS
        keys, values, versions, written = block.rows_of(self._owner, self._floor, before, want)
        if versions and max(versions) > self.version:
            raise StartOver(f"a block holds version {max(versions)}, but the answer is as of {self.version}")
        if len(keys) < want:
            self._sources.remove(source)
        else:
            source.edge = keys[-1]
        if keys:
            self._cold.append(Rows(keys, bytes((PUT,)) * len(keys), values, versions, written))
            self._visible = None
