"""What both ends of a direct connection share: the challenge first, then frames, written one loop turn at a time."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, cast
from weakref import WeakKeyDictionary

from ..counters import Counters
from .framing import HEADER, FrameError, FrameParser
from .handshake import ClientHandshake, ServerHandshake

CLOSE_TIMEOUT_S = 1.0  # time that a closing connection has to hand over what is queued
LOG_LINES = 10  # of refusals and the like, at most, in each
LOG_WINDOW_S = 10.0
MAX_LINE_LENGTH = 400
SOCKET_BYTES = 1 << 20  # that the system keeps for a local peer: a block is handed over at once, not in turns
_ALONE_BYTES = 64 << 10  # what is larger is not copied to be sent together with other frames
WRITE_BYTES = 1 << 20  # handed to the transport at a time: all that waits there is moved each time more is added
# A TCP peer that takes nothing for so long is gone. After an outage, a new connection is open sooner than TCP, whose
# pauses double, tries again on the old one.
UNACKNOWLEDGED_TIMEOUT_MS = 3_000


def host_id() -> str:
    """Identity of this machine while it runs: its boot id, or its host name where there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


class BoundedLog:
    """Warnings, `LOG_LINES` in `LOG_WINDOW_S` seconds at most; what was left out is told with the next line."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._window_start_s = float("-inf")
        self._lines = 0

    def warn(self, now_s: float, text: str) -> None:
        """Log `text` unless there were too many lines of late. `now_s`: monotonic."""
        if now_s - self._window_start_s >= LOG_WINDOW_S:
            left_out = self._lines - LOG_LINES
            if left_out > 0:
                self._logger.warning("%d more lines like these were left out", left_out)
            self._window_start_s, self._lines = now_s, 0
        self._lines += 1
        if self._lines <= LOG_LINES:
            self._logger.warning("%s", text[:MAX_LINE_LENGTH])  # it may quote what a peer sent


class Cork:
    """Connections of one event loop with frames that are to leave: at the end of what is being received, else at the
    end of the loop's turn. So frames of one turn share a system call, and an answer does not wait for a turn."""

    _by_loop: ClassVar[WeakKeyDictionary[asyncio.AbstractEventLoop, Cork]] = WeakKeyDictionary()

    def __init__(self) -> None:
        self._waiting: list[FrameConnection] = []
        self._receiving = False

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> Cork:
        """The cork of a loop."""
        cork = cls._by_loop.get(loop)
        if cork is None:
            cork = cls._by_loop[loop] = cls()
        return cork

    def add(self, connection: FrameConnection) -> None:
        """Have a connection flushed, which has frames since just now."""
        if not self._waiting and not self._receiving:
            connection.loop.call_soon(self.flush)
        self._waiting.append(connection)

    def received(self, take: Callable[[], None]) -> None:
        """Take what has arrived, and send at its end what was written meanwhile."""
        self._receiving = True
        try:
            take()
        finally:
            self._receiving = False
            self.flush()

    def flush(self) -> None:
        """Let all leave."""
        waiting, self._waiting = self._waiting, []
        for connection in waiting:
            connection.flush()


class FrameConnection(asyncio.Protocol):
    """One connection. Sides add what they do when it opens (`opened`), with frames (`take_frames`) and at its end
    (`lost`)."""

    def __init__(
        self, handshake: ServerHandshake | ClientHandshake, counters: Counters, log: BoundedLog, max_frame_bytes: int
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.counters = counters
        self.closing = False  # nothing is read or written any more
        self.end_reason = ""  # why it ended, if this side ended it
        self.ended: asyncio.Future[None] = self.loop.create_future()
        self.parser = FrameParser(max_frame_bytes)
        self.handshake = handshake
        self.transport: asyncio.Transport
        self._log = log
        self._cork = Cork.of(self.loop)
        self._corked: deque[bytes] = deque()  # parts of frames that wait to leave, or for the peer
        self._corked_bytes = 0

    # ------------------------------------------------------------ what a side adds

    def opened(self) -> None:
        """The other side has shown that it knows the secret."""

    def take_frames(self) -> None:
        """Take complete frames from the parser. A FrameError ends the connection."""

    def lost(self, reason: str) -> None:
        """The connection is over. Called once."""

    # ------------------------------------------------------------ called by asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=WRITE_BYTES)
        _set_options(self.transport.get_extra_info("socket"))
        if isinstance(self.handshake, ServerHandshake):
            self.transport.write(self.handshake.greeting)

    def data_received(self, data: bytes) -> None:
        if self.closing:
            return
        try:
            if self.handshake.done:
                self.parser.feed(data)
                self._cork.received(self.take_frames)
                return
            answer = self.handshake.receive(data)
            if self.handshake.done:
                self.opened()
            if answer and not self.closing:
                self.transport.write(answer)
        except FrameError as error:
            self.drop(error.counter, str(error))

    def resume_writing(self) -> None:
        self.flush()

    def connection_lost(self, error: Exception | None) -> None:
        self.closing = True
        self._corked.clear()
        if not self.ended.done():
            self.ended.set_result(None)
        self.lost(self.end_reason or (str(error) if error else "closed by the peer"))

    # ------------------------------------------------------------ called by the sides

    def queued_bytes(self) -> int:
        """Bytes that wait to be sent."""
        return self._corked_bytes + self.transport.get_write_buffer_size()

    def write_frame(self, call_id: int, kind: int, payload: bytes) -> None:
        """Send a frame with all others that are written meanwhile, see `Cork`."""
        if not self._corked:
            self._cork.add(self)
        self._corked.append(HEADER.pack(len(payload), call_id, kind))
        self._corked.append(payload)
        self._corked_bytes += HEADER.size + len(payload)

    def flush(self, *, everything: bool = False) -> None:
        """Hand over what the transport has room for; it calls `resume_writing` when it has more."""
        while self._corked and not self.closing:
            if not everything and self.transport.get_write_buffer_size() > WRITE_BYTES:
                return
            parts: list[bytes] = []
            size = 0
            while self._corked and size < WRITE_BYTES and len(self._corked[0]) < _ALONE_BYTES:
                parts.append(self._corked.popleft())
                size += len(parts[-1])
            if parts:
                self.transport.write(b"".join(parts))
            else:  # a view, so that what the socket does not take at once is copied once only
                large = self._corked.popleft()
                size = len(large)
                self.transport.write(memoryview(large))
            self._corked_bytes -= size
        if self.closing:
            self._corked.clear()
            self._corked_bytes = 0

    def drop(self, counter: str, reason: str) -> None:
        """End the connection at once, count it and log why."""
        if self.closing:
            return
        self.counters.add(counter)
        self._log.warn(self.loop.time(), f"connection with {self.describe_peer()} ended: {reason}")
        self.end_reason = reason
        self.closing = True
        self.transport.abort()

    def close(self, reason: str) -> None:
        """End the connection after what is queued was sent, in CLOSE_TIMEOUT_S seconds at most."""
        if self.closing:
            return
        self.flush(everything=True)
        self.end_reason = reason
        self.closing = True
        self.transport.close()
        timer = self.loop.call_later(CLOSE_TIMEOUT_S, self.transport.abort)
        self.ended.add_done_callback(lambda _: timer.cancel())

    def describe_peer(self) -> str:
        """The other side, for log lines."""
        peer = self.transport.get_extra_info("peername")
        return f"{peer[0]}:{peer[1]}" if isinstance(peer, tuple) else "a local process"


def _set_options(sock: socket.socket | None) -> None:
    """Give a local connection room for a large frame; have the kernel end a TCP connection whose other machine is gone
    without a word."""
    if sock is None:
        return
    if sock.family == socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", 5),
        ("TCP_KEEPINTVL", 2),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", UNACKNOWLEDGED_TIMEOUT_MS),
    ):
        if hasattr(socket, name):  # not every system has each of them
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
