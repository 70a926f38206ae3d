"""Digests of timelines, by which replicas compare themselves while they work (*pure*).

The digest of a timeline as of version v covers what a reader sees at v in the storage tier (the newest row of each
item, tombstones too) and the request ids of the last W entries. It leaves out what replicas may rightly differ in:
superseded rows, the log, promises, and rows that a cold link allows to be evicted. Which links there are is told by
the version of the bucket's system timeline: digests are comparable at equal (version, system version).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Set

from ..errors import InvalidRequest
from ..keys import bucket_of, bucket_prefix, is_system, split_item_key, split_timeline, timeline_hash
from ..messages import AskDigests, Digests, pack_i64, unpack_i64
from .core import Core, Timeline
from .links import NO_LINKS, LinkIndex
from .rows import VERSION_BYTES, decode_record, decode_row, log_entry, log_key, prefix_end, rows_prefix, version_of

DIGEST_BYTES = 16
TIMELINES_PER_ANSWER = 100  # some 10 ms of work, during which the node does nothing else
BYTES_PER_ANSWER = 1 << 20  # of rows that are read for one answer; one timeline is never split
_NONE = bytes(DIGEST_BYTES)


class DigestIndex:
    """Digests of one replica's timelines."""

    def __init__(self, core: Core, links: LinkIndex) -> None:
        self.core = core
        self.links = links

    def answer(self, message: AskDigests, owned: Set[int]) -> tuple[Digests, int]:
        """Answer, and the engine batch that must be durable before it leaves."""
        answer = Digests([], b"", b"", b"", -1, b"", self.core.life)
        versions: list[int] = []
        systems: list[int] = []
        digests = bytearray()
        size = after = 0
        for key, at in self._asked(message, owned):
            if not message.timelines and (len(versions) >= TIMELINES_PER_ANSWER or size >= BYTES_PER_ANSWER):
                answer.next_bucket, answer.next_cursor = bucket_of(key), key
                break
            timeline = self.core.timeline(key)
            wanted = timeline.chosen if at < 0 else at
            found, read = self.of(timeline, wanted)
            answer.timelines.append(key)
            versions.append(-1 if found is None else wanted)
            systems.append(self.links.of_bucket(bucket_of(key)).version)
            digests += found or _NONE
            size += read
            after = max(after, timeline.dirty)
        answer.versions, answer.systems, answer.digests = pack_i64(versions), pack_i64(systems), bytes(digests)
        self.core.counters.add("digests", len(versions))
        return answer, after

    def _asked(self, message: AskDigests, owned: Set[int]) -> Iterator[tuple[bytes, int]]:
        """Timelines and the version wanted of each, -1 for the present one."""
        if message.timelines:
            at = unpack_i64(message.at)
            if len(at) != len(message.timelines):
                raise InvalidRequest("an AskDigests with another number of versions than timelines")
            yield from zip(message.timelines, at, strict=True)
            return
        self.core.mark_all()
        start = b"M" + (message.cursor or bucket_prefix(max(message.bucket, 0)))
        for name, _ in self.core.engine.scan(start, b"N"):
            if bucket_of(name[1:]) in owned:
                yield name[1:], -1

    def of(self, timeline: Timeline, at: int) -> tuple[bytes | None, int]:
        """Digest as of version `at`, None where this replica can't tell, and the bytes that were read for it."""
        key = timeline.key
        low = max(at - self.core.settings.request_id_entries + 1, 1)
        ids_are_whole = timeline.log_low <= low or at == timeline.chosen
        if not timeline.floor <= at <= timeline.chosen or 0 < at <= timeline.wiped or not ids_are_whole:
            return None, 0
        digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
        read = 0
        for name, row in self._visible(timeline, at):
            digest.update(len(name).to_bytes(4, "big") + name + len(row).to_bytes(4, "big") + row)
            read += len(name) + len(row)
        digest.update(b"ids")
        for name, encoded in self.core.engine.scan(log_key(key, max(low, timeline.log_low)), log_key(key, at + 1)):
            for request_id in decode_record(encoded).request_ids:
                digest.update(log_entry(name).to_bytes(8, "big") + request_id)
        return digest.digest(), read + 64

    def _visible(self, timeline: Timeline, at: int) -> Iterator[tuple[bytes, bytes]]:
        """The newest row of each item as of `at`, by name (item key and version), without those a link stands for."""
        prefix = rows_prefix(timeline.key)
        newest: tuple[bytes, bytes] | None = None
        for name, row in self.core.engine.scan(prefix, prefix_end(prefix)):
            if not timeline.wiped < version_of(name) <= at:
                continue
            short = name[len(prefix) :]
            ended = newest if newest is not None and newest[0][:-VERSION_BYTES] != short[:-VERSION_BYTES] else None
            if ended is not None and not self._is_linked(timeline, *ended):
                yield ended
            newest = (short, row)
        if newest is not None and not self._is_linked(timeline, *newest):
            yield newest

    def _is_linked(self, timeline: Timeline, name: bytes, row: bytes) -> bool:
        """Whether a link allows a row to be evicted, whether or not this replica has come to that."""
        if is_system(timeline.key):
            return False
        bucket, table, owner = split_timeline(timeline.key)
        links = self.links.of_bucket(bucket).tables.get(table, NO_LINKS)
        if not links.links:
            return False
        timestamp = split_item_key(name[:-VERSION_BYTES])[0]
        owner_hash = timeline_hash(table, owner)
        written = decode_row(row)[0]
        return any(
            version_of(name) <= rule.version and timestamp < rule.event_before and written < rule.written_before
            for link in links.overlapping(timestamp, timestamp)
            for rule in link.rules_of(owner_hash)
        )
