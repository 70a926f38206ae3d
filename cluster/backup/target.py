"""The place of backups: a folder of any file system that pyarrow knows. All methods block.

Files are written whole and read by name; nothing is renamed, because object stores can't. A file whose size and
checksum are not as the manifest says does not count, so what a crash has left half written does no harm.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import google_crc32c
import msgspec
import pyarrow as pa
import pyarrow.fs

from ..errors import Corrupt, InvalidRequest, Unavailable

PIECE_BYTES = 4 << 20


class Stored(msgspec.Struct, frozen=True):
    """A file of a backup. `name`: below the folder of all backups. `crc`: CRC32C of its bytes."""

    name: str
    size: int
    crc: int


class Target:
    """Folder `path` of a pyarrow file system. `uri`: what people call it."""

    def __init__(self, filesystem: Any, path: str, uri: str = "") -> None:
        self.filesystem = filesystem
        self.path = path.rstrip("/")
        self.uri = uri or path

    @classmethod
    def of(cls, uri: str) -> Target:
        """The folder that a URI (`s3://bucket/folder`, `file:///folder`) or a path names. Raises InvalidRequest."""
        if not uri:
            raise InvalidRequest("the URI of the backups is empty: pass a folder, or something like s3://bucket/folder")
        try:
            place = uri if "://" in uri else str(Path(uri).expanduser().absolute())
            filesystem, path = pa.fs.FileSystem.from_uri(place)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise InvalidRequest(f"uri={uri!r} names no file system that pyarrow knows: {error}") from None
        return cls(filesystem, path, uri)

    # ------------------------------------------------------------ looking

    def size(self, name: str) -> int | None:
        """Bytes of a file, None if there is none. Raises Unavailable."""
        with self._errors(f"look for {name}"):
            (found,) = self.filesystem.get_file_info([self._path(name)])
        return int(found.size) if found.type == pa.fs.FileType.File else None

    def entries(self, folder: str = "") -> tuple[list[str], dict[str, int]]:
        """Names of the folders in a folder, sorted, and of its files with their bytes. Raises Unavailable."""
        selector = pa.fs.FileSelector(self._path(folder), allow_not_found=True)
        with self._errors(f"list {folder or self.uri}"):
            found = self.filesystem.get_file_info(selector)
        folders = sorted(entry.base_name for entry in found if entry.type == pa.fs.FileType.Directory)
        files = {entry.base_name: int(entry.size) for entry in found if entry.type == pa.fs.FileType.File}
        return folders, files

    def find(self) -> dict[str, tuple[str, int]]:
        """All files below the folder by their last name: where each is, and its bytes. Raises Unavailable."""
        selector = pa.fs.FileSelector(self.path, recursive=True, allow_not_found=True)
        with self._errors(f"list {self.uri}"):
            found = self.filesystem.get_file_info(selector)
        start = len(self.path) + 1
        files = [entry for entry in found if entry.type == pa.fs.FileType.File]
        return {entry.base_name: (entry.path[start:], int(entry.size)) for entry in files}

    # ------------------------------------------------------------ writing

    def write(self, name: str, pieces: Iterable[bytes]) -> Stored:
        """Write a file, in place of one that has this name; durable on a local disk when this returns. Raises
        Unavailable."""
        path = self._path(name)
        size = crc = 0
        with self._errors(f"write {name}"):
            self.filesystem.create_dir(path.rpartition("/")[0], recursive=True)
            with self.filesystem.open_output_stream(path, compression=None) as stream:
                for piece in pieces:
                    stream.write(piece)
                    size += len(piece)
                    crc = int(google_crc32c.extend(crc, piece))
            if isinstance(self.filesystem, pa.fs.LocalFileSystem):
                _sync(Path(path))
                _sync(Path(path).parent)
        return Stored(name, size, crc)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there. Raises Unavailable."""
        if self.size(name) is not None:
            with self._errors(f"remove {name}"):
                self.filesystem.delete_file(self._path(name))

    # ------------------------------------------------------------ reading

    def read(self, stored: Stored) -> bytes:
        """A whole file, checked. Raises Corrupt, naming it, when it is missing or damaged; Unavailable."""
        return b"".join(self.pieces(stored))

    def pieces(self, stored: Stored, piece_bytes: int = PIECE_BYTES) -> Iterator[bytes]:
        """The same in pieces; that they are wrong shows at the end, before the last one is given."""
        crc = left = 0
        for piece in self.raw_pieces(stored.name, piece_bytes):
            crc = int(google_crc32c.extend(crc, piece))
            left += len(piece)
            if left >= stored.size and (left, crc) != (stored.size, stored.crc):
                break
            yield piece
        if (left, crc) != (stored.size, stored.crc):
            raise Corrupt(
                f"{stored.name} of the backup is damaged: it should have {stored.size} bytes with checksum "
                f"{stored.crc:08x}, and has {left} or more with {crc:08x}"
            )

    def raw_pieces(self, name: str, piece_bytes: int = PIECE_BYTES) -> Iterator[bytes]:
        """A file's bytes as they are. Raises Corrupt when it is missing, Unavailable."""
        with self._errors(f"read {name}"):
            self._require(name)
            with self.filesystem.open_input_stream(self._path(name), compression=None) as stream:
                while piece := stream.read(piece_bytes):
                    yield piece

    def open(self, name: str) -> Any:
        """A file to be read at any place, by `read_at`. Raises Corrupt when it is missing, Unavailable."""
        with self._errors(f"read {name}"):
            self._require(name)
            return self.filesystem.open_input_file(self._path(name))

    def read_at(self, opened: Any, name: str, offset: int, length: int) -> bytes:
        """Up to `length` bytes of an opened file from `offset` on. Raises Unavailable."""
        with self._errors(f"read {name}"):
            found: bytes = opened.read_at(length, offset)
        return found

    def _require(self, name: str) -> None:
        if self.size(name) is None:
            raise Corrupt(f"{name} of the backup is missing in {self.uri}")

    def _path(self, name: str) -> str:
        return f"{self.path}/{name}" if name else self.path

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            raise Unavailable(f"can't {what} in {self.uri}: {error}") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
