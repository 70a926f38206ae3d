"""What a replica can tell readers without looking at a timeline: its version cache, kept true step by step (*pure*).

The core lists each timeline whose state has changed (`changed`), and `flush` brings the cache up to date with all of
them at once. It runs before the engine is handed anything, before anything leaves, and before the cache is asked. So

* an entry is dirty before the write is handed to the engine that accepts something after its version;
* it is clean again when that is chosen here and everything that was written of the timeline has been fsync'd.

What is clean is a vote: "I have applied exactly this version, durably, and accepted nothing after it" (see
`memory/votes.py`). It stays true in later lives, since nothing is accepted without that entry being marked first. So a
life that finds entry e accepted on its disk, and a clean entry e in the cache, knows that e was chosen: the life before
had learnt it, and lost only the note of it. Without that a replica's answers would go back from e to e-1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from ..errors import InvalidRequest
from ..keys import timeline_digest
from ..messages import NO_BALLOT, Life, unpack_i64
from ..storage.version_cache import DIGEST_BYTES, DIRTY, HEADER_BYTES, ROW_BYTES, Owner, VersionCache
from .timeline import NOT_NOTED, Timeline

SMALLEST_BYTES = HEADER_BYTES + 64 * ROW_BYTES


class Versions:
    """The version cache of one life of a replica. `asked`, `known`: timelines asked about, and answered from it."""

    def __init__(self, cache: VersionCache | None, life: Life) -> None:
        """`cache`: None for a small one in memory."""
        self.cache = cache or VersionCache(bytearray(SMALLEST_BYTES), Owner(b"", 0, None, 0))
        self.changed: list[Timeline] = []
        self.asked = self.known = 0
        self._waiting: list[Timeline] = []  # chosen, but not all of it is durable
        self._durable = 0
        self._life = life
        self._horizons = 0
        self.mark = self._next_mark()

    def digest(self, timeline: bytes) -> bytes:
        """Digest of a timeline key."""
        return timeline_digest(timeline, self.cache.seed)

    # ---- keeping it true

    def flush(self) -> None:
        """Bring the cache up to date with what has changed."""
        if not self.changed:
            return
        dirty: list[bytes] = []
        clean: list[bytes] = []
        versions: list[int] = []
        durable, waiting = self._durable, self._waiting
        for timeline in self.changed:
            if timeline.accepted != NO_BALLOT:
                chosen = DIRTY  # it comes back when the open entry is chosen
            elif timeline.dirty > durable:
                waiting.append(timeline)
                chosen = DIRTY
            else:
                chosen = timeline.chosen
            if timeline.noted == chosen:
                continue
            timeline.noted = chosen
            if chosen == DIRTY:
                dirty.append(timeline.digest)
            else:
                clean.append(timeline.digest)
                versions.append(chosen)
        self.changed.clear()
        if dirty:
            self.cache.mark_dirty(b"".join(dirty))
        if 0 < len(clean) <= self.cache.few:
            self.cache.note_few(b"".join(clean), versions)
        elif clean:
            self.cache.note(b"".join(clean), np.array(versions, dtype=np.int64))

    def missed(self, timeline: Timeline) -> None:
        """A timeline was asked for by its key, so the cache may have lost its entry to others: note it again."""
        timeline.noted = NOT_NOTED
        self.changed.append(timeline)

    def durable(self, batch: int) -> None:
        """All engine batches up to `batch` are on disk."""
        self._durable = max(self._durable, batch)
        self.changed += self._waiting
        self._waiting.clear()

    def proves(self, timeline: Timeline) -> bool:
        """Whether an earlier life knew that the open entry of a timeline, as it was just loaded, is chosen."""
        known: int = self.cache.look_up(timeline.digest)[0]
        return known == timeline.chosen + 1

    # ---- answering

    def others(self, digests: bytes, versions: bytes) -> list[int]:
        """Indices of the timelines of which the cache does not say that they are at these versions (int64 column).

        Raises InvalidRequest when the columns don't fit each other.
        """
        if len(digests) * 8 != len(versions) * DIGEST_BYTES or len(versions) % 8:
            raise InvalidRequest(f"{len(digests)} bytes of digests don't fit {len(versions)} bytes of versions")
        self.flush()
        count = len(versions) // 8
        if count <= self.cache.few:
            known = self.cache.look_up_few(digests)
            wanted = unpack_i64(versions)
            others = [at for at in range(count) if known[at] != wanted[at] or known[at] < 0]
        else:
            found = self.cache.look_up(digests)
            others = np.flatnonzero((found != np.frombuffer(versions, "<i8")) | (found < 0)).tolist()
        self.asked += count
        self.known += count - len(others)
        return others

    def look_up(self, timelines: Iterable[bytes]) -> list[int]:
        """Versions of timelines by key, `DIRTY` where the cache does not know."""
        self.flush()
        found: list[int] = self.cache.look_up(b"".join([self.digest(key) for key in timelines])).tolist()
        self.asked += len(found)
        self.known += len(found) - found.count(DIRTY)
        return found

    def status(self, where: str) -> dict[str, Any]:
        """Figures for people. `warm`: entries that were there when this life began."""
        cache = self.cache
        return {
            "entries": cache.entries,
            "capacity": cache.capacity,
            "warm": cache.warm,
            "asked": self.asked,
            "hit_rate": round(self.known / self.asked, 4) if self.asked else None,
            "where": where,
        }

    # ---- horizons

    def horizon_moved(self) -> None:
        """A retention horizon may have changed: what a reader proved current before may hold expired items."""
        self._horizons += 1
        self.mark = self._next_mark()

    def _next_mark(self) -> int:
        """A number that no other life has (of 63 bits), by the life and a count."""
        text = repr((self._life, self._horizons)).encode()
        number = int.from_bytes(hashlib.blake2b(text, digest_size=8, person=b"horizons").digest(), "little")
        return number >> 1 or 1
