"""The simulated loop, network and disks are at least as unkind as the real ones, and lose only what those may lose."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import pytest
from timetier.cluster.carriers.base import CallError
from timetier.cluster.cold.block import checksum
from timetier.cluster.cold.mending import Repair
from timetier.cluster.cold.repair_log import OpenRepair, RepairLog, added, done
from timetier.cluster.cold.store import ColdStore
from timetier.cluster.errors import Corrupt, Unavailable
from timetier.cluster.messages import Message, Ping, Pong
from timetier.cluster.storage.engine import EngineDamaged, EngineFailed

from .cold_files import ColdFolder, SimFiles
from .disk import SimDisk, SimEngine, open_sim_identity
from .loop import Crashed, Life, SimLoop
from .network import SimNetwork, Weather
from .trace import Trace

FOLDER = Path("/engine")


def new_loop() -> SimLoop:
    def fail(_: Life | None, error: BaseException) -> None:
        raise error

    return SimLoop(fail)  # type: ignore[abstract]  # the rest is for sockets


def new_life(name: str = "node") -> Life:
    return Life(name, lambda: 0.001)


def new_disk(seed: int = 1) -> tuple[SimDisk, Life]:
    disk, life = SimDisk("node", Random(seed)), new_life()
    disk.life = life
    return disk, life


# ---- loop


def test_time_jumps_to_the_next_timer() -> None:
    loop, life, seen = new_loop(), new_life(), []

    async def sleep() -> None:
        for seconds in (10.0, 0.5, 1_000.0):
            await asyncio.sleep(seconds)
            seen.append(round(loop.time(), 1))

    task = loop.spawn(life, sleep())
    assert loop.run(task.done, 5_000.0)
    assert seen == [10.0, 10.5, 1010.5]


def test_a_paused_life_does_in_order_what_came_meanwhile_and_a_dead_one_nothing() -> None:
    loop, life, seen = new_loop(), new_life(), []

    async def count() -> None:
        try:
            for number in range(5):
                seen.append(number)
                await asyncio.sleep(1.0)
        finally:
            seen.append(-1)

    loop.spawn(life, count())
    loop.run(lambda: len(seen) == 2, 10.0)
    loop.pause(life)
    loop.run(lambda: False, 100.0)
    assert seen == [0, 1]
    loop.resume(life)
    loop.run(lambda: len(seen) == 3, 0.1)
    assert seen == [0, 1, 2]
    life.dead = True
    loop.run(lambda: False, 100.0)
    assert seen == [0, 1, 2]


def test_a_crash_inside_a_step_ends_the_step_and_is_no_error() -> None:
    loop, life, seen = new_loop(), new_life(), []

    async def crash() -> None:
        life.dead = True
        raise Crashed

    async def wait_for_it() -> None:
        await asyncio.gather(asyncio.create_task(crash()), return_exceptions=True)
        seen.append("after the end")

    loop.spawn(life, wait_for_it())
    loop.run(lambda: False, 1.0)
    assert not seen


def test_one_thread_does_one_thing_after_the_other() -> None:
    loop, life, pool, ends = new_loop(), new_life(), ThreadPoolExecutor(1), []

    async def work() -> None:
        jobs = [asyncio.get_running_loop().run_in_executor(pool, loop.time) for _ in range(3)]
        ends.extend([round(end, 4) for end in await asyncio.gather(*jobs)])

    task = loop.spawn(life, work())
    assert loop.run(task.done, 1.0)
    assert ends == [0.001, 0.002, 0.003]


# ---- network


def ask(loop: SimLoop, network: SimNetwork, timeout_s: float = 1.0) -> tuple[Message | CallError, float]:
    async def call() -> Message | CallError:
        try:
            return await network.carrier(life).call("server", Ping(), timeout_s)
        except CallError as error:
            return error

    life, began = new_life("client"), loop.now
    task = loop.spawn(life, call())
    assert loop.run(task.done, 10.0)
    return task.result(), loop.now - began


def serve(loop: SimLoop, answered: list[float]) -> tuple[SimNetwork, Life]:
    async def handle(_: Message) -> Message:
        answered.append(loop.now)
        return Pong()

    network, server = SimNetwork(loop, Random(1), Trace(loop.time)), new_life("server")
    network.register(server, handle)
    return network, server


def test_a_call_is_answered_after_a_round_trip() -> None:
    loop = new_loop()
    network, _ = serve(loop, [])
    answer, seconds = ask(loop, network)
    assert isinstance(answer, Pong) and 0.0004 <= seconds <= 0.003


@pytest.mark.parametrize(("cut", "arrives"), [(("client", "server"), 0), (("server", "client"), 1)])
def test_a_one_way_cut_loses_the_question_or_the_answer(cut: tuple[str, str], arrives: int) -> None:
    loop, answered = new_loop(), list[float]()
    network, _ = serve(loop, answered)
    network.cut(*cut)
    answer, _ = ask(loop, network)
    while isinstance(answer, CallError) and not answer.sent:  # now and then a cut is noticed at once
        answer, _ = ask(loop, network)
    assert isinstance(answer, CallError) and answer.sent
    assert len(answered) == arrives
    network.heal()
    assert isinstance(ask(loop, network)[0], Pong)


def test_a_dead_server_refuses_and_a_doubled_one_way_frame_comes_twice() -> None:
    loop, answered = new_loop(), list[float]()
    network, server = serve(loop, answered)
    network.weather = Weather(doubled=1.0)
    assert isinstance(ask(loop, network)[0], Pong)
    loop.run(lambda: False, 5.0)
    assert len(answered) == 1  # as every carrier promises
    assert network.carrier(new_life("client")).send("server", Ping())
    loop.run(lambda: False, 5.0)
    assert len(answered) == 3
    server.dead = True
    answer, _ = ask(loop, network)
    assert isinstance(answer, CallError) and not answer.sent


# ---- disks


def test_a_crash_keeps_what_was_synced_and_any_prefix_of_the_rest() -> None:
    kept = set()
    for seed in range(40):
        disk, life = new_disk(seed)
        engine = SimEngine(disk, life, FOLDER, create=True)
        for number in range(6):
            engine.put(b"%d" % number, b"x")
            engine.put(b"also %d" % number, b"x")
            engine.commit()
            if number == 2:
                engine.sync()
        disk.power_off()
        life.dead = True
        with pytest.raises(Crashed):
            engine.get(b"0")
        disk.life = new_life()
        rows = dict(SimEngine(disk, disk.life, FOLDER, create=False).scan(b"", b"\xff"))
        count = len(rows) // 2
        assert rows.keys() == {part for n in range(count) for part in (b"%d" % n, b"also %d" % n)}
        kept.add(count)
    assert kept == {3, 4, 5, 6}


def test_a_flush_covers_what_was_committed_before_it_began() -> None:
    disk, life = new_disk()
    engine = SimEngine(disk, life, FOLDER, create=True)
    engine.put(b"before", b"x")
    engine.commit()
    engine.work_begins("sync")
    engine.put(b"after", b"x")
    engine.commit()
    engine.sync()
    assert set(disk.engine.synced) == {b"before"}


@pytest.mark.parametrize("after", range(1, 5))
def test_a_planned_crash_falls_before_or_after_an_operation(after: int) -> None:
    disk, life = new_disk()
    engine = SimEngine(disk, life, FOLDER, create=True)
    ended: list[str] = []
    disk.on_crash = ended.append
    disk.crash_after = after
    with pytest.raises(Crashed):
        engine.put(b"1", b"x")
        engine.commit()
        engine.sync()
    assert ended == [["write", "written", "sync", "synced"][after - 1]]
    assert (b"1" in disk.engine.synced) is (after == 4)


def test_damage_and_failures_are_reported_never_skipped() -> None:
    disk, life = new_disk()
    engine = SimEngine(disk, life, FOLDER, create=True)
    for name in (b"1", b"2"):
        engine.put(name, b"x")
        engine.commit()
        engine.sync()
    for fault in ("full", "failing"):
        setattr(disk, fault, True)
        engine.put(b"3", b"x")
        with pytest.raises(EngineFailed):
            engine.commit()
        setattr(disk, fault, False)
    assert engine.get(b"1") == b"x"
    assert disk.engine.flip_row_bit(Random(1))
    with pytest.raises(EngineDamaged):
        list(engine.scan(b"", b"\xff"))
    assert disk.engine.flip_bit()
    with pytest.raises(Corrupt, match="checksum"):
        SimEngine(disk, life, FOLDER, create=False)
    with pytest.raises(Corrupt, match="no database"):
        SimEngine(disk, life, Path("/other"), create=False)


def test_an_old_folder_brings_back_old_rows_and_an_old_boot() -> None:
    disk, life = new_disk()
    first = open_sim_identity(disk, life, "c", may_format=True)
    engine = SimEngine(disk, life, FOLDER, create=True)
    engine.put(b"1", b"old")
    engine.commit()
    engine.sync()
    saved = disk.copy_folder()
    engine.put(b"1", b"new")
    engine.commit()
    engine.sync()
    second = open_sim_identity(disk, life, "c", may_format=False)
    disk.put_folder(saved)
    third = open_sim_identity(disk, life, "c", may_format=False)
    assert (first.boot, second.boot, third.boot) == (1, 2, 2)
    assert second.life_number != third.life_number
    assert SimEngine(disk, life, FOLDER, create=False).get(b"1") == b"old"


# ---- cold files


def cold_store(folder: ColdFolder, life: Life) -> ColdStore:
    return ColdStore("/cold", 1, files=SimFiles(folder, life, lambda: 0), clock=lambda: 0.0, wall_s=lambda: 0.0).open()


def write(store: ColdStore, name: str, data: bytes) -> None:
    store.write_piece(name, 0, 0, data, last=True, crc=checksum(data))


def test_a_verified_cold_file_survives_every_crash_and_a_half_written_one_leaves_no_trace() -> None:
    for seed in range(20):
        disk, life = new_disk(seed)
        folder = ColdFolder(disk)
        store = cold_store(folder, life)
        write(store, "whole", b"x" * 100)
        store.write_piece("half", 0, 0, b"y" * 100, last=False, crc=0)
        disk.power_off()
        again = cold_store(folder, life)
        assert [entry.name for entry in again.list_files()[0]] == ["whole"]
        assert again.read_piece("whole", 0, 200)[1] == b"x" * 100


def test_names_and_bytes_that_were_not_synced_may_be_lost() -> None:
    found: set[Any] = set()
    for seed in range(40):
        disk, life = new_disk(seed)
        folder = ColdFolder(disk)
        files = SimFiles(folder, life, lambda: 0)
        path = Path("/cold/disk-0/file")
        with files.open(path, create=True) as opened:
            opened.write(b"abc", 0)
        disk.power_off()
        found.add(bytes(folder.names[path].data) if path in folder.names else None)
    assert None in found and len(found) > 2


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda disk, folder, path: folder.flip_bit(path, 5), Corrupt),
        (lambda disk, folder, path: folder.lose(path), Corrupt),
        (lambda disk, folder, path: setattr(disk, "failing", True), Unavailable),
    ],
)
def test_damage_to_a_cold_file_is_noticed(
    damage: Callable[[SimDisk, ColdFolder, Path], None], error: type[Exception]
) -> None:
    disk, life = new_disk()
    folder = ColdFolder(disk)
    store = cold_store(folder, life)
    write(store, "file", b"abcdefgh")
    damage(disk, folder, folder.files()[0])
    with pytest.raises(error):
        store.read_block("file", 0, 8, checksum(b"abcdefgh"))


def test_what_the_repair_queue_has_noted_survives_every_crash_of_its_disk() -> None:
    for seed in range(150):
        disk, life = new_disk(seed)
        folder, random = ColdFolder(disk), Random(seed)
        place = Path("/cold")
        open_, doubtful = set[Repair](), set[Repair]()
        disk.crash_after = random.randrange(1, 60)
        disk.on_crash = lambda what: None
        try:
            log = RepairLog(SimFiles(folder, life, lambda: 0), place)
            for number in range(20):
                one = OpenRepair(Repair(f"f{number}", 8, 9, number, False), 1.0)
                doubtful = {one.repair}
                if random.random() < 0.2:
                    log.rewrite([*(OpenRepair(repair, 1.0) for repair in sorted(open_)), one])
                else:
                    log.append([added(one)])
                open_.add(one.repair)
                if random.random() < 0.5:
                    ended = random.choice(sorted(open_))
                    doubtful = {ended}
                    open_.discard(ended)
                    log.append([done(ended.place)])
                doubtful = set()
        except Crashed:
            life = disk.life = new_life()
        disk.crash_after = None
        disk.power_off()
        found = {one.repair for one in RepairLog(SimFiles(folder, life, lambda: 0), place).read()}
        assert found - doubtful == open_ - doubtful, f"seed {seed}"
