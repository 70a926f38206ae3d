"""Histories survive their files, and what the command line says of them."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest

from .history import Done, Get, Item, Operation, Recorder, Seen, Write, load_history, put, save_history
from .linearizability import check_history
from .random_histories import good_history

ROOT = Path(__file__).parents[2]


def x(value: str) -> Write:
    """Write of item 1."""
    return Write((put(1, value),))


SEEN = Operation("b", "t", "get", Get((1, "")), Item(Seen((1, ""), "1", 1), 1), 2.0, 3.0)
LOST = Operation("b", "t", "get", Get((1, "")), Item(None), 2.0, 3.0)


def test_a_history_survives_its_file(tmp_path: Path) -> None:
    operations = good_history(Random(5), 60)
    save_history(operations, tmp_path / "h.jsonl")
    assert load_history([tmp_path / "h.jsonl"]) == operations


def test_the_calls_of_a_killed_process_are_not_forgotten(tmp_path: Path) -> None:
    """A call without an answer counts as unknown, half a line at the end as nothing."""
    path = tmp_path / "a.jsonl"
    recorder = Recorder(time.monotonic, path)
    recorder.returned(recorder.call("a", "t", "put", x("1")), Done(1))
    recorder.call("a", "t", "put", x("2"))
    recorder.close()
    path.write_bytes(path.read_bytes() + b'["a", "t')
    other = Recorder(time.monotonic, tmp_path / "b.jsonl")
    other.returned(other.call("b", "t", "get", Get((1, ""))), Item(Seen((1, ""), "2", 2), 2))
    other.close()
    operations = load_history([path, tmp_path / "b.jsonl"])
    assert [operation.is_unknown for operation in operations] == [False, True, False]
    assert check_history(operations).ok


def test_order_within_a_process_is_kept_though_its_clock_stands_still() -> None:
    recorder = Recorder(lambda: 1.0)
    recorder.returned(recorder.call("a", "t", "put", x("1")), Done(1))
    recorder.returned(recorder.call("b", "t", "get", Get((1, ""))), Item(None))
    assert not check_history(recorder.operations).ok


@pytest.mark.parametrize(("read", "status"), [(SEEN, 0), (LOST, 1)], ids=["good", "bad"])
def test_files_are_checked_from_the_command_line(tmp_path: Path, read: Operation, status: int) -> None:
    save_history([Operation("a", "t", "put", x("1"), Done(1), 0.0, 1.0), read], tmp_path / "h.jsonl")
    command = [sys.executable, "-m", "tests.simulation.linearizability", str(tmp_path / "h.jsonl")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == status, done.stderr
    assert f"{status} violations" in done.stdout


def test_a_damaged_file_is_an_error_that_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "h.jsonl").write_text("nonsense\n{}\n")
    with pytest.raises(ValueError, match=r"h\.jsonl:1"):
        load_history([tmp_path / "h.jsonl"])
