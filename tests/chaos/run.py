"""One chaos run: clients work, faults come and go, a sink runs now and then; then everything is checked."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..simulation.history import Operation, load_history
from ..simulation.linearizability import check_history
from .client import Task
from .clients import Clients, read_all
from .faults import HEAL_S, Faults, Window
from .plan import Fault, plan
from .report import figures, load_timings, missing_writes
from .system import System
from .workload import SINK_BEFORE, TABLE, Timing
from .zoned import ZonedSystem

HEALTHY_SHARE = 0.08  # of a run, before the first fault: what the faults are compared with
_TELL_S = 5.0
_WATCHER_S = 10.0
_SHOWN = 20  # violations in the report
_WAIT = threading.Event()  # never set: its `wait` lets time pass


@dataclass(frozen=True, slots=True)
class Options:
    """What a run is to do. `only`: kinds of faults, none = all. `folder`: keep everything there; None = nothing.

    `clients`: processes. `per_second`: operations of all of them together. `warm_up_s`, `healthy_s`:
    rest before the run, and before each fault.
    """

    seconds: float
    seed: int
    only: Sequence[str] = ()
    per_second: float = 75.0
    healthy_s: float = 5.0
    warm_up_s: float = 3.0
    folder: Path | None = None
    sinks: bool = True
    clients: int = 3


def tell(text: str) -> None:
    """Say what is going on."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def run(options: Options) -> dict[str, Any]:
    """The report of a run, ready for JSON; `ok` says whether all is well. Raises ValueError for wrong options."""
    plan(options.seed, options.seconds, only=options.only)  # bad names are refused before anything starts
    tell(f"seed {options.seed}: starting Ray and the cluster")
    with ZonedSystem(options.folder) as system:
        if system.no_network:
            tell(f"zones are not cut off: {system.no_network}")
        observed = observe(system, options)
    return judge(options, observed)


@dataclass(slots=True)
class Observed:
    """What is left when a run is over. `trouble`: why the cluster did not heal, "" if it did."""

    history: list[Operation]
    final: list[Operation]
    timings: list[Timing]
    windows: list[Window]
    trouble: str
    facts: dict[str, Any]


def observe(system: System, options: Options) -> Observed:
    """Let clients work and faults happen on a cluster that has been started."""
    faults = plan(options.seed, options.seconds, only=options.only, cuts=not system.no_network)
    return _Run(options, system).carry_out(_bounded(faults, options.seconds))


def judge(options: Options, observed: Observed) -> dict[str, Any]:
    """The report of a run."""
    history, final = observed.history, observed.final
    tell(f"checking {len(history) + len(final)} operations")
    began = time.monotonic()
    checked = check_history([*history, *final])
    for violation in checked.violations:
        tell(f"VIOLATION in {violation.timeline}:\n{violation.witness}")
    missing = missing_writes(history, final)
    for line in missing[:_SHOWN]:
        tell(f"MISSING {line}")
    tell(f"checked in {time.monotonic() - began:.1f} s")
    violations = [f"{violation.timeline}: not linearizable" for violation in checked.violations]
    undecided = [f"{timeline}: undecided" for timeline in checked.undecided]
    if observed.trouble:
        violations.append(observed.trouble)
    return {
        "seed": options.seed,
        "ok": not (violations or undecided or missing),
        "violations": len(violations),
        "undecided": len(undecided),
        "acknowledged_missing": len(missing),
        **observed.facts,
        **figures(observed.timings, observed.windows),
        "told": [*violations, *undecided, *missing][:_SHOWN],
    }


def _bounded(faults: Iterator[Fault], seconds: float) -> list[Fault]:
    """More faults than fit into a run."""
    return [next(faults) for _ in range(int(seconds) + 1)]


class _Run:
    def __init__(self, options: Options, system: System) -> None:
        self._options = options
        self._system = system
        self._windows: list[Window] = []
        self._sinks: list[threading.Thread] = []
        self._sunk: list[str] = []
        self._now = "warming up"
        self._ended = threading.Event()
        self._loads = [_load()]

    def carry_out(self, faults: list[Fault]) -> Observed:
        options, system = self._options, self._system
        started_at = time.monotonic()
        tasks = [self._task(f"c{number}", started_at) for number in range(options.clients)]
        clients = Clients(tasks, system.environment)
        watchers = [
            threading.Thread(target=self._tell_progress, args=(clients,), daemon=True),
            threading.Thread(target=self._sample_figures, daemon=True),
        ]
        for watcher in watchers:
            watcher.start()
        try:
            trouble = self._work(faults, started_at)
            self._ended.set()
            tell("clients end")
            clients.stop()
        finally:
            self._ended.set()
            clients.kill()
            for watcher in watchers:
                watcher.join(_WATCHER_S)
        seconds = time.monotonic() - started_at
        for sink in self._sinks:
            sink.join(HEAL_S)
        history = load_history([task.history for task in tasks])
        final = self._read_back(sorted({operation.timeline for operation in history}), started_at)
        facts = {
            "seconds": round(seconds, 1),
            "not_begun": clients.not_begun,
            "sinks": self._sunk,
            "left_out": {} if not system.no_network else {"cut-zone, flap-cut": system.no_network},
            "verify": system.verify(),
            "load_1min": [min(self._loads), max(self._loads)],
            "cpus": os.cpu_count(),
        }
        timings = load_timings([task.timings for task in tasks])
        return Observed(history, final, timings, self._windows, trouble, facts)

    def _task(self, client: str, started_at: float, owners: list[str] | None = None) -> Task:
        return Task(
            folder=str(self._system.folder),
            client=client,
            seed=self._options.seed,
            namespace=self._system.namespace,
            started_at=started_at,
            per_second=self._options.per_second / self._options.clients,
            owners=owners,
        )

    # ------------------------------------------------------------ while clients work

    def _work(self, plans: list[Fault], started_at: float) -> str:
        """Fault after fault. Returns why the system did not heal, "" if it did."""
        options = self._options
        ends = started_at + options.warm_up_s + options.seconds
        faults = Faults(self._system, self._start_sink, tell)
        self._rest(options.warm_up_s, "warming up")
        self._rest(max(options.healthy_s, HEALTHY_SHARE * options.seconds), "healthy")
        for fault in plans:
            if time.monotonic() >= ends:
                break
            if time.monotonic() + fault.hold_s > ends:
                continue  # a shorter one may fit
            if options.sinks and len(self._windows) % 4 == 1:
                self._start_sink()
            self._now = fault.describe()
            tell(f"fault: {self._now}")
            try:
                window = faults.inflict(fault)
                self._now = f"healing from {window.kind}"
                faults.heal(window)
            except (TimeoutError, LookupError) as error:
                return f"{fault.describe()}: {error}"
            self._windows.append(window)
            tell(f"healed {window.healed - window.began:.1f} s after its begin; {window.note}".rstrip("; "))
            self._rest(min(options.healthy_s, max(1.0, ends - time.monotonic())), "healthy")
        return ""

    def _rest(self, seconds: float, now: str) -> None:
        self._now = now
        _WAIT.wait(seconds)

    def _start_sink(self) -> threading.Thread:
        thread = threading.Thread(target=self._sink_once, daemon=True)
        self._sinks.append(thread)
        thread.start()
        return thread

    def _sink_once(self) -> None:
        """One run of the sink. That it fails while nodes are away is right; what it does then is what is checked."""
        from timetier.actors.jobs_client import SinkOptions
        from timetier.cluster.errors import TimeTierError
        from timetier.jobs.cli_sink import follow_sink

        began = time.monotonic()
        try:
            options = SinkOptions(before=SINK_BEFORE, by_event_time=True, table=TABLE, take_over=True)
            found = asyncio.run(follow_sink(self._system.namespace, options, lambda done, total: None))
            outcome = f"{found['state']}, {found.get('rows', 0)} rows"
        except TimeTierError as error:
            outcome = f"{type(error).__name__}: {error}"
        self._sunk.append(f"{outcome}, {time.monotonic() - began:.1f} s")
        tell(f"sink: {self._sunk[-1]}")

    def _tell_progress(self, clients: Clients) -> None:
        while not self._ended.wait(_TELL_S):
            try:
                told = clients.take()
            except RuntimeError as error:
                tell(str(error))
                return
            self._loads.append(_load())
            tell(
                f"{self._now}: {told.reads / _TELL_S:.0f} reads/s, {told.writes / _TELL_S:.0f} writes/s, "
                f"{told.errors} errors, {told.under_way} under way, load {self._loads[-1]}"
            )

    def _sample_figures(self) -> None:
        """Keep what the nodes count beside the histories, for whoever wants to know why a run went as it did."""
        with (self._system.folder / "figures.jsonl").open("w") as file:
            while not self._ended.wait(_TELL_S):
                try:
                    states = self._system.status()
                    nodes = {name: state.get("figures") or state.get("reason") for name, state in states.items()}
                except Exception as error:  # of Ray, in the middle of a fault; the next sample may do better
                    nodes = {"": repr(error)}
                file.write(json.dumps({"at": time.monotonic(), "nodes": nodes}) + "\n")

    # ------------------------------------------------------------ afterwards

    def _read_back(self, owners: list[str], started_at: float) -> list[Operation]:
        tell(f"reading {len(owners)} timelines back")
        task = self._task("final", started_at, owners)
        read_all(task, self._system.environment)
        return load_history([task.history])


def _load() -> float:
    return os.getloadavg()[0]
