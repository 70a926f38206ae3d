"""How old is what the pages in memory hold (*pure*): counted in slices, beside the reads."""

from __future__ import annotations

from collections.abc import Generator

from ..ages import add_to
from ..errors import InvalidRequest
from ..keys import bucket_of
from ..messages import AskHeld, Held, pack_i64, unpack_i64, unpack_u32
from .page_cache import PageCache
from .read_ages import ages_between

_PAGES_A_SLICE = 100  # a millisecond
_KEYS_A_SLICE = 5_000
_MAX_EDGES = 64


def count_held(cache: PageCache, message: AskHeld) -> Generator[None, None, Held]:
    """The answer; yields after each slice. A page counts with all memory that it takes. Raises InvalidRequest."""
    edges = unpack_i64(message.edges)
    if len(edges) > _MAX_EDGES or edges != sorted(edges):
        raise InvalidRequest("an AskHeld with too many edges, or with edges that do not increase")
    buckets = frozenset(unpack_u32(message.buckets))
    head = bytes((len(message.table),)) + message.table
    items, nbytes = [0] * (len(edges) + 1), [0] * (len(edges) + 1)
    pages = pages_bytes = looked_at = 0
    for place, timeline in enumerate(cache.timelines(), 1):
        if place % _KEYS_A_SLICE == 0:
            yield
        if timeline[4 : 4 + len(head)] != head:
            continue
        page = cache.peek(timeline)
        if page is None:
            continue  # it has gone meanwhile
        size = cache.size_of(timeline)
        pages, pages_bytes = pages + 1, pages_bytes + size
        if buckets and bucket_of(timeline) not in buckets:
            continue
        found = ages_between(page.keys, 0, len(page.keys), edges)
        add_to(items, found)
        add_to(nbytes, _bytes_by_bin(found, list(page.starts), size))
        looked_at += 1
        if looked_at % _PAGES_A_SLICE == 0:
            yield
    return Held(pack_i64(items), pack_i64(nbytes), looked_at, pages, pages_bytes)


def _bytes_by_bin(counts: list[int], starts: list[int], size: int) -> list[int]:
    """The memory of a page by bin: its items as long as they are packed, all else in equal parts to its items."""
    total = len(starts) - 1
    beside = size - starts[-1]
    parts, at = [], 0
    for count in counts:
        packed = starts[at + count] - starts[at]
        share = beside * (at + count) // total - beside * at // total if total else 0
        parts.append(packed + share)
        at += count
    if not total:
        parts[-1] += size  # an empty page is as young as can be
    return parts
