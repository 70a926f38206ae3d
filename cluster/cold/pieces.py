"""What a cold file consists of, and how each byte of it is checked.

A file is a sequence of *pieces* without gaps: the head (Arrow's magic and schema), the blocks, and the tail (the end
of the stream and the footer, whose metadata has the index). Each has a checksum: the index names those of the blocks
and of the head, and the *seal* at the end of the index is the CRC32C of the tail, computed with zeros in its own
place. The schema names the file. So a file can be judged without its link, its peers, or any other part of the
cluster: it is good if it is what its name says and all pieces are right; and a good file can be put together from
pieces of several damaged copies, because each piece tells by itself whether it is right.

Files that were written before there were seals and names have only the checksums of their blocks: of these, head and
tail can only be compared with those of other copies.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from ..errors import Corrupt
from .block import FileIndex, checksum, read_index

GUESSED_TAIL_BYTES = 64 << 10  # of a file whose footer's length is not known: one read gets most of them
_SEAL = re.compile(rb',"head":"([0-9a-f]{8})","tail":"([0-9a-f]{8})"\}')
_DIGITS = 8
_MAGIC = b"ARROW1"
_END_BYTES = 64  # at most between the last batch and the footer: a mark of eight bytes
_LENGTH_BYTES = 4  # of the footer's length, before the magic
_MAX_TAIL_BYTES = 64 << 20

Read = Callable[[int, int], bytes]  # (offset, length) -> bytes of a file, fewer at its end


class Piece(NamedTuple):
    """`crc`: None in the head and the tail of a file without a seal."""

    offset: int
    length: int
    crc: int | None

    @property
    def end(self) -> int:
        return self.offset + self.length

    def fits(self, data: bytes | memoryview) -> bool:
        """Whether these are the bytes of the piece, as far as that can be told."""
        return len(data) == self.length and (self.crc is None or checksum(data) == self.crc)


class Anatomy(NamedTuple):
    """A file, as its tail describes it. `tail`: its bytes, which were checked; `says`: what they say of the blocks.
    `name`: "" if the file does not say."""

    size: int
    says: FileIndex
    name: str
    sealed: bool
    head: Piece
    blocks: list[Piece]
    tail: bytes

    @property
    def tail_at(self) -> int:
        return self.size - len(self.tail)

    def check_name(self, file: str) -> None:
        """Raises Corrupt (reason "name") if this is another file than `file`."""
        if self.name and self.name != file:
            raise Corrupt(f"what lies under the name {file} is {self.name}", reason="name", offset=0)


def read_anatomy(read: Read, size: int) -> Anatomy:
    """What a file says of itself. `read`: gives its bytes; usually called once, for the end of the file.

    Raises Corrupt if the tail is damaged, whatever `read` raises.
    """
    want = GUESSED_TAIL_BYTES
    while True:
        start = max(0, size - want)
        found = parse_end(size, read(start, size - start) if size > start else b"")
        if isinstance(found, Anatomy):
            return found
        want = found


def parse_end(size: int, end: bytes) -> Anatomy | int:
    """What a file of `size` bytes says of itself, from its last bytes; or how many of these are needed.

    Raises Corrupt if the tail is damaged, or if `end` is shorter than asked for.
    """
    if len(end) < min(size, GUESSED_TAIL_BYTES):
        raise Corrupt(f"the file ends before {size}", reason="short")
    footer = _footer_at(size, end)
    if size - footer + _END_BYTES > len(end) and len(end) < size:
        return size - footer + _END_BYTES
    index = read_index(_Sparse(size, size - len(end), end))
    if not index.blocks:
        raise Corrupt("this cold file has no blocks", reason="content")
    blocks = [Piece(entry.offset, entry.length, entry.crc) for entry in index.blocks]
    _check_places(blocks, footer)
    tail_at = blocks[-1].end
    tail = end[len(end) - (size - tail_at) :]
    found = _seal_of(tail, index)
    if found is not None:
        zeroed = tail[: found.start(2)] + b"0" * _DIGITS + tail[found.end(2) :]
        if checksum(zeroed) != int(found[2], 16):
            raise Corrupt("the footer is damaged", reason="checksum", offset=tail_at)
    head = Piece(0, blocks[0].offset, None if found is None else int(found[1], 16))
    return Anatomy(size, index, index.metadata.get("timetier.file", ""), found is not None, head, blocks, tail)


def _footer_at(size: int, end: bytes) -> int:
    """Offset of the footer, as the end of the file says."""
    if len(end) < _LENGTH_BYTES + len(_MAGIC) or not end.endswith(_MAGIC):
        raise Corrupt("the end of the file is no end of an Arrow file", reason="content", offset=max(0, size - 6))
    length_at = size - len(_MAGIC) - _LENGTH_BYTES
    length = int.from_bytes(end[-len(_MAGIC) - _LENGTH_BYTES :][:_LENGTH_BYTES], "little")
    if not 0 <= length <= min(length_at, _MAX_TAIL_BYTES):
        raise Corrupt(f"a footer of {length} bytes in a file of {size}", reason="content", offset=length_at)
    return length_at - length


def _check_places(blocks: list[Piece], footer: int) -> None:
    """Raises Corrupt unless the blocks follow each other, behind a head and before the footer."""
    at = blocks[0].offset
    for block in blocks:
        if block.offset != at or block.length <= 0:
            raise Corrupt(f"the index has a block at {block.offset}, not at {at}", reason="content", offset=at)
        at = block.end
    if blocks[0].offset <= 0 or not footer - _END_BYTES <= at <= footer:
        raise Corrupt("the blocks of the index do not lie in the file", reason="content", offset=blocks[0].offset)


def _seal_of(tail: bytes, index: FileIndex) -> re.Match[bytes] | None:
    """Where the seal is in the tail; None if the file has none. Raises Corrupt if it was there and is damaged."""
    found = list(_SEAL.finditer(tail))
    if found:
        return found[-1]
    if "timetier.file" in index.metadata:  # files with a name have a seal
        raise Corrupt("the seal of the footer is damaged", reason="content")
    return None


def parts_to_read(anatomy: Anatomy, most_bytes: int) -> Iterator[list[Piece]]:
    """Head and blocks in runs of neighbours, each of at most `most_bytes` in all (or one piece)."""
    run: list[Piece] = []
    for piece in (anatomy.head, *anatomy.blocks):
        if run and piece.end - run[0].offset > most_bytes:
            yield run
            run = []
        run.append(piece)
    if run:
        yield run


class _Sparse(io.RawIOBase):
    """A file of which only one part is known; the rest reads as zeros. Arrow finds the footer in it."""

    def __init__(self, size: int, at: int, data: bytes) -> None:
        self._size, self._at, self._data = size, at, data
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset + (0, self._position, self._size)[whence]
        return self._position

    def size(self) -> int:
        return self._size

    def read(self, length: int = -1) -> bytes:
        start = self._position
        stop = self._size if length < 0 else min(self._size, start + length)
        self._position = stop
        known = self._data[max(0, start - self._at) : max(0, stop - self._at)]
        return bytes(max(0, min(stop, self._at) - start)) + known
