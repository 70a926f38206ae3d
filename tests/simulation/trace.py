"""What happened in a run, event by event: always as a hash, on demand as a log that people can read.

Two runs of one seed have equal hashes, or they were not the same run.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec
import xxhash
from timetier.cluster.keys import is_system, split_item_key, split_timeline
from timetier.cluster.messages import decode

MAX_LINES = 400_000
_MAX_CHARS = 600
_TIMELINE_FIELDS = frozenset({"timeline", "timelines"})
_KEY_FIELDS = frozenset({"keys", "before", "floors", "bounds", "cursor"})


class Trace:
    """The events of one run. `lines`: the last ones, if `verbose`."""

    def __init__(self, clock: Callable[[], float], *, verbose: bool = False) -> None:
        self.verbose = verbose
        self.events = 0
        self.lines: deque[str] = deque(maxlen=MAX_LINES)
        self._clock = clock
        self._hash = xxhash.xxh3_64()

    def digest(self) -> str:
        """Hash of all events until here."""
        return self._hash.hexdigest()

    def note(self, who: str, what: str) -> None:
        """An event in words."""
        self.events += 1
        now = self._clock()
        self._hash.update(f"{now!r} {who} {what}".encode())
        if self.verbose:
            self.lines.append(f"{now:11.6f} {who:12} {what}")

    def frame(self, what: str, source: str, target: str, frame: bytes) -> None:
        """An event of the network."""
        self.events += 1
        now = self._clock()
        self._hash.update(f"{now!r} {what} {source} {target}".encode())
        self._hash.update(frame)
        if self.verbose:
            self.lines.append(f"{now:11.6f} {source:12} {what} {target}: {_shown(frame)}")


class TraceLog(logging.Handler):
    """Takes what the services log into the trace."""

    def __init__(self, trace: Trace) -> None:
        super().__init__(logging.INFO)
        self._trace = trace

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            text += f" [{record.exc_info[1]!r}]"
        self._trace.note("log", f"{record.levelname.lower()}: {text}")


def show_timeline(key: bytes) -> str:
    """A timeline key in words."""
    try:
        bucket, _, owner = split_timeline(key)
    except Exception as error:
        return f"<no timeline: {error}>"
    return f"system-{bucket}" if is_system(key) else owner.decode(errors="replace")


def show_key(key: bytes) -> str:
    """An item key in words, as far as it is one."""
    if len(key) < 10 or key[-2:] != b"\x00\x01":
        return key.hex() or "-"
    timestamp, item_id = split_item_key(key)
    return f"{timestamp}{'/' + item_id.decode('latin-1') if item_id else ''}"


def _shown(frame: bytes) -> str:
    if not frame:
        return "(nothing)"
    try:
        text = _render(decode(frame))
    except Exception as error:
        return f"{len(frame)} bytes that are no message: {error}"
    return text if len(text) <= _MAX_CHARS else text[: _MAX_CHARS - 3] + "..."


def _render(value: Any, field: str = "") -> str:
    if isinstance(value, msgspec.Struct):
        shown = [
            f"{name}={_render(part, name)}"
            for name in value.__struct_fields__
            if (part := getattr(value, name)) not in (b"", [], None)
        ]
        return f"{type(value).__name__}({', '.join(shown)})"
    if isinstance(value, (list, tuple)):
        return "[" + " ".join(_render(part, field) for part in value) + "]"
    if isinstance(value, bytes):
        if field in _TIMELINE_FIELDS:
            return show_timeline(value)
        if field in _KEY_FIELDS and len(value) >= 10:
            return show_key(value)
        return value.decode() if value.isascii() and value.decode().isprintable() else value.hex()[:48]
    return str(value)
