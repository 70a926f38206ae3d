"""Routing: from a timeline to the nodes that serve it, in the order in which to ask them (*pure*).

`timeline -> bucket -> group -> nodes`. The timeline key names its bucket; the static map gives the group, by one
array index; within a group, an order that depends on the timeline spreads the load evenly. The storage, memory
and cold tiers use one map, with their own numbers of groups; a cache group serves the storage group of its number.

A `Routing` belongs to one epoch of the topology and never changes; a changed topology gets another one, which costs
milliseconds. All of it is local: no request ever asks the Router where to go.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import xxhash

from .cold.link import cold_order
from .errors import InvalidRequest
from .keys import PERMUTATIONS, bucket_of, buckets_of, first_replicas, priority
from .static_map import StaticMap
from .topology import TablePolicy, Topology

_CACHE_SEED = 0xCAC4E  # apart from the hashes that give bucket and priority
_CACHE_SLOTS = 1 << 14
_SCALAR_BATCH = 8  # batches up to this size are faster one by one than through arrays


@lru_cache(maxsize=4)
def _kept_map(encoded: bytes) -> StaticMap:
    return StaticMap.from_bytes(encoded, "the cluster's static map")


def _map_of(topology: Topology) -> StaticMap:
    """The map that the cluster was created with: placement must not change with the version of the program."""
    found = _kept_map(topology.static_map) if topology.static_map else StaticMap.load(topology.buckets)
    if found.buckets != topology.buckets:
        raise InvalidRequest(f"a static map of {found.buckets} buckets for a cluster of {topology.buckets}")
    if topology.map_checksum and found.checksum != topology.map_checksum:
        raise InvalidRequest(
            f"the cluster was created with static map {topology.map_checksum}, this version of timetier ships "
            f"{found.checksum}: install the version that the cluster was created with"
        )
    return found


class Routing:
    """Where the timelines and blocks of one topology live."""

    def __init__(self, topology: Topology) -> None:
        """Raises InvalidRequest when the topology's numbers can't be routed, Corrupt when its map is damaged."""
        for name in ("storage_replicas", "cold_replicas"):
            if getattr(topology, name) not in PERMUTATIONS:
                known = ", ".join(map(str, PERMUTATIONS))
                raise InvalidRequest(f"{name}={getattr(topology, name)}: pass one of {known}")
        if topology.cache_nodes < 0:
            raise InvalidRequest(f"cache_nodes={topology.cache_nodes}: pass 0 or more")
        static_map = _map_of(topology)
        self.topology = topology
        self._storage_owners = static_map.owners(topology.storage_groups)
        self._cold_owners = static_map.owners(topology.cold_groups)
        self._storage_view = self._storage_owners.data  # one element costs less than from the array
        self._cold_view = self._cold_owners.data
        self._storage_names = [
            [topology.storage_node(group, replica) for replica in range(topology.storage_replicas)]
            for group in range(topology.storage_groups)
        ]
        self._cache_names = [
            [topology.cache_node(group, number) for number in range(topology.cache_nodes)]
            for group in range(topology.storage_groups)
        ]

    # ------------------------------------------------------------ buckets and groups

    def storage_group_of(self, bucket: int) -> int:
        """Storage group (and cache group) that owns a bucket. Raises InvalidRequest."""
        return self._storage_view[self._checked(bucket)]

    def cold_group_of(self, bucket: int) -> int:
        """Cold group that owns a bucket. Raises InvalidRequest."""
        return self._cold_view[self._checked(bucket)]

    def storage_groups(self, timelines: Sequence[bytes]) -> list[int]:
        """Storage group (and cache group) of each timeline key. Raises InvalidRequest if one names no bucket."""
        if len(timelines) <= _SCALAR_BATCH:
            return [self.storage_group_of(_bucket(timeline)) for timeline in timelines]
        try:
            buckets = buckets_of(timelines)
            if len(buckets) == len(timelines):
                groups: list[int] = self._storage_owners[buckets].tolist()
                return groups
        except (IndexError, ValueError):
            pass  # one of them is wrong: the slow way finds out which
        return [self.storage_group_of(_bucket(timeline)) for timeline in timelines]

    def buckets_of_storage_group(self, group: int) -> npt.NDArray[np.uint32]:
        """Buckets that a storage group owns: increasing, uint32[n]. Raises InvalidRequest."""
        return _owned(self._storage_owners, group, self.topology.storage_groups, "storage")

    def buckets_of_cold_group(self, group: int) -> npt.NDArray[np.uint32]:
        """Buckets that a cold group owns: increasing, uint32[n]. Raises InvalidRequest."""
        return _owned(self._cold_owners, group, self.topology.cold_groups, "cold")

    # ------------------------------------------------------------ nodes

    def storage_nodes(self, group: int) -> list[str]:
        """Names of the replicas of a storage group, by replica number. Raises InvalidRequest."""
        if not 0 <= group < self.topology.storage_groups:
            raise _no_group(group, self.topology.storage_groups, "storage")
        return list(self._storage_names[group])

    def storage_order(self, timeline: bytes) -> list[str]:
        """Names of the replicas of a timeline's storage group, in the order of priority.

        Each order is equally frequent, so a dead replica's load falls evenly on the others. Raises InvalidRequest.
        """
        names = self._storage_names[self.storage_group_of(_bucket(timeline))]
        return [names[replica] for replica in priority(timeline, len(names))]

    def first_storage_nodes(self, timelines: Sequence[bytes]) -> list[str]:
        """Name of the replica of first priority of each timeline. Raises InvalidRequest."""
        replicas = first_replicas(timelines, self.topology.storage_replicas)
        if self.topology.storage_groups == 1:
            names = self._storage_names[0]
            return [names[replica] for replica in replicas]
        groups = self.storage_groups(timelines)
        return [self._storage_names[group][replica] for group, replica in zip(groups, replicas, strict=True)]

    def cache_order(self, timeline: bytes) -> list[str]:
        """Names of the cache nodes of a timeline's group, in the order in which to ask them.

        Each node is first for an equal share of the timelines. A node that is added or removed changes the order
        of no two others: only the timelines that it is first for change their node. Raises InvalidRequest.
        """
        names = self._cache_names[self.storage_group_of(_bucket(timeline))]
        if len(names) <= 1:
            return list(names)
        slot = xxhash.xxh3_64_intdigest(timeline, seed=_CACHE_SEED) % _CACHE_SLOTS
        return [names[number] for number in _rendezvous(slot, len(names))]

    def first_cache_nodes(self, timelines: Sequence[bytes]) -> list[str]:
        """Name of the cache node that each timeline is first read from. Raises InvalidRequest; there must be one."""
        groups = self.storage_groups(timelines)
        if self.topology.cache_nodes == 1:
            return [self._cache_names[group][0] for group in groups]
        nodes = self.topology.cache_nodes
        return [
            self._cache_names[group][_rendezvous(xxhash.xxh3_64_intdigest(key, _CACHE_SEED) % _CACHE_SLOTS, nodes)[0]]
            for group, key in zip(groups, timelines, strict=True)
        ]

    def cold_order(self, bucket: int, window_start: int) -> list[str]:
        """Names of the cold nodes that hold a block of this bucket and window, in the order of priority.

        Raises InvalidRequest.
        """
        group = self.cold_group_of(bucket)
        order = cold_order(bucket, window_start, self.topology.cold_replicas)
        return [self.topology.cold_node(group, replica) for replica in order]

    # ------------------------------------------------------------ tables

    def policy(self, table: str) -> TablePolicy:
        """Policy of a table. Raises InvalidRequest, which lists the tables that there are."""
        policy = self.topology.policy(table)
        if policy is None:
            known = ", ".join(sorted(self.topology.tables)) or "none"
            raise InvalidRequest(f"table={table!r} is not configured; known tables: {known}")
        return policy

    def _checked(self, bucket: int) -> int:
        if not 0 <= bucket < self.topology.buckets:
            raise InvalidRequest(f"bucket={bucket}: this cluster has buckets 0 to {self.topology.buckets - 1}")
        return bucket


def _bucket(timeline: bytes) -> int:
    if len(timeline) < 4:
        raise InvalidRequest(f"{timeline!r} is no timeline key")
    return bucket_of(timeline)


def _owned(owners: npt.NDArray[np.uint16], group: int, groups: int, tier: str) -> npt.NDArray[np.uint32]:
    if not 0 <= group < groups:
        raise _no_group(group, groups, tier)
    return np.flatnonzero(owners == group).astype(np.uint32)


def _no_group(group: int, groups: int, tier: str) -> InvalidRequest:
    return InvalidRequest(f"group={group}: this cluster has {tier} groups 0 to {groups - 1}")


@lru_cache(maxsize=1 << 15)
def _rendezvous(slot: int, nodes: int) -> tuple[int, ...]:
    """Numbers of `nodes` nodes by falling weight for a slot (Thaler and Ravishankar 1998, highest random weight).

    A weight depends on slot and number only. Slots stand for the many timelines that share one, so that the orders
    of all of them are few enough to be kept.
    """
    weights = [(xxhash.xxh3_64_intdigest(slot.to_bytes(8, "little"), seed=n + 1), n) for n in range(nodes)]
    return tuple(n for _, n in sorted(weights, reverse=True))
