"""Calls to cold nodes that the sink makes: blocks read, disks chosen, files copied. *Pure* (scripts)."""

from __future__ import annotations

from collections.abc import Sequence

import xxhash

from .. import errors
from ..client.view import View
from ..effects import Call, CallFailed, Script, Sleep
from ..errors import Corrupt, TimeTierError, Unavailable, VersionConflict
from ..messages import DISK_SERVES, AskDisks, BlockBytes, BlockRead, Disks, Failure, FileWrite, FileWritten, unpack_i64
from .block import DecodedBlock, decode_block, verify
from .link import Block, Link
from .sink_calls import SinkSettings, rest, why_not

_AS_EMPTY = 0.95  # disks that have so much of the greatest room share the files


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


def choose_disk(view: View, nodes: Sequence[str], file: str, size: int, settings: SinkSettings) -> Script[int]:
    """Ordinal of the disk for a file of `size` bytes: one that serves on all of `nodes`, with most room.

    The room of an ordinal is the least of the nodes'. Ordinals with about as much share the files by name, so that
    equal disks are worked equally. Raises Unavailable, which names each node and what is wrong with its disks.
    """
    answers = yield [Call(node, AskDisks(), settings.call_timeout_s) for node in nodes]
    room: dict[int, int] = {}
    wrong: list[str] = []
    for at, (node, answer) in enumerate(zip(nodes, answers, strict=True)):
        if not isinstance(answer, Disks) or len(answer.free) != 8 * len(answer.states):
            raise Unavailable(f"{node} does not tell how its disks are: {why_not(answer)}")
        free = unpack_i64(answer.free)
        reasons = [*answer.reasons, *[""] * len(free)]
        serving = {disk: free[disk] for disk, state in enumerate(answer.states) if state == DISK_SERVES}
        wrong += [f"{node} disk-{disk}: {reasons[disk]}" for disk in range(len(free)) if disk not in serving]
        room = serving if not at else {disk: min(room[disk], serving[disk]) for disk in room if disk in serving}
    if not room:
        raise Unavailable(f"no disk serves on all of {', '.join(nodes)} ({'; '.join(wrong) or 'they have none'})")
    most = max(room.values())
    if most < size:
        least = f"the emptiest has {most >> 20} MiB" + (f"; {'; '.join(wrong)}" if wrong else "")
        raise Unavailable(f"no disk has room for {file} of {size >> 20} MiB on all of {', '.join(nodes)} ({least})")
    fit = sorted(disk for disk, free in room.items() if free >= _AS_EMPTY * most)
    return fit[xxhash.xxh3_64_intdigest(file.encode()) % len(fit)]


def copy_to_node(
    view: View, node: str, file: str, disk: int, data: bytes, crc: int, epoch: int, settings: SinkSettings
) -> Script[None]:
    """Write a file to a cold node. Returns when the node has it on disk, verified.

    Raises VersionConflict when a run of a later epoch has been there, else Unavailable or what it was refused for.
    """
    error: TimeTierError = Unavailable(f"{node}: not tried")
    for attempt in range(settings.attempts):
        if attempt:
            yield Sleep(settings.back_off_s * 2 ** (attempt - 1))
        try:
            yield from _copy(view, node, file, disk, data, crc, epoch, settings)
            return
        except VersionConflict:
            raise
        except TimeTierError as failed:
            error = failed
    raise error


def _copy(
    view: View, node: str, file: str, disk: int, data: bytes, crc: int, epoch: int, settings: SinkSettings
) -> Script[None]:
    for offset in range(0, len(data), settings.piece_bytes):
        piece = data[offset : offset + settings.piece_bytes]
        last = offset + len(piece) == len(data)
        message = FileWrite(file, disk, offset, piece, last, crc, epoch)
        # The last answer comes after an fsync of the whole file.
        timeout_s = settings.call_timeout_s * (3 if last else 1)
        began_s = view.now()
        (answer,) = yield [Call(node, message, timeout_s)]
        if isinstance(answer, Failure):
            kind = getattr(errors, answer.kind, Unavailable)
            raise kind(f"{node}: {answer.message}", **answer.fields)
        if not isinstance(answer, FileWritten):
            raise Unavailable(f"{node}: {why_not(answer)}")
        if last and (answer.size, answer.crc) != (len(data), crc):
            raise Corrupt(f"{node} has {answer.size} bytes of {file} with checksum {answer.crc:08x}, not {crc:08x}")
        yield from rest(view, began_s, settings)
