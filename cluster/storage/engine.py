"""The storage engine under a replica: ordered rows, atomic batches, durability on demand.

`Engine` is what the consensus core asks for; `RocksEngine` gives it by RocksDB. Writes gather in a pending batch,
numbered by `sequence`. A batch is handed to RocksDB before any read and at the end of each step (`commit`), and is
durable once `sync` has flushed the write-ahead log up to it. So a step costs one WriteBatch and one fsync, and the
core knows by the number when an answer that depends on a write may leave.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from rocksdict import (
    AccessType,
    BlockBasedOptions,
    Cache,
    DBCompressionType,
    DBRecoveryMode,
    Options,
    Rdict,
    ReadOptions,
    WriteBatch,
    WriteOptions,
)

from ..errors import Corrupt, Unavailable

logger = logging.getLogger(__name__)

_MAX_SKIPPED = 64  # deleted rows on the way down
_INCOMPLETE = "Result incomplete"  # begin of RocksDB's error then
# A file with 2,048 deletions among any 4,096 rows, or with as many deletions as rows, is compacted soon.
_COMPACT_WHERE_DELETED = (4_096, 2_048, 0.5)


# A write buffer is gathered in so many pieces, and they are written to one file. A row's place in a piece of 2 MiB is
# found in the processor's caches: 1,000 writes cost 30 % less in RocksDB than with pieces of 8 MiB, half of what they
# cost with one of 32 MiB. Reads look into each piece, which costs less than they vary by.
_PIECES = 16


class EngineFailed(Unavailable):
    """The disk refused a write or a flush, or what it gave back is damaged: what this process believes to be stored
    may not be."""


class EngineDamaged(EngineFailed):
    """What the disk gave back is not what was written: the data of this replica is lost."""


class Engine(Protocol):
    """Ordered key-value rows. One thread calls all methods but `sync`."""

    sequence: int
    """Number of the batch that pending writes belong to; grows by one with each `commit` of a non-empty batch."""

    before_commit: Callable[[], None]
    """Called by each `commit` first: it may add to the batch."""

    def put(self, key: bytes, value: bytes) -> None:
        """Add a write to the pending batch."""

    def put_all(self, keys: Iterable[bytes], values: Iterable[bytes]) -> None:
        """Add many writes to the pending batch."""

    def delete(self, key: bytes) -> None:
        """Add a deletion to the pending batch."""

    def commit(self) -> int:
        """Hand the pending batch over, all or nothing. Number of the last batch handed over; not yet durable."""

    def get(self, key: bytes) -> bytes | None:
        """Value of one row. Commits what is pending first."""

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Values of many rows. Commits what is pending first."""

    def scan(self, low: bytes, high: bytes, *, reverse: bool = False) -> Iterator[tuple[bytes, bytes]]:
        """Rows with low <= key < high, as of this moment. Commits what is pending first."""


class DurableEngine(Engine, Protocol):
    """An engine on a disk."""

    def sync(self) -> None:
        """Make all committed batches durable. May run in another thread than the other methods."""

    def size_bytes(self) -> int:
        """Bytes of live rows, as far as the engine knows."""

    def abandon(self) -> None:
        """Close without writing what is pending; for an engine that has failed."""

    def close(self) -> None:
        """Make all durable and close."""


class RocksEngine:
    """RocksDB in one folder.

    Raises Corrupt when the folder's files are damaged anywhere but in the torn tail of the log: RocksDB's default
    recovery would silently drop records that were acknowledged. Raises Unavailable when the disk refuses a write.
    """

    def __init__(self, folder: Path, *, create: bool, cache_mb: int, write_buffer_mb: int) -> None:
        if not create and not (folder / "CURRENT").exists():
            raise Corrupt(f"{folder} holds no database, but this replica has been formatted before")
        self.folder = folder
        options = Options(raw_mode=True)
        options.create_if_missing(create)
        options.set_wal_recovery_mode(DBRecoveryMode.tolerate_corrupted_tail_records())
        options.set_paranoid_checks(True)
        options.set_write_buffer_size((write_buffer_mb << 20) // _PIECES)
        options.set_min_write_buffer_number_to_merge(_PIECES)
        options.set_max_write_buffer_number(3 * _PIECES)
        options.set_max_total_wal_size(4 * (write_buffer_mb << 20))
        options.set_compression_type(DBCompressionType.lz4())
        options.set_max_background_jobs(2)
        options.set_keep_log_file_num(2)
        options.set_max_open_files(512)
        options.add_compact_on_deletion_collector_factory(*_COMPACT_WHERE_DELETED)
        table = BlockBasedOptions()
        table.set_block_cache(Cache(cache_mb << 20))
        table.set_block_size(8 << 10)
        table.set_cache_index_and_filter_blocks(True)
        table.set_bloom_filter(10, False)
        options.set_block_based_table_factory(table)
        try:
            self._db = Rdict(str(folder), options, access_type=AccessType.read_write())
        except Exception as error:  # rocksdict raises plain Exception
            kind = Corrupt if _tells_of_damage(str(error)) else EngineFailed
            raise kind(f"the database in {folder} can't be opened: {error}") from None
        self._unsynced = WriteOptions()
        self._unsynced.sync = False
        self._batch = WriteBatch(raw_mode=True)
        self.sequence = 1
        self.before_commit: Callable[[], None] = _nothing

    def put(self, key: bytes, value: bytes) -> None:
        self._batch.put(key, value)

    def put_all(self, keys: Iterable[bytes], values: Iterable[bytes]) -> None:
        deque(map(self._batch.put, keys, values), maxlen=0)  # a loop without bytecode

    def delete(self, key: bytes) -> None:
        self._batch.delete(key)

    def commit(self) -> int:
        self.before_commit()
        if not self._batch.is_empty():
            try:
                self._db.write(self._batch, self._unsynced)
            except Exception as error:
                raise EngineFailed(f"the engine refused a write: {error}") from None
            self._batch = WriteBatch(raw_mode=True)
            self.sequence += 1
        return self.sequence - 1

    def sync(self) -> None:
        """Make all committed batches durable. Blocks for one fsync without holding the GIL: call it in a thread."""
        try:
            self._db.flush_wal(True)
        except Exception as error:
            raise EngineFailed(f"the engine could not flush its log: {error}") from None

    def get(self, key: bytes) -> bytes | None:
        self.commit()
        try:
            return cast(bytes | None, self._db.get(key))
        except Exception as error:
            raise _unreadable(error) from None

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        self.commit()
        if not keys:
            return []
        try:
            return cast(list[bytes | None], self._db.get(list(keys)))
        except Exception as error:
            raise _unreadable(error) from None

    def scan(self, low: bytes, high: bytes, *, reverse: bool = False) -> Iterator[tuple[bytes, bytes]]:
        self.commit()
        bounds = ReadOptions()
        bounds.set_iterate_upper_bound(high)
        if reverse:
            bounds.set_max_skippable_internal_keys(_MAX_SKIPPED)
            return self._down(self._db.items(backwards=True, read_opt=bounds), low, high, bounds)
        return _up(self._db.iter(bounds), low, bounds)

    def _down(self, rows: Any, low: bytes, high: bytes, bounds: ReadOptions) -> Iterator[tuple[bytes, bytes]]:
        """Rows of an iterator that is open already, from `high` down to `low`.

        rocksdict 0.3.29 takes a lower bound for an upper one, so the way down ends here instead of in RocksDB. Where
        rows were evicted it would not end soon: RocksDB would look at each deleted row down to the next live one, maybe
        of another timeline far below. So it gives up after `_MAX_SKIPPED` of them. Then the lowest live row is found
        from below, which the upper bound ends, and the way down ends there.
        """
        last = high
        for row in rows:
            if row[0] < low:
                return
            last = row[0]
            yield row
        if self._skipped_too_many(last, high, bounds):
            yield from self._down_to_lowest(low, last)

    def _skipped_too_many(self, last: bytes, high: bytes, bounds: ReadOptions) -> bool:
        """Whether the way down ended after `last` for too many deleted rows. Raises EngineFailed.

        Else the database begins there, or the row's neighbour can't be read, on which `items` is silent.
        """
        check = self._db.iter(bounds)
        if last == high:
            check.seek_to_last()
        else:
            check.seek(last)
            check.prev()
        try:
            check.status()
        except Exception as error:
            if str(error).startswith(_INCOMPLETE):
                return True
            raise _unreadable(error) from None
        return False

    def _down_to_lowest(self, low: bytes, high: bytes) -> Iterator[tuple[bytes, bytes]]:
        bounds = ReadOptions()
        bounds.set_iterate_upper_bound(high)
        lowest = next(_up(self._db.iter(bounds), low, bounds), None)
        if lowest is None:
            return
        rows: Any = self._db.items(backwards=True, read_opt=bounds)
        for row in rows:
            yield row
            if row[0] <= lowest[0]:
                return
        check = self._db.iter(bounds)
        check.seek_to_last()
        _raise_if_damaged(check)
        raise EngineFailed("the engine lost a row that it had a moment ago")

    def size_bytes(self) -> int:
        """Bytes of live rows on disk and in write buffers, as RocksDB estimates them."""
        names = ("rocksdb.total-sst-files-size", "rocksdb.cur-size-all-mem-tables")
        return sum(self._db.property_int_value(name) or 0 for name in names)

    def abandon(self) -> None:
        """Close without writing what is pending; for an engine that has failed. It can't be used again.

        On a full disk closing fails too, because it flushes. Then the database is only let go of, which frees its
        lock; what the log holds is read again when it is opened.
        """
        self._batch = WriteBatch(raw_mode=True)
        database: Any = self._db
        del self._db
        try:
            database.close()
        except Exception as error:
            # As text: the error itself would keep the database alive for as long as the record is kept.
            logger.warning("an engine that had failed did not close either: %s", str(error))

    def close(self) -> None:
        """Flush and close; the folder's lock is free afterwards."""
        self.commit()
        self._db.flush_wal(True)
        self._db.close()


def _nothing() -> None:
    """What an engine does before a commit, unless it was told otherwise."""


def _up(rows: Any, low: bytes, bounds: ReadOptions) -> Iterator[tuple[bytes, bytes]]:
    """Rows of an iterator that is open already, from `low` on.

    RocksDB keeps only a pointer to the upper bound, which belongs to `bounds` and not to the iterator: were it
    collected first, the scan would end anywhere.
    """
    rows.seek(low)
    while rows.valid():
        yield rows.key(), rows.value()
        rows.next()
    _raise_if_damaged(rows)
    del bounds


def _raise_if_damaged(rows: Any) -> None:
    """An iterator ends in the same way at its bound and at a block that can't be read; only its status tells."""
    try:
        rows.status()
    except Exception as error:
        raise _unreadable(error) from None


def _tells_of_damage(text: str) -> bool:
    """Whether an error at opening means that files are damaged or missing.

    Any other error of the disk may pass: it is full, or hangs, or another process has the folder open. Taken for
    damage it would have the replica throw away what it holds.
    """
    return not text.startswith("IO error") or "No such file or directory" in text


def _unreadable(error: Exception) -> EngineFailed:
    kind = EngineDamaged if str(error).startswith("Corruption") else EngineFailed
    return kind(f"the engine could not read: {error}")
