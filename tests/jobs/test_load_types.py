"""What the loader makes of owners, times, ids and values of every type; what fits nowhere rejects its row alone."""

from __future__ import annotations

from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.ipc
import pyarrow.parquet
import pytest
from load_model import load_path, load_rows, write_table
from timetier.cluster.errors import InvalidRequest
from timetier.jobs.rows import Columns, time_in_units


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
