"""What `timetier explain` prints for people."""

from __future__ import annotations

from ..cluster import in_words
from ..cluster.explanation import BlockView, Explanation, ItemView, LinkView, SinkOutlook
from .cli_common import bytes_text, one_line, table_of

_SHOWN_WINDOWS = 20
_SHOWN_ROWS = 20


def explanation_text(found: Explanation) -> str:
    """The whole explanation, the items that were asked for first."""
    parts = [_head(found)]
    parts += [_item(item, found) for item in found.items]
    parts += [_replicas(found), _windows(found), _links(found), _sink(found.next_sink)]
    return "\n\n".join(part for part in parts if part)


def _head(found: Explanation) -> str:
    proof = "proven by a majority" if found.proven else "not proven: no majority told the same"
    lines = [
        f"table {found.table}, owner {one_line(bytes_text(found.owner))}",
        f"bucket {found.bucket}, storage group {found.storage_group}, cold group {found.cold_group}",
        f"version {found.version} ({proof})",
    ]
    if found.open_entry is not None:
        lines.append(f"entry {found.open_entry} is open: accepted somewhere, not known to be chosen")
    if found.wiped_version:
        lines.append(f"delete_timeline: everything up to version {found.wiped_version} is deleted")
    if found.retention:
        horizon = "nothing has expired yet: the sink moves the horizon"
        if found.horizon is not None:
            horizon = f"what is older than {found.horizon} ({_when(found.horizon, found)}) has expired"
        lines.append(f"retention {_span(found.retention, found)}; {horizon}")
    lines.append(f"sinks after {_span(found.cold_after, found)}, windows of {_span(found.window, found)}")
    lines.append(f"read through {', '.join(found.cache_nodes) or 'the storage nodes, as there is no cache node'}")
    return "\n".join(lines)


def _replicas(found: Explanation) -> str:
    headings = ["replica", "state", "version", "open entry", "reason"]
    if found.items:
        headings.insert(4, "rows of it")
    rows = []
    for replica in found.replicas:
        row = [
            replica.node,
            replica.state,
            "" if replica.version is None else str(replica.version),
            "yes" if replica.has_open_entry else "",
            one_line(replica.reason),
        ]
        if found.items:
            row.insert(4, "" if replica.rows is None else str(replica.rows))
        rows.append(row)
    return table_of(headings, rows)


def _windows(found: Explanation) -> str:
    if not found.windows:
        return "storage tier: no rows"
    headings = ["storage tier, from", "to", "items", "deletions", "hidden rows", "bytes", "last written"]
    rows = [
        [
            _when(window.start, found),
            _when(window.end, found),
            f"{window.items:,}",
            f"{window.tombstones:,}",
            f"{window.hidden:,}",
            in_words.size(window.nbytes),
            in_words.instant(window.last_written_us),
        ]
        for window in found.windows[-_SHOWN_WINDOWS:]
    ]
    left_out = len(found.windows) - len(rows)
    older = f"\nand {left_out:,} older windows (--json has them)" if left_out else ""
    return table_of(headings, rows) + older + ("\nand more than can be counted" if found.windows_left_out else "")


def _links(found: Explanation) -> str:
    if not found.links:
        return "cold tier: no link names this owner"
    headings = ["cold tier, from", "to", "generation", "run", "rows", "evicts to", "file", "offset", "bytes", "copies"]
    rows = [row for link in found.links[:_SHOWN_WINDOWS] for row in _link_rows(link, found)]
    left_out = max(0, len(found.links) - _SHOWN_WINDOWS) + found.links_left_out
    return table_of(headings, rows) + (f"\nand {left_out:,} older links" if left_out else "")


def _link_rows(link: LinkView, found: Explanation) -> list[list[str]]:
    start = [
        _when(link.window_start, found),
        _when(link.window_end, found) + ("" if link.live else " (expired)"),
        str(link.generation),
        link.run,
        f"{link.rows:,}",
        f"version {link.sunk_version}" if link.sunk_version else "nothing",
    ]
    if not link.blocks:
        return [[*start, "none of its blocks has items of this owner", "", "", ""]]
    return [
        [
            *(start if not number else [""] * len(start)),
            block.file,
            f"{block.offset:,}",
            f"{block.length:,}",
            _copies(block),
        ]
        for number, block in enumerate(link.blocks)
    ]


def _copies(block: BlockView) -> str:
    """`intact on cold-0-0 (disk 0), ...`, the same states together."""
    by_state: dict[str, list[str]] = {}
    for copy in block.copies:
        by_state.setdefault(copy.state, []).append(copy.node + ("" if copy.disk is None else f" (disk {copy.disk})"))
    return "; ".join(f"{state}: {', '.join(nodes)}" for state, nodes in by_state.items()) or "not asked for"


def _item(item: ItemView, found: Explanation) -> str:
    name = f"item {item.timestamp} ({_when(item.timestamp, found)})" + (
        f", id {one_line(bytes_text(item.id))}" if item.id else ""
    )
    lines = [f"{name}: {item.state}", f"  tier: {item.tier}: {item.reason}"]
    if item.version is not None and item.written_us is not None:
        lines.append(
            f"  version {item.version}, written {in_words.instant(item.written_us)}, {item.size_bytes:,} bytes"
        )
    lines.append(f"  may sink: {item.may_sink}")
    if item.may_sink_at_us is not None and item.may_sink_at_us <= found.asked_at_us and found.next_sink.waits:
        lines.append(f"  waits for: {found.next_sink.waits}")
    if item.not_evicted_at:
        lines.append(f"  not evicted yet at {', '.join(item.not_evicted_at)}")
    lines += [
        f"  block: {block.file} at {block.offset:,}, {block.length:,} bytes: {_copies(block)}" for block in item.blocks
    ]
    lines += [
        f"  {row.kind} of version {row.version}, written {in_words.instant(row.written_us)}, in {row.place}: {row.fate}"
        for row in item.rows[:_SHOWN_ROWS]
    ]
    return "\n".join(lines)


def _sink(sink: SinkOutlook) -> str:
    lines = [f"next sink: {_next(sink)}"]
    if sink.reason:
        lines.append(f"  {one_line(sink.reason)}")
    if sink.last_run:
        ended = f", ended {in_words.instant(sink.last_ended_us)}" if sink.last_ended_us is not None else ""
        lines.append(f"  last run {sink.last_run}: {sink.last_state}{ended}")
    lines.append(f"  last error: {one_line(sink.last_error) or 'none'}")
    return "\n".join(lines)


def _next(sink: SinkOutlook) -> str:
    when = "" if sink.next_at_us is None else f", at {in_words.instant(sink.next_at_us)}"
    return (sink.schedule or "not known") + when


def _when(timestamp: int, found: Explanation) -> str:
    return in_words.instant(timestamp * 1_000_000 // found.per_second)


def _span(units: int, found: Explanation) -> str:
    return in_words.duration(units / found.per_second)
