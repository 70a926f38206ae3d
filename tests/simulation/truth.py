"""The truth of a run: every entry that any replica ever took for chosen, and what the timelines are by them.

It is filled by watching the replicas, so it knows what no client can: which entry applied what. An entry has one
value for ever, on all replicas and over all their lives, and a request id is in one entry only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from timetier.cluster.messages import PUT, WIPE, Life

from .trace import show_key, show_timeline

Report = Callable[[str, str], None]
"""Takes the name of a violated guarantee, and how it was violated."""


@dataclass(frozen=True)
class Entry:
    """One chosen entry. `keys` None: only the request ids are known, from a state transfer."""

    request_ids: tuple[bytes, ...]
    origin: Life | None = None
    written: int = 0
    kinds: bytes = b""
    keys: tuple[bytes, ...] | None = None
    values: tuple[bytes, ...] = ()

    def __str__(self) -> str:
        ids = " ".join(request_id[-2:].hex() for request_id in self.request_ids)
        if self.keys is None:
            return f"requests [{ids}]"
        names = "pdw"
        shown = [
            f"{names[kind]}:{show_key(key)}={value[:24]!r}"
            for kind, key, value in zip(self.kinds, self.keys, self.values, strict=True)
        ]
        return f"origin {self.origin} requests [{ids}] {', '.join(shown)}"


@dataclass
class Row:
    """An item as of some version."""

    version: int
    value: bytes


@dataclass
class History:
    """The chosen entries of one timeline, and its items at each version."""

    entries: dict[int, Entry] = field(default_factory=dict)
    applied: dict[bytes, int] = field(default_factory=dict)
    states: list[dict[bytes, Row]] = field(default_factory=lambda: [{}])

    @property
    def version(self) -> int:
        """The last version whose content is known."""
        return len(self.states) - 1

    def items(self, version: int) -> dict[bytes, Row]:
        """Items by key, as of a version up to `version`."""
        return self.states[version]

    def advance(self) -> None:
        """Compute the states that the known entries allow."""
        while (entry := self.entries.get(self.version + 1)) is not None and entry.keys is not None:
            version = self.version + 1
            items = dict(self.states[-1])
            for kind, key, value in zip(entry.kinds, entry.keys, entry.values, strict=True):
                if kind == WIPE:
                    # Within one entry a wipe hides only what is older than the entry.
                    items = {name: row for name, row in items.items() if row.version == version}
                elif kind == PUT:
                    items[key] = Row(version, value)
                else:
                    items.pop(key, None)
            self.states.append(items)


class Truth:
    """All timelines by key."""

    def __init__(self, report: Report) -> None:
        self.timelines: dict[bytes, History] = {}
        self._report = report

    def of(self, timeline: bytes) -> History:
        """History of a timeline, empty if nothing was chosen in it."""
        return self.timelines.setdefault(timeline, History())

    def chosen(self, who: str, timeline: bytes, number: int, entry: Entry) -> None:
        """A replica takes this entry for chosen."""
        history = self.of(timeline)
        known = history.entries.get(number)
        where = f"entry {number} of {show_timeline(timeline)}"
        if known is None or (known.keys is None and entry.keys is not None):
            if known is not None and known.request_ids != entry.request_ids:
                self._report("one value per entry", f"{where}: {who} has {entry}, chosen was {known}")
            history.entries[number] = entry
            history.advance()
        elif entry.keys is None:
            if entry.request_ids != known.request_ids:
                self._report("one value per entry", f"{where}: {who} has {entry}, chosen was {known}")
        elif entry != known:
            self._report("one value per entry", f"{where}: {who} has {entry}, chosen was {known}")
        for request_id in entry.request_ids:
            before = history.applied.setdefault(request_id, number)
            if before != number:
                self._report(
                    "a request is applied once",
                    f"{show_timeline(timeline)}: request {request_id.hex()} is in entries {before} and {number}",
                )
