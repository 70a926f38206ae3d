"""The asyncio client over the memory carrier, with a small faithful store behind it."""

from __future__ import annotations

import asyncio
import datetime
import doctest
import pickle
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from client_model import FixedSource, ModelStore, make_topology, until
from timetier.cluster.client import items as shapes
from timetier.cluster.client.items import Item, ItemAddress, Put
from timetier.cluster.client.store import AsyncStore, AsyncTable
from timetier.cluster.client.view import ClientSettings
from timetier.cluster.errors import (
    InvalidRequest,
    OutcomeUnknown,
    TimeTierError,
    TooLarge,
    Unavailable,
    VersionConflict,
    WriteManyError,
)
from timetier.cluster.keys import timeline_key
from timetier.cluster.messages import Failure, Message, Pong, ReadItems, ReadPages, Status, Write
from timetier.cluster.topology import Topology

FAST = ClientSettings(timeout_s=5.0, attempt_timeout_s=0.2, back_off_s=0.001, back_off_max_s=0.01)
HASTY = ClientSettings(timeout_s=0.3, attempt_timeout_s=0.1, back_off_s=0.001, back_off_max_s=0.01)


class World:
    """A store, its client and one table."""

    def __init__(self, topology: Topology, settings: ClientSettings) -> None:
        self.model = ModelStore(topology)
        self.source = FixedSource()
        self.store = AsyncStore(self.model.network.carrier("client"), topology, self.source, settings=settings)
        self.moments: AsyncTable = self.store.table("moments")

    def sent(self, kind: type[Any]) -> list[Any]:
        """Messages of one kind, as they came to the nodes."""
        return [message for _, message in self.model.log if isinstance(message, kind)]


def play(
    scenario: Callable[[World], Awaitable[None]],
    topology: Topology | None = None,
    settings: ClientSettings = FAST,
) -> None:
    async def run() -> None:
        world = World(topology or make_topology(), settings)
        async with world.store:
            await scenario(world)

    asyncio.run(run())


# ---------------------------------------------------------------- reading and writing


def test_what_was_put_is_got_with_its_id_version_and_time() -> None:
    async def scenario(world: World) -> None:
        moments = world.moments
        assert await moments.put("alice", 5, b"five") == 1
        assert await moments.put("alice", 5, b"other", id="é") == 2
        assert await moments.get("alice", 5) == Item(5, b"five", b"", 1, 1_700_000_000_000_001)
        assert await moments.get(b"alice", np.int64(5), id="é".encode()) == Item(  # type: ignore[arg-type]
            5, b"other", "é".encode(), 2, 1_700_000_000_000_002
        )
        assert await moments.get("alice", 6) is None
        assert await moments.get_many([("alice", 5), ("bob", 1), ItemAddress("alice", 5, "é")]) == [
            await moments.get("alice", 5),
            None,
            await moments.get("alice", 5, id="é"),
        ]

    play(scenario)


def test_pages_walk_a_timeline_newest_first_and_lose_nothing() -> None:
    async def scenario(world: World) -> None:
        times = [-(1 << 63), -5, 0, 1, 2, 2, 3, (1 << 63) - 1]
        ids = [b"", b"\x00", b"a\x00b", b"", b"", b"\x00\xff", b"z", b"\xff" * 255]
        rows = [Put("alice", t, b"v%d" % n, i) for n, (t, i) in enumerate(zip(times, ids, strict=True))]
        await world.moments.put_many(rows[::2])
        await world.moments.put_many(rows[1::2])
        newest_first = [(row.timestamp, row.id, row.value) for row in reversed(rows)]
        for limit in (1, 3, 8, 100):
            walked, token = [], None
            while True:
                page = await world.moments.timeline("alice", limit=limit, before=token)
                assert len(page.items) <= limit and page.version == 2
                walked += [(item.timestamp, item.id, item.value) for item in page.items]
                token = page.next
                if token is None:
                    break
            assert walked == newest_first
            assert [item.value async for item in world.moments.iterate("alice", limit_per_page=limit)] == [
                value for _, _, value in newest_first
            ]

    play(scenario)


def test_before_an_instant_means_strictly_older_items() -> None:
    async def scenario(world: World) -> None:
        await world.moments.put_many([Put("alice", t, b"v", i) for t in (1, 2, 3) for i in (b"", b"x")])
        page = await world.moments.timeline("alice", before=3)
        assert [item.timestamp for item in page.items] == [2, 2, 1, 1]
        assert page.next is None
        assert (await world.moments.timeline("alice", before=-(1 << 63))).items == []

    play(scenario)


def test_page_tokens_hold_for_another_client_and_for_items_that_come_later() -> None:
    async def scenario(world: World) -> None:
        await world.moments.put_many([("alice", t, b"v") for t in range(10)])
        token = (await world.moments.timeline("alice", limit=4)).next
        await world.moments.put("alice", 99, b"newer")
        await world.moments.delete("alice", 6)
        async with AsyncStore(world.model.network.carrier("other"), make_topology(), FixedSource()) as other:
            page = await other.table("moments").timeline("alice", before=token, limit=3)
        assert [item.timestamp for item in page.items] == [5, 4, 3], "the item that the token names is gone"

    play(scenario)


def test_many_timelines_come_back_in_the_order_of_their_owners_from_every_group() -> None:
    async def scenario(world: World) -> None:
        owners = [f"owner{n}" for n in range(200)]
        await world.moments.put_many([Put(owner, n, owner.encode()) for n, owner in enumerate(owners)])
        pages = await world.moments.timelines([*owners, "nobody"], limit=3)
        assert [page.items[0].value.decode() for page in pages[:-1]] == owners
        assert pages[-1].items == [] and pages[-1].next is None
        found = await world.moments.get_many([(owner, n) for n, owner in enumerate(owners)])
        assert [item.value.decode() for item in found if item] == owners
        assert {node for node, _ in world.model.log} >= {"cache-0-0", "cache-1-0", "cache-2-0"}

    play(scenario, make_topology(groups=3))


def test_items_of_one_timeline_in_one_call_are_one_atomic_entry_and_the_later_of_two_wins() -> None:
    async def scenario(world: World) -> None:
        rows = [Put("alice", 1, b"first"), Put("bob", 1, b"b"), Put(b"alice", 1, b"second"), Put("alice", 2, b"x")]
        assert await world.moments.put_many(rows) == [1, 1, 1, 1]
        assert sum(len(message.timelines) for message in world.sent(Write)) == 2
        assert world.model.entries() == 2
        item = await world.moments.get("alice", 1)
        assert item is not None and item.value == b"second"
        assert await world.moments.put_many([]) == [] and await world.moments.get_many([]) == []
        assert await world.moments.timelines([]) == []

    play(scenario)


def test_deletes_remove_items_and_whole_timelines() -> None:
    async def scenario(world: World) -> None:
        await world.moments.put_many([("alice", t, b"v") for t in range(6)])
        assert await world.moments.delete("alice", 0) == 2
        assert await world.moments.delete_many([("alice", 1), ("alice", 2, b""), ("bob", 9)]) == [3, 3, 1]
        assert [item.timestamp for item in (await world.moments.timeline("alice")).items] == [5, 4, 3]
        assert await world.moments.delete_timeline("alice", if_version=3) == 4
        page = await world.moments.timeline("alice")
        assert page.items == [] and page.version == 4
        assert await world.moments.put("alice", 7, b"again") == 5

    play(scenario)


def test_a_conditional_write_is_applied_at_that_version_only() -> None:
    async def scenario(world: World) -> None:
        assert await world.moments.put("alice", 1, b"a", if_version=0) == 1
        with pytest.raises(VersionConflict) as caught:
            await world.moments.put("alice", 1, b"b", if_version=0)
        assert caught.value.version == 1
        with pytest.raises(VersionConflict):
            await world.moments.delete("alice", 1, if_version=7)
        assert await world.moments.delete("alice", 1, if_version=1) == 2

    play(scenario)


def test_a_client_that_knows_no_version_of_a_long_timeline_writes_to_it() -> None:
    async def scenario(world: World) -> None:
        for n in range(20):
            await world.moments.put("alice", n, b"v")
        async with AsyncStore(world.model.network.carrier("other"), make_topology(), FixedSource()) as other:
            assert await other.table("moments").put("alice", 100, b"v") == 21

    play(scenario)


def test_concurrent_calls_share_messages() -> None:
    async def scenario(world: World) -> None:
        versions = await asyncio.gather(*[world.moments.put(f"owner{n}", 1, b"v") for n in range(100)])
        assert versions == [1] * 100
        assert len(world.sent(Write)) <= 6, "one for the first call, one per node for all others"
        items = await asyncio.gather(*[world.moments.get(f"owner{n}", 1) for n in range(100)])
        assert all(items) and len(world.sent(ReadItems)) == 2
        await asyncio.gather(*[world.moments.timeline(f"owner{n}") for n in range(100)])
        assert len(world.sent(ReadPages)) == 2

    play(scenario)


# ---------------------------------------------------------------- faults


def test_one_dead_node_of_each_kind_is_not_noticed_and_no_write_is_applied_twice() -> None:
    async def scenario(world: World) -> None:
        world.model.network.kill("storage-0-1")
        world.model.network.kill("cache-0-0")
        owners = [f"owner{n}" for n in range(60)]
        assert await world.moments.put_many([Put(owner, 1, b"v") for owner in owners]) == [1] * 60
        assert all(await world.moments.get_many([(owner, 1) for owner in owners]))
        assert world.model.entries() == 60

    play(scenario)


def test_a_write_whose_answer_was_lost_is_applied_once() -> None:
    async def scenario(world: World) -> None:
        lost: set[str] = set()

        async def lose_first_answer(node: str, message: Message) -> Message | None:
            if isinstance(message, Write) and not lost:
                lost.add(node)
                world.model.answer(message)
                await asyncio.sleep(1)  # longer than an attempt
            return None

        world.model.fault = lose_first_answer
        assert await world.moments.put("alice", 1, b"v") == 1
        assert len(world.sent(Write)) == 2 and world.model.entries() == 1

    play(scenario)


def test_with_all_nodes_dead_calls_end_as_unavailable_in_time() -> None:
    async def scenario(world: World) -> None:
        for node in make_topology().node_names():
            world.model.network.kill(node)
        loop = asyncio.get_running_loop()
        began = loop.time()
        results = await asyncio.gather(
            world.moments.put("alice", 1, b"v"),
            world.moments.get("alice", 1),
            world.moments.timeline("alice"),
            return_exceptions=True,
        )
        assert [type(result) for result in results] == [Unavailable] * 3
        assert loop.time() - began < 5 * HASTY.timeout_s

    play(scenario, settings=HASTY)


def test_writes_to_nodes_that_hang_end_as_outcome_unknown_and_reads_as_unavailable() -> None:
    async def scenario(world: World) -> None:
        for node in make_topology().node_names():
            world.model.network.hold("client", node)
        with pytest.raises(OutcomeUnknown):
            await world.moments.put("alice", 1, b"v")
        with pytest.raises(Unavailable):
            await world.moments.timeline("alice")

    play(scenario, settings=HASTY)


def test_a_partly_failed_call_says_which_items_were_written() -> None:
    async def scenario(world: World) -> None:
        routing = world.store.view.routing
        owners = [f"owner{n}" for n in range(40)]
        group_of = {o: routing.storage_groups([timeline_key(b"moments", o.encode(), 1024)])[0] for o in owners}
        assert set(group_of.values()) == {0, 1}
        for replica in range(3):
            world.model.network.kill(f"storage-1-{replica}")
        with pytest.raises(WriteManyError) as caught:
            await world.moments.put_many([Put(owner, 1, b"v") for owner in owners])
        for error in (caught.value, pickle.loads(pickle.dumps(caught.value))):
            assert len(error.results) == 40
            for owner, result in zip(owners, error.results, strict=True):
                assert result == 1 if group_of[owner] == 0 else isinstance(result, Unavailable)
            assert error.unavailable == sum(group_of.values()) and error.unknown == 0

    play(scenario, make_topology(groups=2), settings=HASTY)


def test_a_changed_map_is_followed_while_calls_go_on() -> None:
    async def scenario(world: World) -> None:
        await world.moments.put("alice", 1, b"v")
        world.model.epoch_needed = 2
        call = asyncio.create_task(world.moments.put("alice", 2, b"v"))
        await until(lambda: world.store.view.stale_map)
        world.source.later = make_topology(epoch=2)
        assert await call == 2
        assert world.store.view.routing.topology.epoch == 2
        assert world.sent(Write)[-1].epoch == 2

    play(scenario)


def test_a_dead_router_is_asked_again_without_haste_and_harms_no_call() -> None:
    async def scenario(world: World) -> None:
        world.source.failure = RuntimeError("the actor died")
        world.source.later = make_topology(epoch=2)  # ends the poll that hangs
        await until(lambda: world.source.calls >= 3)
        assert await world.moments.put("alice", 1, b"v") == 1
        assert "the actor died" in (await world.store.status())["topology_error"]
        world.source.later, world.source.failure = make_topology(epoch=3), None
        await until(lambda: world.store.view.routing.topology.epoch == 3)
        assert world.source.calls < 50
        assert (await world.store.status())["topology_error"] == ""

    play(scenario)


def test_the_map_of_another_cluster_or_an_earlier_one_is_not_taken() -> None:
    async def scenario(world: World) -> None:
        foreign = make_topology(epoch=9)
        world.source.later = Topology(
            **{n: getattr(foreign, n) for n in foreign.__struct_fields__} | {"cluster_id": "c2"}
        )
        for _ in range(200):
            if "c2" in (await world.store.status())["topology_error"]:
                break
            await asyncio.sleep(0.01)
        else:
            pytest.fail("a foreign map was not reported")
        assert world.store.view.routing.topology.epoch == 1

    play(scenario)


def test_status_shows_every_node_and_says_which_do_not_answer() -> None:
    async def scenario(world: World) -> None:
        world.model.network.kill("cold-0-1")
        odd: dict[str, Message] = {
            "storage-0-1": Failure("Unavailable", "starting"),
            "storage-0-2": Status(b"no json"),
            "cache-0-0": Pong(),
        }

        async def answer_oddly(node: str, message: Message) -> Message | None:
            return odd.get(node)

        world.model.fault = answer_oddly
        status = await world.store.status(timeout_s=1.0)
        assert set(status["nodes"]) == set(make_topology().node_names())
        assert status["nodes"]["storage-0-0"] == {"state": "serving"}
        assert status["nodes"]["cold-0-1"]["state"] == "unreachable"
        assert status["nodes"]["storage-0-1"] == {"state": "unknown", "reason": "starting"}
        for node in ("storage-0-2", "cache-0-0"):
            assert status["nodes"][node]["state"] == "unknown", "it answered: it is not unreachable"
        assert (status["epoch"], status["tables"]) == (1, ["moments"])

    play(scenario)


def test_a_closed_store_refuses_calls_and_ends_those_in_flight() -> None:
    async def scenario(world: World) -> None:
        for node in make_topology().node_names():
            world.model.network.hold("client", node)
        calls = [
            asyncio.create_task(world.moments.put("alice", 1, b"v")),
            asyncio.create_task(world.moments.timeline("alice")),
        ]
        await until(lambda: world.store._writes.figures()["batches_in_flight"] == 1)
        await world.store.close()
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(result) for result in results] == [OutcomeUnknown, Unavailable]
        for call in (world.moments.put("alice", 1, b"v"), world.moments.get("alice", 1), world.store.status()):
            with pytest.raises(InvalidRequest, match="closed"):
                await call
        with pytest.raises(InvalidRequest, match="closed"):
            world.store.table("moments")
        await world.store.close()

    play(scenario)


# ---------------------------------------------------------------- arguments

WHEN = datetime.datetime(2024, 1, 1)
BIG = b"x" * (1 << 20)
BAD_CALLS: list[tuple[Callable[[AsyncTable], Awaitable[Any]], type[TimeTierError], str]] = [
    (lambda t: t.put("", 1, b""), InvalidRequest, "owner is empty"),
    (lambda t: t.put(7, 1, b""), InvalidRequest, "owner=7 is a int"),  # type: ignore[arg-type]
    (lambda t: t.put("o" * 256, 1, b""), TooLarge, "limit is 255"),
    (lambda t: t.put("\ud800", 1, b""), InvalidRequest, "owner="),
    (lambda t: t.put("a", True, b""), InvalidRequest, "timestamp=True is a bool"),
    (lambda t: t.put("a", 1.5, b""), InvalidRequest, "timestamp=1.5"),  # type: ignore[arg-type]
    (lambda t: t.put("a", "1", b""), InvalidRequest, "timestamp='1'"),  # type: ignore[arg-type]
    (lambda t: t.put("a", np.arange(2), b""), InvalidRequest, "timestamp="),  # type: ignore[arg-type]
    (lambda t: t.put("a", WHEN, b""), InvalidRequest, r"int\(when.timestamp\(\)"),  # type: ignore[arg-type]
    (lambda t: t.put("a", np.datetime64("2024"), b""), InvalidRequest, "pass an int"),  # type: ignore[arg-type]
    (lambda t: t.put("a", 1 << 63, b""), InvalidRequest, "64 bits"),
    (lambda t: t.put("a", 1, "text"), InvalidRequest, "value is a str"),  # type: ignore[arg-type]
    (lambda t: t.put("a", 1, BIG + b"x"), TooLarge, "limit is 1048576"),
    (lambda t: t.put("a", 1, b"", id="i" * 256), TooLarge, "limit is 255"),
    (lambda t: t.put("a", 1, b"", id=3), InvalidRequest, "id=3"),  # type: ignore[arg-type]
    (lambda t: t.put("a", 1, b"", if_version=-1), InvalidRequest, "if_version=-1"),
    (lambda t: t.put("a", 1, b"", if_version=True), InvalidRequest, "if_version=True"),
    (lambda t: t.put("a", 1, b"", if_version="2"), InvalidRequest, "if_version='2'"),  # type: ignore[arg-type]
    (lambda t: t.put_many([("a", 1, b""), ("a", 2)]), InvalidRequest, "item 1: .*pass Put"),  # type: ignore[list-item]
    (lambda t: t.put_many([("a", 1, b""), ("a", False, b"")]), InvalidRequest, "item 1: timestamp=False"),
    (lambda t: t.put_many([("a", 1, b""), ("", 2, b"")]), InvalidRequest, "item 1: owner is empty"),
    (lambda t: t.put_many([(["a"], 1, b"")]), InvalidRequest, "item 0: owner="),  # type: ignore[list-item]
    (lambda t: t.put_many([7]), InvalidRequest, "item 0: 7: pass Put"),  # type: ignore[list-item]
    (lambda t: t.put_many(("a", n, b"") for n in range(10_001)), TooLarge, "10000"),
    (lambda t: t.put_many(("a", n, BIG) for n in range(17)), TooLarge, "16777216"),
    (lambda t: t.get("a", None), InvalidRequest, "timestamp=None"),  # type: ignore[arg-type]
    (lambda t: t.get_many([("a", 1), ("a",)]), InvalidRequest, "item 1: .*pass .owner"),  # type: ignore[list-item]
    (lambda t: t.get_many([("a", 1), ("a", "x")]), InvalidRequest, "item 1: timestamp="),  # type: ignore[list-item]
    (lambda t: t.get_many(("a", n) for n in range(10_001)), TooLarge, "10000"),
    (lambda t: t.timeline("a", limit=0), InvalidRequest, "limit=0"),
    (lambda t: t.timeline("a", limit=True), InvalidRequest, "limit=True"),
    (lambda t: t.timeline("a", limit=10_001), TooLarge, "10000"),
    (lambda t: t.timeline("a", before="nonsense"), InvalidRequest, "no page token"),
    (lambda t: t.timeline("a", before=1.5), InvalidRequest, "before=1.5"),  # type: ignore[arg-type]
    (lambda t: t.timeline("a", before=False), InvalidRequest, "before=False"),
    (lambda t: t.timelines("alice"), InvalidRequest, "one owner"),
    (lambda t: t.timelines(["a", ""]), InvalidRequest, "item 1: owner"),
    (lambda t: t.timelines(["a"], limit=-1), InvalidRequest, "limit=-1"),
    (lambda t: t.delete("a", True), InvalidRequest, "timestamp=True"),
    (lambda t: t.delete_many([("a", 1), ("", 1)]), InvalidRequest, "item 1: owner"),
    (lambda t: t.delete_timeline(b""), InvalidRequest, "owner is empty"),
    (lambda t: t.delete_timeline("a", if_version=1.0), InvalidRequest, "if_version=1.0"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize("number", range(len(BAD_CALLS)))
def test_a_wrong_argument_is_named_and_nothing_is_sent(number: int) -> None:
    call, kind, text = BAD_CALLS[number]

    async def scenario(world: World) -> None:
        with pytest.raises(kind, match=text) as caught:
            await call(world.moments)
        assert type(caught.value) is kind
        if isinstance(caught.value, TooLarge):
            assert caught.value.limit > 0
        assert world.model.log == []

    play(scenario)


def test_the_largest_arguments_that_are_allowed_pass() -> None:
    async def scenario(world: World) -> None:
        owner, item_id = "o" * 255, b"i" * 255
        await world.moments.put(owner, (1 << 63) - 1, BIG, id=item_id)
        item = await world.moments.get(owner, (1 << 63) - 1, id=item_id)
        assert item is not None and item.value == BIG
        await world.moments.put_many([("a", n, b"") for n in range(10_000)])
        assert len((await world.moments.timeline("a", limit=10_000)).items) == 10_000
        await world.moments.put_many([("b", n, BIG[:-100]) for n in range(16)])

    play(scenario)


@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        ("", InvalidRequest, "empty"),
        ("t" * 65, TooLarge, "64"),
        (5, InvalidRequest, "table=5"),
        ("_links", InvalidRequest, "beginning"),
        ("a b", InvalidRequest, "A-Z"),
        ("x", InvalidRequest, "moments"),
    ],
)
def test_a_table_that_is_not_there_is_an_error_that_lists_those_that_are(
    name: Any, kind: type[Exception], text: str
) -> None:
    async def scenario(world: World) -> None:
        with pytest.raises(kind, match=text):
            world.store.table(name)

    play(scenario)


@pytest.mark.parametrize("method", ["put_many", "get_many", "delete_many", "timelines"])
def test_what_is_no_list_is_an_invalid_request(method: str) -> None:
    async def scenario(world: World) -> None:
        with pytest.raises(InvalidRequest, match="=5: pass a list"):
            await getattr(world.moments, method)(5)

    play(scenario)


def test_examples_in_docstrings_hold() -> None:
    outcome = doctest.testmod(shapes)
    assert outcome.attempted > 0 and outcome.failed == 0
