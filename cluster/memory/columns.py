"""Columns in, columns out: reads that pages in memory cover, and the answers to messages of reads (*pure*).

A message of many reads is looked up in the page cache as it came, column by column; no object is made for a read that
a page covers. What is left goes through `reading` as `Read` objects, whose answers are put into the columns after.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence

from ..errors import Corrupt
from ..keys import MAX_BATCH_ITEMS, MAX_ID_BYTES, MIN_ITEM_KEY_BYTES, MIN_TIMESTAMP
from ..messages import CORRUPT, OK, UNAVAILABLE, Damage, FoundItems, Pages, pack_i64
from ..packed_items import NO_ITEM, array_head, packed_array
from .page_cache import PageCache
from .pages import Page, PageSlice
from .requests import ItemAnswer, PageAnswer, Read

MAX_ANSWER_BYTES = 40 << 20  # items of one answer; what does not fit is to be asked for again
MAX_DAMAGES = 1_000  # that one answer explains; the other damaged reads are only marked
MAX_KEY_BYTES = 8 + 2 * MAX_ID_BYTES + 2
_MIN_BOUND_BYTES = 8
NO_PAGE = Page(-1, b"", b"", MIN_TIMESTAMP, [], b"", array("q", (0,)))
_NOTHING = PageSlice(0, b"", False)


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
        pairs = zip(self.pages, self.places, strict=True)
        if min(self.places, default=0) >= 0:
            items = [page.packed[page.starts[place] : page.starts[place + 1]] for page, place in pairs]
        else:
            items = [page.packed_item(place) if place >= 0 else NO_ITEM for page, place in pairs]
        versions = [page.version for page in self.pages]
        for index, read in reads.items():
            answer = read.answer
            if isinstance(answer, ItemAnswer):
                versions[index], items[index] = answer.version, answer.packed or NO_ITEM
            else:
                outcomes[index] = _outcome(read)
        for index in _beyond(list(map(len, items))):
            outcomes[index], versions[index], items[index] = UNAVAILABLE, -1, NO_ITEM
        return FoundItems(bytes(outcomes), pack_i64(versions), packed_array(items, len(items)), _damages(reads))


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
            if page is not None and not bound and 0 < limit <= len(page.keys):
                pages.append(page)  # as most: what is kept reaches the newest item
            elif page is None or not is_page_read(bound, limit) or not page.covers(bound, limit):
                rest.append(len(pages))
                pages.append(NO_PAGE)
            else:
                pages.append(page)
        super().__init__(pages, rest)

    def answer(self, outcomes: bytearray, reads: Mapping[int, Read], max_bytes: int) -> Pages:
        """The columns of the answer, with those of `reads` (by index) in their places. Where the outcome is not OK, a
        request has no items and version -1. `max_bytes`: of one page, packed."""
        if not self.rest and not any(self._before):
            plain = self._plain_answer(outcomes, max_bytes)
            if plain is not None:
                return plain
        slices: list[PageSlice] = []
        versions: list[int] = []
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
            versions.append(version)
        for index in _beyond([len(part.packed) for part in slices]):
            outcomes[index], versions[index], slices[index] = UNAVAILABLE, -1, _NOTHING
        return Pages(
            bytes(outcomes),
            pack_i64(versions),
            bytes([part.more for part in slices]),
            packed_array([array_head(part.count) + part.packed for part in slices], len(slices)),
            _damages(reads),
        )

    def _plain_answer(self, outcomes: bytearray, max_bytes: int) -> Pages | None:
        """The same for what most messages are: newest pages, all covered. None if a page must be cut to fit."""
        parts: list[bytes] = []
        more = bytearray()
        size = 0
        for page, limit in zip(self.pages, self._limits, strict=True):
            packed, count = page.packed, len(page.keys)
            if count > limit:
                packed, count = packed[page.starts[count - limit] :], limit
                more.append(1)
            else:
                more.append(page.low != b"")
            size += len(packed)
            if len(packed) > max_bytes or size > MAX_ANSWER_BYTES:
                return None
            parts += (array_head(count), packed)
        versions = [page.version for page in self.pages]
        return Pages(bytes(outcomes), pack_i64(versions), bytes(more), packed_array(parts, len(versions)))


def is_page_read(before: bytes, limit: int) -> bool:
    """Whether a read of a page has a limit and a bound that can be."""
    return 1 <= limit <= MAX_BATCH_ITEMS and (not before or _MIN_BOUND_BYTES <= len(before) <= MAX_KEY_BYTES)


def answer_bytes(read: Read) -> int:
    """Memory that the answer of a read takes, in bytes."""
    answer = read.answer
    if isinstance(answer, PageAnswer):
        return len(answer.items.packed)
    return len(answer.packed) if isinstance(answer, ItemAnswer) else 0


def _outcome(read: Read) -> int:
    return CORRUPT if isinstance(read.answer, Corrupt) else UNAVAILABLE


def _damages(reads: Mapping[int, Read]) -> list[Damage]:
    """What the damaged reads met, by their index, of `MAX_DAMAGES` at most."""
    damages = []
    for index, read in reads.items():
        error = read.answer
        if isinstance(error, Corrupt):
            fields = error.fields
            damages.append(Damage(index, fields.get("file", ""), fields.get("offset", 0), error.message))
            if len(damages) == MAX_DAMAGES:
                break
    return damages


def _beyond(sizes: list[int]) -> Iterable[int]:
    """Indices from which on the sizes exceed `MAX_ANSWER_BYTES` together."""
    if sum(sizes) <= MAX_ANSWER_BYTES:
        return ()
    total = 0
    for index, size in enumerate(sizes):
        total += size
        if total > MAX_ANSWER_BYTES:
            return range(index, len(sizes))
    return ()
