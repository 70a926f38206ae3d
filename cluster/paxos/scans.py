"""What a replica answers to the sink: rows that may sink, bucket by bucket."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..cold.link import encode_link
from ..keys import bucket_prefix, system_timeline, timestamp_floor
from ..messages import AskTables, Scan, Scanned, Tables, pack_i64, pack_u32
from .core import Core, Timeline
from .links import LinkIndex, TableLinks
from .rows import VERSION_BYTES, decode_row, prefix_end, rows_prefix, version_of

BUCKETS_PER_ANSWER = 64
ROWS_PER_ANSWER = 50_000  # rows looked at, so that one question never holds the replica for long
MAX_ANSWER_BYTES = 16 << 20  # whatever is asked for; a timeline is never split


class _Answer:
    def __init__(self) -> None:
        self.timelines: list[bytes] = []
        self.timeline_versions: list[int] = []
        self.wiped: list[int] = []
        self.counts: list[int] = []
        self.kinds = bytearray()
        self.keys: list[bytes] = []
        self.values: list[bytes] = []
        self.versions: list[int] = []
        self.written: list[int] = []
        self.size = 0
        self.seen = 0

    def message(self, bucket: int, system: Timeline, links: TableLinks, following: tuple[int, bytes]) -> Scanned:
        return Scanned(
            bucket,
            self.timelines,
            pack_i64(self.timeline_versions),
            pack_i64(self.wiped),
            pack_u32(self.counts),
            bytes(self.kinds),
            self.keys,
            self.values,
            pack_i64(self.versions),
            pack_i64(self.written),
            [encode_link(link) for link in links.links],
            system.chosen,
            links.horizon,
            following[0],
            following[1],
        )


class Scans:
    """Answers of one replica to the sink."""

    def __init__(self, core: Core, links: LinkIndex) -> None:
        self.core = core
        self.links = links

    def scan(self, message: Scan, owned: Sequence[int]) -> tuple[Scanned, int]:
        """Eligible rows of the next bucket that has any, and the engine batch that must be durable first."""
        answer = _Answer()
        buckets = [bucket for bucket in owned if bucket >= message.bucket][: BUCKETS_PER_ANSWER + 1]
        if not buckets:
            buckets, last = [message.bucket], message.bucket
        for position, bucket in enumerate(buckets):
            last = bucket
            following = buckets[position + 1] if position + 1 < len(buckets) else -1
            if position == BUCKETS_PER_ANSWER or answer.seen >= ROWS_PER_ANSWER:
                return self._done(answer, bucket, message, (bucket, b""))
            cursor = message.cursor if bucket == message.bucket else b""
            rest = self._scan_bucket(answer, bucket, message, cursor)
            if rest:
                return self._done(answer, bucket, message, (bucket, rest))
            if answer.timelines or self._has_links(bucket, message.table):
                return self._done(answer, bucket, message, (following, b""))
        return self._done(answer, last, message, (-1, b""))

    def tables(self, message: AskTables, owned: Sequence[int]) -> Tables:
        """Names of the tables that have rows or links in the next buckets; one seek for each table of a bucket."""
        names: set[bytes] = set()
        for seeks, bucket in enumerate(bucket for bucket in owned if bucket >= message.bucket):
            if seeks >= BUCKETS_PER_ANSWER * 16:
                return Tables(sorted(names), bucket)
            names.update(self.links.of_bucket(bucket).tables)
            prefix = b"R" + bucket_prefix(bucket)
            at = prefix + b"\x01"  # behind the system timeline, whose table has no name
            while (row := next(iter(self.core.engine.scan(at, prefix_end(prefix))), None)) is not None:
                name_end = len(prefix) + 1 + row[0][len(prefix)]
                names.add(row[0][len(prefix) + 1 : name_end])
                at = prefix_end(row[0][:name_end])
        return Tables(sorted(names), -1)

    def _has_links(self, bucket: int, table: bytes) -> bool:
        """Whether the sink has to see this bucket for its links alone (expired windows, references to files)."""
        return bool(self.links.of_table(bucket, table).links)

    def _done(self, answer: _Answer, bucket: int, message: Scan, following: tuple[int, bytes]) -> tuple[Scanned, int]:
        system = self.core.timeline(system_timeline(bucket))
        links = self.links.of_table(bucket, message.table)
        after = max([system.dirty, *(self.core.timeline(key).dirty for key in answer.timelines)])
        return answer.message(bucket, system, links, following), after

    def _scan_bucket(self, answer: _Answer, bucket: int, message: Scan, cursor: bytes) -> bytes:
        """Add the bucket's eligible timelines from `cursor` on. Returns where to go on, b"" when it is done."""
        prefix = b"R" + bucket_prefix(bucket) + bytes((len(message.table),)) + message.table
        at = max(b"R" + cursor, prefix)
        limit_bytes = min(message.limit_bytes, MAX_ANSWER_BYTES)
        end = prefix_end(prefix)
        while True:
            row = next(iter(self.core.engine.scan(at, end)), None)
            if row is None:
                return b""
            key = row[0][1 : len(prefix) + 1 + row[0][len(prefix)]]
            if answer.timelines and (answer.size >= limit_bytes or answer.seen >= ROWS_PER_ANSWER):
                return key
            self._scan_timeline(answer, self.core.timeline(key), message)
            at = prefix_end(rows_prefix(key))

    def _scan_timeline(self, answer: _Answer, timeline: Timeline, message: Scan) -> None:
        prefix = rows_prefix(timeline.key)
        bound = prefix + timestamp_floor(message.event_before)
        start = len(answer.keys)
        for key, version, (written, kind, value) in self._newest(answer, timeline, prefix, bound):
            if written >= message.written_before:
                continue
            answer.kinds.append(kind)
            answer.keys.append(key)
            answer.values.append(value)
            answer.versions.append(version)
            answer.written.append(written)
            answer.size += len(key) + len(value) + 32
        if len(answer.keys) > start:
            answer.timelines.append(timeline.key)
            answer.timeline_versions.append(timeline.chosen)
            answer.wiped.append(timeline.wiped)
            answer.counts.append(len(answer.keys) - start)

    def _newest(
        self, answer: _Answer, timeline: Timeline, prefix: bytes, bound: bytes
    ) -> Iterator[tuple[bytes, int, tuple[int, int, bytes]]]:
        """Newest chosen row of each item below `bound`, oldest item first."""
        found: tuple[bytes, int, bytes] | None = None
        for name, row in self.core.engine.scan(prefix, bound):
            answer.seen += 1
            version = version_of(name)
            if version > timeline.chosen:
                continue
            key = name[len(prefix) : -VERSION_BYTES]
            if found is not None and found[0] != key:
                yield found[0], found[1], decode_row(found[2])
            found = key, version, row
        if found is not None:
            yield found[0], found[1], decode_row(found[2])
