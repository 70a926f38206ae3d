"""Whole copies of files on their way to a cold node's disk: written beside, checked, then put in place.

A copy of a file that is missing, truncated or another one is gathered from the peers (`mending.py`) in
`NAME.copy.part`, apart from what the sink may be writing. It counts only once it has been read back from the disk and
found right. All methods block and raise Unavailable when the disk is out; there is one copy of a file at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import google_crc32c

from .disk import Disk
from .disk_lane import goes_on
from .files import Files
from .pieces import Piece, read_anatomy

SUFFIX = ".copy.part"


@dataclass(frozen=True, slots=True)
class CopyCheck:
    """What is in a copy: bytes, CRC32C of all of them, pieces that are damaged by their own checksums.

    `sealed`: each byte has such a checksum; else some can only be compared with those of other copies.
    """

    size: int
    crc: int
    sealed: bool
    damaged: list[Piece]


class Copies:
    """Copies on the disks of one store. `disk`: where the copy of a file goes, if it is on no disk to this ordinal.

    `name(disk, source, file, size)`: gives a complete file its name, durably.
    """

    def __init__(
        self, files: Files, disk: Callable[[str, int], Disk], name: Callable[[Disk, Path, str, int], None]
    ) -> None:
        self.disk = disk
        self._files = files
        self._name = name

    def add(self, file: str, disk: int, offset: int, data: bytes) -> None:
        """Write a piece of a copy; offset 0 begins it."""
        target = self.disk(file, disk)
        begins = offset == 0  # else it must be there: nothing is made where a disk was mounted
        with target.work(f"restore {file}"):
            if begins:
                target.check_mounted()
            with self._files.open(_path(target, file), write=True, create=begins, empty=begins) as opened:
                opened.write(data, offset)

    def check(self, file: str, disk: int) -> CopyCheck:
        """Make the copy durable, and read it back from the disk. Raises Corrupt when it does not say what it is."""
        target = self.disk(file, disk)
        with target.work(f"restore {file}"), self._files.open(_path(target, file), write=True) as opened:
            opened.sync()
            opened.forget()
            size = opened.facts().size

            def read(offset: int, length: int) -> bytes:
                goes_on()
                return opened.read(length, offset)

            anatomy = read_anatomy(read, size)
            anatomy.check_name(file)
            crc, damaged = 0, []
            for piece in (anatomy.head, *anatomy.blocks):
                data = read(piece.offset, piece.length)
                crc = int(google_crc32c.extend(crc, data))
                if not piece.fits(data):
                    damaged.append(piece)
            crc = int(google_crc32c.extend(crc, anatomy.tail))
        return CopyCheck(size, crc, anatomy.sealed, damaged)

    def keep(self, file: str, disk: int, modified_s: float | None = None) -> None:
        """Put a copy that was checked in the place of the file. `modified_s`: its age, seconds since 1970."""
        target = self.disk(file, disk)
        copy = _path(target, file)
        with target.writing, target.work(f"restore {file}"):
            with self._files.open(copy, write=True) as opened:
                if modified_s is not None:
                    opened.set_modified(int(modified_s * 1e9))
                size = opened.facts().size
            self._name(target, copy, file, size)

    def drop(self, file: str, disk: int) -> None:
        """Remove a copy that will not be kept; no error if there is none."""
        target = self.disk(file, disk)
        with target.work(f"remove a copy of {file}"):
            self._files.remove(_path(target, file))


def _path(disk: Disk, file: str) -> Path:
    return disk.folder / (file + SUFFIX)
