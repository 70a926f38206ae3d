"""`explain` says where each item is, and why: against real services of all tiers."""

from __future__ import annotations

import asyncio
import json
import pickle
from collections.abc import Awaitable, Callable
from pathlib import Path
from random import Random

import pytest
from storage_cluster import DAY_US, topology, wait_for
from tiers_model import NOW_US, POLICY, ThreeTiers
from timetier.cluster.client.view import View
from timetier.cluster.effects import CallFailed
from timetier.cluster.errors import InvalidRequest, Unavailable
from timetier.cluster.explaining import explain
from timetier.cluster.explanation import (
    ABSENT,
    AGREES,
    BOTH,
    COLD,
    DAMAGED,
    DELETED,
    EXPIRED,
    INTACT,
    LAGS,
    LIVE,
    MISSING,
    NO_ANSWER,
    NOWHERE,
    STORAGE,
    UNKNOWN,
    Explanation,
    ItemView,
)
from timetier.cluster.keys import MIN_TIMESTAMP, bucket_of, timeline_key
from timetier.cluster.messages import NO_BALLOT, TimelineFacts
from timetier.jobs.explanation_text import explanation_text

OLD = NOW_US - 400 * DAY_US  # sunk in these tests
YOUNG = NOW_US - 3 * DAY_US
CUT_OFF = NOW_US - 30 * DAY_US


def run(tmp_path: Path, body: Callable[[ThreeTiers], Awaitable[None]]) -> None:
    async def main() -> None:
        async with ThreeTiers(tmp_path) as tiers:
            await body(tiers)

    asyncio.run(asyncio.wait_for(main(), 60))


async def item(tiers: ThreeTiers, timestamp: int, owner: str = "alice") -> ItemView:
    """The explanation of the only item at an instant."""
    (found,) = (await tiers.table.explain(owner, timestamp)).items
    return found


def test_an_item_is_found_in_the_tier_in_which_it_lies(tmp_path: Path) -> None:
    async def body(tiers: ThreeTiers) -> None:
        await tiers.table.put_many([("alice", OLD + at, b"old") for at in range(50)] + [("alice", YOUNG, b"young")])
        hot = await item(tiers, OLD)
        assert (hot.tier, hot.state, hot.version, hot.size_bytes) == (STORAGE, LIVE, 1, 3)
        assert hot.may_sink_at_us is not None
        assert hot.may_sink_at_us == hot.written_us + POLICY.cold_after  # type: ignore[operator]
        assert "that counts, not its event time" in hot.may_sink
        assert "in 30 days" in hot.may_sink

        await tiers.sink_and_evict(CUT_OFF)
        found = await tiers.table.explain("alice", OLD)
        (sunk,) = found.items
        assert (sunk.tier, sunk.state, sunk.version, sunk.not_evicted_at) == (COLD, LIVE, 1, [])
        assert [(row.version, row.fate) for row in sunk.rows] == [(1, "what readers see")]
        (block,) = sunk.blocks
        assert {(copy.node, copy.state, copy.disk) for copy in block.copies} == {
            (f"cold-0-{replica}", INTACT, 0) for replica in range(3)
        }
        assert sunk.rows[0].place == f"{block.file} at {block.offset}"
        (link,) = found.links
        assert (link.rows, link.generation, link.live, link.run) == (50, 1, True, "run")
        assert link.window_start <= OLD < link.window_end
        (window,) = found.windows
        assert (window.items, window.oldest, window.newest) == (1, YOUNG, YOUNG)
        assert (await item(tiers, YOUNG)).tier == STORAGE
        nothing = await item(tiers, YOUNG + 1)
        assert (nothing.tier, nothing.state, nothing.rows, nothing.may_sink_at_us) == (NOWHERE, ABSENT, [], None)

    run(tmp_path, body)


def test_an_item_that_has_sunk_and_is_not_evicted_yet_is_said_to_be_in_both_tiers(tmp_path: Path) -> None:
    async def body(tiers: ThreeTiers) -> None:
        await tiers.table.put("alice", OLD, b"x")
        await tiers.stop_chores()
        await tiers.sink(CUT_OFF)
        found = await item(tiers, OLD)
        assert (found.tier, found.state) == (BOTH, LIVE)
        assert len(found.not_evicted_at) >= 2, "a majority has the rows and the link"
        assert len(found.rows) == 2, "the row and its copy in the block"
        assert "not evicted yet" in found.reason

    run(tmp_path, body)


def test_late_writes_deletes_and_wipes_are_told_with_what_they_mask(tmp_path: Path) -> None:
    async def body(tiers: ThreeTiers) -> None:
        await tiers.table.put_many([("alice", OLD + at, b"old") for at in range(3)] + [("bob", OLD, b"old")])
        await tiers.sink_and_evict(CUT_OFF)
        late = await tiers.table.put("alice", OLD, b"late")
        gone = await tiers.table.delete("alice", OLD + 1)
        await tiers.table.put("alice", YOUNG, b"young")
        young = await tiers.table.delete("alice", YOUNG)
        wiped = await tiers.table.delete_timeline("bob")

        over = await item(tiers, OLD)
        assert (over.tier, over.state, over.version) == (STORAGE, LIVE, late)
        assert "masks version 1 in the block" in over.reason
        assert [(row.version, row.fate) for row in over.rows] == [
            (late, "what readers see"),
            (1, f"replaced by version {late}"),
        ]
        deleted = await item(tiers, OLD + 1)
        assert (deleted.tier, deleted.state, deleted.version) == (STORAGE, DELETED, gone)
        assert "masks version 1 in the block" in deleted.reason
        assert deleted.may_sink_at_us is not None, "the deletion itself is to sink"
        hot = await item(tiers, YOUNG)
        assert (hot.state, hot.version, hot.rows[0].kind) == (DELETED, young, "delete")
        assert (await item(tiers, OLD + 2)).tier == COLD

        bob = await tiers.table.explain("bob", OLD)
        assert bob.wiped_version >= 1
        assert bob.version == wiped
        assert (bob.items[0].state, bob.items[0].tier) == (DELETED, COLD)
        assert "delete_timeline" in bob.items[0].reason

    run(tmp_path, body)


def test_all_items_of_an_instant_are_told_or_the_one_with_an_id(tmp_path: Path) -> None:
    async def body(tiers: ThreeTiers) -> None:
        ids = [b"", b"a", b"b\x00c"]
        await tiers.table.put_many([("alice", OLD, b"v" + one, one) for one in ids])
        for sunk in (False, True):
            found = await tiers.table.explain("alice", OLD)
            assert [one.id for one in found.items] == ids
            for one in ids:
                (single,) = (await tiers.table.explain("alice", OLD, id=one)).items
                assert (single.id, single.state, single.size_bytes) == (one, LIVE, 1 + len(one))
            (missing,) = (await tiers.table.explain("alice", OLD, id=b"z")).items
            assert (missing.id, missing.state) == (b"z", ABSENT)
            if not sunk:
                await tiers.sink_and_evict(CUT_OFF)

    run(tmp_path, body)


def test_what_retention_has_ended_is_said_to_be_expired(tmp_path: Path) -> None:
    async def body(tiers: ThreeTiers) -> None:
        ancient = NOW_US - POLICY.retention - 10 * DAY_US  # in the window of what has not expired yet
        await tiers.table.put_many([("alice", ancient, b"x"), ("alice", OLD, b"old")])
        earlier = NOW_US - 100 * DAY_US  # the horizon moves in steps of a window
        await tiers.sink_and_evict(CUT_OFF, "first", now_us=earlier)
        assert (await item(tiers, ancient)).tier == COLD, "its time has not come"
        await tiers.table.put("alice", OLD + 1, b"so that the bucket is looked at")
        await tiers.sink(CUT_OFF, "second")
        found = await tiers.table.explain("alice", ancient)
        assert found.horizon is not None
        assert ancient < found.horizon <= NOW_US - POLICY.retention
        (gone,) = found.items
        assert gone.state == EXPIRED or gone.rows == [], "its block may be gone already"
        assert gone.state in (EXPIRED, ABSENT)
        assert (await item(tiers, OLD)).state == LIVE

    run(tmp_path, body)


def test_copies_that_are_damaged_or_gone_are_named_and_a_block_without_a_copy_is_unknown(tmp_path: Path) -> None:
    async def body(tiers: ThreeTiers) -> None:
        await tiers.table.put("alice", OLD, b"x" * 1_000)
        await tiers.sink_and_evict(CUT_OFF)
        (path,) = tiers.cold_files(1)
        block = (await item(tiers, OLD)).blocks[0]
        content = bytearray(path.read_bytes())
        content[block.offset + block.length - 8] ^= 1
        path.write_bytes(content)
        damaged = await item(tiers, OLD)
        states = {copy.node: copy.state for copy in damaged.blocks[0].copies}
        assert states == {"cold-0-0": INTACT, "cold-0-1": DAMAGED, "cold-0-2": INTACT}
        assert (damaged.tier, damaged.state) == (COLD, LIVE)

        tiers.storage.network.kill("cold-0-0")
        for replica in (1, 2):
            for path in tiers.cold_files(replica):
                path.unlink()
        found = await item(tiers, OLD)
        assert (found.tier, found.state) == (COLD, UNKNOWN)
        states = {copy.node: copy.state for copy in found.blocks[0].copies}
        assert states["cold-0-0"] == NO_ANSWER
        assert states["cold-0-1"] == states["cold-0-2"] == MISSING

    run(tmp_path, body)


def test_a_replica_that_does_not_answer_is_named_and_a_lost_majority_is_no_proof(tmp_path: Path) -> None:
    async def body(tiers: ThreeTiers) -> None:
        await tiers.table.put("alice", YOUNG, b"x")
        await tiers.agree()  # else the last replica may not have heard that the entry was chosen
        found = await tiers.table.explain("alice")
        assert (found.version, found.proven, found.items) == (1, True, [])
        assert [replica.state for replica in found.replicas] == [AGREES] * 3
        first = found.replicas[0].node
        assert [replica.node for replica in found.replicas] == tiers.store.view.routing.storage_order(
            timeline_key(b"t", b"alice", tiers.storage.topology.buckets)
        )
        assert found.cache_nodes == ["cache-0-0"]
        assert found.bucket == bucket_of(timeline_key(b"t", b"alice", tiers.storage.topology.buckets))
        tiers.storage.network.kill(first)
        found = await tiers.table.explain("alice")
        assert (found.version, found.proven, found.replicas[0].state) == (1, True, NO_ANSWER)
        tiers.storage.network.kill(found.replicas[1].node)
        found = await tiers.table.explain("alice")
        assert (found.version, found.proven) == (1, False)
        tiers.storage.network.kill(found.replicas[2].node)
        with pytest.raises(Unavailable, match="no replica"):
            await tiers.table.explain("alice")

    run(tmp_path, body)


def test_a_replica_that_was_away_is_said_to_lag_until_it_has_caught_up(tmp_path: Path) -> None:
    async def body(tiers: ThreeTiers) -> None:
        await tiers.table.put("alice", YOUNG, b"x")
        order = [replica.node for replica in (await tiers.table.explain("alice")).replicas]
        away = int(order[2][-1])
        await tiers.storage.stop(away)
        for at in range(5):
            await tiers.table.put("alice", YOUNG + at, b"y")
        await tiers.storage.start(away)
        await wait_for(lambda: tiers.storage.services[away].status()["state"] == "voting", "it votes again")
        last = (await tiers.table.explain("alice")).replicas[2]
        assert last.state in (LAGS, AGREES)
        assert (last.state == LAGS) == (last.version != 6)
        if last.state == LAGS:
            assert last.reason == f"{6 - (last.version or 0)} entries behind"
        await tiers.agree()
        assert (await tiers.table.explain("alice")).replicas[2].state == AGREES

    run(tmp_path, body)


def test_a_long_timeline_is_counted_in_several_answers(tmp_path: Path) -> None:
    async def body(tiers: ThreeTiers) -> None:
        count = 25_000  # more than one answer looks at
        items = [("alice", YOUNG - at * 60_000_000, b"x") for at in range(count)]
        for low in range(0, count, 10_000):
            await tiers.table.put_many(items[low : low + 10_000])
        found = await tiers.table.explain("alice")
        assert sum(window.items for window in found.windows) == count
        assert [window.start for window in found.windows] == sorted({window.start for window in found.windows})
        assert not found.windows_left_out

    run(tmp_path, body)


def test_unknown_tables_owners_and_arguments_are_refused_with_what_to_do(tmp_path: Path) -> None:
    async def body(tiers: ThreeTiers) -> None:
        with pytest.raises(InvalidRequest, match="known tables: t"):
            tiers.store.table("other")
        with pytest.raises(InvalidRequest, match="nothing was ever written"):
            await tiers.table.explain("nobody")
        with pytest.raises(InvalidRequest, match="without a timestamp"):
            await tiers.table.explain("alice", id=b"a")
        with pytest.raises(InvalidRequest, match="timestamp"):
            await tiers.table.explain("alice", 1 << 70)

    run(tmp_path, body)


def test_an_explanation_is_text_json_and_pickle(tmp_path: Path) -> None:
    async def body(tiers: ThreeTiers) -> None:
        await tiers.table.put_many([(b"\xff\xfe", OLD, b"x", b"\xff"), (b"\xff\xfe", YOUNG, b"y")])
        await tiers.sink_and_evict(CUT_OFF)
        found = await tiers.table.explain(b"\xff\xfe", OLD)
        assert pickle.loads(pickle.dumps(found)) == found
        told = json.loads(json.dumps(found.to_json()))
        assert told["owner_base64"] == "//4="
        assert told["items"][0]["id_base64"] == "/w=="
        assert told["links"][0]["blocks"][0]["copies"][0]["disk"] == 0
        text = explanation_text(found)
        for words in ("proven by a majority", "tier: cold", "intact: ", "next sink: not known", "storage-0-1"):
            assert words in text

    run(tmp_path, body)


def explained_by(*told: tuple[int, int] | None) -> Explanation:
    """What is made of three replicas that tell (chosen, round of the open entry, -1 for none), or nothing."""
    view = View(topology(tables={"t": POLICY}), now=lambda: 0.0, random=Random(1))
    script = explain(view, "t", b"alice", None, None, now_us=NOW_US)
    answers: list[object] = []
    for one in told:
        if one is None:
            answers.append(CallFailed("storage", "it is away", True))
        else:
            ballot = (one[1], (1, 1, 1)) if one[1] >= 0 else NO_BALLOT
            answers.append(TimelineFacts(one[0], ballot, 0, MIN_TIMESTAMP, 0, [], 0, [], [], b""))
    assert len(next(script)) == 3  # type: ignore[arg-type]
    best = max((one for one in answers if isinstance(one, TimelineFacts)), key=lambda one: one.chosen)
    script.send(answers)
    try:
        script.send([best])
    except StopIteration as stop:
        found: Explanation = stop.value
        return found
    raise AssertionError("it asked for more than it needs")


def test_an_open_entry_is_told_and_counts_only_when_a_majority_has_accepted_it() -> None:
    found = explained_by((5, -1), (5, 3), (5, -1))
    assert (found.version, found.proven, found.open_entry) == (5, True, 6)
    assert [replica.has_open_entry for replica in found.replicas] == [False, True, False]
    found = explained_by((5, 3), (5, 3), None)
    assert (found.version, found.proven, found.open_entry) == (6, True, None)
    assert [replica.state for replica in found.replicas] == [AGREES, AGREES, NO_ANSWER]
    found = explained_by((5, 3), (5, -1), None)
    assert (found.version, found.proven, found.open_entry) == (5, False, 6)
    assert "entry 6 is open" in explanation_text(found)


def test_replicas_that_are_behind_are_told_apart_from_those_that_only_were_not_told() -> None:
    found = explained_by((9, -1), (9, -1), (6, -1))
    assert [replica.state for replica in found.replicas] == [AGREES, AGREES, LAGS]
    assert found.replicas[2].reason == "3 entries behind"
    found = explained_by((9, -1), (8, 0), (8, -1))
    assert [replica.state for replica in found.replicas] == [AGREES, AGREES, LAGS]
    assert "not yet told" in found.replicas[1].reason
