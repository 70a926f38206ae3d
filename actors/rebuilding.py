"""Lets a cold node begin again whose folder was lost: it copies all its files from its peers. All functions block.

A node that finds its folder empty although it was formatted before refuses to serve, because its disk may only be
unmounted. So somebody has to say that it is lost: that is noted by the Router, durably, and holds for one formatting.
"""

from __future__ import annotations

import time
from typing import Any

import ray

from ..cluster.config import Config
from ..cluster.errors import InvalidRequest, Unavailable
from ..cluster.topology import Topology
from .launch import ask_router, find_actor, node_spec, nodes_away, start_node, wait_until_gone, wait_until_ready
from .ray_session import connect_ray
from .router import NAME as ROUTER
from .router_link import decode_topology

_STATUS_S = 10.0


def begin_again(node: str, namespace: str = "timetier", *, timeout_s: float = 60.0) -> bool:
    """Have a refused cold node begin again with an empty folder. Whether it was refused; else nothing is done.

    Raises InvalidRequest for what is no cold node, Unavailable when it does not answer, or does not serve in time.
    """
    deadline = time.monotonic() + timeout_s
    connect_ray()
    router = find_actor(ROUTER, namespace)
    if router is None:
        raise Unavailable(f"no cluster runs in the Ray namespace {namespace!r}: start one with `timetier up`")
    topology = decode_topology(ask_router(router, "topology", -1, 1.0))
    check_cold_node(topology, node)
    handle = find_actor(node, namespace)
    if handle is not None and not _is_refused(handle, node):
        return False
    ask_router(router, "lose", node)
    if handle is not None:
        ray.kill(handle, no_restart=True)
        wait_until_gone(namespace, [node], deadline)
    config = ask_router(router, "config")
    zones, places = Config.from_json(config).zones, ask_router(router, "places")
    away = {name: why for name, why in nodes_away(zones, places).items() if name == node}
    nodes = {node: start_node(node_spec(node, namespace, config), zones, places.get(node))}
    wait_until_ready(nodes, away, topology.cluster_id, deadline, lambda done, total, what: None)
    return True


def check_cold_node(topology: Topology, node: str) -> None:
    """Raises InvalidRequest unless this is the name of a cold node."""
    names = [name for name in topology.node_names() if name.startswith("cold-")]
    if node not in names:
        raise InvalidRequest(f"{node!r} is no cold node: write one of {', '.join(names)}")


def _is_refused(handle: Any, node: str) -> bool:
    """Whether a node refuses its folder: it has no service, and so knows of no disks."""
    try:
        status = ray.get(handle.status.remote(), timeout=_STATUS_S)
    except ray.exceptions.RayError as error:
        raise Unavailable(f"{node} does not answer: {error}") from None
    return status["state"] == "refused" and "disks" not in status
