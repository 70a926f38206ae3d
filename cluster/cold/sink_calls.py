"""Calls to storage and cold nodes that the sink makes, each with its fail-over. *Pure* (scripts, see `effects.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from .. import errors
from ..client.view import View
from ..config import SinkConfig
from ..effects import Call, CallFailed, Script, Sleep
from ..errors import Corrupt, InvalidRequest, ProtocolError, TimeTierError, Unavailable
from ..keys import item_key, system_timeline
from ..messages import (
    OK,
    PUT,
    RANGE,
    AskTables,
    AskVersions,
    BlockBytes,
    BlockRead,
    Check,
    Checked,
    Failure,
    FileWrite,
    FileWritten,
    Message,
    Settle,
    Settled,
    Tables,
    Versions,
    pack_i64,
    pack_u32,
    unpack_i64,
)
from .block import BLOCK_RAW_BYTES, DecodedBlock, decode_block, verify
from .link import FENCE_KEY, HORIZON_PREFIX, RECORDS_AT, Block, Link, decode_link

M = TypeVar("M", bound=Message)

_RECORDS_PREFIX = item_key(RECORDS_AT)[:8]
_LINKS_A_PAGE = 64
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


def settings_of(config: SinkConfig) -> SinkSettings:
    """The sink's settings from the configuration; what is not in it has its default."""
    return SinkSettings(
        block_rows=config.block_rows,
        block_bytes=config.block_kb << 10,
        file_bytes=config.file_mb << 20,
        orphan_grace_s=config.orphan_grace,
        rest=config.rest,
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
    """Tables that have rows or cold links anywhere, sorted. Raises Unavailable."""
    names: set[bytes] = set()
    routing = view.routing
    for group in range(routing.topology.storage_groups):
        bucket = 0
        while bucket >= 0:
            question = AskTables(bucket)
            _, answer = yield from ask_first(view, routing.storage_nodes(group), question, Tables, settings)
            names.update(answer.names)
            bucket = answer.next_bucket
    return sorted(names)


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


def read_block(view: View, link: Link, block: Block, settings: SinkSettings) -> Script[DecodedBlock]:
    """A block from whichever cold replica has it intact. Raises Unavailable, Corrupt."""
    message = BlockRead(block.file, block.offset, block.length, block.crc)
    reasons: list[str] = []
    damaged = 0
    nodes = view.routing.cold_order(link.bucket, link.window_start)
    for node in sorted(nodes, key=view.is_suspect):
        (answer,) = yield [Call(node, message, settings.call_timeout_s)]
        if isinstance(answer, BlockBytes):
            try:
                verify(answer.data, block.crc)
                return decode_block(answer.data, link.format)
            except Corrupt as error:
                answer = Failure("Corrupt", error.message)
        damaged += isinstance(answer, Failure) and answer.kind == "Corrupt"
        if isinstance(answer, CallFailed):
            view.suspect(node)
        reasons.append(f"{node}: {why_not(answer)}")
    kind = Corrupt if damaged == len(nodes) else Unavailable
    raise kind(f"no good copy of the block at {block.offset} of {block.file} ({'; '.join(reasons)})")


def copy_file(
    view: View, nodes: Sequence[str], file: str, disk: int, data: bytes, crc: int, settings: SinkSettings
) -> Script[None]:
    """Write a file to one cold node after the other. Returns when all of them have it on disk, verified.

    Raises Unavailable, or what a node refused it for.
    """
    for node in nodes:
        error: TimeTierError = Unavailable(f"{node}: not tried")
        for attempt in range(settings.attempts):
            if attempt:
                yield Sleep(settings.back_off_s * 2 ** (attempt - 1))
            try:
                yield from _copy_to(view, node, file, disk, data, crc, settings)
                break
            except TimeTierError as failed:
                error = failed
        else:
            raise error


def _copy_to(
    view: View, node: str, file: str, disk: int, data: bytes, crc: int, settings: SinkSettings
) -> Script[None]:
    for offset in range(0, len(data), settings.piece_bytes):
        piece = data[offset : offset + settings.piece_bytes]
        last = offset + len(piece) == len(data)
        message = FileWrite(file, disk, offset, piece, last, crc)
        # The last answer comes after an fsync of the whole file.
        timeout_s = settings.call_timeout_s * (3 if last else 1)
        began_s = view.now()
        (answer,) = yield [Call(node, message, timeout_s)]
        if isinstance(answer, Failure):
            kind = getattr(errors, answer.kind, Unavailable)
            raise kind(f"{node}: {answer.message}")
        if not isinstance(answer, FileWritten):
            raise Unavailable(f"{node}: {why_not(answer)}")
        if last and (answer.size, answer.crc) != (len(data), crc):
            raise Corrupt(f"{node} has {answer.size} bytes of {file} with checksum {answer.crc:08x}, not {crc:08x}")
        yield from rest(view, began_s, settings)


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
        message = Check([timeline], pack_i64([-1]), bytes((RANGE,)), [before], pack_u32([_LINKS_A_PAGE]))
        (answer,) = yield [Call(node, message, settings.call_timeout_s)]
        if not isinstance(answer, Checked):
            raise Unavailable(f"{node}: {why_not(answer)}")
        if (
            answer.payloads != bytes((RANGE,))
            or len(answer.floors) != 1
            or len(answer.chosen) != 8
            or len(answer.keys) != len(answer.values)
        ):
            raise ProtocolError(f"{node}: an unfit answer to Check")
        if unpack_i64(answer.chosen)[0] < version:
            raise Unavailable(f"{node} has not applied version {version} yet")
        for key, kind, value in zip(answer.keys, answer.kinds, answer.values, strict=True):
            if kind == PUT and not is_record(key):
                links.append(decode_link(value))
        if not answer.floors[0]:
            return links
        if before and answer.floors[0] >= before:
            raise ProtocolError(f"{node}: a range that does not go on")
        before = answer.floors[0]


def is_record(key: bytes) -> bool:
    """Whether an item of a system timeline is a fence or a horizon, not a link."""
    return key.startswith(_RECORDS_PREFIX)


def horizon_key(table: bytes) -> bytes:
    """Item key of a table's horizon in a system timeline."""
    return item_key(RECORDS_AT, HORIZON_PREFIX + table)


def fence_key() -> bytes:
    """Item key of the fence in a system timeline."""
    return FENCE_KEY
