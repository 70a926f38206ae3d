"""The machines of this Ray: what labels they carry, and which of them an actor must live on."""

from __future__ import annotations

from typing import Any

import ray

from ..cluster.config import NetworkConfig, ZonesConfig
from ..cluster.placement import NodePlace, how_to_start, machines_of, selector

ON_THE_HEAD: dict[str, float] = {"node:__internal_head__": 0.001}
"""Resource that only Ray's head node has: an actor that asks for it comes back there, and nowhere else."""


def alive_machines(zones: ZonesConfig | None) -> list[NodePlace]:
    """Machines of the zones, of Ray nodes that Ray holds alive; a dead one is noticed within some 15 s."""
    if zones is None:
        return []
    list_nodes: Any = ray.nodes
    return machines_of(zones, [node["Labels"] for node in list_nodes() if node["Alive"]])


def why_away(zones: ZonesConfig, place: NodePlace, alive: list[NodePlace]) -> str | None:
    """Why no actor can live in `place`, or None when a Ray node of it is alive."""
    if any(place.zone == machine.zone and place.host in ("", machine.host) for machine in alive):
        return None
    where = f"zone {place.zone}" + (f", machine {place.host}," if place.host else "")
    return f"{where} has no Ray node that is alive; it waits for one: {how_to_start(selector(zones, place))}"


def own_host(network: NetworkConfig) -> str:
    """The address to listen on, in an actor: the configured one, or that of its Ray node."""
    if network.tcp_host != "auto":
        return network.tcp_host
    util: Any = ray.util
    found: str = util.get_node_ip_address()
    return found
