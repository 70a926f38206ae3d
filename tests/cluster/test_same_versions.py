"""What a replica answers to "is it still at version v?" from its version cache, before and after what may happen."""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import struct
from pathlib import Path

import pytest
from replica_group import DIGEST_SEED, key_of
from scripted_group import (
    ALICE,
    BUCKET,
    FIRST,
    SECOND,
    SYSTEM,
    THIRD,
    Scripted,
    link_message,
    open_accept,
    rid,
    state_of,
)
from storage_cluster import StorageCluster, wait_for
from timetier.cluster.cold.link import RECORDS_AT
from timetier.cluster.errors import InvalidRequest, Unavailable
from timetier.cluster.identity import Identity
from timetier.cluster.keys import digest_seed, item_key, timeline_digest
from timetier.cluster.messages import (
    DELTA,
    NO_BALLOT,
    OK,
    PUT,
    AskSame,
    AskVersions,
    Check,
    Checked,
    Chosen,
    Failure,
    Prepare,
    Same,
    State,
    Value,
    Versions,
    Write,
    Written,
    pack_i64,
    pack_u32,
    unpack_i64,
    unpack_u32,
)
from timetier.cluster.paxos.core import Settings
from timetier.cluster.storage.version_home import PrivateVersions, SharedVersions, open_home

HORIZON_KEY = item_key(RECORDS_AT, b"horizon/t")


def question(*versions: int, timeline: bytes = ALICE, seed: int = DIGEST_SEED) -> AskSame:
    return AskSame(timeline_digest(timeline, seed) * len(versions), pack_i64(versions))


def is_same(group: Scripted, number: int, version: int) -> bool:
    """Whether a replica says at once that ALICE is at this version."""
    answer, after = group.replica(number).reads.same(question(version))
    assert after == 0, "what the cache says is durable"
    return not answer.others


def versions_of(group: Scripted, number: int) -> tuple[int, bool]:
    answer = group.call(number, AskVersions([ALICE]))
    assert isinstance(answer, Versions)
    return unpack_i64(answer.chosen)[0], bool(answer.opens)


def write_entries(group: Scripted, count: int) -> None:
    group.put_many(FIRST, 1, count)
    group.run(0.1)


# ---------------------------------------------------------------- what is open, behind or not durable


def test_only_the_very_version_is_the_same() -> None:
    group = Scripted(1)
    write_entries(group, 3)
    for number in range(3):
        answer = group.call(number, question(2, 3, 4, -1, 3, 0))
        assert isinstance(answer, Same)
        assert unpack_u32(answer.others) == [0, 2, 3, 5]
        assert answer.incarnations == [1, 1, 1]


def test_a_timeline_that_was_never_heard_of_is_told_by_key_and_then_by_digest() -> None:
    group = Scripted(2)
    assert not is_same(group, FIRST, 0)
    assert versions_of(group, FIRST) == (0, False)
    assert is_same(group, FIRST, 0)


def test_an_open_entry_makes_a_timeline_another_until_it_is_chosen_and_fsynced() -> None:
    group = Scripted(3)
    write_entries(group, 1)
    life = group.replica(SECOND).core.life
    ballot = (1, life)
    assert is_same(group, THIRD, 1)
    open_accept(group, THIRD, ballot, b"a")
    assert not is_same(group, THIRD, 1)
    group.members[THIRD].sync_at = None  # the disk takes its time
    group.inject(SECOND, THIRD, Chosen(ALICE, 2, ballot))
    group.members[THIRD].sync_at = None
    assert group.chosen(THIRD) == 2
    assert not is_same(group, THIRD, 1)
    assert not is_same(group, THIRD, 2), "it was chosen, but is not on this disk yet"
    group.replica(THIRD).durable(group.now, group.members[THIRD].engine.sync())
    assert is_same(group, THIRD, 2)


def test_a_promise_alone_leaves_the_version_as_it_is_once_it_is_on_disk() -> None:
    group = Scripted(4)
    write_entries(group, 2)
    group.inject(SECOND, THIRD, Prepare(ALICE, 3, (4, group.replica(SECOND).core.life)))
    group.run(0.1)
    assert is_same(group, THIRD, 2)


def test_what_a_learner_has_copied_as_accepted_is_another_version() -> None:
    group = Scripted(5)
    write_entries(group, 1)
    core, life = group.replica(THIRD).core, group.replica(SECOND).core.life
    value = Value(life, 0, [rid(9)], bytes((PUT,)), [item_key(9)], [b"x"])
    group.replica(THIRD).acceptor.learn(core.timeline(ALICE), (2, life), value)
    group.run(0.1)
    assert not is_same(group, THIRD, 1)


def test_a_state_that_is_installed_counts_when_it_is_on_disk() -> None:
    group = Scripted(6)
    write_entries(group, 2)
    group.inject(FIRST, THIRD, state_of(12))
    group.members[THIRD].sync_at = None
    assert not is_same(group, THIRD, 2)
    assert not is_same(group, THIRD, 12)
    group.replica(THIRD).durable(group.now, group.members[THIRD].engine.sync())
    assert is_same(group, THIRD, 12)


def test_a_timeline_that_is_mended_is_another_until_its_state_is_on_disk() -> None:
    group = Scripted(7)
    write_entries(group, 3)
    replica = group.replica(THIRD)
    replica.catch_up.mend(replica.core.timeline(ALICE), FIRST, group.now)
    replica.core.timeline(ALICE).asked_until = 0.0
    rows = [item_key(1) + (1).to_bytes(8, "big")]
    state = State(ALICE, 3, NO_BALLOT, (-1, 0, 0), 0, 0, [], b"", b"", rows, [bytes(9) + b"x"])
    group.inject(FIRST, THIRD, state)
    group.members[THIRD].sync_at = None
    assert not is_same(group, THIRD, 3)
    replica.durable(group.now, group.members[THIRD].engine.sync())
    assert is_same(group, THIRD, 3)


def test_what_has_left_memory_is_answered_without_coming_back() -> None:
    group = Scripted(8, Settings(timelines_in_memory=1))
    write_entries(group, 2)
    group.call(THIRD, AskVersions([SYSTEM]))
    group.run(0.1)
    core = group.replica(THIRD).core
    assert not core.holds(ALICE)
    assert is_same(group, THIRD, 2)
    assert versions_of(group, THIRD) == (2, False)
    assert not core.holds(ALICE)


def test_what_the_cache_has_lost_to_others_is_there_again_after_it_was_asked_for_by_key() -> None:
    group = Scripted(15)
    write_entries(group, 2)
    others = [key_of(f"owner-{number}") for number in range(200)]
    for start in range(0, 200, 50):
        group.call(THIRD, AskVersions(others[start : start + 50]))
    core = group.replica(THIRD).core
    assert core.holds(ALICE)
    assert not is_same(group, THIRD, 2), "its row is full of others"
    assert versions_of(group, THIRD) == (2, False)
    assert is_same(group, THIRD, 2)


def test_a_replica_that_does_not_vote_answers_nothing_and_columns_must_fit() -> None:
    group = Scripted(9)
    group.replica(FIRST).state = "joining"
    with pytest.raises(Unavailable):
        group.replica(FIRST).ask(group.now, 1, question(1))
    for message in (
        AskSame(bytes(16), b""),
        AskSame(bytes(15), bytes(8)),
        AskSame(bytes(16), bytes(7)),
        AskSame(b"", bytes(8)),
        AskSame(bytes(24), bytes(12)),
    ):
        with pytest.raises(InvalidRequest):
            group.replica(SECOND).ask(group.now, 1, message)
    assert isinstance(group.call(SECOND, AskSame(b"", b"")), Same)


# ---------------------------------------------------------------- lives


def test_the_next_life_knows_at_once_what_was_clean_and_that_it_was_chosen() -> None:
    """Its disk holds the last entry as accepted only: the note that it was chosen is lost with the process."""
    group = Scripted(10)
    write_entries(group, 5)
    engine = group.members[THIRD].engine
    group.crash(THIRD)
    for key in [key for key in engine._synced if key.startswith(b"M")]:
        del engine._synced[key]  # as if no mark had been written since
    engine.crash()
    group.start(THIRD)
    group.run_until(lambda: group.votes(THIRD))
    core = group.replica(THIRD).core
    assert core.versions.cache.warm
    assert not core.holds(ALICE)
    assert is_same(group, THIRD, 5)
    assert versions_of(group, THIRD) == (5, False)
    assert group.chosen(THIRD) == 5
    group.put_many(FIRST, 6, 8)
    group.run(0.1)
    assert is_same(group, THIRD, 8)


@pytest.mark.parametrize("kept", [0, 10])
def test_an_acceptance_that_was_acknowledged_or_lost_is_never_hidden_by_the_cache(kept: int) -> None:
    group = Scripted(11)
    write_entries(group, 1)
    group.run(1)  # until it is written down that entry 1 is chosen
    group.members[THIRD].engine.sync()
    ballot = (1, group.replica(SECOND).core.life)
    open_accept(group, THIRD, ballot, b"a")
    group.members[THIRD].engine.crash(keep=kept)
    group.members[THIRD].replica = None
    group.start(THIRD)
    group.run_until(lambda: group.votes(THIRD))
    assert not is_same(group, THIRD, 1)
    assert not is_same(group, THIRD, 2)
    assert versions_of(group, THIRD) == (1, bool(kept))
    assert is_same(group, THIRD, 1) == (not kept)


def test_an_old_folder_finds_nothing_in_the_memory_of_its_later_life() -> None:
    group = Scripted(12)
    write_entries(group, 2)
    group.crash(THIRD)
    boot = group.members[THIRD].boot
    for _ in range(2):
        group.start(THIRD)
        group.run_until(lambda: group.votes(THIRD))
        assert group.replica(THIRD).core.versions.cache.warm
        group.crash(THIRD)
    group.members[THIRD].boot = boot
    group.start(THIRD)
    assert group.replica(THIRD).core.versions.cache.warm == 0


# ---------------------------------------------------------------- horizons


def horizon_message(system_version: int, horizon: int) -> Write:
    return link_message(system_version, struct.pack("<q", horizon), HORIZON_KEY)


def mark_of(group: Scripted, number: int) -> int:
    answer = group.call(number, question(0))
    assert isinstance(answer, Same)
    check = group.call(number, Check([ALICE], pack_i64([-1]), bytes((DELTA,)), [b""], pack_u32([10])))
    assert isinstance(check, Checked)
    assert check.mark == answer.mark
    return answer.mark


def test_the_mark_changes_with_a_horizon_and_not_with_links_and_no_two_lives_have_one() -> None:
    group = Scripted(13)
    write_entries(group, 1)
    marks = [mark_of(group, number) for number in range(3)]
    assert len(set(marks)) == 3
    assert all(0 < mark < 1 << 63 for mark in marks)
    assert isinstance(group.call(FIRST, link_message(0)), Written)
    group.run(0.1)
    assert [mark_of(group, number) for number in range(3)] == marks
    written = group.call(FIRST, horizon_message(1, 50))
    assert isinstance(written, Written) and written.outcomes[0] == OK
    group.run(0.1)
    moved = [mark_of(group, number) for number in range(3)]
    assert len({*marks, *moved}) == 6
    group.crash(THIRD)
    group.start(THIRD)
    group.run_until(lambda: group.votes(THIRD))
    assert mark_of(group, THIRD) not in {*marks, *moved}


def test_the_mark_changes_when_a_state_of_links_is_installed() -> None:
    group = Scripted(14)
    mark = mark_of(group, THIRD)
    rows = [HORIZON_KEY + (7).to_bytes(8, "big")]
    state = State(SYSTEM, 7, NO_BALLOT, (-1, 0, 0), 0, 0, [], b"", b"", rows, [bytes(9) + struct.pack("<q", 5)])
    group.inject(FIRST, THIRD, state)
    group.run(0.1)
    assert group.chosen(THIRD, SYSTEM) == 7
    assert mark_of(group, THIRD) != mark
    assert group.replica(THIRD).links.of_table(BUCKET, b"t").horizon == 5


# ---------------------------------------------------------------- real nodes


class SharedCluster(StorageCluster):
    """Storage nodes whose version caches lie in files that stand for shared memory."""

    def memory_of(self, identity: Identity) -> SharedVersions:
        shared = self.folder / "shared"
        shared.mkdir(exist_ok=True)
        home = open_home(shared, identity, 1 << 20)
        assert isinstance(home, SharedVersions)
        return home

    async def kill(self, number: int) -> None:
        """As if the process was killed: its files stay as they are."""
        service = self.services[number]
        home, service._versions = service._versions, PrivateVersions(1 << 20)
        await self.stop(number)
        assert isinstance(home, SharedVersions)
        os.close(home._file)
        del home, service
        gc.collect()  # the lock is held for as long as the memory is mapped


def knows(cluster: StorageCluster, number: int, version: int) -> bool:
    replica = cluster.services[number]._life.replica
    return replica is not None and replica.core.versions.look_up([ALICE]) == [version]


async def others_of(cluster: StorageCluster, number: int, version: int) -> list[int]:
    message = question(version, seed=digest_seed(cluster.topology.secret))
    answer = await cluster.client.call(f"storage-0-{number}", message, 5.0)
    assert isinstance(answer, Same), answer
    return unpack_u32(answer.others)


def test_a_node_whose_cache_fails_in_the_middle_of_a_move_begins_another_life_without_that_row(tmp_path: Path) -> None:
    async def run() -> None:
        async with SharedCluster(tmp_path) as cluster:
            item = (item_key(1), b"x")
            assert await cluster.put(FIRST, ALICE, rid(1), [item]) == (OK, 1)
            await wait_for(lambda: knows(cluster, FIRST, 1), "the version to be clean")
            service = cluster.services[FIRST]
            broken = service._life.replica
            assert broken is not None
            cache = broken.core.versions.cache
            row = cache._row_of(struct.unpack_from("<Q", broken.core.versions.digest(ALICE))[0])

            def fail(_: bytes) -> list[int]:
                cache._sequence_of[row] += 1
                raise MemoryError

            cache.look_up_few = fail  # type: ignore[assignment, method-assign]
            message = question(1, seed=digest_seed(cluster.topology.secret))
            assert isinstance(await cluster.client.call(service.name, message, 5.0), Failure)
            await wait_for(lambda: service._life.replica not in (None, broken), "the next life")
            await cluster.ready()
            assert not knows(cluster, FIRST, 1)
            assert service.status()["versions"]["warm"] < cache.entries

    asyncio.run(run())


def test_a_node_is_warm_after_it_was_killed_and_empty_after_it_was_wiped(tmp_path: Path) -> None:
    async def run() -> None:
        async with SharedCluster(tmp_path) as cluster:
            for entry in range(1, 4):
                item = (item_key(entry), b"x")
                assert await cluster.put(FIRST, ALICE, rid(entry), [item], seen=entry - 1) == (OK, entry)
            await wait_for(lambda: knows(cluster, FIRST, 3), "the version to be clean")
            assert await others_of(cluster, FIRST, 3) == []
            assert await others_of(cluster, FIRST, 2) == [0]
            await cluster.kill(FIRST)
            await cluster.start(FIRST)
            await cluster.ready()
            status = cluster.services[FIRST].status()["versions"]
            assert status["warm"] == status["entries"] > 0
            assert await others_of(cluster, FIRST, 3) == []
            assert cluster.services[FIRST].status()["versions"]["hit_rate"] == 1.0
            await cluster.kill(FIRST)
            shutil.rmtree(tmp_path / f"storage-0-{FIRST}")
            service = await cluster.start(FIRST, may_format=False, may_learn=True)
            await wait_for(lambda: service.status()["state"] == "voting", "the wiped replica to vote again")
            assert service.status()["versions"]["warm"] == 0
            assert await others_of(cluster, FIRST, 2) == [0]
        assert list((tmp_path / "shared").iterdir()) == [], "nodes that stop in order leave nothing behind"

    asyncio.run(run())
