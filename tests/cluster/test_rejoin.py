"""A replica that lost its data, or holds an old copy of it, comes back by copying from its peers."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from storage_cluster import BUCKETS, StorageCluster, wait_for
from timetier.cluster.config import StorageConfig
from timetier.cluster.keys import item_key, timeline_key
from timetier.cluster.messages import (
    OK,
    PUT,
    AskDigests,
    Digests,
    Write,
    Written,
    pack_i64,
    pack_u32,
    unpack_i64,
)
from timetier.cluster.storage.life_cycle import REOPEN_S
from timetier.cluster.storage.service import StorageService

CONFIG = StorageConfig(
    engine_cache_mb=8,
    engine_write_buffer_mb=4,
    catch_up_interval_s=0.2,
    log_keep_entries=16,
    request_id_entries=8,
)
OWNERS = [timeline_key(b"t", f"owner-{number}".encode(), BUCKETS) for number in range(40)]
LOST = 2


def rid(number: int) -> bytes:
    return number.to_bytes(16, "big")


class Writer:
    """Writes an item to each timeline in turn, and remembers what was acknowledged."""

    def __init__(self, cluster: StorageCluster) -> None:
        self.cluster = cluster
        self.written = 0
        self.versions: dict[bytes, int] = {}

    async def write(self, number: int, rounds: int) -> None:
        """`rounds` batches, each with one item for every timeline."""
        for _ in range(rounds):
            numbers = range(self.written, self.written + len(OWNERS))
            self.written += len(OWNERS)
            message = Write(
                1,
                OWNERS,
                [rid(n) for n in numbers],
                pack_i64([self.versions.get(owner, 0) for owner in OWNERS]),
                pack_i64([-1] * len(OWNERS)),
                pack_u32([1] * len(OWNERS)),
                bytes((PUT,)) * len(OWNERS),
                [item_key(n) for n in numbers],
                [b"value %d" % n for n in numbers],
                20_000,
            )
            answer = await self.cluster.client.call(f"storage-0-{number}", message, 20.0)
            assert isinstance(answer, Written), answer
            assert set(answer.outcomes) == {OK}
            self.versions = dict(zip(OWNERS, unpack_i64(answer.versions), strict=True))

    async def write_until(self, number: int, done: Callable[[], bool]) -> None:
        while not done():
            await self.write(number, 1)
            await asyncio.sleep(0.02)


async def digests(cluster: StorageCluster, number: int) -> dict[bytes, tuple[int, bytes]]:
    answer = await cluster.client.call(f"storage-0-{number}", AskDigests(0, b"", OWNERS, pack_i64([-1] * 40)), 5.0)
    assert isinstance(answer, Digests), answer
    versions = unpack_i64(answer.versions)
    return {owner: (versions[i], answer.digests[16 * i : 16 * i + 16]) for i, owner in enumerate(answer.timelines)}


async def all_are_equal(cluster: StorageCluster) -> None:
    deadline = asyncio.get_running_loop().time() + 15
    while True:
        found = [await digests(cluster, number) for number in range(3)]
        if found[0] == found[1] == found[2]:
            return
        assert asyncio.get_running_loop().time() < deadline, "the replicas do not become equal"
        await asyncio.sleep(0.1)


def state(service: StorageService) -> str:
    return str(service.status()["state"])


async def rejoins(cluster: StorageCluster, writer: Writer, *, incarnation: int) -> StorageService:
    """Start the replica that lost its data while writes go on; it must end up voting, with everything."""
    service = await cluster.start(LOST, may_format=False, may_learn=True)
    await writer.write_until(0, lambda: state(service) == "voting")
    assert service.status()["incarnation"] == incarnation
    await all_are_equal(cluster)
    # It counts: with one of the two others away, the group goes on.
    await cluster.stop(0)
    await writer.write(1, 1)
    await cluster.start(0)
    await cluster.ready()
    await all_are_equal(cluster)
    return service


def test_a_wiped_replica_copies_everything_from_its_peers_and_votes_again(tmp_path: Path) -> None:
    async def run() -> None:
        async with StorageCluster(tmp_path, CONFIG) as cluster:
            writer = Writer(cluster)
            await writer.write(0, 30)
            await cluster.stop(LOST)
            shutil.rmtree(tmp_path / f"storage-0-{LOST}")
            await writer.write(0, 3)
            service = await rejoins(cluster, writer, incarnation=2)
            assert "rejoin" not in service.status()
            await cluster.stop(LOST)
            shutil.rmtree(tmp_path / f"storage-0-{LOST}")
            await rejoins(cluster, writer, incarnation=3)
            assert [p.name for p in (tmp_path / f"storage-0-{LOST}").glob("engine*")] == ["engine-3"]

    asyncio.run(run())


@pytest.mark.parametrize("further_starts", [0, 1, 3])
def test_an_old_folder_put_back_is_found_out_and_replaced(tmp_path: Path, further_starts: int) -> None:
    """Also when the copy is started as often as its original was, so that the boot numbers agree."""

    async def run() -> None:
        async with StorageCluster(tmp_path, CONFIG) as cluster:
            writer = Writer(cluster)
            folder = tmp_path / f"storage-0-{LOST}"
            await writer.write(0, 2)
            await cluster.stop(LOST)
            shutil.copytree(folder, tmp_path / "old")
            for _ in range(1 + further_starts):
                await cluster.start(LOST)
                await cluster.ready()
                await writer.write(LOST, 2)
                await cluster.stop(LOST)
            shutil.rmtree(folder)
            shutil.move(tmp_path / "old", folder)
            await rejoins(cluster, writer, incarnation=2)

    asyncio.run(run())


@pytest.mark.parametrize("kind", ["log", "sst"])
def test_a_damaged_database_is_noticed_and_everything_is_copied(tmp_path: Path, kind: str) -> None:
    async def run() -> None:
        async with StorageCluster(tmp_path, CONFIG) as cluster:
            writer = Writer(cluster)
            await writer.write(0, 8)
            folder = tmp_path / f"storage-0-{LOST}"
            shutil.copytree(folder, tmp_path / "killed")  # as kill -9 would leave it: closing empties the log
            await cluster.stop(LOST)
            if kind == "log":
                shutil.rmtree(folder)
                shutil.move(tmp_path / "killed", folder)
            files = [path for path in (folder / "engine").glob(f"*.{kind}") if path.stat().st_size > 1000]
            assert files
            for path in files:
                content = bytearray(path.read_bytes())
                content[len(content) // 3] ^= 0x10
                path.write_bytes(content)
            await rejoins(cluster, writer, incarnation=2)

    asyncio.run(run())


def test_a_learner_is_in_no_quorum_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    async def run() -> None:
        slow = CONFIG.model_copy(update={"rejoin_mb_per_s": 1})
        async with StorageCluster(tmp_path, slow) as cluster:
            writer = Writer(cluster)
            await writer.write(0, 20)
            await cluster.stop(LOST)
            shutil.rmtree(tmp_path / f"storage-0-{LOST}")
            cluster.network.cut("storage-0-2", "storage-0-1")
            service = await cluster.start(LOST, may_format=False, may_learn=True)
            await wait_for(lambda: "storage-0-1" in service.status()["rejoin"]["reason"], "one peer is not enough")
            assert state(service) == "learning"
            cluster.network.heal()
            await wait_for(
                lambda: state(service) == "learning" and service.status()["incarnation"] == 2, "its new life"
            )
            await cluster.stop(LOST)
            writer.cluster = cluster
            again = await cluster.start(LOST)
            await wait_for(lambda: state(again) == "voting", "the second life of the learner")
            assert again.status()["incarnation"] == 2
            assert again.status()["boot"] == 2
            await all_are_equal(cluster)

    asyncio.run(run())


def waits_for_votes(service: StorageService) -> bool:
    return "to vote" in service.status()["reason"]


def test_two_replicas_that_lost_their_data_do_not_vote(tmp_path: Path) -> None:
    async def run() -> None:
        async with StorageCluster(tmp_path, CONFIG) as cluster:
            await Writer(cluster).write(0, 1)
            for number in (1, 2):
                await cluster.stop(number)
                shutil.rmtree(tmp_path / f"storage-0-{number}")
            services = [await cluster.start(number, may_format=False, may_learn=True) for number in (1, 2)]
            for service in services:
                await wait_for(partial(waits_for_votes, service), "it waits for the other")
            await asyncio.sleep(2 * REOPEN_S)
            for service in services:
                status = service.status()
                assert status["state"] == "learning"
                assert status["incarnation"] == 0

    asyncio.run(run())
