"""What a reader works on: single reads, the rows in which storage is asked, and storage's answers (*pure*)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..errors import ProtocolError, TimeTierError
from ..keys import MIN_TIMESTAMP
from ..messages import (
    DELTA,
    POINT,
    RANGE,
    SAME,
    AskVersions,
    Ballot,
    Check,
    Checked,
    Known,
    LinkRef,
    Open,
    Versions,
    pack_i64,
    pack_u32,
    unpack_i64,
    unpack_u32,
)
from ..packed_items import Item, unpack_items
from .pages import Page, PageSlice, Rows
from .votes import Votes


@dataclass(slots=True)
class PageAnswer:
    """Newest items of one timeline as of `version`."""

    version: int
    items: PageSlice


@dataclass(slots=True)
class ItemAnswer:
    """One item as of timeline version `version`: `packed`, b"" where there is none."""

    version: int
    packed: bytes = b""

    @property
    def item(self) -> Item | None:
        """The item itself."""
        return unpack_items(self.packed, 1)[0] if self.packed else None


@dataclass(slots=True, eq=False)
class Read:
    """One request. `key`: for an item (`limit` = 0) its key; for a page the item key before which it starts (b"" =
    the newest). `deadline`: monotonic seconds. `answer` is set once, by the reader.
    """

    timeline: bytes
    key: bytes
    limit: int
    deadline: float
    max_bytes: int = 0  # of a page, packed
    answer: PageAnswer | ItemAnswer | TimeTierError | None = None
    ticket: object = None  # whoever waits for it
    wanted: Callable[[], bool] = lambda: True  # whether they still do


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a `Check`: what storage is asked about one timeline.

    `limit`: items asked for. `need`: items that reads wait for, so that it is worth reading cold blocks for them.
    """

    want: int
    bound: bytes
    limit: int
    need: int


@dataclass(slots=True)
class RowAnswer:
    """The answer to one row; all rows of one timeline are from one instant of one replica."""

    payload: int
    rows: Rows
    wiped: int
    horizon: int
    floor: bytes
    refs: list[LinkRef]


class Slot:
    """One timeline in a strong read, with the reads that share the answer.

    `page`: what the reader has of the timeline. `data`: the answers to `rows`, as of `data_version`. `horizon`: the
    greatest that any replica has told; whoever's answer counts has told one. `marks`: by node, as of when it told that
    (see `messages.Same`). `failed`: nodes that brought no answer to this read.
    `check_at`, `ask_at`, `known`: whom the next round asks, and for what.
    """

    __slots__ = (
        "alone",
        "ask_at",
        "check_at",
        "data",
        "data_version",
        "failed",
        "generation",
        "horizon",
        "known",
        "marks",
        "order",
        "page",
        "proven",
        "proven_at",
        "reads",
        "restarts",
        "rounds",
        "rows",
        "settles",
        "timeline",
        "tried",
        "votes",
        "waited",
        "why",
    )

    def __init__(self, timeline: bytes, order: list[str], page: Page | None, reads: list[Read]) -> None:
        self.timeline = timeline
        self.order = order
        self.page = page
        self.reads = reads
        self.rows: list[Row] = []
        self.votes = Votes(len(order))
        self.generation = 0  # of `Incarnations` when its votes began
        self.proven = -1  # a version that a settled Prepare has proven, and at which node
        self.proven_at = ""
        self.data: list[RowAnswer] | None = None
        self.data_version = -1
        self.horizon = MIN_TIMESTAMP
        self.marks: dict[str, int] = {}
        self.failed: set[str] = set()
        self.why = ""
        self.tried: set[tuple[str, int]] = set()  # who was asked for data as of which version
        self.rounds = 0
        self.settles = 0
        self.restarts = 0
        self.waited = False  # everybody was asked again after a pause, since the last settle
        self.alone = False  # its answer may be too large to share a message
        self.check_at: str | None = None
        self.known: tuple[int, Ballot] | None = None
        self.ask_at: list[str] = []

    @property
    def have(self) -> int:
        """Version of the page, or -1 without one."""
        return -1 if self.page is None else self.page.version

    def plan_rows(self, page_items: int, *, fetch_page: bool) -> None:
        """Decide what storage is asked: the delta of the page, and what the page does not cover; each thing once.

        `fetch_page`: get the newest page even if no read asks for it.
        """
        page = self.page
        rows: dict[tuple[int, bytes], Row] = {}
        newest = max([read.limit for read in self.reads if not read.key], default=0)
        if page is not None:
            rows[DELTA, page.high] = Row(DELTA, page.high, max(newest, page_items), newest)
        elif fetch_page or newest:
            rows[RANGE, b""] = Row(RANGE, b"", max(newest, page_items), newest)
        for read in self.reads:
            if not read.limit:
                if page is None or not page.contains(read.key):
                    rows[POINT, read.key] = Row(POINT, read.key, 1, 1)
                continue
            bound = read.key
            if page is not None:
                if page.covers(bound, read.limit):
                    continue
                below_high = not page.high or (bound and bound <= page.high)
                if below_high and page.low and (not bound or bound >= page.low):
                    bound = page.low  # the piece that extends the page
            known = rows.get((RANGE, bound))
            if known is None or known.limit < read.limit:
                rows[RANGE, bound] = Row(RANGE, bound, read.limit, read.limit)
        self.rows = list(rows.values())

    def halve(self) -> bool:
        """Ask for less in each row, after an answer was too large. False if it can't be less."""
        if all(row.limit <= 1 for row in self.rows):
            return False
        self.rows = [Row(row.want, row.bound, max(1, row.limit // 4), row.need) for row in self.rows]
        return True


@dataclass(slots=True)
class Outgoing:
    """The slots of which one node is asked in one round: with a `Check`, or for their versions only."""

    checks: list[Slot]
    asks: list[Slot]

    def check(self) -> Check:
        """The message to be sent for `checks`."""
        rows = [(slot, row) for slot in self.checks for row in slot.rows]
        known: list[Known] = []
        index = 0
        for slot in self.checks:
            if slot.known is not None:
                known.append(Known(index, *slot.known))
            index += len(slot.rows)
        return Check(
            [slot.timeline for slot, _ in rows],
            pack_i64([slot.have if row.want == DELTA else -1 for slot, row in rows]),
            bytes([row.want for _, row in rows]),
            [row.bound for _, row in rows],
            pack_u32([row.limit for _, row in rows]),
            known,
        )

    def ask(self) -> AskVersions:
        """The message to be sent for `asks`."""
        return AskVersions([slot.timeline for slot in self.asks])


def take_versions(node: str, answer: Versions, slots: list[Slot]) -> None:
    """Note a node's answer to `AskVersions`. Raises ProtocolError, before anything is noted."""
    chosen = unpack_i64(answer.chosen)
    if len(chosen) != len(slots):
        raise ProtocolError(f"{node} answered {len(chosen)} version questions of {len(slots)}")
    opens = _opens(node, answer.opens, len(slots))
    horizons, unsure = unpack_i64(answer.horizons), set(unpack_u32(answer.unsure))
    if len(horizons) not in (0, len(slots)):
        raise ProtocolError(f"{node} told {len(horizons)} horizons of {len(slots)}")
    for index, slot in enumerate(slots):
        sure = chosen[index] if index not in unsure else -1
        _vote(node, slot, sure, opens.get(index), horizons[index] if horizons else MIN_TIMESTAMP, answer.mark)


def take_checked(node: str, answer: Checked, slots: list[Slot]) -> None:
    """Note a node's answer to `Check`. Raises ProtocolError, before anything is noted."""
    total = sum([len(slot.rows) for slot in slots])
    chosen = unpack_i64(answer.chosen)
    opens = _opens(node, answer.opens, total)
    answers = _row_answers(node, answer, total)
    first = 0
    spans = []
    for slot in slots:
        end = first + len(slot.rows)
        for index in range(first, end):
            _check_row(node, slot, slot.rows[index - first], answers[index], chosen[index], chosen[first])
        spans.append((first, end))
        first = end
    for slot, (first, end) in zip(slots, spans, strict=True):
        _vote(node, slot, chosen[first], opens.get(first), answers[first].horizon, answer.mark)
        if chosen[first] > slot.data_version:
            slot.data_version = chosen[first]
            slot.data = answers[first:end]


def _vote(node: str, slot: Slot, chosen: int, ballot: Ballot | None, horizon: int, mark: int) -> None:
    if chosen < 0:
        slot.failed.add(node)
        slot.why = f"{node} does not answer for this timeline"
    else:
        slot.failed.discard(node)
        slot.horizon = max(slot.horizon, horizon)
        slot.marks[node] = mark
        slot.votes.add(node, chosen, ballot)


def _opens(node: str, opens: list[Open], rows: int) -> dict[int, Ballot]:
    if opens and not all(0 <= item.index < rows for item in opens):
        raise ProtocolError(f"{node} named an open entry of a request that there is not")
    return {item.index: item.ballot for item in opens}


def _row_answers(node: str, answer: Checked, total: int) -> list[RowAnswer]:
    """The columns of an answer as rows. Raises ProtocolError when columns don't fit together."""
    counts = unpack_u32(answer.counts)
    wiped, horizons = unpack_i64(answer.wiped), unpack_i64(answer.horizons)
    versions, written = unpack_i64(answer.versions), unpack_i64(answer.written)
    per_row = {
        len(counts),
        len(wiped),
        len(horizons),
        len(answer.payloads),
        len(answer.floors),
        len(answer.chosen) // 8,
    }
    per_item = {sum(counts), len(answer.kinds), len(answer.keys), len(answer.values), len(versions), len(written)}
    if per_row != {total} or len(per_item) != 1:
        raise ProtocolError(f"columns of an answer of {node} differ in length: {per_row} for {total}, {per_item}")
    if not all(0 <= links.index < total for links in answer.links):
        raise ProtocolError(f"{node} named links of a request that there is not")
    refs = {links.index: links.refs for links in answer.links}
    rows = []
    end = 0
    for index, count in enumerate(counts):
        if count:
            part = slice(end, end := end + count)
            items = Rows(answer.keys[part], answer.kinds[part], answer.values[part], versions[part], written[part])
        else:
            items = Rows()
        rows.append(
            RowAnswer(
                answer.payloads[index],
                items,
                wiped[index],
                horizons[index],
                answer.floors[index],
                refs.get(index, []),
            )
        )
    return rows


_ALLOWED = {DELTA: (SAME, DELTA, RANGE), RANGE: (RANGE,), POINT: (POINT,)}


def _check_row(node: str, slot: Slot, row: Row, answer: RowAnswer, chosen: int, first_chosen: int) -> None:
    """Refuse an answer that can't be one to the question."""
    wrong = ""
    if answer.payload not in _ALLOWED[row.want] and chosen >= 0:
        wrong = f"payload {answer.payload} to want {row.want}"
    elif chosen != first_chosen:
        wrong = "rows of one timeline at two versions"
    elif answer.payload == SAME and chosen != slot.have:
        wrong = f"`same` at version {chosen}, but version {slot.have} was named"
    elif row.want == RANGE and row.bound and answer.floor >= row.bound:
        wrong = "a range that holds nothing"
    if wrong:
        raise ProtocolError(f"{node} gave an answer that does not fit: {wrong}")
