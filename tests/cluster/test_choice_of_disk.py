"""Which disk a cold file goes to: one that serves on every node of its group, with most room; else a clear error."""

from __future__ import annotations

from collections import Counter

import pytest
from cold_model import topology, view_of
from timetier.cluster.cold.cold_calls import choose_disk
from timetier.cluster.cold.sink_calls import SinkSettings
from timetier.cluster.effects import CallFailed
from timetier.cluster.errors import Unavailable
from timetier.cluster.messages import (
    DISK_ABSENT,
    DISK_FAILED,
    DISK_REPLACING,
    DISK_SERVES,
    AskDisks,
    Disks,
    Failure,
    Message,
    pack_i64,
)

NODES = ["cold-0-0", "cold-0-1", "cold-0-2"]
GIB = 1 << 30


def disks(*free_gib: int, **wrong: int) -> Disks:
    """Free room by ordinal; `d1=DISK_FAILED`: that disk is out."""
    states = [wrong.get(f"d{disk}", DISK_SERVES) for disk in range(len(free_gib))]
    reasons = ["" if state == DISK_SERVES else f"reason {state}" for state in states]
    return Disks(bytes(states), pack_i64([free * GIB for free in free_gib]), reasons)


def choose(answers: list[Message | CallFailed], file: str = "run-00001.arrow", size: int = 1_000) -> int:
    script = choose_disk(view_of(topology(disks=3), 1), NODES, file, size, SinkSettings())
    effect = next(script)
    assert isinstance(effect, list)
    assert [(call.node, type(call.message)) for call in effect] == [(node, AskDisks) for node in NODES]
    with pytest.raises(StopIteration) as stop:
        script.send(answers)
    chosen: int = stop.value.value
    return chosen


def test_the_disk_with_most_room_on_the_fullest_of_its_nodes_is_chosen() -> None:
    assert choose([disks(10, 50, 30), disks(90, 40, 30), disks(90, 5, 30)]) == 2
    assert choose([disks(10, 50, 30)] * 3) == 1


@pytest.mark.parametrize("state", [DISK_FAILED, DISK_ABSENT, DISK_REPLACING])
def test_a_disk_that_does_not_serve_on_one_node_takes_no_files(state: int) -> None:
    assert choose([disks(10, 50, 30), disks(10, 50, 30, d1=state), disks(10, 50, 30)]) == 2


def test_equal_disks_share_the_files() -> None:
    counts = Counter(choose([disks(50, 50, 20)] * 3, f"run-{number:05d}.arrow") for number in range(200))
    assert set(counts) == {0, 1}
    assert min(counts.values()) > 60


def test_without_a_disk_that_serves_everywhere_the_error_names_each_that_does_not() -> None:
    answers = [disks(9, 9, d0=DISK_FAILED), disks(9, 9, d1=DISK_ABSENT), disks(9, 9)]
    with pytest.raises(Unavailable) as error:
        choose([*answers])
    assert "no disk serves on all of cold-0-0, cold-0-1, cold-0-2" in error.value.message
    assert f"cold-0-0 disk-0: reason {DISK_FAILED}" in error.value.message
    assert f"cold-0-1 disk-1: reason {DISK_ABSENT}" in error.value.message


def test_full_disks_and_silent_nodes_are_clear_errors() -> None:
    with pytest.raises(Unavailable, match=r"no disk has room for run-00001.arrow of 3072 MiB .* has 2048 MiB"):
        choose([disks(2, 1), disks(9, 9), disks(9, 9)], size=3 * GIB)
    with pytest.raises(Unavailable, match="cold-0-1 does not tell how its disks are: no route"):
        choose([disks(9), CallFailed("cold-0-1", "no route", sent=False), disks(9)])
    with pytest.raises(Unavailable, match="cold-0-2 does not tell how its disks are: starting"):
        choose([disks(9), disks(9), Failure("Unavailable", "starting")])
