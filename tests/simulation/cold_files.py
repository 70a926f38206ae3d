"""Files of a cold node on a simulated disk: bytes count after an fsync of the file, names after one of the folder."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from timetier.cluster.cold.block import FileIndex, read_index
from timetier.cluster.cold.disk_marks import MARK_FILE
from timetier.cluster.cold.files import Facts

from .disk import SimDisk
from .loop import Life


class Inode:
    """A file's bytes, as processes see them (`data`) and as they are after a power failure (`synced`)."""

    __slots__ = ("data", "modified_ns", "synced")

    def __init__(self, modified_ns: int) -> None:
        self.data = bytearray()
        self.synced = b""
        self.modified_ns = modified_ns


class ColdFolder:
    """What a cold node has on its disk, over all its lives."""

    def __init__(self, disk: SimDisk) -> None:
        self.disk = disk
        self.names: dict[Path, Inode] = {}
        self.synced_names: dict[Path, Inode] = {}
        self.failing: set[str] = set()  # names of disks that neither read nor write
        self.on_remove: Callable[[Path], None] = lambda path: None  # for checks
        self.on_name: Callable[[Path, Path], None] = lambda source, target: None
        disk.losable.append(self.power_off)

    def power_off(self) -> None:
        """Names of a folder, and bytes of a file, that were not synced may be there or not."""
        random = self.disk.random
        folders = sorted({path.parent for path in [*self.names, *self.synced_names]})
        kept = [folder for folder in folders if random.random() < 0.5]
        for folder in folders:
            names = self.names if folder in kept else self.synced_names
            for path in [path for path in self.synced_names if path.parent == folder]:
                if path not in names:
                    del self.synced_names[path]
            for path, inode in names.items():
                if path.parent == folder:
                    self.synced_names[path] = inode
        self.names = dict(self.synced_names)
        for inode in self.names.values():
            if inode.data != inode.synced:
                written = random.randint(0, len(inode.data))
                torn = bytes(inode.data[:written]) + inode.synced[written:]
                inode.data, inode.synced = bytearray(torn), torn

    def files(self) -> list[Path]:
        """Whole cold files, sorted."""
        names = (path for path in self.names if path.parent.name.startswith("disk-"))
        return sorted(path for path in names if not path.name.endswith(".part") and path.name != MARK_FILE)

    def flip_bit(self, path: Path, position: int) -> None:
        """Damage a byte of a file, where it lies."""
        inode = self.names[path]
        if inode.data:
            at = position % len(inode.data)
            inode.data[at] ^= 1 << (position % 8)
            synced = bytearray(inode.synced)
            if at < len(synced):
                synced[at] ^= 1 << (position % 8)
            inode.synced = bytes(synced)

    def swap(self, path: Path, other: Path) -> None:
        """Have two files change places, each whole and sound."""
        for names in (self.names, self.synced_names):
            if path in names and other in names:
                names[path], names[other] = names[other], names[path]

    def lose(self, path: Path) -> None:
        """Have a file vanish."""
        self.names.pop(path, None)
        self.synced_names.pop(path, None)

    def wipe(self) -> None:
        """Have all files vanish."""
        self.names.clear()
        self.synced_names.clear()

    def change_disk(self, name: str) -> None:
        """Put an empty disk in the place of one."""
        for names in (self.names, self.synced_names):
            for path in [path for path in names if path.parent.name == name]:
                del names[path]


class SimFile:
    """Implements `OpenFile`."""

    def __init__(self, files: SimFiles, path: Path, inode: Inode) -> None:
        self._files = files
        self._path = path
        self._inode = inode

    def facts(self) -> Facts:
        return Facts(len(self._inode.data), self._inode.modified_ns)

    def read(self, length: int, offset: int) -> bytes:
        self._files.begin("read", self._path, writes=False)
        return bytes(self._inode.data[offset : offset + length])

    def write(self, data: bytes, offset: int) -> None:
        self._files.begin("write", self._path)
        inode = self._inode
        if offset > len(inode.data):
            inode.data.extend(bytes(offset - len(inode.data)))
        inode.data[offset : offset + len(data)] = data
        inode.modified_ns = self._files.wall_ns()
        self._files.end("written")

    def sync(self) -> None:
        self._files.begin("sync", self._path)
        self._inode.synced = bytes(self._inode.data)
        self._files.end("synced")

    def forget(self) -> None:
        """Bytes are never read from anywhere but the disk here."""

    def set_modified(self, modified_ns: int) -> None:
        self._inode.modified_ns = modified_ns


class SimFiles:
    """Implements `Files` on a `ColdFolder`, for one life. `wall_ns`: its clock, nanoseconds since 1970."""

    def __init__(self, folder: ColdFolder, life: Life, wall_ns: Callable[[], int]) -> None:
        self.wall_ns = wall_ns
        self._folder = folder
        self._life = life

    def begin(self, what: str, path: Path, *, writes: bool = True) -> None:
        """An operation on a file or folder begins. Raises OSError on a broken or full disk, Crashed."""
        disk = self._folder.disk
        disk.operations += 1
        disk.point(self._life, what)
        if disk.failing or not self._folder.failing.isdisjoint(path.parts):
            raise OSError(errno.EIO, f"simulated I/O error: {what}")
        if writes and disk.full:
            raise OSError(errno.ENOSPC, f"simulated full disk: {what}")

    def end(self, what: str) -> None:
        """An operation is done."""
        self._folder.disk.point(self._life, what)

    def make_folder(self, folder: Path) -> None:
        self.begin("make folder", folder, writes=False)

    def list_files(self, folder: Path) -> list[str]:
        self.begin("list", folder, writes=False)
        return sorted(path.name for path in self._folder.names if path.parent == folder)

    def facts(self, path: Path) -> Facts:
        inode = self._inode(path)
        return Facts(len(inode.data), inode.modified_ns)

    def exists(self, path: Path) -> bool:
        return path in self._folder.names

    @contextmanager
    def open(self, path: Path, *, write: bool = False, create: bool = False, empty: bool = False) -> Iterator[SimFile]:
        self.begin("open", path, writes=create)
        if create and path not in self._folder.names:
            self._folder.names[path] = Inode(self.wall_ns())
        inode = self._inode(path)
        if empty:
            inode.data.clear()
        yield SimFile(self, path, inode)

    def index(self, path: Path) -> FileIndex:
        self.begin("read index", path, writes=False)
        return read_index(bytes(self._inode(path).data))

    def rename(self, source: Path, target: Path) -> None:
        self.begin("rename", target)
        self._folder.names[target] = self._inode(source)
        del self._folder.names[source]
        self._folder.on_name(source, target)
        self.end("renamed")

    def remove(self, path: Path) -> None:
        self.begin("remove", path, writes=False)
        if self._folder.names.pop(path, None) is not None and not path.name.endswith(".part"):
            self._folder.on_remove(path)
        self.end("removed")

    def sync_folder(self, folder: Path) -> None:
        self.begin("sync folder", folder)
        synced = self._folder.synced_names
        for path in [path for path in synced if path.parent == folder]:
            del synced[path]
        synced.update((path, inode) for path, inode in self._folder.names.items() if path.parent == folder)
        self.end("synced folder")

    def free_bytes(self, folder: Path) -> int:
        return self._folder.disk.free_bytes(folder)

    def _inode(self, path: Path) -> Inode:
        inode = self._folder.names.get(path)
        if inode is None:
            raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
        return inode
