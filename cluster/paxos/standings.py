"""What the system timelines of all buckets come to, in a few numbers each, in memory (*pure*).

The links of a bucket are many, and parsing them costs; most questions need less: the retention horizon of a table, and
where its oldest window begins. So each replica keeps these for each table of each bucket, one engine row a bucket:

| key | value | meaning |
|---|---|---|
| `B bucket` | tables with their `Standing` | as of what the replica has applied of the bucket's system timeline |

**Why a row can be trusted after a crash.** An entry of a system timeline is accepted in one write with the row of its
chore (`C`), and that goes only after the chore has written the bucket's standing as of that entry. So a bucket without
a chore has a true row. One with a chore is *stirred*: its links are read when somebody asks for it.

**Doubt.** A replica that has accepted a horizon, and does not know whether it was chosen, can't tell what has expired.
Then it says so, because another replica may know, and have told readers (`guarantees.md`, "Expired").
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import msgspec

from ..cold.link import HORIZON_PREFIX, RECORDS_AT
from ..keys import MAX_TIMESTAMP, MIN_TIMESTAMP, bucket_of, bucket_prefix, is_system, split_item_key, system_timeline
from ..messages import NO_BALLOT
from .quiet import place_in
from .rows import chore_key, meta_key

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .core import Core

_PREFIX = b"B"
_FORMAT_KEY = b"Nstandings"
SETTLE_AFTER_S = 0.05  # so long a horizon may stay in doubt while readers ask, before this replica settles it


class Standing(NamedTuple):
    """Of one table in one bucket. `horizon`: items with an older timestamp have expired. `first`: where the oldest
    window of its links begins, MAX_TIMESTAMP without any."""

    horizon: int
    first: int


NO_STANDING = Standing(MIN_TIMESTAMP, MAX_TIMESTAMP)

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[tuple[bytes, int, int]])


class Standings:
    """Standings of one replica, by bucket and table (`quiet.place_of`). `links.LinkIndex` keeps them true.

    `stirred`: buckets whose standing may lag -> version of the system timeline as of which it is right, -1 for none.
    """

    def __init__(self, core: Core) -> None:
        self._core = core
        self.known: dict[bytes, Standing] = {}
        self.stirred: dict[int, int] = {}
        self._tables: dict[int, list[bytes]] = {}  # tables of a bucket that are in `known`
        self._doubted: dict[int, float] = {}  # bucket -> since when readers asked in vain
        for name, row in core.engine.scan(_PREFIX, b"C"):
            tables = _decoder.decode(row)
            self._keep(bucket_of(name[1:]), tables)
            for table, horizon, _ in tables:
                core.expiry.load(place_in(name[1:], table), horizon)
        for name, _ in core.engine.scan(b"C", b"D"):
            if is_system(name[1:-8]):
                self.stirred[bucket_of(name[1:])] = -1

    def begin(self, owned: Sequence[int]) -> None:
        """After a start: where rows are of a format without standings, have a chore work them out for each bucket."""
        engine = self._core.engine
        if engine.get(_FORMAT_KEY) is not None:
            return
        if next(iter(engine.scan(b"M", b"N")), None) is not None:
            for bucket in owned:
                system = system_timeline(bucket)
                if engine.get(meta_key(system)) is not None:
                    engine.put(chore_key(system, 0), b"")
                    self.stirred[bucket] = -1
        engine.put(_FORMAT_KEY, b"")

    def stir(self, bucket: int) -> None:
        """The pending engine batch changes the bucket's system timeline, and has a chore for it."""
        self.stirred[bucket] = -1

    def settled(self, bucket: int) -> None:
        """A chore of the bucket is done, and its standing is as of all that is applied."""
        if self._core.timeline(system_timeline(bucket)).accepted == NO_BALLOT:
            self.stirred.pop(bucket, None)
            self._doubted.pop(bucket, None)

    def put(self, bucket: int, version: int, tables: list[tuple[bytes, int, int]]) -> None:
        """The bucket's tables with horizon and first window, as of a version of its system timeline."""
        if bucket in self.stirred:
            self.stirred[bucket] = version
        before = [
            (table, *self.known[place_in(bucket_prefix(bucket), table)]) for table in self._tables.get(bucket, [])
        ]
        if tables != before:
            self._core.engine.put(_PREFIX + bucket_prefix(bucket), _encoder.encode(tables))
            self._keep(bucket, tables)
            for table, horizon, _ in tables:
                self._core.expiry.moved(place_in(bucket_prefix(bucket), table), horizon)

    def _keep(self, bucket: int, tables: list[tuple[bytes, int, int]]) -> None:
        prefix = bucket_prefix(bucket)
        for table in self._tables.pop(bucket, []):
            del self.known[place_in(prefix, table)]
        if tables:
            self._tables[bucket] = [table for table, _, _ in tables]
        for table, horizon, first in tables:
            self.known[place_in(prefix, table)] = Standing(horizon, first)

    def tables_of(self, bucket: int) -> list[bytes]:
        """Tables that have links or a horizon in a bucket that is not stirred."""
        return self._tables.get(bucket, [])

    # ---- doubt

    def in_doubt(self, bucket: int, table: bytes) -> bool:
        """Whether a horizon of the table has been accepted here of which it is not known whether it was chosen."""
        if bucket not in self.stirred:
            return False
        record = self._core.timeline(system_timeline(bucket)).record
        return record is not None and table in horizons_in(record.keys)

    def doubted(self, bucket: int, now: float) -> bool:
        """A reader was told so. Whether it has been like that for so long that this replica should settle it."""
        return now - self._doubted.setdefault(bucket, now) >= SETTLE_AFTER_S


def horizons_in(keys: Iterable[bytes]) -> list[bytes]:
    """Tables whose retention horizons are among these items of a system timeline."""
    tables = []
    for key in keys:
        if key:
            timestamp, name = split_item_key(key)
            if timestamp == RECORDS_AT and name.startswith(HORIZON_PREFIX):
                tables.append(name[len(HORIZON_PREFIX) :])
    return tables
