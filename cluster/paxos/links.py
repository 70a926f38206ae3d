"""The cold links of a bucket, as one replica has applied them: parsed once per version of the system timeline."""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from dataclasses import dataclass, field

from ..cold.link import HORIZON_PREFIX, RECORDS_AT, Link, decode_link
from ..errors import ProtocolError
from ..keys import MAX_TIMESTAMP, MIN_TIMESTAMP, bucket_prefix, split_item_key, system_timeline
from ..messages import DELETE
from .core import Core
from .quiet import place_in
from .rows import VERSION_BYTES, decode_row, prefix_end, rows_prefix, version_of
from .standings import NO_STANDING, Standing
from .timeline import Timeline

BUCKETS_IN_MEMORY = 4096
HORIZON_BYTES = 8


def is_record(bucket: int, key: bytes, value: bytes) -> bool:
    """Whether an item may be written to a bucket's system timeline: what can't be read there stops the bucket."""
    timestamp, name = split_item_key(key)
    if timestamp == RECORDS_AT:
        return not name.startswith(HORIZON_PREFIX) or len(value) == HORIZON_BYTES
    try:
        link = decode_link(value)
    except ProtocolError:
        return False
    return link.bucket == bucket and link.key == key and link.window_start < link.window_end


@dataclass(slots=True)
class TableLinks:
    """Links of one table in one bucket, oldest window first, with the entry that wrote each."""

    starts: list[int] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    entries: list[int] = field(default_factory=list)
    horizon: int = MIN_TIMESTAMP

    def overlapping(self, low_timestamp: int, high_timestamp: int) -> list[Link]:
        """Links with a part of their window in [low, high], newest window first."""
        end = bisect_left(self.starts, high_timestamp + 1)
        found = []
        for link in reversed(self.links[:end]):
            if link.window_end <= low_timestamp:
                break
            found.append(link)
        return found


@dataclass(slots=True)
class BucketLinks:
    version: int
    tables: dict[bytes, TableLinks] = field(default_factory=dict)


NO_LINKS = TableLinks()


class LinkIndex:
    """Parsed links by bucket, bounded; rebuilt when the bucket's system timeline has moved on."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self._buckets: OrderedDict[int, BucketLinks] = OrderedDict()

    def of_bucket(self, bucket: int) -> BucketLinks:
        """All links of a bucket, as of what this replica has applied."""
        system = self.core.timeline(system_timeline(bucket))
        known = self._buckets.get(bucket)
        if known is None or known.version != system.chosen:
            known = self._buckets[bucket] = self._read(system)
            if len(self._buckets) > BUCKETS_IN_MEMORY:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(bucket)
        return known

    def of_table(self, bucket: int, table: bytes) -> TableLinks:
        """Links of one table in a bucket."""
        return self.of_bucket(bucket).tables.get(table, NO_LINKS)

    def standing(self, bucket: int, table: bytes) -> Standing:
        """Horizon and oldest window of one table in a bucket; its links are read only if they may have changed."""
        if bucket in self.core.standings.stirred:
            self.refresh(bucket)
        return self.core.standings.known.get(place_in(bucket_prefix(bucket), table), NO_STANDING)

    def refresh(self, bucket: int) -> None:
        """Have the bucket's standing as of what this replica has applied."""
        version = self.core.timeline(system_timeline(bucket)).chosen
        if self.core.standings.stirred.get(bucket, -1) != version:
            found = self.of_bucket(bucket).tables
            tables = [(name, table.horizon, min(table.starts, default=MAX_TIMESTAMP)) for name, table in found.items()]
            self.core.standings.put(bucket, version, sorted(tables))

    def _read(self, system: Timeline) -> BucketLinks:
        found = BucketLinks(system.chosen)
        if not system.chosen:
            return found
        newest: dict[bytes, tuple[int, bytes]] = {}
        prefix = rows_prefix(system.key)
        for name, row in self.core.engine.scan(prefix, prefix_end(prefix)):
            entry = version_of(name)
            if entry <= system.chosen:  # rows come oldest version first, so the newest stays
                newest[name[len(prefix) : -VERSION_BYTES]] = (entry, row)
        for key, (entry, row) in newest.items():
            _, kind, value = decode_row(row)
            if kind == DELETE:
                continue
            timestamp, name = split_item_key(key)
            if timestamp != RECORDS_AT:
                link = decode_link(value)
                table = found.tables.setdefault(link.table, TableLinks())
                table.starts.append(link.window_start)
                table.links.append(link)
                table.entries.append(entry)
            elif name.startswith(HORIZON_PREFIX):
                table = found.tables.setdefault(name[len(HORIZON_PREFIX) :], TableLinks())
                table.horizon = int.from_bytes(value, "little", signed=True)
        return found
