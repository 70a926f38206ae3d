"""Rate limits of the sink, on a clock that the test owns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from cold_model import POLICY, TABLE
from sink_world import CUT, SETTINGS, Stepper, World, with_world
from timetier.cluster.client.view import ClientSettings, View
from timetier.cluster.cold.pacing import BURST_S, NO_LIMITS, Limits, TokenBucket, Traffic, paced
from timetier.cluster.cold.sink_script import TableSink, sink
from timetier.cluster.effects import Call, Script, Sleep
from timetier.cluster.errors import Unavailable
from timetier.cluster.messages import (
    AskVersions,
    BlockBytes,
    BlockRead,
    FileRemove,
    FileWrite,
    FileWritten,
    Message,
    Pong,
    Versions,
    Write,
    Written,
)


class Clock:
    """Seconds; each effect takes a while."""

    def __init__(self, effect_s: float = 0.0) -> None:
        self.now_s = 100.0
        self.effect_s = effect_s

    def now(self) -> float:
        return self.now_s


def carry_out(script: Script[int], clock: Clock) -> Iterator[tuple[float, Call]]:
    """Run a script; the calls it makes, and when."""
    result: list[Message] | float | None = None
    while True:
        try:
            effect = script.send(result)
        except StopIteration:
            return
        if isinstance(effect, Sleep):
            clock.now_s += effect.seconds
            result = clock.now_s
            continue
        yield from ((clock.now_s, call) for call in effect)
        clock.now_s += clock.effect_s
        result = [answer_of(call.message) for call in effect]


def answer_of(message: Message) -> Message:
    if isinstance(message, FileWrite):
        return FileWritten(len(message.data), 0)
    if isinstance(message, BlockRead):
        return BlockBytes(bytes(message.length))
    if isinstance(message, Write):
        return Written(b"", b"")
    return Versions(b"", []) if isinstance(message, AskVersions) else Pong()


def calls(messages: list[tuple[str, Message]]) -> Script[int]:
    for node, message in messages:
        yield [Call(node, message, 1.0)]
    return len(messages)


def piece(size: int) -> tuple[str, Message]:
    return "cold-0-0", FileWrite("a.arrow", 0, 0, bytes(size), False, 0)


def greatest_rate(moments: list[tuple[float, float]], window_s: float) -> float:
    """The greatest amount that began within any window of time, by second."""
    return max(sum(n for at, n in moments if start <= at < start + window_s) for start, _ in moments) / window_s


@pytest.mark.parametrize("effect_s", [0.0, 0.003])
def test_bytes_to_cold_nodes_keep_to_their_rate(effect_s: float) -> None:
    random = Random(1)
    sizes = [random.randint(1, 40_000) for _ in range(400)]
    clock, traffic = Clock(effect_s), Traffic()
    script = paced(calls([piece(size) for size in sizes]), Limits(cold_bytes_per_s=1e6), clock.now, traffic)
    moments = [(at, float(len(call.message.data))) for at, call in carry_out(script, clock)]  # type: ignore[union-attr]
    assert len(moments) == 400
    assert traffic.cold_bytes == sum(sizes)
    for window_s in (2.0, 4.0):
        assert greatest_rate(moments, window_s) <= (1e6 * (window_s + BURST_S) + max(sizes)) / window_s
    assert clock.now_s - 100.0 >= sum(sizes) / 1e6 - BURST_S - 0.05, "it can't have been faster"
    assert clock.now_s - 100.0 <= sum(sizes) / 1e6 + 400 * effect_s, "nor does it dawdle"
    assert traffic.waited_s > 0


def test_operations_are_limited_at_each_end_by_itself() -> None:
    question, block = AskVersions([b"a"]), BlockRead("a.arrow", 0, 10, 0)
    messages: list[tuple[str, Message]] = [("storage-0-0", question), ("cold-0-0", block)] * 300
    clock, traffic = Clock(), Traffic()
    limits = Limits(storage_reads_per_s=100, cold_writes_per_s=50)
    moments = list(carry_out(paced(calls(messages), limits, clock.now, traffic), clock))
    cold = [(at, 1.0) for at, call in moments if isinstance(call.message, BlockRead)]
    storage = [(at, 1.0) for at, call in moments if isinstance(call.message, AskVersions)]
    assert greatest_rate(cold, 2.0) <= (50 * 3 + 1) / 2
    assert greatest_rate(storage, 2.0) <= (50 * 3 + 1) / 2, "they take turns, so the slower end sets the pace"
    assert (traffic.storage_calls, traffic.cold_calls, traffic.calls) == (300, 300, 600)
    only_storage = [("storage-0-0", question)] * 400
    clock = Clock()
    list(carry_out(paced(calls(list(only_storage)), limits, clock.now, Traffic()), clock))
    assert 2.9 <= clock.now_s - 100.0 <= 3.1, "400 at 100 a second, 100 of them at once"


def test_blocks_that_are_read_again_count_as_bytes_and_operations() -> None:
    clock, traffic = Clock(), Traffic()
    messages: list[tuple[str, Message]] = [("cold-0-0", BlockRead("a.arrow", 0, 100_000, 0))] * 50
    list(carry_out(paced(calls(messages), Limits(cold_bytes_per_s=1e6), clock.now, traffic), clock))
    assert traffic.cold_bytes == 5_000_000
    assert clock.now_s - 100.0 == pytest.approx(5.0 - BURST_S - 0.1, abs=0.11)


def test_each_file_that_is_removed_is_an_operation() -> None:
    clock = Clock()
    messages: list[tuple[str, Message]] = [("cold-0-0", FileRemove([f"{n}.arrow" for n in range(100)]))] * 5
    list(carry_out(paced(calls(messages), Limits(cold_writes_per_s=100), clock.now, Traffic()), clock))
    assert clock.now_s - 100.0 == pytest.approx(3.0, abs=0.01)


def test_without_limits_nothing_is_added_and_nothing_waits() -> None:
    clock, traffic = Clock(), Traffic()
    messages = [piece(1_000)] * 20
    script = paced(calls(messages), NO_LIMITS, clock.now, traffic)
    assert len(list(carry_out(script, clock))) == 20
    assert (clock.now_s, traffic.waited_s, traffic.cold_bytes) == (100.0, 0.0, 20_000)


def test_a_pause_of_the_process_does_not_earn_more_than_a_burst() -> None:
    bucket = TokenBucket(10.0, 0.0)
    bucket.take(10, 0.0)
    assert bucket.wait_s(1_000.0) == 0.0
    bucket.take(15, 1_000.0)
    assert bucket.wait_s(1_000.0) == pytest.approx(0.5)
    assert bucket.wait_s(999.0) == pytest.approx(0.5), "a clock that went back changes nothing"


def test_errors_and_results_pass_through_and_a_closed_script_is_closed() -> None:
    closed = []

    def script() -> Script[int]:
        try:
            try:
                yield [Call("cold-0-0", FileRemove([]), 1.0)]
            except Unavailable:
                yield Sleep(0.5)
                return 7
            return 0
        finally:
            closed.append(True)

    run = paced(script(), Limits(cold_writes_per_s=1), lambda: 0.0, Traffic())
    next(run)
    assert run.throw(Unavailable("too large")) == Sleep(0.5)
    with pytest.raises(StopIteration) as stop:
        run.send(0.0)
    assert stop.value.value == 7
    run = paced(script(), NO_LIMITS, lambda: 0.0, Traffic())
    next(run)
    run.close()
    assert closed == [True, True]


def test_a_whole_run_keeps_to_its_rates_at_both_ends(tmp_path: Path) -> None:
    limits = Limits(storage_bytes_per_s=4_000, storage_reads_per_s=40, cold_bytes_per_s=9_000, cold_writes_per_s=12)

    async def body(world: World) -> None:
        world.load(8, 40)
        clock = Clock()
        view = View(world.shape, now=clock.now, random=Random(3), settings=ClientSettings())
        settings = replace(SETTINGS, limits=limits)
        script = sink(view, [TableSink(TABLE, POLICY, CUT)], run="paced", now_us=10**10, settings=settings)
        run = Stepper(script, world.network.carrier("sink"))
        cold: list[tuple[float, float]] = []
        pieces: list[tuple[float, float]] = []
        reads: list[tuple[float, float]] = []
        while run.report is None:
            if isinstance(run.effect, Sleep):
                clock.now_s += run.effect.seconds
            for call in run.effect if isinstance(run.effect, list) else []:
                if isinstance(call.message, FileWrite):
                    cold.append((clock.now_s, float(len(call.message.data))))
                    pieces.append((clock.now_s, 1.0))
                elif call.node.startswith("storage-"):
                    reads.append((clock.now_s, 1.0))
            await run.step()
        assert (run.report.errors, run.report.rows) == ([], 320)
        assert run.report.waited_s == pytest.approx(clock.now_s - 100.0)
        assert run.report.waited_s > 3
        for window_s in (2.0, 5.0):
            slack_s = window_s + BURST_S
            assert greatest_rate(cold, window_s) * window_s <= 9_000 * slack_s + SETTINGS.piece_bytes
            assert greatest_rate(pieces, window_s) * window_s <= 12 * slack_s + 1
            assert greatest_rate(reads, window_s) * window_s <= 40 * slack_s + 3, "three nodes may be asked at once"
        world.check()

    with_world(tmp_path, body)
