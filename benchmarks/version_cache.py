"""The version cache by itself, and what it is worth to a storage node that was killed.

    python -m benchmarks.version_cache [--timelines N] [--json]

* look-ups and notes a second, by the size of a batch;
* bytes an entry; hit rate when the cache has room for a tenth of the timelines that are asked for (Zipf, 0.99), beside
  that of one LRU over all entries;
* a real storage node (one replica, RocksDB, a process of its own) is killed with SIGKILL and started again. A reader
  then asks of all timelines whether they are still at their versions, 1,000 a call, and asks by key for what the cache
  can't tell, as a cache node does. Once with the cache in shared memory, once in private memory.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from timetier.cluster.carriers.direct import DirectCarrier, DirectServer, host_id
from timetier.cluster.config import Config
from timetier.cluster.counters import Counters
from timetier.cluster.identity import open_identity
from timetier.cluster.keys import digest_seed, item_key, timeline_digest, timeline_key
from timetier.cluster.messages import (
    OK,
    PUT,
    AskSame,
    AskVersions,
    Same,
    Versions,
    Write,
    Written,
    pack_i64,
    pack_u32,
    unpack_u32,
)
from timetier.cluster.storage.service import StorageService
from timetier.cluster.storage.version_cache import HEADER_BYTES, ROW_BYTES, WAYS, Owner, VersionCache
from timetier.cluster.storage.version_home import open_home

from .nodes import SECRET, topology_in

NODE = "storage-0-0"
BATCHES = (1, 100, 1_000, 10_000)
PER_CALL = 1_000
ZIPF = 0.99
_SLICE_S = 0.5
_CALL_S = 30.0
_OWNER = Owner(b"benchmark", life=1, past=None, seed=0)


# ---------------------------------------------------------------- the array


def speed(timelines: int) -> dict[str, Any]:
    """Look-ups and notes a second in a cache that holds all timelines, each asked for with equal chance."""
    random = np.random.default_rng(1)
    cache, digests = _filled(timelines, rows=timelines * 2 // WAYS)
    found: dict[str, Any] = {"entries": cache.entries, "bytes_an_entry": round(ROW_BYTES / WAYS, 2)}
    for size in BATCHES:
        batches = [digests[random.integers(0, timelines, size)].tobytes() for _ in range(max(4, 20_000 // size))]
        versions = np.zeros(size, dtype=np.int64)
        found[f"look_ups_per_s_{size}"] = round(_rate(batches, cache.look_up))
        found[f"notes_per_s_{size}"] = round(_rate(batches, lambda batch, v=versions: cache.note(batch, v)))  # type: ignore[misc]
    return found


def _filled(timelines: int, rows: int) -> tuple[VersionCache, npt.NDArray[np.uint64]]:
    cache = VersionCache(bytearray(HEADER_BYTES + ROW_BYTES * rows), _OWNER)
    digests = _digests(np.random.default_rng(0), timelines)
    for start in range(0, timelines, 10_000):
        part = digests[start : start + 10_000]
        cache.note(part.tobytes(), np.zeros(len(part), dtype=np.int64))
    return cache, digests


def _digests(random: np.random.Generator, count: int) -> npt.NDArray[np.uint64]:
    return np.frombuffer(random.bytes(16 * count), dtype=np.uint64).reshape(count, 2)


def _rate(batches: list[bytes], work: Callable[[bytes], object]) -> float:
    """Entries a second: the best of three slices, since others use the machine, too."""
    best = 0.0
    for _ in range(3):
        done, began = 0, time.perf_counter()
        while (spent := time.perf_counter() - began) < _SLICE_S / 3:
            for batch in batches:
                work(batch)
                done += len(batch) // 16
        best = max(best, done / spent)
    return best


def hit_rate(timelines: int) -> dict[str, Any]:
    """Share of look-ups that a cache with room for a tenth of the timelines answers, after it has filled up."""
    random = np.random.default_rng(2)
    weights = 1.0 / np.arange(1, timelines + 1) ** ZIPF
    chances = np.cumsum(weights / weights.sum())
    rows = timelines // 10 // WAYS
    cache = VersionCache(bytearray(HEADER_BYTES + ROW_BYTES * rows), _OWNER)
    digests = _digests(random, timelines)
    plain: OrderedDict[int, None] = OrderedDict()
    hits = plain_hits = asked = 0
    rounds = max(20, timelines // 500)
    for number in range(rounds):
        drawn = np.unique(np.searchsorted(chances, random.random(PER_CALL)).clip(0, timelines - 1))
        batch = digests[drawn]
        missing = cache.look_up(batch.tobytes()) < 0
        cache.note(batch[missing].tobytes(), np.zeros(int(missing.sum()), dtype=np.int64))
        known = 0
        for timeline in drawn.tolist():
            known += timeline in plain
            plain[timeline] = None
            plain.move_to_end(timeline)
            if len(plain) > rows * WAYS:
                plain.popitem(last=False)
        if number >= rounds // 2:
            asked += len(drawn)
            hits += len(drawn) - int(missing.sum())
            plain_hits += known
    return {
        "capacity": rows * WAYS,
        "hit_rate": round(hits / asked, 4),
        "hit_rate_one_lru": round(plain_hits / asked, 4),
    }


# ---------------------------------------------------------------- a node that is killed


def restarts(timelines: int) -> dict[str, Any]:
    """What a reader meets after the node was killed, with its cache in shared and in private memory."""
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with (
        tempfile.TemporaryDirectory(prefix="tt-versions-") as folder,
        tempfile.TemporaryDirectory(prefix="tt-versions-", dir=shared) as memory,
    ):
        return asyncio.run(_restarts(Path(folder), Path(memory), timelines))


async def _restarts(folder: Path, memory: Path, timelines: int) -> dict[str, Any]:
    keys = [timeline_key(b"t", b"owner-%d" % number, _config(folder).buckets) for number in range(timelines)]
    found: dict[str, Any] = {"timelines": timelines}
    process = _start(folder, memory)
    try:
        async with _calling(folder) as carrier:
            for start in range(0, timelines, PER_CALL):
                await _write(carrier, keys[start : start + PER_CALL])
            await _ask_all(carrier, keys)  # as after any time of reading, the cache knows them
        for name, where in (("shared", memory), ("private", None)):
            process.send_signal(signal.SIGKILL)
            process.wait()
            began = time.perf_counter()
            process = _start(folder, where)
            start_s = round(time.perf_counter() - began, 2)
            async with _calling(folder) as carrier:
                found[name] = {"start_s": start_s, **await _ask_all(carrier, keys)}
    finally:
        process.kill()
        process.wait()
    return found


@asynccontextmanager
async def _calling(folder: Path) -> AsyncIterator[DirectCarrier]:
    carrier = DirectCarrier(bytes.fromhex(SECRET), host_id=host_id())
    carrier.update(topology_in(folder, _config(folder)).addresses)
    try:
        yield carrier
    finally:
        await carrier.close()


async def _write(carrier: DirectCarrier, keys: list[bytes]) -> None:
    count = len(keys)
    ids = [os.urandom(16) for _ in keys]
    columns = bytes((PUT,)) * count, [item_key(1)] * count, [b"x" * 200] * count
    zeros, ones = pack_i64([0] * count), pack_u32([1] * count)
    message = Write(1, keys, ids, zeros, pack_i64([-1] * count), ones, *columns, int(_CALL_S * 1000))
    answer = await carrier.call(NODE, message, _CALL_S)
    if not isinstance(answer, Written) or set(answer.outcomes) != {OK}:
        raise RuntimeError(f"the node did not take a write: {answer}")


async def _ask_all(carrier: DirectCarrier, keys: list[bytes]) -> dict[str, Any]:
    """Ask once of every timeline whether it is still at version 1; by key for those that the cache can't tell."""
    seed = digest_seed(SECRET)
    told = 0
    began = time.perf_counter()
    for start in range(0, len(keys), PER_CALL):
        part = keys[start : start + PER_CALL]
        digests = b"".join([timeline_digest(key, seed) for key in part])
        answer = await carrier.call(NODE, AskSame(digests, pack_i64([1] * len(part))), _CALL_S)
        if not isinstance(answer, Same):
            raise RuntimeError(f"the node does not tell versions: {answer}")
        others = unpack_u32(answer.others)
        told += len(part) - len(others)
        if others:
            by_key = await carrier.call(NODE, AskVersions([part[index] for index in others]), _CALL_S)
            if not isinstance(by_key, Versions):
                raise RuntimeError(f"the node does not tell versions: {by_key}")
    took_s = time.perf_counter() - began
    return {"warm_again_s": round(took_s, 3), "told_by_cache": round(told / len(keys), 4)}


def _config(folder: Path) -> Config:
    return Config.model_validate(
        {"data_dir": str(folder), "storage": {"replicas": 1, "timelines_in_memory": 1_000_000, "version_cache_mb": 64}}
    )


def _start(folder: Path, memory: Path | None) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "benchmarks.version_cache", "--node", str(folder)]
    with (folder / "node.log").open("ab") as log:
        process = subprocess.Popen(
            [*command, "--memory", str(memory)] if memory is not None else command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd=Path(__file__).resolve().parent.parent,
        )
    assert process.stdout is not None
    if process.stdout.readline().strip() != b"ready":
        process.kill()
        raise RuntimeError(f"the node did not start: {(folder / 'node.log').read_text()[-500:]}")
    return process


async def _serve(folder: Path, memory: Path | None) -> None:
    """The node's process. It ends with its standard input."""
    config = _config(folder)
    topology = topology_in(folder, config)
    identity = open_identity(folder / NODE, "c", NODE, may_format=True)
    carrier = DirectCarrier(bytes.fromhex(SECRET), host_id=host_id())
    service = StorageService(
        name=NODE,
        group=0,
        replica=0,
        folder=folder / NODE,
        identity=identity,
        topology=topology,
        carrier=carrier,
        config=config.storage,
        counters=Counters(),
        versions=open_home(memory, identity, config.storage.version_cache_mb << 20),
    )
    server = DirectServer(
        service.handle, bytes.fromhex(SECRET), name=NODE, unix_path=topology.addresses[NODE].unix_path
    )
    await service.start()
    identity.mark_formatted()
    service.allow_votes()
    await server.start()
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop()
    await service.stop()
    await carrier.close()


# ---------------------------------------------------------------- command line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timelines", type=int, default=100_000, help="at least 10,000; 100,000 if not given")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--node", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--memory", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.node is not None:
        asyncio.run(_serve(options.node, options.memory))
        return 0
    if options.timelines < 10_000:
        parser.error(f"--timelines {options.timelines}: write at least 10000")
    report = {
        "array": speed(options.timelines),
        "zipf": hit_rate(options.timelines),
        "killed": restarts(options.timelines),
    }
    print(json.dumps(report) if options.json else _table(report))
    return 0


def _table(report: dict[str, Any]) -> str:
    lines = [f"{'batch':>10} {'look-ups/s':>14} {'notes/s':>14}"]
    array, zipf, killed = report["array"], report["zipf"], report["killed"]
    for size in BATCHES:
        lines.append(f"{size:>10,} {array[f'look_ups_per_s_{size}']:>14,} {array[f'notes_per_s_{size}']:>14,}")
    lines.append(f"bytes an entry: {array['bytes_an_entry']}")
    rates = f"{zipf['hit_rate']:.1%} (one LRU: {zipf['hit_rate_one_lru']:.1%})"
    lines.append(f"hit rate with room for a tenth of the timelines: {rates}")
    for name in ("shared", "private"):
        found = killed[name]
        lines.append(
            f"killed, cache in {name} memory: ready after {found['start_s']:.2f} s, all {killed['timelines']:,} "
            f"versions told after another {found['warm_again_s']:.2f} s, {found['told_by_cache']:.1%} by the cache"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
