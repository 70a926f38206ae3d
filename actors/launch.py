"""Starts, ends and looks at a cluster: the Router and one actor per node, by name, in one Ray namespace.

Everything here may be repeated: actors that run are found by their names and left alone. All functions block.
"""

from __future__ import annotations

import importlib
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.util import list_named_actors

from .. import __version__
from ..cluster.config import Config, ZonesConfig
from ..cluster.errors import ConfigError, TimeTierError, Unavailable
from ..cluster.identity import Refused
from ..cluster.placement import NodePlace, selector
from .ray_nodes import ON_THE_HEAD, alive_machines, why_away
from .ray_session import connect_ray
from .router import NAME as ROUTER
from .router import Router
from .router_link import decode_topology
from .shell import AWAY, ENDS, SERVES, SERVING, NodeSpec

Progress = Callable[[int, int, str], None]
"""Told (nodes that are ready, nodes in all, what happened)."""

_OPTIONS: dict[str, Any] = {
    "num_cpus": 0,
    "lifetime": "detached",
    "max_restarts": -1,
    "max_task_retries": 0,  # Ray would repeat a call whose outcome is unknown
    "get_if_exists": True,
}
_CONCURRENT_CALLS = 10_000  # long polls wait in the Router, calls of `ray://` clients in the nodes
_OUR_NAMES = re.compile(r"router|(storage|cache|cold)-\d+-\d+")
_CALL_S = 15.0
_STOP_S = 5.0
_STATUS_S = 3.0
_AWAY_S = 0.05  # for a node without a Ray node: a process that outlived its raylet answers, nobody else will


def start_cluster(
    config: Config | None,
    *,
    namespace: str | None = None,
    data_dir: Path | None = None,
    address: str | None = None,
    timeout_s: float = 120.0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Start whatever of the cluster does not run, and wait until every node serves.

    `config` None: the configuration that the data folder was created with, or the default in a fresh one; then
    `data_dir` is needed. `namespace`, `data_dir` default to those of `config`. Returns `cluster_status`. Raises
    Refused, Unavailable or ConfigError, naming the node and its reason.

    With zones, a cluster begins only when each zone has a Ray node that is alive. Later, nodes of a zone that is away
    are created all the same, so that they come back with it; they are named in Unavailable at the end.
    """
    if config is None and data_dir is None:
        raise ConfigError("config, data_dir: give at least one of them")
    folder = (data_dir or Path(config.data_dir if config else ".")).expanduser().absolute()
    name_space = namespace or (config.namespace if config else "timetier")
    if config is not None:
        config = config.model_copy(update={"namespace": name_space, "data_dir": folder})
    deadline = time.monotonic() + timeout_s
    connect_ray(address, data_dir=folder)
    router = _start_router(name_space, folder, config, deadline)
    running_config = ask_router(router, "config")
    topology = decode_topology(ask_router(router, "topology", -1, 1.0))
    places = ask_router(router, "places")
    zones = Config.from_json(running_config).zones
    names = topology.node_names()
    away = nodes_away(zones, places)
    _remove_refused(name_space, [name for name in names if name not in away], deadline)
    nodes = {name: start_node(node_spec(name, name_space, running_config), zones, places.get(name)) for name in names}
    wait_until_ready(nodes, away, topology.cluster_id, deadline, progress or (lambda done, total, what: None))
    return cluster_status(name_space)


def stop_cluster(namespace: str = "timetier", *, address: str | None = None) -> list[str]:
    """End the actors of this cluster, and nothing else; data stays. Names of the actors that ran, sorted.

    Raises Unavailable when one does not end.
    """
    connect_ray(address)
    names = running_actors(namespace)
    handles = [handle for handle in (find_actor(name, namespace) for name in names) if handle is not None]
    stopping = [handle.stop.remote() for handle in handles]
    if stopping:
        ray.wait(stopping, num_returns=len(stopping), timeout=_STOP_S)  # who does not answer is ended all the same
    for handle in handles:
        ray.kill(handle, no_restart=True)
    wait_until_gone(namespace, names, time.monotonic() + _CALL_S)
    return names


def cluster_status(namespace: str = "timetier", *, address: str | None = None) -> dict[str, Any]:
    """`namespace`, `state` (`serving`, `degraded`, `down`), `router` and `nodes`: state and figures of each actor.

    `alarms`: what somebody should look at although all may serve, each with `actor` and `alarm` in words.

    Nodes of a cluster with zones have `zone` and `host` ("" = any machine of it); they are `away` while no Ray node
    there is alive. Works with the Router dead, too: then it tells of the nodes that run.
    """
    connect_ray(address)
    running = running_actors(namespace)
    router = find_actor(ROUTER, namespace)
    expected: list[str] = []
    zones: ZonesConfig | None = None
    places: dict[str, NodePlace] = {}
    if router is not None:
        try:
            expected = decode_topology(ask_router(router, "topology", -1, 1.0, timeout_s=_STATUS_S)).node_names()
            places = ask_router(router, "places", timeout_s=_STATUS_S)
            zones = Config.from_json(ask_router(router, "config", timeout_s=_STATUS_S)).zones
        except TimeTierError:
            expected = []  # its own line says why
    names = [*expected, *(name for name in running if name not in {*expected, ROUTER})]
    away = nodes_away(zones, places)
    states = _statuses(namespace, [ROUTER, *names], away)
    for name, place in places.items():
        states[name] |= {"zone": place.zone, "host": place.host}
    nodes = [states[name] for name in names]
    good = all(state["state"] in SERVES for state in states.values())
    state = "down" if not running else SERVING if good and nodes else "degraded"
    router_state = states[ROUTER]
    found = {"namespace": namespace, "state": state, "alarms": alarms_of(router_state, nodes)}
    return {**found, "router": router_state, "nodes": nodes}


def alarms_of(router: Mapping[str, Any], nodes: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """What the actors themselves call alarms: the Router that of the sink, a node those in its `alarms`."""
    sink_alarm = router.get("sink", {}).get("alarm", "")
    alarms = [{"actor": "sink", "alarm": sink_alarm}] if sink_alarm else []
    return alarms + [{"actor": node["node"], "alarm": alarm} for node in nodes for alarm in node.get("alarms", ())]


# ---------------------------------------------------------------- the Router


def _start_router(namespace: str, folder: Path, config: Config | None, deadline: float) -> Any:
    existed = find_actor(ROUTER, namespace) is not None
    wanted = None if config is None else config.to_json()
    router: Any = (
        ray.remote(Router)
        .options(
            name=ROUTER,
            namespace=namespace,
            max_concurrency=_CONCURRENT_CALLS,
            resources=ON_THE_HEAD,  # where its state is, and without the head there is no Ray anyhow
            **_OPTIONS,
        )
        .remote(namespace, str(folder), wanted, alive_machines(None if config is None else config.zones))
    )
    hello = ask_router(router, "hello", timeout_s=max(1.0, deadline - time.monotonic()))
    check_version(hello["version"])
    if hello["reason"]:
        ray.kill(router, no_restart=True)
        wait_until_gone(namespace, [ROUTER], deadline)
        raise Refused(f"router: {hello['reason']}")
    if existed:
        running = Config.from_json(ask_router(router, "config"))
        if Path(running.data_dir) != folder:
            raise ConfigError(
                f"the cluster of namespace {namespace!r} runs in {running.data_dir}, not in {folder}: name that "
                "folder, or choose another namespace"
            )
        if wanted is not None and running.to_json() != wanted:
            raise ConfigError(
                f"the cluster of namespace {namespace!r} runs with another configuration: `timetier down` first"
            )
    return router


def check_version(version: str) -> None:
    """Raises ConfigError unless the cluster runs the same version of TimeTier as this process."""
    if version != __version__:
        raise ConfigError(
            f"the cluster runs timetier {version}, this is timetier {__version__}: install the same version"
        )


# ---------------------------------------------------------------- nodes


def node_spec(name: str, namespace: str, config: str) -> NodeSpec:
    """What the actor of a node is made from, but for its zone."""
    _, group, number = name.split("-")
    return NodeSpec(name, int(group), int(number), namespace, config)


def start_node(spec: NodeSpec, zones: ZonesConfig | None, place: NodePlace | None) -> Any:
    """Its handle at once. Ray starts the actor on a Ray node of its place, and again only there, however late."""
    labels = selector(zones, place) if zones is not None and place is not None else {}
    return (
        ray.remote(_node_class(spec.name))
        .options(
            name=spec.name,
            namespace=spec.namespace,
            max_concurrency=_CONCURRENT_CALLS,
            label_selector=labels,
            **_OPTIONS,
        )
        .remote(replace(spec, zone="" if place is None else place.zone))
    )


def nodes_away(zones: ZonesConfig | None, places: Mapping[str, NodePlace]) -> dict[str, str]:
    """Nodes whose place has no Ray node that is alive, and what they wait for."""
    if zones is None:
        return {}
    alive = alive_machines(zones)
    reasons = {node: why_away(zones, place, alive) for node, place in places.items()}
    return {node: reason for node, reason in reasons.items() if reason is not None}


def _node_class(name: str) -> type:
    tier = name.partition("-")[0]
    module = importlib.import_module(f".{tier}", __package__)
    found: type = getattr(module, f"{tier.capitalize()}Node")
    return found


def _remove_refused(namespace: str, names: Iterable[str], deadline: float) -> None:
    """End nodes that run but will never serve: whatever kept them from it may be mended."""
    states = _statuses(namespace, names)
    refused = [name for name, state in states.items() if state["state"] in ENDS - SERVES]
    for name in refused:
        handle = find_actor(name, namespace)
        if handle is not None:
            ray.kill(handle, no_restart=True)
    wait_until_gone(namespace, refused, deadline)


def wait_until_ready(
    nodes: dict[str, Any], away: dict[str, str], cluster_id: str, deadline: float, progress: Progress
) -> None:
    """Raises Refused or Unavailable with the names and reasons of those that do not serve; not waiting for `away`."""
    patience_s = max(1.0, deadline - time.monotonic())
    waiting = {handle.settled.remote(patience_s): name for name, handle in nodes.items() if name not in away}
    failed = dict(away)
    ready = 0
    while waiting:
        done, _ = ray.wait(list(waiting), timeout=max(0.1, deadline + 1.0 - time.monotonic()))
        if not done:
            failed.update(dict.fromkeys(waiting.values(), "it did not answer in time"))
            break
        name = waiting.pop(done[0])
        reason = _why_not_ready(done[0], cluster_id)
        if reason is None:
            ready += 1
        else:
            failed[name] = reason
        progress(ready, len(nodes), f"{name} is ready" if reason is None else f"{name}: {reason}")
    if failed:
        by_reason: dict[str, list[str]] = {}
        for name, reason in sorted(failed.items()):
            by_reason.setdefault(reason, []).append(name)
        told = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in by_reason.items())
        raise Unavailable(f"{len(failed)} of {len(nodes)} nodes do not serve: {told}")


def _why_not_ready(answer: Any, cluster_id: str) -> str | None:
    try:
        found = ray.get(answer)
        check_version(found["version"])
    except ray.exceptions.RayError as error:
        return _first_cause(error)
    except ConfigError as error:
        return error.message
    if found["state"] not in SERVES:
        return f"{found['state']}: {found['reason']}"
    if found["cluster_id"] != cluster_id:
        return (
            f"it holds data of the cluster {found['cluster_id']}, the Router is that of {cluster_id}: restore the "
            "folder router of the first one from a copy, or choose an empty data folder"
        )
    return None


# ---------------------------------------------------------------- Ray calls


def running_actors(namespace: str) -> list[str]:
    """Names of this cluster's actors that Ray knows, sorted."""
    found = list_named_actors(all_namespaces=True)
    names = [actor["name"] for actor in found if actor["namespace"] == namespace]
    return sorted(name for name in names if _OUR_NAMES.fullmatch(name))


def find_actor(name: str, namespace: str) -> Any:
    """Handle of an actor, None if Ray knows none of that name."""
    try:
        return ray.get_actor(name, namespace=namespace)
    except ValueError:
        return None


def ask_router(handle: Any, method: str, *arguments: Any, timeout_s: float = _CALL_S) -> Any:
    """Result of one method of the Router. Raises Unavailable, or what the Router raised."""
    try:
        return ray.get(getattr(handle, method).remote(*arguments), timeout=timeout_s)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, TimeTierError):
            raise error.cause from None
        raise Unavailable(f"the Router failed at {method}: {error.cause}") from None
    except ray.exceptions.GetTimeoutError:
        raise Unavailable(f"the Router did not answer {method} within {timeout_s:.0f} s") from None
    except ray.exceptions.RayError as error:
        raise Unavailable(f"the Router is away: {_first_cause(error)}") from None


def _statuses(namespace: str, names: Iterable[str], away: Mapping[str, str] | None = None) -> dict[str, dict[str, Any]]:
    """Status of each named actor, asked at the same time; nobody waits for those that are `away` (and why)."""
    found: dict[str, dict[str, Any]] = {}
    asked: dict[str, Any] = {}
    absent = away or {}
    for name in names:
        handle = find_actor(name, namespace)
        if handle is not None:
            asked[name] = handle.status.remote()
        elif name not in absent:
            found[name] = {"node": name, "state": "absent", "reason": "no such actor runs"}
        else:
            found[name] = {"node": name, "state": AWAY, "reason": absent[name]}
    deadline = time.monotonic() + _STATUS_S
    for name in sorted(asked, key=lambda name: name in absent):
        patience_s = _AWAY_S if name in absent else max(0.05, deadline - time.monotonic())
        try:
            found[name] = ray.get(asked[name], timeout=patience_s)
        except ray.exceptions.RayError as error:
            late = isinstance(error, ray.exceptions.GetTimeoutError)
            reason = f"no answer within {_STATUS_S:.0f} s" if late else _first_cause(error)
            found[name] = {"node": name, "state": "unreachable", "reason": reason}
            if name in absent:
                found[name] |= {"state": AWAY, "reason": absent[name]}
    return found


def wait_until_gone(namespace: str, names: Iterable[str], deadline: float) -> None:
    """Wait until Ray knows none of the actors. Raises Unavailable."""
    gone = set(names)
    while gone & set(running_actors(namespace)):
        if time.monotonic() > deadline:
            left = ", ".join(sorted(gone & set(running_actors(namespace))))
            raise Unavailable(f"{left} did not end in time")
        time.sleep(0.02)


def _first_cause(error: Exception) -> str:
    """The one line of a Ray error that says most: the last one of a traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
