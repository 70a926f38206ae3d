"""CSV and JSON lines, read so that one bad line costs one line.

Both formats are split here rather than by pyarrow: its readers guess each column's type from the first block and end
at the first value that does not fit, at a stray quote, and at a record longer than a block. So fields of CSV stay
text, exactly as in the file, and a JSON line keeps its own types. Memory is bounded by the longest record allowed.
"""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import msgspec

from ..cluster.errors import InvalidRequest
from .rejects import Rejects

MAX_RECORD_CHARS = 4 << 20
CHUNK_RECORDS = 8_192
CHUNK_CHARS = 8 << 20


class _Lines:
    """Lines for a `csv.reader`. It notes which ones a record took, and takes them back."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._returned: deque[str] = deque()
        self._taken: list[str] = []
        self._taken_chars = 0
        self.line = 1  # number of the first line that no finished record has taken

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._returned.popleft() if self._returned else self._file.readline(MAX_RECORD_CHARS + 1)
        if not line:
            raise StopIteration
        if len(line) > MAX_RECORD_CHARS:
            self._skip_rest_of_line(line)
        self._taken.append(line)
        self._taken_chars += len(line)
        if self._taken_chars > MAX_RECORD_CHARS:
            raise csv.Error(f"longer than {MAX_RECORD_CHARS >> 20} MiB; is a quote not closed?")
        return line

    def finish(self) -> int:
        """The record is complete. Number of its first line."""
        first = self.line
        self.line += len(self._taken)
        self._taken, self._taken_chars = [], 0
        return first

    @property
    def chars(self) -> int:
        """Length of the record that is being read."""
        return self._taken_chars

    def drop(self) -> tuple[int, str]:
        """Give up the whole record: number of its first line, and its text."""
        text = "".join(self._taken)
        return self.finish(), text

    def drop_first(self) -> tuple[int, str]:
        """Give up the record's first line, which is returned with its number, and read on after that."""
        first, *others = self._taken
        self._returned.extendleft(reversed(others))
        self._taken = [first]
        return self.finish(), first

    def _skip_rest_of_line(self, line: str) -> None:
        while line and not line.endswith(("\n", "\r")):
            line = self._file.readline(MAX_RECORD_CHARS)


def read_csv(path: Path, rejects: Rejects, delimiter: str) -> tuple[list[str], Iterator[tuple[list[Any], list[int]]]]:
    """Column names of a CSV file in UTF-8 with a header line, and its records in chunks with their line numbers.

    A chunk is a list of columns, a sequence of str each. Records with a wrong number of fields or with text that is
    not UTF-8 are rejected. Where a quote is wrong, one line is rejected and reading goes on with the next, so that a
    quote that is never closed does not swallow the rest. Blank lines are skipped.
    """
    with _open_text(path) as file:
        try:
            names = _header(csv.reader(_Lines(file), strict=True, delimiter=delimiter))
        except csv.Error as error:
            raise InvalidRequest(f"{path}: the header line can't be read: {error}") from None
    if not names:
        raise InvalidRequest(f"{path} is empty: a CSV file begins with a line that names its columns")
    return names, _csv_chunks(path, delimiter, len(names), rejects)


def _open_text(path: Path) -> TextIO:
    """The file as text; bytes that are not UTF-8 become surrogates, so that they are seen in their record."""
    csv.field_size_limit(max(csv.field_size_limit(), MAX_RECORD_CHARS))
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")


def _header(reader: Iterator[list[str]]) -> list[str]:
    return next((fields for fields in reader if fields), [])


def _csv_chunks(path: Path, delimiter: str, width: int, rejects: Rejects) -> Iterator[tuple[list[Any], list[int]]]:
    records: list[list[str]] = []
    numbers: list[int] = []
    chars = 0
    with _open_text(path) as file:
        lines = _Lines(file)
        reader = csv.reader(lines, strict=True, delimiter=delimiter)
        _header(reader)
        lines.finish()
        while True:
            try:
                fields = next(reader)
            except StopIteration:
                break
            except csv.Error as error:  # the quotes are wrong, so nobody knows where the record ends
                number, text = lines.drop_first()
                rejects.add(number, "malformed CSV", text.rstrip("\r\n"), str(error))
                continue
            if not fields:
                lines.finish()
                continue
            if len(fields) != width:
                number, text = lines.drop()
                rejects.add(number, "wrong number of fields", text.rstrip("\r\n"), f"{len(fields)} instead of {width}")
                continue
            if not _is_unicode(fields):
                number, text = lines.drop()
                rejects.add(number, "not UTF-8", text.rstrip("\r\n"))
                continue
            chars += lines.chars
            records.append(fields)
            numbers.append(lines.finish())
            if len(records) >= CHUNK_RECORDS or chars >= CHUNK_CHARS:
                yield list(zip(*records, strict=True)), numbers
                records, numbers, chars = [], [], 0
    if records:
        yield list(zip(*records, strict=True)), numbers


def _is_unicode(fields: list[str]) -> bool:
    text = "".join(fields)
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_json_lines(path: Path, rejects: Rejects) -> Iterator[tuple[list[dict[str, Any]], list[int]]]:
    """JSON objects of a file, one a line, in chunks with their line numbers; lines that are none are rejected."""
    decode = msgspec.json.Decoder().decode
    records: list[dict[str, Any]] = []
    numbers: list[int] = []
    chars = 0
    with path.open("rb") as file:
        for number, line in enumerate(_bounded_lines(file), 1):
            problem = detail = ""
            record: Any = None
            if line.isspace():
                continue
            if len(line) > MAX_RECORD_CHARS:
                problem, detail = "malformed JSON", f"the line is longer than {MAX_RECORD_CHARS >> 20} MiB"
            else:
                try:
                    record = decode(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
                    if not isinstance(record, dict):
                        problem, detail = "not a JSON object", f"a {type(record).__name__}"
                except (msgspec.MsgspecError, ValueError, RecursionError) as error:
                    problem, detail = "malformed JSON", str(error)
            if problem:
                rejects.add(number, problem, line.decode(errors="backslashreplace").rstrip("\r\n"), detail)
                continue
            records.append(record)
            numbers.append(number)
            chars += len(line)
            if len(records) >= CHUNK_RECORDS or chars >= CHUNK_CHARS:
                yield records, numbers
                records, numbers, chars = [], [], 0
    if records:
        yield records, numbers


def _bounded_lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines of a file; of one that is too long, just so much that this is seen."""
    while line := file.readline(MAX_RECORD_CHARS + 1):
        rest = line
        while rest and len(line) > MAX_RECORD_CHARS and not rest.endswith(b"\n"):
            rest = file.readline(MAX_RECORD_CHARS)
        yield line
