"""Which zone, and which machine of it, each node lives in. Pure: it is given what there is, and decides.

Data lie on the disks of one machine, so a node is placed once, for good. The Router keeps what was decided; only nodes
without a place get one. Replica r of group g lives in zone number (g + r) modulo their number: the replicas of a
group are apart, and over several groups each zone gets its share of every number. Cache nodes go round in the same way.

Within a zone the node goes to the machine with the fewest of its kind. Machines are told apart by a label that is the
same after each restart (`zones.host_label`); without one a zone has a single machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from .errors import ConfigError

if TYPE_CHECKING:
    from .config import ZonesConfig

CACHE = "cache"


class NodePlace(msgspec.Struct, frozen=True):
    """A zone and a machine of it. `host`: value of the label `zones.host_label`; "" = any machine of the zone."""

    zone: str
    host: str = ""


def machines_of(zones: ZonesConfig, labels: Iterable[Mapping[str, str]]) -> list[NodePlace]:
    """One for each Ray node of our zones; `labels`: of each Ray node that is alive.

    With `zones.host_label` a machine without that label has the host "": it can hold caches, but no data.
    """
    return [
        NodePlace(found[zones.label], found.get(zones.host_label, "") if zones.host_label else "")
        for found in labels
        if found.get(zones.label) in zones.names
    ]


def place_nodes(
    zones: ZonesConfig, nodes: Sequence[str], machines: Iterable[NodePlace], placed: Mapping[str, NodePlace]
) -> dict[str, NodePlace]:
    """Place of each of `nodes` (`TIER-GROUP-NUMBER`): that of `placed`, or else on one of `machines`.

    Raises ConfigError when a zone that is needed has no machine, or two that can't be told apart, and when two
    replicas of a group would share a zone (unless `zones.allow_shared_zones`).
    """
    for_caches = list(machines)
    for_data = [machine for machine in for_caches if machine.host or zones.host_label is None]
    places = {node: placed[node] for node in nodes if node in placed}
    for node, place in places.items():
        if zones.host_label is not None and not place.host and _tier(node) != CACHE:
            places[node] = NodePlace(place.zone, _only_host(node, place.zone, zones, for_data))
    for node in nodes:
        if node not in places and _tier(node) == CACHE:
            places[node] = NodePlace(_zone_of(node, zones, for_caches))
        elif node not in places:
            zone = _zone_of(node, zones, for_data)
            places[node] = NodePlace(zone, _choose_host(node, zone, zones, for_data, places))
    if not zones.allow_shared_zones:
        _check_apart(places)
    return places


def selector(zones: ZonesConfig, place: NodePlace) -> dict[str, str]:
    """Labels that a Ray node must have to be this place."""
    labels = {zones.label: place.zone}
    if place.host and zones.host_label:
        labels[zones.host_label] = place.host
    return labels


def how_to_start(labels: Mapping[str, str]) -> str:
    """Command that starts a Ray node with these labels."""
    return f"`ray start --address=HEAD:PORT --labels {','.join(f'{k}={v}' for k, v in labels.items())}`"


def _zone_of(node: str, zones: ZonesConfig, machines: list[NodePlace]) -> str:
    present = [zone for zone in zones.names if any(machine.zone == zone for machine in machines)]
    _, group, number = node.split("-")
    names = present if zones.allow_shared_zones and present else zones.names
    zone = names[(int(group) + int(number)) % len(names)]
    if zone not in present:
        wanted = {zones.label: zone, **({zones.host_label: "NAME"} if zones.host_label else {})}
        there = ", ".join(present) or "none of the others either"
        raise ConfigError(
            f"{node} belongs in zone {zone!r} (zones.names), but no Ray node that is alive carries the labels of it "
            f"(alive: {there}): start one with {how_to_start(wanted)}"
        )
    return zone


def _choose_host(
    node: str, zone: str, zones: ZonesConfig, machines: list[NodePlace], places: Mapping[str, NodePlace]
) -> str:
    """The machine of the zone with the fewest nodes of this tier, first those without a replica of this group."""
    hosts = [machine.host for machine in machines if machine.zone == zone]
    if zones.host_label is None and len(hosts) > 1:
        raise ConfigError(
            f"zone {zone!r} has {len(hosts)} Ray nodes, and the data of {node} would lie on one of them: give each a "
            f"label of its own that stays (`ray start --labels {zones.label}={zone},host=NAME`) and write "
            "zones.host_label = host, or run one Ray node there"
        )

    def burden(host: str) -> tuple[int, int, str]:
        there = [name for name, place in places.items() if place == NodePlace(zone, host)]
        same_tier = [name for name in there if _tier(name) == _tier(node)]
        return sum(_group(name) == _group(node) for name in same_tier), len(same_tier), host

    return min(sorted(set(hosts)), key=burden)


def _only_host(node: str, zone: str, zones: ZonesConfig, machines: list[NodePlace]) -> str:
    """The machine that a node has been on, when machines have had no names so far: the zone must have just one."""
    hosts = {machine.host for machine in machines if machine.zone == zone}
    if len(hosts) == 1:
        return hosts.pop()
    raise ConfigError(
        f"zones.host_label = {zones.host_label}: {node} has its data on the one machine that zone {zone!r} had so far, "
        f"and {len(hosts) or 'no'} Ray nodes there carry that label: start the cluster while just that machine does"
    )


def _check_apart(places: Mapping[str, NodePlace]) -> None:
    """Raises ConfigError when two replicas of a group are in one zone."""
    taken: dict[tuple[str, str], str] = {}
    for node, place in sorted(places.items()):
        if _tier(node) == CACHE:
            continue
        other = taken.setdefault((_group(node), place.zone), node)
        if other != node:
            raise ConfigError(
                f"{other} and {node} are replicas of one group and both in zone {place.zone!r}: they would be lost "
                "together: keep zones.allow_shared_zones = true for this cluster, or begin another one with more zones"
            )


def _tier(node: str) -> str:
    return node.partition("-")[0]


def _group(node: str) -> str:
    return node.rpartition("-")[0]  # with its tier
