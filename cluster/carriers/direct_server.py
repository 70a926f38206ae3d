"""The listening side of the direct carrier."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl
from pathlib import Path

from ..counters import Counters
from ..errors import InvalidRequest, ProtocolError
from ..gate import overloaded
from ..messages import MAX_FRAME_BYTES, Message, decode, encode, failure
from .base import Address, Begin, Handler, encode_reply, no_fast_door
from .connection import WRITE_BYTES, BoundedLog, FrameConnection, host_id
from .framing import ONE_WAY, REPLY, REQUEST, FrameError
from .handshake import NONCE_BYTES, ServerHandshake, check_secret

HANDSHAKE_TIMEOUT_S = 5.0
MAX_STRANGERS = 128  # connections that have not shown the secret yet; the oldest makes room for one more
MAX_REPLY_BYTES = 256 << 20  # replies that wait for peers that do not read, all of them together
SMALL_REPLY_BYTES = 4 << 10  # replies up to this are kept for a peer that does not read, others are not
UNREAD_TIMEOUT_S = 10.0  # a peer that reads less than PAUSE_REPLY_BYTES for so long is cut off
MAX_HANDLERS = 16_384  # requests that are being answered, of all connections together
PAUSE_REPLY_BYTES = WRITE_BYTES  # replies that wait before requests of that peer are left unread
MAX_UNIX_PATH_BYTES = 107  # limit of the system
BACKLOG = 1024

logger = logging.getLogger(__name__)


class DirectServer:
    """Answers frames that arrive on a Unix socket, a TCP port, or both.

    Each request is answered by a task of its own, so replies leave in any order; tasks start in the order of
    arrival. What `begin` takes needs no task, and is answered without a further turn of the loop if it can be. When a
    connection ends, its handlers run on to their end, for half a write helps nobody.

    `handler`: the node's front door; `begin`: its fast door. `secret`: shared by all members, 16 bytes or more.
    `name`: the node's name; a peer that looks for another node is refused ("" takes any). `unix_path`: a socket there
    is replaced.
    `max_connections`: peers that know the secret. `max_in_flight`: requests of one connection that are being
    answered; further ones stay unread. `max_handlers`: the same of all connections together; further ones are
    refused with `Unavailable`. `max_reply_bytes`: replies that wait to be read; beyond it a peer that leaves more than
    1 MiB of them gets a refusal in the place of a large one, and is cut off after 10 s. `tls`: for TCP only.

    Counters: connections, refused_handshakes, malformed_frames, oversized_frames, dropped_frames, calls,
    one_way_frames, overload_refusals; gauge open_connections.
    """

    def __init__(
        self,
        handler: Handler,
        secret: bytes,
        *,
        begin: Begin = no_fast_door,
        name: str = "",
        unix_path: str | None = None,
        tcp_host: str | None = None,
        tcp_port: int = 0,
        max_connections: int = 1024,
        max_in_flight: int = 1024,
        max_frame_bytes: int = MAX_FRAME_BYTES,
        max_reply_bytes: int = MAX_REPLY_BYTES,
        max_handlers: int = MAX_HANDLERS,
        handshake_timeout_s: float = HANDSHAKE_TIMEOUT_S,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        if unix_path is None and tcp_host is None:
            raise InvalidRequest("unix_path, tcp_host: give at least one of them to listen on")
        self.handler = handler
        self.begin = begin
        self.secret = check_secret(secret)
        self.name = name
        self.unix_path = unix_path or ""
        self.tcp_host = tcp_host or ""
        self.tcp_port = tcp_port
        self.max_connections = max_connections
        self.max_in_flight = max_in_flight
        self.max_frame_bytes = max_frame_bytes
        self.max_reply_bytes = max_reply_bytes
        self.max_handlers = max_handlers
        self.handshake_timeout_s = handshake_timeout_s
        self.counters = Counters()
        self.log = BoundedLog(logger)
        self.strangers: dict[ServerConnection, None] = {}  # oldest first
        self.members: set[ServerConnection] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        self.begun = 0  # requests that `begin` has taken, and not answered yet
        self.stopping = False
        self._tls = tls
        self._listeners: list[asyncio.Server] = []
        self._unix_identity: tuple[int, int] | None = None

    @property
    def address(self) -> Address:
        """Where it listens, as bound; complete after `start`."""
        return Address(
            name=self.name,
            host=host_id(),
            unix_path=self.unix_path,
            tcp_host=self.tcp_host,
            tcp_port=self.tcp_port if self.tcp_host else 0,
        )

    async def start(self) -> Address:
        """Listen, and give the address as bound. Raises OSError when the port or the path can't be bound."""
        loop = asyncio.get_running_loop()
        try:
            if self.unix_path:
                listener = await loop.create_unix_server(self._connection, sock=self._bind_unix(), backlog=BACKLOG)
                self._listeners.append(listener)
            if self.tcp_host:
                listener = await loop.create_server(
                    self._connection,
                    self.tcp_host,
                    self.tcp_port,
                    backlog=BACKLOG,
                    ssl=self._tls,
                    ssl_handshake_timeout=self.handshake_timeout_s if self._tls else None,
                )
                self._listeners.append(listener)
                self.tcp_port = listener.sockets[0].getsockname()[1]
        except BaseException:
            await self.stop()
            raise
        return self.address

    async def stop(self) -> None:
        """Stop listening, end all connections and cancel the handlers that still run."""
        self.stopping = True
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        self._remove_unix_path()
        connections = [*self.strangers, *self.members]
        for connection in connections:
            connection.close("the server stops")
        tasks = list(self.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.tasks.clear()
        await asyncio.gather(*(connection.ended for connection in connections))

    def at_work(self) -> int:
        """Requests that are being answered."""
        return len(self.tasks) + self.begun

    def reply_bytes(self) -> int:
        """Replies that wait to be read by peers."""
        return sum(connection.queued_bytes() for connection in self.members)

    def _connection(self) -> ServerConnection:
        return ServerConnection(self)

    def _bind_unix(self) -> socket.socket:
        """A socket that is bound, private to this user and in place of whatever had its path."""
        path = Path(self.unix_path)
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        if len(os.fsencode(temporary)) > MAX_UNIX_PATH_BYTES:
            raise InvalidRequest(
                f"unix_path: {self.unix_path!r} is too long for a Unix socket; "
                f"choose a folder whose path is {MAX_UNIX_PATH_BYTES} bytes long at most, with the file's name"
            )
        temporary.unlink(missing_ok=True)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.bind(str(temporary))
            temporary.chmod(0o600)  # nobody can connect before `listen`
            status = temporary.stat()
            temporary.rename(path)
        except BaseException:
            sock.close()
            temporary.unlink(missing_ok=True)
            raise
        self._unix_identity = (status.st_dev, status.st_ino)
        return sock

    def _remove_unix_path(self) -> None:
        """Remove the socket file, unless another server has taken its place."""
        if self._unix_identity is None:
            return
        try:
            status = Path(self.unix_path).stat()
            if (status.st_dev, status.st_ino) == self._unix_identity:
                Path(self.unix_path).unlink()
        except FileNotFoundError:
            logger.debug("the socket %s was gone already", self.unix_path)
        self._unix_identity = None


class ServerConnection(FrameConnection):
    """One peer of a `DirectServer`."""

    def __init__(self, server: DirectServer) -> None:
        handshake = ServerHandshake(server.secret, server.name, os.urandom(NONCE_BYTES))
        super().__init__(handshake, server.counters, server.log, server.max_frame_bytes)
        self._server = server
        self._in_flight = 0
        self._reading = True
        self._taking = False  # frames are being taken
        self._peer_reads = True
        self._deadline: asyncio.TimerHandle
        self._unread: asyncio.TimerHandle  # while the peer does not read

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._deadline = self._unread = self.loop.call_later(self._server.handshake_timeout_s, self._too_late)
        self.counters.add("connections")
        if self._server.stopping:  # accepted in the last moment
            self.close("the server stops")
            return
        strangers = self._server.strangers
        if len(strangers) >= MAX_STRANGERS:
            next(iter(strangers)).drop("refused_handshakes", "too many connections without a handshake")
        strangers[self] = None
        self._count_open()

    def opened(self) -> None:
        server = self._server
        if len(server.members) >= server.max_connections:
            raise FrameError("refused_handshakes", f"there are {server.max_connections} connections already")
        if server.at_work() >= server.max_handlers:
            raise FrameError("refused_handshakes", "too many handlers of ended connections still run")
        self._deadline.cancel()
        server.strangers.pop(self, None)
        server.members.add(self)

    def drop(self, counter: str, reason: str) -> None:
        super().drop(counter, reason)
        self._server.strangers.pop(self, None)  # its place is free at once

    def lost(self, reason: str) -> None:
        self._deadline.cancel()
        self._unread.cancel()
        self._server.strangers.pop(self, None)
        self._server.members.discard(self)
        self._count_open()

    def take_frames(self) -> None:
        self._taking = True
        try:
            self._read(self._take_frames())
        finally:
            self._taking = False

    def _take_frames(self) -> bool:
        """Take the frames that are there. False when some are left, since the peer has too many requests or replies."""
        server = self._server
        while not self.closing:
            if self._in_flight >= server.max_in_flight or not self._peer_reads:
                return False
            frame = self.parser.next()
            if frame is None:
                break
            call_id, kind, payload = frame
            if kind == REQUEST:
                self.counters.add("calls")
            elif kind == ONE_WAY:
                self.counters.add("one_way_frames")
            else:
                raise FrameError("malformed_frames", "a reply where a request was due")
            if kind == REQUEST and server.at_work() >= server.max_handlers:
                self.counters.add("overload_refusals")
                refusal = failure(overloaded(f"{server.name} answers {server.at_work()} requests already"))
                self._reply(call_id, encode(refusal))
                continue
            try:
                message = decode(payload)
            except ProtocolError as error:
                raise FrameError("malformed_frames", str(error)) from None
            self._in_flight += 1
            if not self._begin(call_id, message):
                server.tasks.add(self.loop.create_task(self._answer(call_id, message)))
        return True

    def pause_writing(self) -> None:
        self._peer_reads = False
        self._unread = self.loop.call_later(
            UNREAD_TIMEOUT_S, self.drop, "dropped_frames", f"the peer read nothing for {UNREAD_TIMEOUT_S} s"
        )
        self._read(False)

    def resume_writing(self) -> None:
        self._peer_reads = True
        self._unread.cancel()
        super().resume_writing()  # which may have the transport full again
        if self._peer_reads:
            self._go_on()

    def _begin(self, call_id: int, message: Message) -> bool:
        """Offer a message at the fast door."""
        server = self._server
        server.begun += 1
        reply = _ServerReply(self, call_id)
        try:
            if server.begin(message, reply):
                return True
        except Exception as error:
            reply(error)
            return True
        server.begun -= 1
        return False

    def end_call(self, call_id: int, answer: Message | Exception | None) -> None:
        """The answer to a message that the fast door took."""
        self._server.begun -= 1
        self._answered(call_id, answer)

    async def _answer(self, call_id: int, message: Message) -> None:
        answer: Message | Exception | None
        try:
            answer = await self._server.handler(message)
        except Exception as error:
            answer = error
        finally:
            task = asyncio.current_task()
            if task is not None:
                self._server.tasks.discard(task)
        self._answered(call_id, answer)

    def _answered(self, call_id: int, answer: Message | Exception | None) -> None:
        """Send the answer to a request, and read on if the peer had too many."""
        self._in_flight -= 1
        try:
            if call_id:  # a one-way frame has none
                self._reply(call_id, encode_reply(answer))
        except Exception as error:
            logger.exception("a reply could not be sent")
            self.drop("dropped_frames", f"a reply could not be sent: {error}")
        if not self._reading and not self._taking and self._in_flight <= self._server.max_in_flight // 2:
            self._go_on()

    def _reply(self, call_id: int, reply: bytes) -> None:
        if self.closing:
            self.counters.add("dropped_frames")
        else:
            unread = self.queued_bytes()
            large = len(reply) > SMALL_REPLY_BYTES and unread > PAUSE_REPLY_BYTES
            if large and self._server.reply_bytes() > self._server.max_reply_bytes:
                self.counters.add("overload_refusals")
                reply = encode(failure(overloaded(f"{unread} bytes of replies wait for you to read them")))
            self.write_frame(call_id, REPLY, reply)

    def _go_on(self) -> None:
        try:
            self.take_frames()
        except FrameError as error:
            self.drop(error.counter, str(error))

    def _read(self, reading: bool) -> None:
        if reading != self._reading and not self.closing:
            self._reading = reading
            if reading:
                self.transport.resume_reading()
            else:
                self.transport.pause_reading()

    def _too_late(self) -> None:
        self.drop("refused_handshakes", f"no handshake within {self._server.handshake_timeout_s} s")

    def _count_open(self) -> None:
        self.counters.set("open_connections", len(self._server.strangers) + len(self._server.members))


class _ServerReply:
    """A `Reply` to one request of a connection; the first answer counts."""

    __slots__ = ("_call_id", "_connection", "_is_open")

    def __init__(self, connection: ServerConnection, call_id: int) -> None:
        self._connection = connection
        self._call_id = call_id
        self._is_open = True

    def __call__(self, answer: Message | Exception | None) -> None:
        if self._is_open:
            self._is_open = False
            self._connection.end_call(self._call_id, answer)

    def is_wanted(self) -> bool:
        """Whether the peer is there to take it."""
        return self._is_open and not self._connection.closing
