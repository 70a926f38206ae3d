"""The system under test: a TimeTier cluster of real processes in a Ray, seen from outside.

What can be done to its processes is here; whoever made the Ray says which of them are its own (`zoned.py`).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from timetier.actors.processes import send, started, wait_for
from timetier.cluster.config import Config

from .network import ZoneNetwork
from .workload import TABLE

_POLL_S = 0.25
_VERIFY_S = 180.0
_TELL_S = 8.0
_WAIT = threading.Event()  # never set: its `wait` is the pause between two looks


class System:
    """A cluster, for a process that is connected to its Ray.

    `folder`: for data, logs and histories. `environment`: what leads other processes to this Ray. `network`: with it
    zones can be cut off; without it `no_network` says why not.
    """

    network: ZoneNetwork | None = None
    no_network = "there are no zones"

    def __init__(self, folder: Path, namespace: str, environment: Mapping[str, str]) -> None:
        self.folder = folder
        self.data_dir = folder / "data"
        self.namespace = namespace
        self.environment = dict(environment)
        self._stopped: dict[int, str] = {}  # processes that are paused

    def start(self, **sections: Any) -> Self:
        """Start the cluster; `sections` of its configuration replace the usual ones. Returns itself."""
        from timetier.actors.launch import start_cluster

        usual = {
            "namespace": self.namespace,
            "data_dir": self.data_dir,
            "buckets": 64,
            "sink": {"orphan_grace": 1.0, "block_rows": 256},
            "tables": {TABLE: {"timestamp_unit": "us", "cold_after": "30d", "window": "30d"}},
        }
        start_cluster(Config.model_validate({**usual, **sections}))
        return self

    def owns(self, pid: int) -> bool:
        """Whether a process is one of this Ray: no other one is ever touched."""
        raise AssertionError("whoever made the Ray knows")

    def let_go(self) -> None:
        """Have all paused processes go on."""
        send(self._stopped, signal.SIGCONT)

    # ------------------------------------------------------------ zones, where there are any

    def kill_zone(self, zone: int) -> None:
        """kill -9 of a Ray node with all its actors."""
        raise AssertionError("there are no zones")

    def start_zone(self, zone: int) -> None:
        """Start a Ray node again."""
        raise AssertionError("there are no zones")

    def revive_zones(self) -> list[str]:
        """Start the Ray nodes that have ended by themselves (Ray had given them up). Names of their zones."""
        return []

    # ------------------------------------------------------------ what there is

    def status(self) -> dict[str, dict[str, Any]]:
        """Status of each node and of the Router, by name."""
        from timetier.actors.launch import cluster_status

        found = cluster_status(self.namespace)
        return {**{node["node"]: node for node in found["nodes"]}, "router": {"node": "router", **found["router"]}}

    def troubles(self) -> dict[str, str]:
        """Nodes that do not serve, each with its state and reason."""
        from timetier.actors.shell import SERVES

        return {
            name: f"{state['state']}: {state.get('reason', '')}"
            for name, state in self.status().items()
            if state["state"] not in SERVES
        }

    def wait_until_serving(self, timeout_s: float, tell: Callable[[str], None] = lambda text: None) -> float:
        """Until all nodes serve. Seconds that took. `tell` hears now and then which ones do not.

        Raises TimeoutError, with those that do not.
        """
        began = told_at = time.monotonic()
        while troubles := self.troubles():
            now = time.monotonic()
            told = "; ".join(f"{name} {why}" for name, why in troubles.items())
            if now - began > timeout_s:
                raise TimeoutError(f"not all nodes serve {timeout_s:.0f} s after a fault: {told}")
            if now - told_at > _TELL_S:
                told_at = now
                tell(f"not yet: {told}")
            _WAIT.wait(_POLL_S)
        return time.monotonic() - began

    def process(self, node: str) -> tuple[int, str]:
        """Process of a node: its pid, and what tells it from a later one. Raises LookupError when it does not run."""
        pid = self.status().get(node, {}).get("pid")
        since = started(pid) if pid else ""
        if not pid or not since or not self.owns(pid):
            raise LookupError(f"{node} has no process of this run")
        return pid, since

    # ------------------------------------------------------------ what is done to it

    def kill(self, node: str) -> None:
        """kill -9 of a node, and wait until its process is gone."""
        self._kill_process(*self.process(node))

    def _kill_process(self, pid: int, since: str) -> None:
        send({pid: since}, signal.SIGKILL)
        if not wait_for({pid: since}, 10.0):
            raise TimeoutError(f"process {pid} does not end")

    def wipe(self, node: str) -> None:
        """kill -9 of a node, and its folder is gone before anybody can start it again: it is stopped meanwhile."""
        process = self.process(node)
        self.pause(process)
        gone = self.data_dir / f"wiped-{time.monotonic_ns()}"
        (self.data_dir / node).rename(gone)
        self._kill_process(*process)
        self._stopped.pop(process[0], None)
        shutil.rmtree(gone)

    def pause(self, process: tuple[int, str]) -> None:
        """SIGSTOP."""
        pid, since = process
        self._stopped[pid] = since
        send({pid: since}, signal.SIGSTOP)

    def go_on(self, process: tuple[int, str]) -> None:
        """SIGCONT."""
        pid, since = process
        send({pid: since}, signal.SIGCONT)
        self._stopped.pop(pid, None)

    def restart(self, node: str) -> None:
        """Have Ray end the actor and start it again."""
        import ray

        ray.kill(ray.get_actor(node, namespace=self.namespace), no_restart=False)

    def verify(self) -> dict[str, Any]:
        """What `timetier verify` says of the replicas, with its exit status."""
        done = subprocess.run(
            [sys.executable, "-m", "timetier.jobs.command_line", "verify", "--namespace", self.namespace, "--json"],
            capture_output=True,
            text=True,
            timeout=_VERIFY_S,
            env={**os.environ, **self.environment},
            check=False,
        )
        try:
            found = json.loads(done.stdout)
        except ValueError:
            return {"status": done.returncode, "said": (done.stderr or done.stdout).strip()[-500:]}
        return {"status": done.returncode, **found}
