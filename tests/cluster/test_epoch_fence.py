"""The fencing token of cold nodes: whoever comes with an epoch that is past is refused, also after a restart."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest
from cold_model import topology
from timetier.cluster.carriers.memory import MemoryNetwork
from timetier.cluster.cold.block import checksum
from timetier.cluster.cold.fencing import EPOCH_FILE, EpochFence
from timetier.cluster.cold.files import SystemFiles
from timetier.cluster.cold.service import ColdService
from timetier.cluster.counters import Counters
from timetier.cluster.errors import Unavailable, VersionConflict
from timetier.cluster.messages import FileList, FileRemove, Files, FileWrite, FileWritten, Message, Pong


def admit(fence: EpochFence, epoch: int) -> None:
    with fence.admitted(epoch):
        pass


def test_a_lower_epoch_than_one_that_was_heard_of_is_refused_for_ever(tmp_path: Path) -> None:
    fence = EpochFence(SystemFiles(), tmp_path)
    assert fence.epoch == 0
    for epoch in (3, 3, 5, 0):
        admit(fence, epoch)
    again = EpochFence(SystemFiles(), tmp_path)  # the process was started again
    for known in (fence, again):
        assert known.epoch == 5
        with pytest.raises(VersionConflict, match="a run of the sink with epoch 5 has begun, this is 4") as conflict:
            admit(known, 4)
        assert conflict.value.version == 5
        admit(known, 0)  # repair and tools belong to no run


@pytest.mark.parametrize("text", [b"", b"7", b"7 00000000", b"x y", b"\xff\xff"])
def test_a_damaged_epoch_counts_as_none_and_the_next_run_mends_it(tmp_path: Path, text: bytes) -> None:
    (tmp_path / EPOCH_FILE).write_bytes(text)
    fence = EpochFence(SystemFiles(), tmp_path)
    assert fence.epoch == 0
    admit(fence, 2)
    assert EpochFence(SystemFiles(), tmp_path).epoch == 2


def test_an_epoch_that_cannot_be_written_down_is_not_admitted(tmp_path: Path) -> None:
    class Broken(SystemFiles):
        broken = True

        def rename(self, source: Path, target: Path) -> None:
            if self.broken:
                raise OSError(5, "I/O error")
            super().rename(source, target)

    files = Broken()
    fence = EpochFence(files, tmp_path)
    with pytest.raises(Unavailable, match="epoch of the sink can't be written"):
        admit(fence, 1)
    assert fence.epoch == 0
    files.broken = False
    admit(fence, 1)
    assert fence.epoch == 1


def test_a_later_epoch_waits_for_the_work_of_earlier_ones(tmp_path: Path) -> None:
    fence = EpochFence(SystemFiles(), tmp_path)
    begun, release, order = threading.Event(), threading.Event(), []

    def early() -> None:
        with fence.admitted(1):
            begun.set()
            assert release.wait(10)
            order.append("early")

    def late() -> None:
        with fence.admitted(2):
            order.append("late")

    threads = [threading.Thread(target=early), threading.Thread(target=late)]
    threads[0].start()
    assert begun.wait(10)
    threads[1].start()
    release.set()
    for thread in threads:
        thread.join(10)
    assert order == ["early", "late"]


def test_a_cold_node_takes_and_removes_nothing_for_a_stale_run(tmp_path: Path) -> None:
    async def body() -> None:
        node = await started(tmp_path)

        async def refused(message: Message) -> None:
            with pytest.raises(VersionConflict, match="epoch 2 has begun, this is 1"):
                await node.handle(message)

        data = b"x" * 100
        first = FileWrite("a.arrow", 0, 0, data, False, 0, 1)
        assert await node.handle(first) == FileWritten(100, 0)
        assert await node.handle(FileRemove([], 2)) == Pong()  # the next run tells its epoch
        await refused(FileWrite("a.arrow", 0, 100, data, True, checksum(data + data), 1))
        written = await node.handle(FileWrite("b.arrow", 0, 0, data, True, checksum(data), 2))
        assert written == FileWritten(100, checksum(data))
        await refused(FileRemove(["b.arrow"], 1))
        await node.stop()
        node = await started(tmp_path)
        await refused(FileRemove(["b.arrow"], 1))
        listed = await node.handle(FileList(""))
        assert isinstance(listed, Files)
        assert listed.names == ["b.arrow"]
        assert await node.handle(FileRemove(["b.arrow"])) == Pong()
        await node.stop()

    asyncio.run(asyncio.wait_for(body(), 30))


async def started(folder: Path) -> ColdService:
    carrier = MemoryNetwork().carrier("cold-0-0")
    node = ColdService("cold-0-0", 0, 0, folder, topology(), carrier, disks=2, read_threads=1, counters=Counters())
    await node.start()
    return node
