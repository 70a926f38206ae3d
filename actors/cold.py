"""ColdNode: the actor around one node of the cold tier."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable
from pathlib import Path

from ..cluster.cold.scrub_round import ScrubSettings
from ..cluster.cold.service import ColdService
from ..cluster.identity import has_identity
from ..cluster.service import Service
from .shell import NodeActor


def are_mounted(places: Iterable[Path]) -> bool:
    """Whether each of these folders is a file system of its own, and there: what is missing on it is really missing."""
    return all(os.path.ismount(place) for place in places)


class ColdNode(NodeActor):
    """Keeps one copy of each block of its group, and reads blocks."""

    tier = "cold"
    keeps_identity = True

    def make_service(self) -> Service:
        assert self.identity is not None, "the folder is open before the service is made"
        return ColdService(
            self.spec.name,
            self.spec.group,
            self.spec.number,
            self.folder,
            self.topology,
            self.carrier,
            disks=self.config.cold.disks,
            disk_dirs=self.config.cold.disk_dirs,
            lost=self.identity.learning,
            on_whole=self._is_whole,
            disk_timeout_s=self.config.cold.disk_timeout_s,
            rebuild_mb_per_s=self.config.cold.rebuild_mb_per_s,
            read_threads=self.config.cold.read_threads,
            block_cache_bytes=self.config.cold.block_cache_mb << 20,
            scrub=ScrubSettings(self.config.cold.scrub_mb_per_s, self.config.cold.scrub_every),
            counters=self.counters,
        )

    async def may_learn(self) -> bool:
        """Only when somebody has said so, or where all disks are surely mounted: else empty folders tell nothing."""
        if await asyncio.to_thread(has_identity, self.folder):
            return False
        if await self._ask("is_lost", self.spec.name):
            return True
        places = self.config.cold.disk_dirs or [self.config.data_dir]
        return self.config.cold.rejoin and await asyncio.to_thread(are_mounted, places)

    def _is_whole(self) -> None:
        """All disks are filled: from here on an empty folder is a loss again."""
        if self.identity is not None and self.identity.learning:
            self._keep(asyncio.to_thread(self.identity.end_learning))
