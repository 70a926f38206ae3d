"""The Router actor: it knows the cluster's shape and tells everybody, but serves no request.

It holds the map's epoch, membership, addresses, the secret of the direct carrier and which data folders were
formatted (see `router_state.py`), pushes changes by long poll, and starts the sink on schedule (`sink_runs.py`). With
the Router dead reads and writes go on: nodes and clients keep the topology that they have.

A Router whose state is damaged, or belongs to another cluster, stays up and refuses everything but `status`: ending
would only make Ray restart it, and a state begun afresh would be a new cluster on old data.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from .. import __version__
from ..cluster.carriers.base import Address
from ..cluster.config import Config
from ..cluster.counters import Counters
from ..cluster.errors import InvalidRequest, TimeTierError
from ..cluster.gate import overloaded
from ..cluster.identity import Refused
from ..cluster.placement import NodePlace
from .jobs_client import SinkOptions
from .metrics import MetricsExport, export_metrics
from .router_state import RouterState
from .sink_runs import SinkRuns

NAME = "router"
MAX_POLL_S = 60.0
MAX_POLLS = 5_000  # that wait at a time; half of the calls that the actor takes

logger = logging.getLogger(__name__)


class Router:
    """Named `router` in the cluster's namespace, detached, restarted by Ray for ever with what it knew."""

    def __init__(self, namespace: str, data_dir: str, config: str | None, machines: Sequence[NodePlace] = ()) -> None:
        self._namespace = namespace
        self._changed = asyncio.Condition()
        self._state: RouterState | None = None
        self._reason = ""
        self._polls = 0
        self._counters = Counters()
        self._background: set[asyncio.Task[None]] = set()
        try:
            parsed = None if config is None else Config.from_json(config)
            self._state = RouterState.open(Path(data_dir), namespace, parsed, machines)
        except (TimeTierError, OSError) as error:
            self._reason = str(error)
            logger.error("the Router refuses to serve: %s", self._reason)
            return
        self._sinks = SinkRuns(namespace, self._state, self._counters)
        self._sinks.begin()
        self._keep(export_metrics([MetricsExport(NAME, NAME, "", self._counters)]))

    async def hello(self) -> dict[str, Any]:
        """`version` of the package, and `reason` why the Router refuses ("" = it serves)."""
        return {"version": __version__, "reason": self._reason}

    async def config(self) -> str:
        """The cluster's configuration, as JSON."""
        return self._open().config.to_json()

    async def topology(self, known_epoch: int, timeout_s: float) -> bytes | None:
        """Encoded `Topology` once its epoch is above `known_epoch`; None after about `timeout_s` seconds.

        Callers that wait alike are answered at different times, so that they do not come back all at once. Raises
        Unavailable when too many wait.
        """
        state = self._open()
        if known_epoch > state.epoch:
            state.lift_epoch(known_epoch)
        if known_epoch == state.epoch:
            if self._polls >= MAX_POLLS:
                raise overloaded(f"the Router holds {self._polls} long polls already")
            wait_s = min(timeout_s, MAX_POLL_S) * random.uniform(0.75, 1.0)
            self._polls += 1
            try:
                async with asyncio.timeout(wait_s), self._changed:
                    await self._changed.wait_for(lambda: state.epoch > known_epoch)
            except TimeoutError:
                return None
            finally:
                self._polls -= 1
        return msgspec.msgpack.encode(state.topology())

    async def places(self) -> dict[str, NodePlace]:
        """Where each node lives; empty without zones."""
        return self._open().places

    async def register(self, address: bytes) -> int:
        """Note where a node listens (an encoded `Address`). The epoch from which on everybody knows it."""
        state = self._open()
        try:
            parsed = msgspec.msgpack.decode(address, type=Address)
        except msgspec.MsgspecError as error:
            raise InvalidRequest(f"malformed address: {error}") from None
        if state.register(parsed):
            await self._tell()
        return state.epoch

    async def admit_cache_nodes(self, count: int, machines: Sequence[NodePlace]) -> dict[str, NodePlace]:
        """Let cache nodes register that nobody is told of yet; see `RouterState.admit_cache_nodes`."""
        return self._open().admit_cache_nodes(count, machines)

    async def publish_cache_nodes(self, count: int) -> int:
        """Have so many cache nodes per storage group from now on. The epoch from which on everybody knows it."""
        state = self._open()
        if state.publish_cache_nodes(count):
            await self._tell()
        return state.epoch

    async def forget_absent(self) -> int:
        """Drop what is known of nodes that the cluster does not have any more. The epoch."""
        state = self._open()
        if state.forget_absent():
            await self._tell()
        return state.epoch

    async def set_restoring(self, restore: str, phase: str) -> int:
        """Close the cluster for a restore, or open it again; see `RouterState.set_restoring`. The epoch."""
        state = self._open()
        if state.set_restoring(restore, phase):
            await self._tell()
        return state.epoch

    async def may_format(self, node: str) -> bool:
        """Whether `node` may format an empty data folder. Granted until it reports that it has."""
        return self._open().may_format(node)

    async def formatted(self, node: str) -> None:
        """Note durably that `node` has formatted its folder; only then it may vote."""
        self._open().formatted(node)

    async def lose(self, node: str) -> None:
        """Let a cold node whose folder was lost begin again. Raises InvalidRequest."""
        self._open().lose(node)

    async def is_lost(self, node: str) -> bool:
        """Whether `node` may begin again with an empty folder, and copy its files from its peers."""
        return self._open().is_lost(node)

    async def report_run(self, report: dict[str, Any]) -> None:
        """Note the progress of a sink run (`run`, `state` and figures)."""
        self._open()
        self._sinks.report(report)

    async def runs(self) -> list[dict[str, Any]]:
        """The last 20 sink runs, oldest first."""
        return self._open().runs

    async def start_sink(self, options: SinkOptions) -> dict[str, Any]:
        """Start one run of the sink by hand: its `kind` (`job`, or `task` where Ray has no dashboard) and `id`.

        Raises Unavailable while another run is at work, unless `options.take_over`.
        """
        self._open()
        return await self._sinks.start(options, "hand")

    async def admit_sink(self, run: str, take_over: bool) -> str:
        """A run begins, whoever started it: "" if it may go on, else the name of the one that is at work."""
        self._open()
        return await self._sinks.admit(run, take_over=take_over)

    async def sink_state(self, run_id: str) -> dict[str, str]:
        """`state` and `reason` of a run."""
        self._open()
        return await self._sinks.state(run_id)

    async def status(self) -> dict[str, Any]:
        """State and figures, ready for JSON."""
        if self._state is None:
            return {"node": NAME, "state": "refused", "reason": self._reason, "version": __version__}
        state = self._state
        topology = state.topology()
        return {
            "node": NAME,
            "state": "serving",
            "reason": "",
            "version": __version__,
            "pid": os.getpid(),
            "cluster_id": state.cluster_id,
            "epoch": state.epoch,
            "cache_nodes": topology.cache_nodes,
            "nodes": len(topology.node_names()),
            "registered": len(topology.addresses),
            "folders": state.folders,
            "restoring": None if topology.restoring is None else msgspec.to_builtins(topology.restoring),
            "places": {node: msgspec.to_builtins(place) for node, place in state.places.items()},
            "runs": state.runs,
            "sink": self._sinks.status(),
            "figures": self._counters.read(),
        }

    async def stop(self) -> None:
        """End background work; the state is on disk already."""
        for task in self._background:
            task.cancel()
        if self._state is not None:
            self._sinks.stop()

    async def _tell(self) -> None:
        """Wake up who waits for a later epoch."""
        async with self._changed:
            self._changed.notify_all()

    def _open(self) -> RouterState:
        if self._state is None:
            raise Refused(self._reason)
        return self._state

    def _keep(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
