"""The chaos run itself: a short one on real processes, and that it would notice what it is there to notice."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from timetier.actors.launch import stop_cluster
from timetier.actors.local_ray import LocalRay
from timetier.actors.processes import family

from ..simulation.history import Conflict, Done, Mutation, Operation, Page, ReadPage, Seen, Unknown, Write, delete, put
from .faults import Window
from .network import NoNetwork, ZoneNetwork
from .plan import KINDS, Fault, plan
from .report import figures, missing_writes
from .run import Options, judge, observe
from .system import System
from .workload import ALL, Timing


class LocalSystem(System):
    """A cluster in the Ray of the tests."""

    def __init__(self, folder: Path, namespace: str, ray: LocalRay) -> None:
        super().__init__(folder, namespace, {"RAY_ADDRESS": ray.address})
        self._ray = ray

    def owns(self, pid: int) -> bool:
        return pid in family(self._ray.pid, self._ray.started, f"TMPDIR={self._ray.temp_dir}/t")


def test_a_killed_and_a_paused_replica_cost_no_acknowledged_write_and_no_consistency(
    ray_session: None, local_ray: LocalRay, namespace: str, tmp_path: Path
) -> None:
    system = LocalSystem(tmp_path, namespace, local_ray).start(storage={"engine_write_buffer_mb": 4})
    options = Options(
        seconds=9,
        seed=4,
        only=("kill-storage", "pause-storage"),
        per_second=60,
        healthy_s=0.5,
        warm_up_s=1.0,
        sinks=False,
        clients=2,
    )
    try:
        observed = observe(system, options)
    finally:
        system.let_go()
        stop_cluster(namespace)
    report = judge(options, observed)
    print(report)
    assert report["told"] == []
    assert (report["violations"], report["undecided"], report["acknowledged_missing"]) == (0, 0, 0)
    assert set(report["faults"]) == {"kill-storage", "pause-storage"}
    assert report["reads"] > 100
    assert report["writes"] > 50
    assert report["verify"]["ok"], report["verify"]


# ---------------------------------------------------------------- the plan


def first(seed: int, count: int = 30, **options: object) -> list[Fault]:
    return list(itertools.islice(plan(seed, 180, **options), count))  # type: ignore[arg-type]


def test_a_seed_stands_for_one_plan_and_each_run_begins_with_the_kinds_that_matter_most() -> None:
    assert first(7) == first(7)
    assert first(7) != first(8)
    important = {name for name, kind in KINDS.items() if kind.first}
    for seed in range(20):
        assert {fault.kind.name for fault in first(seed, len(important))} == important
        assert {fault.kind.name for fault in first(seed, len(KINDS))} == set(KINDS)


def test_a_machine_that_cuts_no_network_gets_all_other_faults() -> None:
    kinds = {fault.kind.name for fault in first(1, cuts=False)}
    assert kinds == {name for name, kind in KINDS.items() if not kind.cuts}
    with pytest.raises(ValueError, match="can't cut"):
        plan(1, 180, only=["cut-zone"], cuts=False)
    with pytest.raises(ValueError, match="pause-storage"):
        plan(1, 180, only=["earthquake"])


def test_a_flap_lasts_a_minute_at_most_and_everything_else_ten_seconds() -> None:
    for fault in first(5, 200):
        assert fault.hold_s <= (60.0 if fault.kind.name.startswith("flap") else 10.0)


# ---------------------------------------------------------------- acknowledged writes


def written(version: int | None, *mutations: Mutation, timeline: str = "t") -> Operation:
    result = Unknown() if version is None else Done(version)
    return Operation("c", timeline, "put", Write(mutations), result, 1.0, None if version is None else 2.0)


def final(*items: Seen, timeline: str = "t") -> Operation:
    return Operation("f", timeline, "page", ReadPage(None, ALL), Page(items, False, 9), 8.0, 9.0)


def test_an_acknowledged_write_that_is_not_there_is_missed() -> None:
    assert len(missing_writes([written(1, put(5, "a"))], [final()])) == 1
    assert len(missing_writes([written(2, put(5, "b"))], [final(Seen((5, ""), "a", 1))])) == 1
    assert len(missing_writes([written(1, put(5, "a"), put(6, "a"))], [final(Seen((5, ""), "a", 1))])) == 1
    assert len(missing_writes([written(1, put(5, "a"))], [final(timeline="other")])) == 1, "it can't be read"


def test_a_write_may_be_gone_for_a_later_one_and_for_a_delete_that_may_be_later() -> None:
    one = written(1, put(5, "a"))
    assert missing_writes([one], [final(Seen((5, ""), "a", 1))]) == []
    assert missing_writes([one], [final(Seen((5, ""), "c", 3))]) == []
    assert missing_writes([one, written(2, delete(5))], [final()]) == []
    assert missing_writes([one, written(None, delete(5))], [final()]) == []
    assert missing_writes([one, written(4, Mutation("wipe"))], [final()]) == []
    assert missing_writes([one, written(None, Mutation("wipe"))], [final()]) == []
    later = written(3, put(5, "c"))
    assert len(missing_writes([one, written(2, delete(5)), later], [final()])) == 1, "that delete came before"
    refused = Operation("c", "t", "delete", Write((delete(5),), 7), Conflict(1), 1.0, 2.0)
    assert len(missing_writes([one, refused], [final()])) == 1, "a delete that met a conflict has deleted nothing"


# ---------------------------------------------------------------- figures


def test_figures_tell_the_healthy_from_the_first_second_and_the_rest_of_a_fault() -> None:
    window = Window("pause-storage", "storage-0-1", began=10.0, removed=15.0, healed=16.0)
    timings = [Timing("get", "read", at / 10, at / 10 + 0.01, "ok") for at in range(200) if not 112 <= at < 134]
    timings.append(Timing("put", "write", 10.5, 12.5, "Unavailable"))
    timings.append(Timing("put", "write", 12.0, 12.1, "ok"))
    timings.sort(key=lambda timing: timing.called_at)
    found = figures(timings, [window])
    its = found["faults"]["pause-storage"]
    assert its["read"]["longest_gap_s"] == pytest.approx(2.3)
    assert (found["healthy"]["read"]["count"], found["between"]["read"]["count"]) == (100, 40)
    assert (its["read"]["first_second"]["count"], its["read"]["healing"]["count"]) == (10, 10)
    assert its["write"]["first_second"] == {"count": 1, "failed": 1, "p50_ms": 2000.0, "p99_ms": 2000.0, "over_1s": 1}
    assert its["write"]["slowest_s"] == 2.0
    assert not its["write"]["aim_longest_wait"]
    assert its["read"]["aim_p99"]
    assert found["errors"] == {"write Unavailable": 1}
    assert found["slowest"]["took_s"] == 2.0


def test_a_machine_without_namespaces_says_so_and_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NoNetwork, match="iproute2"):
        ZoneNetwork(["a"], tmp_path)
