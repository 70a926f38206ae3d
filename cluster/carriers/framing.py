"""Frames on a byte stream. Pure: bytes in, frames out.

    u32 length of the payload | u64 call id | u8 kind | payload        (little-endian)

The length is judged as soon as the header is complete, before any of the payload is kept.
"""

from __future__ import annotations

import struct

from ..messages import MAX_FRAME_BYTES

HEADER = struct.Struct("<IQB")

_VIEW_BYTES = 64 << 10  # a larger payload is not copied before it is decoded

REQUEST, REPLY, ONE_WAY = 0, 1, 2
"""What a frame is. A one-way frame has call id 0 and is not answered."""


class FrameError(Exception):
    """The stream can't be read on. `counter`: name of the counter that tells of it."""

    def __init__(self, counter: str, reason: str) -> None:
        super().__init__(reason)
        self.counter = counter


class FrameParser:
    """Cuts a stream into frames of at most `max_frame_bytes` of payload.

    It holds what was fed and not yet taken: one incomplete frame plus the last piece fed, if the owner takes all
    complete frames before it feeds the next piece.
    """

    def __init__(self, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._max_frame_bytes = max_frame_bytes
        self._buffer: bytes | bytearray = b""  # parsed up to `_at`; it never changes
        self._at = 0
        self._tail = bytearray()  # an incomplete frame and what came after it: the next `_buffer`
        self._wanted = HEADER.size  # bytes after `_at` without which there is nothing to parse

    @property
    def held_bytes(self) -> int:
        """Bytes fed and not yet taken."""
        return len(self._buffer) - self._at + len(self._tail)

    def feed(self, data: bytes) -> None:
        """Append a piece of the stream."""
        if not self._tail:
            if self._at == len(self._buffer):
                self._buffer, self._at = data, 0
                return
            self._tail += memoryview(self._buffer)[self._at :]
            self._buffer, self._at = b"", 0
        self._tail += data

    def next(self) -> tuple[int, int, bytes | memoryview] | None:
        """The next frame as (call id, kind, payload), None until it is complete. Raises FrameError.

        A large payload is a view, which keeps what it was received with in memory.
        """
        if self.held_bytes < self._wanted:
            return None
        if self._tail:
            self._buffer, self._at, self._tail = self._tail, 0, bytearray()
        length, call_id, kind = HEADER.unpack_from(self._buffer, self._at)
        if kind > ONE_WAY or (call_id == 0) != (kind == ONE_WAY):
            raise FrameError("malformed_frames", f"malformed frame header (kind {kind}, call id {call_id})")
        if length > self._max_frame_bytes:
            raise FrameError("oversized_frames", f"frame of {length} bytes exceeds {self._max_frame_bytes}")
        start = self._at + HEADER.size
        if start + length > len(self._buffer):
            self._wanted = HEADER.size + length
            return None
        self._wanted = HEADER.size
        self._at = start + length
        payload = memoryview(self._buffer)[start : self._at]
        return call_id, kind, payload if length >= _VIEW_BYTES else bytes(payload)
