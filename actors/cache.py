"""CacheNode: the actor around one node of the memory tier."""

from __future__ import annotations

import secrets

from ..cluster.memory.lanes import limits_of
from ..cluster.memory.service import CacheService
from ..cluster.service import Service
from .shell import NodeActor


class CacheNode(NodeActor):
    """Serves strongly consistent reads of one storage group's timelines from memory; has no data of its own."""

    tier = "cache"

    def make_service(self) -> Service:
        cache = self.config.cache
        return CacheService(
            self.spec.name,
            self.spec.group,
            self.topology,
            self.carrier,
            budget_bytes=cache.budget_mb << 20,
            page_items=cache.page_items,
            block_cache_bytes=cache.block_cache_mb << 20,
            max_queued_requests=cache.max_queued_requests,
            max_queued_bytes=cache.max_queued_mb << 20,
            limits=limits_of(cache),
            counters=self.counters,
            seed=secrets.randbits(63),
        )
