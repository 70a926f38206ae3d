"""Where a node's Unix socket lies: a short path, in a folder that only this user can enter."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path

from ..cluster.identity import Refused

_LONGEST_BASE_BYTES = 48  # a socket's path ends at 107 bytes, and a temporary name is added to it


def socket_path(cluster_id: str, node: str) -> Path:
    """Path of the socket of `node`; its folder exists. Raises Refused when somebody else owns that folder."""
    base = Path(tempfile.gettempdir())
    if len(os.fsencode(base)) > _LONGEST_BASE_BYTES:
        base = Path("/tmp")
    folder = base / f"timetier-{cluster_id[:8]}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise Refused(f"{folder} belongs to somebody else: remove it, or set TMPDIR to a folder of your own")
    if stat.S_IMODE(found.st_mode) != 0o700:
        folder.chmod(0o700)
    return folder / f"{node}.sock"


def remove_folder_of(path: Path) -> None:
    """Remove the folder of a socket, if it was the last one there."""
    with contextlib.suppress(OSError):  # others still listen, or it is gone already
        path.parent.rmdir()
