"""Load a file of timelines into a table: `timetier load FILE --table T --owner A --time B --id C,D`.

The file is read twice, or once if its items fit in `KEEP_BYTES`. The first pass only looks: it finds the rows that
can't be loaded, the keys that come more than once, and whether the file can be read to its end; so a broken file
changes nothing. The second pass writes each key once, with the value of its *last* row in the file. As no key is
written twice, batches may overtake one another.

A put of what is already there would still make a new version, so each batch is compared with the table first and
only what differs is written: loading a file again changes nothing, and a load that was cut off goes on where it was.

Memory: `KEEP_BYTES`, a few batches in flight, and 33 to 67 bytes for each key of the file (`key_memory.py`).
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..cluster.client.items import AddressLike, Item, Put, PutLike
from ..cluster.errors import InvalidRequest, OutcomeUnknown, Rejected, TimeTierError, Unavailable, WriteManyError
from ..cluster.keys import MAX_BATCH_BYTES, MAX_BATCH_ITEMS
from ..cluster.topology import TablePolicy
from .key_memory import KeyMemory, key_digests, owner_digests, value_digests
from .rejects import Rejects
from .rows import Batch, Columns, read_rows
from .sources import open_source

KEEP_BYTES = 128 << 20  # items kept between the two passes
WRITERS = 4  # batches in flight
RETRY_S = 60.0  # how long one batch is tried again while nothing of it succeeds
MAX_PAUSE_S = 2.0
MAX_EXAMPLES = 20  # conflicting rows that the report names

_ITEM_OVERHEAD_BYTES = 200  # of an item in memory, beside its bytes
_BATCH_BYTES = MAX_BATCH_BYTES // 2  # leaves room for keys and framing

Progress = Callable[[int, int | None], None]


class LoadTable(Protocol):
    """What the loader needs of a `Table`. Its methods are called from several threads."""

    @property
    def policy(self) -> TablePolicy: ...

    def put_many(self, items: Sequence[PutLike]) -> list[int]: ...

    def get_many(self, keys: Sequence[AddressLike]) -> list[Item | None]: ...


@dataclass
class LoadReport:
    """What became of each row: rows = loaded + unchanged + duplicates + overwritten + rejected.

    `unchanged`: were in the table with the same value. `duplicates`: equal to an earlier row of the file.
    `overwritten`: a later row of the file has the same key and another value, and that one counts;
    `conflicting_keys` is the number of such keys, `conflicts` names the first rows that replaced another.
    `reasons`: rejected rows by reason. `timelines`: different owners.
    """

    file: str
    rows: int = 0
    loaded: int = 0
    unchanged: int = 0
    duplicates: int = 0
    overwritten: int = 0
    conflicting_keys: int = 0
    rejected: int = 0
    timelines: int = 0
    seconds: float = 0.0
    rows_per_s: float = 0.0
    reasons: dict[str, int] = field(default_factory=dict)
    conflicts: list[dict[str, Any]] = field(default_factory=list)


def load_file(
    table: LoadTable,
    path: Path,
    columns: Columns,
    *,
    file_format: str | None = None,
    rejects: Path | None = None,
    progress: Progress | None = None,
    batch_items: int = 5_000,
) -> LoadReport:
    """Load a file (see `rows.py` for how rows become items, `sources.py` for the formats).

    `rejects`: file to write rejected rows to, as JSON lines. `progress(done, total)` is called with rows; `total` is
    None while the file is only looked at. `batch_items`: items a call, 1 to 10,000.

    Raises InvalidRequest when the file or a column can't serve, before anything was written; Unavailable or
    OutcomeUnknown when the store did not answer for a minute: then loading again goes on where this one ended.
    """
    if not 1 <= batch_items <= MAX_BATCH_ITEMS:
        raise InvalidRequest(f"batch_items={batch_items}: pass 1 to {MAX_BATCH_ITEMS}")
    if rejects is not None and rejects.exists() and path.exists() and rejects.samefile(path):
        raise InvalidRequest(f"rejects={str(rejects)!r} is the file to load: name another one")
    began = time.monotonic()
    stamp = _stamp(path)
    report = LoadReport(file=str(path))
    with Rejects(rejects) as rejected:
        look = _Look(path, columns, table.policy.per_second, file_format, progress or (lambda done, total: None))
        look.run(rejected, report)
        report.rows = look.items + rejected.count
        _write_all(table, _pieces(look.items_to_write(stamp), batch_items), look, rejected, report)
        report.rejected, report.reasons = rejected.count, rejected.reasons
    report.seconds = time.monotonic() - began
    report.rows_per_s = report.rows / max(report.seconds, 1e-9)
    return report


def _stamp(path: Path) -> tuple[int, int] | None:
    """Size and time of change, by which a file that is changed between the passes is noticed."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None  # opening it says so better
    return found.st_size, found.st_mtime_ns


class _Look:
    """The first pass, and what it found out. `items`: rows that can be items. `keys`: different keys of them."""

    def __init__(
        self, path: Path, columns: Columns, per_second: int, file_format: str | None, progress: Progress
    ) -> None:
        self.path = path
        self.progress = progress
        self.items = 0
        self.keys = 0
        self._columns = columns
        self._per_second = per_second
        self._format = file_format
        self._kept: list[Batch] | None = []
        self._memory: KeyMemory | None = None  # only where some key comes more than once

    def _read(self, rejects: Rejects) -> Iterator[Batch]:
        return read_rows(open_source(self.path, rejects, self._format), self._columns, self._per_second, rejects)

    def run(self, rejects: Rejects, report: LoadReport) -> None:
        """Read the whole file."""
        memory, owners = KeyMemory(), KeyMemory()
        kept_bytes = 0
        for batch in self._read(rejects):
            self.items += len(batch)
            repeats = memory.note(key_digests(batch.owners, batch.timestamps, batch.ids), value_digests(batch.values))
            report.duplicates += repeats.duplicates
            report.overwritten += repeats.overwritten
            report.conflicts += [
                _named(batch, at) for at in repeats.conflicting[: MAX_EXAMPLES - len(report.conflicts)]
            ]
            hashes = owner_digests(list(set(batch.owners)))
            owners.note(hashes, np.zeros(len(hashes), dtype=np.uint64))
            kept_bytes += len(batch) * _ITEM_OVERHEAD_BYTES + sum(_item_bytes(batch))
            if kept_bytes > KEEP_BYTES:
                self._kept = None
            elif self._kept is not None:
                self._kept.append(batch)
            self.progress(self.items + rejects.count, None)
        report.timelines = owners.keys
        report.conflicting_keys = memory.conflicting_keys
        self.keys = memory.keys
        self._memory = memory if self.keys < self.items else None

    def items_to_write(self, stamp: tuple[int, int] | None) -> Iterator[Batch]:
        """The second pass: of each key the row that counts. Raises InvalidRequest if the file is another by now."""
        changed = f"{self.path} was changed while it was loaded: load it again"
        count = 0
        for batch in self._read(Rejects()) if self._kept is None else self._kept:
            if self._memory is not None:
                digests = key_digests(batch.owners, batch.timestamps, batch.ids)
                try:
                    batch = _selected(batch, self._memory.take_final(digests, value_digests(batch.values)).nonzero()[0])
                except KeyError:
                    raise InvalidRequest(changed) from None
            count += len(batch)
            yield batch
        if self._kept is None and (count != self.keys or _stamp(self.path) != stamp):
            raise InvalidRequest(changed)


def _selected(batch: Batch, places: Any) -> Batch:
    if len(places) == len(batch):
        return batch
    return Batch(
        [batch.owners[at] for at in places],
        [batch.timestamps[at] for at in places],
        [batch.ids[at] for at in places],
        [batch.values[at] for at in places],
        batch.rows[places],
    )


def _item_bytes(batch: Batch) -> Iterator[int]:
    lengths = (map(len, column) for column in (batch.owners, batch.ids, batch.values))
    return map(sum, zip(*lengths, strict=True))


def _named(batch: Batch, at: int) -> dict[str, Any]:
    return {
        "row": int(batch.rows[at]),
        "owner": batch.owners[at].decode(errors="backslashreplace"),
        "timestamp": batch.timestamps[at],
        "id": batch.ids[at].decode(errors="backslashreplace"),
    }


def _pieces(batches: Iterator[Batch], batch_items: int) -> Iterator[Batch]:
    """The same items in batches of `batch_items`, or fewer where their bytes would be too many for one call."""
    parts: list[Batch] = []
    items = piece_bytes = 0
    for batch in batches:
        start = 0
        for at, size in enumerate(_item_bytes(batch)):
            if items + at - start >= batch_items or piece_bytes + size > _BATCH_BYTES:
                yield _joined([*parts, _selected(batch, np.arange(start, at))])
                parts, items, piece_bytes, start = [], 0, 0, at
            piece_bytes += size + 64
        parts.append(_selected(batch, np.arange(start, len(batch))))
        items += len(batch) - start
    if items:
        yield _joined(parts)


def _joined(parts: list[Batch]) -> Batch:
    if len(parts) == 1:
        return parts[0]
    chain = itertools.chain.from_iterable
    return Batch(
        list(chain(part.owners for part in parts)),
        list(chain(part.timestamps for part in parts)),
        list(chain(part.ids for part in parts)),
        list(chain(part.values for part in parts)),
        np.concatenate([part.rows for part in parts]),
    )


@dataclass
class _Outcome:
    batch: Batch
    loaded: int = 0
    unchanged: int = 0
    refused: list[tuple[int, TimeTierError]] = field(default_factory=list)


def _write_all(table: LoadTable, pieces: Iterator[Batch], look: _Look, rejects: Rejects, report: LoadReport) -> None:
    """Write all batches, `WRITERS` at a time."""
    stop = threading.Event()
    running: set[Future[_Outcome]] = set()

    def collect(all_of_them: bool) -> None:
        nonlocal running
        finished, running = wait(running, return_when="ALL_COMPLETED" if all_of_them else FIRST_COMPLETED)
        for outcome in [future.result() for future in finished]:
            report.loaded += outcome.loaded
            report.unchanged += outcome.unchanged
            for at, error in outcome.refused:
                record = {**_named(outcome.batch, at), "value": outcome.batch.values[at].decode()}
                rejects.add(record.pop("row"), f"refused by the store ({type(error).__name__})", record, str(error))
        look.progress(report.rows - look.keys + report.loaded + report.unchanged, report.rows)

    with ThreadPoolExecutor(WRITERS, thread_name_prefix="timetier-load") as pool:
        try:
            for piece in pieces:
                if len(running) >= WRITERS:
                    collect(all_of_them=False)
                running.add(pool.submit(_write, table, piece, stop))
            collect(all_of_them=True)
        except (Unavailable, OutcomeUnknown) as error:
            raise type(error)(
                f"the store stopped answering when {report.loaded} of {look.keys} items or more were loaded: {error}. "
                "Load the file again when it answers: what is there will be skipped"
            ) from error
        finally:
            stop.set()


def _write(table: LoadTable, batch: Batch, stop: threading.Event) -> _Outcome:
    """Write what the table does not have yet. Raises Unavailable or OutcomeUnknown after `RETRY_S` without success."""
    outcome = _Outcome(batch)
    pending: list[int] | None = None
    attempt, last_success = 0, time.monotonic()
    while pending is None or pending:
        problem: TimeTierError
        try:
            if pending is None:
                pending = _missing(table, batch)
                outcome.unchanged = len(batch) - len(pending)
            if pending:
                table.put_many(
                    [Put(batch.owners[at], batch.timestamps[at], batch.values[at], batch.ids[at]) for at in pending]
                )
                outcome.loaded += len(pending)
            return outcome
        except WriteManyError as error:
            results = list(zip(pending or [], error.results, strict=True))
            failed = [(at, result) for at, result in results if isinstance(result, TimeTierError)]
            outcome.loaded += len(results) - len(failed)
            outcome.refused += [(at, reason) for at, reason in failed if isinstance(reason, Rejected)]
            if len(failed) < len(results):
                attempt, last_success = 0, time.monotonic()
            # Putting the same value once more is harmless, so unknown outcomes are repeated like the others.
            retried = [(at, reason) for at, reason in failed if not isinstance(reason, Rejected)]
            pending = [at for at, _ in retried]
            if not retried:
                return outcome
            problem = retried[0][1]
        except (Unavailable, OutcomeUnknown) as error:
            problem = error
        hint = getattr(problem, "retry_after_s", None) or 0.0
        pause = min(MAX_PAUSE_S, max(hint, 0.05 * 2 ** min(attempt, 10)))
        attempt += 1
        if time.monotonic() + pause > last_success + RETRY_S or stop.wait(pause):
            raise problem
    return outcome


def _missing(table: LoadTable, batch: Batch) -> list[int]:
    """Places of the items that the table does not have with this very value."""
    present = table.get_many(list(zip(batch.owners, batch.timestamps, batch.ids, strict=True)))
    return [
        at
        for at, (item, value) in enumerate(zip(present, batch.values, strict=True))
        if item is None or item.value != value
    ]
