"""The fast door of the direct carrier: requests that are answered without a task, at once or later."""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from direct_model import NODE, Node, connect, figure, run, serve, until
from timetier.cluster.carriers.base import CallError, Reply
from timetier.cluster.errors import Unavailable, VersionConflict
from timetier.cluster.messages import BlockBytes, FileList, Files, Message, Ping, Pong, raise_failure


@pytest.fixture(params=["unix", "tcp"])
def listen(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """Arguments that make a server listen on a socket of one kind; Unix paths must be short."""
    with tempfile.TemporaryDirectory(prefix="tt") as folder:
        yield {"unix_path": f"{folder}/s"} if request.param == "unix" else {"tcp_host": "127.0.0.1"}


class Door:
    """Answers `BlockBytes` at once, `FileList` when its gate is opened, and leaves all else to the handler."""

    def __init__(self) -> None:
        self.waiting: dict[str, Reply] = {}

    def begin(self, message: Message, reply: Reply) -> bool:
        match message:
            case BlockBytes(b"wrong"):
                raise VersionConflict("another version", version=7)
            case BlockBytes(data):
                reply(BlockBytes(data[::-1]))
                return True
            case FileList(gate):
                self.waiting[gate] = reply
                return True
        return False

    def open(self, gate: str) -> None:
        self.waiting.pop(gate)(Files([gate], b"", b"", False))


def test_answers_at_once_later_by_the_handler_and_as_errors(listen: dict[str, Any]) -> None:
    async def body() -> None:
        door = Door()
        async with serve(Node(), listen, begin=door.begin) as server, connect(server.address) as carrier:
            assert await carrier.call(NODE, BlockBytes(b"abc"), 5) == BlockBytes(b"cba")
            assert await carrier.call(NODE, Ping(), 5) == Pong(), "by the handler"
            with pytest.raises(VersionConflict) as conflict:
                raise_failure(await carrier.call(NODE, BlockBytes(b"wrong"), 5))
            assert conflict.value.version == 7
            later = [asyncio.create_task(carrier.call(NODE, FileList(gate), 5)) for gate in "ab"]
            await until(lambda: len(door.waiting) == 2)
            assert server.at_work() == 2
            door.open("b")
            assert await later[1] == Files(["b"], b"", b"", False)
            door.waiting.pop("a")(Unavailable("it failed later"))
            with pytest.raises(Unavailable, match="it failed later"):
                raise_failure(await later[0])
            assert server.at_work() == 0

    run(body())


def test_a_second_answer_to_a_request_goes_nowhere(listen: dict[str, Any]) -> None:
    async def body() -> None:
        door = Door()
        async with serve(Node(), listen, begin=door.begin) as server, connect(server.address) as carrier:
            call = asyncio.create_task(carrier.call(NODE, FileList("a"), 5))
            await until(lambda: "a" in door.waiting)
            reply = door.waiting["a"]
            reply(Pong())
            reply(BlockBytes(b"twice"))
            assert await call == Pong()
            assert await carrier.call(NODE, BlockBytes(b"xy"), 5) == BlockBytes(b"yx")
            assert server.at_work() == 0 and figure(carrier, "late_replies") == 0

    run(body())


def test_thousands_of_requests_in_one_piece_are_answered_with_few_allowed_at_a_time(listen: dict[str, Any]) -> None:
    """Each answer makes room for the next request: that must neither nest nor stop."""

    async def body() -> None:
        door = Door()
        async with (
            serve(Node(), listen, begin=door.begin, max_in_flight=2) as server,
            connect(server.address) as carrier,
        ):
            await carrier.call(NODE, Ping(), 5)
            held = [asyncio.create_task(carrier.call(NODE, FileList(gate), 10)) for gate in "ab"]
            calls = [asyncio.create_task(carrier.call(NODE, BlockBytes(b"%d" % n), 10)) for n in range(5_000)]
            await until(lambda: len(door.waiting) == 2)
            assert not any(call.done() for call in calls), "they stay unread while two are being answered"
            door.open("a")
            door.open("b")
            await asyncio.gather(*held)
            assert await asyncio.gather(*calls) == [BlockBytes((b"%d" % n)[::-1]) for n in range(5_000)]

    run(body())


def test_requests_beyond_the_limit_are_refused_whichever_door_they_came_by(listen: dict[str, Any]) -> None:
    async def body() -> None:
        door = Door()
        async with (
            serve(Node(), listen, begin=door.begin, max_handlers=3) as server,
            connect(server.address) as carrier,
        ):
            held = [asyncio.create_task(carrier.call(NODE, FileList(gate), 10)) for gate in "abc"]
            await until(lambda: len(door.waiting) == 3)
            with pytest.raises(Unavailable, match="answers 3 requests already"):
                raise_failure(await carrier.call(NODE, BlockBytes(b"x"), 5))
            for gate in "abc":
                door.open(gate)
            await asyncio.gather(*held)
            assert await carrier.call(NODE, BlockBytes(b"xy"), 5) == BlockBytes(b"yx")

    run(body())


def test_whoever_can_not_take_an_answer_harms_no_other_call(
    listen: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        door = Door()
        async with serve(Node(), listen, begin=door.begin) as server, connect(server.address) as carrier:
            await carrier.call(NODE, Ping(), 5)
            taken: list[Message | Exception] = []

            def refuse(outcome: Message | Exception) -> None:
                raise ZeroDivisionError(str(outcome))

            with caplog.at_level(logging.CRITICAL + 1, logger="timetier"):
                carrier.begin(NODE, BlockBytes(b"ab"), 5, refuse)
                carrier.begin(NODE, BlockBytes(b"cd"), 5, taken.append)
                await until(lambda: len(taken) == 1)
            assert taken == [BlockBytes(b"dc")]
            assert figure(server, "connections") == 1

    run(body())


def test_a_call_that_is_begun_is_told_once_what_came_of_it(listen: dict[str, Any]) -> None:
    async def body() -> None:
        door = Door()
        told: dict[str, list[Message | Exception]] = {name: [] for name in ("stranger", "late", "ended", "closed")}
        async with serve(Node(), listen, begin=door.begin) as server, connect(server.address) as carrier:
            carrier.begin("storage-9-9", Ping(), 5, told["stranger"].append)
            await carrier.call(NODE, Ping(), 5)
            carrier.begin(NODE, FileList("late"), 0.05, told["late"].append)
            await until(lambda: bool(told["stranger"] and told["late"]))
            door.open("late")
            await until(lambda: figure(carrier, "late_replies") == 1)
            carrier.begin(NODE, FileList("ended"), 60, told["ended"].append)
            await until(lambda: "ended" in door.waiting)
            await server.stop()
            await until(lambda: bool(told["ended"]))
            await carrier.close()
            carrier.begin(NODE, Ping(), 5, partial(told["closed"].append))
            await until(lambda: bool(told["closed"]))
        sent = {
            name: [error.sent for error in outcomes if isinstance(error, CallError)] for name, outcomes in told.items()
        }
        assert sent == {"stranger": [False], "late": [True], "ended": [True], "closed": [False]}

    run(body())
