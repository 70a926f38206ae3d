"""Files that the sink removes and rewrites, by the record of its runs; and what a run costs that has nothing to do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from cold_model import BUCKETS, TABLE, cold_file
from sink_world import SETTINGS, Stepper, World, is_link_write, with_world
from timetier.cluster.cold.link import Link
from timetier.cluster.cold.run_record import (
    CLEAN,
    MAX_LOST,
    MAX_UNCLEAN,
    RUNNING,
    LostFile,
    RunRecord,
    decode_record,
    run_timeline,
)
from timetier.cluster.cold.sink_report import SinkReport
from timetier.cluster.cold.sinking import CutOffs
from timetier.cluster.errors import ProtocolError
from timetier.cluster.keys import MAX_TIMESTAMP, bucket_of, item_key, timeline_key
from timetier.cluster.messages import Message, Scan, Write

HOUR_US = 3_600_000_000
GRACE = replace(SETTINGS, orphan_grace_s=600.0, min_live_share=0.0)
ONE_FILE = replace(SETTINGS, file_bytes=1 << 20)


def record_of(world: World) -> RunRecord:
    """The record as it is."""
    rows = world.storage.stored(run_timeline(BUCKETS)).rows[item_key(0, b"run")]
    return decode_record(rows[0][2])


def names(world: World) -> set[str]:
    return {path.name for path in world.files()}


def named(world: World) -> set[str]:
    return {block.file for link in world.storage.all_links() for block in link.blocks}


async def run_at(world: World, hours: float, **options: object) -> SinkReport:
    report = await world.run(now_us=int(hours * HOUR_US) + 10_000_000_000, **options)
    assert report.errors == []
    world.check()
    return report


async def crashed_before(world: World, message: type[Message], **options: object) -> Stepper:
    """A run that has ended right before it sent such a message for the first time (of links, if it is `Write`)."""
    run = Stepper(world.script(**options), world.network.carrier("sink"))
    while True:
        found = run.effect[0].message if isinstance(run.effect, list) else None
        if isinstance(found, message) and (not isinstance(found, Write) or is_link_write(found)):
            run.crash()
            return run
        await run.step()
        assert run.report is None, "it should have come so far"


def test_each_run_has_the_next_epoch_and_says_how_it_ended(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        world.load(3, 5)
        for epoch in (1, 2, 3):
            report = await run_at(world, epoch)
            record = record_of(world)
            assert (report.epoch, record.epoch, record.run, record.state) == (epoch, epoch, report.run, CLEAN)
            assert (record.full, record.unclean, record.lost) == (False, [], [])
            assert record.ended_us >= record.started_us > 0
        await crashed_before(world, Scan)
        assert (record_of(world).epoch, record_of(world).state) == (4, RUNNING)
        await run_at(world, 5)
        assert (record_of(world).epoch, record_of(world).state, record_of(world).unclean) == (5, CLEAN, [])

    with_world(tmp_path, body)


def test_grace_is_counted_from_the_replacement_and_not_from_the_age_of_the_file(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        world.load(3, 10)
        await run_at(world, 0, settings=GRACE)
        first = names(world)
        for owner in range(3):
            for at in range(10):
                world.storage.put(b"owner-%d" % owner, at * 7, b"again", 2, b"%d" % (at % 3))
        world.remember()
        replacing = await run_at(world, 100, settings=GRACE)  # the files are 100 hours old by now
        assert (replacing.removed_files, replacing.waiting_files) == (0, len(first))
        assert names(world) > first
        early = await run_at(world, 100 + 599 / 3_600, settings=GRACE)
        assert (early.removed_files, early.waiting_files) == (0, len(first))
        late = await run_at(world, 100 + 602 / 3_600, settings=GRACE)
        assert (late.removed_files, late.orphans_removed, late.waiting_files) == (len(first), 0, 0)
        assert late.removed_bytes > 0
        assert names(world) == named(world)
        assert names(world).isdisjoint(first)
        assert (await run_at(world, 101, settings=GRACE)).removed_files == 0

    with_world(tmp_path, body)


def test_grace_is_not_spent_while_a_run_is_paused_between_its_note_and_its_links(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        world.load(2, 5)
        await run_at(world, 0, settings=GRACE)
        first = names(world)
        for owner in range(2):
            for at in range(5):
                world.storage.put(b"owner-%d" % owner, at * 7, b"again", 2, b"%d" % (at % 3))
        world.remember()
        run = Stepper(world.script(settings=GRACE, now_us=10_000_000_000), world.network.carrier("sink"))
        while not (isinstance(run.effect, list) and is_link_write(run.effect[0].message)):
            await run.step()
        await run.perform()  # hours after the note, for all that anybody knows; and nobody takes note
        run.crash()
        found = await run_at(world, 5, settings=GRACE)
        assert found.removed_files == 0, "readers may have had the old links a moment ago"
        assert first <= names(world)
        assert (await run_at(world, 6, settings=GRACE)).removed_files == len(first)

    with_world(tmp_path, body)


def test_what_a_crashed_run_has_left_is_removed_and_counted_by_the_next(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        world.load(4, 10)
        await crashed_before(world, Write, settings=ONE_FILE)
        left = names(world)
        assert left
        report = await run_at(world, 1)
        assert (report.orphans_removed, report.removed_files) == (len(left), len(left))
        assert names(world) == named(world)
        assert record_of(world).unclean == []

    with_world(tmp_path, body)


def test_a_crashed_run_is_remembered_until_each_cold_node_has_heard_of_a_later_one(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        world.load(4, 10)
        await crashed_before(world, Write, settings=ONE_FILE)
        (left,) = names(world)
        world.network.cut("sink", "cold-0-2")
        report = await world.run()
        assert any("cold-0-2" in error for error in report.errors)
        assert [left.startswith(run.prefix) for run in record_of(world).unclean][:1] == [True]
        assert len(world.files(left)) == 3
        world.network.heal()
        report = await run_at(world, 1)
        assert report.orphans_removed >= 1
        assert record_of(world).unclean == []
        assert names(world) == named(world)

    with_world(tmp_path, body)


def test_a_run_with_nothing_to_do_makes_few_calls_whatever_has_sunk(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        calls = []
        for owners in (2, 40):
            world.load(owners, 20)
            await run_at(world, 0)
            await run_at(world, 1)
            idle = await run_at(world, 2)
            assert (idle.rows, idle.files, idle.removed_files) == (0, 0, 0)
            before = world.storage.scans
            calls.append((await run_at(world, 3)).calls - (world.storage.scans - before))
        assert calls[0] == calls[1] <= 4, "beside the scans: the record is read, and written twice"

    with_world(tmp_path, body)


def test_files_that_no_record_knows_of_are_found_by_a_comparison_of_all(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        world.load(3, 10)
        await run_at(world, 0)
        for replica in range(3):
            place = world.folder / f"cold-0-{replica}" / "disk-0" / "unknown-00001.arrow"
            place.write_bytes(cold_file(place.name))
        await world.stop()
        await world.start()
        assert (await run_at(world, 1, settings=GRACE)).removed_files == 0
        checked = await run_at(world, 2, settings=GRACE, check_files=True)
        assert (checked.removed_files, checked.waiting_files, checked.missing_copies) == (0, 1, 0)
        assert (await run_at(world, 3, settings=GRACE)).removed_files == 1
        assert names(world) == named(world)
        world.files()[0].unlink()
        await world.stop()
        await world.start()
        report = await world.run(check_files=True)
        assert report.missing_copies == 1

    with_world(tmp_path, body)


def test_a_record_that_is_full_has_the_next_run_compare_all_files(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        world.load(3, 10)
        await crashed_before(world, Write, settings=ONE_FILE)
        (left,) = names(world)
        rows = world.storage.stored(run_timeline(BUCKETS)).rows[item_key(0, b"run")]
        forgetful = msgspec.structs.replace(record_of(world), state=CLEAN, full=True, overflowed=True)
        rows[0] = (rows[0][0], rows[0][1], msgspec.json.encode(forgetful), rows[0][3])
        await run_at(world, 1, settings=GRACE)
        assert [file.file for file in record_of(world).lost] == [left], "it may have been named once"
        assert (record_of(world).full, record_of(world).overflowed) == (False, False)
        assert (await run_at(world, 2, settings=GRACE)).removed_files == 1
        assert names(world) == named(world)

    with_world(tmp_path, body)


def test_a_file_of_which_little_is_alive_is_rewritten_and_goes(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        world.load(6, 30)
        await run_at(world, 0, settings=ONE_FILE)
        (first,) = names(world)
        links = {(link.bucket, link.key): link for link in world.storage.all_links()}
        for owner in range(6):
            for at in range(20):
                world.storage.put(b"owner-%d" % owner, at * 7, b"again", 2, b"%d" % (at % 3))
        world.remember()
        replacing = await run_at(world, 1, settings=ONE_FILE)
        assert (replacing.rewritten_files, replacing.removed_files) == (0, 0)
        alive = sum(b.length for link in world.storage.all_links() for b in link.blocks if b.file == first)
        assert 0 < alive < 0.5 * world.files(first)[0].stat().st_size
        report = await run_at(world, 2, settings=ONE_FILE)
        assert (report.rows, report.rewritten_files, report.rewritten_bytes) == (0, 1, alive)
        assert report.removed_files == 1
        assert first not in names(world)
        assert names(world) == named(world)
        for link in world.storage.all_links():
            before = links[link.bucket, link.key]
            assert rules_of(link) >= rules_of(before), "whatever could be evicted still can"
        assert (await run_at(world, 3, settings=ONE_FILE)).rewritten_files == 0

    with_world(tmp_path, body)


def rules_of(link: Link) -> set[tuple[int, int]]:
    """Owners that have a rule, and how far the greatest of it goes."""
    hashes = link.owner_hashes().tolist()
    return {(owner, 0) for owner in hashes if link.rules_of(owner)}


def test_what_one_run_rewrites_is_bounded(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        world.load(12, 60)
        await run_at(world, 0)
        count = len(names(world))
        assert count >= 4
        stubborn = replace(SETTINGS, min_live_share=1.0)  # every file has its footer, so none is wholly alive
        for owner in range(12):
            for window in range(0, 420, 50):
                world.storage.put(b"owner-%d" % owner, window + 49, b"one more", 2, b"x") if owner % 5 == 0 else None
        world.remember()
        await run_at(world, 1, settings=stubborn)
        bound = 3_000
        for hour in range(2, 5):
            report = await run_at(world, hour, settings=replace(stubborn, rewrite_bytes=bound))
            assert report.rewritten_bytes <= bound
        none = await run_at(world, 9, settings=replace(stubborn, rewrite_bytes=0))
        assert (none.rewritten_files, none.rewritten_bytes) == (0, 0)

    with_world(tmp_path, body)


def test_small_files_of_a_like_size_become_one(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        small = replace(SETTINGS, file_bytes=1 << 20, merge_files=4)
        for day in range(4):
            world.load(3, 5, start=day * 50, step=9)
            await run_at(world, day, settings=small)
        assert len(names(world)) == 4
        assert len(record_of(world).small) == 4
        report = await run_at(world, 5, settings=small)
        assert (report.rows, report.rewritten_files, report.files) == (0, 4, 1)
        assert len(names(world)) == 1
        assert names(world) == named(world)
        idle = await run_at(world, 6, settings=small)
        assert (idle.files, idle.rewritten_files) == (0, 0)

    with_world(tmp_path, body)


def test_wiped_rows_leave_the_blocks_though_nothing_else_changed(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        world.load(8, 20)
        await run_at(world, 0, settings=ONE_FILE)
        world.storage.wipe(b"owner-3")
        world.remember()
        report = await run_at(world, 1, settings=ONE_FILE)
        assert report.rows == 0
        assert rows_in_blocks(world, b"owner-3") == 0
        assert rows_in_blocks(world, b"owner-4") == 20
        versions = [world.storage.stored(key).version for key in sorted(world.storage.timelines)]
        await run_at(world, 2, settings=replace(ONE_FILE, min_live_share=0.0))
        again = [world.storage.stored(key).version for key in sorted(world.storage.timelines)]
        assert sum(again) - sum(versions) <= 2, "the record alone: no window is rewritten twice"

    with_world(tmp_path, body)


def test_no_rewrite_carries_wiped_rows_of_anybody_along(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        bucket = bucket_of(timeline_key(TABLE, b"owner-0", BUCKETS))
        others = (b"other-%d" % number for number in range(10_000))
        beside = next(owner for owner in others if bucket_of(timeline_key(TABLE, owner, BUCKETS)) == bucket)
        for at in range(5):
            world.storage.put(b"owner-0", at, b"stays", 1)
            world.storage.put(beside, at, b"goes", 1)
        world.remember()
        await run_at(world, 0)
        honest = world.storage.answer

        def silent(message: Message) -> Message:
            """Scans that do not tell of wiped timelines, as where the wipe comes right after the scan."""
            answer = honest(message)
            if isinstance(message, Scan):
                kept = {key: stored for key, stored in world.storage.timelines.items() if key != wiped}
                held, world.storage.timelines = world.storage.timelines, kept
                answer = honest(message)
                world.storage.timelines = held
            return answer

        wiped = timeline_key(TABLE, beside, BUCKETS)
        world.storage.wipe(beside)
        world.storage.put(b"owner-0", 20, b"late", 2)
        world.remember()
        setattr(world.storage, "answer", silent)  # noqa: B010
        report = await run_at(world, 1)
        assert report.rows == 1
        assert rows_in_blocks(world, beside) == 0
        assert rows_in_blocks(world, b"owner-0") == 6

    with_world(tmp_path, body)


def rows_in_blocks(world: World, owner: bytes) -> int:
    links = world.storage.links(bucket_of(timeline_key(TABLE, owner, BUCKETS)))
    return sum(len(world.read(block).rows_of(owner)[0]) for link in links for block in link.blocks)


def test_a_window_with_little_waits_for_more_or_for_its_time(tmp_path: Path) -> None:
    patient = replace(SETTINGS, min_block_bytes=2_000)
    early, late = CutOffs(-1, MAX_TIMESTAMP), CutOffs(200, MAX_TIMESTAMP)

    async def body(world: World) -> None:
        for at in range(10):
            world.storage.put(b"owner-0", at, b"x" * 50, 1)
        world.remember()
        report = await run_at(world, 0, settings=patient, patience=early)
        assert (report.rows, report.waiting_windows, report.waiting_rows, report.files) == (0, 1, 10, 0)
        for at in range(10, 40):
            world.storage.put(b"owner-0", at, b"x" * 50, 1)
        world.remember()
        report = await run_at(world, 1, settings=patient, patience=early)
        assert (report.rows, report.waiting_rows) == (40, 0)
        assert sum(report.block_sizes.values()) == report.blocks > 0
        assert sum(report.file_sizes.values()) == report.files == 1
        world.storage.put(b"owner-0", 41, b"one more", 1)
        world.remember()
        report = await run_at(world, 2, settings=patient, patience=early)
        assert (report.rows, report.waiting_rows) == (0, 1), "a block is not written again for a row"
        report = await run_at(world, 3, settings=patient, patience=late)
        assert (report.rows, report.waiting_rows) == (1, 0)
        assert world.hot_rows() == 0

    with_world(tmp_path, body)


def test_the_record_has_room_for_so_many_notes_and_says_when_there_were_more() -> None:
    lost = [LostFile(f"run-{number:05d}.arrow", 0, 1) for number in range(MAX_LOST + 1)]
    record = msgspec.structs.replace(RunRecord(full=False), lost=lost).bounded()
    assert (len(record.lost), record.full, record.overflowed) == (MAX_LOST, True, True)
    assert len(msgspec.json.encode(record)) < 1 << 20
    record = RunRecord(full=False, epoch=1, run="r", prefix="r-0", state=RUNNING)
    for _ in range(MAX_UNCLEAN + 2):
        record = record.following("r", f"r-{record.epoch}", 5)
    assert (len(record.unclean), record.full, record.overflowed) == (MAX_UNCLEAN, True, True)
    assert record.epoch == MAX_UNCLEAN + 3


def test_a_record_that_is_none_or_of_a_later_format_is_refused() -> None:
    for value in (b"", b"{", b"[]", b'{"epoch": "one"}', b'{"format": 2}'):
        with pytest.raises(ProtocolError):
            decode_record(value)
    assert decode_record(b"{}") == RunRecord()
