"""A small disk for tests: a file system of its own where one may be mounted, else a folder with a limit.

The limit counts what is really in the folder. What only a file system can do, refuse a write in its middle, is done
there by an engine that looks before it writes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from timetier.cluster.cold.files import SystemFiles
from timetier.cluster.storage.engine import DurableEngine, EngineFailed, RocksEngine

BALLAST = "ballast"
NO_SPACE = "No space left on device"
ENGINE_NEEDS_BYTES = 128 << 10  # with less an engine that has a log to recover can't be opened


class SmallDisk:
    """`folder` on a disk of `size_bytes`. Get one by `small_disk`."""

    def __init__(self, folder: Path, size_bytes: int, *, mounted: bool) -> None:
        self.folder = folder
        self.size_bytes = size_bytes
        self.mounted = mounted

    def free(self) -> int:
        """Free bytes."""
        if self.mounted:
            return shutil.disk_usage(self.folder).free
        files = (Path(root) / name for root, _, names in os.walk(self.folder) for name in names)
        return max(0, self.size_bytes - sum(map(_size, files)))

    def fill(self, leave_bytes: int = 0) -> None:
        """Have somebody else use the disk up, but for `leave_bytes`."""
        with (self.folder / BALLAST).open("ab", buffering=0) as ballast, contextlib.suppress(OSError):
            while (more := self.free() - leave_bytes) > 0:
                ballast.write(bytes(min(more, 1 << 20)))

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        """No file of this process can be written to: for short, since those of a test run can't either."""
        self.fill()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            if not self.mounted:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            self.make_room()

    def make_room(self) -> None:
        """Have somebody else go away."""
        (self.folder / BALLAST).unlink(missing_ok=True)


class LimitedEngine(RocksEngine):
    """RocksDB on a disk that is only counted."""

    def __init__(self, disk: SmallDisk, folder: Path, *, create: bool, cache_mb: int, write_buffer_mb: int) -> None:
        self.disk = disk
        self._require_room()
        super().__init__(folder, create=create, cache_mb=cache_mb, write_buffer_mb=write_buffer_mb)

    def commit(self) -> int:
        if not self._batch.is_empty():
            self._require_room()
        return super().commit()

    def _require_room(self) -> None:
        if self.disk.free() < ENGINE_NEEDS_BYTES:
            raise EngineFailed(f"the engine refused a write: {NO_SPACE}")


class LimitedFiles(SystemFiles):
    """Files of a cold node on a disk that is only counted."""

    def __init__(self, disk: SmallDisk) -> None:
        self.disk = disk

    @contextlib.contextmanager
    def open(self, path: Path, *, write: bool = False, create: bool = False, empty: bool = False) -> Iterator[Any]:
        with super().open(path, write=write, create=create, empty=empty) as opened:
            yield _LimitedFile(self.disk, opened) if create else opened


class _LimitedFile:
    def __init__(self, disk: SmallDisk, opened: Any) -> None:
        self._disk = disk
        self._opened = opened

    def write(self, data: bytes, offset: int) -> None:
        if len(data) > self._disk.free():
            raise OSError(errno.ENOSPC, NO_SPACE)
        self._opened.write(data, offset)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._opened, name)


def engines_on(
    disks: dict[str, SmallDisk], cache_mb: int, write_buffer_mb: int
) -> Callable[[Path, bool], DurableEngine]:
    """How to open engines in folders of which some, by name, are small disks."""

    def open_engine(folder: Path, create: bool) -> DurableEngine:
        disk = disks.get(folder.parent.name)
        if disk is None or disk.mounted:
            return RocksEngine(folder, create=create, cache_mb=cache_mb, write_buffer_mb=write_buffer_mb)
        return LimitedEngine(disk, folder, create=create, cache_mb=cache_mb, write_buffer_mb=write_buffer_mb)

    return open_engine


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # removed since it was listed
        return 0


@contextlib.contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[SmallDisk]:
    """A small disk at `folder`, which must not exist yet."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes},mode=0700", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield SmallDisk(folder, size_bytes, mounted=mounted)
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)
