"""From storage's answer to the reads' answers: pieces of a timeline are put together and cut to size (*pure*)."""

from __future__ import annotations

from collections.abc import Callable

from ..cold.block import DecodedBlock
from ..keys import split_timeline, timestamp_floor
from ..messages import DELTA, POINT, PUT, RANGE, LinkRef
from .hot_cold import HotRange
from .pages import Page
from .requests import ItemAnswer, PageAnswer, Read, Row, RowAnswer, Slot


class Answering:
    """What is known of one timeline at one version, and the reads that wait for it.

    `owner`: whose timeline it is. `base`: the page that reaches up to where the slot's page did. `pending`: ranges that
    need blocks. `same`: the page that the reader had was current, or was brought up to date by a delta.
    """

    def __init__(self, slot: Slot, kept: Callable[[LinkRef, bytes], DecodedBlock | None]) -> None:
        """`kept`: what a block has of an owner, if it is in memory."""
        assert slot.data is not None, "a slot is answered from data"
        self.slot = slot
        self.owner = split_timeline(slot.timeline)[2]
        self.version = slot.data_version
        self.reads = slot.reads
        self.base: Page | None = None
        self.same = False
        self.delta_items = 0
        self.pending: list[HotRange] = []
        self._kept = kept
        self._pieces: list[Page] = []
        self._items: dict[bytes, ItemAnswer] = {}
        self._points: dict[HotRange, bytes] = {}
        for row, answer in zip(slot.rows, slot.data, strict=True):
            if row.want == DELTA and answer.payload != RANGE:
                self._advance(answer)
            elif row.want == POINT and not answer.refs:
                self._items[row.bound] = self._item_of_row(answer)
            else:
                self._add_range(row, answer)
        self.gather()

    def _advance(self, answer: RowAnswer) -> None:
        """Bring the slot's page to the present version."""
        assert self.slot.page is not None, "a delta is asked for a page"
        self.base = self.slot.page.apply(
            answer.rows, version=self.version, wiped=answer.wiped, horizon=self.slot.horizon
        )
        self.same = True
        self.delta_items = len(answer.rows)

    def _item_of_row(self, answer: RowAnswer) -> ItemAnswer:
        rows = answer.rows
        visible = (
            len(rows) > 0
            and rows.kinds[0] == PUT
            and rows.versions[0] > answer.wiped
            and rows.keys[0] >= timestamp_floor(self.slot.horizon)
        )
        return ItemAnswer(self.version, rows.packed([0])[0] if visible else b"")

    def _add_range(self, row: Row, answer: RowAnswer) -> None:
        """Note a range; a point is the range that only its item is in. A delta that became a range is the newest."""
        is_point = row.want == POINT
        hot_range = HotRange(
            self.owner,
            answer.rows,
            answer.refs,
            version=self.version,
            floor=row.bound if is_point else answer.floor,
            before=row.bound + b"\x00" if is_point else (row.bound if row.want == RANGE else b""),
            limit=row.need,
            wiped=answer.wiped,
            horizon=self.slot.horizon,
        )
        if is_point:
            self._points[hot_range] = row.bound
        self.pending.append(hot_range)

    def gather(self) -> None:
        """Turn ranges that have all their blocks into pieces, and join pieces that meet."""
        pending = []
        for hot_range in self.pending:
            if self._complete(hot_range):
                self._add_piece(hot_range)
            else:
                pending.append(hot_range)
        self.pending = pending
        self._pieces.sort(key=lambda piece: piece.high, reverse=True)
        for piece in list(self._pieces):
            if self.base is not None and self.base.low and piece.high == self.base.low:
                self.base = self.base.extend(piece)
                self._pieces.remove(piece)

    def needed(self) -> list[LinkRef]:
        """Blocks that the pending ranges need next, each once."""
        refs = {(ref.file, ref.offset): ref for hot_range in self.pending for ref in hot_range.needed()}
        return list(refs.values())

    def _complete(self, hot_range: HotRange) -> bool:
        """Whether a range needs no further block; blocks in memory are used."""
        while refs := hot_range.needed():
            blocks = [(ref, self._kept(ref, self.owner)) for ref in refs]
            for ref, block in blocks:
                if block is not None:
                    hot_range.add(ref, block)
            if any(block is None for _, block in blocks):
                return False
        return True

    def _add_piece(self, hot_range: HotRange) -> None:
        piece = hot_range.page()
        key = self._points.get(hot_range)
        if key is not None:
            self._items[key] = ItemAnswer(self.version, piece.find(key))
        elif not piece.high and self.base is None:
            self.base = piece
        else:
            self._pieces.append(piece)

    def answer(self) -> list[Read]:
        """Answer the reads that can be answered, and take them off `reads`."""
        done: list[Read] = []
        rest: list[Read] = []
        for read in self.reads:
            read.answer = self._answer_page(read) if read.limit else self._answer_item(read)
            (rest if read.answer is None else done).append(read)
        self.reads = rest
        return done

    def _answer_item(self, read: Read) -> ItemAnswer | None:
        if self.base is not None and self.base.contains(read.key):
            return ItemAnswer(self.version, self.base.find(read.key))
        return self._items.get(read.key)

    def _answer_page(self, read: Read) -> PageAnswer | None:
        pieces = self._pieces if self.base is None else [self.base, *self._pieces]
        for page in pieces:
            items = page.newest(read.limit, read.key, read.max_bytes)
            if items is not None:
                return PageAnswer(self.version, items)
        return None

    def deepen(self) -> list[tuple[Page | None, list[Read]]]:
        """The reads that are left, by the page from which they have to go on towards older items."""
        groups: dict[int, tuple[Page | None, list[Read]]] = {}
        pieces = self._pieces if self.base is None else [self.base, *self._pieces]
        for read in self.reads:
            start = next((page for page in pieces if read.limit and _starts_in(page, read.key)), self.base)
            groups.setdefault(id(start), (start, []))[1].append(read)
        return list(groups.values())


def _starts_in(page: Page, before: bytes) -> bool:
    """Whether the items right below `before` (b"" = the newest) are in the page's range."""
    if not before:
        return not page.high
    return before >= page.low and (not page.high or before <= page.high)
