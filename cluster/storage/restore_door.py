"""What a storage node takes and refuses while its cluster is being restored from a backup."""

from __future__ import annotations

from ..errors import Unavailable
from ..messages import (
    AskAges,
    AskOverlay,
    AskSame,
    AskTables,
    AskTimeline,
    AskVersions,
    Check,
    Dump,
    Mend,
    Message,
    ReadItems,
    ReadPages,
    RestoreFacts,
    Scan,
    Settle,
    Write,
)
from ..paxos.replica import Replica
from ..topology import BEGINNING, Topology

REFUSED = (
    Write,
    Settle,
    ReadItems,
    ReadPages,
    Check,
    AskVersions,
    AskSame,
    AskTables,
    Scan,
    Dump,
    Mend,
    AskOverlay,
    AskTimeline,
    AskAges,
)
"""Of clients, cache nodes, the sink and backups: nobody may learn or change anything before all is there."""

_RETRY_AFTER_S = 2.0


class RestoreDoor:
    """Goes by the topology and by the mark that the replica keeps (`paxos/restores.py`). `closed`: why the node refuses
    what is in `REFUSED`, "" while it does not."""

    def __init__(self, name: str) -> None:
        self.closed = ""
        self._name = name

    def look(self, topology: Topology, replica: Replica | None) -> None:
        """Take note of another topology, or of another life of the replica."""
        restoring = topology.restoring
        if restoring is not None:
            self.closed = "the cluster is being restored from a backup (`timetier restore`)"
        elif replica is not None and replica.restores.mark.epoch >= topology.epoch:
            # A folder's copy of the topology may be from before the restore, and the Router away.
            self.closed = "its map is from before the cluster was restored from a backup"
        else:
            self.closed = ""

    def refuse(self) -> Unavailable:
        """What a client is told."""
        return Unavailable(f"{self._name}: {self.closed}", retry_after_s=_RETRY_AFTER_S)

    def require(self, topology: Topology, restore: str) -> bool:
        """Whether the restore is only beginning. Raises Unavailable unless this node knows of it."""
        restoring = topology.restoring
        if restoring is None or restoring.restore != restore:
            raise Unavailable(f"{self._name} has not heard of restore {restore} yet", retry_after_s=_RETRY_AFTER_S)
        return restoring.phase == BEGINNING

    @staticmethod
    def facts(topology: Topology, replica: Replica) -> RestoreFacts:
        """How far this node is."""
        restoring = topology.restoring
        restore, phase = (restoring.restore, restoring.phase) if restoring is not None else ("", "")
        return RestoreFacts(restore, phase, replica.restores.mark.restore, replica.restores.is_empty())


def is_refused(message: Message) -> bool:
    """Whether a message is refused while the door is closed."""
    return isinstance(message, REFUSED)
