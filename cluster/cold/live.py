"""The live blocks of a table: which cold blocks have rows that a reader may see, and which of their rows are hidden.

`live_blocks` is a *pure* script; its result is data alone, which travels to whoever reads the blocks. Of every
timeline it shows what had sunk by one instant after the call, less what has been replaced, deleted, wiped or has
expired by then.

Blocks are gathered to *fragments* of some megabytes, by time: a reader with a time filter leaves out whole fragments,
and a few fragments are what a reader holds in memory at a time.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import msgspec
import numpy as np
import pyarrow as pa

from ..client.view import View
from ..effects import Script
from ..keys import MIN_TIMESTAMP, item_key, split_item_key
from .link import Block, Link
from .overlays import Facts, LookSettings, facts_of, look


class LiveBlock(msgspec.Struct, array_like=True, frozen=True):
    """A block of a link, and which of its rows are hidden. `length`, `crc` and the like as in `link.Block`.

    `items`: (owner, item key, version): a row of a lower version is hidden. `wiped`: (owner, version): rows up to this
    version are. `horizon`: rows with a timestamp below are.
    """

    bucket: int
    window_start: int
    format: int
    file: str
    offset: int
    length: int
    crc: int
    rows: int
    oldest: int
    newest: int
    horizon: int
    items: list[tuple[bytes, bytes, int]]
    wiped: list[tuple[bytes, int]]

    @property
    def is_whole(self) -> bool:
        """Whether no row is hidden."""
        return not (self.items or self.wiped) and self.horizon <= self.oldest


class Fragment(NamedTuple):
    """Some live blocks, encoded. `oldest`, `newest`: bounds of their timestamps. `rows`: hidden ones included.

    `nbytes`: of the blocks in their files. `is_whole`: no row of them is hidden.
    """

    oldest: int
    newest: int
    rows: int
    nbytes: int
    is_whole: bool
    encoded: bytes

    def blocks(self) -> list[LiveBlock]:
        """The blocks, by file and offset."""
        return _decoder.decode(self.encoded)


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[LiveBlock])


def live_blocks(
    view: View,
    table: bytes,
    settings: LookSettings | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Script[list[Fragment]]:
    """Live blocks of a table as fragments, oldest first. `progress`: (buckets done, buckets). Raises Unavailable,
    ProtocolError."""
    settings = settings or LookSettings()
    gathering = _Gathering(settings.fragment_bytes)
    total, done = view.routing.topology.buckets, 0
    for group, buckets in facts_of(view, table, settings):
        for facts in (yield from look(view, table, group, buckets, settings)):
            gathering.add(blocks_of(facts))
        done += len(buckets)
        progress(done, total)
    return gathering.fragments()


def blocks_of(facts: Facts) -> Iterator[LiveBlock]:
    """Live blocks of one bucket; those of which all has expired are left out."""
    items = sorted((owner, key, version) for (owner, key), version in facts.items.items())
    wiped = sorted(facts.wiped.items())
    for link in facts.links:
        for block in link.blocks:
            live = _live(link, block, facts.horizon, items, wiped)
            if live.newest >= facts.horizon:
                yield live


def _live(
    link: Link, block: Block, horizon: int, items: list[tuple[bytes, bytes, int]], wiped: list[tuple[bytes, int]]
) -> LiveBlock:
    first = bisect_left(items, (block.first_owner,))
    last = bisect_left(items, (block.last_owner + b"\x00",), lo=first)
    low = bisect_left(wiped, (block.first_owner,))
    high = bisect_left(wiped, (block.last_owner + b"\x00",), lo=low)
    oldest, newest = split_item_key(block.low)[0], split_item_key(block.high.removesuffix(b"\x00"))[0]
    return LiveBlock(
        bucket=link.bucket,
        window_start=link.window_start,
        format=link.format,
        file=block.file,
        offset=block.offset,
        length=block.length,
        crc=block.crc,
        rows=block.rows,
        oldest=oldest,
        newest=newest,
        horizon=horizon if horizon > oldest else MIN_TIMESTAMP,
        items=[item for item in items[first:last] if block.low <= item[1] < block.high],
        wiped=wiped[low:high],
    )


class _Gathering:
    """Live blocks while they are gathered, each as bytes, since they may be many."""

    def __init__(self, fragment_bytes: int) -> None:
        self._fragment_bytes = fragment_bytes
        self._blocks: list[bytes] = []
        self._oldest: list[int] = []
        self._newest: list[int] = []
        self._rows: list[int] = []
        self._lengths: list[int] = []

    def add(self, blocks: Iterable[LiveBlock]) -> None:
        for block in blocks:
            self._blocks.append(_encoder.encode(block))
            self._oldest.append(block.oldest)
            self._newest.append(block.newest)
            self._rows.append(block.rows)
            self._lengths.append(block.length)

    def fragments(self) -> list[Fragment]:
        """All blocks, by their oldest row, in fragments; a block that is too large for one is one by itself."""
        found: list[Fragment] = []
        part: list[int] = []
        size = 0
        for at in np.argsort(np.array(self._oldest, dtype=np.int64), kind="stable").tolist():
            # Half a fragment is enough where blocks of a later time begin, which a filter may leave out.
            later = part and 2 * size >= self._fragment_bytes and self._oldest[at] > max(self._newest[i] for i in part)
            if part and (later or size + self._lengths[at] > self._fragment_bytes):
                found.append(self._fragment(part, size))
                part, size = [], 0
            part.append(at)
            size += self._lengths[at]
        if part:
            found.append(self._fragment(part, size))
        return found

    def _fragment(self, part: list[int], size: int) -> Fragment:
        decode = msgspec.msgpack.Decoder(LiveBlock).decode
        blocks = sorted((decode(self._blocks[at]) for at in part), key=lambda block: (block.file, block.offset))
        return Fragment(
            min(self._oldest[at] for at in part),
            max(self._newest[at] for at in part),
            sum(self._rows[at] for at in part),
            size,
            all(block.is_whole for block in blocks),
            _encoder.encode(blocks),
        )


def visible_rows(batch: pa.RecordBatch, block: LiveBlock) -> pa.RecordBatch:
    """The rows of a block that are not hidden. `batch`: all of them, by owner, timestamp and id."""
    owners, timestamps = batch.column("owner"), batch.column("timestamp")
    versions = batch.column("version").to_numpy()
    shown = np.ones(batch.num_rows, dtype=np.bool_)
    if block.horizon > block.oldest:
        shown &= timestamps.to_numpy() >= block.horizon
    rows = range(batch.num_rows)
    for owner, version in block.wiped:
        first, last = _span(owners, owner)
        shown[first:last] &= versions[first:last] > version
    ids = batch.column("id")

    def key_at(row: int) -> bytes:
        return item_key(timestamps[row].as_py(), ids[row].as_py())

    for owner, key, version in block.items:
        first, last = _span(owners, owner)
        at = bisect_left(rows, key, lo=first, hi=last, key=key_at)
        if at < last and key_at(at) == key and versions[at] < version:
            shown[at] = False
    return batch if shown.all() else batch.filter(pa.array(shown))


def _span(owners: pa.Array, owner: bytes) -> tuple[int, int]:
    rows = range(len(owners))
    first = bisect_left(rows, owner, key=lambda row: owners[row].as_py())
    return first, bisect_left(rows, owner + b"\x00", lo=first, key=lambda row: owners[row].as_py())
