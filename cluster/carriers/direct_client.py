"""The connecting side of the direct carrier."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import ssl
from collections import deque
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

from ..counters import Counters
from ..errors import ProtocolError
from ..messages import MAX_FRAME_BYTES, Message, encode
from .base import Address, CallError, Then, begin_task, decode_answer, settle
from .connection import BoundedLog, FrameConnection
from .framing import HEADER, ONE_WAY, REPLY, REQUEST, FrameError
from .handshake import NONCE_BYTES, ClientHandshake, check_secret

CONNECT_TIMEOUT_S = 2.0
MAX_QUEUE_BYTES = 64 << 20
MAX_CALLS = 65_536  # in flight to one node
FIRST_BACK_OFF_S, LAST_BACK_OFF_S = 0.02, 0.5

logger = logging.getLogger(__name__)


class DirectCarrier:
    """Carries messages over sockets: one connection to each node, opened on demand and used by all.

    A node that could not be reached is left alone for 20 ms, doubling up to 0.5 s: until then calls fail at once.

    `secret`: the cluster's. `host_id`: identity of this machine (see `host_id()`); a node's Unix socket is tried if
    its address names the same, then TCP. `max_queue_bytes`: what may wait to be sent to one node, plus one frame.
    `tls`: for TCP.

    Counters: connections, failed_connections, malformed_frames, oversized_frames, dropped_frames, calls, timeouts,
    late_replies.
    """

    def __init__(
        self,
        secret: bytes,
        *,
        host_id: str,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        max_queue_bytes: int = MAX_QUEUE_BYTES,
        max_frame_bytes: int = MAX_FRAME_BYTES,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.secret = check_secret(secret)
        self.host_id = host_id
        self.connect_timeout_s = connect_timeout_s
        self.max_queue_bytes = max_queue_bytes
        self.max_frame_bytes = max_frame_bytes
        self.tls = tls
        self.counters = Counters()
        self.log = BoundedLog(logger)
        self._peers: dict[str, Peer] = {}
        self._closed = False

    async def call(self, node: str, message: Message, timeout_s: float) -> Message:
        """Answer of `node`. Raises CallError when none came in time, TooLarge for a message beyond the frame limit."""
        frame = encode(message)
        self.counters.add("calls")
        peer = self._peers.get(node)
        if peer is None:
            raise CallError(self._stranger(node), sent=False)
        connection = peer.connection
        if connection is None:
            started_s = asyncio.get_running_loop().time()
            connection = await peer.connect(timeout_s)
            timeout_s -= asyncio.get_running_loop().time() - started_s
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        call_id = connection.begin(frame, timeout_s, partial(settle, answer))
        try:
            return await answer
        finally:
            connection.forget(call_id)

    def begin(self, node: str, message: Message, timeout_s: float, then: Then) -> None:
        """Begin a `call`; on an open connection that takes no task."""
        peer = self._peers.get(node)
        if peer is None or peer.connection is None:
            begin_task(self.call(node, message, timeout_s), then)
            return
        frame = encode(message)
        self.counters.add("calls")
        try:
            peer.connection.begin(frame, timeout_s, then)
        except CallError as error:
            then(error)

    def send(self, node: str, message: Message) -> bool:
        """Send one way. While the connection is being opened the frame waits for it, within `max_queue_bytes`."""
        frame = encode(message)
        peer = self._peers.get(node)
        if peer is not None and peer.send(frame):
            return True
        self.counters.add("dropped_frames")
        return False

    def update(self, addresses: Mapping[str, Address]) -> None:
        """Replace the addresses; connections to nodes that went or moved are closed."""
        if self._closed:
            return
        for name, peer in list(self._peers.items()):
            if addresses.get(name) != peer.address:
                self._peers.pop(name).close("the node has moved")
        for name, address in addresses.items():
            if name not in self._peers:
                self._peers[name] = Peer(self, name, address)

    async def close(self) -> None:
        """End all connections; calls in flight end with CallError."""
        self._closed = True
        peers = list(self._peers.values())
        self._peers.clear()
        for peer in peers:
            peer.close("the carrier is closed")
        await asyncio.gather(*(peer.ended() for peer in peers))

    def _stranger(self, node: str) -> str:
        return "the carrier is closed" if self._closed else f"no address of {node} is known"


class Peer:
    """A node as the carrier knows it: its address, and the connection or the attempt at one."""

    def __init__(self, carrier: DirectCarrier, name: str, address: Address) -> None:
        self.address = address
        self.connection: ClientConnection | None = None
        self._carrier = carrier
        self._name = name
        self._attempt: asyncio.Task[None] | None = None
        self._waiting: deque[bytes] = deque()  # one-way frames for the connection that is being opened
        self._waiting_bytes = 0
        self._failures = 0
        self._not_before_s = 0.0
        self._reason = ""  # of the last failure
        self._last: ClientConnection | None = None

    async def connect(self, timeout_s: float) -> ClientConnection:
        """The connection; all callers share one attempt. Raises CallError(sent=False)."""
        attempt = self._try()
        if attempt is not None:
            await asyncio.wait({attempt}, timeout=max(timeout_s, 0.0))
        if self.connection is not None:
            return self.connection
        reason = self._reason or f"no connection within {timeout_s:.3f} s"
        raise CallError(f"{self._name} can't be reached: {reason}", sent=False)

    def send(self, frame: bytes) -> bool:
        """Send one way, or keep the frame for the connection that is being opened."""
        if self.connection is not None:
            return self.connection.send(frame)
        if self._try() is None or self._waiting_bytes >= self._carrier.max_queue_bytes:
            return False
        self._waiting.append(frame)
        self._waiting_bytes += HEADER.size + len(frame)
        return True

    def lost(self, connection: ClientConnection, reason: str) -> None:
        """The connection ended."""
        if self.connection is connection:
            self.connection = None
            self._reason = reason

    def close(self, reason: str) -> None:
        """End connection and attempt."""
        self._reason = reason
        self._not_before_s = float("inf")
        if self._attempt is not None:
            self._attempt.cancel()
        if self.connection is not None:
            self.connection.end(reason)
            self.connection = None

    async def ended(self) -> None:
        """Wait until nothing of a closed peer is left."""
        if self._attempt is not None:
            await asyncio.wait({self._attempt})
        if self._last is not None:
            await self._last.ended

    def _try(self) -> asyncio.Task[None] | None:
        """The attempt under way, or a new one; None while the node is left alone."""
        if self._attempt is None:
            loop = asyncio.get_running_loop()
            if loop.time() < self._not_before_s:
                return None
            self._reason = ""
            self._attempt = loop.create_task(self._open())
        return self._attempt

    async def _open(self) -> None:
        counters = self._carrier.counters
        try:
            connection = await self._open_one()
            if connection.closing:  # it was lost again before this task went on
                raise ConnectionError(connection.end_reason or "closed by the peer")
            self.connection = connection
            self._failures = 0
            counters.add("connections")
            while self._waiting and connection.send(self._waiting[0]):
                self._waiting.popleft()
        except (OSError, ValueError, OverflowError) as error:  # a host or port that can't be is one of the latter
            self._reason = str(error)
            counters.add("failed_connections")
            back_off_s = min(FIRST_BACK_OFF_S * 2**self._failures, LAST_BACK_OFF_S) * random.uniform(0.75, 1.25)
            self._failures = min(self._failures + 1, 10)
            self._not_before_s = asyncio.get_running_loop().time() + back_off_s
        finally:
            counters.add("dropped_frames", len(self._waiting))
            self._waiting.clear()
            self._waiting_bytes = 0
            self._attempt = None

    async def _open_one(self) -> ClientConnection:
        """A connection by the first way that works: the Unix socket on the same machine, else TCP. Raises OSError.

        Containers of one machine share its identity but not its files, so TCP follows when the socket does not work.
        """
        carrier, address = self._carrier, self.address
        loop = asyncio.get_running_loop()
        reasons: list[str] = []
        if address.unix_path and address.host and address.host == carrier.host_id:
            try:
                async with asyncio.timeout(carrier.connect_timeout_s):
                    _, connection = await loop.create_unix_connection(self._new_connection, address.unix_path)
                    return await self._greet(connection)
            except OSError as error:
                reasons.append(f"{address.unix_path}: {str(error) or 'timeout'}")
        if address.tcp_host and address.tcp_port:
            try:
                async with asyncio.timeout(carrier.connect_timeout_s):
                    _, connection = await loop.create_connection(
                        self._new_connection, address.tcp_host, address.tcp_port, ssl=carrier.tls
                    )
                    return await self._greet(connection)
            except OSError as error:
                reasons.append(f"{address.tcp_host}:{address.tcp_port}: {str(error) or 'timeout'}")
        raise ConnectionError("; ".join(reasons) or "it has neither a local socket nor a TCP port")

    def _new_connection(self) -> ClientConnection:
        return ClientConnection(self, self._name, self._carrier)

    async def _greet(self, connection: ClientConnection) -> ClientConnection:
        """Wait for the end of the handshake. Raises OSError when it fails."""
        self._last = connection
        try:
            await connection.ready
        except BaseException:
            connection.end("the attempt to connect was given up")
            raise
        return connection


class _InFlight(NamedTuple):
    """A call that waits for its answer."""

    then: Then
    deadline_s: float
    timeout_s: float


class ClientConnection(FrameConnection):
    """An open connection to one node, with the calls in flight on it."""

    def __init__(self, peer: Peer, name: str, carrier: DirectCarrier) -> None:
        handshake = ClientHandshake(carrier.secret, name, os.urandom(NONCE_BYTES))
        super().__init__(handshake, carrier.counters, carrier.log, carrier.max_frame_bytes)
        self.ready: asyncio.Future[None] = self.loop.create_future()
        self._peer = peer
        self._name = name
        self._max_queue_bytes = carrier.max_queue_bytes
        self._calls: dict[int, _InFlight] = {}
        self._last_id = 0
        self._timer: asyncio.TimerHandle | None = None  # one for all calls: most are answered long before

    def begin(self, frame: bytes, timeout_s: float, then: Then) -> int:
        """Send a request; `then` is told its answer, or CallError. Returns the call's number. Raises CallError when it
        can't be sent."""
        if self.closing:
            raise CallError(f"the connection to {self._name} ended: {self.end_reason}", sent=False)
        if timeout_s <= 0:
            raise CallError(f"no time was left to ask {self._name}", sent=False)
        if self.queued_bytes() >= self._max_queue_bytes or len(self._calls) >= MAX_CALLS:
            raise CallError(f"too much waits to be sent to {self._name}", sent=False)
        self._last_id = call_id = self._last_id + 1
        deadline_s = self.loop.time() + timeout_s
        self._calls[call_id] = _InFlight(then, deadline_s, timeout_s)
        self.write_frame(call_id, REQUEST, frame)
        if self._timer is None or deadline_s < self._timer.when():
            self._wake_at(deadline_s)
        return call_id

    def forget(self, call_id: int) -> None:
        """Nobody waits for the answer to a call any more."""
        self._calls.pop(call_id, None)

    def send(self, frame: bytes) -> bool:
        """Send one way. False when too much waits already."""
        if self.closing or self.queued_bytes() >= self._max_queue_bytes:
            return False
        self.write_frame(0, ONE_WAY, frame)
        self.flush()  # a sender has gathered what belongs together, and its own disk works while this travels
        return True

    def end(self, reason: str) -> None:
        """Close, and fail the calls in flight at once."""
        self.close(reason)
        self._fail_calls(reason)

    def opened(self) -> None:
        if not self.ready.done():
            self.ready.set_result(None)

    def take_frames(self) -> None:
        while (frame := self.parser.next()) is not None:
            call_id, kind, payload = frame
            if kind != REPLY or call_id > self._last_id:
                raise FrameError("malformed_frames", "a frame that answers nothing")
            call = self._calls.pop(call_id, None)
            if call is None:
                self.counters.add("late_replies")
                continue
            try:
                answer = decode_answer(payload)
            except ProtocolError as error:
                self._calls[call_id] = call  # it fails with all others
                raise FrameError("malformed_frames", str(error)) from None
            self._tell(call, answer)

    def lost(self, reason: str) -> None:
        if not self.ready.done():
            refused = reason if self.end_reason else "closed during the handshake: another secret, or another node"
            self.ready.set_exception(ConnectionError(refused))
            self.ready.exception()  # the attempt may have been given up, and nobody asks
        self._fail_calls(reason)
        self._peer.lost(self, reason)

    def _fail_calls(self, reason: str) -> None:
        calls, self._calls = self._calls, {}
        if self._timer is not None:
            self._timer.cancel()
        for call in calls.values():
            self._tell(call, CallError(f"the connection to {self._name} ended: {reason}", sent=True))

    def _tell(self, call: _InFlight, outcome: Message | Exception) -> None:
        """Tell a caller; its errors are not those of the connection, which others use too."""
        try:
            call.then(outcome)
        except Exception:
            logger.exception("what came of a call to %s could not be taken", self._name)

    def _wake_at(self, deadline_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_at(deadline_s, self._expire)

    def _expire(self) -> None:
        """Fail the calls whose time is over."""
        self._timer = None
        now_s = self.loop.time()
        over = [number for number, call in self._calls.items() if call.deadline_s <= now_s]
        calls = [self._calls.pop(number) for number in over]
        if self._calls:
            self._wake_at(min(call.deadline_s for call in self._calls.values()))
        for call in calls:
            self.counters.add("timeouts")
            self._tell(call, CallError(f"no answer of {self._name} within {call.timeout_s:.3f} s", sent=True))
