"""Nodes that fail are asked last, found again by questions aside, and trusted slowly when they fail again and again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from random import Random

import msgspec
import pytest
from client_model import FixedSource, ModelStore, make_topology, until
from timetier.cluster.carriers.base import Address
from timetier.cluster.client.store import AsyncStore
from timetier.cluster.client.view import ClientSettings, View
from timetier.cluster.errors import Unavailable
from timetier.cluster.keys import timeline_key
from timetier.cluster.messages import Message, Ping, Write, failure
from timetier.cluster.suspicion import Suspicion

NODE = "storage-0-0"
SETTINGS = ClientSettings(
    timeout_s=5.0,
    attempt_timeout_s=0.1,
    suspect_s=0.05,
    suspect_max_s=0.1,
    relapse_max_s=0.5,
    probation_timeout_s=0.05,
    back_off_s=0.001,
)


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def suspicion(clock: Clock) -> Suspicion:
    return Suspicion(clock, first_s=1.0, longest_s=8.0, relapse_longest_s=16.0, probation_s=60.0)


# ---------------------------------------------------------------- the rules


def answer_until_trusted(found: Suspicion, clock: Clock) -> float:
    """Let the node answer whenever it is asked. Seconds from its first answer until it is trusted."""
    due_at = found.next_due()
    assert due_at is not None
    clock.now = due_at
    while NODE in found:
        due_at = found.next_due()
        assert due_at is not None
        clock.now = due_at + 0.001
        found.trust(NODE)
        found.trust(NODE)  # answers that come together count once
        assert clock.now < 10_000
    return clock.now


def test_a_node_that_fails_again_is_asked_four_times_as_late_and_has_to_answer_for_some_seconds() -> None:
    clock = Clock()
    found = suspicion(clock)
    pauses, waits = [], []
    for _ in range(4):
        found.suspect(NODE)
        due_at = found.next_due()
        assert due_at is not None
        pauses.append(due_at - clock.now)
        waits.append(round(answer_until_trusted(found, clock) - due_at, 1))
        assert found.on_probation(NODE)
        clock.now += 1.0
    assert pauses == [1.0, 4.0, 16.0, 16.0]
    assert waits == [0.0, 3.0, 3.0, 3.0]


def test_a_node_that_goes_up_and_down_every_two_seconds_is_trusted_once_and_then_left_alone() -> None:
    clock = Clock()
    found = suspicion(clock)
    hits = 0
    while clock.now < 160.0:
        up = int(clock.now / 2) % 2 == 1
        asked = NODE not in found
        if asked and not up:
            hits += 1
        if asked or found.due():
            (found.trust if up else found.suspect)(NODE)
        clock.now += 0.05
    assert hits <= 2, "a minute of it costs two requests, not thirty"


def test_a_node_that_has_answered_for_long_is_as_good_as_any_other() -> None:
    clock = Clock()
    found = suspicion(clock)
    for _ in range(3):
        found.suspect(NODE)
        answer_until_trusted(found, clock)
    clock.now += 60.0
    assert not found.on_probation(NODE)
    found.suspect(NODE)
    assert found.next_due() == clock.now + 1.0
    found.trust(NODE)
    clock.now += 60.0
    found.trust(NODE)
    assert not found.remembers, "nothing is left of it"


def test_while_somebody_probes_a_suspicion_does_not_end_by_time() -> None:
    clock = Clock()
    found = suspicion(clock)
    found.suspect(NODE)
    clock.now += 1_000.0
    assert NODE in found
    assert found.due() == [(NODE, Ping())]
    found.suspect(NODE)  # the probe brought no answer
    assert found.due() == []
    assert found.next_due() == clock.now + 2.0
    found.trust(NODE)
    assert NODE not in found


def test_a_node_on_probation_gets_less_time() -> None:
    clock = Clock()
    view = View(make_topology(), now=clock, random=Random(1), settings=SETTINGS)
    assert view.attempt_timeout_s(NODE, hasty=True) == SETTINGS.attempt_timeout_s
    view.suspect(NODE)
    assert view.attempt_timeout_s(NODE, hasty=True) == SETTINGS.attempt_timeout_s, "it is the last resort then"
    view.trust(NODE)
    assert view.attempt_timeout_s(NODE, hasty=True) == SETTINGS.probation_timeout_s
    assert view.attempt_timeout_s(NODE, hasty=False) == SETTINGS.attempt_timeout_s


def with_store(scenario: Callable[[ModelStore, AsyncStore], object]) -> None:
    async def run() -> None:
        topology = make_topology()
        model = ModelStore(topology)
        async with AsyncStore(model.network.carrier("client"), topology, FixedSource(), settings=SETTINGS) as store:
            await scenario(model, store)  # type: ignore[misc]

    asyncio.run(run())


def test_no_request_waits_for_a_node_that_stays_silent_after_the_first_one_did() -> None:
    async def scenario(model: ModelStore, store: AsyncStore) -> None:
        timeline = timeline_key(b"moments", b"alice", 1024)
        silent = store.view.routing.storage_order(timeline)[0]

        async def fault(node: str, message: Message) -> Message | None:
            if node == silent:
                await asyncio.sleep(3_600)
            return None

        model.fault = fault
        table = store.table("moments")
        for number in range(200):
            await table.put("alice", number, b"v")
            await asyncio.sleep(0.005)  # so that suspicions become due meanwhile
        asked = [message for node, message in model.log if node == silent]
        assert sum(isinstance(message, Write) for message in asked) == 1
        assert sum(isinstance(message, Ping) for message in asked) > 2, "it is probed aside"

    with_store(scenario)


def test_a_node_that_is_back_gets_requests_again() -> None:
    async def scenario(model: ModelStore, store: AsyncStore) -> None:
        timeline = timeline_key(b"moments", b"alice", 1024)
        first = store.view.routing.storage_order(timeline)[0]
        silent = True

        async def fault(node: str, message: Message) -> Message | None:
            if node == first and silent:
                await asyncio.sleep(3_600)
            return None

        model.fault = fault
        table = store.table("moments")
        await table.put("alice", 1, b"v")
        assert store.view.is_suspect(first)
        silent = False
        await until(lambda: not store.view.is_suspect(first))
        before = len(model.log)
        await table.put("alice", 2, b"v")
        assert [node for node, message in model.log[before:] if isinstance(message, Write)] == [first]

    with_store(scenario)


def test_a_node_that_is_back_but_slow_serves_what_fails_for_want_of_time_at_first() -> None:
    async def scenario(model: ModelStore, store: AsyncStore) -> None:
        for node in store.view.routing.topology.node_names():
            store.view.suspect(node)
            store.view.trust(node)

        async def fault(node: str, message: Message) -> Message | None:
            await asyncio.sleep(1.5 * SETTINGS.probation_timeout_s)
            return None

        model.fault = fault
        assert await store.table("moments").put("alice", 1, b"v") == 1

    with_store(scenario)


def test_a_store_that_is_slower_than_an_attempt_may_take_serves_all_the_same() -> None:
    async def scenario(model: ModelStore, store: AsyncStore) -> None:
        async def fault(node: str, message: Message) -> Message | None:
            await asyncio.sleep(1.5 * SETTINGS.attempt_timeout_s)
            return None

        model.fault = fault
        table = store.table("moments")
        assert await table.put("alice", 1, b"v") == 1
        item = await table.get("alice", 1)
        assert item is not None
        assert item.value == b"v"
        assert len(model.log) < 30, "it is not asked all the time"

    with_store(scenario)


def test_a_node_that_relapses_is_asked_four_times_as_late_and_gets_less_time() -> None:
    clock = Clock()
    found = suspicion(clock)
    pauses: list[float] = []
    waits: list[float] = []
    for _ in range(4):
        found.suspect(NODE)
        began = clock.now
        while not found.due():
            clock.now += 0.5
        pauses.append(clock.now - began)
        assert found.timeout_s(NODE, 0.3, 0.1) == 0.3
        first_answer = clock.now
        while NODE in found:
            if found.due() or clock.now == first_answer:
                found.trust(NODE)
            clock.now += 0.5
            assert clock.now < first_answer + 10
        waits.append(clock.now - 0.5 - first_answer)
        assert found.timeout_s(NODE, 0.3, 0.1) == 0.1
    assert pauses == [1.0, 8.0, 16.0, 16.0], "the question was put off once when it was asked, and four times since"
    assert waits == [0.0, 3.0, 3.0, 3.0]


def test_a_node_that_is_needed_is_trusted_at_its_first_answer() -> None:
    clock = Clock()
    found = suspicion(clock)
    for _ in range(2):
        found.suspect(NODE)
        clock.now += 1.0
        found.trust(NODE, at_once=True)
        assert NODE not in found


@pytest.mark.parametrize("failures", [1, 5])
def test_failures_of_long_ago_are_forgotten(failures: int) -> None:
    clock = Clock()
    found = suspicion(clock)
    for _ in range(failures):
        found.suspect(NODE)
        found.trust(NODE, at_once=True)
    clock.now += 16.0 + 60.0
    assert found.timeout_s(NODE, 0.3, 0.1) == 0.3
    found.suspect(NODE)
    clock.now += 0.9
    assert found.due() == []
    clock.now += 0.1
    assert [node for node, _ in found.due()] == [NODE]


def test_when_too_few_nodes_are_trusted_the_others_are_asked_at_once_and_again_soon() -> None:
    clock = Clock()
    found = Suspicion(clock, first_s=8.0, longest_s=8.0)
    found.suspect(NODE)
    asked = []
    for now, urgent in [(100.2, False), (100.2, True), (100.25, True), (100.35, True)]:
        clock.now = now
        asked.append(bool(found.due(urgent=urgent)))
    assert asked == [False, True, False, True], "not with every request"
    found.trust(NODE)
    assert not found
    clock.now = 200.0
    assert found.due(urgent=True) == []


def test_a_node_that_says_not_yet_rests_as_long_as_it_asked_for_and_is_then_as_good_as_any_other() -> None:
    clock = Clock()
    found = suspicion(clock)
    for _ in range(5):
        found.blame(NODE, failure(Unavailable("it joins", retry_after_s=0.2)))
        assert NODE in found
        clock.now += 0.25
        assert NODE not in found
    assert found.timeout_s(NODE, 0.5, 0.2) == 0.5
    assert not found.remembers


def test_the_neighbours_of_a_node_that_has_just_failed_are_asked_after_others_for_a_moment() -> None:
    clock = Clock()
    found = suspicion(clock)
    names = ["storage-0-0", "cold-0-0", "cold-0-1"]
    hosts = {"storage-0-0": "a", "cold-0-0": "a", "cold-0-1": "b"}
    addresses = {name: Address(name, host=host) for name, host in hosts.items()}
    found.know(msgspec.structs.replace(make_topology(), addresses=addresses))
    found.suspect("storage-0-0")
    assert found.last(names) == ["cold-0-1", "cold-0-0", "storage-0-0"]
    assert "cold-0-0" not in found
    clock.now += 1.0
    assert found.last(names) == ["cold-0-0", "cold-0-1", "storage-0-0"], "it would have failed itself since"


def test_on_one_machine_alone_nobody_is_a_neighbour() -> None:
    clock = Clock()
    found = suspicion(clock)
    names = make_topology().node_names()
    addresses = {name: Address(name, host="a") for name in names}
    found.know(msgspec.structs.replace(make_topology(), addresses=addresses))
    found.suspect(names[1])
    assert found.last(names) == [names[0], *names[2:], names[1]]
