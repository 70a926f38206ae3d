"""A cold node over a network: it answers, notices damage and heals itself from its group."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from cold_model import cold_file, topology
from timetier.cluster.carriers.memory import MemoryNetwork
from timetier.cluster.cold import mending as mending_module
from timetier.cluster.cold import repairs as repairs_module
from timetier.cluster.cold import service as service_module
from timetier.cluster.cold.block import checksum, decode_block, read_index
from timetier.cluster.cold.link import FORMAT
from timetier.cluster.cold.service import ColdService
from timetier.cluster.counters import Counters
from timetier.cluster.errors import Unavailable
from timetier.cluster.messages import (
    BlockBytes,
    BlockRead,
    Failure,
    FileFacts,
    FileInfo,
    FileList,
    FilePiece,
    FileRead,
    FileRemove,
    Files,
    FileWrite,
    FileWritten,
    Message,
    Ping,
    Pong,
    Scan,
    Status,
    StatusRequest,
    unpack_i64,
    unpack_u32,
)

DATA = cold_file()
INDEX = read_index(DATA)


class Group:
    """Three cold nodes and a client."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.network = MemoryNetwork()
        self.client = self.network.carrier("client")
        self.nodes: list[ColdService] = []

    async def start(self) -> None:
        for replica in range(3):
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
            )
            await node.start()
            self.network.register(name, node.handle)
            self.nodes.append(node)

    async def call(self, replica: int, message: Message) -> Message:
        return await self.client.call(f"cold-0-{replica}", message, 10.0)

    async def write(self, file: str, data: bytes) -> None:
        for replica in range(3):
            answer = await self.call(replica, FileWrite(file, 1, 0, data, True, checksum(data)))
            assert answer == FileWritten(len(data), checksum(data))

    def path(self, replica: int, file: str = "a.arrow") -> Path:
        return self.folder / f"cold-0-{replica}" / "disk-1" / file


def run(folder: Path, test: Callable[[Group], Awaitable[None]]) -> None:
    async def body() -> None:
        group = Group(folder)
        await group.start()
        try:
            await asyncio.wait_for(test(group), 60)
        finally:
            for node in group.nodes:
                await node.stop()

    asyncio.run(body())


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition, ten seconds at most."""
    deadline = asyncio.get_running_loop().time() + 10
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, "the condition was not met in time"
        await asyncio.sleep(0.005)


def block_read(at: int = 0) -> BlockRead:
    entry = INDEX.blocks[at]
    return BlockRead("a.arrow", entry.offset, entry.length, entry.crc)


def part_read(owner: bytes, at: int = 0) -> BlockRead:
    entry = INDEX.blocks[at]
    return BlockRead("a.arrow", entry.offset, entry.length, entry.crc, owner, FORMAT)


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 16
    path.write_bytes(data)


def test_files_are_written_listed_described_and_removed(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        await group.write("a.arrow", DATA)
        await group.write("b.arrow", DATA)
        listed = await group.call(0, FileList(""))
        assert isinstance(listed, Files)
        assert (listed.names, unpack_i64(listed.sizes), listed.more) == (["a.arrow", "b.arrow"], [len(DATA)] * 2, False)
        facts = await group.call(1, FileInfo("a.arrow"))
        assert isinstance(facts, FileFacts)
        assert (facts.size, facts.disk, facts.table, unpack_u32(facts.buckets), facts.blocks) == (
            len(DATA),
            1,
            b"t",
            [1],
            len(INDEX.blocks),
        )
        piece = await group.call(1, FileRead("a.arrow", 8, 100))
        assert piece == FilePiece(len(DATA), 1, checksum(DATA[8:108]), DATA[8:108])
        for entry in INDEX.blocks:
            answer = await group.call(2, BlockRead("a.arrow", entry.offset, entry.length, entry.crc))
            assert answer == BlockBytes(DATA[entry.offset : entry.offset + entry.length])
        assert await group.call(0, FileRemove(["a.arrow", "never"])) == Pong()
        listed = await group.call(0, FileList(""))
        assert isinstance(listed, Files)
        assert listed.names == ["b.arrow"]
        assert await group.call(0, Ping()) == Pong()
        status = await group.call(2, StatusRequest())
        assert isinstance(status, Status)
        seen = json.loads(status.body)
        assert (seen["state"], seen["files"], seen["bytes"]) == ("serving", 2, 2 * len(DATA))
        assert (seen["reads"], seen["crc_failures"], seen["repair_queue"]) == (len(INDEX.blocks), 0, 0)

    run(tmp_path, body)


def test_the_three_copies_are_byte_identical_and_on_the_same_disk(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        await group.write("a.arrow", DATA)
        assert [group.path(replica).read_bytes() for replica in range(3)] == [DATA] * 3

    run(tmp_path, body)


def test_a_flipped_bit_is_noticed_and_restored_from_a_peer(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        await group.write("a.arrow", DATA)
        entry = INDEX.blocks[2]
        flip(group.path(0), entry.offset + entry.length // 2)
        answer = await group.call(0, block_read(2))
        assert isinstance(answer, Failure)
        assert (answer.kind, answer.fields["reason"]) == ("Corrupt", "checksum")
        await until(lambda: group.nodes[0].counters.totals.get("blocks_repaired") == 1)
        assert group.path(0).read_bytes() == DATA
        assert isinstance(await group.call(0, block_read(2)), BlockBytes)
        totals = group.nodes[0].counters.totals
        assert (totals["crc_failures"], totals["blocks_repaired"]) == (1, 1)
        assert group.nodes[0].status()["repair_queue"] == 0

    run(tmp_path, body)


def test_repair_never_takes_damaged_bytes_of_a_peer(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        await group.write("a.arrow", DATA)
        at = INDEX.blocks[0].offset + 9
        flip(group.path(0), at)
        flip(group.path(1), at)
        assert isinstance(await group.call(0, block_read()), Failure)
        await until(lambda: group.nodes[0].counters.totals.get("blocks_repaired") == 1)
        assert group.path(0).read_bytes() == DATA
        assert group.path(1).read_bytes() != DATA
        assert group.nodes[1].counters.totals.get("crc_failures", 0) == 0

    run(tmp_path, body)


@pytest.mark.parametrize("fault", ["missing", "truncated"])
def test_a_missing_or_truncated_file_is_copied_whole(
    tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mending_module, "_RUN_BYTES", 1_000)

    async def body(group: Group) -> None:
        await group.write("a.arrow", DATA)
        if fault == "missing":
            group.path(0).unlink()
        else:
            group.path(0).write_bytes(DATA[: INDEX.blocks[1].offset])
        answer = await group.call(0, block_read(3))
        assert isinstance(answer, Failure)
        assert answer.fields["reason"] == ("missing" if fault == "missing" else "short")
        await until(lambda: group.nodes[0].counters.totals.get("files_repaired") == 1)
        assert group.path(0).read_bytes() == DATA
        assert isinstance(await group.call(0, block_read(3)), BlockBytes)

    run(tmp_path, body)


def test_a_node_that_lost_its_disk_gets_a_file_back_when_it_is_read(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        await group.write("a.arrow", DATA)
        await group.call(0, FileRemove(["a.arrow"]))  # unlike the others: as if the disk had been replaced
        assert isinstance(await group.call(0, block_read()), Failure)
        await until(lambda: group.nodes[0].counters.totals.get("files_repaired") == 1)
        assert group.path(0).read_bytes() == DATA

    run(tmp_path, body)


def test_a_reader_of_one_owner_gets_its_rows_alone_from_one_read_of_the_block(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        await group.write("a.arrow", DATA)
        entry = INDEX.blocks[0]
        whole = decode_block(DATA[entry.offset : entry.offset + entry.length])
        owners = sorted(set(whole.all_rows().owners))
        answers = await asyncio.gather(*[group.call(0, part_read(owner)) for owner in [*owners, b"nobody"]])
        for owner, answer in zip([*owners, b"nobody"], answers, strict=True):
            assert isinstance(answer, BlockBytes) and answer.part and answer.crc == checksum(answer.data)
            assert decode_block(answer.data).rows_of(owner) == whole.rows_of(owner)
        assert group.nodes[0].counters.totals["block_read_bytes"] == entry.length, "they shared one read"
        await group.call(0, part_read(owners[0]))
        assert group.nodes[0].counters.totals["block_read_bytes"] == entry.length, "it is in memory by now"

    run(tmp_path, body)


def test_a_damaged_block_is_refused_and_restored_for_a_reader_of_one_owner_too(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        await group.write("a.arrow", DATA)
        entry = INDEX.blocks[1]
        owner = decode_block(DATA[entry.offset : entry.offset + entry.length]).all_rows().owners[0]
        flip(group.path(0), entry.offset + entry.length // 2)
        answers = await asyncio.gather(*[group.call(0, part_read(owner, 1)) for _ in range(3)])
        assert {answer.kind for answer in answers if isinstance(answer, Failure)} == {"Corrupt"}
        assert len([answer for answer in answers if isinstance(answer, Failure)]) == 3
        await until(lambda: group.nodes[0].counters.totals.get("blocks_repaired") == 1)
        assert group.path(0).read_bytes() == DATA
        assert isinstance(await group.call(0, part_read(owner, 1)), BlockBytes)

    run(tmp_path, body)


def test_a_repair_of_a_file_that_no_replica_has_is_dropped_and_counted(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        assert isinstance(await group.call(0, block_read()), Failure)
        await until(lambda: group.nodes[0].counters.totals.get("repairs_gone") == 1)
        assert group.nodes[0].status()["repair_queue"] == 0
        assert all(node.counters.totals.get("crc_failures", 0) == 0 for node in group.nodes[1:])

    run(tmp_path, body)


def test_a_full_repair_queue_drops_and_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repairs_module, "MAX_REPAIRS", 3)

    async def body(group: Group) -> None:
        group.network.cut("cold-0-0", "cold-0-1")
        group.network.cut("cold-0-0", "cold-0-2")
        for number in range(8):
            await group.call(0, BlockRead(f"f{number}", 0, 10, 0))
            await group.call(0, BlockRead(f"f{number}", 0, 10, 0))
        assert group.nodes[0].counters.totals["repairs_dropped"] >= 5
        assert group.nodes[0].status()["repair_queue"] <= 3

    run(tmp_path, body)


def test_reads_beyond_the_queue_are_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "MAX_QUEUED_READS", 2)

    async def body(group: Group) -> None:
        await group.write("a.arrow", DATA)
        answers = await asyncio.gather(*[group.call(0, block_read()) for _ in range(20)])
        refused = [answer for answer in answers if isinstance(answer, Failure)]
        assert {answer.kind for answer in refused} == {"Unavailable"}
        assert sum(isinstance(answer, BlockBytes) for answer in answers) >= 2
        assert isinstance(await group.call(0, block_read()), BlockBytes)

    run(tmp_path, body)


def test_a_message_for_another_tier_is_refused(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        answer = await group.call(0, Scan(0, b"t", 0, 0, b"", 1))
        assert isinstance(answer, Failure)
        assert (answer.kind, "cold node" in answer.message) == ("InvalidRequest", True)
        answer = await group.call(0, FileRemove(["../../etc"]))
        assert isinstance(answer, Failure)
        assert answer.kind == "InvalidRequest"

    run(tmp_path, body)


def test_a_node_whose_folder_is_unusable_starts_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "node").write_text("a file, where a folder should be")

    async def body() -> None:
        carrier = MemoryNetwork().carrier("cold-0-0")
        node = ColdService(
            "cold-0-0",
            0,
            0,
            tmp_path / "node",
            topology(),
            carrier,
            disks=1,
            read_threads=1,
            counters=Counters(),
        )
        await node.start()
        status = node.status()
        assert status["state"] == "refused"
        assert str(tmp_path / "node") in status["reason"]
        with pytest.raises(Unavailable, match="does not serve"):
            await node.handle(block_read())
        await node.stop()

    asyncio.run(body())
