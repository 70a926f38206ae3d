"""The files of a cold node's disks: the calls to the operating system that `store.py` makes, and nothing else.

They are behind an interface so that the simulator can put a disk in their place that loses what was not fsync'd,
flips bits and fills up.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

from .block import FileIndex, read_index


class Facts(NamedTuple):
    """Size in bytes, and when the file was last written: nanoseconds since 1970."""

    size: int
    modified_ns: int


class OpenFile(Protocol):
    """An open file. All methods raise OSError."""

    def facts(self) -> Facts:
        """Size and time of the last write."""

    def read(self, length: int, offset: int) -> bytes:
        """Up to `length` bytes at `offset`; fewer only at the end of the file."""

    def write(self, data: bytes, offset: int) -> None:
        """Write all of `data` at `offset`. Durable after `sync`."""

    def sync(self) -> None:
        """Make what was written durable."""

    def forget(self) -> None:
        """Have later reads come from the disk, not from memory."""

    def set_modified(self, modified_ns: int) -> None:
        """Change the time of the last write."""


class Files(Protocol):
    """Folders and files. All methods raise OSError, FileNotFoundError among them where a file is needed."""

    def make_folder(self, folder: Path) -> None:
        """Create a folder and its parents, if they are not there."""

    def list_files(self, folder: Path) -> list[str]:
        """Names of the regular files in a folder, sorted."""

    def facts(self, path: Path) -> Facts:
        """Size and time of the last write."""

    def exists(self, path: Path) -> bool:
        """Whether a file or a folder has this name."""

    def open(self, path: Path, *, write: bool = False, create: bool = False, empty: bool = False) -> Opened:
        """Open a file. `create`: make it if it is not there; `empty`: cut it to no bytes. Both mean `write`."""

    def index(self, path: Path) -> FileIndex:
        """What the footer of a cold file says. Raises Corrupt if it is none."""

    def rename(self, source: Path, target: Path) -> None:
        """Give a file another name, in place of the file that has it. Durable after `sync_folder`."""

    def remove(self, path: Path) -> None:
        """Remove a file; no error if it is not there. Durable after `sync_folder`."""

    def sync_folder(self, folder: Path) -> None:
        """Make the names in a folder durable."""

    def free_bytes(self, folder: Path) -> int:
        """Room for files in a folder."""


Opened = AbstractContextManager[OpenFile]


class _SystemFile:
    """Implements `OpenFile` on a descriptor."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def facts(self) -> Facts:
        found = os.fstat(self._descriptor)
        return Facts(found.st_size, found.st_mtime_ns)

    def read(self, length: int, offset: int) -> bytes:
        return os.pread(self._descriptor, length, offset)

    def write(self, data: bytes, offset: int) -> None:
        view = memoryview(data)
        while view:
            count = os.pwrite(self._descriptor, view, offset)
            view, offset = view[count:], offset + count

    def sync(self) -> None:
        os.fsync(self._descriptor)

    def forget(self) -> None:
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def set_modified(self, modified_ns: int) -> None:
        os.utime(self._descriptor, ns=(os.fstat(self._descriptor).st_atime_ns, modified_ns))


class SystemFiles:
    """Implements `Files` by the operating system."""

    def make_folder(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)

    def list_files(self, folder: Path) -> list[str]:
        return sorted(path.name for path in folder.iterdir() if path.is_file())

    def facts(self, path: Path) -> Facts:
        found = path.stat()
        return Facts(found.st_size, found.st_mtime_ns)

    def exists(self, path: Path) -> bool:
        return path.exists()

    @contextmanager
    def open(
        self, path: Path, *, write: bool = False, create: bool = False, empty: bool = False
    ) -> Iterator[_SystemFile]:
        flags = os.O_RDWR if write or create or empty else os.O_RDONLY
        flags |= (os.O_CREAT if create else 0) | (os.O_TRUNC if empty else 0)
        descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            yield _SystemFile(descriptor)
        finally:
            os.close(descriptor)

    def index(self, path: Path) -> FileIndex:
        with path.open("rb") as opened:  # not mapped: what can't be read would end the process
            return read_index(opened)

    def rename(self, source: Path, target: Path) -> None:
        source.replace(target)

    def remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def sync_folder(self, folder: Path) -> None:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def free_bytes(self, folder: Path) -> int:
        found = os.statvfs(folder)
        return found.f_bavail * found.f_frsize
