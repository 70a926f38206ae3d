"""An engine in memory that counts what is read, for tests that something does not grow with the data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from memory_engine import MemoryEngine


class CountingEngine(MemoryEngine):
    """`rows_read`: rows that were asked for by name, or that a scan has given."""

    def __init__(self) -> None:
        super().__init__()
        self.rows_read = 0

    def get(self, key: bytes) -> bytes | None:
        self.rows_read += 1
        return super().get(key)

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        self.rows_read += len(keys)
        return super().get_many(keys)

    def scan(self, low: bytes, high: bytes, *, reverse: bool = False) -> Iterator[tuple[bytes, bytes]]:
        return self._counted(super().scan(low, high, reverse=reverse))

    def _counted(self, rows: Iterator[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, bytes]]:
        for row in rows:
            self.rows_read += 1
            yield row
