"""Checks of the version cache: what a life finds in it, and all that it answers from it, against the disk (G6)."""

from __future__ import annotations

from collections.abc import Callable

from timetier.cluster.cold.run_record import run_timeline
from timetier.cluster.keys import system_timeline, timeline_key
from timetier.cluster.paxos.rows import Meta, log_key, meta_key, prefix_end
from timetier.cluster.paxos.versions import Versions
from timetier.cluster.storage.version_cache import DIGEST_BYTES, DIRTY, Ints

from .disk import SimDisk, SimEngine
from .plan import BUCKETS, TABLE, Plan
from .trace import show_timeline
from .truth import Truth
from .version_memory import clean_entries


class VersionWatch:
    """The checks of one run. `finds`, `answers`: entries that were checked."""

    def __init__(self, plan: Plan, truth: Truth, report: Callable[[str, str], None]) -> None:
        self.finds = self.answers = 0
        self._truth = truth
        self._report = report
        owners = [timeline_key(TABLE.encode(), owner.encode(), BUCKETS) for owner in plan.shape.owners]
        self._timelines = [*owners, *map(system_timeline, range(BUCKETS)), run_timeline(BUCKETS)]
        self._by_digest: dict[bytes, bytes] = {}

    def replica(self, name: str, versions: Versions, engine: SimEngine, disk: SimDisk) -> None:
        """Look on a life from its beginning."""
        self._by_digest = self._by_digest or {versions.digest(key): key for key in self._timelines}
        cache = versions.cache
        many, few = cache.look_up, cache.look_up_few

        def check(digests: bytes, found: list[int]) -> None:
            names = [digests[at : at + DIGEST_BYTES] for at in range(0, len(digests), DIGEST_BYTES)]
            for digest, version in zip(names, found, strict=True):
                if version != DIRTY:
                    self.answers += 1
                    self._check(name, engine, disk, digest, version)

        def look_up(digests: bytes) -> Ints:
            found = many(digests)
            if len(digests) > cache.few * DIGEST_BYTES:  # else it has asked for a few
                check(digests, found.tolist())
            return found

        def look_up_few(digests: bytes) -> list[int]:
            found = few(digests)
            check(digests, found)
            return found

        cache.look_up = look_up  # type: ignore[method-assign]
        cache.look_up_few = look_up_few  # type: ignore[method-assign]
        for digest, version in clean_entries(versions.cache):
            self.finds += 1
            self._check(name, engine, disk, digest, version)

    def _check(self, name: str, engine: SimEngine, disk: SimDisk, digest: bytes, version: int) -> None:
        """What is clean was chosen, is on the disk, and nothing was accepted after it."""
        timeline = self._by_digest.get(digest)
        if timeline is None:
            self._report("G6: the version cache is true", f"{name} has version {version} of a digest that nobody has")
            return
        rows = disk.engine.synced
        history = self._truth.timelines.get(timeline)
        row = rows.get(meta_key(timeline))
        marked = Meta.decode(row).chosen if row is not None else 0
        wrong = ""
        if engine.peek_range(log_key(timeline, version + 1), prefix_end(b"L" + timeline)) or marked > version:
            wrong = "but has accepted a later entry"
        elif marked < version and log_key(timeline, version) not in rows:
            wrong = "which is not on its disk"
        elif version > (max(history.entries, default=0) if history is not None else 0):
            wrong = "which nobody has taken for chosen"
        if wrong:
            what = f"version {version} of {show_timeline(timeline)} in the version cache of {name}"
            self._report("G6: the version cache is true", f"{what}, {wrong}")
