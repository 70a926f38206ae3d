"""Where a storage node's version cache lies: in shared memory that outlives the process, or in its own.

`SharedVersions` maps a file, by default in /dev/shm: its content is there again after the process was killed, and gone
after the machine was. A file that did survive the machine could hold pages of different ages, so the boot of the
machine is a part of the owner's name. The file's blocks are reserved when it is made: a store into a mapping that its
file system has no room for would kill the process. A lock keeps a second process out; the kernel drops it when its
holder ends, however it ends.

A node that stops in order removes its file. The files of nodes that were killed and never came back are found by
others: each file names the data folder it belongs to, and is removed by the next node that starts when that is gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import mmap
import os
import re
import stat
from pathlib import Path
from typing import Protocol

from ..identity import Identity, has_identity
from .version_cache import HEADER_BYTES, Owner, VersionCache

logger = logging.getLogger(__name__)

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
PREFIX, SUFFIX = "timetier-", ".versions"
FOLDER_AT = 1024  # in the header's page: the data folder, after its length in two bytes
FOLDER_BYTES = HEADER_BYTES - FOLDER_AT - 2
MAX_SWEPT = 1_000
OPEN_TRIES = 3


class VersionHome(Protocol):
    """Memory for the version cache of one node."""

    where: str
    """For people: where it lies."""

    def open(self, owner: Owner) -> VersionCache:
        """The cache for a life of the node; that of the life before must not be used any more."""

    def remove(self) -> None:
        """The node stops: leave nothing behind."""


def owner_of(identity: Identity, buckets: int, owned: list[int], seed: int) -> Owner:
    """Owner of a cache: this life of this folder, with these buckets of all."""
    facts = (identity.cluster_id, identity.node, identity.incarnation, buckets, owned)
    name = hashlib.blake2b(repr(facts).encode(), digest_size=32).digest()
    return Owner(name, identity.life_number, identity.past[-1] if identity.past else None, seed)


class PrivateVersions:
    """Memory of the process itself."""

    def __init__(self, size_bytes: int) -> None:
        self.where = "private memory"
        self._memory = mmap.mmap(-1, size_bytes)  # unlike a bytearray it takes room only where it is used

    def open(self, owner: Owner) -> VersionCache:
        return VersionCache(memoryview(self._memory), owner)

    def remove(self) -> None:
        """Nothing is left behind anyway."""


class SharedVersions:
    """A mapped file. Raises OSError when it can't be had: there is no room, or another process has it."""

    def __init__(self, path: Path, data_folder: Path, size_bytes: int) -> None:
        self.where = str(path)
        self._path = path
        try:
            self._boot = BOOT_ID.read_bytes()
        except OSError as error:
            raise OSError(f"nothing tells whether the machine was started again: {error}") from None
        self._file = _open_locked(path, create=True)
        try:
            if os.fstat(self._file).st_size != size_bytes:
                os.ftruncate(self._file, 0)
                os.posix_fallocate(self._file, 0, size_bytes)
            self._memory = mmap.mmap(self._file, size_bytes)
        except OSError:
            self.remove()
            raise
        text = os.fsencode(data_folder.absolute())
        if len(text) <= FOLDER_BYTES:
            self._memory[FOLDER_AT : FOLDER_AT + 2 + len(text)] = len(text).to_bytes(2, "little") + text

    def open(self, owner: Owner) -> VersionCache:
        name = hashlib.blake2b(owner.name + self._boot, digest_size=32).digest()
        return VersionCache(memoryview(self._memory), Owner(name, owner.life, owner.past, owner.seed))

    def remove(self) -> None:
        """Remove the file while it is locked, so that nobody can have begun to use it."""
        if self._file >= 0:
            with contextlib.suppress(OSError):  # whoever else removed it has done the work
                self._path.unlink()
            os.close(self._file)
            self._file = -1


def open_home(shared_folder: Path | None, identity: Identity, size_bytes: int) -> VersionHome:
    """Shared memory in a folder if that can be had, else the process's own; None for the latter at once."""
    if shared_folder is None:
        return PrivateVersions(size_bytes)
    path = shared_folder / file_name(identity)
    try:
        sweep(shared_folder, path)
        return SharedVersions(path, identity.folder, size_bytes)
    except OSError as error:
        logger.warning(
            "%s keeps its version cache in private memory, and will be cold after a restart: %s: %s",
            identity.node,
            path,
            error,
        )
        return PrivateVersions(size_bytes)


def file_name(identity: Identity) -> str:
    """Name of a node's file: another one for each data folder."""
    cluster = re.sub(r"[^A-Za-z0-9_-]", "_", identity.cluster_id)[:64]
    folder = hashlib.blake2b(os.fsencode(identity.folder.absolute()), digest_size=6).hexdigest()
    return f"{PREFIX}{cluster}-{identity.node}-{folder}{SUFFIX}"


def sweep(shared_folder: Path, mine: Path) -> None:
    """Remove the files of nodes whose data folders are gone. Raises OSError when the folder can't be read."""
    for seen, path in enumerate(sorted(shared_folder.glob(f"{PREFIX}*{SUFFIX}"))):
        if seen >= MAX_SWEPT:
            return
        if path == mine:
            continue
        try:
            file = _open_locked(path, create=False)
        except OSError:
            continue  # it is somebody else's, or in use
        try:
            folder = _data_folder(file)
            if folder is not None and not has_identity(folder):
                path.unlink()
                logger.info("removed %s: its data folder %s is gone", path, folder)
        except OSError as error:
            logger.warning("can't tell whether %s is still needed: %s", path, error)
        finally:
            os.close(file)


def _data_folder(file: int) -> Path | None:
    """The data folder that a file names, None if it does not tell."""
    head = os.pread(file, HEADER_BYTES, 0)
    length = int.from_bytes(head[FOLDER_AT : FOLDER_AT + 2], "little")
    text = head[FOLDER_AT + 2 : FOLDER_AT + 2 + length]
    return Path(os.fsdecode(text)) if 0 < length == len(text) else None


def _open_locked(path: Path, *, create: bool) -> int:
    """Open a regular file of this user and lock it. Raises OSError; BlockingIOError while another process has it."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if create else 0)
    for _ in range(OPEN_TRIES):
        file = os.open(path, flags, 0o600)
        try:
            facts = os.fstat(file)
            if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.geteuid():
                raise PermissionError(f"{path} is no file of this user")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file).st_nlink:
                return file
        except OSError:
            os.close(file)
            raise
        os.close(file)  # it was removed before the lock was had
    raise FileNotFoundError(f"{path} is removed again and again")
