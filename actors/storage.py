"""StorageNode: the actor around one replica of a Paxos group."""

from __future__ import annotations

from ..cluster.service import Service
from ..cluster.storage.service import StorageService
from ..cluster.storage.version_home import open_home
from .shell import NodeActor


class StorageNode(NodeActor):
    """One replica: it holds the truth of its group's buckets, answers reads and writes."""

    tier = "storage"
    keeps_identity = True

    def make_service(self) -> Service:
        assert self.identity is not None, "the folder is open before the service is made"
        config = self.config.storage
        self._storage = StorageService(
            name=self.spec.name,
            group=self.spec.group,
            replica=self.spec.number,
            folder=self.folder,
            identity=self.identity,
            topology=self.topology,
            carrier=self.carrier,
            config=config,
            counters=self.counters,
            versions=open_home(config.version_cache_dir, self.identity, config.version_cache_mb << 20),
        )
        return self._storage

    async def may_learn(self) -> bool:
        return self.config.storage.rejoin and self.topology.storage_replicas > 1

    def allow_votes(self) -> None:
        self._storage.allow_votes()
