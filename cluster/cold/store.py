"""Files of one cold node on its disks, without a network.

A file lies in the folder of one disk and never changes under its name, except when damaged bytes are restored. It is
written in pieces to `NAME.part`; the last piece makes it durable: fsync, read back from the disk (not from the page
cache) and compare with the checksum that the writer computed, rename, fsync of the folder. So whatever has its name
was once verified on this very disk. All methods block and may be called from several threads.

A disk that fails is taken out (`disk.py`): the others go on. What lies on a disk that is out is told from what is not
there at all: the first is Unavailable, with `reason` "disk", the second Corrupt, with `reason` "missing".
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import google_crc32c

from ..errors import Corrupt, InvalidRequest, TooLarge, Unavailable
from ..messages.cold import DISK_FAILED, DISK_REPLACING, DISK_SERVES
from .block import FileIndex, checksum
from .copies import Copies
from .disk import RETRY_AFTER_S, Disk, Part, StoredFile
from .disk_lane import goes_on
from .disk_marks import Owner
from .disk_set import DiskSet
from .files import Files, OpenFile, SystemFiles
from .pieces import read_anatomy

MAX_PIECE_BYTES = 32 << 20
MAX_FILE_BYTES = 64 << 30
LIST_PAGE = 1_000
_OPEN_PARTS = 16  # of one disk
_STALE_PART_S = 60.0
_CHUNK_BYTES = 1 << 20
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
_PART = ".part"
_NOBODY = Owner("", "")


class FileEntry(NamedTuple):
    """A line of a listing."""

    name: str
    size: int
    age_s: int


def check_name(file: str) -> str:
    """The same name, if a file may have it. Raises InvalidRequest."""
    if not _NAME.fullmatch(file) or file.endswith(_PART):
        raise InvalidRequest(f"file={file!r}: pass 1 to 128 of a-z 0-9 . _ -, beginning with a letter or digit")
    return file


class ColdStore:
    """Cold files of one node, spread over its disks (`disk_set.disk_folders` says where these are)."""

    def __init__(
        self,
        folder: Path | str,
        disks: int,
        *,
        disk_dirs: Sequence[Path] | None = None,
        owner: Owner = _NOBODY,
        files: Files | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        """`owner`: cluster and node, which the disks' markers name. `files`: None for those of the operating system.
        `clock`: monotonic seconds. `wall_s`: seconds since 1970. Raises InvalidRequest. `open` comes next.
        """
        self.folder = Path(folder)
        self._system = files or SystemFiles()
        self._clock = clock
        self._wall_s = wall_s
        self._lock = threading.Lock()  # guards the index of files, and what disks know of theirs
        self._files: dict[str, StoredFile] = {}  # that can be read
        self._names: list[str] = []  # of them, in order
        self._bytes = 0
        self._naming: set[str] = set()  # files that are about to get their name
        self.on_failure: Callable[[], None] = lambda: None  # a disk was taken out
        self.copies = Copies(self._system, self._copy_disk, self._name)
        self._set = DiskSet(self.folder, disks, disk_dirs, owner, self._system, self._disk_failed)

    # ------------------------------------------------------------ disks

    @property
    def disks(self) -> list[Disk]:
        """By ordinal."""
        return self._set.disks

    def disk(self, ordinal: int) -> Disk:
        """The disk of an ordinal. Raises InvalidRequest."""
        return self._set[ordinal]

    def open(self, *, lost: bool = False) -> ColdStore:
        """Begin, and open each disk. Returns itself. Raises Unavailable, InvalidRequest."""
        self.begin(lost=lost)
        for disk in self.disks:
            self.open_disk(disk)
        return self

    def begin(self, *, lost: bool = False) -> None:
        """Find out which disks there should be. `lost`: the node's folder was lost, its disks are to be filled again.

        Raises Unavailable, InvalidRequest.
        """
        self._set.begin(lost=lost)

    def open_disk(self, disk: Disk) -> None:
        """Find the files on a disk; drop what was left half written. The disk's state says how it is afterwards."""
        with disk.writing:
            if not self._set.take_in(disk):
                return
            try:
                with disk.work("open it"):
                    found = self._scan(disk)
            except Unavailable as error:
                if disk.readable:
                    disk.set_state(DISK_FAILED, error.message)
                return
            with self._lock:
                if self.disks[disk.ordinal] is not disk:
                    return
                for name, stored in found:
                    if name not in self._files:
                        self._note(name, stored)
                disk.away = None if disk.state == DISK_REPLACING else set()

    def _scan(self, disk: Disk) -> list[tuple[str, StoredFile]]:
        found = []
        for name in self._system.list_files(disk.folder):
            path = disk.folder / name
            if name.endswith(_PART):
                self._system.remove(path)
            elif _NAME.fullmatch(name):
                facts = self._system.facts(path)
                found.append((name, StoredFile(disk.ordinal, facts.size, facts.modified_ns / 1e9)))
        disk.free_bytes = self._system.free_bytes(disk.folder)
        return found

    def reopen_disk(self, ordinal: int) -> Disk:
        """Look again at a disk that is out: perhaps it works, or was mounted. Raises InvalidRequest."""
        if self._set[ordinal].readable:
            return self._set[ordinal]
        disk = self._set.renew(ordinal)
        self.open_disk(disk)
        return disk

    def replace_disk(self, ordinal: int, *, erase: bool) -> Disk:
        """Have another disk in the place of a former one, or the same emptied: it waits to be filled from the peers.

        Raises InvalidRequest when that would need `erase`, Unavailable when the disk can't be written.
        """
        disk = self._set.replace(ordinal, erase=erase)
        with self._lock:
            self._forget_disk(ordinal)
            disk.away = None
        self.open_disk(disk)
        if disk.state != DISK_REPLACING:
            raise disk.out()
        return disk

    def expect(self, disk: Disk, names: Iterable[str]) -> None:
        """These are all the files that the disk should have: others are missing, not away."""
        with self._lock:
            disk.away = {name for name in names if name not in self._files}

    def lacking(self, disk: Disk) -> list[str]:
        """Files that are expected and not there."""
        with self._lock:
            return list(disk.away or ())

    def is_expected(self, disk: Disk, file: str) -> bool:
        """Whether the file is there or should be: nobody has had it removed."""
        with self._lock:
            return file in self._files or (disk.away is not None and file in disk.away)

    def forget_away(self, disk: Disk, file: str) -> None:
        """The file is not expected any more."""
        with self._lock:
            if disk.away:
                disk.away.discard(file)

    def end_rebuild(self, disk: Disk) -> None:
        """All files are on the disk: it serves, durably. Raises Unavailable."""
        with disk.writing, disk.work("write its marker"):
            self._set.end_rebuild(disk)
        with self._lock:
            disk.away = set()
        disk.set_state(DISK_SERVES)

    def measure(self, disk: Disk) -> None:
        """Note the free bytes of a disk, and whether it is there at all. Raises Unavailable."""
        with disk.work("ask for its free space"):
            disk.check_mounted()
            disk.free_bytes = self._system.free_bytes(disk.folder)

    def _disk_failed(self, disk: Disk) -> None:
        self.on_failure()
        with self._lock:
            if self.disks[disk.ordinal] is disk:
                names = self._forget_disk(disk.ordinal)
                disk.away = None if disk.away is None else disk.away | names

    def _forget_disk(self, ordinal: int) -> set[str]:
        """No file of this disk can be read any more. Their names. Under the lock."""
        names = {name for name, stored in self._files.items() if stored.disk == ordinal}
        for name in names:
            self._bytes -= self._files.pop(name).size
        self._names = [name for name in self._names if name not in names]
        disk = self.disks[ordinal]
        disk.files = disk.nbytes = 0
        return names

    # ------------------------------------------------------------ writing

    def write_piece(self, file: str, disk: int, offset: int, data: bytes, *, last: bool, crc: int) -> tuple[int, int]:
        """Write a piece of a new file; offset 0 starts it over. Returns (size so far, 0), after the last piece
        (size, CRC32C of the whole as read back from the disk).

        The same content under a name that exists is success. Raises InvalidRequest (a gap between pieces, other
        content under that name, a checksum that does not fit), TooLarge, Unavailable (disk full or out).
        """
        target = self._set[disk]
        _check_piece(check_name(file), offset, data)
        with target.writing, target.work(f"write {file}"):
            target.require()
            part = self._part_for(target, file, offset)
            try:
                return self._write(target, file, part, offset, data, last=last, crc=crc)
            except OSError:
                # Its sender begins again, and on a full disk what is there would take the room of others meanwhile.
                with contextlib.suppress(OSError):
                    self._drop_part(target, file)
                raise

    def _write(
        self, disk: Disk, file: str, part: Part, offset: int, data: bytes, *, last: bool, crc: int
    ) -> tuple[int, int]:
        begins = offset == 0  # else it must be there: nothing is made where a disk was mounted
        with self._system.open(_part_path(disk, file), write=True, create=begins, empty=begins) as opened:
            opened.write(data, offset)
            part.size = max(part.size, offset + len(data))
            part.touched = self._clock()
            if not last:
                return part.size, 0
            if offset + len(data) != part.size:
                raise InvalidRequest(f"{file}: the last piece ends at {offset + len(data)}, not at {part.size}")
            opened.sync()
            opened.forget()
            size, found = _sum(opened)
        if size != part.size:
            self._drop_part(disk, file)
            raise Unavailable(f"{file} has {size} bytes on the disk, {part.size} were written", retry_after_s=1.0)
        self._finish(disk, file, part, found, crc)
        return part.size, found

    def _part_for(self, disk: Disk, file: str, offset: int) -> Part:
        part = disk.parts.get(file)
        if part is None or offset == 0:
            if offset:
                raise InvalidRequest(f"{file}: a piece at {offset}, but its beginning is not here: start at 0")
            disk.check_mounted()
            if part is not None:
                self._drop_part(disk, file)
            self._make_room(disk)
            part = disk.parts[file] = Part(disk.ordinal, 0, self._clock())
        if offset > part.size:
            raise InvalidRequest(f"{file}: a piece at {offset} of disk-{disk.ordinal}, which has {part.size} bytes")
        return part

    def _make_room(self, disk: Disk) -> None:
        """Drop what nobody writes any more, before another file is begun."""
        now = self._clock()
        for name in [name for name, part in disk.parts.items() if now - part.touched >= _STALE_PART_S]:
            self._drop_part(disk, name)
        if len(disk.parts) >= _OPEN_PARTS:
            raise Unavailable(f"{_OPEN_PARTS} files are being written at once", retry_after_s=_STALE_PART_S)

    def _finish(self, disk: Disk, file: str, part: Part, found: int, crc: int) -> None:
        """Give a complete part its name, or drop it."""
        if found != crc:
            self._drop_part(disk, file)
            raise InvalidRequest(f"{file}: {part.size} bytes on disk have checksum {found:08x}, not {crc:08x}")
        with self._lock:
            if file in self._naming:
                raise Unavailable(f"{file} is being written to another disk", retry_after_s=RETRY_AFTER_S)
            present = self._files.get(file)
            self._naming.add(file)
        try:
            same = None if present is None else self._is_same(file, present, part.size, crc)
            if same is None:
                self._name(disk, _part_path(disk, file), file, part.size)
                del disk.parts[file]
                return
            self._drop_part(disk, file)
            if not same:
                raise InvalidRequest(f"{file} exists with other content: choose another name")
        finally:
            self._naming.discard(file)

    def _is_same(self, file: str, present: StoredFile, size: int, crc: int) -> bool | None:
        """Whether the file that has this name holds the same; None if there is none after all."""
        disk = self._set[present.disk]
        with disk.work(f"read {file}"):
            if not self._system.exists(disk.folder / file):
                return None
            with self._system.open(disk.folder / file) as opened:
                opened.forget()
                return _sum(opened) == (size, crc)

    def _name(self, disk: Disk, source: Path, file: str, size: int) -> None:
        path = disk.folder / file
        self._system.rename(source, path)
        self._system.sync_folder(disk.folder)
        stored = StoredFile(disk.ordinal, size, self._system.facts(path).modified_ns / 1e9)
        with self._lock:
            if self.disks[disk.ordinal] is disk and disk.readable:
                self._note(file, stored)
                if disk.away:
                    disk.away.discard(file)

    def _drop_part(self, disk: Disk, file: str) -> None:
        if disk.parts.pop(file, None) is not None:
            self._system.remove(_part_path(disk, file))

    # ------------------------------------------------------------ reading

    def read_block(self, file: str, offset: int, length: int, crc: int) -> bytes:
        """Bytes of a block by one positioned read, checked.

        Raises Corrupt, whose field `reason` is "missing" (no such file), "short" (the file ends before) or
        "checksum"; InvalidRequest; Unavailable (the disk is out).
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
        disk = self._disk_of(file)
        try:
            with disk.work(f"read {file}", may_miss=True), self._system.open(disk.folder / file) as opened:
                return opened.read(length, offset)
        except FileNotFoundError:
            raise _missing(file, f"disk-{disk.ordinal}") from None

    def read_from_disk(self, file: str, offset: int, length: int) -> tuple[int, bytes]:
        """(size of the file as it is, up to `length` bytes at `offset`), past the page cache and not left in it.

        For whoever checks what the disk has. Raises as `read_block`, but checks nothing.
        """
        disk = self._disk_of(file)
        try:
            with disk.work(f"read {file}", may_miss=True), self._system.open(disk.folder / file) as opened:
                opened.forget()
                data = opened.read(length, offset)
                opened.forget()
                return opened.facts().size, data
        except FileNotFoundError:
            raise _missing(file, f"disk-{disk.ordinal}") from None

    def find(self, file: str) -> StoredFile:
        """Where a file lies. Raises Corrupt with reason "missing", Unavailable while it may be on a disk that is out,
        InvalidRequest."""
        with self._lock:
            stored = self._files.get(check_name(file))
            if stored is not None:
                return stored
            for disk in self.disks:
                if disk.away is None or file in disk.away:
                    raise disk.out()
        raise _missing(file, "any disk")

    def disk_of(self, file: str) -> int | None:
        """Ordinal of the disk that has a file, None if it can't be read."""
        with self._lock:
            stored = self._files.get(file)
        return stored.disk if stored is not None else None

    def _disk_of(self, file: str) -> Disk:
        return self._set[self.find(file).disk]

    def place(self, file: str) -> Path | None:
        """Path of a file, None where there is none that can be read. Raises InvalidRequest."""
        try:
            return (self._disk_of(file).folder / file).absolute()
        except (Corrupt, Unavailable):
            return None

    def index(self, file: str) -> tuple[StoredFile, FileIndex]:
        """A file's place and what its footer says, which was checked. Raises Corrupt, InvalidRequest, Unavailable."""
        stored = self.find(file)
        disk = self._set[stored.disk]
        try:
            with disk.work(f"read {file}", may_miss=True), self._system.open(disk.folder / file) as opened:
                anatomy = read_anatomy(lambda offset, length: opened.read(length, offset), opened.facts().size)
        except FileNotFoundError:
            raise _missing(file, f"disk-{disk.ordinal}") from None
        anatomy.check_name(file)
        return stored, anatomy.says

    def list_files(
        self, cursor: str = "", limit: int = LIST_PAGE, *, disk: int | None = None
    ) -> tuple[list[FileEntry], bool]:
        """Files that can be read and whose names come after `cursor`, by name, and whether there are more.

        `disk`: only those of this ordinal.
        """
        page: list[tuple[str, StoredFile]] = []
        with self._lock:
            for at in range(bisect_right(self._names, cursor), len(self._names)):
                name = self._names[at]
                if disk is None or self._files[name].disk == disk:
                    page.append((name, self._files[name]))
                    if len(page) > limit:
                        break
        now = self._wall_s()
        entries = [FileEntry(name, stored.size, max(0, int(now - stored.modified))) for name, stored in page[:limit]]
        return entries, len(page) > limit

    def totals(self) -> tuple[int, int]:
        """Number of files that can be read, and their bytes."""
        with self._lock:
            return len(self._files), self._bytes

    def _note(self, name: str, stored: StoredFile) -> None:
        """A file is there. Under the lock."""
        self._forget(name)
        self._files[name] = stored
        self._count(stored, 1)
        insort(self._names, name)

    def _forget(self, name: str) -> StoredFile | None:
        """A file is there no more; what it was, if it was there. Under the lock."""
        stored = self._files.pop(name, None)
        if stored is not None:
            self._count(stored, -1)
            del self._names[bisect_left(self._names, name)]
        return stored

    def _count(self, stored: StoredFile, sign: int) -> None:
        self._bytes += sign * stored.size
        disk = self.disks[stored.disk]
        disk.files += sign
        disk.nbytes += sign * stored.size

    # ------------------------------------------------------------ removing and restoring

    def remove(self, file: str) -> bool:
        """Remove a file; False if it is not there. Raises InvalidRequest, Unavailable.

        One on a disk that is out is forgotten, and found again, as garbage, when the disk comes back.
        """
        with self._lock:
            stored = self._files.get(check_name(file))
            for disk in self.disks:
                if disk.away:
                    disk.away.discard(file)
        if stored is None:
            return False
        disk = self._set[stored.disk]
        with disk.writing, disk.work(f"remove {file}"):
            with self._lock:
                if self._forget(file) is None:
                    return False
            self._system.remove(disk.folder / file)
            self._system.sync_folder(disk.folder)
            return True

    def restore(self, file: str, offset: int, data: bytes) -> None:
        """Write good bytes over damaged ones, in place, and read them back. Raises Corrupt, Unavailable."""
        disk = self._disk_of(file)
        path = disk.folder / file
        with disk.writing, disk.work(f"restore {file}"), self._system.open(path, write=True) as opened:
            facts = opened.facts()
            if offset + len(data) > facts.size:
                raise Corrupt(f"{file} is truncated at {facts.size}", reason="short")
            opened.write(data, offset)
            opened.sync()
            opened.set_modified(facts.modified_ns)  # the age of a file is that of its rows
            opened.forget()
            if opened.read(len(data), offset) != data:
                raise Unavailable(f"{file}: disk-{disk.ordinal} does not keep what is written to it")

    def set_modified(self, file: str, modified_s: float) -> None:
        """Change the age of a file: a copy is as old as what it was copied from. Raises Corrupt, Unavailable."""
        disk = self._disk_of(file)
        with disk.writing, disk.work(f"write {file}"), self._system.open(disk.folder / file, write=True) as opened:
            opened.set_modified(int(modified_s * 1e9))
        with self._lock:
            if file in self._files:
                self._files[file] = self._files[file]._replace(modified=modified_s)

    def _copy_disk(self, file: str, disk: int) -> Disk:
        """Where a copy of the file goes."""
        with self._lock:
            stored = self._files.get(check_name(file))
        return self._set[stored.disk if stored else disk % len(self.disks)]


def _check_piece(file: str, offset: int, data: bytes) -> None:
    if len(data) > MAX_PIECE_BYTES:
        raise TooLarge(f"a piece of {len(data)} bytes, the limit is {MAX_PIECE_BYTES}", limit=MAX_PIECE_BYTES)
    if not 0 <= offset <= MAX_FILE_BYTES - len(data):
        raise InvalidRequest(f"{file}: offset={offset}: files have at most {MAX_FILE_BYTES} bytes")


def _part_path(disk: Disk, file: str) -> Path:
    return disk.folder / (check_name(file) + _PART)


def _missing(file: str, place: str) -> Corrupt:
    return Corrupt(f"{file} is missing on {place}", reason="missing")


def _sum(opened: OpenFile) -> tuple[int, int]:
    """Size and CRC32C of a file, as read."""
    crc = offset = 0
    while chunk := opened.read(_CHUNK_BYTES, offset):
        crc = int(google_crc32c.extend(crc, chunk))
        offset += len(chunk)
        goes_on()
    return offset, crc
