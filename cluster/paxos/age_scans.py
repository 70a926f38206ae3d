"""How old is what a replica holds, in the storage tier and behind cold links (*pure*).

Made in slices (`slices.py`), a bounded number of rows an answer. These are figures, not facts to rely on: rows that
sink or are written meanwhile may count twice, or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from itertools import islice

from ..ages import add_to, bin_of, spread
from ..errors import InvalidRequest
from ..keys import bucket_prefix, split_item_key
from ..messages import PUT, Ages, AskAges, pack_i64, unpack_i64, unpack_u32
from .core import Core
from .links import LinkIndex, TableLinks
from .rows import VERSION_BYTES, Meta, decode_row, meta_key, prefix_end, version_of
from .slices import Slices

MAX_BUCKETS = 256  # of one question
MAX_EDGES = 64
ROWS_PER_ANSWER = 50_000  # rows looked at, so that an answer does not take for ever
_SEEK_ROWS = 8  # a seek takes about as long as so many rows


class _Sums:
    """Figures by bin and, for the buckets looked at, by bucket: one of what is stored, and one of its bytes, ..."""

    def __init__(self, bins: int) -> None:
        self.by_bin = [[0] * bins for _ in range(5)]
        self.by_bucket: list[list[int]] = [[] for _ in range(5)]

    def begin_bucket(self) -> None:
        for column in self.by_bucket:
            column.append(0)

    def add(self, what: int, parts: list[int]) -> None:
        add_to(self.by_bin[what], parts)
        self.by_bucket[what][-1] += sum(parts)

    def add_item(self, at: int, items: int, nbytes: int) -> None:
        self.by_bin[_ITEMS][at] += items
        self.by_bin[_NBYTES][at] += nbytes
        self.by_bucket[_ITEMS][-1] += items
        self.by_bucket[_NBYTES][-1] += nbytes

    def message(self, done: int, cursor: bytes) -> Ages:
        items, nbytes, cold_items, cold_raw, cold_bytes = map(pack_i64, self.by_bin)
        columns = items, nbytes, cold_items, cold_raw, cold_bytes
        items, nbytes, cold_items, cold_raw, cold_bytes = map(pack_i64, self.by_bucket)
        return Ages(*columns, items, nbytes, cold_items, cold_raw, cold_bytes, done, cursor)


_ITEMS, _NBYTES, _COLD_ITEMS, _COLD_RAW, _COLD_BYTES = range(5)


class AgeScans:
    """Answers of one replica to `AskAges`."""

    def __init__(self, core: Core, links: LinkIndex) -> None:
        self.core = core
        self.links = links

    def slices(self, message: AskAges, owned: Set[int]) -> Slices[tuple[Ages, int]]:
        """The answer; it waits for nothing to be durable. Raises InvalidRequest."""
        buckets, edges = unpack_u32(message.buckets), unpack_i64(message.edges)
        if len(buckets) > MAX_BUCKETS or len(edges) > MAX_EDGES or edges != sorted(edges):
            raise InvalidRequest(f"an AskAges with more than {MAX_BUCKETS} buckets, or with edges that do not increase")
        if strange := [bucket for bucket in buckets if bucket not in owned]:
            raise InvalidRequest(f"bucket {strange[0]} belongs to another group: the map is old")
        sums = _Sums(len(edges) + 1)
        left = ROWS_PER_ANSWER
        since = 0  # rows looked at since the last slice
        cursor = message.cursor
        for done, bucket in enumerate(buckets):
            if left <= 0:
                return sums.message(done, b""), 0
            sums.begin_bucket()
            links = self.links.of_table(bucket, message.table)
            if not cursor:
                _add_links(sums, links, edges)
            rows = _Rows(self.core, bucket, message.table, links.horizon, sums, edges)
            seen, cursor = yield from rows.read(cursor, left)
            left -= seen + _SEEK_ROWS
            since += seen + _SEEK_ROWS
            if cursor:
                return sums.message(done, cursor), 0
            if since >= self.core.settings.chore_rows:
                since = 0
                yield
        return sums.message(len(buckets), b""), 0


def _add_links(sums: _Sums, links: TableLinks, edges: list[int]) -> None:
    for link in links.links:
        raw_left, rows_left = link.raw_bytes, link.rows
        for block in link.blocks:
            low, high = split_item_key(block.low)[0], split_item_key(block.high)[0] + 1
            raw = raw_left * block.rows // rows_left if rows_left else 0  # a link tells the bytes of all its blocks
            raw_left, rows_left = raw_left - raw, rows_left - block.rows
            sums.add(_COLD_ITEMS, spread(block.rows, low, high, edges))
            sums.add(_COLD_RAW, spread(raw, low, high, edges))
            sums.add(_COLD_BYTES, spread(block.length, low, high, edges))


class _Rows:
    """Rows of one table in one bucket."""

    def __init__(self, core: Core, bucket: int, table: bytes, horizon: int, sums: _Sums, edges: list[int]) -> None:
        self._core = core
        self._prefix = b"R" + bucket_prefix(bucket) + bytes((len(table),)) + table
        self._horizon = horizon
        self._sums = sums
        self._edges = edges
        self._item = b""  # name of the present item's rows, without their versions
        self._newest = (0, b"")  # version and row
        self._nbytes = 0
        self._timeline = b""
        self._wiped = 0

    def read(self, cursor: bytes, at_most: int) -> Slices[tuple[int, bytes]]:
        """Count rows from `cursor` on. How many were seen, and where to go on, b"" when that was all.

        An item is not split, so a few more than `at_most` may be seen.
        """
        low, high = max(b"R" + cursor, self._prefix), prefix_end(self._prefix)
        rows_a_slice = self._core.settings.chore_rows
        seen = 0
        while True:
            part = list(islice(self._core.engine.scan(low, high), rows_a_slice))
            for name, row in part:
                item = name[:-VERSION_BYTES]
                if item != self._item:
                    self._count()
                    if seen >= at_most:
                        return seen, name[1:]
                    self._item = item
                seen += 1
                self._newest = version_of(name), row
                self._nbytes += len(name) + len(row)
            if len(part) < rows_a_slice:
                self._count()
                return seen, b""
            low = part[-1][0] + b"\x00"
            yield

    def _count(self) -> None:
        """Count the item whose rows have all been seen."""
        if not self._item:
            return
        owner_at = len(self._prefix)
        key_at = owner_at + 1 + self._item[owner_at]
        timestamp = split_item_key(self._item[key_at:])[0]
        if self._item[1:key_at] != self._timeline:
            self._timeline = self._item[1:key_at]
            self._wiped = self._wiped_of(self._timeline)
        version, row = self._newest
        is_visible = version > self._wiped and timestamp >= self._horizon and decode_row(row)[1] == PUT
        self._sums.add_item(bin_of(timestamp, self._edges), is_visible, self._nbytes)
        self._item, self._nbytes = b"", 0

    def _wiped_of(self, timeline: bytes) -> int:
        """Not by loading what is not in memory: that would drive out timelines which are in use."""
        held = self._core.peek(timeline)
        if held is not None:
            return held.wiped
        row = self._core.engine.get(meta_key(timeline))
        return Meta.decode(row).wiped if row is not None else 0


def buckets_at_once(buckets: list[int]) -> Iterator[list[int]]:
    """Buckets in parts that one question takes."""
    for first in range(0, len(buckets), MAX_BUCKETS):
        yield buckets[first : first + MAX_BUCKETS]
