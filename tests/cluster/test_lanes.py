"""Merging of calls: what waits, what flies, and who gets which results."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from typing import Any

import pytest
from client_model import FixedSource, make_topology, until
from timetier.cluster.carriers.memory import MemoryNetwork
from timetier.cluster.client.lanes import Lane, LaneLimits, Lanes
from timetier.cluster.client.store import AsyncStore
from timetier.cluster.client.view import ClientSettings, settings_of
from timetier.cluster.config import CacheConfig, ClientConfig
from timetier.cluster.errors import InvalidRequest, TimeTierError, Unavailable
from timetier.cluster.memory.lanes import ReadLimits, limits_of


class Flights:
    """Batches that land when the test says so. A result is the request times ten."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gates: list[asyncio.Future[None]] = []

    async def run(self, requests: Sequence[int]) -> list[int]:
        gate: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.batches.append(list(requests))
        self.gates.append(gate)
        await gate
        return [10 * request for request in requests]

    def land(self, number: int) -> None:
        self.gates[number].set_result(None)


def call(work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    return asyncio.get_running_loop().create_task(work)


PATIENT = LaneLimits(patience_s=60.0)


def test_calls_that_come_while_a_batch_is_in_flight_form_the_next_one() -> None:
    async def scenario() -> None:
        flights = Flights()
        lane = Lane(flights.run, PATIENT)
        calls = [call(lane.submit([n, n + 100])) for n in range(1, 6)]
        await until(lambda: lane.queued_items == 8)
        assert flights.batches == [[1, 101]], "the first one does not wait"
        flights.land(0)
        await until(lambda: len(flights.batches) == 2)
        assert flights.batches[1] == [2, 102, 3, 103, 4, 104, 5, 105]
        flights.land(1)
        assert await asyncio.gather(*calls) == [[10 * n, 10 * n + 1000] for n in range(1, 6)]
        assert (lane.flying, lane.queued_items, lane.queued_bytes) == (0, 0, 0)
        await lane.close()

    asyncio.run(scenario())


def test_callers_who_call_again_and_again_share_every_round_trip() -> None:
    """Not one of them alone and then all the others, which would be twice as many round trips."""

    async def scenario() -> None:
        batches: list[int] = []

        async def run(requests: Sequence[int]) -> list[int]:
            batches.append(len(requests))
            for _ in range(5):
                await asyncio.sleep(0)
            return list(requests)

        lane = Lane(run, PATIENT)

        async def caller(number: int) -> None:
            for _ in range(10):
                assert await lane.submit([number]) == [number]

        await asyncio.gather(*map(caller, range(16)))
        assert sum(batches) == 160
        assert len(batches) <= 13, batches
        await lane.close()

    asyncio.run(scenario())


def test_a_batch_is_filled_up_to_its_bound() -> None:
    async def scenario() -> None:
        flights = Flights()
        lane = Lane(flights.run, LaneLimits(batch_items=4, patience_s=60.0))
        calls = [call(lane.submit([n] * size)) for n, size in enumerate([1, 2, 2, 1, 9])]
        for number in range(4):
            await until(lambda number=number: len(flights.batches) == number + 1)  # type: ignore[misc]
            flights.land(number)
        await asyncio.gather(*calls)
        assert flights.batches == [[0], [1, 1, 2, 2], [3], [4] * 9]
        await lane.close()

    asyncio.run(scenario())


def test_a_batch_is_filled_up_to_its_bytes() -> None:
    async def scenario() -> None:
        flights = Flights()
        lane = Lane(flights.run, LaneLimits(batch_bytes=100, patience_s=60.0))
        calls = [call(lane.submit([n], size)) for n, size in enumerate([10, 60, 40, 1, 500, 5])]
        for number in range(5):
            await until(lambda number=number: len(flights.batches) == number + 1)  # type: ignore[misc]
            flights.land(number)
        await asyncio.gather(*calls)
        assert flights.batches == [[0], [1, 2], [3], [4], [5]], "one call may have more, but then goes alone"
        await lane.close()

    asyncio.run(scenario())


def test_the_limits_of_lanes_come_from_the_configuration() -> None:
    assert settings_of(ClientConfig()) == replace(ClientSettings(), timeout_s=5.0, attempt_timeout_s=0.5)
    assert limits_of(CacheConfig()) == ReadLimits(), "the defaults of the configuration are those of the code"

    client = settings_of(
        ClientConfig(
            batch_requests=7, batch_mb=3, max_batches=2, patience_ms=9, max_queued_requests=123, max_queued_mb=5
        )
    )
    assert (client.batch_items, client.batch_bytes, client.max_batches) == (7, 3 << 20, 2)
    assert (client.patience_s, client.queued_items, client.queued_bytes) == (0.009, 123, 5 << 20)

    cache = limits_of(CacheConfig(batch_reads=9, fetch_reads=8, max_fetched_mb=128, stall_ms=4))
    assert cache == ReadLimits(batch_reads=9, fetch_reads=8, fetched_bytes=128 << 20, stall_s=0.004)
    assert (cache.max_fetches, cache.max_heavy_jobs) == (2, 4), "a half of the bytes each"
    least = limits_of(CacheConfig(max_fetched_mb=64))
    assert (least.max_fetches, least.max_heavy_jobs) == (1, 2)


def test_a_store_merges_by_its_settings() -> None:
    async def scenario() -> None:
        settings = replace(
            ClientSettings(), batch_items=7, batch_bytes=3 << 20, max_batches=2, patience_s=0.009, timeout_s=4.0
        )
        store = AsyncStore(MemoryNetwork().carrier("client"), make_topology(), FixedSource(), settings=settings)
        expected = LaneLimits(batch_items=7, batch_bytes=3 << 20, max_batches=2, patience_s=0.009, max_wait_s=4.0)
        assert store._writes._limits == store._items._limits == store._pages._limits == expected
        await store.close()

    asyncio.run(scenario())


def test_big_calls_fly_side_by_side_up_to_a_bound() -> None:
    async def scenario() -> None:
        flights = Flights()
        lane = Lane(flights.run, LaneLimits(batch_items=10, big_items=10, big_batches=3, patience_s=60.0))
        calls = [call(lane.submit([n] * 10)) for n in range(5)]
        await until(lambda: lane.queued_items == 20)
        assert len(flights.batches) == 3
        flights.land(1)
        await until(lambda: len(flights.batches) == 4)
        for number in (0, 2, 3):
            flights.land(number)
        await until(lambda: len(flights.batches) == 5)
        flights.land(4)
        await asyncio.gather(*calls)
        await lane.close()

    asyncio.run(scenario())


def test_a_slow_batch_does_not_hold_the_next_ones_back_for_long_and_their_number_is_bounded() -> None:
    async def scenario() -> None:
        flights = Flights()
        lane = Lane(flights.run, LaneLimits(patience_s=0.005, max_batches=2))
        slow, quick, third = [call(lane.submit([n])) for n in range(1, 4)]
        await until(lambda: len(flights.batches) == 2)
        assert flights.batches == [[1], [2, 3]]
        fourth = call(lane.submit([4]))
        flights.land(1)
        assert await quick == [20] and await third == [30]
        assert not slow.done()
        await until(lambda: len(flights.batches) == 3)
        fifth = call(lane.submit([5]))
        await asyncio.sleep(0.05)  # ten times the patience: the bound holds, whatever the time
        assert len(flights.batches) == 3
        for number in (0, 2):
            flights.land(number)
        await until(lambda: len(flights.batches) == 4)
        flights.land(3)
        assert (await slow, await fourth, await fifth) == ([10], [40], [50])
        await lane.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("limits", [{"queued_items": 3}, {"queued_bytes": 30}])
def test_a_full_queue_refuses_further_calls_as_unavailable_and_sends_nothing_of_them(limits: dict[str, int]) -> None:
    async def scenario() -> None:
        flights = Flights()
        lane = Lane(flights.run, LaneLimits(patience_s=60.0, **limits))
        calls = [call(lane.submit([n], 10)) for n in range(4)]
        await until(lambda: lane.queued_items == 3)
        with pytest.raises(Unavailable, match="queue is full"):
            await lane.submit([9], 10)
        flights.land(0)
        await until(lambda: len(flights.batches) == 2)
        flights.land(1)
        await asyncio.gather(*calls)
        assert all(9 not in batch for batch in flights.batches)
        await lane.close()

    asyncio.run(scenario())


def test_a_call_that_waits_too_long_is_surely_not_sent() -> None:
    async def scenario() -> None:
        flights = Flights()
        lane = Lane(flights.run, LaneLimits(patience_s=0.002, max_batches=1, max_wait_s=0.02))
        first = call(lane.submit([1]))
        await until(lambda: len(flights.batches) == 1)
        with pytest.raises(Unavailable, match="not sent"):
            await lane.submit([2])
        flights.land(0)
        assert await first == [10]
        assert flights.batches == [[1]]
        await lane.close()

    asyncio.run(scenario())


def test_a_cancelled_call_takes_back_what_was_not_sent_and_harms_no_other() -> None:
    async def scenario() -> None:
        flights = Flights()
        lane = Lane(flights.run, PATIENT)
        first, gone, stays = [call(lane.submit([n])) for n in range(1, 4)]
        await until(lambda: lane.queued_items == 2)
        gone.cancel()
        flights.land(0)
        await until(lambda: len(flights.batches) == 2)
        assert flights.batches[1] == [3]
        flights.land(1)
        assert (await first, await stays) == ([10], [30])
        await lane.close()

    asyncio.run(scenario())


def test_an_error_of_a_batch_reaches_every_call_in_it_and_the_lane_goes_on() -> None:
    async def scenario() -> None:
        flights = Flights()
        lane = Lane(flights.run, PATIENT)
        calls = [call(lane.submit([n])) for n in range(1, 4)]
        await until(lambda: lane.queued_items == 2)
        flights.gates[0].set_exception(ValueError("first"))
        await until(lambda: len(flights.batches) == 2)
        flights.gates[1].set_exception(ValueError("second"))
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert [str(result) for result in results] == ["first", "second", "second"]
        later = call(lane.submit([7]))
        await until(lambda: len(flights.batches) == 3)
        flights.land(2)
        assert await later == [70]
        await lane.close()

    asyncio.run(scenario())


def test_closing_fails_what_waits_ends_what_flies_and_refuses_what_comes() -> None:
    async def scenario() -> None:
        flights = Flights()
        lane = Lane(flights.run, LaneLimits(patience_s=0.002, max_batches=2))
        calls = [call(lane.submit([1]))]
        await until(lambda: len(flights.batches) == 1)
        calls.append(call(lane.submit([2])))
        await until(lambda: len(flights.batches) == 2)
        calls.append(call(lane.submit([3])))
        await until(lambda: lane.queued_items == 1)
        closing = call(lane.close(grace_s=0.02))
        with pytest.raises(Unavailable, match="closed"):
            await calls[2]
        await closing
        assert calls[1].cancelled()
        with pytest.raises(InvalidRequest, match="closed"):
            await lane.submit([4])
        flights.land(0)
        assert await calls[0] == [10]

    asyncio.run(scenario())


def test_groups_have_lanes_of_their_own_and_results_keep_their_order() -> None:
    async def scenario() -> None:
        flights = Flights()
        lanes = Lanes(flights.run, lambda requests: len(requests), LaneLimits(queued_items=2, patience_s=60.0))
        stuck = call(lanes.submit([0], [0]))
        await until(lambda: len(flights.batches) == 1)
        free = call(lanes.submit([1], [5]))
        await until(lambda: len(flights.batches) == 2)
        flights.land(1)
        assert await free == [50], "a group in trouble delays no other"

        full = call(lanes.submit([0, 0], [1, 2]))
        await until(lambda: lanes.figures() == {"queued_items": 2, "batches_in_flight": 1})
        mixed = call(lanes.submit([1, 0, 2, 1], [6, 7, 8, 9]))
        await until(lambda: len(flights.batches) == 4)
        flights.land(2)
        flights.land(3)
        one, refused, two, three = await mixed
        assert [one, two, three] == [60, 80, 90]
        assert isinstance(refused, TimeTierError), "a full queue fails its own group's requests only"
        flights.land(0)
        await until(lambda: len(flights.batches) == 5)
        flights.land(4)
        assert (await stuck, await full) == ([0], [10, 20])
        await lanes.close()

    asyncio.run(scenario())
