"""The demonstration: real events through all three tiers, with actors killed on the way, and every item compared.

It starts a cluster of its own, loads the sample, reads every item back through the memory tier, sinks what is older
than two years before the newest event, reads everything again across the tiers, kills one storage and one cold actor
and reads and writes on. Nothing of it is left running.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import random
import shutil
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..actors.local_ray import start_local_ray, stop_local_ray
from ..cluster.client.faces import Store, Table
from ..cluster.errors import InvalidRequest, Unavailable
from .cli_common import keep_stdout_clean, note
from .load import LoadReport, load_file
from .rejects import Rejects
from .rows import read_rows
from .sample import SAMPLE, SAMPLE_COLUMNS, SAMPLE_TABLE
from .sources import open_source

NAMESPACE = "timetier-demo"
TWO_YEARS_US = 2 * 365 * 86_400_000_000
OWNERS_PER_CALL = 20
ITEMS_PER_PAGE = 2_000
READERS = 4
SINGLE_READS = 1_000
COLD_READS = 300
WRITES_AFTER_KILL = 300
RECOVERY_S = 30.0
MICROSECONDS = 1e6

Step = Callable[[str], contextlib.AbstractContextManager[Callable[[int, int | None], None]]]
"""Opens the progress display of one step; gives the function that takes (done, total)."""

Truth = dict[bytes, dict[tuple[int, bytes], bytes]]
"""owner -> (timestamp, id) -> value, as read from the file."""


@dataclasses.dataclass
class DemoReport:
    """Figures of one run. `lost`: items that were not found; `different`: items with another value than the file's.

    Times in microseconds. `raw_bytes`: owners, timestamps, ids and values as they are. `storage_bytes`: files and
    write buffers of the three storage nodes together; `cold_bytes`: one copy of the cold files.
    """

    events: int = 0
    events_loaded: int = 0
    events_rejected: int = 0
    timelines: int = 0
    lost: int = 0
    different: int = 0
    sunk: int = 0
    blocks: int = 0
    raw_bytes: int = 0
    storage_bytes: int = 0
    cold_bytes: int = 0
    compression: float = 0.0
    loads_per_s: int = 0
    reads_per_s: int = 0
    tiered_reads_per_s: int = 0
    read_p50_us: int = 0
    read_p99_us: int = 0
    cold_read_p50_us: int = 0
    killed: list[str] = dataclasses.field(default_factory=list)
    writes_after_kill: int = 0
    recovered_s: float = 0.0
    seconds: float = 0.0
    seed: int = 0

    @property
    def good(self) -> bool:
        """Whether nothing is lost or different, and every row of the file is accounted for."""
        return not (self.lost or self.different) and self.events == self.events_loaded + self.events_rejected


def run_demo(data_dir: Path | None, step: Step, *, seed: int = 0) -> DemoReport:
    """Run the whole demonstration in `data_dir` (None: a temporary folder, removed at the end).

    Raises InvalidRequest when the folder holds something already, Unavailable when the cluster does not come up.
    """
    began = time.perf_counter()
    if data_dir is not None and data_dir.exists() and any(data_dir.iterdir()):
        raise InvalidRequest(f"{data_dir} is not empty: name a fresh folder, or none for a temporary one")
    folder = data_dir or Path(tempfile.mkdtemp(prefix="timetier-demo-"))
    report = DemoReport(seed=seed)
    try:
        with _own_cluster(folder, step) as store:
            _demonstrate(store, step, report, random.Random(seed))
    finally:
        if data_dir is None:
            shutil.rmtree(folder, ignore_errors=True)
    report.seconds = round(time.perf_counter() - began, 1)
    return report


@contextlib.contextmanager
def _own_cluster(folder: Path, step: Step) -> Iterator[Store]:
    """A Ray and a cluster in it that end with the demonstration, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    home = Path.cwd()
    keep_stdout_clean()
    try:
        with step("starting Ray") as tell:
            start_local_ray(folder)
            tell(1, 1)
        from .. import connect
        from ..actors.launch import start_cluster
        from ..actors.ray_session import connect_ray

        os.chdir(folder)
        connect_ray(data_dir=folder)
        with step("starting nodes") as tell:
            start_cluster(None, namespace=NAMESPACE, data_dir=folder, progress=lambda done, total, _: tell(done, total))
        with connect(namespace=NAMESPACE) as store:
            yield store
    finally:
        os.chdir(home)
        _end_ray(folder)


def _end_ray(folder: Path) -> None:
    import ray

    with _undisturbed():
        ray.shutdown()
        stop_local_ray(folder)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """A second Ctrl-C does not end what runs in here halfway."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals don't come here
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _demonstrate(store: Store, step: Step, report: DemoReport, rng: random.Random) -> None:
    table = store.table(SAMPLE_TABLE)
    truth = _read_file(step, report)
    with step("loading") as tell:
        loaded = load_file(table, SAMPLE, SAMPLE_COLUMNS, progress=tell)
    _note_load(report, loaded)
    with step("reading through the memory tier") as tell:
        report.reads_per_s = _compare_all(table, truth, report, tell)
    newest = max(timestamp for items in truth.values() for timestamp, _ in items)
    cut = newest - TWO_YEARS_US
    with step("sinking to the cold tier") as tell:
        _sink(cut, report, tell)
    with step("reading across the tiers") as tell:
        report.tiered_reads_per_s = _compare_all(table, truth, report, tell)
    _measure_reads(table, truth, cut, report, rng)
    with step("reading and writing with actors killed") as tell:
        _kill_and_go_on(table, truth, report, rng, tell)
    _note_sizes(report)


def _read_file(step: Step, report: DemoReport) -> Truth:
    """The file's content as a dictionary, to compare with."""
    truth: Truth = {}
    with step("reading the file") as tell, Rejects(None) as rejects:
        source = open_source(SAMPLE, rejects, None)
        for batch in read_rows(source, SAMPLE_COLUMNS, int(MICROSECONDS), rejects):
            for owner, timestamp, item_id, value in zip(
                batch.owners, batch.timestamps, batch.ids, batch.values, strict=True
            ):
                truth.setdefault(owner, {})[timestamp, item_id] = value
                report.raw_bytes += len(owner) + 8 + len(item_id) + len(value)
            tell(sum(map(len, truth.values())), source.total)
    return truth


def _note_load(report: DemoReport, loaded: LoadReport) -> None:
    report.events = loaded.rows
    report.events_loaded = loaded.loaded + loaded.unchanged
    report.events_rejected = loaded.rejected + loaded.duplicates + loaded.overwritten
    report.timelines = loaded.timelines
    report.loads_per_s = round(loaded.loaded / loaded.seconds)


# ---------------------------------------------------------------- reading everything


def _compare_all(table: Table, truth: Truth, report: DemoReport, tell: Callable[[int, int | None], None]) -> int:
    """Read every timeline page by page and compare it with the file; items a second."""
    began = time.perf_counter()
    owners = list(truth)
    chunks = [owners[at : at + OWNERS_PER_CALL] for at in range(0, len(owners), OWNERS_PER_CALL)]
    total = sum(map(len, truth.values()))
    done = 0
    with ThreadPoolExecutor(READERS) as pool:
        for found in pool.map(lambda chunk: _read_timelines(table, chunk), chunks):
            for owner, items in found.items():
                expected = truth[owner]
                report.lost += sum(key not in items for key in expected)
                report.different += sum(expected.get(key) != value for key, value in items.items())
                done += len(items)
            tell(done, total)
    return round(done / (time.perf_counter() - began))


def _read_timelines(table: Table, owners: list[bytes]) -> Truth:
    found: Truth = {}
    for owner, page in zip(owners, table.timelines(owners, limit=ITEMS_PER_PAGE), strict=True):
        items = found.setdefault(owner, {})
        while True:
            for item in page.items:
                items[item.timestamp, item.id] = item.value
            if page.next is None:
                break
            page = table.timeline(owner, limit=ITEMS_PER_PAGE, before=page.next)
    return found


# ---------------------------------------------------------------- the sink


def _sink(cut: int, report: DemoReport, tell: Callable[[int, int | None], None]) -> None:
    from ..actors.jobs_client import SUCCEEDED, SinkOptions
    from .cli_sink import follow_sink

    options = SinkOptions(before=cut, by_event_time=True, table=SAMPLE_TABLE)
    found = asyncio.run(follow_sink(NAMESPACE, options, tell))
    if found["state"] != SUCCEEDED:
        raise Unavailable(f"the sink failed: {found['reason']}")
    report.sunk, report.blocks = found["rows"], found["blocks"]
    report.cold_bytes = found["cold_bytes"]
    report.compression = round(found["raw_bytes"] / max(found["cold_bytes"], 1), 2)


# ---------------------------------------------------------------- single reads


def _measure_reads(table: Table, truth: Truth, cut: int, report: DemoReport, rng: random.Random) -> None:
    addresses = [(owner, *key) for owner, items in truth.items() for key in items]
    hot = [address for address in addresses if address[1] >= cut]
    cold = [address for address in addresses if address[1] < cut]
    times = sorted(_timed_reads(table, truth, rng.choices(hot, k=SINGLE_READS), report))
    report.read_p50_us, report.read_p99_us = _us(statistics.median(times)), _us(times[int(len(times) * 0.99)])
    report.cold_read_p50_us = _us(
        statistics.median(_timed_reads(table, truth, rng.choices(cold, k=COLD_READS), report))
    )


def _timed_reads(
    table: Table, truth: Truth, addresses: list[tuple[bytes, int, bytes]], report: DemoReport
) -> list[float]:
    """Seconds that each single read took; what comes back is compared."""
    times = []
    for owner, timestamp, item_id in addresses:
        began = time.perf_counter()
        item = table.get(owner, timestamp, id=item_id)
        times.append(time.perf_counter() - began)
        report.lost += item is None
        report.different += item is not None and item.value != truth[owner][timestamp, item_id]
    return times


def _us(seconds: float) -> int:
    return round(seconds * MICROSECONDS)


# ---------------------------------------------------------------- killed actors


def _kill_and_go_on(
    table: Table, truth: Truth, report: DemoReport, rng: random.Random, tell: Callable[[int, int | None], None]
) -> None:
    """Kill a storage and a cold actor with SIGKILL; read old and new items and write meanwhile."""
    pids = {node["node"]: node["pid"] for node in _nodes()}
    report.killed = [rng.choice([name for name in pids if name.startswith(tier)]) for tier in ("storage-", "cold-")]
    note(f"killing {' and '.join(report.killed)}: Ray tells of that, and starts them again")
    for name in report.killed:
        os.kill(pids[name], signal.SIGKILL)
    killed_at = time.perf_counter()
    addresses = [(owner, *key) for owner, items in truth.items() for key in items]
    written: dict[int, int] = {}
    for number in range(WRITES_AFTER_KILL):
        written[number] = table.put(b"the demonstration", number, b"written with %d actors killed" % len(report.killed))
        _timed_reads(table, truth, [rng.choice(addresses)], report)
        tell(number + 1, WRITES_AFTER_KILL)
    report.writes_after_kill = len(written)
    report.recovered_s = round(_wait_until_all_serve(killed_at), 1)
    found = table.get_many([(b"the demonstration", number) for number in written])
    report.lost += sum(item is None for item in found)
    report.different += sum(item is not None and item.version != written[number] for number, item in enumerate(found))
    table.delete_timeline(b"the demonstration")


def _wait_until_all_serve(since: float) -> float:
    """Seconds from `since` until every node serves again."""
    from ..actors.shell import SERVES

    while time.perf_counter() - since < RECOVERY_S:
        states = {node["node"]: node["state"] for node in _nodes()}
        if SERVES.issuperset(states.values()):
            return time.perf_counter() - since
        time.sleep(0.1)
    raise Unavailable(f"not all nodes serve again after {RECOVERY_S:.0f} s: {states}")


def _nodes() -> list[dict[str, Any]]:
    from ..actors.launch import cluster_status

    return list(cluster_status(NAMESPACE)["nodes"])


def _note_sizes(report: DemoReport) -> None:
    report.storage_bytes = sum(int(node.get("engine_bytes", 0)) for node in _nodes())
