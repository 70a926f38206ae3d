"""How fast a lost disk of a cold node comes back from its peers, and what reads of other files take meanwhile.

    python -m benchmarks.cold_disks [--json] [--mb 500] [--rate MB_PER_S]

Three cold nodes, each a process of its own, are given some files; then a disk of one of them is erased and filled
again. The bytes of each file are compared with those that were written. Beside it stands what `cp` and one fsync of
the same files take on this machine.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
from timetier.cluster.carriers.direct import DirectCarrier, host_id
from timetier.cluster.cold.block import FileBuilder, FileIndex, checksum, read_index
from timetier.cluster.cold.rows import Rows
from timetier.cluster.config import Config
from timetier.cluster.keys import item_key
from timetier.cluster.messages import (
    BlockBytes,
    BlockRead,
    DiskReplace,
    FileWrite,
    FileWritten,
    Pong,
    Status,
    StatusRequest,
)

from .nodes import SECRET, NodeProcesses, topology_in
from .processes import cpu_seconds

MIB = 1 << 20
NODE = "cold-0-0"
FILE_MB = 64
_DISK = 1
_PIECE_BYTES = 4 * MIB
_VALUE_BYTES = 1_000
_UNLIMITED_MB_PER_S = 65_536
_CALL_S = 60.0
_POLL_S = 0.05
_READ_EVERY_S = 0.02

Tell = Callable[[str], None]


async def measure_rebuild(
    folder: Path, mb: int, *, rate_mb_per_s: int | None = None, tell: Tell = print
) -> dict[str, Any]:
    """Figures of filling a disk with `mb` MiB; `rate_mb_per_s`: None for as fast as it goes.

    `folder`: an empty one with a short path. Raises RuntimeError when a file did not come back as it was.
    """
    rate = rate_mb_per_s or _UNLIMITED_MB_PER_S
    config = Config.model_validate({"data_dir": str(folder), "cold": {"disks": 2, "rebuild_mb_per_s": rate}})
    with NodeProcesses(folder, config, tiers=("cold",)) as nodes:
        cluster = _Cluster(folder, config)
        tell(f"writing {mb} MiB to three nodes")
        await cluster.fill(mb)
        tell(f"erasing disk {_DISK} of {NODE}, and filling it")
        found = await cluster.rebuild(nodes.pids)
        await cluster.close()
    cluster.check()
    copied_s = _copy(folder / "cold-0-1" / f"disk-{_DISK}", folder / "copy")
    return {
        **found,
        "limit_mb_per_s": rate_mb_per_s,
        "cp_and_fsync_mb_per_s": round(found["bytes"] / MIB / copied_s, 1),
    }


class _Cluster:
    """A client of the cold nodes."""

    def __init__(self, folder: Path, config: Config) -> None:
        topology = topology_in(folder, config)
        self._folder = folder
        self._nodes = [topology.cold_node(0, replica) for replica in range(topology.cold_replicas)]
        self._carrier = DirectCarrier(bytes.fromhex(SECRET), host_id=host_id())
        self._carrier.update(topology.addresses)
        self._crcs: dict[str, int] = {}
        self._beside: FileIndex

    async def close(self) -> None:
        await self._carrier.close()

    async def fill(self, mb: int) -> None:
        """Write files to the disk that will be lost, and one to the other disk."""
        for number in range(max(1, mb // FILE_MB)):
            await self._write(f"file-{number}.arrow", _DISK, _content(f"file-{number}.arrow", min(mb, FILE_MB)))
        beside = _content("beside.arrow", 8)
        self._beside = read_index(beside)
        await self._write("beside.arrow", 0, beside)

    async def _write(self, file: str, disk: int, data: bytes) -> None:
        crc = checksum(data)
        if disk == _DISK:
            self._crcs[file] = crc
        for node in self._nodes:
            for offset in range(0, len(data), _PIECE_BYTES):
                piece = data[offset : offset + _PIECE_BYTES]
                last = offset + len(piece) == len(data)
                answer = await self._carrier.call(node, FileWrite(file, disk, offset, piece, last, crc), _CALL_S)
                if not isinstance(answer, FileWritten):
                    raise RuntimeError(f"{node} did not take {file}: {answer}")

    async def rebuild(self, pids: dict[str, int]) -> dict[str, Any]:
        """Erase the disk, wait until it serves again; seconds, rates and CPU."""
        before = await self._reads(1.0)
        cpu = {node: cpu_seconds([pid]) for node, pid in pids.items()}
        began = time.perf_counter()
        answer = await self._carrier.call(NODE, DiskReplace(_DISK, True), _CALL_S)
        if answer != Pong():
            raise RuntimeError(f"the disk is not replaced: {answer}")
        reading = asyncio.create_task(self._reads(None))
        while (disk := await self._disk())["state"] != "serving":
            if disk["state"] != "replacing":
                raise RuntimeError(f"the disk is {disk['state']}: {disk['reason']}")
            await asyncio.sleep(_POLL_S)
        seconds = time.perf_counter() - began
        reading.cancel()
        during = self._during
        return {
            "files": disk["files"],
            "bytes": disk["bytes"],
            "seconds": round(seconds, 3),
            "mb_per_s": round(disk["bytes"] / MIB / seconds, 1),
            "cpu_s": {node: round(cpu_seconds([pid]) - cpu[node], 2) for node, pid in pids.items()},
            "read_beside_us": {"before": _percentiles(before), "during": _percentiles(during)},
        }

    async def _disk(self) -> dict[str, Any]:
        answer = await self._carrier.call(NODE, StatusRequest(), _CALL_S)
        assert isinstance(answer, Status), answer
        disk: dict[str, Any] = json.loads(answer.body)["disks"][_DISK]
        return disk

    async def _reads(self, seconds: float | None) -> list[float]:
        """Microseconds of block reads from the node's other disk, one at a time, for a while or until cancelled."""
        times = self._during = []
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds if seconds is not None else float("inf")
        choose = random.Random(1)
        while loop.time() < end:
            entry = choose.choice(self._beside.blocks)
            began = time.perf_counter()
            answer = await self._carrier.call(
                NODE, BlockRead("beside.arrow", entry.offset, entry.length, entry.crc), _CALL_S
            )
            if not isinstance(answer, BlockBytes):
                raise RuntimeError(f"a read of the other disk failed: {answer}")
            times.append(1e6 * (time.perf_counter() - began))
            await asyncio.sleep(_READ_EVERY_S)
        return times

    _during: list[float]

    def check(self) -> None:
        """Raises RuntimeError unless the files are there with the bytes that were written."""
        for file, crc in self._crcs.items():
            if checksum((self._folder / NODE / f"disk-{_DISK}" / file).read_bytes()) != crc:
                raise RuntimeError(f"{file} did not come back as it was")


def _content(file: str, mb: int) -> bytes:
    """A cold file of about `mb` MiB that no compression makes smaller."""
    source = random.Random(file)
    builder = FileBuilder(file, table=b"t", per_second=1, cold_group=0, run="r")
    per_block = (256 << 10) // _VALUE_BYTES
    for bucket in range(max(1, mb * MIB // (per_block * _VALUE_BYTES))):
        rows = Rows()
        for at in range(per_block):
            rows.append(b"owner-%04d" % bucket, item_key(at), source.randbytes(_VALUE_BYTES), at + 1, at)
        builder.add(rows, bucket=bucket, window_start=0, window_end=10_000, generation=1, block_rows=4_096)
    return builder.finish()


def _copy(source: Path, target: Path) -> float:
    """Seconds of copying the files of a folder, with an fsync of each."""
    target.mkdir()
    began = time.perf_counter()
    for path in source.glob("*.arrow"):
        shutil.copyfile(path, target / path.name)
        descriptor = os.open(target / path.name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - began


def _percentiles(times: list[float]) -> dict[str, float]:
    if not times:
        return {}
    return {name: round(float(np.percentile(times, p)), 1) for name, p in (("p50", 50), ("p99", 99))}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--mb", type=click.IntRange(1, 100_000), default=500, show_default=True, help="MiB on the lost disk.")
@click.option("--rate", type=click.IntRange(1, 65_536), help="MiB/s to copy at the most.  [default: no limit]")
def main(as_json: bool, mb: int, rate: int | None) -> None:
    """How fast a lost disk of a cold node comes back."""
    with tempfile.TemporaryDirectory(prefix="tt-disks-") as name:
        report = asyncio.run(
            measure_rebuild(Path(name), mb, rate_mb_per_s=rate, tell=lambda text: click.echo(text, err=True))
        )
    if as_json:
        print(json.dumps(report))
        return
    print(f"{report['files']} files, {report['bytes'] / MIB:,.1f} MiB in {report['seconds']:.2f} s")
    print(f"rebuild: {report['mb_per_s']:,.1f} MiB/s; cp and fsync: {report['cp_and_fsync_mb_per_s']:,.1f} MiB/s")
    for when, found in report["read_beside_us"].items():
        print(f"block read of the other disk, {when}: p50 {found['p50']:,.0f} us, p99 {found['p99']:,.0f} us")
    print("CPU seconds: " + ", ".join(f"{node} {spent}" for node, spent in report["cpu_s"].items()))


if __name__ == "__main__":
    main()
