"""A client process of one system: it does what it is told on stdin, one JSON object a line, and answers the same way.

Each system has one, so that no client shares an interpreter with another's threads, and its CPU can be told apart.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from timetier.actors.connecting import ClusterStore, connect_async
from timetier.actors.ray_session import connect_ray
from timetier.jobs.bench import TimeTierSubject
from timetier.jobs.bench_data import Dataset
from timetier.jobs.bench_report import merging, storage_counters
from timetier.jobs.bench_workloads import WORKLOADS, Bench, Subject, Workload, check, check_pages, client_cpu, load
from timetier.jobs.cli_sink import follow_sink

from .cold_reads import ColdReads
from .processes import cpu_by_part

NAMESPACE = "timetier-compare"
TABLE = "bench"
_TRIAL_S = 0.3
_CHECKED = 2_000
_LOAD_ITEMS = 2_000


class Client(Protocol):
    """`faces`: of those, the fastest is found for each workload with several callers; the first one does the others."""

    faces: Mapping[str, Subject]
    told: dict[str, Any]

    async def load_pages(self, data: Dataset) -> None: ...

    async def close(self) -> None: ...


class PeerClient:
    """Of Redis or etcd."""

    def __init__(self, name: str, where: dict[str, Any]) -> None:
        from . import peer_clients as peers

        self.told: dict[str, Any] = {}
        self._redis: peers.BlockingRedis | None = None
        self._blocking: peers.BlockingRedis | peers.BlockingEtcd
        self._async: peers.AsyncRedis | peers.AsyncEtcd
        if name == "redis":
            self._blocking = self._redis = peers.BlockingRedis(**where)
            self._async = peers.AsyncRedis(**where)
        else:
            self._blocking, self._async = peers.BlockingEtcd(**where), peers.AsyncEtcd(**where)
        self.faces: Mapping[str, Subject] = {"threads": self._blocking, "asyncio": self._async}

    async def load_pages(self, data: Dataset) -> None:
        if self._redis is not None:
            self._redis.load_pages(data)

    async def close(self) -> None:
        self._blocking.close()
        await self._async.close()


class TimeTierClient:
    """Of a cluster in the Ray of a data folder."""

    def __init__(self, store: ClusterStore, nodes: dict[str, int], cold: ColdReads) -> None:
        """`nodes`: pids by name."""
        self._store = store
        self.faces: Mapping[str, Subject] = {"asyncio": TimeTierSubject(store.table(TABLE))}
        self.told: dict[str, Any] = {"nodes": nodes}
        self.cold = cold

    @classmethod
    async def open(cls, folder: Path, seed: int) -> TimeTierClient:
        """Start the cluster with its data in `folder`, and connect to it."""
        os.chdir(folder)  # Ray's workers look for modules where the program was that starts them
        connect_ray(data_dir=folder)
        from timetier.actors.launch import start_cluster  # imports Ray, whose settings connect_ray has made

        start_cluster(None, namespace=NAMESPACE, data_dir=folder)
        store = await connect_async(namespace=NAMESPACE)
        nodes = (await store.status())["nodes"]
        cold = ColdReads(store, folder, _sink, seed)
        return cls(store, {name: node["pid"] for name, node in nodes.items()}, cold)

    async def load_pages(self, data: Dataset) -> None:
        """Pages are of the same items."""

    async def counters(self) -> dict[str, dict[str, float]]:
        return storage_counters((await self._store.status())["nodes"])

    async def close(self) -> None:
        await self._store.close()


async def _sink(table: str, before: int) -> None:
    from timetier.actors.jobs_client import SUCCEEDED, SinkOptions  # imports Ray, which is connected by now

    options = SinkOptions(before=before, by_event_time=True, table=table)
    found = await follow_sink(NAMESPACE, options, lambda done, total: None)
    if found["state"] != SUCCEEDED:
        raise RuntimeError(f"the sink failed: {found['reason']}")


class Worker:
    """Does what the comparison asks for. Each `do_` method is one order."""

    def __init__(self, client: Client, spec: dict[str, Any]) -> None:
        self._client = client
        self._data = {name: Dataset(**given) for name, given in spec["data"].items()}
        self._parts: dict[str, list[int]] = {}
        self._rng = np.random.default_rng(spec["seed"])
        self._face_of: dict[str, str] = {}
        self._bench = Bench(
            self._subject,
            reads=self._data["reads"],
            writes=self._data["writes"],
            mix=self._data["mix"],
            seed=spec["seed"],
            cpu=self._cpu,
        )

    async def do(self, order: dict[str, Any]) -> Any:
        """Answer one order. Raises whatever goes wrong."""
        method: Callable[..., Any] = getattr(self, f"do_{order.pop('do')}")
        return await method(**order)

    async def do_hello(self) -> dict[str, Any]:
        return self._client.told

    async def do_watch(self, parts: dict[str, list[int]]) -> None:
        """Count the CPU of these processes, too."""
        self._parts = parts

    async def do_load(self, name: str) -> float:
        return await load(self._first, self._data[name], per_call=_LOAD_ITEMS)

    async def do_load_pages(self) -> None:
        await self._client.load_pages(self._data["reads"])

    async def do_check(self) -> int:
        """How many items and pages are wrong."""
        reads = self._data["reads"]
        wrong = await check(self._first, reads, self._rng) + await check_pages(self._first, reads, self._rng)
        for subject in list(self._client.faces.values())[1:]:
            wrong += await check(subject, reads, self._rng, items=_CHECKED)
            wrong += await check_pages(subject, reads, self._rng)
        return wrong

    async def do_try(self, workload: str) -> str:
        """Find the face that does a workload fastest, and use it from now on; its name."""
        rates = {}
        for name in self._client.faces:
            self._face_of[workload] = name
            rates[name] = (await self._bench.slice(WORKLOADS[workload], _TRIAL_S)).items_per_s
        self._face_of[workload] = max(rates, key=lambda name: rates[name])
        return self._face_of[workload]

    async def do_slice(self, workload: str, seconds: float, counted: bool = False) -> dict[str, Any]:
        if not counted:
            return {"timing": asdict(await self._bench.slice(WORKLOADS[workload], seconds))}
        assert isinstance(self._client, TimeTierClient), "only TimeTier counts"
        before = await self._client.counters()
        timing = await self._bench.slice(WORKLOADS[workload], seconds)
        after = await self._client.counters()
        return {"timing": asdict(timing), "merging": merging(before, after, replicas=len(after))}

    async def do_cold_prepare(self, blocks: int, rows: int) -> dict[str, Any]:
        assert isinstance(self._client, TimeTierClient), "only TimeTier has a cold tier"
        return await self._client.cold.prepare(blocks, rows, lambda done, total: None)

    async def do_cold(self, part: int, parts: int) -> dict[str, list[float]]:
        assert isinstance(self._client, TimeTierClient), "only TimeTier has a cold tier"
        return await self._client.cold.measure(part, parts)

    @property
    def _first(self) -> Subject:
        return next(iter(self._client.faces.values()))

    def _subject(self, workload: Workload) -> Subject:
        name = self._face_of.get(workload.name)
        return self._first if name is None else self._client.faces[name]

    def _cpu(self) -> dict[str, float]:
        return {**client_cpu(), **cpu_by_part(self._parts)}


async def serve(spec: dict[str, Any], answers: Any) -> None:
    """Answer orders until stdin ends."""
    client: Client
    try:
        if spec["system"] == "timetier":
            client = await TimeTierClient.open(Path(spec["client"]["folder"]), spec["seed"])
        else:
            client = PeerClient(spec["system"], spec["client"])
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=answers, flush=True)
        return
    worker = Worker(client, spec)
    loop = asyncio.get_running_loop()
    # The loop goes on while nothing is asked: a client has work of its own, such as following the topology.
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        try:
            told = {"answer": await worker.do(json.loads(line))}
        except Exception as error:
            told = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(told), file=answers, flush=True)
    await client.close()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Ray prints is no answer
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(json.loads(sys.argv[1]), answers))


if __name__ == "__main__":
    main()
