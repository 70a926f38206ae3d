"""The cluster as its members see it: map epoch, groups, nodes, tables. Pure data, handed out by the Router."""

from __future__ import annotations

import msgspec

from .carriers.base import Address
from .keys import is_internal

FORMAT = 1  # of this document and of the data folders; a node refuses a greater one


BEGINNING, COPYING = "beginning", "copying"


class Restoring(msgspec.Struct, frozen=True):
    """A restore from a backup is under way. `restore`: its name. `phase`: `BEGINNING` until every storage replica was
    found empty, then `COPYING`."""

    restore: str
    phase: str


class TablePolicy(msgspec.Struct, frozen=True):
    """Policy of one table, durations in units of its timestamps (`per_second` of them make a second).

    `cold_after`, `window`: units. `retention`: units, or 0 for ever.
    """

    per_second: int
    cold_after: int
    window: int
    retention: int = 0


class Topology(msgspec.Struct, frozen=True):
    """One version of the cluster's shape. `epoch` grows with each change.

    Node names are `storage-G-R`, `cache-G-N` and `cold-G-R` (group, replica or number).
    `default_table`: policy of tables that are not listed, or None when only listed ones exist.
    `secret`: shared by all members, hex; the direct carrier's challenge is answered with it.
    `restoring`: while it is set, nobody may read or write.
    `map_checksum`: of the static map that the cluster was created with; `static_map`: that map, b"" where it is
    the one that ships with the package (too large to be sent around).
    """

    cluster_id: str
    namespace: str
    epoch: int
    buckets: int
    storage_groups: int
    storage_replicas: int
    cold_groups: int
    cold_replicas: int
    cold_disks: int
    cache_nodes: int  # per storage group
    tables: dict[str, TablePolicy]
    default_table: TablePolicy | None
    addresses: dict[str, Address]
    secret: str
    map_checksum: str = ""
    static_map: bytes = b""
    format: int = FORMAT
    restoring: Restoring | None = None

    def storage_node(self, group: int, replica: int) -> str:
        return f"storage-{group}-{replica}"

    def cold_node(self, group: int, replica: int) -> str:
        return f"cold-{group}-{replica}"

    def cache_node(self, group: int, number: int) -> str:
        return f"cache-{group}-{number}"

    def node_names(self) -> list[str]:
        """Names of all nodes that this shape has, whether or not they run."""
        return [
            *[self.storage_node(g, r) for g in range(self.storage_groups) for r in range(self.storage_replicas)],
            *[self.cache_node(g, n) for g in range(self.storage_groups) for n in range(self.cache_nodes)],
            *[self.cold_node(g, r) for g in range(self.cold_groups) for r in range(self.cold_replicas)],
        ]

    def policy(self, table: str) -> TablePolicy | None:
        """Policy of a table, or None when there is no such table."""
        return None if is_internal(table) else self.tables.get(table, self.default_table)
