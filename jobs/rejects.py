"""Rows of a file that could not be loaded: counted by reason, and kept as JSON lines for whoever mends them."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import msgspec

from ..cluster.errors import InvalidRequest

MAX_ROW_CHARS = 4 << 20  # of a row's text in the file
MAX_REASONS = 100  # different reasons that are counted apart
OTHER_REASONS = "other reasons"


class Rejects:
    """Counts rejected rows and, given a path, writes one line for each: `{"row": .., "reason": .., "record": ..}`.

    `row` is the line of the file for CSV and JSON lines, and the number of the row, from 1, for Parquet and Arrow.
    `count`: rejected rows. `reasons`: how many for each reason. Use it as a context manager.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.count = 0
        self.reasons: dict[str, int] = {}
        self.path = path
        self._file: BinaryIO | None = None
        if path is not None:
            try:
                self._file = path.open("wb")
            except OSError as error:
                raise InvalidRequest(
                    f"rejects={str(path)!r} can't be written ({error.strerror}): name a file in an existing folder"
                ) from None

    def __enter__(self) -> Rejects:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, row: int, reason: str, record: Any, detail: str = "") -> None:
        """Reject one row. `reason`: few different texts, to count by; `detail`: what only this row has."""
        self.count += 1
        key = reason if reason in self.reasons or len(self.reasons) < MAX_REASONS else OTHER_REASONS
        self.reasons[key] = self.reasons.get(key, 0) + 1
        if self._file is not None:
            text = f"{reason}: {detail}" if detail else reason
            self._file.write(_line({"row": row, "reason": text, "record": record}))


def _line(entry: dict[str, Any]) -> bytes:
    try:
        line = msgspec.json.encode(entry, enc_hook=str)
    except (ValueError, TypeError, OverflowError, RecursionError):  # such as text that is not Unicode
        line = msgspec.json.encode({**entry, "record": ascii(entry["record"])})
    if len(line) > MAX_ROW_CHARS:
        cut = ascii(entry["record"])[: MAX_ROW_CHARS // 4]
        line = msgspec.json.encode({**entry, "record": f"{cut}... (cut)"})
    return line + b"\n"
