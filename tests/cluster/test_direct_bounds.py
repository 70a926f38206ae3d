"""The direct carrier over real sockets: limits, strangers and nonsense."""

from __future__ import annotations

import asyncio
import logging
import random
import struct
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
from direct_model import NODE, PING, SECRET, Node, connect, figure, greeted, is_closed, raw, run, serve, until
from timetier.cluster.carriers import connection as connection_module
from timetier.cluster.carriers import direct_server as server_module
from timetier.cluster.carriers.base import Address, CallError
from timetier.cluster.carriers.direct import DirectCarrier, host_id
from timetier.cluster.carriers.framing import HEADER, ONE_WAY, REPLY, REQUEST, FrameError
from timetier.cluster.carriers.handshake import ClientHandshake, ServerHandshake
from timetier.cluster.errors import InvalidRequest
from timetier.cluster.messages import (
    BlockBytes,
    Failure,
    FileList,
    FileRemove,
    Files,
    Ping,
    Pong,
    encode,
)


@pytest.fixture(params=["unix", "tcp"])
def listen(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """Arguments that make a server listen on a socket of one kind; Unix paths must be short."""
    with tempfile.TemporaryDirectory(prefix="tt") as folder:
        yield {"unix_path": f"{folder}/s"} if request.param == "unix" else {"tcp_host": "127.0.0.1"}


# ---------------------------------------------------------------- bounds


def test_requests_beyond_the_limit_stay_unread_until_others_are_answered(listen: dict[str, Any]) -> None:
    async def body() -> None:
        node = Node()
        async with serve(node, listen, max_in_flight=8) as server, connect(server.address) as carrier:
            calls = [asyncio.create_task(carrier.call(NODE, FileList("a"), 30)) for _ in range(100)]
            await until(lambda: node.waiting == 8)
            async with connect(server.address) as other:  # whom it does not concern
                assert await other.call(NODE, Ping(), 5) == Pong()
            assert node.waiting == 8
            node.gates["a"].set()
            assert len(await asyncio.gather(*calls)) == 100

    run(body())


def test_what_waits_for_a_peer_that_does_not_read_is_bounded(listen: dict[str, Any]) -> None:
    async def body() -> None:
        node = Node()
        limit = 300_000
        async with (
            serve(node, listen, max_in_flight=1) as server,
            connect(server.address, max_queue_bytes=limit) as carrier,
        ):
            stuck = asyncio.create_task(carrier.call(NODE, FileList("a"), 30))
            await until(lambda: node.waiting == 1)
            message = FileRemove(["x" * 50_000])
            async with asyncio.timeout(20):
                while carrier.send(NODE, message):  # noqa: ASYNC110
                    await asyncio.sleep(0)
            (peer,) = carrier._peers.values()
            assert peer.connection is not None
            assert limit <= peer.connection.queued_bytes() <= limit + 51_000
            with pytest.raises(CallError) as full:
                await carrier.call(NODE, Ping(), 5)
            assert not full.value.sent
            assert figure(carrier, "dropped_frames") == 1
            (member,) = server.members
            assert member.parser.held_bytes < 600_000
            node.gates["a"].set()
            await stuck
            await until(lambda: carrier.send(NODE, Ping()))

    run(body())


def test_a_peer_that_leaves_its_replies_unread_is_cut_off(
    listen: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "UNREAD_TIMEOUT_S", 0.3)

    async def body() -> None:
        async with serve(Node(), listen) as server:
            reader, writer = await greeted(server.address)
            reader._transport.pause_reading()  # type: ignore[attr-defined]
            frame = encode(FileList("large"))
            writer.write(b"".join(HEADER.pack(len(frame), call_id, REQUEST) + frame for call_id in range(1, 100)))
            await until(lambda: not server.members)
            assert figure(server, "dropped_frames") >= 1
            writer.transport.abort()
            async with connect(server.address) as carrier:
                assert await carrier.call(NODE, Ping(), 5) == Pong()

    run(body())


def test_peers_that_leave_replies_unread_share_one_bound_and_who_reads_is_spared(listen: dict[str, Any]) -> None:
    async def body() -> None:
        async with serve(Node(), listen, max_reply_bytes=20_000_000) as server, connect(server.address) as good:
            lazy = [await greeted(server.address) for _ in range(8)]
            frame = encode(FileList("large"))
            for reader, writer in lazy:
                reader._transport.pause_reading()  # type: ignore[attr-defined]
                writer.write(b"".join(HEADER.pack(len(frame), call_id, REQUEST) + frame for call_id in range(1, 41)))
                assert isinstance(await good.call(NODE, FileList("large"), 5), BlockBytes)
                assert server.reply_bytes() <= 20_000_000 + 8 * (server_module.PAUSE_REPLY_BYTES + 500_100)
            await until(lambda: figure(server, "overload_refusals") >= 1)  # the system has taken many replies, not all
            assert await good.call(NODE, Ping(), 5) == Pong()
            for _, writer in lazy:
                writer.transport.abort()

    run(body())


def test_beyond_the_handlers_of_a_server_requests_are_refused_with_a_hint(listen: dict[str, Any]) -> None:
    async def body() -> None:
        node = Node()
        async with serve(node, listen, max_handlers=8) as server, connect(server.address) as carrier:
            calls = [asyncio.create_task(carrier.call(NODE, FileList("a"), 30)) for _ in range(20)]
            await until(lambda: sum(call.done() for call in calls) == 12)
            for call in calls:
                if call.done():
                    refusal = call.result()
                    assert isinstance(refusal, Failure)
                    assert refusal.kind == "Unavailable"
                    hint_s = refusal.fields["retry_after_s"]
                    assert isinstance(hint_s, float) and hint_s > 0
            node.gates["a"].set()
            assert sum(isinstance(answer, Files) for answer in await asyncio.gather(*calls)) == 8

    run(body())


def test_connections_beyond_the_limit_are_refused(listen: dict[str, Any]) -> None:
    async def body() -> None:
        async with serve(Node(), listen, max_connections=1) as server, connect(server.address) as first:
            assert await first.call(NODE, Ping(), 5) == Pong()
            async with connect(server.address) as second:
                with pytest.raises(CallError) as refused:
                    await second.call(NODE, Ping(), 5)
                assert not refused.value.sent
            assert await first.call(NODE, Ping(), 5) == Pong()

    run(body())


# ---------------------------------------------------------------- strangers and nonsense


def test_who_does_not_know_the_secret_is_refused_on_either_side(listen: dict[str, Any]) -> None:
    async def body() -> None:
        node = Node()
        async with serve(node, listen) as server:
            async with connect(server.address, secret=b"another secret of 32 bytes......") as carrier:
                with pytest.raises(CallError, match="secret") as refused:
                    await carrier.call(NODE, FileRemove(["x"]), 5)
                assert not refused.value.sent
            assert figure(server, "refused_handshakes") == 1
            assert node.names == []
            assert not server.members

    run(body())
    with pytest.raises(InvalidRequest, match="secret"):
        DirectCarrier(b"short", host_id="")


def test_a_handshake_takes_no_byte_more_than_it_needs() -> None:
    for handshake, expected_bytes in (
        (ServerHandshake(SECRET, NODE, bytes(32)), 101),
        (ClientHandshake(SECRET, NODE, bytes(32)), 37),
    ):
        assert handshake.receive(b"TTdc\x01" + bytes(expected_bytes - 6)) == b""
        with pytest.raises(FrameError, match="beyond"):
            handshake.receive(bytes(2))
    with pytest.raises(FrameError, match="version 2"):
        ServerHandshake(SECRET, NODE, bytes(32)).receive(b"TTdc\x02")


def test_a_server_that_does_not_know_the_secret_gets_no_frame() -> None:
    async def body() -> None:
        received = bytearray()

        async def impostor(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            greeting = b"TTdc\x01" + bytes(32)
            writer.write(greeting)
            answer = await reader.readexactly(101)
            writer.write(answer[-32:])  # the client's own proof, sent back
            received.extend(await reader.read())
            writer.close()

        server = await asyncio.start_server(impostor, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        async with connect(Address(NODE, tcp_host=host, tcp_port=port)) as carrier:
            with pytest.raises(CallError, match="secret") as refused:
                await carrier.call(NODE, FileRemove(["x"]), 5)
            assert not refused.value.sent
            assert figure(carrier, "refused_handshakes") == 1
        server.close()
        await server.wait_closed()
        assert received == b""
        await until(lambda: len(asyncio.all_tasks()) == 1)

    run(body())


def test_a_node_that_took_over_an_address_refuses_calls_for_another(listen: dict[str, Any]) -> None:
    async def body() -> None:
        node = Node()
        async with serve(node, listen) as server:
            carrier = DirectCarrier(SECRET, host_id=host_id())
            carrier.update({"storage-0-1": server.address})
            with pytest.raises(CallError, match="another node") as refused:
                await carrier.call("storage-0-1", FileRemove(["x"]), 5)
            assert not refused.value.sent
            assert node.names == []
            await carrier.close()

    run(body())


def test_strangers_who_say_nothing_are_sent_away_and_do_not_pile_up(
    listen: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("timetier.cluster.carriers.direct_server.MAX_STRANGERS", 3)

    async def body() -> None:
        async with serve(Node(), listen, handshake_timeout_s=0.2) as server:
            silent = [await raw(server.address) for _ in range(5)]
            await until(lambda: figure(server, "connections") == 5)
            assert len(server.strangers) == 3
            async with connect(server.address) as carrier:  # a member gets in beside them
                assert await carrier.call(NODE, Ping(), 5) == Pong()
                await asyncio.gather(*(is_closed(reader) for reader, _ in silent))
                assert not server.strangers
                assert figure(server, "refused_handshakes") == 5
                assert await carrier.call(NODE, Ping(), 5) == Pong()  # no deadline acts on a member
            for _, writer in silent:
                writer.close()

    run(body())


@pytest.mark.parametrize(
    ("frame", "counter"),
    [
        (HEADER.pack((64 << 20) + 1, 1, REQUEST), "oversized_frames"),
        (HEADER.pack(0xFFFFFFFF, 1, REQUEST), "oversized_frames"),
        (HEADER.pack(len(PING), 1, 9) + PING, "malformed_frames"),
        (HEADER.pack(len(PING), 1, REPLY) + PING, "malformed_frames"),
        (HEADER.pack(len(PING), 0, REQUEST) + PING, "malformed_frames"),
        (HEADER.pack(len(PING), 5, ONE_WAY) + PING, "malformed_frames"),
        (HEADER.pack(0, 1, REQUEST), "malformed_frames"),
        (HEADER.pack(3, 1, REQUEST) + b"\x93\xa4P", "malformed_frames"),
        (HEADER.pack(3, 0, ONE_WAY) + b"\xff\xff\xff", "malformed_frames"),
    ],
)
def test_a_bad_frame_closes_its_connection_with_a_logged_reason_and_no_other(
    listen: dict[str, Any], frame: bytes, counter: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        async with serve(Node(), listen) as server, connect(server.address) as carrier:
            assert await carrier.call(NODE, Ping(), 5) == Pong()
            reader, writer = await greeted(server.address)
            writer.write(frame)
            assert await is_closed(reader)
            writer.close()
            assert figure(server, counter) == 1
            assert sum("connection with" in record.message for record in caplog.records) == 1
            assert await carrier.call(NODE, Ping(), 5) == Pong()
            assert figure(carrier, "connections") == 1

    with caplog.at_level(logging.WARNING):
        run(body())


def test_an_oversized_frame_is_refused_before_its_payload_is_kept(listen: dict[str, Any]) -> None:
    async def body() -> None:
        async with serve(Node(), listen, max_frame_bytes=1000) as server:
            reader, writer = await greeted(server.address)
            writer.write(HEADER.pack(1001, 1, REQUEST))  # no payload follows
            assert await is_closed(reader)
            assert figure(server, "oversized_frames") == 1
            writer.close()
            async with connect(server.address, max_frame_bytes=10) as carrier:  # the client judges replies, too
                with pytest.raises(CallError) as ended:
                    await carrier.call(NODE, BlockBytes(b"0123456789"), 5)
                assert ended.value.sent
                assert figure(carrier, "oversized_frames") == 1

    run(body())


def test_a_thousand_random_frames_harm_nobody_and_leave_nothing(
    listen: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    seed = 20240229
    print("seed", seed)
    rng = random.Random(seed)
    good = [encode(m) for m in (Ping(), FileRemove(["x"]), BlockBytes(b"abc"), FileList(""))]

    def nonsense() -> bytes:
        kind = rng.randrange(5)
        if kind == 0:  # plain noise
            return rng.randbytes(rng.randrange(1, 400))
        payload = rng.randbytes(rng.randrange(60)) if kind == 1 else bytearray(rng.choice(good))
        if kind == 2:  # a good message with a flipped bit
            payload[rng.randrange(len(payload))] ^= 1 << rng.randrange(8)  # type: ignore[index]
        frame = HEADER.pack(len(payload), rng.choice((0, 1, 2**63)), rng.randrange(4)) + payload
        return frame[: rng.randrange(1, len(frame) + 1)] if kind == 3 else frame  # 3: half a frame

    async def one(address: Address, after_handshake: bool) -> None:
        reader, writer = await (greeted(address) if after_handshake else raw(address))
        try:
            for _ in range(4):
                writer.write(nonsense())
            await writer.drain()
            writer.write_eof()
            assert await is_closed(reader)
        except ConnectionError:
            pass  # closed while this side was still writing
        finally:
            writer.close()

    async def body() -> None:
        async with serve(Node(), listen) as server, connect(server.address) as carrier:
            assert await carrier.call(NODE, Ping(), 5) == Pong()
            for round_ in range(25):
                await asyncio.gather(*(one(server.address, (round_ + i) % 2 == 0) for i in range(10)))
                assert await carrier.call(NODE, Ping(), 5) == Pong()
            await until(lambda: len(server.members) == 1 and not server.strangers and not server.tasks)
            assert figure(carrier, "connections") == 1
            assert figure(server, "open_connections") == 1
            assert figure(server, "connections") == 251
            assert figure(server, "refused_handshakes") > 50
            assert figure(server, "malformed_frames") > 50
            await until(lambda: len(asyncio.all_tasks()) == 1)

    with caplog.at_level(logging.WARNING):
        run(body())
    refusals = [record for record in caplog.records if "connection with" in record.message]
    assert 0 < len(refusals) <= 2 * connection_module.LOG_LINES
    assert not [record for record in caplog.records if record.levelno > logging.WARNING]


def test_half_a_frame_or_half_a_handshake_leaves_nothing(listen: dict[str, Any]) -> None:
    async def body() -> None:
        node = Node()
        async with serve(node, listen) as server:
            frame = encode(FileRemove(["x"]))
            for part in (HEADER.pack(len(frame), 0, ONE_WAY) + frame[:-1], HEADER.pack(len(frame), 0, ONE_WAY)[:5]):
                _, writer = await greeted(server.address)
                writer.write(part)
                writer.close()
                await writer.wait_closed()
            _, writer = await raw(server.address)
            writer.write(b"TTdc")
            writer.close()
            await until(lambda: figure(server, "connections") == 3)
            await until(lambda: not server.members and not server.strangers)
            assert node.names == []

    run(body())


def test_a_frame_may_arrive_byte_by_byte(listen: dict[str, Any]) -> None:
    async def body() -> None:
        async with serve(Node(), listen) as server:
            reader, writer = await greeted(server.address)
            frames = b"".join(
                HEADER.pack(len(frame), call_id, REQUEST) + frame
                for call_id, frame in enumerate([encode(BlockBytes(b"abc")), encode(Ping())], start=1)
            )
            for i in range(len(frames)):
                writer.write(frames[i : i + 1])
                await writer.drain()
                await asyncio.sleep(0)
            replies: dict[int, bytes] = {}
            for _ in range(2):
                length, call_id, kind = struct.unpack("<IQB", await reader.readexactly(HEADER.size))
                assert kind == REPLY
                replies[call_id] = await reader.readexactly(length)
            assert replies == {1: encode(BlockBytes(b"cba")), 2: encode(Pong())}
            writer.close()

    run(body())
