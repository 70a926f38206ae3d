"""What scrubbing costs and gives: MB/s and CPU of a round without a limit, what it does to reads, MB/s of repairs.

    python -m benchmarks.cold_scrub [--json] [--mb 256] [--seconds 3]

Three cold nodes in one process, with real files and services; messages between them stay in memory. One node is
scrubbed; the page cache is dropped before, and the scrubber drops behind it, so the bytes come from the disk.
`cpu_s_per_gb` is the CPU time of the process for a GB. `reads`: latency of block reads of that node by two readers,
with no round under way, with one at the configured default rate, and with one without a limit.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import click
from timetier.cluster.carriers.memory import MemoryNetwork
from timetier.cluster.cold.block import FileBuilder, IndexEntry, read_index
from timetier.cluster.cold.rows import Rows
from timetier.cluster.cold.scrub_round import ScrubSettings
from timetier.cluster.cold.scrubber import USUAL_MB_PER_S
from timetier.cluster.cold.service import ColdService
from timetier.cluster.counters import Counters
from timetier.cluster.keys import item_key
from timetier.cluster.messages import BlockBytes, BlockRead, ScrubNow
from timetier.cluster.topology import Topology

FILE_MB = 32
NO_LIMIT_MB_PER_S = 100_000.0
_VALUE_BYTES = 4_096
_DEADLINE_S = 600.0
_READERS = 2


class _Group:
    """Three nodes with equal files. `entries`: (file, block) of all blocks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.network = MemoryNetwork()
        self.client = self.network.carrier("client")
        self.nodes: list[ColdService] = []
        self.entries: list[tuple[str, IndexEntry]] = []

    def fill(self, files: int, seed: int) -> None:
        random = Random(seed)
        for number in range(files):
            name = f"bench-{number:04d}.arrow"
            data = _file(name, random)
            self.entries += [(name, entry) for entry in read_index(data).blocks]
            for replica in range(3):
                path = self._path(replica, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as opened:
                    opened.write(data)
                    opened.flush()
                    os.fsync(opened.fileno())  # or else the page cache could not be dropped

    async def start(self) -> None:
        for replica in range(3):
            name = f"cold-0-{replica}"
            node = ColdService(
                name,
                0,
                replica,
                self.folder / name,
                _topology(),
                self.network.carrier(name),
                disks=1,
                read_threads=4,
                block_cache_bytes=0,
                counters=Counters(),
                scrub=ScrubSettings(grace_s=0.0),
            )
            await node.start()
            self.network.register(name, node.handle)
            self.nodes.append(node)

    async def stop(self) -> None:
        for node in self.nodes:
            await node.stop()

    async def begin_round(self, mb_per_s: float) -> None:
        await self.client.call("cold-0-0", ScrubNow(mb_per_s), 10.0)

    async def wait_for(self, counter: str, count: float) -> None:
        """Wait until the first node has counted so far."""
        deadline = time.monotonic() + _DEADLINE_S
        while self.nodes[0].counters.totals.get(counter, 0) < count:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{counter} did not reach {count} in {_DEADLINE_S:.0f} s")
            await asyncio.sleep(0.005)

    async def read_latencies_ms(self, seconds: float, seed: int) -> list[float]:
        """Block reads of the first node, one after another by each reader."""
        over = time.monotonic() + seconds
        found: list[float] = []

        async def reader(random: Random) -> None:
            while time.monotonic() < over:
                file, entry = random.choice(self.entries)
                began = time.perf_counter()
                question = BlockRead(file, entry.offset, entry.length, entry.crc)
                answer = await self.client.call("cold-0-0", question, 10.0)
                if not isinstance(answer, BlockBytes):
                    raise RuntimeError(f"a read failed: {answer}")
                found.append((time.perf_counter() - began) * 1e3)
                await asyncio.sleep(0.002)

        await asyncio.gather(*(reader(Random(seed + number)) for number in range(_READERS)))
        return found

    def lose(self, name: str) -> int:
        """Remove a file of the first node; its size."""
        path = self._path(0, name)
        size = path.stat().st_size
        path.unlink()
        return size

    def _path(self, replica: int, name: str) -> Path:
        return self.folder / f"cold-0-{replica}" / "disk-0" / name


def measure(folder: Path, *, mb: int = 256, seconds: float = 3.0, seed: int = 1) -> dict[str, Any]:
    """All figures, as JSON. `mb`: of files on each node; `seconds`: of each measurement of reads."""
    return asyncio.run(_measure(folder, mb, seconds, seed, lambda text: None))


async def _measure(folder: Path, mb: int, seconds: float, seed: int, tell: Callable[[str], None]) -> dict[str, Any]:
    group = _Group(folder)
    files = max(1, mb // FILE_MB)
    tell(f"writing {files} files of {FILE_MB} MB")
    group.fill(files, seed)
    await group.start()
    node = group.nodes[0]
    try:
        tell("scrubbing without a limit")
        cpu, began = time.process_time(), time.perf_counter()
        await group.begin_round(NO_LIMIT_MB_PER_S)
        await group.wait_for("scrub_rounds", 1)
        took_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu
        nbytes = node.status()["scrub"]["last"]["bytes"]
        reads: dict[str, Any] = {}
        tell("reading")
        reads["quiet"] = _percentiles(await group.read_latencies_ms(seconds, seed))
        for what, rate in (("usual_rate", USUAL_MB_PER_S), ("no_limit", NO_LIMIT_MB_PER_S)):
            tell(f"reading during a round: {what}")
            await group.begin_round(rate)
            done = node.counters.totals.get("scrub_bytes", 0)
            reads[what] = _percentiles(await group.read_latencies_ms(seconds, seed))
            scrubbed = node.counters.totals.get("scrub_bytes", 0) - done
            reads[what]["scrub_mb_per_s"] = round(scrubbed / 1e6 / seconds, 2)
        rounds = node.counters.totals.get("scrub_rounds", 0)
        if node.status()["scrub"].get("round"):
            await group.wait_for("scrub_rounds", rounds + 1)
        tell("repairing a lost file")
        size = group.lose("bench-0000.arrow")
        began = time.perf_counter()
        file, entry = group.entries[0]
        await group.client.call("cold-0-0", BlockRead(file, entry.offset, entry.length, entry.crc), 10.0)
        await group.wait_for("files_repaired", 1)
        repair_s = time.perf_counter() - began
    finally:
        await group.stop()
    return {
        "bytes": nbytes,
        "files": files,
        "scrub_mb_per_s": round(nbytes / 1e6 / took_s, 1),
        "cpu_s_per_gb": round(cpu_s / (nbytes / 1e9), 3),
        "usual_mb_per_s": USUAL_MB_PER_S,
        "reads": reads,
        "repair_mb_per_s": round(size / 1e6 / repair_s, 1),
    }


def _percentiles(values: list[float]) -> dict[str, Any]:
    cuts = statistics.quantiles(values, n=100)
    return {"reads": len(values), "p50_ms": round(cuts[49], 3), "p99_ms": round(cuts[98], 3)}


def _file(name: str, random: Random) -> bytes:
    """A file of about FILE_MB, which does not get smaller by compression."""
    rows = Rows()
    for number in range(FILE_MB * 1_000_000 // _VALUE_BYTES):
        rows.append(b"owner-%06d" % (number // 16), item_key(number), random.randbytes(_VALUE_BYTES), 1, number)
    builder = FileBuilder(name, table=b"bench", per_second=1, cold_group=0, run="bench")
    builder.add(rows, bucket=0, window_start=0, window_end=1 << 40, generation=1, block_rows=4_096)
    return builder.finish()


def _topology() -> Topology:
    return Topology(
        cluster_id="bench",
        namespace="bench",
        epoch=1,
        buckets=64,
        storage_groups=1,
        storage_replicas=3,
        cold_groups=1,
        cold_replicas=3,
        cold_disks=1,
        cache_nodes=0,
        tables={},
        default_table=None,
        addresses={},
        secret="00",
    )


def text_of(found: dict[str, Any]) -> str:
    """The figures for a person."""
    lines = [
        f"scrub without a limit: {found['scrub_mb_per_s']:,.1f} MB/s, {found['cpu_s_per_gb']:.2f} s of CPU a GB "
        f"({found['bytes'] / 1e6:,.0f} MB)",
        f"repair of a lost file: {found['repair_mb_per_s']:,.1f} MB/s",
    ]
    for what, one in found["reads"].items():
        rate = f", scrubbing {one['scrub_mb_per_s']:.1f} MB/s" if "scrub_mb_per_s" in one else ""
        lines.append(f"block reads, {what}: p50 {one['p50_ms']:.2f} ms, p99 {one['p99_ms']:.2f} ms{rate}")
    return "\n".join(lines)


@click.command()
@click.option("--mb", type=click.IntRange(min=FILE_MB), default=256, show_default=True, help="MB of files a node.")
@click.option("--seconds", type=click.FloatRange(min=0.5), default=3.0, show_default=True, help="Of reads, each time.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(mb: int, seconds: float, as_json: bool) -> None:
    """Measure the scrubber of a cold node."""
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(_measure(Path(folder), mb, seconds, 1, lambda text: click.echo(text, err=True)))
    click.echo(json.dumps(found) if as_json else text_of(found))


if __name__ == "__main__":
    main()
