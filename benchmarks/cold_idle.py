"""What a run of the sink costs that finds nothing to do, with many timelines.

The timelines are written straight into the engine of each storage node (`bulk.py`), with items of today, so nothing is
old enough. The first run of the sink after that is one that has never looked; those that follow know what it found.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from timetier.cluster.cold.sink_calls import SinkSettings
from timetier.cluster.config import Config, load_config
from timetier.jobs.bench_data import Dataset

from .bulk import fill
from .nodes import NodeProcesses, open_store, topology_in
from .processes import cpu_by_part
from .sink_runs import run_sink, until_it_answers

TABLE = "idle"
RUNS = 5
SETTINGS = SinkSettings(call_timeout_s=120.0)  # the first run looks at everything, on a machine that may be busy
_STEP_US = 1_000

Tell = Callable[[str], None]


async def measure(folder: Path, timelines: int, *, tell: Tell) -> dict[str, Any]:
    """Seconds of the first run and of the next ones, and the CPU of all processes for one of the latter."""
    config = config_in(folder)
    data = Dataset("idle-", timelines, time.time_ns() // 1_000 - 60_000_000, _STEP_US, 1)
    tell(f"writing {timelines:,} timelines")
    fill(folder, topology_in(folder, config), config, TABLE, data, replicas=3)
    with NodeProcesses(folder, config) as nodes:
        store = open_store(folder, config)
        pids = {"nodes": list(nodes.pids.values())}
        await until_it_answers(store, TABLE)
        seconds, cpu = [], []
        for number in range(RUNS + 1):
            tell(f"idle run {number + 1} of {RUNS + 1}")
            began, own, used = time.perf_counter(), time.process_time(), cpu_by_part(pids)["nodes"]
            report = await run_sink(store, TABLE, before=None, settings=SETTINGS, run=f"idle-{number}")
            seconds.append(time.perf_counter() - began)
            cpu.append(time.process_time() - own + cpu_by_part(pids)["nodes"] - used)
            if report.rows or report.files:
                raise RuntimeError(f"an idle run moved {report.rows} rows")
        await store.close()
    return {
        "timelines": timelines,
        "first_s": round(seconds[0], 3),
        "idle_s": {
            "median": round(statistics.median(seconds[1:]), 4),
            "min": round(min(seconds[1:]), 4),
            "max": round(max(seconds[1:]), 4),
        },
        "idle_cpu_s": round(statistics.median(cpu[1:]), 4),
        "first_cpu_s": round(cpu[0], 3),
    }


def config_in(folder: Path) -> Config:
    """The embedded default: 1,024 buckets, items sink after 30 days."""
    return load_config(None, data_dir=folder)


def print_idle(report: dict[str, Any]) -> None:
    """The figures of `measure`, for people."""
    idle = report["idle_s"]
    print(
        f"a sink with nothing to do, {report['timelines']:,} timelines: {idle['median']} s "
        f"({idle['min']} to {idle['max']}), {report['idle_cpu_s']} s of CPU in all; the first one {report['first_s']} s"
    )
