"""A local Ray leaves nothing behind, however it ends."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from timetier.actors.local_ray import LocalRay, find_local_ray, start_local_ray, stop_local_ray
from timetier.actors.processes import family, wait_for


def living(head: LocalRay) -> dict[int, str]:
    return family(head.pid, head.started, f"TMPDIR={head.temp_dir}/t")


def test_what_a_killed_ray_leaves_is_ended_with_its_folder(tmp_path: Path) -> None:
    head = start_local_ray(tmp_path, num_cpus=1)
    assert len(living(head)) > 3
    os.kill(head.pid, signal.SIGKILL)
    assert wait_for({head.pid: head.started}, 30)
    assert find_local_ray(tmp_path) is None
    assert living(head), "its processes outlive it"
    assert not stop_local_ray(tmp_path)
    assert living(head) == {}
    assert not Path(head.temp_dir).exists()
    assert not (tmp_path / "ray" / "head.json").exists()


def test_a_ray_that_is_ended_leaves_no_process_and_no_folder(tmp_path: Path) -> None:
    head = start_local_ray(tmp_path, num_cpus=1)
    assert start_local_ray(tmp_path) == head
    assert stop_local_ray(tmp_path)
    assert living(head) == {}
    assert not Path(head.temp_dir).exists()
    assert not stop_local_ray(tmp_path)
