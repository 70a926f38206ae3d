"""What all node actors share: a thin shell around a service of `cluster/`.

A shell brings its service up, listens, tells the Router where, follows the topology, exports figures. Two rules:

- It needs the Router only for what is new. The topology is kept beside the data, so a node that has served before
  starts again, and serves, with the Router dead.
- A node that must not serve (its data folder is refused, or its disk fails) stays up and says so in `status`. If
  it ended, Ray would restart it for ever.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from .. import __version__
from ..cluster.budget import budget_mb, queued_mb, resident_mb, sends_mb
from ..cluster.carriers.base import Address, Reply, answer_frame
from ..cluster.carriers.direct import DirectCarrier, DirectServer, host_id
from ..cluster.collecting import collect_rarely
from ..cluster.config import Config
from ..cluster.counters import Counters
from ..cluster.durable_file import make_folder_durably, write_durably
from ..cluster.errors import TimeTierError, Unavailable
from ..cluster.identity import FolderGone, FolderLocked, Identity, has_identity, open_identity
from ..cluster.messages import Message, Ping, Pong, Status, StatusRequest
from ..cluster.service import Service
from ..cluster.topology import Topology
from .metrics import MetricsExport, export_metrics
from .ray_nodes import own_host
from .router_link import Pauses, RouterLink, decode_topology, decode_topology_file
from .runtime_folder import remove_folder_of, socket_path
from .tls import client_tls, server_tls

STARTING, SERVING, REFUSED, STOPPED = "starting", "serving", "refused", "stopped"
SERVES = frozenset({SERVING, "voting"})
"""States of a node that does its work; a storage replica votes, others serve."""

ENDS = SERVES | {REFUSED, STOPPED, "fenced"}
"""States that don't change by waiting."""

AWAY = "away"
"""State, told by others, of a node whose zone or machine has no Ray node that is alive."""

_TOPOLOGY_FILE = "topology.json"
_SETTLE_POLL_S = 0.02
_RETRY_AFTER_S = 0.2  # callers of a node that does not serve yet
_TOLD_ALREADY = frozenset({"name", "counters"})  # by the shell, as `node` and `figures`

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """What a node actor is made from.

    `number`: replica, or number of the cache node. `config`: as JSON. `zone`: "" without zones.
    """

    name: str
    group: int
    number: int
    namespace: str
    config: str
    zone: str = ""


class NodeActor:
    """Base of the node actors; a tier says how its service is made. Created by `launch.py`."""

    tier: ClassVar[str]
    keeps_identity: ClassVar[bool] = False
    """Whether the node has data of its own, and so a folder with an identity."""

    def __init__(self, spec: NodeSpec) -> None:
        self.spec = spec
        self.config = Config.from_json(spec.config)
        self.folder = Path(self.config.data_dir) / spec.name
        self.counters = Counters()
        self.carrier: DirectCarrier
        self.topology: Topology
        self.identity: Identity | None = None
        self._service: Service | None = None
        self._server: DirectServer | None = None
        self._address = Address(spec.name, actor=spec.name)
        self._state, self._reason = STARTING, "starting"
        self._started_at = time.monotonic()
        self._router = RouterLink(spec.namespace)
        self._background: set[asyncio.Task[None]] = set()
        self._keep(self._run())

    # ------------------------------------------------------------ for a tier

    def make_service(self) -> Service:
        """The service of this tier, from `topology`, `carrier`, `config` and `identity`. It is started later."""
        raise AssertionError("each tier makes its own")

    async def may_learn(self) -> bool:
        """Whether the node copies its data from its peers when its folder is empty, but was formatted before."""
        return False

    def allow_votes(self) -> None:
        """The folder's identity is known to the Router: the service may take part in decisions."""

    # ------------------------------------------------------------ called through Ray

    async def call(self, frame: bytes) -> bytes:
        """The Ray carrier: answer one frame (b"" for none). Raises ProtocolError for a malformed one."""
        return await answer_frame(partial(_handle, self), frame)

    async def settled(self, timeout_s: float) -> dict[str, str]:
        """`state`, `reason`, `cluster_id` as soon as the node serves or surely won't, or after `timeout_s` seconds."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        status = self._status()
        while status["state"] not in ENDS and loop.time() < deadline:
            await asyncio.sleep(_SETTLE_POLL_S)
            status = self._status()
        cluster_id = self.topology.cluster_id if hasattr(self, "topology") else ""
        told = {"state": status["state"], "reason": status["reason"]}
        return {**told, "version": __version__, "cluster_id": cluster_id}

    async def status(self) -> dict[str, Any]:
        """State and figures, ready for JSON."""
        return self._status()

    async def stop(self) -> None:
        """End background work and close the data."""
        self._state, self._reason = STOPPED, "the cluster was stopped"
        for task in self._background:
            task.cancel()
        if self._server is not None:
            await self._server.stop()
            remove_folder_of(Path(self._address.unix_path))
        if self._service is not None:
            await self._service.stop()
            await self.carrier.close()
        if self.identity is not None:
            self.identity.close()

    # ------------------------------------------------------------ life

    async def _run(self) -> None:
        try:
            await self._bring_up()
        except Exception as error:
            # Whatever it is: the node stays up to tell of it, and serves nothing.
            self._state = REFUSED
            self._reason = str(error) if isinstance(error, TimeTierError) else f"{type(error).__name__}: {error}"
            logger.exception("%s does not serve", self.spec.name)
            if self.identity is not None:
                self.identity.close()

    async def _bring_up(self) -> None:
        await self._find_topology()
        secret = bytes.fromhex(self.topology.secret)
        self.carrier = DirectCarrier(
            secret,
            host_id=host_id(),
            max_queue_bytes=sends_mb(self.tier, self.config) << 20,
            tls=client_tls(self.config.network),
        )
        self.carrier.update(self.topology.addresses)
        await self._listen()
        self._keep(self._router.follow(self.topology.epoch, self._take, self._register))
        self._keep(export_metrics(self._metrics()))
        if self.keeps_identity:
            await self._open_folder()
        service = self.make_service()
        await self._start(service)
        service.update(self.topology)  # it may have changed meanwhile
        self._service = service
        self._keep_topology()
        if self.identity is not None:
            if not self.identity.formatted:
                self._reason = "waiting for the Router to note the formatted folder"
                await self._ask("formatted", self.spec.name)
                await asyncio.to_thread(self.identity.mark_formatted)
            self.allow_votes()
        self._state, self._reason = SERVING, ""

    async def _find_topology(self) -> None:
        """From beside the data, or else from the Router, however long that takes."""
        path = self.folder / _TOPOLOGY_FILE
        try:
            self.topology = decode_topology_file(await asyncio.to_thread(path.read_bytes))
        except FileNotFoundError:
            self.topology = decode_topology(await self._ask("topology", -1, 1.0))
        except Unavailable as error:
            logger.warning("%s: %s; the Router is asked instead", path, error.message)
            self.topology = decode_topology(await self._ask("topology", -1, 1.0))

    async def _open_folder(self) -> None:
        pauses = Pauses()
        while self.identity is None:
            may_format = not await asyncio.to_thread(has_identity, self.folder)
            if may_format:
                may_format = bool(await self._ask("may_format", self.spec.name))
            try:
                self.identity = await asyncio.to_thread(
                    open_identity,
                    self.folder,
                    self.topology.cluster_id,
                    self.spec.name,
                    may_format=may_format,
                    may_learn=await self.may_learn(),
                )
            except (FolderLocked, FolderGone) as error:
                # The former process of this actor may need a moment to end; a disk may be changed just then.
                self._reason = error.message
                await asyncio.sleep(pauses.next_s())
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                self._reason = f"{self.folder}: the disk is full, a life can't begin: free some space"
                await asyncio.sleep(pauses.next_s())

    async def _start(self, service: Service) -> None:
        """Start the service, as soon as its disk lets it: a node that gave up would need somebody to notice."""
        pauses = Pauses()
        while True:
            try:
                await service.start()
                collect_rarely()
                return
            except Unavailable as error:
                self._reason = error.message
                logger.warning("%s can't start yet: %s", self.spec.name, self._reason)
                await asyncio.sleep(pauses.next_s())

    async def _listen(self) -> None:
        """Listen where the others know this node to be, if that is still possible: so it is found at once again."""
        known = self.topology.addresses.get(self.spec.name)
        ports = [known.tcp_port, 0] if known is not None and known.tcp_port else [0]
        for port in ports:
            server = DirectServer(
                partial(_handle, self),
                bytes.fromhex(self.topology.secret),
                begin=partial(_begin, self),
                name=self.spec.name,
                unix_path=str(socket_path(self.topology.cluster_id, self.spec.name)),
                tcp_host=own_host(self.config.network),
                tcp_port=port,
                max_reply_bytes=queued_mb(self.tier, self.config) << 20,
                tls=server_tls(self.config.network),
            )
            try:
                await server.start()
            except OSError as error:
                if port == ports[-1]:
                    raise
                logger.info("%s moves to another port than %d: %s", self.spec.name, port, error)
                continue
            self._server = server
            self._address = msgspec.structs.replace(server.address, actor=self.spec.name)
            return

    async def _ask(self, method: str, *arguments: Any) -> Any:
        """Ask the Router until it answers; what it refuses is raised."""
        pauses = Pauses()
        while True:
            try:
                return await self._router.call(method, *arguments)
            except Unavailable as error:
                self._reason = f"waiting for the Router: {error.message}"
                await asyncio.sleep(pauses.next_s())

    async def _register(self) -> None:
        await self._router.call("register", msgspec.msgpack.encode(self._address))

    # ------------------------------------------------------------ work

    def _take(self, topology: Topology) -> None:
        if topology.cluster_id != self.topology.cluster_id:
            # It has lost its state and begun another cluster: for these data it is no Router.
            raise Unavailable(f"the Router is that of another cluster ({topology.cluster_id})")
        self.topology = topology
        self.carrier.update(topology.addresses)
        if self._service is not None:
            self._service.update(topology)
            self._keep_topology()

    def _keep_topology(self) -> None:
        """Write the topology beside the data. It only shortens the next start, so a failure is only logged."""
        try:
            make_folder_durably(self.folder)
            write_durably(self.folder / _TOPOLOGY_FILE, msgspec.json.encode(self.topology))
        except OSError as error:
            logger.warning("%s can't keep its topology: %s", self.spec.name, error)

    def _status(self) -> dict[str, Any]:
        status: dict[str, Any] = {
            "node": self.spec.name,
            "tier": self.tier,
            "zone": self.spec.zone,
            "state": self._state,
            "reason": self._reason,
            "pid": os.getpid(),
            "rss_mb": resident_mb(),
            "budget_mb": budget_mb(self.tier, self.config),
            "uptime_s": round(time.monotonic() - self._started_at, 3),
            "address": msgspec.to_builtins(self._address),
        }
        if hasattr(self, "topology"):
            status["epoch"] = self.topology.epoch
        if self.identity is not None:
            status["incarnation"], status["boot"] = self.identity.incarnation, self.identity.boot
        if self._service is not None:
            inner = self._service.status()
            if self._state == SERVING:
                status["state"], status["reason"] = inner.get("state", SERVING), inner.get("reason", "")
            status.update({k: v for k, v in inner.items() if k not in status and k not in _TOLD_ALREADY})
        status["figures"] = self._figures()
        return status

    def _figures(self) -> dict[str, float]:
        figures = self.counters.read()
        if self._server is not None:
            figures.update({f"server_{name}": value for name, value in self._server.counters.read().items()})
        if hasattr(self, "carrier"):
            figures.update({f"carrier_{name}": value for name, value in self.carrier.counters.read().items()})
        return figures

    def _metrics(self) -> list[MetricsExport]:
        assert self._server is not None, "it listens before it exports"
        sources = {"": self.counters, "server_": self._server.counters, "carrier_": self.carrier.counters}
        return [MetricsExport(self.tier, self.spec.name, prefix, counters) for prefix, counters in sources.items()]

    def _keep(self, work: Any) -> None:
        """Run background work; the loop itself keeps only weak references to tasks."""
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


async def _handle(node: NodeActor, message: Message) -> Message | None:
    """A node's front door. Not a method: Ray wraps each method of an actor's class, for tracing, which costs as much as
    a small answer."""
    if isinstance(message, StatusRequest):
        return Status(json.dumps(node._status()).encode())
    if isinstance(message, Ping):
        return Pong()
    if node._service is None or node._state == STOPPED:
        hint_s = _RETRY_AFTER_S if node._state == STARTING else None
        raise Unavailable(f"{node.spec.name} is {node._state}: {node._reason}", retry_after_s=hint_s)
    return await node._service.handle(message)


def _begin(node: NodeActor, message: Message, reply: Reply) -> bool:
    """A node's fast door, while it serves."""
    return node._service is not None and node._state != STOPPED and node._service.begin(message, reply)
