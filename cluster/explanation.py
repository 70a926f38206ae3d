"""What `explain` tells of one timeline, and of its items at one instant: plain data, for people and for JSON.

Times named `_us` are microseconds since 1970; timestamps and window bounds are in the table's unit.
"""

from __future__ import annotations

import base64
from dataclasses import asdict, dataclass, field
from typing import Any

# Where an item lies.
STORAGE = "storage"
COLD = "cold"
BOTH = "storage and cold"  # sunk, and not evicted yet
NOWHERE = "nowhere"

# What readers see of it.
LIVE = "live"
DELETED = "deleted"
EXPIRED = "expired"
ABSENT = "absent"  # there is nothing
UNKNOWN = "unknown"  # a block that may hold it can't be read

# A replica of the storage group.
AGREES = "agrees"
LAGS = "lags"
NO_ANSWER = "no answer"

# A copy of a block.
PRESENT = "present"  # the file is there; its bytes were not read
INTACT = "intact"  # read and checked
DAMAGED = "damaged"
MISSING = "missing"


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """A replica of the timeline's storage group, in the order in which it is asked.

    `version`: up to which it has applied the timeline, None if it did not answer. `has_open_entry`: it has accepted the
    next entry, and does not know whether that was chosen. `rows`: of the items asked for, that it has in the storage
    tier (None when no instant was named). `reason`: why it gave no answer, or what `state` is about.
    """

    node: str
    state: str
    version: int | None
    has_open_entry: bool
    rows: int | None
    reason: str


@dataclass(frozen=True, slots=True)
class CopyView:
    """One copy of a block. `disk`: ordinal, None where it is not known."""

    node: str
    state: str
    disk: int | None
    reason: str


@dataclass(frozen=True, slots=True)
class BlockView:
    """A block of a cold file. `rows`: of all owners in it."""

    file: str
    offset: int
    length: int
    crc: int
    rows: int
    copies: list[CopyView]


@dataclass(frozen=True, slots=True)
class LinkView:
    """A cold link that names the owner. `rows`, `raw_bytes`: of all owners. `live`: not expired as a whole.

    `sunk_version`: rows of the owner up to this version may be evicted because of it, 0 for none.
    """

    window_start: int
    window_end: int
    generation: int
    run: str
    rows: int
    raw_bytes: int
    live: bool
    sunk_version: int
    blocks: list[BlockView]


@dataclass(frozen=True, slots=True)
class WindowView:
    """Rows of the owner in the storage tier within one window; see `messages.WindowFacts`."""

    start: int
    end: int
    items: int
    tombstones: int
    hidden: int
    nbytes: int
    oldest: int
    newest: int
    first_written_us: int
    last_written_us: int


@dataclass(frozen=True, slots=True)
class RowView:
    """One version of an item. `place`: `storage`, or the file and offset of its block. `fate`: what became of it."""

    version: int
    written_us: int
    kind: str
    size_bytes: int
    place: str
    fate: str


@dataclass(frozen=True, slots=True)
class ItemView:
    """One item at the instant that was asked for.

    `tier`: where it lies; `state`: what readers see; `reason`: why, in words. `version`, `written_us`, `size_bytes`: of
    what readers see or, where it was deleted, of the deletion; None where there is nothing. `may_sink_at_us`: from when
    on the sink may take it, None where nothing is to sink; `may_sink`: the same in words, and what it depends on.
    `not_evicted_at`: replicas that still have rows which a cold link covers. `rows`: all versions, newest first.
    """

    timestamp: int
    id: bytes
    tier: str
    state: str
    reason: str
    version: int | None
    written_us: int | None
    size_bytes: int | None
    may_sink_at_us: int | None
    may_sink: str
    not_evicted_at: list[str]
    rows: list[RowView]
    blocks: list[BlockView]


@dataclass(frozen=True, slots=True)
class SinkOutlook:
    """When the sink runs next, as far as the Router tells. `schedule`: in words, "" when that is not known.

    `next_at_us`: None = not known, or by hand only. `waits`: what an item may wait for after it may sink, in words.
    """

    schedule: str = ""
    next_at_us: int | None = None
    last_run: str = ""
    last_state: str = ""
    last_ended_us: int | None = None
    last_error: str = ""
    waits: str = ""
    reason: str = "the Router was not asked"


@dataclass(frozen=True, slots=True)
class Explanation:
    """All that can be told of one timeline.

    `version`: the greatest one that was found; `proven`: a majority has told that it is the last one.
    `open_entry`: an entry after it that was accepted somewhere and is not known to be chosen, None without one.
    `wiped_version`: items up to this version were deleted by `delete_timeline`, 0 if never. `horizon`: items of earlier
    timestamps have expired, None without retention. `cold_after`, `window`, `retention`: the table's policy;
    `per_second`: units of its timestamps in a second. `windows`: oldest first; `links`: newest first, and how many were
    left out. `items`: empty when no instant was named.
    """

    table: str
    owner: bytes
    asked_at_us: int
    bucket: int
    storage_group: int
    cold_group: int
    version: int
    proven: bool
    open_entry: int | None
    wiped_version: int
    horizon: int | None
    per_second: int
    cold_after: int
    window: int
    retention: int
    replicas: list[ReplicaView]
    cache_nodes: list[str]
    windows: list[WindowView]
    windows_left_out: bool
    links: list[LinkView]
    links_left_out: int
    items: list[ItemView]
    next_sink: SinkOutlook = field(default_factory=SinkOutlook)

    def to_json(self) -> dict[str, Any]:
        """The same as an object for JSON; bytes that are no UTF-8 become `owner_base64` and `id_base64`."""
        found: dict[str, Any] = _plain(asdict(self))
        return found


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        plain: dict[str, Any] = {}
        for name, part in value.items():
            if isinstance(part, bytes):
                try:
                    plain[name] = part.decode()
                except UnicodeDecodeError:
                    plain[f"{name}_base64"] = base64.b64encode(part).decode()
            else:
                plain[name] = _plain(part)
        return plain
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return value
