"""What a storage replica may write while its disk, or its peers' disks, fill up.

RocksDB on a disk that is really full may fail, or block for as long as it waits for room. So a replica stops before:

| free room | client's writes | peers' new values | settling an open entry | reads |
|---|---|---|---|---|
| at least the reserve | taken | accepted | yes | yes |
| less (`full`) | refused | not accepted | yes | yes |
| less than half of it (`bare`) | refused | not accepted | no | yes, of all timelines without an open entry |

Settling goes on longer because reads may need it: writes that were on their way when a disk filled up have left open
entries. A value of round 0 is new for certain; one of a later round may complete an entry that is open, and is
accepted. To its peers a replica that accepts nothing looks like one that does not answer, which a group survives. It
also tells them (`PeerBatch.full`): a replica that has room, but knows that too few others have, refuses a write at
once, instead of leaving it with an unknown fate.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from ..errors import Unavailable
from ..messages import Accept, Accepts, Entries, PeerBatch, PeerMessage, Prepare, State

RETRY_AFTER_S = 1.0
TOLD_FOR_S = 10.0  # how long a peer's word that its disk is full counts; it repeats it every few seconds


class DiskRoom:
    """Room on the disk of one replica, and what is known of its peers. `look` is called now and then."""

    def __init__(self, node: str, folder: Path, reserve_bytes: int, measure: Callable[[Path], int]) -> None:
        """`node`: its name, for error messages. `measure`: free bytes of a folder's disk; may raise OSError."""
        self.reserve_bytes = reserve_bytes
        self.free_bytes = -1  # not known yet
        self.full = False
        self.bare = False
        self._node = node
        self._folder = folder
        self._measure = measure
        self._full_peers: dict[int, float] = {}

    def look(self) -> None:
        """Measure again. Raises OSError when the disk can't tell."""
        self.free_bytes = self._measure(self._folder)
        self.full = self.free_bytes < self.reserve_bytes
        self.bare = self.free_bytes < self.reserve_bytes // 2

    def note_peer(self, peer: int, full: bool, now: float) -> None:
        """A peer has told whether its disk is full."""
        if full:
            self._full_peers[peer] = now
        else:
            self._full_peers.pop(peer, None)

    def require_for_write(self, replicas: int, now: float) -> None:
        """Raises Unavailable when a write can't be taken here, or would find no majority."""
        if self.full:
            raise Unavailable(f"{self._node}: {self.reason}", retry_after_s=RETRY_AFTER_S)
        if self._full_peers:
            full = sorted(peer for peer, told in self._full_peers.items() if now - told < TOLD_FOR_S)
            if replicas - len(full) <= replicas // 2:
                raise Unavailable(
                    f"{self._node}: the disks of replicas {', '.join(map(str, full))} of its group are full (less than "
                    "storage.disk_reserve_mb): no writes are taken until there is room; reads go on",
                    retry_after_s=RETRY_AFTER_S,
                )

    def require_for_settling(self) -> None:
        """Raises Unavailable when not even an open entry can be settled."""
        if self.bare:
            raise Unavailable(f"{self._node}: {self.reason}", retry_after_s=RETRY_AFTER_S)

    @property
    def reason(self) -> str:
        """Why no writes are taken, in words."""
        return (
            f"less than {self.reserve_bytes >> 20} MiB of disk are free (storage.disk_reserve_mb): no writes are taken "
            "until there is room; reads go on"
        )

    def allowed(self, batch: PeerBatch) -> PeerBatch:
        """A peer's batch without what must not be written now."""
        if not self.full:
            return batch
        return msgspec.structs.replace(batch, messages=[m for m in batch.messages if self._allows(m)])

    def _allows(self, message: PeerMessage) -> bool:
        if self.bare:
            return not isinstance(message, Accept | Accepts | Prepare | Entries | State)
        if isinstance(message, Accept):
            return message.ballot[0] > 0
        return not isinstance(message, Accepts | Entries | State)
