"""ColdNode: the actor around one node of the cold tier."""

from __future__ import annotations

from ..cluster.cold.service import ColdService
from ..cluster.service import Service
from .shell import NodeActor


class ColdNode(NodeActor):
    """Keeps one copy of each block of its group, and reads blocks."""

    tier = "cold"
    keeps_identity = True

    def make_service(self) -> Service:
        return ColdService(
            self.spec.name,
            self.spec.group,
            self.spec.number,
            self.folder,
            self.topology,
            self.carrier,
            disks=self.config.cold.disks,
            read_threads=self.config.cold.read_threads,
            block_cache_bytes=self.config.cold.block_cache_mb << 20,
            counters=self.counters,
        )
