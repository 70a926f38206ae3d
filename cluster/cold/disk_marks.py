"""Which disk is which: a marker on each disk of a cold node, and the node's own register of them.

A disk that is not mounted looks like an empty folder, and what is written there fills another disk and is hidden as
soon as the right one is mounted. So each disk bears a *marker* (`_disk.json`: cluster, node, ordinal and a random id of
the disk), and the *register* beside the node's identity (`disks.json`) says which id each ordinal has. A folder without
the marker that the register names is not touched.

Formatting a disk goes in three durable steps: the register has the id of the disk and what is *pending*, then the
marker is written, then nothing is pending any more. So a crash in between is finished by the next start, and no other
folder is ever taken for a fresh one. Both files are JSON with a checksum and are replaced as a whole.
"""

from __future__ import annotations

import json
import secrets
import zlib
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from ..errors import Unavailable
from .files import Files

MARK_FILE = "_disk.json"  # the underscore hides it from readers of Arrow folders
REGISTER_FILE = "disks.json"
FORMAT = 1

# What is to be done with a disk that the register names and whose marker is not written yet.
NOTHING = ""
TAKE = "take"  # write the marker; files that are there are the node's own
FILL = "fill"  # it must be empty: write the marker and copy all files from the peers
ERASE = "erase"  # the same, but remove first what is there

_ID_BYTES = 8
_MOST_BYTES = 64 << 10
_PART = ".part"
T = TypeVar("T")


class Damaged(Exception):
    """A marker or a register is there, but can't be read; the message says which."""


class Owner(NamedTuple):
    """Whose disks they are."""

    cluster_id: str
    node: str


class Mark(msgspec.Struct, frozen=True):
    """What the marker of a disk says. `rebuilding`: files of the node are still missing on it."""

    cluster_id: str
    node: str
    ordinal: int
    disk_id: str
    rebuilding: bool

    def is_of(self, owner: Owner, ordinal: int) -> bool:
        """Whether the disk is this one of this node, whatever its id."""
        return (self.cluster_id, self.node, self.ordinal) == (*owner, ordinal)


class Slot(msgspec.Struct, frozen=True):
    """What the register says of an ordinal. `disk_id`: "" when it is not known."""

    disk_id: str
    pending: str = NOTHING


class _Register(msgspec.Struct):
    slots: list[Slot]


def new_disk_id() -> str:
    """A random id that no other disk has."""
    return secrets.token_hex(_ID_BYTES)


def read_mark(files: Files, folder: Path) -> Mark | None:
    """The marker of a disk, None if there is none. Raises Damaged, OSError."""
    return _read(files, folder / MARK_FILE, Mark)


def write_mark(files: Files, folder: Path, mark: Mark) -> None:
    """Put a marker on a disk, durably. Raises OSError."""
    _write(files, folder / MARK_FILE, mark)


def read_register(files: Files, folder: Path) -> list[Slot] | None:
    """The register of a node, None if there is none. Raises Damaged, OSError."""
    found = _read(files, folder / REGISTER_FILE, _Register)
    return None if found is None else found.slots


def write_register(files: Files, folder: Path, slots: list[Slot]) -> None:
    """Replace the register of a node, durably. Raises OSError."""
    _write(files, folder / REGISTER_FILE, _Register(slots))


def first_register(files: Files, owner: Owner, folders: list[Path], *, lost: bool) -> list[Slot]:
    """The register of a node that has none yet. `lost`: the node's folder was lost, its peers have its files.

    Disks that bear the node's markers are its own. If there are some, then all were marked before: one without a
    marker is away, unless the node's folder was lost, for then it is to be filled.
    """
    slots: list[Slot | None] = []
    for ordinal, folder in enumerate(folders):
        try:
            mark = read_mark(files, folder)
        except (Damaged, OSError):
            mark = None  # opening the disk says what is wrong with it
        own = mark is not None and mark.is_of(owner, ordinal)
        slots.append(Slot(mark.disk_id) if mark is not None and own else None)
    marked = any(slot is not None for slot in slots)
    blank = Slot("") if marked and not lost else None
    return [slot or blank or Slot(new_disk_id(), FILL if lost else TAKE) for slot in slots]


def _write(files: Files, path: Path, content: Mark | _Register) -> None:
    body = {"format": FORMAT, **msgspec.to_builtins(content)}
    text = json.dumps({**body, "crc": _checksum(body)}, indent=1) + "\n"
    part = path.with_name(path.name + _PART)
    with files.open(part, create=True, empty=True) as opened:
        opened.write(text.encode(), 0)
        opened.sync()
    files.rename(part, path)
    files.sync_folder(path.parent)


def _read(files: Files, path: Path, kind: type[T]) -> T | None:
    try:
        with files.open(path) as opened:
            data = opened.read(_MOST_BYTES, 0)
    except FileNotFoundError:
        return None
    try:
        body = json.loads(data)
        if not isinstance(body, dict) or body.pop("crc", None) != _checksum(body):
            raise Damaged(f"{path} is damaged: its checksum does not agree")
        version = body.pop("format", None)
        if version != FORMAT:
            raise Unavailable(f"{path} has format {version}, this program reads {FORMAT}: use a newer TimeTier")
        return msgspec.convert(body, kind)
    except (ValueError, msgspec.ValidationError) as error:
        raise Damaged(f"{path} is damaged: {error}") from None


def _checksum(body: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())
