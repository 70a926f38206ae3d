"""The direct carrier over real sockets, TCP and Unix: calls, and connections that end."""

from __future__ import annotations

import asyncio
import os
import random
import ssl
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from direct_model import NODE, SECRET, Node, connect, figure, is_closed, raw, run, serve, until
from timetier.cluster.carriers.base import Address, CallError
from timetier.cluster.carriers.direct import DirectCarrier, DirectServer, host_id
from timetier.cluster.errors import InvalidRequest, VersionConflict
from timetier.cluster.messages import (
    BlockBytes,
    FileList,
    FileRemove,
    Files,
    Ping,
    Pong,
    raise_failure,
)

# Signed by itself for 127.0.0.1, and used nowhere but here.
TLS_PEM = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgqSehzCrqRrtyI4Z1
MBtH0oV/YsRPLJZlTUbsv7kU44yhRANCAAQ1QzLaRWB/aUE0YZkOC4Sd+5ZmV9M0
sDBjA/h+z/k/PfWfBZBElX8JCxtPoeskWog4MGwat96Ym5TktL/1tPB1
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBmDCCAT6gAwIBAgIUfWDSQ1uY9gg/wBTmpIY+j9bW2t0wCgYIKoZIzj0EAwIw
GDEWMBQGA1UEAwwNdGltZXRpZXIgdGVzdDAgFw0yNjExMjMxNTU3NDlaGA8yMTI2
MTAzMDE1NTc0OVowGDEWMBQGA1UEAwwNdGltZXRpZXIgdGVzdDBZMBMGByqGSM49
AgEGCCqGSM49AwEHA0IABDVDMtpFYH9pQTRhmQ4LhJ37lmZX0zSwMGMD+H7P+T89
9Z8FkESVfwkLG0+h6yRaiDgwbBq33piblOS0v/W08HWjZDBiMB0GA1UdDgQWBBS9
fXbA38DjFoxi44g3XD4G9lqZxjAfBgNVHSMEGDAWgBS9fXbA38DjFoxi44g3XD4G
9lqZxjAPBgNVHRMBAf8EBTADAQH/MA8GA1UdEQQIMAaHBH8AAAEwCgYIKoZIzj0E
AwIDSAAwRQIgFa494VdzmaKnXNS9CXGSSj8qpbOPDuuKTJSpTWfdIqMCIQCJyDAi
oWMPuhQQgKQiNPf6n+ZJ6GDY0i4Cw9klIxg6GA==
-----END CERTIFICATE-----
"""


@pytest.fixture(params=["unix", "tcp"])
def listen(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """Arguments that make a server listen on a socket of one kind; Unix paths must be short."""
    with tempfile.TemporaryDirectory(prefix="tt") as folder:
        yield {"unix_path": f"{folder}/s"} if request.param == "unix" else {"tcp_host": "127.0.0.1"}


# ---------------------------------------------------------------- calls


def test_calls_are_answered_and_failures_travel_back_over_one_connection(listen: dict[str, Any]) -> None:
    async def body() -> None:
        async with serve(Node(), listen) as server, connect(server.address) as carrier:
            assert await carrier.call(NODE, Ping(), 5) == Pong()
            answers = await asyncio.gather(*(carrier.call(NODE, BlockBytes(b"%d" % i), 5) for i in range(10, 500)))
            assert answers == [BlockBytes((b"%d" % i)[::-1]) for i in range(10, 500)]
            with pytest.raises(VersionConflict) as conflict:
                raise_failure(await carrier.call(NODE, FileList("conflict"), 5))
            assert conflict.value.version == 7
            assert await carrier.call(NODE, FileRemove(["x"]), 5) == Pong()  # answered by None
            assert figure(server, "connections") == figure(carrier, "connections") == 1

    run(body())


def test_callers_who_come_at_once_share_one_attempt_to_connect(listen: dict[str, Any]) -> None:
    async def body() -> None:
        async with serve(Node(), listen) as server, connect(server.address) as carrier:
            answers = await asyncio.gather(*(carrier.call(NODE, Ping(), 5) for _ in range(50)))
            assert answers == [Pong()] * 50
            assert figure(server, "connections") == 1

    run(body())


def test_large_frames_pass_in_both_directions(listen: dict[str, Any]) -> None:
    async def body() -> None:
        data = random.Random(1).randbytes(9_000_000)
        async with serve(Node(), listen) as server, connect(server.address) as carrier:
            answers = await asyncio.gather(
                *(carrier.call(NODE, BlockBytes(data[:n]), 20) for n in (9_000_000, 5, 70_000))
            )
            assert answers == [BlockBytes(data[:n][::-1]) for n in (9_000_000, 5, 70_000)]

    run(body())


def test_replies_come_in_any_order(listen: dict[str, Any]) -> None:
    async def body() -> None:
        node = Node()
        async with serve(node, listen) as server, connect(server.address) as carrier:
            slow = [asyncio.create_task(carrier.call(NODE, FileList(gate), 10)) for gate in "abc"]
            await until(lambda: node.waiting == 3)
            assert await carrier.call(NODE, Ping(), 5) == Pong()
            for gate in "cab":
                node.gates[gate].set()
                assert await slow["abc".index(gate)] == Files([gate], b"", b"", False)

    run(body())


def test_one_way_messages_arrive_in_order_from_the_first_one_on(listen: dict[str, Any]) -> None:
    async def body() -> None:
        node = Node()
        async with serve(node, listen) as server, connect(server.address) as carrier:
            assert all(carrier.send(NODE, FileRemove([str(i)])) for i in range(100))  # not connected yet
            await carrier.call(NODE, Ping(), 5)
            assert all(carrier.send(NODE, FileRemove([str(i)])) for i in range(100, 3000))
            await carrier.call(NODE, Ping(), 5)
            assert node.names == [str(i) for i in range(3000)]

    run(body())


def test_a_deadline_ends_a_call_and_a_late_reply_is_ignored(listen: dict[str, Any]) -> None:
    async def body() -> None:
        node = Node()
        async with serve(node, listen) as server, connect(server.address) as carrier:
            with pytest.raises(CallError) as late:
                await carrier.call(NODE, FileList("a"), 0.05)
            assert late.value.sent
            node.gates["a"].set()
            await until(lambda: figure(carrier, "late_replies") == 1)
            assert await carrier.call(NODE, Ping(), 5) == Pong()
            assert figure(server, "connections") == 1

            given_up = asyncio.create_task(carrier.call(NODE, FileList("b"), 10))
            await until(lambda: node.waiting == 1)
            given_up.cancel()
            await asyncio.wait({given_up})
            node.gates["b"].set()
            await until(lambda: figure(carrier, "late_replies") == 2)

    run(body())


# ---------------------------------------------------------------- connections that end


def test_calls_in_flight_fail_at_once_when_the_server_ends(listen: dict[str, Any]) -> None:
    async def body() -> None:
        node = Node()
        async with serve(node, listen) as server, connect(server.address) as carrier:
            calls = [asyncio.create_task(carrier.call(NODE, FileList("a"), 60)) for _ in range(20)]
            await until(lambda: node.waiting == 20)
            await server.stop()
            async with asyncio.timeout(2):
                errors = await asyncio.gather(*calls, return_exceptions=True)
            assert all(isinstance(error, CallError) and error.sent for error in errors)
            with pytest.raises(CallError) as refused:
                await carrier.call(NODE, Ping(), 5)
            assert not refused.value.sent

    run(body())


def test_a_server_that_is_back_at_its_address_is_found_again(listen: dict[str, Any]) -> None:
    async def body() -> None:
        first = Node()
        async with serve(first, listen) as server:
            address = server.address
            carrier = DirectCarrier(SECRET, host_id=host_id())
            carrier.update({NODE: address})
            assert await carrier.call(NODE, Ping(), 5) == Pong()
        with pytest.raises(CallError):  # it may have been sent before this side learnt of the end
            await carrier.call(NODE, Ping(), 5)
        for _ in range(3):
            with pytest.raises(CallError) as refused:
                await carrier.call(NODE, Ping(), 5)
            assert not refused.value.sent
        async with serve(Node(), listen, tcp_port=address.tcp_port) as server:
            async with asyncio.timeout(5):
                while True:
                    try:
                        assert await carrier.call(NODE, Ping(), 5) == Pong()
                        break
                    except CallError:  # it is left alone for a moment after a failure
                        await asyncio.sleep(0.01)
            assert figure(server, "calls") == 1
        await carrier.close()

    run(body())


def test_a_successor_takes_over_the_unix_path_and_its_predecessor_leaves_it_alone(tmp_path: Path) -> None:
    async def body() -> None:
        with tempfile.TemporaryDirectory(prefix="tt") as folder:
            path = Path(folder) / "s"
            async with serve(Node(), {"unix_path": str(path)}) as first:
                assert stat.S_IMODE(path.stat().st_mode) == 0o600
                async with serve(Node(), {"unix_path": str(path)}) as second, connect(second.address) as carrier:
                    await first.stop()
                    assert await carrier.call(NODE, Ping(), 5) == Pong()
                    assert figure(second, "calls") == 1
                left = os.listdir(folder)  # noqa: PTH208
                assert left == []
        with pytest.raises(InvalidRequest, match="too long"):
            await DirectServer(Node().handle, SECRET, unix_path=str(tmp_path / ("x" * 100))).start()

    run(body())


def test_the_unix_path_is_used_on_its_own_machine_only_and_tcp_where_it_does_not_work() -> None:
    async def body() -> None:
        with tempfile.TemporaryDirectory(prefix="tt") as folder:
            async with serve(Node(), {"unix_path": f"{folder}/s", "tcp_host": "127.0.0.1"}) as server:
                here = server.address
                for address, family in (
                    (here, "unix"),
                    (Address(NODE, "elsewhere", here.unix_path, here.tcp_host, here.tcp_port), "tcp"),
                    (Address(NODE, "", here.unix_path, here.tcp_host, here.tcp_port), "tcp"),
                    (Address(NODE, host_id(), f"{folder}/gone", here.tcp_host, here.tcp_port), "tcp"),
                ):
                    async with connect(address) as carrier:
                        assert await carrier.call(NODE, Ping(), 5) == Pong()
                        (member,) = server.members
                        assert (member.describe_peer() == "a local process") == (family == "unix")
                    await until(lambda: not server.members)
                async with connect(Address(NODE, "elsewhere", here.unix_path)) as carrier:
                    with pytest.raises(CallError, match="neither") as refused:
                        await carrier.call(NODE, Ping(), 5)
                    assert not refused.value.sent

    run(body())


def test_update_keeps_unchanged_connections_and_drops_the_others(listen: dict[str, Any]) -> None:
    async def body() -> None:
        node = Node()
        async with serve(node, listen) as server, connect(server.address) as carrier:
            call = asyncio.create_task(carrier.call(NODE, FileList("a"), 10))
            await until(lambda: node.waiting == 1)
            carrier.update({NODE: server.address, "cold-0-0": Address("cold-0-0")})
            node.gates["a"].set()
            await call
            assert figure(server, "connections") == 1

            call = asyncio.create_task(carrier.call(NODE, FileList("b"), 10))
            await until(lambda: node.waiting == 1)
            carrier.update({})
            with pytest.raises(CallError) as moved:
                await call
            assert moved.value.sent
            with pytest.raises(CallError) as unknown:
                await carrier.call(NODE, Ping(), 5)
            assert not unknown.value.sent
            assert not carrier.send(NODE, Ping())
            await until(lambda: not server.members)

    run(body())


def test_closing_a_carrier_ends_its_calls_and_delivers_what_was_sent(listen: dict[str, Any]) -> None:
    async def body() -> None:
        node = Node()
        async with serve(node, listen) as server, connect(server.address) as carrier:
            call = asyncio.create_task(carrier.call(NODE, FileList("a"), 10))
            await until(lambda: node.waiting == 1)
            carrier.send(NODE, FileRemove(["last"]))
            await carrier.close()
            with pytest.raises(CallError) as closed:
                await call
            assert closed.value.sent
            await until(lambda: node.names == ["last"])
            with pytest.raises(CallError) as refused:
                await carrier.call(NODE, Ping(), 5)
            assert not refused.value.sent

    run(body())


def test_a_handler_runs_to_its_end_though_its_caller_is_gone(listen: dict[str, Any]) -> None:
    async def body() -> None:
        node = Node()
        async with serve(node, listen) as server:
            async with connect(server.address) as carrier:
                call = asyncio.create_task(carrier.call(NODE, FileList("a"), 10))
                await until(lambda: node.waiting == 1)
            with pytest.raises(CallError):
                await call
            await until(lambda: not server.members)
            assert node.waiting == 1
            node.gates["a"].set()
            await until(lambda: not server.tasks)
            assert node.waiting == 0
            assert figure(server, "dropped_frames") == 1

    run(body())


def test_tcp_connections_are_encrypted_when_the_configuration_says_so(tmp_path: Path) -> None:
    pem = tmp_path / "tls.pem"
    pem.write_text(TLS_PEM)
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(pem)
    trusting = ssl.create_default_context(cafile=str(pem))

    async def body() -> None:
        data = random.Random(2).randbytes(2_000_000)
        async with (
            serve(Node(), {"tcp_host": "127.0.0.1"}, tls=serving, handshake_timeout_s=0.3) as server,
            connect(server.address, tls=trusting) as carrier,
        ):
            assert await carrier.call(NODE, BlockBytes(data), 20) == BlockBytes(data[::-1])
            for tls in (None, ssl.create_default_context()):  # no TLS, and one that does not know the signer
                async with connect(server.address, tls=tls, connect_timeout_s=1.0) as other:
                    with pytest.raises(CallError) as refused:
                        await other.call(NODE, Ping(), 5)
                    assert not refused.value.sent
            reader, writer = await raw(server.address)  # says nothing at all
            assert await is_closed(reader)
            writer.close()
            assert await carrier.call(NODE, Ping(), 5) == Pong()
            assert len(server.members) == 1

    run(body())
