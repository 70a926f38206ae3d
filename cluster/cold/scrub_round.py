"""How far a cold node is with reading all that it has, kept on disk so that a restart goes on from there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from .block import checksum
from .files import Files
from .small_file import read_file, replace_file

STATE_FILE = "scrub.json"
_MOST_BYTES = 64 << 10


class ScrubSettings(NamedTuple):
    """`mb_per_s`: 0 has no round begin by itself. `every_s`: from one round's start to the next one's.

    `grace_s`: age from which a file is missed that all other replicas have: a younger one is perhaps being written.
    """

    mb_per_s: float = 0.0
    every_s: float = 7 * 86_400.0
    grace_s: float = 600.0


class Round(msgspec.Struct):
    """One reading of all files. Times in seconds since 1970; `ended_at`: 0 while it goes on.

    `cursor`: the last file that is done. `files`, `nbytes`: done. `found`: places that were damaged, or files that were
    missing; `repaired`: of these; `errors`: files that could not be read. `compared`: what is missing here was looked
    for. `mb_per_s`: the rate of this round, 0 for that of the configuration.
    """

    began_at: float
    ended_at: float = 0.0
    cursor: str = ""
    files: int = 0
    nbytes: int = 0
    found: int = 0
    repaired: int = 0
    errors: int = 0
    compared: bool = False
    mb_per_s: float = 0.0

    def figures(self) -> dict[str, Any]:
        """What `status` shows of a round that is over."""
        return {
            "began_at": round(self.began_at, 3),
            "ended_at": round(self.ended_at, 3),
            "seconds": round(self.ended_at - self.began_at, 3),
            "files": self.files,
            "bytes": self.nbytes,
            "found": self.found,
            "repaired": self.repaired,
            "errors": self.errors,
        }


class ScrubState(msgspec.Struct):
    """`next_at`: seconds since 1970 when the next round is due, 0 = not planned yet. `now`: the round under way."""

    next_at: float = 0.0
    now: Round | None = None
    last: Round | None = None


def read_state(files: Files, folder: Path) -> ScrubState:
    """What was last saved; a fresh state if there is nothing, or nothing that can be read. Raises OSError."""
    data = read_file(files, folder / STATE_FILE, _MOST_BYTES)
    try:
        found = json.loads(data or b"{}")
        body = msgspec.json.encode(found.get("state"))
        if found.get("crc") == checksum(body):
            return msgspec.json.decode(body, type=ScrubState)
    except (ValueError, AttributeError, msgspec.MsgspecError):
        return ScrubState()  # then a round begins anew, which costs time and nothing else
    return ScrubState()


def write_state(files: Files, folder: Path, state: ScrubState) -> None:
    """Save it. Raises OSError."""
    body = msgspec.to_builtins(state)
    crc = checksum(msgspec.json.encode(body))
    replace_file(files, folder / STATE_FILE, msgspec.json.encode({"state": body, "crc": crc}))
