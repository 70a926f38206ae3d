"""Cold datasets: the rows that have sunk and are still alive, each once, as pyarrow, DuckDB and Polars read them."""

from __future__ import annotations

import asyncio
import random
import threading
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pytest
from open_tiers import NOW_US, SMALL_BLOCKS, TiersInThread, open_tiers, tiers_in_thread
from storage_cluster import DAY_US, POLICY
from timetier.cluster.client.cold_data import LiveData, dataset_of, live_data_of
from timetier.cluster.cold.block_source import BlockSource
from timetier.cluster.cold.dataset import open_dataset
from timetier.cluster.cold.overlays import LookSettings
from timetier.cluster.drive import run_from_thread
from timetier.cluster.errors import Corrupt, InvalidRequest, Unavailable
from timetier.cluster.topology import TablePolicy

STEP = POLICY.window // 10
OWNERS = [f"owner-{number}" for number in range(12)]
EACH = 40
Rows = dict[tuple[str, int, bytes], bytes]


def fill(tiers: TiersInThread, *, each: int = EACH) -> Rows:
    """Items of all owners, four windows of them; what was written."""
    table, rows = tiers.table(), {}
    for owner in OWNERS:
        items = [(owner, at * STEP, b"%d of " % at + owner.encode(), b"id%d" % (at % 3)) for at in range(each)]
        table.put_many(items)
        rows.update({(owner, timestamp, item_id): value for owner, timestamp, value, item_id in items})
    return rows


def rows_of(dataset: ds.Dataset, **more: Any) -> Rows:
    """The rows of a dataset, none of which may be there twice."""
    found: Rows = {}
    for row in dataset.to_table(**more).to_pylist():
        place = row["owner"].decode(), row["timestamp"], row["id"]
        assert place not in found, f"{place} is there twice"
        found[place] = row["value"]
    return found


def wait_until_evicted(tiers: TiersInThread, rows: int) -> None:
    tiers.wait_for(lambda: min(tiers.evicted()) >= rows, "eviction on all replicas")


def test_a_dataset_has_what_has_sunk_and_nothing_that_was_replaced_deleted_or_wiped_since(tmp_path: Path) -> None:
    with tiers_in_thread(tmp_path) as tiers:
        table = tiers.table()
        written = fill(tiers)
        assert rows_of(table.cold_dataset()) == {}, "nothing has sunk yet"
        tiers.sink_all(30 * len(OWNERS), before=30 * STEP)
        sunk = {place: value for place, value in written.items() if place[1] < 30 * STEP}
        assert rows_of(table.cold_dataset()) == sunk, "also while the storage tier still has these rows"
        wait_until_evicted(tiers, len(sunk))
        assert rows_of(table.cold_dataset()) == sunk

        table.put(OWNERS[0], 3 * STEP, b"replaced", id=b"id0")
        table.put(OWNERS[0], 3 * STEP, b"another item at that instant", id=b"other")
        table.delete(OWNERS[1], 4 * STEP, id=b"id1")
        table.delete_timeline(OWNERS[2])
        table.put(OWNERS[2], 5 * STEP, b"after the wipe", id=b"id2")
        live = {place: value for place, value in sunk.items() if place[0] != OWNERS[2]}
        del live[OWNERS[0], 3 * STEP, b"id0"], live[OWNERS[1], 4 * STEP, b"id1"]
        before = table.cold_dataset()
        assert rows_of(before) == live

        tiers.sink_all(4, before=30 * STEP)
        live[OWNERS[0], 3 * STEP, b"id0"] = b"replaced"
        live[OWNERS[0], 3 * STEP, b"other"] = b"another item at that instant"
        live[OWNERS[2], 5 * STEP, b"id2"] = b"after the wipe"
        assert rows_of(table.cold_dataset()) == live


def test_a_dataset_shows_what_reads_of_the_table_show(tmp_path: Path) -> None:
    """Random writes, deletes, wipes and sinks: where nothing is in the storage tier, both show the same."""
    seed = 20
    print("seed", seed)
    choose = random.Random(seed)
    with tiers_in_thread(tmp_path, seed=seed) as tiers:
        table = tiers.table()
        written: Rows = {}
        in_storage: set[tuple[str, int, bytes]] = set()
        for _ in range(8):
            for _ in range(25):
                owner, at, item_id = choose.choice(OWNERS), choose.randrange(60) * STEP, choose.choice([b"", b"a"])
                kind = choose.random()
                if kind < 0.75:
                    written[owner, at, item_id] = b"%d" % choose.randrange(1 << 30)
                    table.put(owner, at, written[owner, at, item_id], id=item_id)
                    in_storage.add((owner, at, item_id))
                elif kind < 0.97:
                    table.delete(owner, at, id=item_id)
                    written.pop((owner, at, item_id), None)
                else:
                    table.delete_timeline(owner)
                    written = {place: value for place, value in written.items() if place[0] != owner}
            expected = {place: value for place, value in written.items() if place not in in_storage}
            assert rows_of(table.cold_dataset()) == expected
            before = choose.randrange(10, 70) * STEP
            for _ in range(3):  # a replica may not have heard yet that an entry was chosen
                tiers.sink(before=before)
            in_storage = {place for place in in_storage & written.keys() if place[1] >= before}
            shown = rows_of(table.cold_dataset())
            assert shown == {place: value for place, value in written.items() if place not in in_storage}
        for owner in OWNERS:
            items = {(owner, item.timestamp, item.id): item.value for item in table.iterate(owner)}
            assert items == {place: value for place, value in written.items() if place[0] == owner}


def test_what_was_acknowledged_shows_whichever_replica_did_not_hear_of_it(tmp_path: Path) -> None:
    with tiers_in_thread(tmp_path) as tiers:
        table, network = tiers.table(), tiers.tiers.network
        written = fill(tiers)
        tiers.sink_all(len(written))
        wait_until_evicted(tiers, len(written))
        nodes = ["storage-0-0", "storage-0-1", "storage-0-2"]
        for turn, deaf in enumerate(nodes):
            others = [node for node in nodes if node != deaf]
            for other in others:
                tiers.thread.run(_called(partial(network.cut, deaf, other)))
            owner = OWNERS[turn]
            table.delete(owner, 0, id=b"id0")
            table.delete_timeline(OWNERS[-1 - turn])
            written = {place: value for place, value in written.items() if place[0] != OWNERS[-1 - turn]}
            written.pop((owner, 0, b"id0"))
            for away in others:  # it is asked last, so the deaf one is of the majority
                tiers.thread.run(_called(partial(tiers.tiers.client.view.suspect, away)))
                assert rows_of(table.cold_dataset()) == written, (deaf, away)
                tiers.thread.run(_called(partial(tiers.tiers.client.view.trust, away)))
            tiers.thread.run(_called(network.heal))


async def _called(what: Any) -> None:
    what()


def test_expired_rows_do_not_show(tmp_path: Path) -> None:
    policy = TablePolicy(per_second=1_000_000, cold_after=DAY_US, window=10 * DAY_US, retention=100 * DAY_US)
    with tiers_in_thread(tmp_path, tables={"t": policy}) as tiers:
        table = tiers.table()
        first = NOW_US - 95 * DAY_US
        items = [(owner, first + at * DAY_US, b"%d" % at) for owner in OWNERS for at in range(90)]
        table.put_many(items)
        tiers.sink_all(len(items))
        assert len(rows_of(table.cold_dataset())) == len(items)
        later = NOW_US + 27 * DAY_US
        table.put(OWNERS[0], NOW_US - DAY_US, b"something to sink")
        tiers.sink(now_us=later)
        horizon = later - policy.retention
        shown = rows_of(table.cold_dataset())
        kept = {timestamp for _, timestamp, _ in shown}
        assert min(kept) >= horizon, "no expired row shows, also not of a block that has others"
        expected = {timestamp for _, timestamp, _ in items if timestamp >= horizon}
        assert expected <= kept


def test_filters_columns_threads_and_counts_are_those_of_arrow(tmp_path: Path) -> None:
    with tiers_in_thread(tmp_path) as tiers:
        written = fill(tiers)
        tiers.sink_all(len(written))
        table = tiers.table()
        data, source = small_fragments(tiers)
        dataset = open_dataset("t", data.fragments, data.shape, source.read)
        assert len(data.fragments) > 8
        assert dataset.count_rows() == len(written)
        young = pc.field("timestamp") >= 35 * STEP
        assert rows_of(dataset, filter=young) == {p: v for p, v in written.items() if p[1] >= 35 * STEP}
        one = dataset.to_table(
            filter=(pc.field("owner") == b"owner-3") & young, columns=["timestamp"], use_threads=False
        )
        assert one.column_names == ["timestamp"]
        assert sorted(one["timestamp"].to_pylist()) == [at * STEP for at in range(35, EACH)]
        assert dataset.head(5).num_rows == 5
        assert table.cold_dataset().schema.names == ["owner", "timestamp", "id", "value", "version", "written"]


def small_fragments(tiers: TiersInThread, **more: Any) -> tuple[LiveData, BlockSource]:
    """The live data of the table in many fragments, and a reader that counts what it reads."""
    table = tiers.table().asynchronous
    settings = LookSettings(fragment_bytes=4_000)
    data = tiers.store.run(live_data_of(table, text=False, times=False, settings=settings))
    return data, BlockSource(table.store.view, table.store.carrier, tiers.store.run, b"t", **more)


def test_a_filter_on_time_reads_no_block_of_another_time(tmp_path: Path) -> None:
    with tiers_in_thread(tmp_path) as tiers:
        written = fill(tiers)
        tiers.sink_all(len(written))
        data, source = small_fragments(tiers)
        dataset = open_dataset("t", data.fragments, data.shape, source.read)
        late = 38 * STEP
        assert rows_of(dataset, filter=pc.field("timestamp") >= late) == {
            p: v for p, v in written.items() if p[1] >= late
        }
        read = source.read_in_place + source.read_from_nodes
        wanted = [block for f in data.fragments if f.newest >= late for block in f.blocks()]
        every = [block for f in data.fragments for block in f.blocks()]
        assert read == len(wanted) < len(every) / 2


def test_duckdb_and_polars_read_a_dataset_in_place(tmp_path: Path) -> None:
    with tiers_in_thread(tmp_path) as tiers:
        written = fill(tiers)
        tiers.sink_all(len(written))
        table = tiers.table()
        table.delete(OWNERS[0], 0, id=b"id0")
        cold = table.cold_dataset(text=True, times=True)
        assert duckdb.execute("select count(*), count(distinct owner) from cold").fetchall() == [
            (len(written) - 1, len(OWNERS))
        ]
        query = "select count(*) from cold where owner = 'owner-1' and timestamp < make_timestamptz(?)"
        assert duckdb.execute(query, [10 * STEP]).fetchall() == [(10,)]
        lazy = pl.scan_pyarrow_dataset(cold)
        per_owner = lazy.group_by("owner").agg(pl.len()).sort("owner").collect()
        assert per_owner["len"].to_list() == [EACH - (owner == OWNERS[0]) for owner in sorted(OWNERS)]
        empty = tiers.table().cold_dataset().filter(pc.field("timestamp") < 0)
        assert empty.count_rows() == 0


def test_columns_can_be_text_and_times_where_the_table_allows_it(tmp_path: Path) -> None:
    odd = TablePolicy(per_second=7, cold_after=10, window=100)
    seconds = TablePolicy(per_second=1, cold_after=10, window=100)
    with tiers_in_thread(tmp_path, tables={"t": POLICY, "odd": odd, "s": seconds}) as tiers:
        with pytest.raises(InvalidRequest, match="7 units"):
            tiers.table("odd").cold_dataset(times=True)
        tiers.table("s").put("näme", 1_000, b"x")
        tiers.sink_all(1, "s")
        found = tiers.table("s").cold_dataset(text=True, times=True).to_table()
        assert found.schema.field("timestamp").type == pa.timestamp("s", tz="UTC")
        assert found.schema.field("written").type == pa.timestamp("us", tz="UTC")
        assert found["owner"].to_pylist() == ["näme"]
        tiers.table("s").put(b"\xff\xfe", 1_000, b"x")
        tiers.sink_all(1, "s")
        with pytest.raises(InvalidRequest, match="no UTF-8"):
            tiers.table("s").cold_dataset(text=True).to_table()
        assert tiers.table("s").cold_dataset().count_rows() == 2


def test_a_dataset_whose_files_were_replaced_says_that_it_is_to_be_taken_again(tmp_path: Path) -> None:
    with tiers_in_thread(tmp_path) as tiers:
        written = fill(tiers)
        tiers.sink_all(len(written))
        table = tiers.table()
        old = table.cold_dataset()
        files = set(tiers.tiers.files())
        for owner in OWNERS:
            table.put_many([(owner, at * STEP, b"again", b"id%d" % (at % 3)) for at in range(EACH)])
        tiers.sink_all(len(written))
        ends = 40
        while files & set(tiers.tiers.files()):
            tiers.sink()
            ends -= 1
            assert ends, "the replaced files stay"
        with pytest.raises(Unavailable, match="take the dataset again"):
            old.to_table()
        assert set(rows_of(table.cold_dataset()).values()) == {b"again"}


def test_damaged_copies_are_passed_over_and_if_all_are_damaged_the_error_names_file_and_block(tmp_path: Path) -> None:
    with tiers_in_thread(tmp_path) as tiers:
        written = fill(tiers)
        tiers.sink_all(len(written))
        for node in tiers.tiers.cold[1:]:
            tiers.tiers.network.kill(node.name)  # so that nobody heals
        data, source = small_fragments(tiers)
        block = data.fragments[0].blocks()[0]
        copies = [path for replica in range(3) for path in tiers.tiers.files(replica) if path.name == block.file]
        assert len(copies) == 3
        whole = copies[0].read_bytes()
        for path in copies[:2]:
            damage(path, block.offset + block.length // 2)
        tiers.tiers.network.register("cold-0-1", tiers.tiers.cold[1].handle)
        tiers.tiers.network.register("cold-0-2", tiers.tiers.cold[2].handle)
        dataset = open_dataset("t", data.fragments, data.shape, source.read)
        assert rows_of(dataset) == written, "the third copy is good"
        assert tiers.tiers.files(2) and whole == copies[2].read_bytes()

        data, source = small_fragments(tiers)
        for name in ("cold-0-0", "cold-0-1", "cold-0-2"):
            tiers.tiers.network.kill(name)
        for path in copies:
            damage(path, block.offset + block.length // 2, bit=3)
        for node in tiers.tiers.cold:
            tiers.tiers.network.register(node.name, node.handle)
        with pytest.raises(Corrupt, match=f"{block.file} at {block.offset}"):
            open_dataset("t", data.fragments, data.shape, source.read).to_table()


def damage(path: Path, offset: int, *, bit: int = 0) -> None:
    path.chmod(0o600)
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def test_a_machine_without_copies_reads_from_the_cold_nodes_and_goes_on_when_one_dies(tmp_path: Path) -> None:
    with tiers_in_thread(tmp_path) as tiers:
        written = fill(tiers)
        tiers.sink_all(len(written))
        data, near = small_fragments(tiers)
        assert rows_of(open_dataset("t", data.fragments, data.shape, near.read)) == written
        assert near.read_from_nodes == 0
        data, far = small_fragments(tiers, host="another machine")
        assert rows_of(open_dataset("t", data.fragments, data.shape, far.read)) == written
        assert far.read_in_place == 0
        tiers.thread.run(_called(partial(tiers.tiers.network.kill, "cold-0-1")))
        assert rows_of(open_dataset("t", data.fragments, data.shape, far.read)) == written


def test_a_dataset_under_asyncio_is_read_in_threads(tmp_path: Path) -> None:
    async def body() -> None:
        async with open_tiers(tmp_path) as tiers:
            table = tiers.client.table("t")
            await table.put_many([("alice", at * STEP, b"%d" % at) for at in range(20)])
            sunk = 0
            while sunk < 20:
                sunk += (await tiers.sink()).rows
            dataset = await table.cold_dataset()
            found = await asyncio.to_thread(dataset.to_table)
            assert sorted(found["timestamp"].to_pylist()) == [at * STEP for at in range(20)]
            with pytest.raises(InvalidRequest, match=r"timetier\.connect"):
                await table.cold_ray_dataset()

    asyncio.run(asyncio.wait_for(body(), 60))


def test_reading_on_the_thread_of_the_stores_own_loop_is_an_error_and_no_deadlock() -> None:
    async def nothing() -> int:
        return 1

    async def body() -> None:
        loop = asyncio.get_running_loop()
        assert await asyncio.to_thread(run_from_thread, loop, nothing()) == 1
        with pytest.raises(InvalidRequest, match="to_thread"):
            run_from_thread(loop, nothing(), patience_s=0.05)

    asyncio.run(body())
    ended = asyncio.new_event_loop()
    ended.close()
    with pytest.raises(InvalidRequest, match="closed"):
        run_from_thread(ended, nothing())


def test_a_dataset_is_read_only_and_says_that_it_does_not_travel(tmp_path: Path) -> None:
    import pickle

    with tiers_in_thread(tmp_path) as tiers:
        dataset = tiers.table().cold_dataset()
        with pytest.raises(InvalidRequest, match="read-only"):
            dataset.filesystem.delete_file("t/0000000.arrow")
        with pytest.raises(InvalidRequest, match="cold_ray_dataset"):
            pickle.dumps(dataset.filesystem)


def test_datasets_are_whole_and_right_while_sinks_and_writes_go_on(tmp_path: Path) -> None:
    """Each dataset has all that had sunk before it was taken, as it was then or later, and nothing twice."""
    seed = 7
    print("seed", seed)
    choose = random.Random(seed)
    with tiers_in_thread(tmp_path, seed=seed) as tiers:
        table = tiers.table()
        written = fill(tiers)
        tiers.sink_all(len(written))
        keep = SMALL_BLOCKS.__class__(block_rows=32, file_bytes=1 << 15, orphan_grace_s=600)
        history: dict[tuple[str, int, bytes], list[bytes]] = {place: [value] for place, value in written.items()}
        stop = threading.Event()
        failures: list[BaseException] = []

        def write_late() -> None:
            number = 0
            try:
                while not stop.is_set():
                    owner, at = choose.choice(OWNERS[:6]), choose.randrange(EACH)
                    place = owner, at * STEP, b"id%d" % (at % 3)
                    number += 1
                    history[place].append(b"late %d" % number)
                    table.put(owner, place[1], b"late %d" % number, id=place[2])
            except BaseException as error:
                failures.append(error)

        def sink() -> None:
            try:
                while not stop.is_set():
                    tiers.sink(settings=keep)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=write_late), threading.Thread(target=sink)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(12):
                known = {place: len(values) for place, values in history.items()}
                shown = rows_of(table.cold_dataset())
                for place, value in shown.items():
                    # The write before the last one known was acknowledged: what is older may not show.
                    assert value in history[place][max(0, known[place] - 2) :], (place, value)
                for place in written:
                    assert place in shown or place[0] in OWNERS[:6], f"{place} was never written again, and is missing"
        finally:
            stop.set()
            for thread in threads:
                thread.join(30)
        assert not failures, failures
        tiers.sink_all(0)
        for _ in range(3):
            tiers.sink(settings=keep)
        assert rows_of(table.cold_dataset()) == {place: values[-1] for place, values in history.items()}


def test_what_a_dataset_decodes_is_let_go_of_as_it_is_read(tmp_path: Path) -> None:
    """A scan holds a few fragments at a time, however many there are."""
    with tiers_in_thread(tmp_path) as tiers:
        table = tiers.table()
        choose = random.Random(3)
        size = 0
        for owner in OWNERS:
            for first in range(0, 200, 50):
                items = [(owner, at * STEP, choose.randbytes(4_000)) for at in range(first, first + 50)]
                table.put_many(items)
                size += 4_000 * len(items)
        tiers.sink_all(200 * len(OWNERS))
        settings = LookSettings(fragment_bytes=200_000)
        make = dataset_of(table.asynchronous, text=False, times=False, run=tiers.store.run, settings=settings)
        dataset = tiers.store.run(make)
        before, most, rows = pa.total_allocated_bytes(), 0, 0
        for batch in dataset.to_batches(fragment_readahead=1, batch_readahead=1):
            rows += batch.num_rows
            del batch
            most = max(most, pa.total_allocated_bytes() - before)
        assert rows == 200 * len(OWNERS)
        assert most < size / 3, f"{most} of {size} bytes"
