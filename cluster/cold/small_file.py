"""Small files beside a cold node's disks that are replaced as a whole: what is there after a crash is the old or the
new content, never a mixture."""

from __future__ import annotations

from pathlib import Path

from .files import Files

_PART = ".part"


def replace_file(files: Files, path: Path, data: bytes) -> None:
    """Give a file this content, durably. Raises OSError."""
    part = path.with_name(path.name + _PART)
    with files.open(part, create=True, empty=True) as opened:
        opened.write(data, 0)
        opened.sync()
    files.rename(part, path)
    files.sync_folder(path.parent)


def read_file(files: Files, path: Path, most_bytes: int) -> bytes:
    """Content of a file, b"" if it is not there, at most `most_bytes` of it. Raises OSError."""
    try:
        with files.open(path) as opened:
            return opened.read(min(opened.facts().size, most_bytes), 0)
    except FileNotFoundError:
        return b""
