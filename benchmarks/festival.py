"""A festival: reads rise fivefold within seconds, on a set of owners that few of them dominate (Zipf).

    python -m benchmarks.festival [--json] [--quick] [--plot FILE.svg]

A cluster of the embedded default configuration, in a Ray of its own in a temporary folder. Client processes read the
newest items of owners at a given rate, calm first, then five times as often; in the middle of that a cache node is
added by what `timetier scale` does. Shown as curves over time: reads, messages that reach the storage tier, and
timelines that it is asked about. Merging and de-duplication are to keep the latter two below the first.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
from timetier.actors.connecting import ClusterStore, connect_async
from timetier.actors.local_ray import start_local_ray, stop_local_ray
from timetier.actors.ray_session import connect_ray
from timetier.cluster.config import load_config
from timetier.jobs.bench_data import Dataset

from .curves import draw
from .festival_client import SLOT_S, Points, quantile_ms
from .processes import end_on_signals

NAMESPACE = "timetier-festival"
TABLE = "bench"
_ROOT = Path(__file__).resolve().parent.parent
_START_S = 120.0
_LOAD_ITEMS = 2_000
_ERRORS = 5  # different ones that are told, each slot of a client has one at most
_TAKES_LOAD = 0.2  # share of the reads that an added cache node of two must have, to be said to take load
_QUESTIONS = ("same_questions", "version_questions", "checks")


@dataclass(frozen=True, slots=True)
class Plan:
    """Seconds of the phases, rates in reads a second over all clients. `rise_s`: from calm to peak."""

    calm_s: float = 12.0
    rise_s: float = 2.0
    peak_s: float = 14.0
    peak_after_s: float = 20.0
    after_s: float = 10.0
    rate: float = 1_000.0
    factor: float = 5.0
    clients: int = 2
    owners: int = 20_000
    per_owner: int = 10
    page_items: int = 5
    seed: int = 1

    @property
    def add_at_s(self) -> float:
        """When a cache node is added."""
        return self.calm_s + self.rise_s + self.peak_s

    @property
    def end_s(self) -> float:
        return self.add_at_s + self.peak_after_s + self.rise_s + self.after_s

    def points(self) -> Points:
        """Corners of the rate of one client."""
        low, high = self.rate / self.clients, self.rate * self.factor / self.clients
        fall_s = self.add_at_s + self.peak_after_s
        return [
            [0.0, low],
            [self.calm_s, low],
            [self.calm_s + self.rise_s, high],
            [fall_s, high],
            [fall_s + self.rise_s, low],
            [self.end_s, low],
        ]

    def phases(self, published_s: float) -> dict[str, tuple[float, float]]:
        """From and to of each phase that is reported, by name; the added node has five seconds to take load."""
        peak_s = self.calm_s + self.rise_s
        fall_s = self.add_at_s + self.peak_after_s
        return {
            "calm": (self.calm_s * 0.4, self.calm_s),
            "rise": (self.calm_s, peak_s + 1.0),
            "peak": (peak_s + 1.0, self.add_at_s),
            "node added": (self.add_at_s, min(published_s + 5.0, fall_s)),
            "peak, one more": (min(published_s + 5.0, fall_s - SLOT_S), fall_s),
            "calm again": (fall_s + self.rise_s + 1.0, self.end_s),
        }


QUICK = Plan(2.0, 1.0, 2.0, 7.0, 2.0, rate=100.0, clients=1, owners=200, per_owner=6)


@dataclass(slots=True)
class Sample:
    """Counters of the tiers at a time, totals since the start."""

    at_s: float
    messages: float
    questions: float
    moved: float
    reads: dict[str, float] = field(default_factory=dict)


class Clients:
    """The client processes, and what they have told."""

    def __init__(self, plan: Plan, folder: Path, data: dict[str, Any]) -> None:
        self.slots: dict[int, dict[str, Any]] = {}
        self.errors: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._processes: list[subprocess.Popen[str]] = []
        for number in range(plan.clients):
            spec = {
                "folder": str(folder),
                "namespace": NAMESPACE,
                "table": TABLE,
                "data": data,
                "points": plan.points(),
                "page_items": plan.page_items,
                "seed": plan.seed + number,
            }
            with (folder / f"client-{number}.log").open("wb") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "benchmarks.festival_client", json.dumps(spec)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    start_new_session=True,
                    cwd=_ROOT,
                )
            self._processes.append(process)

    def wait_until_ready(self) -> None:
        for number, process in enumerate(self._processes):
            assert process.stdout is not None
            for line in process.stdout:
                if line.strip() == "ready":
                    break
            else:
                raise click.ClickException(f"client {number} did not start: see its log")

    def begin(self, start_s: float) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(f"{start_s}\n")
            process.stdin.flush()

    async def gather(self) -> None:
        """Take everything that they tell, until they end. All at once: a full pipe would hold a client up."""
        await asyncio.gather(*(asyncio.to_thread(self._gather, process) for process in self._processes))

    def _gather(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                with self._lock:
                    self._take(json.loads(line))

    def _take(self, told: dict[str, Any]) -> None:
        slot = self.slots.setdefault(told.pop("slot"), {"latencies": Counter()})
        latencies = {int(number): count for number, count in told.pop("latencies", {}).items()}
        slot["latencies"].update(latencies)
        error = told.pop("error", "")
        if error and (error in self.errors or len(self.errors) < _ERRORS):
            self.errors[error] += 1
        for name, count in told.items():
            slot[name] = slot.get(name, 0) + count

    def close(self) -> None:
        for process in self._processes:
            if process.stdin is not None:
                process.stdin.close()
            try:
                process.wait(20.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


async def take_sample(store: ClusterStore, start_s: float) -> Sample:
    """Ask all nodes for their counters."""
    nodes = (await store.status())["nodes"]
    sample = Sample(time.monotonic() - start_s, 0.0, 0.0, 0.0)
    for name, node in nodes.items():
        figures: dict[str, float] = node.get("figures", {})
        if name.startswith("storage"):
            sample.messages += figures.get("server_calls", 0) + figures.get("server_one_way_frames", 0)
            sample.questions += sum(figures.get(question, 0) for question in _QUESTIONS)
            sample.moved += figures.get("items_written", 0) + figures.get("catch_up_bytes", 0)
        elif name.startswith("cache"):
            sample.reads[name] = figures.get("items", 0)
    return sample


class Festival:
    """One run against a cluster that runs and has its data."""

    def __init__(self, plan: Plan, store: ClusterStore, clients: Clients) -> None:
        self._plan = plan
        self._store = store
        self._clients = clients
        self._samples: list[Sample] = []
        self._scaled: dict[str, float] = {}

    async def run(self) -> dict[str, Any]:
        start_s = time.monotonic() + 1.0
        self._clients.begin(start_s)
        gathering = asyncio.create_task(self._clients.gather())
        scaling = asyncio.create_task(self._scale(start_s))
        while (at_s := time.monotonic() - start_s) < self._plan.end_s:
            if at_s >= 0:
                self._samples.append(await take_sample(self._store, start_s))
                if "published_s" not in self._scaled and self._store.view.routing.topology.cache_nodes > 1:
                    self._scaled["published_s"] = round(time.monotonic() - start_s, 2)
            await asyncio.sleep(SLOT_S / 2)
        await scaling
        await gathering
        return self._report()

    async def _scale(self, start_s: float) -> None:
        from timetier.actors.scaling import scale_cluster

        await asyncio.sleep(max(0.0, start_s + self._plan.add_at_s - time.monotonic()))
        self._scaled["asked_s"] = round(time.monotonic() - start_s, 2)
        await asyncio.to_thread(scale_cluster, NAMESPACE, cache_nodes=2)
        self._scaled["done_s"] = round(time.monotonic() - start_s, 2)

    def _report(self) -> dict[str, Any]:
        published_s = self._scaled.get("published_s", self._scaled["done_s"])
        took_load_s = next((at for at, share in self._shares() if share >= _TAKES_LOAD), None)
        phases = {name: self._phase(*span) for name, span in self._plan.phases(published_s).items()}
        calm, peak = phases["calm"], phases["peak"]
        return {
            "plan": asdict(self._plan),
            "scaled": {**self._scaled, "took_load_s": took_load_s},
            "took_load_after_s": {
                "asked": None if took_load_s is None else round(took_load_s - self._scaled["asked_s"], 2),
                "published": None if took_load_s is None else round(max(0.0, took_load_s - published_s), 2),
            },
            "moved": self._samples[-1].moved - self._samples[0].moved,
            "growth": {
                name: round(peak[name] / calm[name], 2) if calm[name] else None
                for name in ("reads_per_s", "messages_per_s", "questions_per_s")
            },
            "phases": phases,
            "errors": dict(self._clients.errors),
            "curves": self._curves(),
        }

    def _shares(self) -> list[tuple[float, float]]:
        """(time, share of the reads of the last moment that the added node had)."""
        found = []
        for before, after in zip(self._samples, self._samples[1:], strict=False):
            new = {name: reads - before.reads.get(name, 0.0) for name, reads in after.reads.items()}
            total = sum(new.values())
            found.append((after.at_s, new.get("cache-0-1", 0.0) / total if total else 0.0))
        return found

    def _phase(self, from_s: float, to_s: float) -> dict[str, Any]:
        slots = [slot for number, slot in self._clients.slots.items() if from_s <= number * SLOT_S < to_s]
        latencies: Counter[int] = Counter()
        for slot in slots:
            latencies.update(slot["latencies"])
        seconds = len(slots) * SLOT_S or 1.0
        first, last = self._sample_at(from_s), self._sample_at(to_s)
        span_s = last.at_s - first.at_s or 1.0
        return {
            "from_s": round(from_s, 1),
            "to_s": round(to_s, 1),
            "due_per_s": round(sum(slot.get("due", 0) for slot in slots) / seconds),
            "reads_per_s": round(sum(slot.get("done", 0) for slot in slots) / seconds),
            "failed": sum(slot.get("failed", 0) + slot.get("refused", 0) for slot in slots),
            "p50_ms": round(quantile_ms(latencies, 0.5), 2),
            "p99_ms": round(quantile_ms(latencies, 0.99), 2),
            "messages_per_s": round((last.messages - first.messages) / span_s),
            "questions_per_s": round((last.questions - first.questions) / span_s),
        }

    def _sample_at(self, at_s: float) -> Sample:
        return min(self._samples, key=lambda sample: abs(sample.at_s - at_s))

    def _curves(self) -> dict[str, list[list[float]]]:
        """Points (second, value) of what is drawn."""
        slots = [(n, slot) for n, slot in sorted(self._clients.slots.items()) if (n + 1) * SLOT_S <= self._plan.end_s]
        pairs = [(a, b) for a, b in zip(self._samples, self._samples[2:], strict=False) if b.at_s > a.at_s]
        return {
            "reads_per_s": [[n * SLOT_S, slot.get("done", 0) / SLOT_S] for n, slot in slots],
            "messages_per_s": [[b.at_s, (b.messages - a.messages) / (b.at_s - a.at_s)] for a, b in pairs],
            "questions_per_s": [[b.at_s, (b.questions - a.questions) / (b.at_s - a.at_s)] for a, b in pairs],
            "p99_ms": [[n * SLOT_S, quantile_ms(slot["latencies"], 0.99)] for n, slot in slots if slot["latencies"]],
        }


async def _measure(plan: Plan, folder: Path) -> dict[str, Any]:
    data = {"prefix": "fan", "owners": plan.owners, "base": 1_700_000_000_000_000, "step": 1_000_000}
    data |= {"per_owner": plan.per_owner}
    async with await connect_async(namespace=NAMESPACE) as store:
        table = store.table(TABLE)
        for batch in Dataset(**data).loads(_LOAD_ITEMS):  # type: ignore[arg-type]
            await table.put_many(batch)
        clients = Clients(plan, folder, data)
        try:
            await asyncio.to_thread(clients.wait_until_ready)
            return await Festival(plan, store, clients).run()
        finally:
            clients.close()


def measure(plan: Plan) -> dict[str, Any]:
    """One festival in a temporary folder; see the module."""
    folder = Path(tempfile.mkdtemp(prefix="festival"))
    try:
        start_local_ray(folder, num_cpus=2)
        os.chdir(folder)  # Ray's workers look for modules where the program was that starts them
        connect_ray(data_dir=folder)
        from timetier.actors.launch import start_cluster, stop_cluster

        config = load_config(None, data_dir=folder).model_copy(update={"namespace": NAMESPACE})
        start_cluster(config, timeout_s=_START_S)
        try:
            return asyncio.run(_measure(plan, folder))
        finally:
            stop_cluster(NAMESPACE)
    finally:
        os.chdir(_ROOT)
        stop_local_ray(folder)
        shutil.rmtree(folder, ignore_errors=True)


def in_words(report: dict[str, Any]) -> str:
    """The report as a table."""
    columns = ["due_per_s", "reads_per_s", "p50_ms", "p99_ms", "messages_per_s", "questions_per_s", "failed"]
    lines = [" ".join([f"{'phase':<15}", *(f"{name:>15}" for name in columns)])]
    for name, phase in report["phases"].items():
        lines.append(" ".join([f"{name:<15}", *(f"{phase[column]:>15,}" for column in columns)]))
    growth, took = report["growth"], report["took_load_after_s"]
    lines += [
        "",
        f"from calm to peak: reads x{growth['reads_per_s']}, messages to the storage tier "
        f"x{growth['messages_per_s']}, timelines it is asked about x{growth['questions_per_s']}",
        f"the added cache node took load {took['asked']} s after the command, {took['published']} s after it was "
        f"published; items or bytes moved: {report['moved']:,.0f}",
    ]
    return "\n".join([*lines, *(f"{count}x {error}" for error, count in report["errors"].items())])


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object, with its curves.")
@click.option("--quick", is_flag=True, help="A few seconds at a low rate: a test that everything works.")
@click.option("--rate", type=float, default=1_000.0, show_default=True, help="Calm reads a second, of all clients.")
@click.option("--clients", type=int, default=2, show_default=True, help="Client processes.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of the owners that are read.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw the curves into this SVG.")
def main(as_json: bool, quick: bool, rate: float, clients: int, seed: int, plot: Path | None) -> None:
    """Raise the reads fivefold and add a cache node in the middle."""
    end_on_signals()
    plot = None if plot is None else plot.absolute()
    report = measure(QUICK if quick else Plan(rate=rate, clients=clients, seed=seed))
    if plot is not None:
        plot.write_text(draw(report))
    print(json.dumps(report) if as_json else in_words(report))


if __name__ == "__main__":
    main()
