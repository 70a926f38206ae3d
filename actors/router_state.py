"""What the Router knows, and how it survives: one checksummed JSON file, replaced durably before any answer.

No Ray in here. The file holds the cluster's secret, so only its owner may read it.
"""

from __future__ import annotations

import secrets
import time
import uuid
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from ..cluster.carriers.base import Address
from ..cluster.config import Config, load_config
from ..cluster.durable_file import make_folder_durably, write_durably
from ..cluster.errors import Corrupt, InvalidRequest, Unavailable
from ..cluster.identity import Refused, has_identity
from ..cluster.placement import NodePlace, place_nodes
from ..cluster.static_map import SHIPPED_BUCKETS, StaticMap
from ..cluster.topology import BEGINNING, COPYING, Restoring, Topology

FORMAT = 1
MAP_FILE = "static.map"
MAX_RUNS = 20
MAX_CACHE_NODES = 64  # per storage group, as the configuration allows
_RETRY_AFTER_S = 1.0
MAX_REPORT_BYTES = 16_384
GRANTED, FORMATTED, LOST = "granted", "formatted", "lost"


class _State(msgspec.Struct):
    cluster_id: str
    namespace: str
    config: str
    secret: str
    map_checksum: str
    epoch: int = 1
    addresses: dict[str, Address] = {}
    folders: dict[str, str] = {}
    runs: list[dict[str, Any]] = []
    places: dict[str, NodePlace] = {}
    cache_nodes: int | None = None  # per group, since `timetier scale`; None: as configured
    restoring: Restoring | None = None
    format: int = FORMAT


class _File(msgspec.Struct):
    crc: int
    state: msgspec.Raw


class RouterState:
    """The durable part of the Router. Every method that changes something returns after it is on disk, and raises
    Unavailable, with nothing changed, when the disk refuses."""

    def __init__(self, path: Path, state: _State, static_map: StaticMap) -> None:
        self._path = path
        self._state = state
        self._static_map = static_map
        self.config = Config.from_json(state.config)
        self._nodes = frozenset(self._shape().node_names())
        self._admitted: frozenset[str] = frozenset()  # cache nodes that start, and are not in the shape yet
        self._on_disk = msgspec.json.encode(state)

    @classmethod
    def open(
        cls, data_dir: Path, namespace: str, config: Config | None, machines: Iterable[NodePlace] = ()
    ) -> RouterState:
        """The state in `data_dir`, or that of a cluster that begins here.

        `config`: replaces the stored one if it keeps the shape of the cluster; None = the stored one, or the
        default for a cluster that begins. `machines`: where nodes that have no place yet can be placed.

        Raises Refused when the state must not be used or is missing, ConfigError when nodes can't be placed; then
        nothing was changed.
        """
        path = data_dir / "router" / "state.json"
        if not path.exists():
            _refuse_orphans(data_dir)
            first = config or load_config(None, data_dir=data_dir).model_copy(update={"namespace": namespace})
            places = _places(first, first.cache.nodes, machines, {})
            make_folder_durably(path.parent)
            static_map = StaticMap.load(first.buckets)
            write_durably(path.with_name(MAP_FILE), static_map.to_bytes())
            begun = _State(uuid.uuid4().hex, namespace, first.to_json(), secrets.token_hex(32), static_map.checksum)
            begun.places = places
            made = cls(path, begun, static_map)
            made._save()
            return made
        state = _read(path)
        if state.namespace != namespace:
            raise Refused(
                f"{data_dir} belongs to the cluster of namespace {state.namespace!r}, not {namespace!r}: "
                "give each cluster a data folder of its own"
            )
        opened = cls(path, state, _read_map(path.with_name(MAP_FILE), state.map_checksum))
        # The folder may have been moved since, so where it lies now is what counts.
        opened._take_config((config or opened.config).model_copy(update={"data_dir": data_dir.absolute()}), machines)
        return opened

    @property
    def cluster_id(self) -> str:
        return self._state.cluster_id

    @property
    def epoch(self) -> int:
        return self._state.epoch

    @property
    def runs(self) -> list[dict[str, Any]]:
        """The last runs of the sink, oldest first."""
        return list(self._state.runs)

    @property
    def places(self) -> dict[str, NodePlace]:
        """Where each node lives; empty without zones."""
        return dict(self._state.places) if self.config.zones is not None else {}

    @property
    def folders(self) -> dict[str, str]:
        """Formatting state per node: `granted`, `formatted`, or `lost` when it may begin again and copy all."""
        return dict(self._state.folders)

    def topology(self) -> Topology:
        """The cluster's present shape."""
        return self._shape()

    def lift_epoch(self, above: int) -> None:
        """Have an epoch above `above`: somebody has seen that one, so this state is an older copy."""
        if self._state.epoch <= above:
            self._state.epoch = above + 1
            self._save()

    def register(self, address: Address) -> bool:
        """Note where a node listens. Whether that changed anything (then the epoch grew)."""
        self._check_node(address.name)
        if self._state.addresses.get(address.name) == address:
            return False
        self._state.addresses[address.name] = address
        self._state.epoch += 1
        self._save()
        return True

    def may_format(self, node: str) -> bool:
        """Whether `node` may format an empty folder: as long as it was never reported formatted."""
        self._check_node(node)
        if self._state.folders.get(node) in (FORMATTED, LOST):
            return False
        if self._state.folders.get(node) != GRANTED:
            self._state.folders[node] = GRANTED
            self._save()
        return True

    def formatted(self, node: str) -> None:
        """Note that `node` has a formatted folder and is about to vote."""
        self._check_node(node)
        if self._state.folders.get(node) != FORMATTED:
            self._state.folders[node] = FORMATTED
            self._save()

    def lose(self, node: str) -> None:
        """Let a cold node that was formatted begin again with an empty folder. Raises InvalidRequest."""
        self._check_node(node)
        if not node.startswith("cold-"):
            raise InvalidRequest(f"{node} is no cold node: only these are filled again by a command")
        if self.config.cold.replicas == 1:
            raise InvalidRequest(f"{node} has no other replica that could give its files back: restore its folder")
        if self._state.folders.get(node) == FORMATTED:
            self._state.folders[node] = LOST
            self._save()

    def is_lost(self, node: str) -> bool:
        """Whether `node` may begin again with an empty folder, and copy its files from its peers."""
        self._check_node(node)
        return self._state.folders.get(node) == LOST

    def admit_cache_nodes(self, count: int, machines: Iterable[NodePlace]) -> dict[str, NodePlace]:
        """Let the cache nodes of a shape with `count` of them a group register, before anybody is told of them.

        Their places, with those of all other nodes; empty without zones. Not kept over a restart of the Router: who
        starts them asks again. Raises InvalidRequest, ConfigError.
        """
        _check_cache_nodes(count)
        shape = msgspec.structs.replace(self._shape(), cache_nodes=count)
        places = _places(self.config, count, machines, self._state.places)
        if not places.items() <= self._state.places.items():
            self._state.places = {**self._state.places, **places}
            self._save()
        self._admitted = frozenset(shape.node_names())
        return places

    def publish_cache_nodes(self, count: int) -> bool:
        """Have `count` cache nodes a group from now on. Whether that changed anything (then the epoch grew).

        Addresses of nodes that leave stay until `forget_absent`, so that calls under way to them end well. Raises
        InvalidRequest.
        """
        _check_cache_nodes(count)
        if count == self._shape().cache_nodes:
            return False
        self._state.cache_nodes = count
        self._state.epoch += 1
        self._save()
        self._nodes = frozenset(self._shape().node_names())
        return True

    def forget_absent(self) -> bool:
        """Drop the addresses of nodes that are not in the shape any more. Whether there were any."""
        self._admitted = frozenset()
        kept = {name: address for name, address in self._state.addresses.items() if name in self._nodes}
        if len(kept) == len(self._state.addresses):
            return False
        self._state.addresses = kept
        self._state.epoch += 1
        self._save()
        return True

    def set_restoring(self, restore: str, phase: str) -> bool:
        """Close the cluster for a restore from a backup (phase `BEGINNING`), note that all of it was found empty
        (`COPYING`), or open it again ("", after the restore or when nothing of it was installed). Whether that changed
        anything (then the epoch grew). Raises InvalidRequest while another restore is under way.
        """
        present = self._state.restoring
        wanted = Restoring(restore, phase) if phase else None
        if present == wanted:
            return False
        if present is not None and present.restore != restore:
            raise InvalidRequest(
                f"restore {present.restore} is under way: finish that one, or give it up: `timetier restore --abandon`"
            )
        if phase == BEGINNING and present is not None:
            return False  # it has come further than that
        if phase not in ("", BEGINNING, COPYING) or (phase == COPYING and present is None):
            raise InvalidRequest(f"phase={phase!r}: restore {restore} can't go on so")
        self._state.restoring = wanted
        self._state.epoch += 1
        self._save()
        return True

    def report_run(self, report: dict[str, Any]) -> None:
        """Note the progress of a sink run: a dict with `run` (its id) and `state`, ready for JSON.

        Progress within one state is kept in memory only. Raises InvalidRequest.
        """
        run, state = report.get("run"), report.get("state")
        if not isinstance(run, str) or not isinstance(state, str):
            raise InvalidRequest("a report of a sink run needs `run` and `state`, both str")
        try:
            size = len(msgspec.json.encode(report))
        except (TypeError, ValueError) as error:
            raise InvalidRequest(f"a report of a sink run must be plain JSON: {error}") from None
        if size > MAX_REPORT_BYTES:
            raise InvalidRequest(f"a report of a sink run has {size} bytes, the limit is {MAX_REPORT_BYTES}")
        runs = self._state.runs
        before = next((entry for entry in runs if entry.get("run") == run), None)
        entry = {**(before or {}), **report, "reported_at": time.time()}
        if before is None:
            self._state.runs = [*runs, entry][-MAX_RUNS:]
        else:
            runs[runs.index(before)] = entry
        if before is None or any(before.get(name) != entry.get(name) for name in ("state", "kind")):
            self._save()

    def _take_config(self, config: Config, machines: Iterable[NodePlace]) -> None:
        text = config.to_json()
        if text == self._state.config:
            return
        keeps_scale = config.cache.nodes == self.config.cache.nodes
        cache_nodes = self._state.cache_nodes if keeps_scale else None  # who configures another number means it
        places = _places(config, cache_nodes or config.cache.nodes, machines, self._state.places)
        old = self._shape()
        self.config, old_config = config, self.config
        fixed = ("buckets", "storage_groups", "storage_replicas", "cold_groups", "cold_replicas", "cold_disks")
        new = self._shape()
        for name in fixed:
            if getattr(new, name) != getattr(old, name):
                self.config = old_config
                raise Refused(
                    f"the configuration says {name}={getattr(new, name)}, but this cluster was created with "
                    f"{getattr(old, name)}, which can't be changed: put that back, or choose another data folder"
                )
        self._state.cache_nodes = cache_nodes
        self._nodes = frozenset(self._shape().node_names())
        self._state.addresses = {k: v for k, v in self._state.addresses.items() if k in self._nodes}
        self._state.config = text
        self._state.places = {**self._state.places, **places}
        self._state.epoch += 1
        self._save()

    def _shape(self) -> Topology:
        state = self._state
        shape = self.config.topology(
            cluster_id=state.cluster_id,
            namespace=state.namespace,
            epoch=state.epoch,
            addresses=dict(state.addresses),
            secret=state.secret,
        )
        shipped = self.config.buckets == SHIPPED_BUCKETS
        return msgspec.structs.replace(
            shape,
            cache_nodes=state.cache_nodes or shape.cache_nodes,
            restoring=state.restoring,
            map_checksum=state.map_checksum,
            static_map=b"" if shipped else self._static_map.to_bytes(),
        )

    def _check_node(self, node: str) -> None:
        if node not in self._nodes and node not in self._admitted:
            raise InvalidRequest(f"this cluster has no node {node!r}")

    def _save(self) -> None:
        """Make the state durable. Raises Unavailable when the disk refuses; then the state is what the disk holds.

        Else a change that was refused once would be taken for one that was made.
        """
        state = msgspec.json.encode(self._state)
        try:
            write_durably(self._path, msgspec.json.encode(_File(zlib.crc32(state), msgspec.Raw(state))))
        except OSError as error:
            self._state = msgspec.json.decode(self._on_disk, type=_State)
            reason = f"the Router can't keep its state in {self._path}: {error.strerror}: free some space"
            raise Unavailable(reason, retry_after_s=_RETRY_AFTER_S) from None
        self._on_disk = state


def _check_cache_nodes(count: int) -> None:
    if not 1 <= count <= MAX_CACHE_NODES:
        raise InvalidRequest(f"cache_nodes={count}: pass 1 to {MAX_CACHE_NODES} (per storage group)")


def _places(
    config: Config, cache_nodes: int, machines: Iterable[NodePlace], placed: Mapping[str, NodePlace]
) -> dict[str, NodePlace]:
    """Place of each node that a cluster of this configuration has, with so many cache nodes a group; none without
    zones. Raises ConfigError."""
    if config.zones is None:
        return {}
    shape = config.topology(cluster_id="", namespace="", epoch=0, addresses={}, secret="")
    shape = msgspec.structs.replace(shape, cache_nodes=cache_nodes)
    return place_nodes(config.zones, shape.node_names(), machines, placed)


def _read(path: Path) -> _State:
    remedy = "restore it from a copy: without it the cluster's data can't be trusted to be its own"
    try:
        file = msgspec.json.decode(path.read_bytes(), type=_File)
        if zlib.crc32(file.state) != file.crc:
            raise Refused(f"{path} is damaged (its checksum does not agree): {remedy}")
        state = msgspec.json.decode(file.state, type=_State)
    except msgspec.MsgspecError as error:
        raise Refused(f"{path} is damaged ({error}): {remedy}") from None
    if state.format > FORMAT:
        raise Refused(f"{path} has format {state.format}, this program reads up to {FORMAT}: use a newer TimeTier")
    return state


def _read_map(path: Path, checksum: str) -> StaticMap:
    """The map of buckets to groups that the cluster was created with."""
    remedy = "restore it from a copy: it says which group holds which data"
    try:
        found = StaticMap.from_bytes(path.read_bytes(), str(path))
    except FileNotFoundError:
        raise Refused(f"{path} is missing: {remedy}") from None
    except Corrupt as error:
        raise Refused(f"{error.message}; {remedy}") from None
    if found.checksum != checksum:
        raise Refused(f"{path} is another map ({found.checksum}) than the cluster's ({checksum}): {remedy}")
    return found


def _refuse_orphans(data_dir: Path) -> None:
    """A cluster must not begin where nodes of another one left their data."""
    orphans = sorted(path.name for path in data_dir.glob("*") if path.is_dir() and has_identity(path))
    if orphans:
        raise Refused(
            f"{data_dir} holds the data of {', '.join(orphans[:3])}, but router/state.json is missing: restore that "
            "file, or choose an empty data folder"
        )
