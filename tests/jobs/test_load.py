"""The file loader: every row of a file is loaded once, or accounted for with a reason."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.ipc
import pyarrow.parquet
import pytest
from load_model import COLUMNS, MemoryTable, load_path, write_table
from timetier.cluster.client.items import PutLike
from timetier.cluster.errors import InvalidRequest, OutcomeUnknown, TooLarge, Unavailable, WriteManyError
from timetier.jobs import load as load_module
from timetier.jobs.load import load_file
from timetier.jobs.rejects import Rejects
from timetier.jobs.rows import Columns, read_rows
from timetier.jobs.sample import SAMPLE, SAMPLE_COLUMNS, SAMPLE_OWNERS, SAMPLE_ROWS
from timetier.jobs.sources import open_source

FORMATS = ["rows.parquet", "rows.arrow", "rows.arrows", "rows.csv", "rows.jsonl"]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_items(tmp_path: Path, name: str) -> None:
    rows = {
        "what": ["x", 'quote " comma , line\nend', "ü"],
        "who": ["ann", "bob", "ann"],
        "at": [3, 2, -1],
        "id": ["a", "", "b\x00c"],
        "more": ["1", "2", "3"],
    }
    loaded = load_path(write_table(tmp_path, pa.table(rows), name))
    assert loaded.items == {
        (b"ann", 3, b"a"): b'{"what":"x","more":"1"}',
        (b"bob", 2, b""): b'{"what":"quote \\" comma , line\\nend","more":"2"}',
        (b"ann", -1, b"b\x00c"): '{"what":"ü","more":"3"}'.encode(),
    }
    assert (loaded.report.rows, loaded.report.loaded, loaded.report.timelines) == (3, 3, 2)


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_without_rows_loads_nothing(tmp_path: Path, name: str) -> None:
    schema = pa.schema({"who": pa.string(), "at": pa.int64(), "id": pa.string()})
    assert load_path(write_table(tmp_path, schema.empty_table(), name)).report.rows == 0


@pytest.mark.parametrize("name", FORMATS)
def test_a_wrong_column_name_is_answered_with_the_ones_there_are(tmp_path: Path, name: str) -> None:
    path = write_table(tmp_path, pa.table({"who": ["a"], "when": ["1"]}), name)
    table = MemoryTable()
    with pytest.raises(InvalidRequest, match="time='at' is no column of the file: it has who, when"):
        load_file(table, path, Columns("who", "at"))
    with pytest.raises(InvalidRequest, match="id='x' is no column of the file: it has who, when"):
        load_file(table, path, Columns("who", "when", ("x",)))
    assert not table.items


# ---------------------------------------------------------------- text formats


def test_a_bad_csv_record_is_rejected_and_the_rest_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(
        b"who,at,id,v\n"
        b"a,1,x,fine\n"
        b"a,2,x\n"
        b"a,3,x,one,more\n"
        b"\n"
        b'a,4,x,"two\nlines"\n'
        b"a,5,x,\xff\n"
        b'a,6,x,"bad" quote\n'
        b"a,7,x,fine\n"
        b'a,8,x,"never closed\n'
        b"a,9,x,fine\n"
        b"a,10,x,last"
    )
    loaded = load_path(path)
    assert [at for _, at, _ in loaded.items] == [1, 4, 7, 9, 10]
    assert loaded.items[b"a", 4, b"x"] == b'{"v":"two\\nlines"}'
    assert loaded.reasons == [
        (3, "wrong number of fields: 3 instead of 4"),
        (4, "wrong number of fields: 5 instead of 4"),
        (8, "not UTF-8"),
        (9, "malformed CSV: ',' expected after '\"'"),
        (11, "malformed CSV: unexpected end of data"),
    ]
    assert loaded.rejects[0]["record"] == "a,2,x"


def test_a_type_that_changes_within_a_csv_file_does_not_end_the_load(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    lines = [f"a,{number},x,{number if number < 30_000 else 'text'}\n" for number in range(40_000)]
    path.write_text("who,at,id,v\n" + "".join(lines))
    loaded = load_path(path)
    assert loaded.report.loaded == 40_000
    assert loaded.items[b"a", 5, b"x"] == b'{"v":"5"}'


def test_fields_of_csv_stay_text_exactly(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    path.write_text('\ufeffwho\tat\tid\tv\r\n007\t1\t01\t\r\n"8,"\t2\tNULL\t 1.50\r\n')
    loaded = load_path(path)
    assert loaded.items == {(b"007", 1, b"01"): b'{"v":""}', (b"8,", 2, b"NULL"): b'{"v":" 1.50"}'}


def test_an_endless_line_is_rejected_in_bounded_memory(tmp_path: Path) -> None:
    endless = "z" * (40 << 20)
    csv_path, json_path = tmp_path / "rows.csv", tmp_path / "rows.jsonl"
    csv_path.write_text(f"who,at,id,v\na,1,x,v\na,2,x,{endless}\na,3,x,v\n")
    json_path.write_text(f'{{"who":"a","at":1,"id":"x"}}\n{{"v":"{endless}"}}\n{{"who":"a","at":3,"id":"x"}}\n')
    del endless
    for path in (csv_path, json_path):
        tracemalloc.start()
        loaded = load_path(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert [at for _, at, _ in loaded.items] == [1, 3]
        ((row, reason),) = loaded.reasons
        assert row == len(loaded.items) + (path == csv_path)
        assert "longer than 4 MiB" in reason
        assert peak < 30 << 20, peak


def test_a_bad_json_line_is_rejected_and_the_rest_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"who": "a", "at": 1, "id": "x", "v": {"deep": [1, 2.50]}, "big": 123456789012345678901}\n'
        b'{"who": "a", "at": 2,\n'
        b"[1]\n"
        b"\n"
        b'{"who": "a", "at": 3, "id": "\xff"}\n'
        b'{"who": "a", "at": 1e999, "id": "x"}\n'
        b'{"who": {"a": 1}, "at": 4}\n'
        b'{"who": "a", "at": true}\n'
        b'{"at": 5}\n'
        b'{"who": 12, "at": "1970-01-01T00:00:00.000006Z", "other": null}'
    )
    loaded = load_path(path)
    assert loaded.items == {
        (b"a", 1, b"x"): b'{"v":{"deep":[1,2.5]},"big":123456789012345678901}',
        (b"12", 6, b""): b'{"other":null}',
    }
    assert [(row, reason.split(":")[0]) for row, reason in loaded.reasons] == [
        (2, "malformed JSON"),
        (3, "not a JSON object"),
        (5, "malformed JSON"),
        (6, "malformed JSON"),
        (7, "owner is neither text, bytes nor a whole number"),
        (8, "time can't be read"),
        (9, "owner is missing"),
    ]


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow", "rows.arrows"])
def test_a_truncated_file_is_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    path = write_table(tmp_path, pa.table({"who": ["a"] * 5, "at": range(5), "id": ["x"] * 5}), name)
    path.write_bytes(path.read_bytes()[:-40])
    table = MemoryTable()
    with pytest.raises(InvalidRequest, match="can't be read as"):
        load_file(table, path, COLUMNS)
    assert not table.items


def test_a_file_that_can_not_be_read_is_answered_with_what_to_do(tmp_path: Path) -> None:
    table = MemoryTable()
    with pytest.raises(InvalidRequest, match="is no file"):
        load_file(table, tmp_path / "none.csv", COLUMNS)
    (tmp_path / "rows.txt").write_text("who,at,id\na,1,x\n")
    with pytest.raises(InvalidRequest, match=r"name it with --format, one of parquet, arrow, csv, tsv, jsonl"):
        load_file(table, tmp_path / "rows.txt", COLUMNS)
    with pytest.raises(InvalidRequest, match="format='xml' is not known"):
        load_file(table, tmp_path / "rows.txt", COLUMNS, file_format="xml")
    assert load_file(table, tmp_path / "rows.txt", COLUMNS, file_format="csv").loaded == 1
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(InvalidRequest, match="is empty: a CSV file begins with a line that names its columns"):
        load_file(table, tmp_path / "empty.csv", COLUMNS)
    (tmp_path / "twice.csv").write_text("who,at,id,who\n")
    with pytest.raises(InvalidRequest, match="more than one column is named 'who'"):
        load_file(table, tmp_path / "twice.csv", COLUMNS)
    with pytest.raises(InvalidRequest, match="is the file to load"):
        load_file(table, tmp_path / "rows.txt", COLUMNS, file_format="csv", rejects=tmp_path / "rows.txt")
    with pytest.raises(InvalidRequest, match="can't be written"):
        load_file(table, tmp_path / "rows.txt", COLUMNS, rejects=tmp_path / "nowhere" / "rejects")


# ---------------------------------------------------------------- repeated keys


@pytest.mark.parametrize("count", [10, 20_000])  # 20,000: repeats lie in one chunk and in different ones
@pytest.mark.parametrize("keep_bytes", [0, 1 << 30])
def test_the_last_row_of_a_key_counts_and_its_repeats_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep_bytes: int, count: int
) -> None:
    monkeypatch.setattr(load_module, "KEEP_BYTES", keep_bytes)
    keys = [*range(count), 5, 6, 6, 7, 8, 8]
    values = [*["first"] * count, "second", "second", "third", "first", "other", "first"]
    rows = {"who": [f"o{key % 7}" for key in keys], "at": keys, "id": ["x"] * len(keys), "v": values}
    path = write_table(tmp_path, pa.table(rows), "rows.parquet")
    table = MemoryTable()
    report = load_file(table, path, COLUMNS, batch_items=500)
    assert (report.rows, report.loaded, report.duplicates, report.overwritten) == (count + 6, count, 1, 5)
    assert report.conflicting_keys == 3
    assert [entry["row"] for entry in report.conflicts] == [count + 1, count + 2, count + 3, count + 5, count + 6]
    assert report.conflicts[0] == {"row": count + 1, "owner": "o5", "timestamp": 5, "id": "x"}
    changed = {key: value for key, value in table.items.items() if value != b'{"v":"first"}'}
    assert changed == {(b"o5", 5, b"x"): b'{"v":"second"}', (b"o6", 6, b"x"): b'{"v":"third"}'}
    assert table.puts == count  # the value of a row that does not count is never written

    again = load_file(table, path, COLUMNS)
    assert (again.loaded, again.unchanged, table.puts) == (0, count, count)


def test_loading_again_writes_only_what_changed(tmp_path: Path) -> None:
    table = MemoryTable()
    rows: dict[str, list[Any]] = {"who": ["a", "b", "c"], "at": [1, 2, 3], "id": [""] * 3, "v": ["x", "y", "z"]}
    load_file(table, write_table(tmp_path, pa.table(rows), "rows.parquet"), COLUMNS)
    rows["v"][1] = "other"
    report = load_file(table, write_table(tmp_path, pa.table(rows), "rows.parquet"), COLUMNS)
    assert (report.loaded, report.unchanged, table.puts) == (1, 2, 4)
    assert table.items[b"b", 2, b""] == b'{"v":"other"}'


def test_a_file_that_is_changed_while_it_is_loaded_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_module, "KEEP_BYTES", 0)
    rows = {"who": ["a"] * 3, "at": [1, 2, 2], "id": [""] * 3, "v": ["x", "y", "z"]}
    path = write_table(tmp_path, pa.table(rows), "rows.jsonl")
    changed = [path.read_text().replace('"at": 1', '"at": 9'), path.read_text().replace('"x"', '"longer"')]
    for text in changed:
        write_table(tmp_path, pa.table(rows), "rows.jsonl")

        def change(done: int, total: int | None, text: str = text) -> None:
            path.write_text(text)

        with pytest.raises(InvalidRequest, match="was changed while it was loaded: load it again"):
            load_file(MemoryTable(), path, COLUMNS, progress=change)


# ---------------------------------------------------------------- a store that fails


def ten_rows(folder: Path) -> Path:
    rows = {"who": [f"o{n}" for n in range(10)], "at": range(10), "id": [""] * 10, "v": ["v"] * 10}
    return write_table(folder, pa.table(rows), "rows.parquet")


def test_what_the_store_refuses_is_rejected_and_what_it_could_not_do_is_sent_again(tmp_path: Path) -> None:
    path = ten_rows(tmp_path)
    table = MemoryTable()
    calls = 0

    def fail(items: Sequence[PutLike]) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise Unavailable("no majority")
        if calls == 2:
            results: list[Any] = []
            for item in items:
                if item[0] == b"o3":
                    results.append(TooLarge("entry is too large", limit=1))
                elif item[0] in (b"o4", b"o5"):
                    results.append(OutcomeUnknown("no answer"))
                else:
                    table.put(item)
                    results.append(1)
            raise WriteManyError.of(results)

    table.before_put = fail
    rejects = tmp_path / "rejects.jsonl"
    report = load_file(table, path, COLUMNS, rejects=rejects)
    assert (report.rows, report.loaded, report.rejected) == (10, 9, 1)
    assert sorted(table.items) == [(b"o%d" % n, n, b"") for n in range(10) if n != 3]
    assert calls == 3
    assert json.loads(rejects.read_text()) == {
        "row": 4,
        "reason": "refused by the store (TooLarge): entry is too large",
        "record": {"owner": "o3", "timestamp": 3, "id": "", "value": '{"v":"v"}'},
    }
    assert report.reasons == {"refused by the store (TooLarge)": 1}


def test_a_store_that_stays_away_ends_the_load_and_the_next_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_module, "RETRY_S", 0.2)
    path = ten_rows(tmp_path)
    table = MemoryTable()

    def fail(items: Sequence[PutLike]) -> None:
        if any(item[1] >= 5 for item in items):
            raise Unavailable("no majority")

    table.before_put = fail
    with pytest.raises(Unavailable, match=r"of 10 items or more were loaded: no majority\. Load the file again"):
        load_file(table, path, COLUMNS, batch_items=1)
    done = len(table.items)
    assert 5 <= done < 10
    table.before_put = lambda items: None
    report = load_file(table, path, COLUMNS)
    assert (report.unchanged, report.loaded) == (done, 10 - done)
    assert table.puts == 10


def test_calls_stay_below_the_limits_of_a_batch(tmp_path: Path) -> None:
    count = 60
    rows = {"who": ["a"] * count, "at": range(count), "id": [""] * count, "v": ["x" * 1_000_000] * count}
    table = MemoryTable()
    report = load_file(table, write_table(tmp_path, pa.table(rows), "rows.parquet"), COLUMNS, batch_items=10_000)
    assert report.loaded == len(table.items) == count
    assert table.largest_call[1] < 16 << 20
    small = load_file(MemoryTable(), SAMPLE, SAMPLE_COLUMNS, batch_items=10_000)
    assert small.loaded == SAMPLE_ROWS
    with pytest.raises(InvalidRequest, match="batch_items=10001: pass 1 to 10000"):
        load_file(table, SAMPLE, SAMPLE_COLUMNS, batch_items=10_001)


# ---------------------------------------------------------------- the sample


def test_the_whole_sample_is_loaded_once_and_its_keys_are_unique() -> None:
    table = MemoryTable()
    steps: list[tuple[int, int | None]] = []
    report = load_file(table, SAMPLE, SAMPLE_COLUMNS, progress=lambda done, total: steps.append((done, total)))
    assert (report.rows, report.loaded, report.timelines) == (SAMPLE_ROWS, SAMPLE_ROWS, SAMPLE_OWNERS)
    assert (report.rejected, report.duplicates, report.conflicting_keys) == (0, 0, 0)
    assert table.largest_call[0] == 5_000
    assert steps[-1] == (SAMPLE_ROWS, SAMPLE_ROWS)
    source = pa.parquet.read_table(SAMPLE).to_pylist()
    assert len(table.items) == len(source)
    for row in source[:: SAMPLE_ROWS // 500]:
        key = row["author"].encode(), row["timestamp_us"], f"{row['commit']}\x1f{row['path']}".encode()
        assert json.loads(table.items[key]) == {"repository": row["repository"], "change": row["change"]}

    again = load_file(table, SAMPLE, SAMPLE_COLUMNS)
    assert (again.loaded, again.unchanged, table.puts) == (0, SAMPLE_ROWS, SAMPLE_ROWS)


def test_the_items_of_a_file_are_read_in_chunks_of_bounded_size() -> None:
    with Rejects() as rejects:
        sizes = [len(batch) for batch in read_rows(open_source(SAMPLE, rejects), SAMPLE_COLUMNS, 10**6, rejects)]
    assert sum(sizes) == SAMPLE_ROWS
    assert max(sizes) <= 8_192
