"""Files of one cold node on its disks, without a network.

A file lies at `FOLDER/disk-N/NAME` and never changes under its name, except when damaged bytes are restored. It is
written in pieces to `NAME.part`; the last piece makes it durable: fsync, read back from the disk (not from the page
cache) and compare with the checksum that the writer computed, rename, fsync of the folder. So whatever has its name
was once verified on this very disk. All methods block and may be called from several threads.
"""

from __future__ import annotations

import contextlib
import errno
import re
import threading
import time
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import google_crc32c

from ..errors import Corrupt, InvalidRequest, TooLarge, Unavailable
from .block import FileIndex, checksum
from .files import Files, OpenFile, SystemFiles

MAX_PIECE_BYTES = 32 << 20
MAX_FILE_BYTES = 64 << 30
LIST_PAGE = 1_000
_OPEN_PARTS = 16
_STALE_PART_S = 60.0
_RETRY_AFTER_S = 1.0  # after an error of a disk
_CHUNK_BYTES = 1 << 20
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
_PART = ".part"


class StoredFile(NamedTuple):
    """A file of this node. `disk`: ordinal; `modified`: seconds since 1970."""

    disk: int
    size: int
    modified: float


class FileEntry(NamedTuple):
    """A line of a listing."""

    name: str
    size: int
    age_s: int


@dataclass(slots=True)
class _Part:
    disk: int
    size: int
    touched: float  # monotonic seconds


def check_name(file: str) -> str:
    """The same name, if a file may have it. Raises InvalidRequest."""
    if not _NAME.fullmatch(file) or file.endswith(_PART):
        raise InvalidRequest(f"file={file!r}: pass 1 to 128 of a-z 0-9 . _ -, beginning with a letter or digit")
    return file


class ColdStore:
    """Cold files in `folder`, spread over `disks` folders `disk-0`, `disk-1`, ... (one for each physical disk)."""

    def __init__(
        self,
        folder: Path | str,
        disks: int,
        *,
        files: Files | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        """Find the files that are there; drop what was left half written. Raises Unavailable, InvalidRequest.

        `files`: None for those of the operating system. `clock`: monotonic seconds. `wall_s`: seconds since 1970.
        """
        if disks < 1:
            raise InvalidRequest(f"disks={disks}: pass 1 or more")
        self.folder = Path(folder)
        self.disks = disks
        self._system = files or SystemFiles()
        self._clock = clock
        self._wall_s = wall_s
        self._lock = threading.Lock()  # guards the two dicts
        self._writing = threading.Lock()  # one writer at a time: pieces of a file come in order
        self._files: dict[str, StoredFile] = {}
        self._names: list[str] = []  # of them, in order
        self._bytes = 0
        self._parts: dict[str, _Part] = {}
        for disk in range(disks):
            with self._errors(f"open disk-{disk}"):
                self._open_disk(disk)

    def _open_disk(self, disk: int) -> None:
        place = self._disk_folder(disk)
        self._system.make_folder(place)
        for name in self._system.list_files(place):
            if name.endswith(_PART):
                self._system.remove(place / name)
            elif _NAME.fullmatch(name) and name not in self._files:
                facts = self._system.facts(place / name)
                self._note(name, StoredFile(disk, facts.size, facts.modified_ns / 1e9))

    # ------------------------------------------------------------ writing

    def write_piece(self, file: str, disk: int, offset: int, data: bytes, *, last: bool, crc: int) -> tuple[int, int]:
        """Write a piece of a new file; offset 0 starts it over. Returns (size so far, 0), after the last piece
        (size, CRC32C of the whole as read back from the disk).

        The same content under a name that exists is success. Raises InvalidRequest (a gap between pieces, other
        content under that name, a checksum that does not fit), TooLarge, Unavailable (disk full, I/O error).
        """
        self._check_piece(check_name(file), disk, offset, data)
        with self._writing, self._errors(f"write {file} to disk-{disk}"):
            part = self._part_for(file, disk, offset)
            try:
                return self._write(file, part, offset, data, last=last, crc=crc)
            except OSError:
                # Its sender begins again, and on a full disk what is there would take the room of others meanwhile.
                with contextlib.suppress(OSError):
                    self._drop_part(file)
                raise

    def _write(self, file: str, part: _Part, offset: int, data: bytes, *, last: bool, crc: int) -> tuple[int, int]:
        with self._system.open(self._part_path(file, part.disk), create=True, empty=offset == 0) as opened:
            opened.write(data, offset)
            part.size = max(part.size, offset + len(data))
            part.touched = self._clock()
            if not last:
                return part.size, 0
            if offset + len(data) != part.size:
                raise InvalidRequest(f"{file}: the last piece ends at {offset + len(data)}, not at {part.size}")
            opened.sync()
            found = _crc_from_disk(opened, part.size)
        self._finish(file, part, found, crc)
        return part.size, found

    def _check_piece(self, file: str, disk: int, offset: int, data: bytes) -> None:
        if not 0 <= disk < self.disks:
            raise InvalidRequest(f"disk={disk}: this node has disks 0 to {self.disks - 1}")
        if len(data) > MAX_PIECE_BYTES:
            raise TooLarge(f"a piece of {len(data)} bytes, the limit is {MAX_PIECE_BYTES}", limit=MAX_PIECE_BYTES)
        if not 0 <= offset <= MAX_FILE_BYTES - len(data):
            raise InvalidRequest(f"{file}: offset={offset}: files have at most {MAX_FILE_BYTES} bytes")

    def _part_for(self, file: str, disk: int, offset: int) -> _Part:
        part = self._parts.get(file)
        if part is None or offset == 0:
            if offset:
                raise InvalidRequest(f"{file}: a piece at {offset}, but its beginning is not here: start at 0")
            if part is not None:
                self._drop_part(file)
            self._make_room()
            part = self._parts[file] = _Part(disk, 0, self._clock())
        if part.disk != disk or offset > part.size:
            raise InvalidRequest(f"{file}: a piece at {offset} of disk-{disk}; disk-{part.disk} has {part.size} bytes")
        return part

    def _make_room(self) -> None:
        """Drop what nobody writes any more, before another file is begun."""
        now = self._clock()
        for name in [name for name, part in self._parts.items() if now - part.touched >= _STALE_PART_S]:
            self._drop_part(name)
        if len(self._parts) >= _OPEN_PARTS:
            raise Unavailable(f"{_OPEN_PARTS} files are being written at once", retry_after_s=_STALE_PART_S)

    def _finish(self, file: str, part: _Part, found: int, crc: int) -> None:
        """Give a complete part its name, or drop it."""
        if found != crc:
            self._drop_part(file)
            raise InvalidRequest(f"{file}: {part.size} bytes on disk have checksum {found:08x}, not {crc:08x}")
        present = self._files.get(file)
        if present is not None and self._system.exists(self._path(file, present.disk)):
            with self._system.open(self._path(file, present.disk)) as opened:
                same = opened.facts().size == part.size
                same = same and _crc_from_disk(opened, part.size) == crc
            self._drop_part(file)
            if not same:
                raise InvalidRequest(f"{file} exists with other content: choose another name")
            return
        self._name(self._part_path(file, part.disk), file, part)
        del self._parts[file]

    def _name(self, source: Path, file: str, part: _Part) -> None:
        path = self._path(file, part.disk)
        self._system.rename(source, path)
        self._system.sync_folder(path.parent)
        with self._lock:
            self._note(file, StoredFile(part.disk, part.size, self._system.facts(path).modified_ns / 1e9))

    def _drop_part(self, file: str) -> None:
        part = self._parts.pop(file, None)
        if part is not None:
            self._system.remove(self._part_path(file, part.disk))

    # ------------------------------------------------------------ reading

    def read_block(self, file: str, offset: int, length: int, crc: int) -> bytes:
        """Bytes of a block by one positioned read, checked.

        Raises Corrupt, whose field `reason` is "missing" (no such file), "short" (the file ends before) or
        "checksum"; InvalidRequest; Unavailable (I/O error).
        """
        data = self._read(file, offset, length, MAX_PIECE_BYTES)
        if len(data) != length:
            raise Corrupt(f"{file} is truncated: {len(data)} of {length} bytes at {offset}", reason="short")
        found = checksum(data)
        if found != crc:
            raise Corrupt(
                f"{file}: {length} bytes at {offset} have checksum {found:08x}, not {crc:08x}", reason="checksum"
            )
        return data

    def read_piece(self, file: str, offset: int, length: int) -> tuple[StoredFile, bytes]:
        """Up to `length` bytes as they are, to copy a file. Raises as `read_block`, but checks nothing."""
        return self.find(file), self._read(file, offset, length, MAX_PIECE_BYTES)

    def _read(self, file: str, offset: int, length: int, most: int) -> bytes:
        if offset < 0 or not 0 < length <= most:
            raise InvalidRequest(f"{length} bytes at {offset}: pass an offset >= 0 and 1 to {most} bytes")
        path = self._path(file, self.find(file).disk)
        try:
            with self._errors(f"read {file}", may_miss=True), self._system.open(path) as opened:
                return opened.read(length, offset)
        except FileNotFoundError:
            raise _missing(file, path.parent.name) from None

    def find(self, file: str) -> StoredFile:
        """Where a file lies. Raises Corrupt with reason "missing", InvalidRequest."""
        with self._lock:
            stored = self._files.get(check_name(file))
        if stored is None:
            raise _missing(file, "any disk")
        return stored

    def index(self, file: str) -> tuple[StoredFile, FileIndex]:
        """A file's place and what its footer says. Raises Corrupt, InvalidRequest, Unavailable."""
        stored = self.find(file)
        path = self._path(file, stored.disk)
        try:
            with self._errors(f"read {file}", may_miss=True):
                return stored, self._system.index(path)
        except FileNotFoundError:
            raise _missing(file, path.parent.name) from None

    def list_files(self, cursor: str = "", limit: int = LIST_PAGE) -> tuple[list[FileEntry], bool]:
        """Files whose names come after `cursor`, by name, and whether there are more."""
        with self._lock:
            at = bisect_right(self._names, cursor)
            names = self._names[at : at + limit + 1]
            page = [(name, self._files[name]) for name in names[:limit]]
        now = self._wall_s()
        entries = [FileEntry(name, stored.size, max(0, int(now - stored.modified))) for name, stored in page]
        return entries, len(names) > limit

    def totals(self) -> tuple[int, int]:
        """Number of files, and their bytes."""
        with self._lock:
            return len(self._files), self._bytes

    def _note(self, name: str, stored: StoredFile) -> None:
        """A file is there. Under the lock, or before anybody else knows of this object."""
        self._forget(name)
        self._files[name] = stored
        self._bytes += stored.size
        insort(self._names, name)

    def _forget(self, name: str) -> StoredFile | None:
        """A file is there no more; what it was, if it was there. Under the lock."""
        stored = self._files.pop(name, None)
        if stored is not None:
            self._bytes -= stored.size
            del self._names[bisect_left(self._names, name)]
        return stored

    # ------------------------------------------------------------ removing and restoring

    def remove(self, file: str) -> bool:
        """Remove a file; False if it is not there. Raises InvalidRequest, Unavailable."""
        check_name(file)
        with self._writing, self._errors(f"remove {file}"):
            with self._lock:
                stored = self._forget(file)
            if stored is None:
                return False
            path = self._path(file, stored.disk)
            self._system.remove(path)
            self._system.sync_folder(path.parent)
            return True

    def restore(self, file: str, offset: int, data: bytes) -> None:
        """Write good bytes over damaged ones, in place, and read them back. Raises Corrupt, Unavailable."""
        path = self._path(file, self.find(file).disk)
        with self._writing, self._errors(f"restore {file}"), self._system.open(path, write=True) as opened:
            facts = opened.facts()
            if offset + len(data) > facts.size:
                raise Corrupt(f"{file} is truncated at {facts.size}", reason="short")
            opened.write(data, offset)
            opened.sync()
            opened.set_modified(facts.modified_ns)  # the age of a file is that of its rows
            opened.forget()
            if opened.read(len(data), offset) != data:
                raise Unavailable(f"{file}: disk-{self.find(file).disk} does not keep what is written to it")

    def add_to_copy(self, file: str, disk: int, offset: int, data: bytes) -> None:
        """Write a piece of a whole copy that is to take the place of a missing or truncated file, from 0 on.

        `disk`: where to put it if the file is on no disk. The copy counts only after `finish_copy`; one at a time of
        a file. Raises Unavailable.
        """
        with (
            self._errors(f"restore {file}"),
            self._system.open(self._copy_path(file, disk), create=True, empty=offset == 0) as opened,
        ):
            opened.write(data, offset)

    def finish_copy(self, file: str, disk: int) -> None:
        """Put the copy in the place of the file, after it was found good by its own index, or drop it.

        Raises Corrupt if the copy is damaged too, Unavailable.
        """
        copy = self._copy_path(file, disk)  # apart from what the sink may be writing
        with self._errors(f"restore {file}"):
            try:
                with self._system.open(copy, write=True) as opened:
                    opened.sync()
                    opened.forget()
                    for entry in self._system.index(copy).blocks:
                        if checksum(opened.read(entry.length, entry.offset)) != entry.crc:
                            raise Corrupt(f"{file}: the copy's block at {entry.offset} is damaged", reason="checksum")
                    part = _Part(self._copy_disk(file, disk), opened.facts().size, self._clock())
                with self._writing:
                    self._name(copy, file, part)
            finally:
                self._system.remove(copy)

    def drop_copy(self, file: str, disk: int) -> None:
        """Remove a copy that will not be finished; no error if there is none. Raises Unavailable."""
        with self._errors(f"remove a copy of {file}"):
            self._system.remove(self._copy_path(file, disk))

    def _copy_disk(self, file: str, disk: int) -> int:
        with self._lock:
            stored = self._files.get(check_name(file))
        return stored.disk if stored else disk % self.disks

    def _copy_path(self, file: str, disk: int) -> Path:
        return self._disk_folder(self._copy_disk(file, disk)) / f"{file}.copy{_PART}"

    # ------------------------------------------------------------ paths and errors

    def _disk_folder(self, disk: int) -> Path:
        return self.folder / f"disk-{disk}"

    def _path(self, file: str, disk: int) -> Path:
        return self._disk_folder(disk) / check_name(file)

    def _part_path(self, file: str, disk: int) -> Path:
        return self._disk_folder(disk) / (check_name(file) + _PART)

    @contextmanager
    def _errors(self, what: str, *, may_miss: bool = False) -> Iterator[None]:
        """Tell the caller what could not be done. `may_miss`: a FileNotFoundError goes on as it is."""
        try:
            yield
        except OSError as error:
            if may_miss and isinstance(error, FileNotFoundError):
                raise
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            reason = "the disk is full: free some space or add disks" if full else f"I/O error: {error.strerror}"
            raise Unavailable(f"can't {what} in {self.folder}: {reason}", retry_after_s=_RETRY_AFTER_S) from error


def _missing(file: str, place: str) -> Corrupt:
    return Corrupt(f"{file} is missing on {place}", reason="missing")


def _crc_from_disk(opened: OpenFile, size: int) -> int:
    """CRC32C of a file that was fsync'd, read from the disk."""
    opened.forget()
    crc = offset = 0
    while offset < size:
        chunk = opened.read(_CHUNK_BYTES, offset)
        if not chunk:
            raise OSError(errno.EIO, f"the file ends at {offset}, not at {size}")
        crc = int(google_crc32c.extend(crc, chunk))
        offset += len(chunk)
    return crc
