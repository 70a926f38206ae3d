"""What a replica tells of one timeline to whoever wants to know why it is as it is (*pure*).

Made in slices (`slices.py`), and bounded: a long timeline comes in several answers. Rows, links and version of one
answer are of one instant.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator

from ..cold.link import Link
from ..errors import InvalidRequest
from ..keys import (
    MAX_TIMESTAMP,
    MIN_TIMESTAMP,
    is_system,
    split_item_key,
    split_timeline,
    system_timeline,
    timeline_hash,
)
from ..messages import (
    COUNTS,
    DELETE,
    NO_BALLOT,
    NO_ROWS,
    PUT,
    ROWS,
    AskTimeline,
    Ballot,
    BlockFacts,
    LinkFacts,
    RowFacts,
    TimelineFacts,
    WindowFacts,
)
from .core import Core
from .links import LinkIndex, TableLinks
from .rows import VERSION_BYTES, decode_row, prefix_end, rows_prefix, version_of
from .slices import Pinned, Slices, until_it_holds
from .timeline import Timeline

MAX_LINKS = 256  # that one answer names
MAX_ROWS_NAMED = 1_000
ROWS_PER_ANSWER = 20_000  # rows looked at; an item is never split
_TIMESTAMP_BYTES = 8

_Version = tuple[int, int, int, int, int]  # version, written, kind, bytes of the value, bytes of the row


class TimelineLooks:
    """Answers of one replica to `AskTimeline`."""

    def __init__(self, core: Core, links: LinkIndex) -> None:
        self.core = core
        self.links = links

    def slices(self, message: AskTimeline) -> Slices[tuple[TimelineFacts, int]]:
        """The answer, and the engine batch that must be durable before it leaves. Raises InvalidRequest."""
        if is_system(message.timeline) or message.window <= 0 or message.want not in (NO_ROWS, COUNTS, ROWS):
            raise InvalidRequest("an AskTimeline for no timeline of an owner, for no window, or for no known rows")
        for bound in (message.low, message.high):
            if 0 < len(bound) < _TIMESTAMP_BYTES:
                raise InvalidRequest(f"an AskTimeline with bound {bound!r}, which is no item key")
        found = yield from until_it_holds(_Look(self, message).read)
        return found


class _Look:
    """One timeline, looked at once."""

    def __init__(self, looks: TimelineLooks, message: AskTimeline) -> None:
        self._core = looks.core
        self._index = looks.links
        self._message = message

    def read(self, whole: bool) -> Slices[tuple[TimelineFacts, int] | None]:
        """The answer; None if rows of the version may have gone meanwhile."""
        core, message = self._core, self._message
        bucket, table, owner = split_timeline(message.timeline)
        timeline = core.timeline(message.timeline)
        pinned = Pinned(core, timeline, core.timeline(system_timeline(bucket)), timeline.chosen)
        links = self._index.of_table(bucket, table)
        named: list[LinkFacts] = []
        left_out = 0
        if message.want != NO_ROWS:
            named, left_out = self._links_of(links, timeline_hash(table, owner), owner)
        facts = TimelineFacts(
            chosen=pinned.version,
            open=_open(timeline),
            wiped=pinned.wiped,
            horizon=links.horizon,
            system_version=pinned.system_version,
            links=named,
            links_left_out=left_out,
            windows=[],
            rows=[],
            next=b"",
        )
        if message.want != NO_ROWS:
            takes = _Counts(facts, links, message.window) if message.want == COUNTS else _Named(facts)
            if not (yield from self._rows(pinned, takes, facts, whole)):
                return None
            takes.end()
        return facts, pinned.dirty

    def _rows(self, pinned: Pinned, takes: _Counts | _Named, facts: TimelineFacts, whole: bool) -> Slices[bool]:
        """Hand the rows over, item by item; stop at an item when that is enough. False if they don't hold any more."""
        message = self._message
        prefix = rows_prefix(message.timeline)
        low, high = prefix + message.low, prefix + message.high if message.high else prefix_end(prefix)
        items = _Items(len(prefix), pinned.version)
        seen = 0
        for part in pinned.rows(low, high, whole=False):  # without a break, if `whole`, but not beyond what is enough
            if part is None:
                return False
            seen += len(part)
            for key, versions in items.of(part):
                takes.take(key, versions)
            if seen >= ROWS_PER_ANSWER or takes.is_full:
                facts.next = items.key  # the item of which not all rows have come
                return True
            if not whole:
                yield
        for key, versions in items.last():
            takes.take(key, versions)
        return True

    def _links_of(self, links: TableLinks, owner_hash: int, owner: bytes) -> tuple[list[LinkFacts], int]:
        """Links within the bounds that name the owner, newest window first, and how many were left out."""
        low = split_item_key(self._message.low)[0] if self._message.low else MIN_TIMESTAMP
        high = MAX_TIMESTAMP
        if self._message.high:  # a bound that is an instant alone excludes it
            high = split_item_key(self._message.high)[0] - (len(self._message.high) == _TIMESTAMP_BYTES)
        naming = [link for link in links.overlapping(low, high) if link.version_of(owner_hash) >= 0]
        return [_facts_of(link, owner_hash, owner) for link in naming[:MAX_LINKS]], max(0, len(naming) - MAX_LINKS)


class _Items:
    """Groups rows by item, those up to a version. Rows come item by item, oldest version first."""

    def __init__(self, start: int, version: int) -> None:
        self.key = b""
        self._start = start
        self._version = version
        self._versions: list[_Version] = []

    def of(self, rows: list[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, list[_Version]]]:
        for name, row in rows:
            key = name[self._start : -VERSION_BYTES]
            if key != self.key:
                yield from self.last()
                self.key = key
            version = version_of(name)
            if version <= self._version:
                written, kind, value = decode_row(row)
                self._versions.append((version, written, kind, len(value), len(name) + len(row)))

    def last(self) -> Iterator[tuple[bytes, list[_Version]]]:
        if self._versions:
            yield self.key, self._versions
        self._versions = []


class _Named:
    """Rows one by one."""

    def __init__(self, facts: TimelineFacts) -> None:
        self._rows = facts.rows

    @property
    def is_full(self) -> bool:
        return len(self._rows) >= MAX_ROWS_NAMED

    def take(self, key: bytes, versions: list[_Version]) -> None:
        self._rows += [RowFacts(key, version, written, kind, size) for version, written, kind, size, _ in versions]

    def end(self) -> None:
        """Nothing is left to do."""


class _Counts:
    """Rows counted by window."""

    is_full = False

    def __init__(self, facts: TimelineFacts, links: TableLinks, window: int) -> None:
        self._facts = facts
        self._links = links
        self._window = window
        self._present: WindowFacts | None = None

    def take(self, key: bytes, versions: list[_Version]) -> None:
        timestamp = split_item_key(key)[0]
        window = self._present
        if window is None or timestamp >= window.end:
            self.end()
            start, end = window_of(timestamp, self._window, self._links)
            written = MAX_TIMESTAMP, MIN_TIMESTAMP
            window = self._present = WindowFacts(start, end, 0, 0, 0, 0, timestamp, timestamp, *written)
        version, _, kind, _, _ = versions[-1]
        is_live = version > self._facts.wiped and timestamp >= self._facts.horizon
        window.items += is_live and kind == PUT
        window.tombstones += is_live and kind == DELETE
        window.hidden += len(versions) - is_live
        window.nbytes += sum([size for *_, size in versions])
        window.newest = timestamp
        window.first_written = min(window.first_written, *[row[1] for row in versions])
        window.last_written = max(window.last_written, *[row[1] for row in versions])

    def end(self) -> None:
        if self._present is not None:
            self._facts.windows.append(self._present)
            self._present = None


def window_of(timestamp: int, window: int, links: TableLinks) -> tuple[int, int]:
    """Window in which a timestamp lies: that of the link which covers it, or else the one between others of `window`.

    The next sink would put it there (see `cold/sinking.py`).
    """
    at = bisect_right(links.starts, timestamp)
    if at and timestamp < links.links[at - 1].window_end:
        return links.links[at - 1].window_start, links.links[at - 1].window_end
    start = timestamp // window * window
    floor = links.links[at - 1].window_end if at else MIN_TIMESTAMP
    ceiling = links.starts[at] if at < len(links.starts) else MAX_TIMESTAMP
    return max(start, floor), min(start + window, ceiling)


def _facts_of(link: Link, owner_hash: int, owner: bytes) -> LinkFacts:
    blocks = [
        BlockFacts(block.file, block.offset, block.length, block.crc, block.rows, block.low, block.high)
        for block in link.blocks_of(owner)
    ]
    rules = [(rule.version, rule.event_before, rule.written_before) for rule in link.rules_of(owner_hash)]
    return LinkFacts(
        link.window_start,
        link.window_end,
        link.generation,
        link.format,
        link.run,
        link.rows,
        link.raw_bytes,
        rules,
        blocks,
    )


def _open(timeline: Timeline) -> Ballot:
    """Ballot of the open entry; below round 0 where it is copied knowledge and no vote."""
    if timeline.accepted == NO_BALLOT:
        return NO_BALLOT
    return (-1, timeline.accepted[1]) if timeline.learned else timeline.accepted
