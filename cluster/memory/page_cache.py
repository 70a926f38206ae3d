"""The pages of timelines that a cache node keeps in memory (*pure*).

They are bounded by the memory that they really occupy. Pages live in two queues, as in S3-FIFO (Yang, Zhang,
Qiu, Yue and Rashmi, "FIFO queues are all you need for cache eviction", 2023): a read only sets a flag, and what that
means is seen to when room is needed. A page starts on probation, which has a small share; one that was read again by
the time it is to leave is protected, and leaves when it was not read for a whole round. So a scan over many timelines,
each read once, passes through probation and leaves the pages that are read all the time in place.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from .pages import Page

_ENTRY_OVERHEAD_BYTES = 200  # key, dictionary entry, links of the order
_MAX_REMEMBERED_MISSES = 8_192


class PageCache:
    """Newest pages by timeline key, within `budget_bytes`. A budget of 0 keeps nothing."""

    def __init__(self, budget_bytes: int, *, protected_share: float = 0.8) -> None:
        """`protected_share`: the part of the budget that pages which were read again may hold."""
        self.budget_bytes = budget_bytes
        self.evictions = 0
        self.nbytes = 0
        self._probation_budget_bytes = int(budget_bytes * (1 - protected_share))
        self._probation_bytes = 0
        self._pages: dict[bytes, Page] = {}
        self._probation: dict[bytes, None] = {}  # both queues: oldest first
        self._protected: dict[bytes, None] = {}
        self._missed: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._pages)

    def get(self, timeline: bytes) -> Page | None:
        """Page of a timeline; being asked for again protects it."""
        page = self._pages.get(timeline)
        if page is not None:
            page.used = True
        return page

    def get_many(self, timelines: Iterable[bytes]) -> list[Page | None]:
        """Pages of many timelines."""
        pages = list(map(self._pages.get, timelines))
        for page in pages:
            if page is not None:
                page.used = True
        return pages

    def peek(self, timeline: bytes) -> Page | None:
        """Page of a timeline, without any consequence."""
        return self._pages.get(timeline)

    def timelines(self) -> list[bytes]:
        """Keys of all timelines that have a page."""
        return list(self._pages)

    def size_of(self, timeline: bytes) -> int:
        """Memory that the page of a timeline takes, 0 without one."""
        page = self._pages.get(timeline)
        return 0 if page is None else _size(timeline, page)

    def put(self, timeline: bytes, page: Page) -> None:
        """Keep a page that reaches the newest item, unless a later version of the timeline's page is kept."""
        size = _size(timeline, page)
        known = self._pages.get(timeline)
        if page.high or (known is not None and known.version > page.version):
            return
        if size > self.budget_bytes:
            self.drop(timeline)
            return
        self._pages[timeline] = page
        if known is None:
            self._probation[timeline] = None
            self._probation_bytes += size
            self._missed.pop(timeline, None)
            self.nbytes += size
        else:
            page.used = known.used
            grown = size - _size(timeline, known)
            self.nbytes += grown
            if timeline in self._probation:
                self._probation_bytes += grown
        self._evict()

    def drop(self, timeline: bytes) -> None:
        """Forget a timeline's page, if there is one."""
        page = self._pages.pop(timeline, None)
        if page is None:
            return
        size = _size(timeline, page)
        self.nbytes -= size
        if timeline in self._probation:
            del self._probation[timeline]
            self._probation_bytes -= size
        else:
            del self._protected[timeline]

    def clear(self) -> None:
        """Forget all pages."""
        self._pages.clear()
        self._probation.clear()
        self._protected.clear()
        self.nbytes = self._probation_bytes = 0

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

    def _evict(self) -> None:
        while self.nbytes > self.budget_bytes:
            on_probation = self._probation_bytes > self._probation_budget_bytes or not self._protected
            timeline = next(iter(self._probation if on_probation else self._protected))
            page = self._pages[timeline]
            if not page.used:
                self.drop(timeline)
                self.evictions += 1
                continue
            page.used = False
            if on_probation:
                del self._probation[timeline]
                self._probation_bytes -= _size(timeline, page)
            else:
                del self._protected[timeline]
            self._protected[timeline] = None  # as the youngest


def _size(timeline: bytes, page: Page) -> int:
    return len(timeline) + _ENTRY_OVERHEAD_BYTES + page.nbytes
