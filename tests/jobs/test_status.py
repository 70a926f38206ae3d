"""What `timetier status` says of a storage replica that lost its data."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

from storage_cluster import BUCKETS, StorageCluster, wait_for
from timetier.cluster.keys import timeline_key
from timetier.cluster.storage.service import StorageService
from timetier.jobs.status_text import describe


def node(service: StorageService) -> dict[str, Any]:
    return {"node": service.name, **service.status()}


def text_of(cluster: StorageCluster) -> str:
    router = {"node": "router", "state": "serving"}
    nodes = [node(service) for service in cluster.services.values()]
    return describe({"namespace": "test", "state": "degraded", "router": router, "nodes": nodes})


def test_status_shows_a_learner_with_what_it_waits_for_and_how_far_it_is(tmp_path: Path) -> None:
    async def body() -> None:
        async with StorageCluster(tmp_path) as cluster:
            for number in range(20):
                timeline = timeline_key(b"t", b"owner-%d" % number, BUCKETS)
                await cluster.put(0, timeline, number.to_bytes(16, "big"), [(b"\x80" + bytes(7) + b"\0\1", b"x")])
            assert "learner" not in text_of(cluster)
            await cluster.stop(2)
            shutil.rmtree(tmp_path / "storage-0-2")
            await cluster.stop(1)
            learner = await cluster.start(2, may_format=False, may_learn=True)
            await wait_for(lambda: "storage-0-1" in learner.status()["reason"], "the learner to ask its peers")
            lines = text_of(cluster).splitlines()
            state = next(line.split()[:2] for line in lines if line.startswith("storage-0-2"))
            assert state == ["storage-0-2", "learning"]
            told = lines[next(i for i, line in enumerate(lines) if line.startswith("learner")) + 1]
            assert told.split()[:2] == ["storage-0-2", "asking"]

            phases = set()
            await cluster.start(1)
            while (status := learner.status())["state"] != "voting":
                phases.add(status.get("rejoin", {}).get("phase"))
                text_of(cluster)
                await asyncio.sleep(0)
            assert {"copying", "verifying"} <= phases
            assert "learner" not in text_of(cluster)

    asyncio.run(asyncio.wait_for(body(), 60))
