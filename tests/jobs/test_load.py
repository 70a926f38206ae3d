"""The file loader: every row of a file is loaded once, or accounted for with a reason."""

from __future__ import annotations

import json
import threading
import tracemalloc
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.csv
import pyarrow.ipc
import pyarrow.parquet
import pytest
from timetier.cluster.client.items import AddressLike, Item, PutLike
from timetier.cluster.errors import InvalidRequest, OutcomeUnknown, TooLarge, Unavailable, WriteManyError
from timetier.cluster.topology import TablePolicy
from timetier.jobs import load as load_module
from timetier.jobs.load import LoadReport, load_file
from timetier.jobs.rejects import Rejects
from timetier.jobs.rows import Columns, read_rows, time_in_units
from timetier.jobs.sample import SAMPLE, SAMPLE_COLUMNS, SAMPLE_OWNERS, SAMPLE_ROWS
from timetier.jobs.sources import open_source

Key = tuple[bytes, int, bytes]
COLUMNS = Columns("who", "at", ("id",))


class MemoryTable:
    """Keeps items in a dict, and lets a test make calls fail."""

    def __init__(self, per_second: int = 1_000_000) -> None:
        self.policy = TablePolicy(per_second, 0, 1)
        self.items: dict[Key, bytes] = {}
        self.puts = 0
        self.largest_call = (0, 0)
        self.before_put: Callable[[Sequence[PutLike]], None] = lambda items: None
        self._lock = threading.Lock()

    def put_many(self, items: Sequence[PutLike]) -> list[int]:
        with self._lock:
            sizes = [len(item[0]) + len(item[2]) for item in items]
            self.largest_call = max(self.largest_call[0], len(items)), max(self.largest_call[1], sum(sizes))
            self.before_put(items)
            for item in items:
                self.put(item)
            return [1] * len(items)

    def put(self, item: PutLike) -> None:
        owner, timestamp, value, item_id = (*item, b"")[:4]
        assert isinstance(owner, bytes)
        assert isinstance(item_id, bytes)
        self.items[owner, timestamp, item_id] = value
        self.puts += 1

    def get_many(self, keys: Sequence[AddressLike]) -> list[Item | None]:
        with self._lock:
            found = [self.items.get(cast(Key, key)) for key in keys]
        return [None if value is None else Item(0, value, b"", 1, 0) for value in found]


def accounted(report: LoadReport) -> int:
    return report.loaded + report.unchanged + report.duplicates + report.overwritten + report.rejected


def write_table(folder: Path, table: pa.Table, name: str) -> Path:
    path = folder / name
    if name.endswith(".parquet"):
        pa.parquet.write_table(table, path)
    elif name.endswith(".arrow"):
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    elif name.endswith(".arrows"):
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    elif name.endswith(".csv"):
        pa.csv.write_csv(table, path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    return path


def load_rows(folder: Path, rows: dict[str, Any], columns: Columns = COLUMNS, **options: Any) -> Loaded:
    return load_path(write_table(folder, pa.table(rows), "rows.parquet"), columns, **options)


class Loaded:
    def __init__(self, report: LoadReport, items: dict[Key, bytes], rejects: list[dict[str, Any]]) -> None:
        self.report = report
        self.items = items
        self.rejects = rejects
        self.reasons = [(entry["row"], entry["reason"]) for entry in rejects]
        assert accounted(report) == report.rows
        assert report.rejected == len(rejects)


def load_path(path: Path, columns: Columns = COLUMNS, *, per_second: int = 1_000_000, **options: Any) -> Loaded:
    table = MemoryTable(per_second)
    rejects = path.parent / "rejects.jsonl"
    report = load_file(table, path, columns, rejects=rejects, **options)
    return Loaded(report, table.items, [json.loads(line) for line in rejects.read_text().splitlines()])


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


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (pa.array(["a", "é"]), [b"a", "é".encode()]),
        (pa.array(["a", "b"], pa.large_string()), [b"a", b"b"]),
        (pa.array(["a", "b"], pa.string_view()), [b"a", b"b"]),
        (pa.array([b"a", b"\xff"]), [b"a", b"\xff"]),
        (pa.array([b"ab", b"cd"], pa.binary(2)), [b"ab", b"cd"]),
        (pa.array([-5, 2**63 - 1]), [b"-5", b"9223372036854775807"]),
        (pa.array([0, 2**64 - 1], pa.uint64()), [b"0", b"18446744073709551615"]),
        (pa.array(["a", "b"]).dictionary_encode(), [b"a", b"b"]),
        (pa.array([7, 8]).dictionary_encode(), [b"7", b"8"]),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_owners_and_ids_may_be_of_many_types(tmp_path: Path, array: pa.Array, expected: list[bytes]) -> None:
    path = tmp_path / "rows.arrow"
    table = pa.table({"who": array, "at": [1, 2], "id": array})
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)
    assert list(load_path(path).items) == [(name, at, name) for at, name in enumerate(expected, 1)]


US = 1_704_164_645_000_001  # 2024-01-02 03:04:05.000001 UTC
MOMENT = datetime(2024, 1, 2, 3, 4, 5, 1, UTC)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (pa.array([US], pa.int64()), US),
        (pa.array([7], pa.uint8()), 7),
        (pa.array([7], pa.uint64()), 7),
        (pa.array([7.0]), 7),
        (pa.array([Decimal("7.00")]), 7),
        (pa.array([MOMENT], pa.timestamp("us", "UTC")), US),
        (pa.array([MOMENT], pa.timestamp("us", "Asia/Tokyo")), US),
        (pa.array([MOMENT.replace(tzinfo=None)], pa.timestamp("us")), US),
        (pa.array([US * 1_000 + 999], pa.timestamp("ns")), US),
        (pa.array([-1], pa.timestamp("ns")), -1),
        (pa.array([-2], pa.timestamp("s")), -2_000_000),
        (pa.array([date(1970, 1, 2)]), 86_400_000_000),
        (pa.array([date(1969, 12, 31)], pa.date64()), -86_400_000_000),
        (pa.array(["2024-01-02T03:04:05.000001Z"]), US),
        (pa.array(["2024-01-02 03:04:05.000001"]), US),
        (pa.array(["2024-01-02T12:04:05.000001999+09:00"]), US),
        (pa.array(["1970-01-02"]), 86_400_000_000),
        (pa.array([" 12 "]), 12),
        (pa.array(["-12"]), -12),
        (pa.array(["2024"]).dictionary_encode(), 2024),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_times_of_many_types_become_the_tables_unit(tmp_path: Path, array: pa.Array, expected: int) -> None:
    loaded = load_rows(tmp_path, {"who": ["a"], "at": array, "id": ["x"]})
    assert list(loaded.items) == [(b"a", expected, b"x")]


@pytest.mark.parametrize(("per_second", "expected"), [(1, -1), (1_000, -1), (1_000_000, -1), (1_000_000_000, -1)])
def test_finer_times_are_cut_off_towards_the_past(per_second: int, expected: int) -> None:
    assert time_in_units("1969-12-31T23:59:59.999999999", per_second) == expected


def test_text_of_nanoseconds_is_exact_in_a_table_of_nanoseconds() -> None:
    assert time_in_units("2024-01-02T03:04:05.123456789Z", 10**9) == 1_704_164_645_123_456_789
    assert time_in_units("2024-01-02T03:04:05.1234567Z", 10**9) == 1_704_164_645_123_456_700


BAD_ROWS: dict[str, tuple[list[Any], list[Any], str]] = {
    "owner null": ([None], [1], "owner is missing"),
    "owner empty": ([""], [1], "owner is missing"),
    "owner long": (["ü" * 128], [1], "owner is longer than 255 bytes: 256 bytes"),
    "time null": (["a"], [None], "time is missing"),
    "time text": (["a"], ["soon"], "time can't be read: Invalid isoformat string: 'soon'"),
    "time date": (["a"], ["2023-02-29"], "time can't be read: day is out of range for month"),
    "time large": (["a"], [str(2**63)], "time can't be read: does not fit in 64 bits"),
    "time nan": (["a"], [float("nan")], "time can't be read: neither a whole number nor a date"),
    "time infinite": (["a"], [float("inf")], "time can't be read: neither a whole number nor a date"),
    "time broken": (["a"], [1.5], "time can't be read: neither a whole number nor a date"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
@pytest.mark.parametrize("as_json", [False, True])
def test_a_bad_owner_or_time_rejects_its_row_alone(tmp_path: Path, case: str, as_json: bool) -> None:
    owners, times, reason = BAD_ROWS[case]
    good = "7" if isinstance(times[0], str) else 7.0 if isinstance(times[0], float) else 7
    rows = {"who": ["x", *owners, "y"], "at": [good, *times, good], "id": ["1", "2", "3"], "n": [1, 2, 3]}
    if as_json and case in ("time nan", "time infinite"):  # JSON has no such numbers, so the line is not JSON at all
        reason = "malformed JSON"
    loaded = load_path(write_table(tmp_path, pa.table(rows), "rows.jsonl" if as_json else "rows.parquet"))
    assert list(loaded.items) == [(b"x", 7, b"1"), (b"y", 7, b"3")]
    ((row, text),) = loaded.reasons
    assert row == 2
    assert text.startswith(reason)
    assert sum(loaded.report.reasons.values()) == 1
    if reason != "malformed JSON":
        assert loaded.rejects[0]["record"]["n"] == 2


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl"])
def test_ids_that_are_too_long_or_ambiguous_are_rejected(tmp_path: Path, name: str) -> None:
    rows = {
        "who": ["a"] * 4,
        "at": [1, 2, 3, 4],
        "p": ["x" * 200, "a\x1fb", "a", None],
        "q": ["y" * 55, "c", "b\x1fc", "z"],
    }
    loaded = load_path(write_table(tmp_path, pa.table(rows), name), Columns("who", "at", ("p", "q")))
    assert loaded.reasons == [
        (1, "id is longer than 255 bytes: 256 bytes"),
        (2, "a part of the id holds the separator byte 0x1F"),
        (3, "a part of the id holds the separator byte 0x1F"),
    ]
    assert loaded.items == {(b"a", 4, b"\x1fz"): b"{}"}


def test_a_lone_id_may_hold_the_separator(tmp_path: Path) -> None:
    assert list(load_rows(tmp_path, {"who": ["a"], "at": [1], "id": ["x\x1fy"]}).items) == [(b"a", 1, b"x\x1fy")]


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl"])
def test_values_that_are_too_large_are_rejected(tmp_path: Path, name: str) -> None:
    fits = (1 << 20) - len('{"v":""}')
    rows = {"who": ["a"] * 2, "at": [1, 2], "id": ["", ""], "v": ["x" * fits, "x" * (fits + 1)]}
    loaded = load_path(write_table(tmp_path, pa.table(rows), name))
    assert [len(value) for value in loaded.items.values()] == [1 << 20]
    assert loaded.reasons == [(2, "value is longer than 1048576 bytes: 1048577 bytes")]


def test_numbers_that_json_does_not_have_are_rejected_also_when_nested(tmp_path: Path) -> None:
    nan = float("nan")
    rows = {"who": ["a"] * 4, "at": [1, 2, 3, 4], "id": [""] * 4, "f": [1.5, nan, None, 2.0]}
    flat = load_rows(tmp_path, rows)
    assert list(flat.items.values()) == [b'{"f":1.5}', b'{"f":null}', b'{"f":2.0}']
    assert flat.reasons == [(2, "a number is not finite: JSON has no NaN and no infinity")]
    nested = load_rows(tmp_path, {**rows, "f": [{"g": [1.5]}, {"g": [nan]}, None, {"g": []}]})
    assert list(nested.items.values()) == [b'{"f":{"g":[1.5]}}', b'{"f":null}', b'{"f":{"g":[]}}']
    assert nested.reasons == flat.reasons


def test_values_keep_the_types_of_the_schema_in_its_order(tmp_path: Path) -> None:
    rows = {
        "z": [1],
        "who": ["a"],
        "at": [1],
        "flag": [True],
        "id": ["i"],
        "kind": pa.array(["k"]).dictionary_encode(),
        "none": pa.nulls(1),
        "raw": [b"\xff"],
        "when": pa.array([US * 1_000 + 7], pa.timestamp("ns", "Europe/Berlin")),
        "day": [date(2024, 1, 2)],
        "list": [[1, None]],
    }
    (value,) = load_rows(tmp_path, rows).items.values()
    assert value == (
        b'{"z":1,"flag":true,"kind":"k","none":null,"raw":"/w==","when":"2024-01-02 03:04:05.000001007Z",'
        b'"day":"2024-01-02","list":[1,null]}'
    )


def test_text_that_is_not_utf8_rejects_its_row(tmp_path: Path) -> None:
    text = pa.Array.from_buffers(pa.string(), 3, pa.array([b"ok", b"\xff", b"fine"]).buffers())
    loaded = load_rows(tmp_path, {"who": ["a"] * 3, "at": [1, 2, 3], "id": [""] * 3, "v": text})
    assert list(loaded.items.values()) == [b'{"v":"ok"}', b'{"v":"fine"}']
    ((row, reason),) = loaded.reasons
    assert row == 2
    assert reason.startswith("a column can't be read: v: ")


def test_a_column_of_a_type_that_can_not_serve_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="'who' is of type double: owners and ids are text, bytes or whole"):
        load_rows(tmp_path, {"who": [1.5], "at": [1], "id": ["a"]})
    with pytest.raises(InvalidRequest, match="'at' is of type bool: times are whole numbers"):
        load_rows(tmp_path, {"who": ["a"], "at": [True], "id": ["a"]})


def test_times_that_overflow_the_tables_unit_are_rejected(tmp_path: Path) -> None:
    times = pa.array([2**62, 1, -(2**62)], pa.timestamp("s"))
    rows = pa.table({"who": ["a"] * 3, "at": times, "id": ["a"] * 3})
    loaded = load_path(write_table(tmp_path, rows, "rows.arrow"), per_second=10**9)
    assert list(loaded.items) == [(b"a", 10**9, b"a")]
    assert [row for row, _ in loaded.reasons] == [1, 3]
    assert all(reason.startswith("time can't be read") for _, reason in loaded.reasons)


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
