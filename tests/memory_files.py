"""A file system in memory, as pyarrow takes one (`pyarrow.fs.PyFileSystem`): an object store without folders."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.fs
from pyarrow.fs import FileInfo, FileSelector, FileType


class _Upload(io.BytesIO):
    """Bytes that become a file when they are complete."""

    def __init__(self, files: dict[str, bytes], path: str) -> None:
        super().__init__()
        self._files = files
        self._path = path

    def close(self) -> None:
        if not self.closed:
            self._files[self._path] = self.getvalue()
        super().close()


class MemoryFiles(pyarrow.fs.FileSystemHandler):  # type: ignore[misc]
    """`files`: bytes by path."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def get_type_name(self) -> str:
        return "memory-of-a-test"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: Sequence[str]) -> list[Any]:
        return [self._info(path) for path in paths]

    def _info(self, path: str) -> Any:
        if path in self.files:
            return FileInfo(path, FileType.File, size=len(self.files[path]))
        inside = any(name.startswith(path + "/") for name in self.files)
        return FileInfo(path, FileType.Directory if inside else FileType.NotFound)

    def get_file_info_selector(self, selector: FileSelector) -> list[Any]:
        start = selector.base_dir.rstrip("/") + "/"
        below = [name[len(start) :] for name in self.files if name.startswith(start)]
        names = below if selector.recursive else {name.partition("/")[0] for name in below}
        return [self._info(start + name) for name in sorted(names)]

    def create_dir(self, path: str, recursive: bool) -> None:
        """Object stores have no folders."""

    def delete_file(self, path: str) -> None:
        del self.files[path]

    def open_input_stream(self, path: str) -> Any:
        return self.open_input_file(path)

    def open_input_file(self, path: str) -> Any:
        if path not in self.files:
            raise FileNotFoundError(path)
        return pa.PythonFile(io.BytesIO(self.files[path]), mode="r")

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        return pa.PythonFile(_Upload(self.files, path), mode="w")

    def delete_dir(self, path: str) -> None:
        self._refuse("delete_dir")

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        self._refuse("delete_dir_contents")

    def delete_root_dir_contents(self) -> None:
        self._refuse("delete_root_dir_contents")

    def move(self, src: str, dest: str) -> None:
        self._refuse("move")

    def copy_file(self, src: str, dest: str) -> None:
        self._refuse("copy_file")

    def open_append_stream(self, path: str, metadata: Any) -> Any:
        self._refuse("open_append_stream")

    def _refuse(self, what: str) -> None:
        raise OSError(f"{what}: object stores can't")
