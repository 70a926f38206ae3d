"""Columns in, columns out: reads that pages in memory cover, and the answers to messages of reads (*pure*).

A message of many reads is looked up in the page cache as it came, column by column; no object is made for a read that
a page covers. What is left goes through `reading` as `Read` objects, whose answers are put into the columns after.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from ..errors import Corrupt
from ..keys import MAX_BATCH_ITEMS, MAX_ID_BYTES, MIN_ITEM_KEY_BYTES, MIN_TIMESTAMP
from ..messages import CORRUPT, OK, UNAVAILABLE, FoundItems, Pages, pack_i64, pack_u32
from .page_cache import PageCache
from .pages import Page, PageSlice
from .requests import ItemAnswer, PageAnswer, Read

MAX_ANSWER_BYTES = 40 << 20  # keys and values of one answer; what does not fit is to be asked for again
MAX_KEY_BYTES = 8 + 2 * MAX_ID_BYTES + 2
_MIN_BOUND_BYTES = 8
NO_PAGE = Page(-1, b"", b"", MIN_TIMESTAMP, [], [], array("q"), array("q"))
_NOTHING = PageSlice([], [], array("q"), array("q"), False, 0)


class Glance:
    """Reads of one message, as pages in memory cover them.

    `pages`: by read, `NO_PAGE` where none covers it. `rest`: indices of the reads that go the long way.
    """

    def __init__(self, pages: list[Page], rest: list[int]) -> None:
        self.pages = pages
        self.rest = rest

    def covered(self) -> list[Page]:
        """The pages that are to be proven, each once."""
        pages = dict.fromkeys(self.pages)
        if self.rest:
            pages.pop(NO_PAGE, None)
        return list(pages)

    def drop(self, unproven: Iterable[Page]) -> int:
        """Have the reads of these pages go the long way. How many that are."""
        outdated = set(unproven)
        if not outdated:
            return 0
        before = len(self.rest)
        for index, page in enumerate(self.pages):
            if page in outdated:
                self.pages[index] = NO_PAGE
                self.rest.append(index)
        return len(self.rest) - before


class ItemGlance(Glance):
    """`places`: by read, where the item is in the columns of its page, -1 where there is none."""

    def __init__(self, cache: PageCache, timelines: Sequence[bytes], keys: Sequence[bytes]) -> None:
        pages: list[Page] = []
        rest: list[int] = []
        self.places: list[int] = []
        add_page, add_place = pages.append, self.places.append
        for page, key in zip(cache.get_many(timelines), keys, strict=True):
            if page is not None:
                known = page.keys
                place = bisect_left(known, key)
                if place < len(known) and known[place] == key:
                    add_page(page)
                    add_place(place)
                    continue
                if page.contains(key) and MIN_ITEM_KEY_BYTES <= len(key) <= MAX_KEY_BYTES:
                    add_page(page)
                    add_place(-1)
                    continue
            rest.append(len(pages))
            add_page(NO_PAGE)
            add_place(-1)
        super().__init__(pages, rest)

    def drop(self, unproven: Iterable[Page]) -> int:
        before = len(self.rest)
        dropped = super().drop(unproven)
        for index in self.rest[before:]:
            self.places[index] = -1
        return dropped

    def answer(self, outcomes: bytearray, reads: Mapping[int, Read]) -> FoundItems:
        """The columns of the answer, with those of `reads` (by index) in their places. Where the outcome is not OK,
        nothing is found and the version is -1."""
        pairs = list(zip(self.pages, self.places, strict=True))
        timeline_versions = [page.version for page in self.pages]
        found = bytearray(b"\x01" * len(pairs))
        if min(self.places, default=0) >= 0:
            values = [page.values[place] for page, place in pairs]
            versions = [page.versions[place] for page, place in pairs]
            written = [page.written[place] for page, place in pairs]
        else:
            values = [page.values[place] if place >= 0 else b"" for page, place in pairs]
            versions = [page.versions[place] if place >= 0 else 0 for page, place in pairs]
            written = [page.written[place] if place >= 0 else 0 for page, place in pairs]
            found[:] = [place >= 0 for place in self.places]
        for index, read in reads.items():
            answer = read.answer
            if isinstance(answer, ItemAnswer):
                timeline_versions[index], found[index] = answer.version, answer.found
                values[index], versions[index], written[index] = answer.value, answer.item_version, answer.written
            else:
                outcomes[index] = _outcome(read)
        for index in _beyond(map(len, values), len(values)):
            outcomes[index], timeline_versions[index], found[index] = UNAVAILABLE, -1, 0
            values[index], versions[index], written[index] = b"", 0, 0
        return FoundItems(
            bytes(outcomes),
            pack_i64(timeline_versions),
            bytes(found),
            values,
            pack_i64(versions),
            pack_i64(written),
        )


class PageGlance(Glance):
    """Reads of pages: the newest `limits[i]` items older than `before[i]`."""

    def __init__(
        self, cache: PageCache, timelines: Sequence[bytes], before: Sequence[bytes], limits: Sequence[int]
    ) -> None:
        pages: list[Page] = []
        rest: list[int] = []
        self._before = before
        self._limits = limits
        for page, bound, limit in zip(cache.get_many(timelines), before, limits, strict=True):
            if page is None or not is_page_read(bound, limit) or not page.covers(bound, limit):
                rest.append(len(pages))
                pages.append(NO_PAGE)
            else:
                pages.append(page)
        super().__init__(pages, rest)

    def answer(self, outcomes: bytearray, reads: Mapping[int, Read], max_bytes: int) -> Pages:
        """The columns of the answer, with those of `reads` (by index) in their places. Where the outcome is not OK, a
        request has no items and version -1. `max_bytes`: of keys and values of one page."""
        slices: list[PageSlice] = []
        timeline_versions: list[int] = []
        for index, (page, bound, limit) in enumerate(zip(self.pages, self._before, self._limits, strict=True)):
            items = page.newest(limit, bound, max_bytes) if page is not NO_PAGE else None
            version = page.version
            if items is None:
                items, version = _NOTHING, -1
                read = reads.get(index)
                if read is not None and isinstance(read.answer, PageAnswer):
                    items, version = read.answer.items, read.answer.version
                elif read is not None:
                    outcomes[index] = _outcome(read)
                elif outcomes[index] == OK:
                    outcomes[index] = UNAVAILABLE
            slices.append(items)
            timeline_versions.append(version)
        if sum([part.most_bytes for part in slices]) > MAX_ANSWER_BYTES:
            for index in _beyond(map(_slice_bytes, slices), len(slices)):
                outcomes[index], timeline_versions[index], slices[index] = UNAVAILABLE, -1, _NOTHING
        keys: list[bytes] = []
        values: list[bytes] = []
        versions, written = array("q"), array("q")
        for part in slices:
            keys += part.keys
            values += part.values
            versions += part.versions
            written += part.written
        return Pages(
            bytes(outcomes),
            pack_i64(timeline_versions),
            pack_u32([len(part.keys) for part in slices]),
            bytes([part.more for part in slices]),
            keys,
            values,
            pack_i64(np.frombuffer(versions, dtype=np.int64)),
            pack_i64(np.frombuffer(written, dtype=np.int64)),
        )


def is_page_read(before: bytes, limit: int) -> bool:
    """Whether a read of a page has a limit and a bound that can be."""
    return 1 <= limit <= MAX_BATCH_ITEMS and (not before or _MIN_BOUND_BYTES <= len(before) <= MAX_KEY_BYTES)


def answer_bytes(read: Read) -> int:
    """Memory that the answer of a read takes, in bytes."""
    answer = read.answer
    if isinstance(answer, PageAnswer):
        return _slice_bytes(answer.items) + 100 * len(answer.items.keys)
    return len(answer.value) if isinstance(answer, ItemAnswer) else 0


def _slice_bytes(part: PageSlice) -> int:
    return sum(map(len, part.keys)) + sum(map(len, part.values))


def _outcome(read: Read) -> int:
    return CORRUPT if isinstance(read.answer, Corrupt) else UNAVAILABLE


def _beyond(sizes: Iterable[int], count: int) -> Iterable[int]:
    """Indices from which on the sizes exceed `MAX_ANSWER_BYTES` together."""
    known = list(sizes)
    if sum(known) <= MAX_ANSWER_BYTES:
        return ()
    total = 0
    for index, size in enumerate(known):
        total += size
        if total > MAX_ANSWER_BYTES:
            return range(index, count)
    return ()
