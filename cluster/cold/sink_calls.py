"""Calls to storage and cold nodes that the sink makes, each with its fail-over. *Pure* (scripts, see `effects.py`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..client.view import View
from ..config import SinkConfig
from ..effects import Call, CallFailed, Script, Sleep
from ..errors import InvalidRequest, ProtocolError, TimeTierError, Unavailable
from ..keys import MIN_TIMESTAMP, is_internal, item_key, system_timeline
from ..messages import (
    OK,
    POINT,
    PUT,
    RANGE,
    AskTables,
    AskVersions,
    Check,
    Checked,
    Failure,
    Message,
    Settle,
    Settled,
    Tables,
    Versions,
    pack_i64,
    pack_u32,
    unpack_i64,
)
from .block import BLOCK_RAW_BYTES
from .link import FENCE_KEY, HORIZON_PREFIX, RECORDS_AT, Link, decode_link
from .pacing import NO_LIMITS, Limits

M = TypeVar("M", bound=Message)

_RECORDS_PREFIX = item_key(RECORDS_AT)[:8]
_LINKS_A_PAGE = 64
_BUCKETS_AT_ONCE = 16
_OWNERS_AT_ONCE = 1_000
_MIB = 1 << 20
_NO_ITEM = item_key(MIN_TIMESTAMP)
_LONGEST_REST_S = 5.0  # a node that hangs has no load to be spared


@dataclass(frozen=True, slots=True)
class SinkSettings:
    """Settings of the sink.

    `block_rows`, `block_bytes`: rows of a block at most, and their bytes before encoding. `file_bytes`: size after
    which another file is begun (a bucket's blocks stay together, so a file may exceed it). `orphan_grace_s`: age from
    which an unreferenced file is removed. `scan_bytes`: rows that a storage node sends in one answer, about.
    `bucket_bytes`: rows of one bucket that are held in memory; a larger bucket sinks in parts. `piece_bytes`: a piece
    of a file on its way to a cold node. `call_timeout_s`: for one answer of one node; `write_timeout_s`: for the links,
    with all retries. `attempts`: how often a node, or a list of nodes, is tried. `rest`: after each answer with rows,
    and each piece of a file, the sink rests for so many times as long as that took, and the nodes are there for others.
    `limits`: rates that it keeps to beside that.

    `min_block_bytes`: a window with fewer eligible bytes waits, if its table has patience (`TableSink.patience`).
    `min_live_share`: a file of which less is alive is rewritten, at most `rewrite_bytes` of live blocks in a run.
    `merge_files`: so many files of one table and group, of a like size below `file_bytes` / 4, become one.
    """

    block_rows: int = 4_096
    block_bytes: int = BLOCK_RAW_BYTES
    file_bytes: int = 64 << 20
    orphan_grace_s: float = 600.0
    scan_bytes: int = 1 << 20
    bucket_bytes: int = 128 << 20
    piece_bytes: int = 1 << 20
    call_timeout_s: float = 10.0
    write_timeout_s: float = 30.0
    attempts: int = 3
    back_off_s: float = 0.2
    rest: float = 0.0
    limits: Limits = NO_LIMITS
    min_block_bytes: int = 0
    min_live_share: float = 0.5
    rewrite_bytes: int = 1 << 30
    merge_files: int = 8


def settings_of(config: SinkConfig) -> SinkSettings:
    """The sink's settings from the configuration; what is not in it has its default."""
    return SinkSettings(
        block_rows=config.block_rows,
        block_bytes=config.block_kb << 10,
        file_bytes=config.file_mb << 20,
        orphan_grace_s=config.orphan_grace,
        rest=config.rest,
        limits=Limits(
            storage_bytes_per_s=(config.storage_mb_per_s or 0) * _MIB,
            storage_reads_per_s=config.storage_reads_per_s or 0,
            cold_bytes_per_s=(config.cold_mb_per_s or 0) * _MIB,
            cold_writes_per_s=config.cold_writes_per_s or 0,
        ),
        min_block_bytes=config.min_block_kb << 10,
        min_live_share=config.min_live_share,
        rewrite_bytes=config.rewrite_mb << 20,
        merge_files=config.merge_files,
    )


def ask_first(
    view: View, nodes: Sequence[str], message: Message, want: type[M], settings: SinkSettings, *, attempts: int = 0
) -> Script[tuple[str, M]]:
    """(node, answer) of the first node that answers as wanted. Raises Unavailable with the last reason.

    Nodes that failed lately are asked last. A refusal that other nodes would repeat is raised as it is.
    """
    reason = "there is no node to ask"
    for attempt in range(attempts or settings.attempts):
        if attempt:
            yield Sleep(settings.back_off_s * 2 ** (attempt - 1))
        for node in sorted(nodes, key=view.is_suspect):
            (answer,) = yield [Call(node, message, settings.call_timeout_s)]
            if isinstance(answer, want):
                view.trust(node)
                return node, answer
            reason = f"{node}: {why_not(answer)}"
            if isinstance(answer, CallFailed):
                view.suspect(node)
            elif isinstance(answer, Failure) and answer.kind in ("InvalidRequest", "TooLarge"):
                raise InvalidRequest(reason)
    raise Unavailable(f"no answer to {type(message).__name__} ({reason})")


def rest(view: View, began_s: float, settings: SinkSettings) -> Script[None]:
    """Pause after work that began at `began_s` (monotonic seconds), as the settings say."""
    if settings.rest:
        yield Sleep(min(settings.rest * (view.now() - began_s), _LONGEST_REST_S))


def why_not(answer: object) -> str:
    """Why an answer is not what was wanted, in words."""
    if isinstance(answer, Failure):
        return answer.message
    if isinstance(answer, CallFailed):
        return answer.reason
    return f"it answered with {type(answer).__name__}"


def tables_in_use(view: View, settings: SinkSettings) -> Script[list[bytes]]:
    """Tables of applications that have rows or cold links anywhere, sorted. Raises Unavailable."""
    names: set[bytes] = set()
    routing = view.routing
    for group in range(routing.topology.storage_groups):
        bucket = 0
        while bucket >= 0:
            question = AskTables(bucket)
            _, answer = yield from ask_first(view, routing.storage_nodes(group), question, Tables, settings)
            names.update(answer.names)
            bucket = answer.next_bucket
    return sorted(name for name in names if not is_internal(name))


def strong_versions(
    view: View, nodes: Sequence[str], timelines: list[bytes], settings: SinkSettings
) -> Script[dict[bytes, int]]:
    """For each timeline a version that nothing acknowledged before this call exceeds.

    A majority of the replicas is asked (DESIGN: strong read). Where one of them has an open entry, that entry may
    have been chosen: a replica settles it first. Raises Unavailable.
    """
    floors = dict.fromkeys(timelines, 0)
    opened: set[bytes] = set()
    needed = len(nodes) // 2 + 1
    waiting = sorted(nodes, key=view.is_suspect)
    while needed:
        if len(waiting) < needed:
            raise Unavailable("no majority of the replicas tells its versions")
        asked, waiting = waiting[:needed], waiting[needed:]
        answers = yield [Call(node, AskVersions(timelines), settings.call_timeout_s) for node in asked]
        for node, answer in zip(asked, answers, strict=True):
            if not isinstance(answer, Versions) or len(answer.chosen) != 8 * len(timelines):
                view.suspect(node)
                continue
            needed -= 1
            chosen = unpack_i64(answer.chosen)
            for part in answer.opens:
                if 0 <= part.index < len(chosen):
                    chosen[part.index] += 1
                    opened.add(timelines[part.index])
            for timeline, version in zip(timelines, chosen, strict=True):
                floors[timeline] = max(floors[timeline], version)
    if opened:
        floors.update((yield from _settle(view, nodes, sorted(opened), floors, settings)))
    return floors


def _settle(
    view: View, nodes: Sequence[str], timelines: list[bytes], floors: dict[bytes, int], settings: SinkSettings
) -> Script[dict[bytes, int]]:
    """Versions of timelines whose open entries could be settled; the others stay as they were found."""
    entries = pack_i64([floors[timeline] for timeline in timelines])
    message = Settle(timelines, entries, int(settings.call_timeout_s * 900))
    try:
        _, answer = yield from ask_first(view, nodes, message, Settled, settings, attempts=1)
    except TimeTierError:
        return {}  # these timelines are left for the next run
    versions = unpack_i64(answer.versions)
    if not len(versions) == len(answer.outcomes) == len(timelines):
        return {}
    found = zip(timelines, answer.outcomes, versions, strict=True)
    return {timeline: version for timeline, outcome, version in found if outcome == OK}


def wiped_versions(
    view: View, nodes: Sequence[str], timelines: list[bytes], settings: SinkSettings
) -> Script[dict[bytes, int]]:
    """For each timeline the version up to which it is wiped, by an answer that no acknowledged wipe is missing from.

    A majority says which version each has at least, and a replica that has applied it says how far it is wiped.
    Raises Unavailable.
    """
    found: dict[bytes, int] = {}
    for start in range(0, len(timelines), _OWNERS_AT_ONCE):
        part = timelines[start : start + _OWNERS_AT_ONCE]
        floors = yield from strong_versions(view, nodes, part, settings)
        for node in sorted(nodes, key=view.is_suspect):
            part = [timeline for timeline in part if timeline not in found]
            if not part:
                break
            count = len(part)
            message = Check(part, pack_i64([-1] * count), bytes((POINT,)) * count, [_NO_ITEM] * count, bytes(4 * count))
            (answer,) = yield [Call(node, message, settings.call_timeout_s)]
            if not isinstance(answer, Checked) or not len(answer.wiped) == len(answer.chosen) == 8 * count:
                continue
            answers = zip(part, unpack_i64(answer.chosen), unpack_i64(answer.wiped), strict=True)
            found.update({timeline: wiped for timeline, chosen, wiped in answers if chosen >= floors[timeline]})
        if not found.keys() >= set(part):
            raise Unavailable("no replica that is current tells which timelines were wiped")
    return found


def strong_links(view: View, buckets: Sequence[int], settings: SinkSettings) -> Script[dict[int, list[Link]]]:
    """Links of many buckets, of all tables; no acknowledged one is missing. Raises Unavailable, ProtocolError."""
    floors: dict[int, int] = {}
    by_group: dict[int, list[int]] = {}
    for bucket in buckets:
        by_group.setdefault(view.routing.storage_group_of(bucket), []).append(bucket)
    for group, its in by_group.items():
        for start in range(0, len(its), _OWNERS_AT_ONCE):
            part = its[start : start + _OWNERS_AT_ONCE]
            timelines = [system_timeline(bucket) for bucket in part]
            found = yield from strong_versions(view, view.routing.storage_nodes(group), timelines, settings)
            floors.update({bucket: found[timeline] for bucket, timeline in zip(part, timelines, strict=True)})
    return (yield from links_since(view, floors, settings))


def links_since(view: View, floors: Mapping[int, int], settings: SinkSettings) -> Script[dict[int, list[Link]]]:
    """Links of many buckets, of all tables, as of these versions of their system timelines or later.

    Raises Unavailable, ProtocolError.
    """
    links: dict[int, list[Link]] = {}
    buckets = [bucket for bucket, floor in floors.items() if floor]
    for start in range(0, len(buckets), _BUCKETS_AT_ONCE):
        part = buckets[start : start + _BUCKETS_AT_ONCE]
        timelines = [system_timeline(bucket) for bucket in part]
        nodes = [min(view.routing.storage_order(timeline), key=view.is_suspect) for timeline in timelines]
        answers = yield [
            Call(node, _links_question(timeline, b""), settings.call_timeout_s)
            for node, timeline in zip(nodes, timelines, strict=True)
        ]
        for bucket, node, answer in zip(part, nodes, answers, strict=True):
            try:
                found, more = _links_in(node, answer, floors[bucket])
            except (Unavailable, ProtocolError):
                found, more = [], b"another replica may do better"
            links[bucket] = found if not more else (yield from read_links(view, bucket, floors[bucket], settings))
    return {bucket: links.get(bucket, []) for bucket in floors}


def read_links(view: View, bucket: int, version: int, settings: SinkSettings) -> Script[list[Link]]:
    """All links of a bucket, of all tables, as of `version` of its system timeline or later.

    One replica that has applied that version is enough, because it is only asked what was there at that version.
    Raises Unavailable, ProtocolError.
    """
    timeline = system_timeline(bucket)
    reason = ""
    for node in sorted(view.routing.storage_order(timeline), key=view.is_suspect):
        try:
            return (yield from _read_links_of(node, timeline, version, settings))
        except (Unavailable, ProtocolError) as error:
            reason = error.message
    raise Unavailable(f"the links of bucket {bucket} can't be read ({reason})")


def _read_links_of(node: str, timeline: bytes, version: int, settings: SinkSettings) -> Script[list[Link]]:
    links: list[Link] = []
    before = b""
    while True:
        (answer,) = yield [Call(node, _links_question(timeline, before), settings.call_timeout_s)]
        found, floor = _links_in(node, answer, version)
        links += found
        if not floor:
            return links
        if before and floor >= before:
            raise ProtocolError(f"{node}: a range that does not go on")
        before = floor


def _links_question(timeline: bytes, before: bytes) -> Check:
    return Check([timeline], pack_i64([-1]), bytes((RANGE,)), [before], pack_u32([_LINKS_A_PAGE]))


def _links_in(node: str, answer: Message | CallFailed, version: int) -> tuple[list[Link], bytes]:
    """Links of a page of a system timeline, and where the next page begins, b"" at the end."""
    if not isinstance(answer, Checked):
        raise Unavailable(f"{node}: {why_not(answer)}")
    if (
        answer.payloads != bytes((RANGE,))
        or len(answer.floors) != 1
        or len(answer.chosen) != 8
        or len(answer.keys) != len(answer.values)
    ):
        raise ProtocolError(f"{node}: an unfit answer to Check")
    chosen = unpack_i64(answer.chosen)[0]
    if chosen < version or chosen < 0:
        raise Unavailable(f"{node} has not applied version {version} yet")
    rows = zip(answer.keys, answer.kinds, answer.values, strict=True)
    return [decode_link(value) for key, kind, value in rows if kind == PUT and not is_record(key)], answer.floors[0]


def is_record(key: bytes) -> bool:
    """Whether an item of a system timeline is a fence or a horizon, not a link."""
    return key.startswith(_RECORDS_PREFIX)


def horizon_key(table: bytes) -> bytes:
    """Item key of a table's horizon in a system timeline."""
    return item_key(RECORDS_AT, HORIZON_PREFIX + table)


def fence_key() -> bytes:
    """Item key of the fence in a system timeline."""
    return FENCE_KEY
