"""The sink as a whole, with real cold nodes: crash it anywhere, run two at once, break nodes: nothing is lost."""

from __future__ import annotations

import asyncio
import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
from cold_model import BUCKETS, POLICY, TABLE, topology, view_of
from sink_world import CUT, SETTINGS, Crashed, World, answers, crash_after, is_link_write, with_world
from timetier.cluster.cold.sink_calls import SinkSettings
from timetier.cluster.cold.sink_script import SinkProgress, SinkReport, TableSink, sink
from timetier.cluster.cold.sinking import CutOffs
from timetier.cluster.drive import drive
from timetier.cluster.effects import Script, Sleep
from timetier.cluster.errors import InvalidRequest
from timetier.cluster.keys import bucket_of, system_timeline, timeline_key
from timetier.cluster.messages import FileWrite, Message, Scan, Scanned
from timetier.cluster.topology import TablePolicy, Topology


def test_a_run_sinks_what_is_old_evicts_it_and_everything_is_still_found(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        world.load(12, 40)
        world.storage.put(b"young", 5_000, b"young", 1)
        world.remember()
        seen: list[SinkProgress] = []
        report = await world.run(progress=seen.append)
        assert report.errors == []
        assert (report.rows, report.fenced_buckets, report.skipped_timelines) == (480, 0, 0)
        assert report.buckets == len({bucket_of(timeline_key(TABLE, b"owner-%d" % n, BUCKETS)) for n in range(12)})
        assert report.files >= 2
        assert len(world.files()) == 3 * report.files
        links = world.storage.all_links()
        assert sum(link.rows for link in links) == 480
        assert report.blocks == sum(len(link.blocks) for link in links)
        assert report.raw_bytes > report.rows * 10
        assert world.hot_rows() == 1
        world.check()
        assert (seen[-1].buckets_done, seen[-1].buckets_total) == (BUCKETS, BUCKETS)
        assert [one.buckets_done for one in seen] == sorted(one.buckets_done for one in seen)
        assert json.loads(report.to_json())["rows"] == 480
        again = await world.run()
        assert (again.rows, again.files, again.buckets, again.orphans_removed) == (0, 0, 0, 0)
        world.check()

    with_world(tmp_path, body)


def recorded(script: Script[SinkReport], rests_s: list[float]) -> Script[SinkReport]:
    """The script, whose pauses are noted and not made."""
    effect = next(script)
    while True:
        if isinstance(effect, Sleep):
            rests_s.append(effect.seconds)
        try:
            effect = script.send(0.0 if isinstance(effect, Sleep) else (yield effect))
        except StopIteration as stop:
            report: SinkReport = stop.value
            return report


def test_the_sink_rests_in_proportion_to_what_its_steps_took(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        for factor in (0.0, 3.0):
            world.load(4, 40, start=int(200 * factor))
            rests_s: list[float] = []
            carrier = world.network.carrier("sink")
            report = await drive(recorded(world.script(settings=replace(SETTINGS, rest=factor)), rests_s), carrier)
            assert (report.errors, report.rows) == ([], 160)
            if not factor:
                assert rests_s == []
            else:
                assert len(rests_s) > 3 * report.files, "after each piece of each copy, and after scans"
                steps = [rest_s / (factor * 1e-4) for rest_s in rests_s]  # the clock of `view_of` moves when looked at
                assert all(step > 0.5 and abs(step - round(step)) < 1e-6 for step in steps)
        world.check()

    with_world(tmp_path, body)


def test_two_storage_and_cold_groups_each_get_their_own(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        world.load(20, 5)
        report = await world.run()
        assert (report.errors, report.rows) == ([], 100)
        world.check()
        routing = view_of(world.shape, 0).routing
        for link in world.storage.all_links():
            for block in link.blocks:
                places = {path.parent.parent.name for path in world.files(block.file)}
                assert places == set(routing.cold_order(link.bucket, link.window_start))

    with_world(tmp_path, body, groups=2)


def test_late_writes_deletes_and_wipes_are_merged_into_the_next_generation(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        world.load(6, 20)
        await world.run()
        storage = world.storage
        storage.put(b"owner-0", 0, b"late", 2, b"0")
        storage.put(b"owner-1", 3, b"between", 2)
        storage.put(b"owner-2", 90, b"to be deleted", 2)
        storage.delete(b"owner-2", 90, 3)
        storage.wipe(b"owner-3")
        storage.put(b"owner-3", 1, b"after the wipe", 2)
        world.remember()
        report = await world.run()
        assert report.errors == []
        assert report.rows == 4
        world.check()
        assert world.hot_rows() == 0
        key = timeline_key(TABLE, b"owner-3", BUCKETS)
        (link,) = [one for one in storage.links(bucket_of(key)) if one.window_start == 0]
        rows = [world.read(block).rows_of(b"owner-3")[1] for block in link.blocks_of(b"owner-3")]
        assert list(itertools.chain(*rows)) == [b"after the wipe"]  # a wipe is physical at the next rewrite

    with_world(tmp_path, body)


def test_of_two_runs_at_once_one_is_fenced_and_nothing_is_lost(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        world.load(8, 10)
        first, second = await asyncio.gather(world.run(), world.run())
        world.check()
        stopped, other = sorted((first, second), key=lambda report: not report.fenced)
        assert stopped.fenced == f"fenced by run {other.run}, epoch {other.epoch}"
        assert stopped.errors == [f"this run has stopped: {stopped.fenced}"]
        assert (other.fenced, other.errors) == ("", [])
        assert {stopped.epoch, other.epoch} == {1, 2}
        await world.run()
        await world.run()
        world.check()
        assert world.hot_rows() == 0
        named = {block.file for link in world.storage.all_links() for block in link.blocks}
        assert {path.name for path in world.files()} == named

    with_world(tmp_path, body)


def test_a_stale_run_cannot_link_a_file_that_was_removed_as_an_orphan(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        world.load(3, 10)
        carrier = world.network.carrier("sink")
        stale = world.script(settings=replace(SETTINGS, file_bytes=1 << 20))  # one file for all
        effect = next(stale)
        while True:  # up to its first write of links: all its blocks are on disk
            if isinstance(effect, list) and is_link_write(effect[0].message):
                break
            effect = stale.send(await answers(carrier, effect))
        garbage = {path.name for path in world.files()}
        assert garbage
        nothing_old = CutOffs(-1_000, 0)
        report = await world.run(cut_offs=nothing_old)  # links nothing, only cleans up
        assert (report.errors, report.rows, report.orphans_removed) == ([], 0, len(garbage))
        assert world.files() == []
        # The paused run goes on: its conditional writes meet the fence.
        while True:
            try:
                effect = stale.send(await answers(carrier, effect))
            except StopIteration as stop:
                assert stop.value.fenced_buckets > 0
                assert stop.value.rows == 0
                assert stop.value.fenced == f"fenced by run {report.run}, epoch 2"
                break
        assert world.storage.all_links() == []
        world.check()

    with_world(tmp_path, body)


def test_a_named_file_is_never_removed_however_old(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        world.load(5, 10)
        await world.run()
        names = {path.name for path in world.files()}
        for _ in range(2):
            report = await world.run(cut_offs=CutOffs(-1_000, 0))
            assert report.orphans_removed == 0
        assert {path.name for path in world.files()} == names
        world.check()

    with_world(tmp_path, body)


def test_young_orphans_are_left_to_the_run_that_may_still_want_them(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        world.load(3, 10)
        with pytest.raises(Crashed):
            await drive(crash_after(world.script(), 14), world.network.carrier("sink"))
        patient = SinkSettings(block_rows=8, orphan_grace_s=3_600)
        report = await world.run(settings=patient)
        assert report.orphans_removed == 0
        world.check()

    with_world(tmp_path, body)


@pytest.mark.parametrize("down", [0, 1, 2])
def test_without_all_three_copies_nothing_is_linked_or_evicted(tmp_path: Path, down: int) -> None:
    async def body(world: World) -> None:
        world.load(4, 10)
        world.network.cut("sink", f"cold-0-{down}")
        report = await world.run()
        assert any(f"cold-0-{down}" in error for error in report.errors), report.errors
        assert (report.rows, report.files) == (0, 0)
        assert world.storage.all_links() == []
        world.network.heal()
        assert (await world.run()).rows == 40
        world.check()

    with_world(tmp_path, body)


def test_a_cold_node_that_garbles_a_file_is_noticed_before_the_link(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        world.load(4, 10)
        honest = world.cold["cold-0-1"]

        async def garbling(message: Message) -> Message | None:
            if isinstance(message, FileWrite):
                message.data = bytes(len(message.data))
            return await honest.handle(message)

        world.network.register("cold-0-1", garbling)
        report = await world.run()
        assert any("checksum" in error for error in report.errors), report.errors
        assert world.storage.all_links() == []
        world.network.register("cold-0-1", honest.handle)
        await world.run()
        world.check()
        assert world.hot_rows() == 0

    with_world(tmp_path, body)


@pytest.mark.parametrize("down", [0, 1, 2])
def test_a_run_goes_on_without_any_one_storage_replica(tmp_path: Path, down: int) -> None:
    async def body(world: World) -> None:
        world.load(6, 10)
        world.network.cut("sink", f"storage-0-{down}")
        report = await world.run()
        assert (report.errors, report.rows) == ([], 60)
        world.check()

    with_world(tmp_path, body)


def test_without_a_majority_nothing_is_sunk(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        world.load(6, 10)
        for replica in (0, 2):
            world.network.cut("sink", f"storage-0-{replica}")
        report = await world.run()
        assert report.rows == 0
        assert any("majority" in error for error in report.errors)
        assert any("given up" in error for error in report.errors), report.errors
        assert world.files() == []
        world.check()

    with_world(tmp_path, body)


def test_a_next_generation_is_built_from_whichever_copy_is_intact(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        world.load(3, 10)
        await world.run()
        for path in world.files()[:]:
            if path.parent.parent.name != "cold-0-1":
                data = bytearray(path.read_bytes())
                for at in range(600, len(data) - 600, 100):
                    data[at] ^= 1
                path.write_bytes(data)
        for owner in range(3):
            world.storage.put(b"owner-%d" % owner, 1, b"late", 2)
        report = await world.run()
        assert report.errors == []
        assert report.rows == 3

    with_world(tmp_path, body)


def test_a_window_whose_blocks_cannot_be_read_is_left_alone(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        world.load(1, 20)
        await world.run()
        before = world.storage.all_links()
        bad = before[0].blocks[0]
        for path in world.files(bad.file):
            data = bytearray(path.read_bytes())
            data[bad.offset + 20] ^= 1
            path.write_bytes(data)
        world.storage.put(b"owner-0", before[0].window_start + 1, b"late", 2)
        world.storage.put(b"owner-0", before[1].window_start + 1, b"late", 2)
        report = await world.run()
        assert any("no good copy" in error for error in report.errors)
        after = world.storage.all_links()
        assert [link.generation for link in after] == [1, 2, *[1] * (len(after) - 2)]
        assert world.hot_rows() == 1
        assert report.orphans_removed == 0  # a run that could not see everything removes nothing

    with_world(tmp_path, body)


def test_a_timeline_whose_snapshot_is_not_strong_waits_for_the_next_run(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        world.load(4, 10)
        behind = timeline_key(TABLE, b"owner-1", BUCKETS)
        honest = world.storage.answer

        def stale(message: Message) -> Message:
            """Scans come from a replica that has not applied the newest entry of one timeline."""
            answer = honest(message)
            if isinstance(answer, Scanned) and behind in answer.timelines:
                at = answer.timelines.index(behind)
                versions = bytearray(answer.timeline_versions)
                versions[8 * at] -= 1
                answer.timeline_versions = bytes(versions)
            return answer

        setattr(world.storage, "answer", stale)  # noqa: B010
        report = await world.run()
        assert (report.errors, report.rows, report.skipped_timelines) == ([], 30, 1)
        world.check()
        assert len(world.storage.stored(behind).rows) == 10
        setattr(world.storage, "answer", honest)  # noqa: B010
        assert (await world.run()).rows == 10
        world.check()

    with_world(tmp_path, body)


def test_an_open_entry_is_settled_and_does_not_keep_its_timeline_from_sinking(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        world.load(4, 10)
        world.storage.stored(timeline_key(TABLE, b"owner-2", BUCKETS)).open = True
        report = await world.run()
        assert (report.errors, report.rows, report.skipped_timelines) == ([], 40, 0)
        world.check()

    with_world(tmp_path, body)


def test_a_timeline_that_is_written_all_the_time_sinks_too(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        world.load(2, 10)
        honest = world.storage.answer
        more = itertools.count()

        def busy(message: Message) -> Message:
            if not isinstance(message, Scan):
                world.storage.put(b"owner-0", 5_000 + next(more), b"new", 1)
            return honest(message)

        setattr(world.storage, "answer", busy)  # noqa: B010
        report = await world.run()
        assert (report.errors, report.rows, report.skipped_timelines) == ([], 20, 0)

    with_world(tmp_path, body)


def test_a_bucket_that_is_too_large_for_memory_sinks_in_parts(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        world.load(150, 4)
        small = SinkSettings(block_rows=8, scan_bytes=50, bucket_bytes=60, orphan_grace_s=0)
        report = await world.run(settings=small)
        assert (report.errors, report.fenced_buckets, report.rows) == ([], 0, 600)
        world.check()
        assert world.hot_rows() == 0
        assert max(link.generation for link in world.storage.all_links()) > 1

    with_world(tmp_path, body)


def test_retention_expires_by_a_written_horizon_and_frees_whole_blocks(tmp_path: Path) -> None:
    policy = TablePolicy(per_second=1, cold_after=100, window=50, retention=1_000)

    async def body(world: World) -> None:
        world.load(3, 30, step=10)  # 0 .. 290, windows of 50
        await world.run()
        assert len({link.window_start for link in world.storage.all_links()}) == 6
        world.storage.put(b"owner-0", 20, b"too late", 2)
        lazy = replace(SETTINGS, min_live_share=0.0)  # no file is rewritten
        report = await world.run(policy=policy, now_us=1_120_000_000, settings=lazy)  # horizon 120
        assert report.errors == []
        assert {link.window_start for link in world.storage.all_links()} == {100, 150, 200, 250}
        for owner in range(3):
            bucket = bucket_of(timeline_key(TABLE, b"owner-%d" % owner, BUCKETS))
            assert world.storage.horizon(bucket, TABLE) == 120
        found = world.visible()
        assert all(len(items) == 18 for items in found.values())
        versions = {b: world.storage.stored(system_timeline(b)).version for b in range(BUCKETS)}
        await world.run(policy=policy, now_us=1_125_000_000, settings=lazy)  # no step worth writing
        assert versions == {b: world.storage.stored(system_timeline(b)).version for b in range(BUCKETS)}
        await world.run(policy=policy, now_us=1_000_000_000)  # a clock that went back
        assert world.visible() == found

    with_world(tmp_path, body)


def test_a_run_of_one_table_leaves_the_files_of_others_alone(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        world.load(3, 10)
        await world.run()
        names = {path.name for path in world.files()}
        other = TableSink(b"other", POLICY, CUT)
        script = sink(view_of(world.shape, 99), [other], run="x", now_us=0, settings=SETTINGS)
        report = await drive(script, world.network.carrier("sink"))
        assert (report.errors, report.rows, report.orphans_removed) == ([], 0, 0)
        assert {path.name for path in world.files()} == names
        world.check()

    with_world(tmp_path, body)


def test_a_run_needs_a_name_that_files_can_have() -> None:
    shape: Topology = topology()
    for run in ("", "A", "a/b", "a" * 41, ".."):
        with pytest.raises(InvalidRequest):
            next(sink(view_of(shape, 0), [], run=run, now_us=0, settings=SETTINGS))
