"""Identity of a node's data folder: whose data it holds, and how often it was opened.

A replica's votes are promises, so it may speak for its folder only when the folder surely is its own and whole.
`IDENTITY` (JSON, with a checksum) names the cluster, the node, the incarnation and the boot:

- `incarnation` is new after a loss of data. `boot` grows durably at every start, before anything is sent, so that
  no two lives of a replica ever use one ballot. A random `token` beside it tells two starts of one number apart: one
  of the folder, one of a copy of it. `past` lists the earlier lives, by which a peer knows whether a folder is the one
  that it has seen last, or an older copy.
- `learning` says that the data was lost: the replica must not vote before it has copied everything from its peers.
  With incarnation 0 it has not even begun, and nothing in the folder counts.
- `formatted` says that the Router knows of the folder. A folder that was formatted but not yet acknowledged holds
  no promise, because a replica votes only afterwards; so if such a folder is lost, it may be formatted again. A
  replica whose acknowledged folder is gone could break promises that it no longer knows: it is refused, or begins
  as a learner.

A lock on `LOCK` keeps two processes from opening one folder. The kernel drops it when its holder ends, however it
ends.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .durable_file import TEMPORARY_SUFFIX, make_folder_durably, write_durably
from .errors import TimeTierError
from .paxos.lives import PAST_LIVES

FORMAT = 2
TOKEN_BITS = 20
IDENTITY_FILE = "IDENTITY"
LOCK_FILE = "LOCK"

_FIELDS: dict[str, type] = {
    "cluster_id": str,
    "node": str,
    "incarnation": int,
    "boot": int,
    "token": int,
    "past": list,
    "formatted": bool,
    "learning": bool,
}
_FIELDS_OF_FORMAT_1 = ("cluster_id", "node", "incarnation", "boot", "formatted")


class Refused(TimeTierError):
    """A data folder must not be used as it is; the message says why and what to do."""


class FolderLocked(Refused):
    """Another process has the folder open. It may be one that is just ending: try again for a few seconds."""


class FolderGone(Refused):
    """The folder was taken away while it was being opened: what is there now decides, so look again."""


class Identity:
    """An open data folder. Holds its lock until `close`.

    `cluster_id`, `node`: whose it is. `incarnation`, `boot`, `token`, `past`, `learning`: see the module.
    `formatted`: the Router knows of it. `fresh`: this start formatted it.
    """

    _random_bits: Callable[[int], int] = staticmethod(secrets.randbits)

    def __init__(self, folder: Path, lock: int, fields: dict[str, Any], *, fresh: bool) -> None:
        self.folder = folder
        self.cluster_id: str = fields["cluster_id"]
        self.node: str = fields["node"]
        self.incarnation: int = fields["incarnation"]
        self.boot: int = fields["boot"]
        self.token: int = fields["token"]
        self.past: list[int] = fields["past"]
        self.formatted: bool = fields["formatted"]
        self.learning: bool = fields["learning"]
        self.fresh = fresh
        self._lock: int | None = lock
        self._changing = threading.RLock()  # the node's shell and its service change it from different threads

    @property
    def life_number(self) -> int:
        """Number of this life in its incarnation: it grows with `boot`, and no copy of the folder has it."""
        return self.boot << TOKEN_BITS | self.token

    def begin_life(self) -> None:
        """Begin a further life, durably. Raises OSError."""
        with self._changing:
            self.past = [*self.past, self.life_number][-PAST_LIVES:] if self.boot else []
            self.boot += 1
            self.token = self._random_bits(TOKEN_BITS)
            self._save()

    def lose_data(self) -> None:
        """Note durably that what the folder holds counts no more, in any later life either. Raises OSError."""
        with self._changing:
            self.incarnation, self.learning = 0, True
            self._save()

    def begin_incarnation(self, incarnation: int) -> None:
        """Begin the first life of an incarnation that no peer has seen, durably, as a learner. Raises OSError."""
        with self._changing:
            self.incarnation, self.boot, self.learning = incarnation, 0, True
            self.begin_life()

    def end_learning(self) -> None:
        """Note durably that everything was copied and verified: the replica may vote. Raises OSError."""
        with self._changing:
            self.learning = False
            try:
                self._save()
            except OSError:
                self.learning = True
                raise

    def mark_formatted(self) -> None:
        """Note durably that the Router knows of this folder. Raises OSError."""
        with self._changing:
            if not self.formatted:
                self.formatted = True
                self._save()

    def close(self) -> None:
        """Release the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _save(self) -> None:
        body = {"format": FORMAT, **{name: getattr(self, name) for name in _FIELDS}}
        text = json.dumps({**body, "crc": _checksum(body)}, indent=1) + "\n"
        write_durably(self.folder / IDENTITY_FILE, text.encode())


def has_identity(folder: Path) -> bool:
    """Whether somebody has formatted `folder`. Raises OSError when the disk can't tell."""
    try:
        (folder / IDENTITY_FILE).lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def open_identity(folder: Path, cluster_id: str, node: str, *, may_format: bool, may_learn: bool = False) -> Identity:
    """Open the data folder of `node` for one life: its boot number is one above the last, durably.

    An empty or missing folder is formatted (incarnation 1, boot 1) if `may_format`; else, if `may_learn`, it becomes
    that of a learner (incarnation 0). Raises FolderLocked while another process has it open, Refused when the folder
    is not fit for this node, FolderGone when somebody takes it away meanwhile, OSError when the disk fails.
    """
    if not (may_format or may_learn) and not has_identity(folder) and _is_empty(folder):
        raise Refused(
            f"data folder {folder} is empty, but {node} has been formatted before: it must not vote, since it could "
            "break promises it no longer knows. Restore the folder, or mount the disk that holds it"
        )
    make_folder_durably(folder)
    try:
        lock = _lock_folder(folder)
        try:
            identity = _read_or_format(folder, lock, cluster_id, node, learning=not may_format)
            identity.begin_life()
        except BaseException:
            os.close(lock)
            raise
    except FileNotFoundError:
        raise FolderGone(f"data folder {folder} was taken away while it was being opened") from None
    return identity


def _read_or_format(folder: Path, lock: int, cluster_id: str, node: str, *, learning: bool) -> Identity:
    if has_identity(folder):
        fields = _read(folder / IDENTITY_FILE)
        for name, mine in (("cluster_id", cluster_id), ("node", node)):
            if fields[name] != mine:
                raise Refused(
                    f"data folder {folder} belongs to another {name.replace('_id', '')}: its {name} is "
                    f"{fields[name]}, not {mine}. Point the data folder to the right place"
                )
        return Identity(folder, lock, fields, fresh=False)
    if not _is_empty(folder):
        raise Refused(
            f"data folder {folder} holds files but no {IDENTITY_FILE}: it is not a folder of {node}, or it is damaged. "
            "Restore the file from a copy, or choose an empty folder"
        )
    fields = {
        "cluster_id": cluster_id,
        "node": node,
        "incarnation": 0 if learning else 1,
        "boot": 0,
        "token": 0,
        "past": [],
        "formatted": False,
        "learning": learning,
    }
    return Identity(folder, lock, fields, fresh=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        body = json.loads(path.read_bytes())
    except ValueError as error:
        raise Refused(f"{path} is damaged ({error}): restore it from a copy") from None
    if not isinstance(body, dict):
        raise Refused(f"{path} is damaged (no JSON object): restore it from a copy")
    version = body.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise Refused(f"{path} has format {version}, this program reads up to {FORMAT}: use a newer TimeTier")
    crc = body.pop("crc", None)
    names = _FIELDS_OF_FORMAT_1 if version == 1 else tuple(_FIELDS)
    wrong = [name for name in names if type(body.get(name)) is not _FIELDS[name]]
    if wrong or version not in (1, FORMAT) or crc != _checksum(body):
        detail = f"fields {', '.join(wrong)}" if wrong else "its checksum does not agree"
        raise Refused(f"{path} is damaged ({detail}): restore it from a copy")
    found = {name: body[name] for name in names}
    return found if version == FORMAT else {**found, "token": 0, "past": [body["boot"]], "learning": False}


def _checksum(body: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def _lock_folder(folder: Path) -> int:
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise FolderLocked(f"data folder {folder} is open in another process: end that one first") from None
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _is_empty(folder: Path) -> bool:
    """Whether nothing was ever stored: a lock, or an identity that never got its name, does not count."""
    if not folder.exists():
        return True
    ignored = {LOCK_FILE, IDENTITY_FILE + TEMPORARY_SUFFIX}
    return all(path.name in ignored for path in folder.iterdir())
