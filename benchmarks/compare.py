"""TimeTier beside Redis and etcd, in one run on one machine.

    python -m benchmarks.compare                     (from the root of the repository)

Starts each system with three copies of its data on loopback, loads the same items into all of them, reads them back
and compares them, and then does slices of every workload in turn: one system after the other, several times over.
README.md says what is measured, how, and what it means. Progress goes to stderr, the tables (or with --json one
object with everything) to stdout. Whatever was started is ended, however the run ends.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from timetier.cluster.errors import TimeTierError
from timetier.jobs.bench import COUNTED
from timetier.jobs.bench_data import PER_OWNER
from timetier.jobs.bench_report import figures, sample, spread
from timetier.jobs.bench_workloads import WORKLOADS, Timing

from .machine import describe_machine, versions
from .plot import draw
from .processes import Spinners, StartError, cpu_seconds, memory_bytes
from .remote import Remote, WorkerError
from .systems import Etcd, Redis, System, TimeTier
from .tables import judge, text

SYSTEMS = ("timetier", "redis", "etcd")
_WRITERS = 1_000  # a call of 1,000 writes has as many owners
_STEP_US = 1_000_000
_IDLE_S = 2.0
_PAUSE_S = 0.1  # between two slices, for what a system does behind its answers
_LOAD_S = 900.0


@dataclass(frozen=True)
class Options:
    """`memory_items`, `cold_blocks`: 0 leaves that part out."""

    systems: tuple[str, ...] = SYSTEMS
    workloads: tuple[str, ...] = tuple(WORKLOADS)
    items: int = 200_000
    seconds: float = 1.0
    repeats: int = 5
    memory_items: int = 1_000_000
    cold_blocks: int = 60
    cold_rows: int = 4_096
    keep_awake: bool = True
    redis_unix: bool = False
    seed: int = 1

    def data(self) -> dict[str, dict[str, Any]]:
        """Arguments of the data sets by name: what is read, whose timelines are written, the mix's, the memory's.

        The timelines that are written begin with one item: most writes of a store go to timelines that there are.
        """
        base = int(time.time()) * 1_000_000 - PER_OWNER * _STEP_US
        owners = self.items // PER_OWNER
        counts = {
            "reads": owners,
            "writes": max(_WRITERS, owners),
            "mix": max(1, owners // 4),
            "memory": max(1, self.memory_items // PER_OWNER),
        }
        return {
            name: {
                "prefix": f"{name}-",
                "owners": count,
                "base": base,
                "step": _STEP_US,
                "per_owner": 1 if name == "writes" else PER_OWNER,
            }
            for name, count in counts.items()
        }


class Running:
    """A system that runs, with its client."""

    def __init__(self, system: System, options: Options, folder: Path) -> None:
        """Start it. Raises StartError or WorkerError; the system has to be stopped in any case."""
        self.system = system
        home = folder / system.name
        home.mkdir()
        system.start(home)
        self.remote = Remote(system.name, system.client, options.data(), options.seed, home)
        try:
            told = self.remote.open()
        except BaseException:
            self.remote.close()
            raise
        self.parts = system.parts(told)
        self.keepers = system.keepers(told)
        self.remote.call("watch", parts=self.parts)

    def memory(self) -> float:
        """Bytes in memory of one process that holds all the data, on average."""
        return sum(map(memory_bytes, self.keepers)) / len(self.keepers)

    def cpu(self) -> float:
        return sum(map(cpu_seconds, self.parts.values()))


class Comparison:
    """One run. Use it in `with`; what was started ends with it."""

    def __init__(self, options: Options, folder: Path, tell: Callable[[str], None]) -> None:
        self._options, self._folder, self._tell = options, folder, tell
        self._systems: list[System] = []
        self._running: dict[str, Running] = {}
        self._timings: dict[str, dict[str, list[Timing]]] = {}
        self._errors: list[str] = []
        self._spinners = Spinners()
        self._report: dict[str, Any] = {"missing": {}}

    def __enter__(self) -> Comparison:
        return self

    def __exit__(self, *_: object) -> None:
        with _undisturbed():
            self._spinners.stop()
            for running in self._running.values():
                running.remote.close()
            for system in self._systems:
                system.stop()

    def run(self) -> dict[str, Any]:
        """Do all of it; the report, ready for JSON. Raises StartError or TimeTierError when nothing can be measured."""
        if self._options.keep_awake:
            self._spinners.start()
        self._report |= {"machine": describe_machine(self._folder), "versions": versions()}
        self._start()
        self._load()
        self._idle()
        self._try_faces()
        self._slices()
        if "timetier" in self._running and self._options.cold_blocks:
            try:
                self._cold()
            except WorkerError as error:
                self._fail(error)
        if self._options.memory_items:
            self._memory()
        self._report["cores_kept_awake"] = self._spinners.running()
        self._report |= {"options": asdict(self._options), "errors": self._errors, "figures": self._figures()}
        self._report["samples"] = [
            {"workload": workload, "system": name, "repeat": repeat, **sample(timing)}
            for workload, by_system in self._timings.items()
            for name, timings in by_system.items()
            for repeat, timing in enumerate(timings)
        ]
        self._report["aims"] = judge(self._report)
        return self._report

    # ------------------------------------------------------------ before the slices

    def _start(self) -> None:
        made: dict[str, Callable[[], System]] = {
            "timetier": TimeTier,
            "redis": lambda: Redis(unix=self._options.redis_unix),
            "etcd": Etcd,
        }
        for name in self._options.systems:
            system = made[name]()
            missing = system.why_missing()
            if missing is not None:
                self._miss(system, f"not measured: {missing}")
                continue
            self._tell(f"starting {system.title}")
            self._systems.append(system)
            try:
                self._running[name] = Running(system, self._options, self._folder)
            except (StartError, WorkerError) as error:
                if name == "timetier":
                    raise StartError(str(error)) from None
                self._miss(system, f"not measured, it did not start: {error}")
        if not self._running:
            raise StartError("there is nothing to measure")

    def _fail(self, error: WorkerError) -> None:
        """Note what failed; the rest goes on."""
        self._errors.append(str(error))
        self._tell(f"failed: {error}")

    def _miss(self, system: System, why: str) -> None:
        self._report["missing"][system.name] = why
        self._tell(f"{system.title}: {why}")

    def _load(self) -> None:
        self._report["loads_per_s"] = {}
        items = self._options.items
        for name, running in self._running.items():
            self._tell(f"loading {items:,} items into {running.system.title}")
            took = running.remote.call("load", name="reads", timeout_s=_LOAD_S)
            self._report["loads_per_s"][name] = round(items / took)
            for other in ("mix", "writes"):
                running.remote.call("load", name=other, timeout_s=_LOAD_S)
            running.remote.call("load_pages", timeout_s=_LOAD_S)
            wrong = running.remote.call("check", timeout_s=_LOAD_S)
            if wrong:
                raise StartError(f"{running.system.title} gave back {wrong} items or pages that had not been written")

    def _idle(self) -> None:
        """CPU that each system takes while nobody asks it for anything, in cores."""
        before = {name: running.cpu() for name, running in self._running.items()}
        began = time.monotonic()
        time.sleep(_IDLE_S)
        took = time.monotonic() - began
        self._report["idle_cores"] = {
            name: round((running.cpu() - before[name]) / took, 4) for name, running in self._running.items()
        }

    def _try_faces(self) -> None:
        """Peers have a client for threads and one for asyncio: each workload of several callers gets the faster."""
        self._report["faces"] = {}
        for name, running in self._running.items():
            if name == "timetier":
                continue
            chosen = [one for one in self._options.workloads if WORKLOADS[one].callers > 1]
            self._tell(f"finding the faster client of {running.system.title} for each workload of several callers")
            self._report["faces"][name] = {one: running.remote.call("try", workload=one) for one in chosen}

    # ------------------------------------------------------------ the slices

    def _slices(self) -> None:
        names = list(self._running)
        merged: dict[str, list[dict[str, float]]] = {}
        order = random.Random(self._options.seed)
        for repeat in range(self._options.repeats):
            for workload in self._options.workloads:
                self._tell(f"repeat {repeat + 1} of {self._options.repeats}: {WORKLOADS[workload].title}")
                order.shuffle(names)
                for name in names:
                    counted = name == "timetier" and WORKLOADS[workload].kind in COUNTED
                    found = self._slice(name, workload, counted=counted)
                    if found is not None and counted:
                        merged.setdefault(workload, []).append(found["merging"])
        self._report["merging"] = {
            workload: {figure: spread((one[figure] for one in found), 3) for figure in found[0]}
            for workload, found in merged.items()
        }

    def _slice(self, name: str, workload: str, *, counted: bool) -> dict[str, Any] | None:
        time.sleep(_PAUSE_S)
        seconds = self._options.seconds
        try:
            found: dict[str, Any] = self._running[name].remote.call(
                "slice", workload=workload, seconds=seconds, counted=counted, timeout_s=120.0 + 10 * seconds
            )
        except WorkerError as error:
            self._fail(error)
            return None
        self._timings.setdefault(workload, {}).setdefault(name, []).append(Timing(**found["timing"]))
        return found

    def _figures(self) -> dict[str, dict[str, Any]]:
        """By workload and system."""
        return {
            workload: {name: figures(timings) for name, timings in by_system.items()}
            for workload, by_system in self._timings.items()
        }

    # ------------------------------------------------------------ beside the slices

    def _cold(self) -> None:
        blocks, rows, repeats = self._options.cold_blocks, self._options.cold_rows, self._options.repeats
        self._tell(f"loading and sinking {blocks} blocks of {rows:,} items")
        remote = self._running["timetier"].remote
        about = remote.call("cold_prepare", blocks=blocks, rows=rows, timeout_s=_LOAD_S)
        times: dict[str, list[float]] = {}
        for part in range(repeats):
            for name, found in remote.call("cold", part=part, parts=repeats).items():
                times.setdefault(name, []).extend(found)
        self._report["cold"] = {**about, "us": {name: spread(found) for name, found in times.items()}, "samples": times}

    def _memory(self) -> None:
        items = self._options.memory_items // PER_OWNER * PER_OWNER
        found = {}
        for name, running in self._running.items():
            self._tell(f"adding {items:,} items to {running.system.title}")
            before = running.memory()
            try:
                running.remote.call("load", name="memory", timeout_s=_LOAD_S)
            except WorkerError as error:
                self._fail(error)
                continue
            found[name] = {"before": round(before), "after": round(running.memory())}
            found[name]["bytes_an_item"] = round((found[name]["after"] - before) / items)
        self._report["memory"] = {"items": items, **found}


@contextmanager
def _undisturbed() -> Iterator[None]:
    """A second Ctrl-C does not end what runs in here halfway."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, frame: object) -> None:
    sys.exit(128 + number)


QUICK = {"items": 10_000, "seconds": 0.1, "repeats": 1, "memory_items": 10_000, "cold_blocks": 4, "cold_rows": 512}


@click.command(help=__doc__)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--quick", is_flag=True, help="A smoke run: little data, short slices; the figures mean nothing.")
@click.option("--system", "systems", multiple=True, type=click.Choice(SYSTEMS), help="Only this one; repeatable.")
@click.option("--workload", "workloads", multiple=True, type=click.Choice(list(WORKLOADS)), help="Only it; repeatable.")
@click.option("--items", type=click.IntRange(PER_OWNER, 100_000_000), help="Items that are read.  [default: 200,000]")
@click.option("--seconds", type=click.FloatRange(0.01, 3_600), help="Length of a slice.  [default: 1]")
@click.option("--repeats", type=click.IntRange(1, 1_000), help="Slices of each workload and system.  [default: 5]")
@click.option("--memory-items", type=click.IntRange(0), help="Items added for memory.  [default: 1,000,000; 0: none]")
@click.option("--cold-blocks", type=click.IntRange(0, 1_024), help="Blocks that sink.  [default: 60; 0: none]")
@click.option(
    "--keep-awake/--no-keep-awake", default=True, help="Keep cores from sleeping.  [default: keep them awake]"
)
@click.option("--redis-unix", is_flag=True, help="Redis by a Unix socket, not by loopback.")
@click.option("--seed", default=1, show_default=True, help="Decides what is read and written, and in which order.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw ops/s against batch size: an SVG.")
@click.option("--folder", type=click.Path(file_okay=False, path_type=Path), help="Where data lies while it runs.")
def main(as_json: bool, quick: bool, plot: Path | None, folder: Path | None, **given: Any) -> None:
    chosen = {**(QUICK if quick else {}), **{name: value for name, value in given.items() if value not in (None, ())}}
    options = Options(**chosen)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    home = Path(tempfile.mkdtemp(prefix="tt-compare-", dir=folder))
    began = time.monotonic()
    try:
        with Comparison(options, home, lambda line: click.echo(line, err=True)) as comparison:
            report = comparison.run()
    except KeyboardInterrupt:
        click.echo("interrupted: everything that was started has been ended", err=True)
        sys.exit(130)
    except (StartError, WorkerError, TimeTierError) as error:
        click.echo(f"benchmarks.compare: {error}", err=True)
        sys.exit(1)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    report |= {
        "command": ["python", "-m", "benchmarks.compare", *sys.argv[1:]],
        "run_s": round(time.monotonic() - began),
    }
    if plot is not None:
        plot.write_text(draw(report))
    click.echo(json.dumps(report) if as_json else text(report))
    sys.exit(1 if report["errors"] else 0)


if __name__ == "__main__":
    main()
