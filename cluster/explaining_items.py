"""What became of one item: from its rows in the storage tier and in blocks to what readers see, and why. *Pure*."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from . import in_words
from .explanation import (
    ABSENT,
    BOTH,
    COLD,
    DELETED,
    EXPIRED,
    LIVE,
    NOWHERE,
    STORAGE,
    UNKNOWN,
    BlockView,
    CopyView,
    ItemView,
    RowView,
)
from .keys import MAX_TIMESTAMP, MIN_TIMESTAMP, split_item_key
from .messages import DELETE, BlockFacts, RowFacts, TimelineFacts
from .topology import TablePolicy

_KINDS = {DELETE: "delete"}


class ColdRow(NamedTuple):
    """A row of the owner in a block. `place`: file and offset."""

    key: bytes
    version: int
    written_us: int
    size_bytes: int
    place: str


class _Found(NamedTuple):
    """What the rows of one item say."""

    tier: str
    state: str
    reason: str


def item_view(
    key: bytes,
    facts: Mapping[str, TimelineFacts],
    best: str,
    cold_rows: Sequence[ColdRow],
    blocks: Sequence[tuple[BlockFacts, list[CopyView]]],
    policy: TablePolicy,
    now_us: int,
    has_unread: bool,
) -> ItemView:
    """Explain one item. `facts`: what each replica told, `best`: the one to go by. `blocks`: those that may hold it,
    with their copies. `has_unread`: one of them could be read nowhere."""
    timestamp, item_id = split_item_key(key)
    hot = sorted((row for row in facts[best].rows if row.key == key), key=lambda row: -row.version)
    cold = sorted((row for row in cold_rows if row.key == key), key=lambda row: -row.version)
    wiped, horizon = facts[best].wiped, facts[best].horizon
    found = _judge(timestamp, hot, cold, wiped, horizon, has_unread)
    rows = _rows(hot, cold, found, wiped)
    newest = rows[0] if rows else None
    at_us, words = None, "there is nothing to sink"
    if hot and found.state != EXPIRED and hot[0].version > wiped and found.tier != BOTH:
        at_us, words = may_sink(timestamp, hot[0].written, policy, now_us)
    elif found.tier == BOTH:
        words = "it has sunk; the rows go as soon as each replica comes to it"
    elif found.state == EXPIRED:
        words = "it has expired: the next sink frees it"
    elif found.tier == COLD:
        words = "it has sunk"
    return ItemView(
        timestamp=timestamp,
        id=item_id,
        tier=found.tier,
        state=found.state,
        reason=found.reason,
        version=newest.version if newest is not None else None,
        written_us=newest.written_us if newest is not None else None,
        size_bytes=newest.size_bytes if newest is not None else None,
        may_sink_at_us=at_us,
        may_sink=words,
        not_evicted_at=_not_evicted(key, facts, cold),
        rows=rows,
        blocks=[BlockView(b.file, b.offset, b.length, b.crc, b.rows, copies) for b, copies in blocks],
    )


def _judge(
    timestamp: int, hot: Sequence[RowFacts], cold: Sequence[ColdRow], wiped: int, horizon: int, has_unread: bool
) -> _Found:
    """Where an item lies and what readers see. Rows: newest first."""
    in_hot = hot[0].version if hot else -1
    in_cold = cold[0].version if cold else -1
    if has_unread and in_hot <= wiped and timestamp >= horizon:
        return _Found(COLD, UNKNOWN, "a block that may hold it could not be read from any cold node")
    if in_hot < 0 and in_cold < 0:
        return _Found(NOWHERE, ABSENT, "neither the storage tier nor a block has an item with this timestamp and id")
    tier = NOWHERE
    if in_hot >= 0 and in_cold >= 0:
        tier = BOTH if in_hot == in_cold else STORAGE if in_hot > in_cold else COLD
    else:
        tier = STORAGE if in_hot >= 0 else COLD
    if timestamp < horizon:
        return _Found(tier, EXPIRED, f"the table's retention has passed: everything before {horizon} has expired")
    if max(in_hot, in_cold) <= wiped:
        reason = f"delete_timeline deleted everything up to version {wiped}; its rows go in the background"
        return _Found(tier, DELETED, reason if in_hot >= 0 else f"{reason}, and from the block with the next sink")
    masks = f", which masks version {in_cold} in the block until the next sink merges them" if in_cold >= 0 else ""
    if in_hot > in_cold and hot[0].kind == DELETE:
        return _Found(tier, DELETED, f"deleted by version {in_hot}{masks}")
    if tier == BOTH:
        return _Found(tier, LIVE, f"version {in_hot} has sunk and is not evicted yet")
    if tier == STORAGE:
        return _Found(tier, LIVE, f"version {in_hot} is in the storage tier{masks}")
    if in_hot >= 0:
        return _Found(tier, LIVE, f"version {in_cold} is in a block; older rows in the storage tier wait to be evicted")
    return _Found(tier, LIVE, f"version {in_cold} is in a block")


def _rows(hot: Sequence[RowFacts], cold: Sequence[ColdRow], found: _Found, wiped: int) -> list[RowView]:
    """All versions, newest first; of two copies of one the storage tier's comes first."""
    rows = [
        (row.version, 0, RowView(row.version, row.written, _KINDS.get(row.kind, "put"), row.size, STORAGE, ""))
        for row in hot
    ] + [(row.version, 1, RowView(row.version, row.written_us, "put", row.size_bytes, row.place, "")) for row in cold]
    rows.sort(key=lambda row: (-row[0], row[1]))
    newest = rows[0][0] if rows else 0
    return [_with_fate(view, newest, found, wiped) for _, _, view in rows]


def _with_fate(row: RowView, newest: int, found: _Found, wiped: int) -> RowView:
    if row.version <= wiped:
        fate = f"deleted by delete_timeline, version {wiped}"
    elif row.version < newest:
        fate = f"replaced by version {newest}"
    elif found.state == EXPIRED:
        fate = "expired"
    elif row.kind == "delete":
        fate = "deletes what is older"
    else:
        fate = "what readers see"
    return RowView(row.version, row.written_us, row.kind, row.size_bytes, row.place, fate)


def _not_evicted(key: bytes, facts: Mapping[str, TimelineFacts], cold: Sequence[ColdRow]) -> list[str]:
    """Nodes that still have rows of versions which a block has, or has overtaken."""
    if not cold:
        return []
    return [
        node
        for node, told in facts.items()
        if any(row.key == key and row.version <= cold[0].version for row in told.rows)
    ]


def may_sink(timestamp: int, written_us: int, policy: TablePolicy, now_us: int) -> tuple[int | None, str]:
    """From when on (microseconds since 1970) the sink may take a row, and what that depends on, in words."""
    if timestamp in (MIN_TIMESTAMP, MAX_TIMESTAMP):
        return None, "never: the first and the last instant of all stay in the storage tier"
    event_us = timestamp * 1_000_000 // policy.per_second
    cold_after_us = policy.cold_after * 1_000_000 // policy.per_second
    at_us = max(event_us, written_us) + cold_after_us
    written = f"written {_ago(written_us, now_us)}"
    happened = f"its event time is {_ago(event_us, now_us)}"
    if written_us > event_us:
        why = f"it was {written}, and that counts, not its event time ({_ago(event_us, now_us)})"
    else:
        why = f"{happened}, and that counts; it was {written}"
    after = in_words.duration(cold_after_us / 1e6)
    when = f"since {in_words.instant(at_us)}" if at_us < now_us else f"from {in_words.instant(at_us)} on"
    return at_us, f"{when} ({_ago(at_us, now_us)}): {why}; cold_after is {after}"


def _ago(time_us: int, now_us: int) -> str:
    if abs(now_us - time_us) < 1_000_000:
        return "just now"
    words = in_words.duration((now_us - time_us) / 1e6)
    return f"{words} ago" if time_us <= now_us else f"in {words}"
