"""Why is this timeline as it is, and where are its items? *Pure* (a script, see `effects.py`).

All replicas of the storage group are asked at the same time for the state of the timeline and for its rows at the
instant in question; the one that is furthest then tells of windows and cold links. Cold nodes are asked for one byte of
each file, which tells whether it is there and on which disk, and for the whole blocks that may hold the items, which
are checked. Nothing is changed, but that a damaged block joins the repair queue of its node, as with any read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import google_crc32c

from .client.view import View
from .cold.block import DecodedBlock, decode_block
from .effects import Call, CallFailed, Script
from .errors import Corrupt, InvalidRequest, Unavailable
from .explaining_items import ColdRow, item_view
from .explanation import (
    AGREES,
    DAMAGED,
    INTACT,
    LAGS,
    MISSING,
    NO_ANSWER,
    PRESENT,
    BlockView,
    CopyView,
    Explanation,
    ItemView,
    LinkView,
    ReplicaView,
    WindowView,
)
from .keys import MIN_TIMESTAMP, bucket_of, item_key, timeline_key, timestamp_floor
from .memory.votes import PROVEN, Verdict, Votes
from .messages import (
    COUNTS,
    NO_BALLOT,
    NO_ROWS,
    ROWS,
    AskTimeline,
    BlockBytes,
    BlockFacts,
    BlockRead,
    Failure,
    FilePiece,
    FileRead,
    LinkFacts,
    Message,
    TimelineFacts,
    WindowFacts,
)

MAX_FILES = 64  # of which cold nodes are asked, newest windows first
MAX_ITEM_BLOCKS = 16  # that are read for the items of one instant
MAX_ANSWERS = 500  # about the rows of one timeline: 10 million rows
_CALL_TIMEOUT_S = 10.0
_QUIET_S = 1.0  # a node that does not even say that it is there is given up after twice as long
_MISSING = "missing"  # `reason` of a cold node's Corrupt


@dataclass(slots=True)
class _Told:
    """What the replicas told. `best`: of them, first of those that are furthest."""

    order: list[str]
    facts: dict[str, TimelineFacts]
    reasons: dict[str, str]
    verdict: Verdict
    best: str


@dataclass(slots=True)
class _Cold:
    """Copies of the blocks that were read for the items, and the rows of the owner in these."""

    copies: dict[tuple[str, int], list[CopyView]] = field(default_factory=dict)
    rows: list[ColdRow] = field(default_factory=list)
    unread: list[BlockFacts] = field(default_factory=list)
    silent: dict[str, CallFailed] = field(default_factory=dict)  # nodes that did not answer: they are not asked again

    def ask(self, nodes: Sequence[str], message: Message) -> Script[list[Message | CallFailed]]:
        """Answers of cold nodes to one question, in their order."""
        asked = [node for node in nodes if node not in self.silent]
        answers = yield [Call(node, message, _CALL_TIMEOUT_S, _QUIET_S) for node in asked]
        told: dict[str, Message | CallFailed] = dict(zip(asked, answers, strict=True))
        self.silent |= {node: answer for node, answer in told.items() if isinstance(answer, CallFailed)}
        return [told[node] if node in told else self.silent[node] for node in nodes]


def explain(
    view: View, table: str, owner: bytes, timestamp: int | None, item_id: bytes | None, *, now_us: int
) -> Script[Explanation]:
    """Explain the timeline of an owner, and its items at `timestamp` (those of all ids with `item_id` None).

    `now_us`: microseconds since 1970. Raises InvalidRequest for a table that there is not, or an owner of whom nothing
    was ever written; Unavailable when no replica of the timeline's group answers.
    """
    policy = view.routing.policy(table)
    timeline = timeline_key(table.encode(), owner, view.routing.topology.buckets)
    low, high = (b"", b"") if timestamp is None else _bounds(timestamp, item_id)
    told = yield from _ask_replicas(view, timeline, policy.window, low, high)
    best = told.facts[told.best]
    windows, links, left_out, is_short = yield from _counts(view, timeline, policy.window, told)
    if not best.chosen and told.verdict.state == PROVEN and told.verdict.version == 0 and not links:
        bucket = bucket_of(timeline)
        raise InvalidRequest(
            f"owner {owner!r} has no timeline in table {table!r}: nothing was ever written (bucket {bucket}, storage "
            f"group {view.routing.storage_group_of(bucket)}); check table and owner"
        )
    cold = _Cold()
    if timestamp is not None:
        yield from _read_blocks(view, timeline, owner, best.links, low, high, cold)
    yield from _find_files(view, timeline, links, cold)
    items: list[ItemView] = []
    if timestamp is not None:
        for key in _keys_of(best, cold, low, item_id):
            blocks = [
                (block, cold.copies.get((block.file, block.offset), []))
                for link in best.links
                for block in link.blocks
                if block.low <= key < block.high
            ]
            items.append(item_view(key, told.facts, told.best, cold.rows, blocks, policy, now_us, bool(cold.unread)))
    return Explanation(
        table=table,
        owner=owner,
        asked_at_us=now_us,
        bucket=bucket_of(timeline),
        storage_group=view.routing.storage_group_of(bucket_of(timeline)),
        cold_group=view.routing.cold_group_of(bucket_of(timeline)),
        version=told.verdict.version if told.verdict.state == PROVEN else best.chosen,
        proven=told.verdict.state == PROVEN,
        open_entry=_open_entry(told),
        wiped_version=best.wiped,
        horizon=None if best.horizon == MIN_TIMESTAMP else best.horizon,
        per_second=policy.per_second,
        cold_after=policy.cold_after,
        window=policy.window,
        retention=policy.retention,
        replicas=[_replica_view(node, told, timestamp is not None) for node in told.order],
        cache_nodes=view.routing.cache_order(timeline),
        windows=[_window_view(window) for window in windows],
        windows_left_out=is_short,
        links=[_link_view(link, best.horizon, cold) for link in links],
        links_left_out=left_out,
        items=items,
    )


def _bounds(timestamp: int, item_id: bytes | None) -> tuple[bytes, bytes]:
    """Item keys of an instant: low <= key < high."""
    if item_id is None:
        return timestamp_floor(timestamp), timestamp_floor(timestamp + 1)
    key = item_key(timestamp, item_id)
    return key, key + b"\xff"


# ---------------------------------------------------------------- storage nodes


def _ask_replicas(view: View, timeline: bytes, window: int, low: bytes, high: bytes) -> Script[_Told]:
    """Ask all replicas of the group. Raises Unavailable if none answers."""
    order = view.routing.storage_order(timeline)
    message = AskTimeline(timeline, window, ROWS if high else NO_ROWS, low, high)
    answers = yield [Call(node, message, _CALL_TIMEOUT_S, _QUIET_S) for node in order]
    facts: dict[str, TimelineFacts] = {}
    reasons: dict[str, str] = {}
    votes = Votes(len(order))
    for node, answer in zip(order, answers, strict=True):
        if isinstance(answer, TimelineFacts):
            facts[node] = answer
            votes.add(node, answer.chosen, answer.open if answer.open != NO_BALLOT else None)
        else:
            reasons[node] = _why_not(answer)
    if not facts:
        told = "; ".join(f"{node}: {reason}" for node, reason in reasons.items())
        raise Unavailable(f"no replica of the timeline's storage group answers ({told})")
    best = max(facts, key=lambda node: (facts[node].chosen, facts[node].system_version))
    return _Told(order, facts, reasons, votes.verdict(), best)


def _counts(
    view: View, timeline: bytes, window: int, told: _Told
) -> Script[tuple[list[WindowFacts], list[LinkFacts], int, bool]]:
    """Rows by window and links, those left out, and whether windows are missing, from the furthest replica that goes
    on answering. Raises Unavailable."""
    reason = ""
    for node in sorted(told.facts, key=lambda node: node != told.best):
        windows: list[WindowFacts] = []
        links: list[LinkFacts] = []
        left_out, low = 0, b""
        for number in range(MAX_ANSWERS):
            question = AskTimeline(timeline, window, COUNTS, low)
            (answer,) = yield [Call(node, question, _CALL_TIMEOUT_S, _QUIET_S)]
            if not isinstance(answer, TimelineFacts):
                reason = f"{node}: {_why_not(answer)}"
                break
            if not number:
                links, left_out = answer.links, answer.links_left_out
            _append(windows, answer.windows)
            if not answer.next:
                return windows, links, left_out, False
            if answer.next <= low:
                reason = f"{node}: an answer that does not go on"
                break
            low = answer.next
        else:
            return windows, links, left_out, True
    raise Unavailable(f"the rows of the timeline can't be counted ({reason})")


def _append(windows: list[WindowFacts], more: Sequence[WindowFacts]) -> None:
    """Windows of the next answer; its first one may go on with the last one."""
    for window in more:
        if windows and windows[-1].start == window.start:
            last = windows[-1]
            last.items += window.items
            last.tombstones += window.tombstones
            last.hidden += window.hidden
            last.nbytes += window.nbytes
            last.newest = window.newest
            last.first_written = min(last.first_written, window.first_written)
            last.last_written = max(last.last_written, window.last_written)
        else:
            windows.append(window)


def _open_entry(told: _Told) -> int | None:
    """An entry after the proven version that somebody has accepted."""
    verdict = told.verdict
    known = verdict.version if verdict.state == PROVEN else told.facts[told.best].chosen
    opened = [facts.chosen + 1 for facts in told.facts.values() if facts.open != NO_BALLOT]
    return max((entry for entry in opened if entry > known), default=None)


def _replica_view(node: str, told: _Told, with_rows: bool) -> ReplicaView:
    facts = told.facts.get(node)
    if facts is None:
        return ReplicaView(node, NO_ANSWER, None, False, None, told.reasons[node])
    known = told.verdict.version if told.verdict.state == PROVEN else told.facts[told.best].chosen
    is_open = facts.open != NO_BALLOT
    rows = len(facts.rows) if with_rows else None
    if facts.chosen >= known:
        return ReplicaView(node, AGREES, facts.chosen, is_open, rows, "")
    if is_open and facts.chosen + 1 == known:
        return ReplicaView(
            node, AGREES, facts.chosen, is_open, rows, f"has entry {known}, not yet told that it is chosen"
        )
    return ReplicaView(node, LAGS, facts.chosen, is_open, rows, f"{known - facts.chosen} entries behind")


def _window_view(window: WindowFacts) -> WindowView:
    return WindowView(
        window.start,
        window.end,
        window.items,
        window.tombstones,
        window.hidden,
        window.nbytes,
        window.oldest,
        window.newest,
        window.first_written,
        window.last_written,
    )


# ---------------------------------------------------------------- cold nodes


def _read_blocks(
    view: View, timeline: bytes, owner: bytes, links: Sequence[LinkFacts], low: bytes, high: bytes, cold: _Cold
) -> Script[None]:
    """Read the blocks that may hold items between the bounds from every replica."""
    wanted = [
        (link, block) for link in links for block in link.blocks if block.low < high and (not low or block.high > low)
    ]
    for link, block in wanted[:MAX_ITEM_BLOCKS]:
        nodes = view.routing.cold_order(bucket_of(timeline), link.window_start)
        message = BlockRead(block.file, block.offset, block.length, block.crc)
        answers = yield from cold.ask(nodes, message)
        decoded: DecodedBlock | None = None
        copies = []
        for node, answer in zip(nodes, answers, strict=True):
            copy = _copy_read(node, block, answer)
            copies.append(copy)
            if copy.state == INTACT and decoded is None and isinstance(answer, BlockBytes):
                decoded = decode_block(answer.data, link.format)
        cold.copies[block.file, block.offset] = copies
        if decoded is None:
            cold.unread.append(block)
            continue
        keys, values, versions, written = decoded.rows_of(owner, low, high)
        cold.rows += [
            ColdRow(key, version, written_us, len(value), f"{block.file} at {block.offset}")
            for key, value, version, written_us in zip(keys, values, versions, written, strict=True)
        ]
    cold.unread += [block for _, block in wanted[MAX_ITEM_BLOCKS:]]


def _copy_read(node: str, block: BlockFacts, answer: Message | CallFailed) -> CopyView:
    """State of a copy whose bytes were asked for."""
    if isinstance(answer, BlockBytes):
        if len(answer.data) == block.length and google_crc32c.value(answer.data) == block.crc:
            return CopyView(node, INTACT, None, "")
        return CopyView(node, DAMAGED, None, "the bytes that came have another checksum")
    if isinstance(answer, Failure) and answer.kind == Corrupt.__name__:
        state = MISSING if answer.fields.get("reason") == _MISSING else DAMAGED
        return CopyView(node, state, None, answer.message)
    return CopyView(node, NO_ANSWER, None, _why_not(answer))


def _find_files(view: View, timeline: bytes, links: Sequence[LinkFacts], cold: _Cold) -> Script[None]:
    """Ask every cold node of the group for each file: is it there, and on which disk?"""
    group = view.routing.cold_group_of(bucket_of(timeline))
    topology = view.routing.topology
    nodes = [topology.cold_node(group, replica) for replica in range(topology.cold_replicas)]
    blocks = [block for link in links for block in link.blocks]
    files = list(dict.fromkeys(block.file for block in blocks))[:MAX_FILES]
    found: dict[str, list[CopyView]] = {}
    for file in files:
        answers = yield from cold.ask(nodes, FileRead(file, 0, 1))
        found[file] = [_copy_found(node, answer) for node, answer in zip(nodes, answers, strict=True)]
    for block in blocks:
        if block.file not in found:
            continue
        place = block.file, block.offset
        disks = {copy.node: copy.disk for copy in found[block.file]}
        read = cold.copies.get(place)
        cold.copies[place] = found[block.file] if read is None else [replace(c, disk=disks.get(c.node)) for c in read]


def _copy_found(node: str, answer: Message | CallFailed) -> CopyView:
    """State of a copy of a file of which one byte was asked for."""
    if isinstance(answer, FilePiece):
        return CopyView(node, PRESENT, answer.disk, "")
    if isinstance(answer, Failure) and answer.kind == Corrupt.__name__:
        return CopyView(node, MISSING, None, answer.message)
    return CopyView(node, NO_ANSWER, None, _why_not(answer))


def _link_view(link: LinkFacts, horizon: int, cold: _Cold) -> LinkView:
    blocks = [
        BlockView(b.file, b.offset, b.length, b.crc, b.rows, cold.copies.get((b.file, b.offset), []))
        for b in link.blocks
    ]
    return LinkView(
        link.window_start,
        link.window_end,
        link.generation,
        link.run,
        link.rows,
        link.raw_bytes,
        link.window_end > horizon,
        max((version for version, _, _ in link.rules), default=0),
        blocks,
    )


def _keys_of(best: TimelineFacts, cold: _Cold, low: bytes, item_id: bytes | None) -> list[bytes]:
    """Keys of the items that there are; of the one that was asked for, or that has no id, if there is none."""
    keys = sorted({row.key for row in best.rows} | {row.key for row in cold.rows})
    if keys:
        return keys
    return [low if item_id is not None else low + item_key(0)[8:]]


def _why_not(answer: Message | CallFailed) -> str:
    if isinstance(answer, Failure):
        return answer.message
    if isinstance(answer, CallFailed):
        return answer.reason
    return f"it answered with {type(answer).__name__}"
