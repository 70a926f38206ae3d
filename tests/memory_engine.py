"""An engine in memory that loses on a crash what was not synced; for tests of the pure consensus core."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Sequence


class MemoryEngine:
    """Implements `timetier.cluster.storage.engine.Engine`. `sync()` gives the last durable batch; `crash()` forgets."""

    def __init__(self) -> None:
        self.sequence = 1
        self.before_commit: Callable[[], None] = lambda: None
        self._rows: dict[bytes, bytes] = {}
        self._names: list[bytes] = []
        self._pending: list[tuple[bytes, bytes | None]] = []
        self._unsynced: list[list[tuple[bytes, bytes | None]]] = []
        self._synced: dict[bytes, bytes] = {}

    def __deepcopy__(self, _: object) -> MemoryEngine:
        """Its rows, without the life that uses it."""
        copied = MemoryEngine()
        copied.sequence = self.sequence
        copied._rows, copied._names, copied._synced = dict(self._rows), list(self._names), dict(self._synced)
        copied._pending, copied._unsynced = list(self._pending), list(map(list, self._unsynced))
        return copied

    def put(self, key: bytes, value: bytes) -> None:
        self._pending.append((key, value))

    def put_all(self, keys: Iterable[bytes], values: Iterable[bytes]) -> None:
        self._pending.extend(zip(keys, values, strict=True))

    def delete(self, key: bytes) -> None:
        self._pending.append((key, None))

    def commit(self) -> int:
        self.before_commit()
        if self._pending:
            for key, value in self._pending:
                if value is None:
                    if self._rows.pop(key, None) is not None:
                        del self._names[bisect_left(self._names, key)]
                else:
                    if key not in self._rows:
                        insort(self._names, key)
                    self._rows[key] = value
            self._unsynced.append(self._pending)
            self._pending = []
            self.sequence += 1
        return self.sequence - 1

    def sync(self) -> int:
        last = self.commit()
        self._settle(len(self._unsynced))
        return last

    def crash(self, keep: int = 0) -> None:
        """The process dies: of the batches that were not synced the first `keep` had reached the disk."""
        self.before_commit = lambda: None
        self._settle(min(keep, len(self._unsynced)))
        self._pending, self._unsynced = [], []
        self._rows = dict(self._synced)
        self._names = sorted(self._rows)

    def _settle(self, batches: int) -> None:
        for batch in self._unsynced[:batches]:
            for key, value in batch:
                if value is None:
                    self._synced.pop(key, None)
                else:
                    self._synced[key] = value
        del self._unsynced[:batches]

    @property
    def unsynced(self) -> int:
        return len(self._unsynced)

    def get(self, key: bytes) -> bytes | None:
        self.commit()
        return self._rows.get(key)

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        self.commit()
        return [self._rows.get(key) for key in keys]

    def scan(self, low: bytes, high: bytes, *, reverse: bool = False) -> Iterator[tuple[bytes, bytes]]:
        self.commit()
        names = self._names[bisect_left(self._names, low) : bisect_left(self._names, high)]
        if reverse:
            names.reverse()
        return iter([(name, self._rows[name]) for name in names])
