"""Adds cache nodes to a running cluster, and removes them. All functions block.

Cache nodes hold no data, so nothing is moved; what counts is the order. *Adding* starts the actors, waits until they
answer, and only then publishes the topology in which they are: from then on they are first for their share of the
timelines. *Removing* publishes first, waits until the nodes are asked no more, and then ends them. A client or node
that hears of it late asks a node that is gone, and goes on to the next one, as it does after any failure.

Each step may be repeated, and so may the whole. How many there are is the Router's to keep: it stays over restarts of
the Router and of the cluster, until somebody scales again or configures another `cache.nodes`.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import ray

from ..cluster.config import Config
from ..cluster.errors import TimeTierError, Unavailable
from .launch import (
    Progress,
    ask_router,
    cluster_status,
    find_actor,
    node_spec,
    nodes_away,
    running_actors,
    start_node,
    wait_until_gone,
    wait_until_ready,
)
from .ray_nodes import alive_machines
from .ray_session import connect_ray
from .router import NAME as ROUTER
from .router_link import decode_topology

DRAIN_S = 10.0  # a node that is asked for longer is ended all the same: its callers go on to the next one
QUIET_S = 0.5
_POLL_S = 0.1
_STOP_S = 5.0
_ASK_S = 2.0

logger = logging.getLogger(__name__)


def scale_cluster(
    namespace: str = "timetier",
    *,
    cache_nodes: int,
    address: str | None = None,
    timeout_s: float = 120.0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Have `cache_nodes` cache nodes per storage group. Returns `cluster_status` with `added` and `removed` names.

    Raises Unavailable when an added node does not serve in time; then the topology is as it was. Raises InvalidRequest
    for a number that can't be.
    """
    deadline = time.monotonic() + timeout_s
    connect_ray(address)
    router = find_actor(ROUTER, namespace)
    if router is None:
        raise Unavailable(f"no cluster runs in the Ray namespace {namespace!r}: start one with `timetier up`")
    config = ask_router(router, "config")
    topology = decode_topology(ask_router(router, "topology", -1, 1.0))
    zones = Config.from_json(config).zones
    machines = [] if zones is None else alive_machines(zones)
    places = ask_router(router, "admit_cache_nodes", cache_nodes, machines)
    wanted = [topology.cache_node(g, n) for g in range(topology.storage_groups) for n in range(cache_nodes)]
    before = set(running_actors(namespace))
    nodes = {name: start_node(node_spec(name, namespace, config), zones, places.get(name)) for name in wanted}
    away = {name: why for name, why in nodes_away(zones, places).items() if name in nodes}
    wait_until_ready(nodes, away, topology.cluster_id, deadline, progress or (lambda done, total, what: None))
    ask_router(router, "publish_cache_nodes", cache_nodes)
    surplus = sorted(name for name in running_actors(namespace) if name.startswith("cache-") and name not in nodes)
    _drain(namespace, surplus, deadline)
    _end(namespace, surplus)
    ask_router(router, "forget_absent")
    return {
        **cluster_status(namespace),
        "cache_nodes": cache_nodes,
        "added": sorted(set(wanted) - before),
        "removed": surplus,
    }


def _drain(namespace: str, names: list[str], deadline: float) -> None:
    """Wait until the nodes were asked nothing for a while, or have had their time."""
    deadline = min(deadline, time.monotonic() + DRAIN_S)
    handles = {name: found for name in names if (found := find_actor(name, namespace)) is not None}
    seen: dict[str, float] = {}
    quiet_since = time.monotonic()
    while handles and time.monotonic() < min(deadline, quiet_since + QUIET_S):
        time.sleep(_POLL_S)
        present = {name: _requests(handle) for name, handle in handles.items()}
        if present != seen:
            seen, quiet_since = present, time.monotonic()


def _requests(node: Any) -> float:
    """Reads that a cache node was asked for so far; -1 if it does not answer."""
    try:
        status = ray.get(node.status.remote(), timeout=_ASK_S)
    except ray.exceptions.RayError as error:
        logger.info("a node that is to end does not answer: %s", error)
        return -1.0
    return float(status["figures"].get("requests", 0))


def _end(namespace: str, names: list[str]) -> None:
    """End actors. Raises Unavailable when one does not end."""
    handles = [found for name in names if (found := find_actor(name, namespace)) is not None]
    stopping = [handle.stop.remote() for handle in handles]
    if stopping:
        ray.wait(stopping, num_returns=len(stopping), timeout=_STOP_S)  # who does not answer is ended all the same
    for handle in handles:
        ray.kill(handle, no_restart=True)
    try:
        wait_until_gone(namespace, names, time.monotonic() + _STOP_S)
    except TimeTierError as error:
        raise Unavailable(f"{error.message}: nobody asks them any more; `timetier scale` again ends them") from None
