"""Client -> storage node, and client -> cache node (or storage node, which reads too)."""

from __future__ import annotations

from ..packed_items import Item
from .base import Part, Request


class Write(Request):
    """Atomic write requests, one per element of `timelines`; request i owns `counts[i]` mutations."""

    epoch: int
    timelines: list[bytes]
    request_ids: list[bytes]  # 16 bytes each
    seen: bytes  # int64: the greatest version that the sender knows of that timeline
    if_version: bytes  # int64: -1 = unconditional
    counts: bytes
    kinds: bytes
    keys: list[bytes]
    values: list[bytes]
    timeout_ms: int


class Written(Request):
    """Answer to `Write`. `versions`: int64, the entry that applied it, or the present version."""

    outcomes: bytes
    versions: bytes


class Damage(Part):
    """Why read number `index` of a message is CORRUPT. `file`, `offset`: the block of which no copy is good."""

    index: int
    file: str
    offset: int
    reason: str


class ReadPages(Request):
    """Newest items of each timeline that are older than `before` (an item key, exclusive; b"" = from the newest)."""

    epoch: int
    timelines: list[bytes]
    before: list[bytes]
    limits: bytes  # uint32
    timeout_ms: int


class Pages(Request):
    """Answer to `ReadPages`. `items`: of each page, oldest first (a node packs them, see `packed_items`). `more`: 1
    where older items may exist. `damages`: of some of the reads that are CORRUPT."""

    outcomes: bytes
    timeline_versions: bytes
    more: bytes
    items: list[list[Item]]
    damages: list[Damage] = []


class ReadItems(Request):
    """Single items; the same timeline may come several times."""

    epoch: int
    timelines: list[bytes]
    keys: list[bytes]
    timeout_ms: int


class FoundItems(Request):
    """Answer to `ReadItems`. `items`: None where there is none (a node packs them, see `packed_items`). `damages`: of
    some of the reads that are CORRUPT."""

    outcomes: bytes
    timeline_versions: bytes
    items: list[Item | None]
    damages: list[Damage] = []
