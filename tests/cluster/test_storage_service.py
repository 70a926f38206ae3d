"""Storage nodes over real RocksDB folders: group commit, restarts, refused folders, failing disks."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest
from read_answers import keys_of, values_of
from storage_cluster import BUCKETS, StorageCluster, wait_for
from timetier.cluster.cold.link import FENCE_KEY
from timetier.cluster.errors import Corrupt
from timetier.cluster.identity import Refused
from timetier.cluster.keys import item_key, priority, system_timeline, timeline_key
from timetier.cluster.messages import (
    NO_BALLOT,
    OK,
    PUT,
    Accept,
    AskChosen,
    AskVersions,
    Check,
    Checked,
    Chosen,
    Failure,
    Message,
    Pages,
    PeerBatch,
    PeerMessage,
    Prepare,
    ReadPages,
    Scan,
    Settle,
    Value,
    Write,
    pack_i64,
    pack_u32,
    unpack_i64,
)
from timetier.cluster.storage.engine import EngineFailed, RocksEngine

ALICE = timeline_key(b"t", b"alice", BUCKETS)
FIRST, SECOND, THIRD = priority(ALICE, 3)


def rid(number: int) -> bytes:
    return number.to_bytes(16, "big")


async def items_of(cluster: StorageCluster, number: int, limit: int = 1000) -> dict[bytes, bytes]:
    message = Check([ALICE], pack_i64([-1]), b"\x01", [b""], pack_u32([limit]))
    answer = await cluster.client.call(f"storage-0-{number}", message, 5.0)
    assert isinstance(answer, Checked), answer
    return {k: v for kind, k, v in zip(answer.kinds, answer.keys, answer.values, strict=True) if kind == PUT}


def test_concurrent_writes_share_fsyncs(tmp_path: Path) -> None:
    async def run() -> None:
        async with StorageCluster(tmp_path) as cluster:
            before = cluster.services[FIRST].counters.totals.get("fsyncs", 0)
            timelines = [timeline_key(b"t", b"owner%d" % n, BUCKETS) for n in range(500)]
            mine = [t for t in timelines if priority(t, 3)[0] == FIRST]
            writes = [cluster.put(FIRST, t, rid(n), [(item_key(n), b"x")]) for n, t in enumerate(mine)]
            assert all(outcome == OK for outcome, _ in await asyncio.gather(*writes))
            assert cluster.services[FIRST].counters.totals["fsyncs"] - before < len(mine) / 4

    asyncio.run(run())


def test_a_restarted_group_has_everything_that_was_acknowledged(tmp_path: Path) -> None:
    async def run() -> None:
        async with StorageCluster(tmp_path) as cluster:
            for number in range(30):
                assert (await cluster.put(FIRST, ALICE, rid(number), [(item_key(number), b"%d" % number)]))[0] == OK
        async with StorageCluster(tmp_path) as cluster:
            assert (await cluster.put(SECOND, ALICE, rid(99), [(item_key(99), b"99")], seen=30)) == (OK, 31)
            expected = {item_key(n): b"%d" % n for n in [*range(30), 99]}
            assert await items_of(cluster, SECOND) == expected

    asyncio.run(run())


def test_a_replica_that_was_away_catches_up_without_being_asked(tmp_path: Path) -> None:
    async def run() -> None:
        async with StorageCluster(tmp_path) as cluster:
            await cluster.stop(THIRD)
            for number in range(20):
                assert (await cluster.put(FIRST, ALICE, rid(number), [(item_key(number), b"x")], seen=number))[0] == OK
            service = await cluster.start(THIRD)
            replica = service._life.replica
            assert replica is not None
            await wait_for(lambda: replica.core.timeline(ALICE).chosen == 20, "the replica to catch up")
            assert len(await items_of(cluster, THIRD)) == 20

    asyncio.run(run())


def test_a_lost_data_folder_is_refused_unless_it_may_be_copied_from_the_peers(tmp_path: Path) -> None:
    async def run() -> None:
        async with StorageCluster(tmp_path) as cluster:
            await cluster.put(FIRST, ALICE, rid(1), [(item_key(1), b"x")])
            await cluster.stop(THIRD)
            shutil.move(tmp_path / f"storage-0-{THIRD}", tmp_path / "away")
            with pytest.raises(Refused, match="must not vote"):
                await cluster.start(THIRD, may_format=False)
            shutil.rmtree(tmp_path / f"storage-0-{THIRD}", ignore_errors=True)
            shutil.move(tmp_path / "away", tmp_path / f"storage-0-{THIRD}")
            shutil.rmtree(tmp_path / f"storage-0-{THIRD}" / "engine")
            cluster.config = cluster.config.model_copy(update={"rejoin": False})
            with pytest.raises(Corrupt, match="formatted before"):
                await cluster.start(THIRD)
            assert (await cluster.put(FIRST, ALICE, rid(2), [(item_key(2), b"x")], seen=1))[0] == OK

    asyncio.run(run())


def test_another_replicas_database_is_refused(tmp_path: Path) -> None:
    async def run() -> None:
        async with StorageCluster(tmp_path) as cluster:
            await cluster.stop(SECOND)
            await cluster.stop(THIRD)
            shutil.rmtree(tmp_path / f"storage-0-{THIRD}" / "engine")
            shutil.copytree(tmp_path / f"storage-0-{SECOND}" / "engine", tmp_path / f"storage-0-{THIRD}" / "engine")
            with pytest.raises(Refused, match="holds the database of"):
                await cluster.start(THIRD)

    asyncio.run(run())


def test_a_failing_disk_ends_the_life_and_the_next_one_serves_again(tmp_path: Path) -> None:
    async def run() -> None:
        async with StorageCluster(tmp_path) as cluster:
            assert (await cluster.put(FIRST, ALICE, rid(1), [(item_key(1), b"x")]))[0] == OK
            service = cluster.services[FIRST]
            engine = service._life.engine
            assert engine is not None

            def refuse() -> None:
                raise EngineFailed("no space left on device")

            engine.sync = refuse  # type: ignore[method-assign]
            answer = asyncio.create_task(cluster.put(FIRST, ALICE, rid(2), [(item_key(2), b"x")], seen=1))
            await wait_for(lambda: service.status()["state"] == "failed", "the life to end")
            with pytest.raises(AssertionError, match="OutcomeUnknown"):
                await answer
            question = ReadPages(1, [ALICE], [b""], pack_u32([1]), 500)
            refused = await cluster.client.call(f"storage-0-{FIRST}", question, 2.0)
            assert isinstance(refused, Failure)
            assert (await cluster.put(SECOND, ALICE, rid(3), [(item_key(3), b"x")], seen=1))[0] == OK
            await wait_for(lambda: service.status()["state"] == "voting", "the next life")
            assert service.status()["boot"] == 2
            assert (await cluster.put(FIRST, ALICE, rid(4), [(item_key(4), b"x")], seen=2))[0] == OK
            assert item_key(1) in await items_of(cluster, FIRST)

    asyncio.run(run())


def test_storage_nodes_answer_reads_when_there_is_no_cache_node(tmp_path: Path) -> None:
    async def run() -> None:
        async with StorageCluster(tmp_path) as cluster:
            for number in range(5):
                await cluster.put(FIRST, ALICE, rid(number), [(item_key(number), b"%d" % number)], seen=number)
            for number in range(3):
                message = ReadPages(1, [ALICE], [b""], pack_u32([3]), 2000)
                answer = await cluster.client.call(f"storage-0-{number}", message, 5.0)
                assert isinstance(answer, Pages), answer
                assert [values_of(page) for page in answer.items] == [[b"2", b"3", b"4"]]
                assert unpack_i64(answer.timeline_versions) == [5]

    asyncio.run(run())


def test_a_fence_in_a_system_timeline_is_no_link(tmp_path: Path) -> None:
    async def run() -> None:
        async with StorageCluster(tmp_path) as cluster:
            outcome, _ = await cluster.put(0, system_timeline(5), rid(1), [(FENCE_KEY, b"run-1")])
            assert outcome == OK
            await wait_for(
                lambda: all(s.status()["chores"] == 0 for s in cluster.services.values()), "the chores to end"
            )

    asyncio.run(run())


def test_malformed_requests_are_refused_and_end_no_life(tmp_path: Path) -> None:
    bad_key = ALICE[:-1]
    life = (SECOND, 1, 1)
    requests: list[Message] = [
        Settle([bad_key], pack_i64([1]), 100),
        Settle([ALICE], b"odd", 100),
        AskVersions([bad_key]),
        Check([ALICE], pack_i64([-1]), b"", [b""], pack_u32([1])),
        Check([ALICE], pack_i64([-1]), b"\x03", [b"x"], pack_u32([1])),
        Check([bad_key], pack_i64([-1]), b"\x00", [b""], pack_u32([1])),
        Scan(0, b"t" * 300, 0, 0, b"", 1),
        Scan(-1, b"t", 1 << 62, 1 << 62, b"\xff" * 40, 1),
        AskChosen(-5, b"\xff"),
        Write(1, [bad_key], [rid(1)], pack_i64([0]), b"short", pack_u32([1]), b"\x00", [item_key(1)], [b"x"], 10),
    ]
    peers: list[list[PeerMessage]] = [
        [Prepare(bad_key, 1, (1, life))],
        [Chosen(ALICE, 2, NO_BALLOT)],
        [Accept(ALICE, 2, (1, life), NO_BALLOT, Value(life, 0, [], b"\x00", [], []))],
    ]

    async def run() -> None:
        async with StorageCluster(tmp_path) as cluster:
            assert (await cluster.put(FIRST, ALICE, rid(1), [(item_key(1), b"x")]))[0] == OK
            service = cluster.services[FIRST]
            for request in requests:
                answer = await cluster.client.call(f"storage-0-{FIRST}", request, 5.0)
                assert not isinstance(answer, Checked) or not answer.keys, answer
            for messages in peers:
                boot = service._identity.life_number
                sender = cluster.services[life[0]]._identity.life_number
                await service.handle(PeerBatch((life[0], 1, sender), 1, boot, messages))
            assert (await cluster.put(FIRST, ALICE, rid(2), [(item_key(2), b"x")], seen=1)) == (OK, 2)
            assert service.status()["boot"] == 1
            assert "lives_ended_by_errors" not in service.counters.totals

    asyncio.run(run())


def test_an_error_in_the_middle_of_a_step_ends_the_life_and_nothing_acknowledged_is_lost(tmp_path: Path) -> None:
    """Memory may be ahead of the engine then, so the next life begins with what the disk has."""

    async def run() -> None:
        async with StorageCluster(tmp_path) as cluster:
            assert (await cluster.put(FIRST, ALICE, rid(1), [(item_key(1), b"x")]))[0] == OK
            service = cluster.services[FIRST]
            replica = service._life.replica
            assert replica is not None

            def fail(*_: object) -> None:
                raise ValueError("in the middle")

            replica.proposer.proposed = fail  # type: ignore[method-assign, assignment]
            with pytest.raises(AssertionError, match="OutcomeUnknown"):
                await cluster.put(FIRST, ALICE, rid(2), [(item_key(2), b"x")], seen=1)
            await wait_for(lambda: service.status()["state"] == "voting", "the next life")
            assert service.status()["boot"] == 2
            assert (await cluster.put(FIRST, ALICE, rid(3), [(item_key(3), b"x")], seen=1)) == (OK, 2)
            assert set(await items_of(cluster, FIRST)) == {item_key(1), item_key(3)}

    asyncio.run(run())


def test_on_a_nearly_full_disk_writes_are_refused_reads_go_on_and_writes_come_back(tmp_path: Path) -> None:
    async def run() -> None:
        async with StorageCluster(tmp_path) as cluster:
            assert (await cluster.put(FIRST, ALICE, rid(1), [(item_key(1), b"x")]))[0] == OK
            reserves = {number: service._disk.reserve_bytes for number, service in cluster.services.items()}
            for number in (FIRST, THIRD):  # as if their disks had less room than the reserve
                cluster.services[number]._disk.reserve_bytes = 1 << 62
            await wait_for(
                lambda: all("no writes" in cluster.services[n].status()["reason"] for n in (FIRST, THIRD)),
                "the nodes to notice",
            )
            with pytest.raises(AssertionError, match="disk_reserve_mb"):
                await cluster.put(FIRST, ALICE, rid(2), [(item_key(2), b"x")], seen=1)
            assert await items_of(cluster, FIRST) == {item_key(1): b"x"}
            await wait_for(lambda: len(cluster.services[SECOND]._disk._full_peers) == 2, "the third to be told")
            with pytest.raises(AssertionError, match=r"disks of replicas .* are full"):
                await cluster.put(SECOND, ALICE, rid(2), [(item_key(2), b"x")], seen=1)
            for number, reserve in reserves.items():
                cluster.services[number]._disk.reserve_bytes = reserve
            await wait_for(lambda: not cluster.services[FIRST].status()["reason"], "room to be noticed")
            await wait_for(lambda: not cluster.services[THIRD].status()["reason"], "room to be noticed")
            await wait_for(lambda: not cluster.services[SECOND]._disk._full_peers, "the third to be told")
            assert (await cluster.put(SECOND, ALICE, rid(2), [(item_key(2), b"x")], seen=1)) == (OK, 2)
            assert (await cluster.put(FIRST, ALICE, rid(3), [(item_key(3), b"x")], seen=2)) == (OK, 3)

    asyncio.run(run())


def test_an_engine_that_does_not_even_close_is_let_go_and_the_next_life_opens_it(tmp_path: Path) -> None:
    """On a full disk closing fails as well; its lock must not stay."""

    async def run() -> None:
        async with StorageCluster(tmp_path) as cluster:
            assert (await cluster.put(FIRST, ALICE, rid(1), [(item_key(1), b"x")]))[0] == OK
            service = cluster.services[FIRST]
            engine = service._life.engine
            assert isinstance(engine, RocksEngine)

            class Stuck:
                """The database, with a `close` that fails."""

                def __init__(self, database: object) -> None:
                    self.database = database

                def close(self) -> None:
                    raise OSError("no space left on device")

            engine._db = Stuck(engine._db)  # type: ignore[assignment]
            service._life.break_off(EngineFailed("no space left on device"))
            del engine
            await wait_for(lambda: service.status()["state"] == "voting", "the next life")
            question = ReadPages(1, [ALICE], [b""], pack_u32([1]), 3000)
            answer = await cluster.client.call(f"storage-0-{FIRST}", question, 5.0)
            assert isinstance(answer, Pages), answer
            assert [keys_of(page) for page in answer.items] == [[item_key(1)]]

    asyncio.run(run())


@pytest.mark.parametrize("step", ["sync", "scan"])
def test_a_life_that_fails_to_begin_keeps_no_later_one_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """The disk fails once more while the engine is opened again, before or within the replica's own beginning."""

    async def run() -> None:
        async with StorageCluster(tmp_path) as cluster:
            assert (await cluster.put(FIRST, ALICE, rid(1), [(item_key(1), b"x")]))[0] == OK
            service = cluster.services[FIRST]
            real = getattr(RocksEngine, step)
            failures = 0

            def fail_twice(engine: RocksEngine, *arguments: object, **more: object) -> object:
                nonlocal failures
                if service.status()["state"] == "failed" and failures < 2 and service.name in str(engine.folder):
                    failures += 1
                    raise EngineFailed("no space left on device")
                return real(engine, *arguments, **more)

            monkeypatch.setattr(RocksEngine, step, fail_twice)
            service._life.break_off(EngineFailed("no space left on device"))
            await wait_for(lambda: service.status()["state"] == "voting", "a life that begins")
            assert failures == 2
            assert service.status()["boot"] == 4
            assert (await cluster.put(FIRST, ALICE, rid(2), [(item_key(2), b"x")], seen=1))[0] == OK

    asyncio.run(run())
