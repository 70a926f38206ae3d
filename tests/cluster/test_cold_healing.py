"""Cold nodes make good what is damaged or lost, from whichever copies have it, and remember what is to be done."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from random import Random

import pytest
from cold_model import cold_file, topology, unsealed
from timetier.cluster.carriers.memory import MemoryNetwork
from timetier.cluster.cold import repairs as repairs_module
from timetier.cluster.cold import scrubber as scrubber_module
from timetier.cluster.cold.block import checksum, read_index
from timetier.cluster.cold.files import SystemFiles
from timetier.cluster.cold.mending import Repair
from timetier.cluster.cold.repair_log import LOG_NAME, OpenRepair, RepairLog, added, done, failed
from timetier.cluster.cold.scrub_round import STATE_FILE, ScrubSettings
from timetier.cluster.cold.service import ColdService
from timetier.cluster.counters import Counters
from timetier.cluster.messages import (
    BlockBytes,
    BlockRead,
    Failure,
    FileFacts,
    FileInfo,
    FileRemove,
    FileWrite,
    Message,
    Pong,
    ScrubNow,
)

FILES = {name: cold_file(name, owners=12, each=60) for name in ("a.arrow", "b.arrow", "c.arrow")}
DATA = FILES["a.arrow"]
BLOCKS = read_index(DATA).blocks
FAST = ScrubSettings(mb_per_s=0.0, every_s=3_600.0, grace_s=0.0)


class Group:
    """Three cold nodes of two disks, and a client."""

    def __init__(self, folder: Path, scrub: ScrubSettings = FAST) -> None:
        self.folder = folder
        self.scrub = scrub
        self.network = MemoryNetwork()
        self.client = self.network.carrier("client")
        self.nodes: dict[int, ColdService] = {}

    async def start(self, replica: int) -> None:
        name = f"cold-0-{replica}"
        node = ColdService(
            name,
            0,
            replica,
            self.folder / name,
            topology(),
            self.network.carrier(name),
            disks=2,
            read_threads=2,
            counters=Counters(),
            scrub=self.scrub,
        )
        await node.start()
        self.network.register(name, node.handle)
        self.nodes[replica] = node

    async def kill(self, replica: int) -> None:
        """End a node as a kill does: nothing is written any more."""
        node = self.nodes.pop(replica)
        for task in [*node.repairs._tasks, node.scrubber._task]:
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        node.repairs._tasks, node.scrubber._task = [], None
        await node.stop()

    async def call(self, replica: int, message: Message) -> Message:
        return await self.client.call(f"cold-0-{replica}", message, 10.0)

    async def write(self, file: str, data: bytes) -> None:
        for replica in range(3):
            await self.call(replica, FileWrite(file, 1, 0, data, True, checksum(data)))

    def path(self, replica: int, file: str = "a.arrow") -> Path:
        return self.folder / f"cold-0-{replica}" / "disk-1" / file

    def log(self, replica: int) -> Path:
        return self.folder / f"cold-0-{replica}" / LOG_NAME

    def total(self, replica: int, name: str) -> int:
        return int(self.nodes[replica].counters.totals.get(name, 0))

    def at_rest(self, replica: int) -> bool:
        return bool(self.nodes[replica].status()["repair_queue"] == 0)

    async def scrub_now(self, replica: int) -> dict[str, object]:
        """Have a round made, as fast as can be; its figures."""
        rounds = self.total(replica, "scrub_rounds")
        assert await self.call(replica, ScrubNow(100_000.0)) == Pong()
        await until(lambda: self.total(replica, "scrub_rounds") == rounds + 1)
        await until(lambda: self.at_rest(replica))
        last = self.nodes[replica].status()["scrub"]["last"]
        assert isinstance(last, dict)
        return last


def run(folder: Path, test: Callable[[Group], Awaitable[None]], scrub: ScrubSettings = FAST) -> None:
    async def body() -> None:
        group = Group(folder, scrub)
        for replica in range(3):
            await group.start(replica)
        for file, data in FILES.items():
            await group.write(file, data)
        try:
            await asyncio.wait_for(test(group), 60)
        finally:
            for node in list(group.nodes.values()):
                await node.stop()

    asyncio.run(body())


async def until(condition: Callable[[], bool], what: str = "the condition") -> None:
    """Wait for a condition, twenty seconds at most."""
    deadline = asyncio.get_running_loop().time() + 20
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, f"{what} was not met in time"
        await asyncio.sleep(0.005)


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 16
    path.write_bytes(data)


def block_read(at: int = 0, file: str = "a.arrow") -> BlockRead:
    entry = read_index(FILES[file]).blocks[at]
    return BlockRead(file, entry.offset, entry.length, entry.crc)


# ------------------------------------------------------------ from several copies


def test_a_lost_file_is_put_together_from_peers_that_are_damaged_in_different_blocks(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        group.path(0).unlink()
        for at, entry in enumerate(BLOCKS):
            flip(group.path(1 + at % 2), entry.offset + entry.length // 2)
        assert isinstance(await group.call(0, block_read()), Failure)
        await until(lambda: group.total(0, "files_repaired") == 1)
        assert group.path(0).read_bytes() == DATA

    run(tmp_path, body)


@pytest.mark.parametrize("damaged", ["head", "tail"])
def test_a_lost_file_gets_head_and_tail_from_the_peer_that_has_them_right(tmp_path: Path, damaged: str) -> None:
    async def body(group: Group) -> None:
        group.path(0).write_bytes(DATA[: BLOCKS[2].offset])
        flip(group.path(1), 20 if damaged == "head" else len(DATA) - 60)
        flip(group.path(2), BLOCKS[0].offset + 30)
        assert isinstance(await group.call(0, block_read(5)), Failure)
        await until(lambda: group.total(0, "files_repaired") == 1)
        assert group.path(0).read_bytes() == DATA

    run(tmp_path, body)


def test_what_only_the_truncated_copy_itself_has_right_is_kept(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        group.path(0).write_bytes(DATA[: BLOCKS[3].offset])
        for replica in (1, 2):
            flip(group.path(replica), BLOCKS[1].offset + 40)
        assert isinstance(await group.call(0, block_read(4)), Failure)
        await until(lambda: group.total(0, "files_repaired") == 1)
        assert group.path(0).read_bytes() == DATA
        for replica in (1, 2):  # and they get it from there
            assert isinstance(await group.call(replica, block_read(1)), Failure)
            await until(lambda r=replica: group.total(r, "blocks_repaired") == 1)  # type: ignore[misc]
            assert group.path(replica).read_bytes() == DATA

    run(tmp_path, body)


def test_files_swapped_with_each_other_are_both_put_right_by_one_read(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        a, b = group.path(0), group.path(0, "b.arrow")
        first, second = a.read_bytes(), b.read_bytes()
        assert len(first) == len(second), "the read can't know by the size"
        a.write_bytes(second)
        b.write_bytes(first)
        for file in ("a.arrow", "b.arrow"):
            answer = await group.call(0, block_read(0, file))
            if isinstance(answer, BlockBytes):  # same rows, same bytes: only head and tail differ
                await group.scrub_now(0)
        await until(lambda: group.at_rest(0))
        assert (a.read_bytes(), b.read_bytes()) == (first, second)

    run(tmp_path, body)


def test_damage_of_any_kind_on_one_and_two_copies_is_made_good(tmp_path: Path) -> None:
    seed = 20_261
    print(f"seed={seed}")
    random = Random(seed)

    async def body(group: Group) -> None:
        for _ in range(6):
            hit = random.sample(range(3), 2)
            for replica in hit:
                damage(group, replica, random)
            for replica in hit:
                await group.scrub_now(replica)
            for replica in hit:  # what one of them could not get from the other by then
                await group.scrub_now(replica)
            for replica in range(3):
                for file, data in FILES.items():
                    assert group.path(replica, file).read_bytes() == data, (replica, file)

    run(tmp_path, body)


def damage(group: Group, replica: int, random: Random) -> None:
    """Flip bits in a file of a node, cut it, remove it, or swap it with another; never what the last good copy has."""
    file, other = random.sample(sorted(FILES), 2)
    path = group.path(replica, file)
    kind = random.choice(["flip", "cut", "remove", "swap", "grow"])
    if kind == "flip":
        for _ in range(5):
            flip(path, random.randrange(path.stat().st_size))
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[: random.randrange(path.stat().st_size)])
    elif kind == "grow":
        path.write_bytes(path.read_bytes() + random.randbytes(100))
    elif kind == "remove":
        path.unlink()
    else:
        there = group.path(replica, other)
        mine, its = path.read_bytes(), there.read_bytes()
        path.write_bytes(its)
        there.write_bytes(mine)


# ------------------------------------------------------------ files of before


def old_file(file: str, run: str = "r") -> bytes:
    """A file without a name and a seal, as they were once written."""
    return unsealed(cold_file(file, owners=12, each=60 if run == "r" else 59))


def test_old_files_that_were_swapped_are_found_by_comparing_them_with_the_peers(tmp_path: Path) -> None:
    old = {"x.arrow": old_file("x.arrow"), "y.arrow": old_file("y.arrow", "s")}

    async def body(group: Group) -> None:
        for file, data in old.items():
            await group.write(file, data)
        group.path(1, "x.arrow").write_bytes(old["y.arrow"])
        group.path(1, "y.arrow").write_bytes(old["x.arrow"])
        last = await group.scrub_now(1)
        assert (last["found"], last["repaired"]) == (2, 2)
        assert {file: group.path(1, file).read_bytes() for file in old} == old

    run(tmp_path, body)


@pytest.mark.parametrize("where", ["head", "tail", "block"])
def test_damage_to_an_old_file_is_found_and_restored(tmp_path: Path, where: str) -> None:
    data = old_file("x.arrow")

    async def body(group: Group) -> None:
        await group.write("x.arrow", data)
        entry = read_index(data).blocks[1]
        flip(group.path(2, "x.arrow"), {"head": 30, "tail": len(data) - 300, "block": entry.offset + 50}[where])
        last = await group.scrub_now(2)
        assert last["found"] == 1
        assert group.path(2, "x.arrow").read_bytes() == data

    run(tmp_path, body)


@pytest.mark.parametrize("how", ["another's", "damaged"])
def test_nobody_is_told_the_index_of_a_damaged_file_or_of_another_one(tmp_path: Path, how: str) -> None:
    async def body(group: Group) -> None:
        if how == "damaged":
            at = DATA.index(b'"blocks":[[1,') + len(b'"blocks":[[')
            flip(group.path(0), at)  # a bucket of another number, in JSON as good as before
        else:
            group.path(0).write_bytes(FILES["b.arrow"])
        answer = await group.call(0, FileInfo("a.arrow"))
        assert isinstance(answer, Failure) and answer.kind == "Corrupt"
        await until(lambda: group.at_rest(0))
        assert group.path(0).read_bytes() == DATA
        assert isinstance(await group.call(0, FileInfo("a.arrow")), FileFacts)

    run(tmp_path, body)


# ------------------------------------------------------------ the queue


def test_a_repair_that_fails_stays_with_its_reason_until_it_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repairs_module, "_BACK_OFF_S", 0.002)

    async def body(group: Group) -> None:
        entry = BLOCKS[1]
        for replica in range(3):
            flip(group.path(replica), entry.offset + 9)
        assert isinstance(await group.call(0, block_read(1)), Failure)
        await until(lambda: group.total(0, "repairs_failed") == 1)
        told = group.nodes[0].status()["repairs"]
        assert (told["queued"], told["failing"]) == (1, 1)
        reason = told["last_reasons"][0]
        assert (reason["file"], reason["offset"]) == ("a.arrow", entry.offset)
        assert "damaged on every replica" in reason["reason"] and reason["attempts"] >= 5
        group.path(2).write_bytes(DATA)
        await until(lambda: group.at_rest(0))
        assert group.path(0).read_bytes() == DATA

    run(tmp_path, body)


def test_the_pauses_of_a_failing_repair_grow_and_a_read_shortens_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repairs_module, "_BACK_OFF_S", 0.01)
    monkeypatch.setattr(repairs_module, "_LONGEST_BACK_OFF_S", 1_000.0)
    monkeypatch.setattr(repairs_module, "_WANTED_AGAIN_S", 0.0)

    async def body(group: Group) -> None:
        for replica in (1, 2):
            group.network.cut("cold-0-0", f"cold-0-{replica}")
        flip(group.path(0), BLOCKS[0].offset + 3)
        await group.call(0, block_read())
        (one,) = group.nodes[0].repairs._open.values()
        pauses = []
        for attempt in range(1, 6):
            await until(lambda attempt=attempt: one.attempts == attempt)  # type: ignore[misc]
            pauses.append(one.due_s - asyncio.get_running_loop().time())
        assert pauses == sorted(pauses)
        one.due_s += 1_000
        group.network.heal()
        await group.call(0, block_read())
        await until(lambda: group.at_rest(0))
        assert group.path(0).read_bytes() == DATA

    run(tmp_path, body)


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_what_is_queued_survives_a_restart_and_a_kill(tmp_path: Path, how: str) -> None:
    async def body(group: Group) -> None:
        for replica in (1, 2):
            group.network.cut("cold-0-0", f"cold-0-{replica}")
        flip(group.path(0), BLOCKS[0].offset + 3)
        group.path(0, "b.arrow").unlink()
        await group.call(0, block_read())
        await group.call(0, block_read(0, "b.arrow"))
        await until(lambda: group.log(0).exists() and group.log(0).read_bytes().count(b'"add"') == 2, "the log")
        if how == "stopped":
            await group.nodes.pop(0).stop()
        else:
            await group.kill(0)
        group.network.heal()
        await group.start(0)
        await until(lambda: group.total(0, "blocks_repaired") + group.total(0, "files_repaired") == 2)
        assert group.path(0).read_bytes() == DATA
        assert group.path(0, "b.arrow").read_bytes() == FILES["b.arrow"]
        await until(lambda: group.at_rest(0))
        await group.kill(0)
        await group.start(0)
        assert group.at_rest(0), "what is done is not done again"

    run(tmp_path, body)


def test_a_queue_that_can_t_be_written_delays_no_read_and_no_repair(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        group.log(0).unlink(missing_ok=True)
        group.log(0).mkdir()
        flip(group.path(0), BLOCKS[0].offset + 3)
        assert isinstance(await group.call(0, block_read()), Failure)
        await until(lambda: group.at_rest(0))
        assert group.path(0).read_bytes() == DATA
        await until(lambda: group.total(0, "repair_log_errors") >= 1)

    run(tmp_path, body)


def test_a_file_that_is_removed_is_not_repaired_nor_brought_back(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        for replica in (1, 2):
            group.network.cut("cold-0-0", f"cold-0-{replica}")
        group.path(0).unlink()
        await group.call(0, block_read())
        assert not group.at_rest(0)
        assert await group.call(0, FileRemove(["a.arrow"])) == Pong()
        assert group.at_rest(0)
        group.network.heal()
        await group.scrub_now(1)
        assert not group.path(0).exists()
        assert group.total(0, "repairs_removed") == 1

    run(tmp_path, body)


# ------------------------------------------------------------ its log


def test_the_log_gives_back_what_is_open_whatever_its_end_looks_like(tmp_path: Path) -> None:
    files = SystemFiles()
    log = RepairLog(files, tmp_path)
    one = OpenRepair(Repair("a", 8, 10, 77, False), 5.0)
    two = OpenRepair(Repair.of_file("b", sure=False), 6.0, 9, "no replica")
    log.append([added(one), added(two)])
    log.append([failed(two), added(OpenRepair(Repair("c", 0, 1, 2, True), 7.0)), done(("c", -1))])
    whole = (tmp_path / LOG_NAME).read_bytes()
    assert RepairLog(files, tmp_path).read() == [one, two]
    for cut in range(len(whole)):
        (tmp_path / LOG_NAME).write_bytes(whole[:cut])
        found = {open_.repair for open_ in RepairLog(files, tmp_path).read()}
        assert found <= {one.repair, two.repair, Repair("c", 0, 1, 2, True)}
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 4
        (tmp_path / LOG_NAME).write_bytes(damaged)
        found = {open_.repair for open_ in RepairLog(files, tmp_path).read()}
        assert len(found & {one.repair, two.repair}) >= 1, f"bit 2 of byte {at} takes one line at most"
    log.rewrite([two])
    assert RepairLog(files, tmp_path).read() == [two]
    assert not log.is_long()


# ------------------------------------------------------------ the scrubber


def test_a_round_finds_all_damage_that_no_read_has_met_and_has_it_repaired(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        flip(group.path(0), 20)
        for entry in BLOCKS[1:3]:
            flip(group.path(0), entry.offset + 5)
        flip(group.path(0, "b.arrow"), len(FILES["b.arrow"]) - 40)
        group.path(0, "c.arrow").unlink()
        last = await group.scrub_now(0)
        assert (last["found"], last["repaired"], last["errors"], last["files"]) == (5, 5, 0, 3)
        for file, data in FILES.items():
            assert group.path(0, file).read_bytes() == data
        again = await group.scrub_now(0)
        assert (again["found"], again["bytes"]) == (0, sum(map(len, FILES.values())))

    run(tmp_path, body)


def test_a_file_that_both_peers_have_is_restored_and_one_that_a_single_peer_has_is_not(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        await group.call(0, FileRemove(["a.arrow"]))
        for replica in (0, 1):
            await group.call(replica, FileRemove(["b.arrow"]))
        last = await group.scrub_now(0)
        assert (last["found"], last["repaired"]) == (1, 1)
        assert group.path(0).read_bytes() == DATA
        assert not group.path(0, "b.arrow").exists()

    run(tmp_path, body)


def test_a_file_that_is_young_or_that_a_peer_loses_meanwhile_is_not_restored(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        await group.call(0, FileRemove(["a.arrow"]))
        assert (await group.scrub_now(0))["found"] == 0, "it may still be on its way here"
        group.nodes[0].scrubber.settings = FAST
        for replica in (1, 2):  # the list says that both have it, and then one of them has removed it
            group.network.cut("cold-0-0", f"cold-0-{replica}")
        group.nodes[0].repairs.add(Repair.of_file("a.arrow", sure=False))
        await group.call(2, FileRemove(["a.arrow"]))
        group.network.heal()
        await until(lambda: group.at_rest(0))
        assert group.total(0, "repairs_gone") == 1
        assert not group.path(0).exists()

    run(tmp_path, body, FAST._replace(grace_s=600.0))


def test_a_round_goes_on_after_a_restart_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrubber_module, "_SAVE_EVERY_S", 0.0)

    async def body(group: Group) -> None:
        await group.call(0, ScrubNow(0.1))
        await until(lambda: group.nodes[0].status()["scrub"].get("round", {}).get("files", 0) >= 1)
        state = group.folder / "cold-0-0" / STATE_FILE
        await until(lambda: json.loads(state.read_bytes())["state"]["now"])
        await until(lambda: json.loads(state.read_bytes())["state"]["now"]["files"] >= 1)
        await group.kill(0)
        await group.start(0)
        round_ = group.nodes[0].status()["scrub"]["round"]
        assert round_["files"] >= 1
        await group.call(0, ScrubNow(100_000.0))
        await until(lambda: group.total(0, "scrub_rounds") == 1)
        assert group.total(0, "scrub_files") < 3, "what was done before is not done again"
        assert group.nodes[0].status()["scrub"]["last"]["files"] == 3

    run(tmp_path, body)


def test_rounds_begin_by_themselves_and_status_says_when(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        told = group.nodes[0].status()["scrub"]
        assert (told["state"], told["mb_per_s_limit"]) == ("waiting", 50.0)
        assert told["next_at"] is not None
        group.nodes[0].scrubber._state.next_at = 1.0
        group.nodes[0].scrubber._asked.set()
        await until(lambda: group.total(0, "scrub_rounds") == 1)
        told = group.nodes[0].status()["scrub"]
        assert told["last"]["files"] == 3
        assert told["next_at"] == pytest.approx(told["last"]["began_at"] + 3_600.0)

    run(tmp_path, body, FAST._replace(mb_per_s=50.0))


def test_a_round_keeps_to_its_rate(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        size = sum(map(len, FILES.values()))
        began = asyncio.get_running_loop().time()
        await group.call(0, ScrubNow(size / 1e6))  # a second, or more: ends are read twice
        await until(lambda: group.total(0, "scrub_rounds") == 1)
        assert asyncio.get_running_loop().time() - began >= 0.8

    run(tmp_path, body)


def test_a_round_makes_room_for_reads_and_still_gets_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrubber_module, "_PATIENCE_S", 0.2)

    async def body(group: Group) -> None:
        node = group.nodes[0]
        reading = True

        async def readers() -> None:
            while reading:
                await asyncio.gather(*[group.call(0, block_read(at % len(BLOCKS))) for at in range(40)])

        task = asyncio.create_task(readers())
        await until(lambda: node._reads.waiting > 0)
        await group.call(0, ScrubNow(100_000.0))
        await until(lambda: node.status()["scrub"]["state"] == "paused", "a pause")
        await until(lambda: group.total(0, "scrub_rounds") == 1, "the end of the round")
        reading = False
        await task

    run(tmp_path, body)
