"""What a cache node keeps in memory: pages of timelines, and decoded cold blocks (*pure*).

Both are bounded by the memory that their entries really occupy. Pages live in a segmented LRU (Karedla, Love and
Wherry, "Caching strategies to improve disk system performance", 1994): a page starts on probation and is protected
only when it is read again, and pages on probation leave first. So a scan over many timelines, each read once,
passes through probation and leaves the pages that are read all the time in place.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, Protocol, TypeVar

from .pages import Page

_ENTRY_OVERHEAD_BYTES = 200  # key, dictionary entry, links of the order
_MAX_REMEMBERED_MISSES = 8_192


class PageCache:
    """Newest pages by timeline key, within `budget_bytes`. A budget of 0 keeps nothing."""

    def __init__(self, budget_bytes: int, *, protected_share: float = 0.8) -> None:
        """`protected_share`: the part of the budget that pages which were read again may hold."""
        self.budget_bytes = budget_bytes
        self.hits = 0
        self.misses = 0
        self.evictions = 0
        self.nbytes = 0
        self._protected_budget_bytes = int(budget_bytes * protected_share)
        self._protected_bytes = 0
        self._probation: OrderedDict[bytes, Page] = OrderedDict()
        self._protected: OrderedDict[bytes, Page] = OrderedDict()
        self._missed: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._probation) + len(self._protected)

    def get(self, timeline: bytes) -> Page | None:
        """Page of a timeline; being asked for again protects it."""
        page = self._protected.get(timeline)
        if page is not None:
            self._protected.move_to_end(timeline)
            self.hits += 1
            return page
        page = self._probation.pop(timeline, None)
        if page is None:
            self.misses += 1
            return None
        self.hits += 1
        self._protected[timeline] = page
        self._protected_bytes += _size(timeline, page)
        self._demote()
        return page

    def peek(self, timeline: bytes) -> Page | None:
        """Page of a timeline, without any consequence."""
        page = self._protected.get(timeline)
        return self._probation.get(timeline) if page is None else page

    def put(self, timeline: bytes, page: Page) -> None:
        """Keep a page that reaches the newest item, unless a later version of the timeline's page is kept."""
        size = _size(timeline, page)
        known = self.peek(timeline)
        if page.high or (known is not None and known.version > page.version):
            return
        if size > self.budget_bytes:
            self.drop(timeline)
            return
        if known is None:
            self._probation[timeline] = page
            self._missed.pop(timeline, None)
            self.nbytes += size
        else:
            grown = size - _size(timeline, known)
            self.nbytes += grown
            if timeline in self._protected:
                self._protected[timeline] = page
                self._protected_bytes += grown
                self._demote()
            else:
                self._probation[timeline] = page
        self._evict()

    def drop(self, timeline: bytes) -> None:
        """Forget a timeline's page, if there is one."""
        page = self._probation.pop(timeline, None)
        if page is None:
            page = self._protected.pop(timeline, None)
            if page is None:
                return
            self._protected_bytes -= _size(timeline, page)
        self.nbytes -= _size(timeline, page)

    def clear(self) -> None:
        """Forget all pages."""
        self._probation.clear()
        self._protected.clear()
        self.nbytes = self._protected_bytes = 0

    def is_warm(self, timeline: bytes) -> bool:
        """Whether a timeline without a page has been asked for before, lately; remembers that it is asked for.

        Reads of single items fetch a page only for such timelines: one read does not pay for a page.
        """
        if not self.budget_bytes:
            return False
        if timeline in self._missed:
            return True
        self._missed[timeline] = None
        if len(self._missed) > _MAX_REMEMBERED_MISSES:
            self._missed.popitem(last=False)
        return False

    def _demote(self) -> None:
        """Give pages that the protected share has no room for another round on probation."""
        while self._protected_bytes > self._protected_budget_bytes and self._protected:
            timeline, page = self._protected.popitem(last=False)
            self._protected_bytes -= _size(timeline, page)
            self._probation[timeline] = page

    def _evict(self) -> None:
        while self.nbytes > self.budget_bytes:
            if self._probation:
                timeline, page = self._probation.popitem(last=False)
            else:
                timeline, page = self._protected.popitem(last=False)
                self._protected_bytes -= _size(timeline, page)
            self.nbytes -= _size(timeline, page)
            self.evictions += 1


class Sized(Protocol):
    """Something that knows how much memory it occupies."""

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""
        ...


BlockT = TypeVar("BlockT", bound=Sized)


class BlockCache(Generic[BlockT]):
    """Decoded cold blocks by (file, offset), least recently used first out, within `budget_bytes`.

    A file is never rewritten under its name, so a block that is kept can't become wrong.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.hits = 0
        self.misses = 0
        self.nbytes = 0
        self._blocks: OrderedDict[tuple[str, int], BlockT] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def get(self, file: str, offset: int) -> BlockT | None:
        """The block of `file` at `offset`, if it is kept."""
        block = self._blocks.get((file, offset))
        if block is None:
            self.misses += 1
            return None
        self._blocks.move_to_end((file, offset))
        self.hits += 1
        return block

    def put(self, file: str, offset: int, block: BlockT) -> None:
        """Keep a block, if it fits into the budget at all."""
        if (file, offset) in self._blocks or block.nbytes > self.budget_bytes:
            return
        self._blocks[file, offset] = block
        self.nbytes += block.nbytes
        while self.nbytes > self.budget_bytes:
            self.nbytes -= self._blocks.popitem(last=False)[1].nbytes


def _size(timeline: bytes, page: Page) -> int:
    return len(timeline) + _ENTRY_OVERHEAD_BYTES + page.nbytes
