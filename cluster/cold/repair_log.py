"""What is to be repaired, kept on disk: a log beside the node's disks that a crash can't take with it.

Each line is the CRC32C of the rest, in hex, and a JSON list: ["add", file, offset, length, crc, whole, sure, since],
["fail", file, place, attempts, reason] or ["done", file, place]. A line that is torn or damaged is left out: at worst
a repair is forgotten, and the next read of these bytes, or the scrubber, finds them again. The log is written anew when
most of it is done, so it stays in proportion to what is open. All methods block; one thread at a time calls them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .block import checksum
from .files import Files
from .mending import Repair
from .small_file import read_file, replace_file

LOG_NAME = "repairs.log"
MAX_LOG_BYTES = 16 << 20  # a log that is larger was not written by this program
_SPARE_BYTES = 256 << 10  # of what is done, before it is written anew
_MAX_REASON_CHARS = 500
_CRC_DIGITS = 8

Place = tuple[str, int]
"""(file, offset, or -1 for the file as such), as `Repair.place`."""


@dataclass(slots=True)
class OpenRepair:
    """A repair that is to be done. `since`: seconds since 1970; `attempts`: that failed, the last for `reason`."""

    repair: Repair
    since: float
    attempts: int = 0
    reason: str = ""
    due_s: float = 0.0  # monotonic seconds; not kept


def added(one: OpenRepair) -> bytes:
    """The line of a repair that joins the queue."""
    return _line(["add", *one.repair, one.since])


def failed(one: OpenRepair) -> bytes:
    """The line of a repair that could not be done."""
    return _line(["fail", *one.repair.place, one.attempts, one.reason[:_MAX_REASON_CHARS]])


def done(place: Place) -> bytes:
    """The line of a repair that is over."""
    return _line(["done", *place])


class RepairLog:
    """The log in `folder`. All methods raise OSError."""

    def __init__(self, files: Files, folder: Path) -> None:
        self._files = files
        self._path = folder / LOG_NAME
        self._size = 0
        self._fresh_size = 0  # when it was last written anew

    def read(self) -> list[OpenRepair]:
        """What is open, oldest first."""
        data = read_file(self._files, self._path, MAX_LOG_BYTES)
        found: dict[Place, OpenRepair] = {}
        for line in data.split(b"\n"):
            _apply(found, _parsed(line))
        return list(found.values())

    def is_long(self) -> bool:
        """Whether most of it is about what is done."""
        return self._size > 2 * self._fresh_size + _SPARE_BYTES

    def append(self, lines: Iterable[bytes]) -> None:
        """Make lines durable. After an error, `rewrite` it: its end may be torn."""
        data = b"".join(lines)
        with self._files.open(self._path, create=True) as opened:
            opened.write(data, self._size)
            opened.sync()
        if not self._size:
            self._files.sync_folder(self._path.parent)
        self._size += len(data)

    def rewrite(self, repairs: Iterable[OpenRepair]) -> None:
        """Replace it by one that holds just these."""
        lines = [line for one in repairs for line in ((added(one), failed(one)) if one.attempts else (added(one),))]
        data = b"".join(lines)
        replace_file(self._files, self._path, data)
        self._size = self._fresh_size = len(data)


def _line(record: list[Any]) -> bytes:
    body = json.dumps(record, separators=(",", ":")).encode()
    return b"\n%08x %b\n" % (checksum(body), body)  # a damaged line end takes no other line with it


def _parsed(line: bytes) -> list[Any]:
    """A line's record, [] if it is damaged."""
    body = line[_CRC_DIGITS + 1 :]
    if not body or line[:_CRC_DIGITS] != b"%08x" % checksum(body):
        return []
    record: list[Any] = json.loads(body)
    return record


def _apply(found: dict[Place, OpenRepair], record: list[Any]) -> None:
    match record:
        case ["add", file, offset, length, crc, whole, sure, since]:
            repair = Repair(file, offset, length, crc, whole, sure)
            found[repair.place] = OpenRepair(repair, since)
        case ["fail", file, place, attempts, reason] if (file, place) in found:
            one = found[file, place]
            one.attempts, one.reason = attempts, reason
        case ["done", file, place]:
            found.pop((file, place), None)
