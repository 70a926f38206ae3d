"""Digests of timelines, by which replicas compare themselves while they work (*pure*).

The digest of a timeline as of version v covers what a reader sees at v in the storage tier (the newest row of each
item, tombstones too) and the request ids of the last W entries. It leaves out what replicas may rightly differ in:
superseded rows, the log, promises, rows that a cold link allows to be evicted, and rows that have expired. Which links
and horizons there are is told by the version of the bucket's system timeline: digests are comparable at equal (version,
system version).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Set
from itertools import islice
from typing import NamedTuple

from ..errors import InvalidRequest
from ..keys import (
    MIN_TIMESTAMP,
    bucket_of,
    bucket_prefix,
    is_system,
    split_item_key,
    split_timeline,
    system_timeline,
    timeline_hash,
)
from ..messages import AskDigests, Digests, pack_i64, unpack_i64
from .core import Core
from .links import NO_LINKS, LinkIndex
from .rows import VERSION_BYTES, decode_record, decode_row, log_entry, log_key, prefix_end, rows_prefix, version_of
from .slices import Pinned, Slices, in_one_slice, until_it_holds
from .timeline import Timeline

DIGEST_BYTES = 16
TIMELINES_PER_ANSWER = 100  # some 10 ms of work
TIMELINES_PER_SLICE = 10
BYTES_PER_ANSWER = 1 << 20  # of rows that are read for one answer; one timeline is never split
_NONE = bytes(DIGEST_BYTES)


class DigestIndex:
    """Digests of one replica's timelines."""

    def __init__(self, core: Core, links: LinkIndex) -> None:
        self.core = core
        self.links = links

    def answer(self, message: AskDigests, owned: Set[int]) -> tuple[Digests, int]:
        """Result of `slices`, without a break."""
        return in_one_slice(self.slices(message, owned))

    def slices(self, message: AskDigests, owned: Set[int]) -> Slices[tuple[Digests, int]]:
        """Answer, and the engine batch that must be durable before it leaves. Made in slices, as rows are many."""
        answer = Digests([], b"", b"", b"", -1, b"", self.core.life)
        versions: list[int] = []
        systems: list[int] = []
        digests = bytearray()
        size = after = 0
        for key, at in self._asked(message, owned):
            if not message.timelines and (len(versions) >= TIMELINES_PER_ANSWER or size >= BYTES_PER_ANSWER):
                answer.next_bucket, answer.next_cursor = bucket_of(key), key
                break
            found = yield from until_it_holds(_Digest(self, key, at).read)
            answer.timelines.append(key)
            versions.append(-1 if found.digest is None else found.version)
            systems.append(found.system_version)
            digests += found.digest or _NONE
            size += found.nbytes
            after = max(after, found.dirty)
            if len(versions) % TIMELINES_PER_SLICE == 0:
                yield
        answer.versions, answer.systems, answer.digests = pack_i64(versions), pack_i64(systems), bytes(digests)
        self.core.counters.add("digests", len(versions))
        return answer, after

    def _asked(self, message: AskDigests, owned: Set[int]) -> list[tuple[bytes, int]]:
        """Timelines and the version wanted of each, -1 for the present one; one more than an answer takes."""
        if message.timelines:
            at = unpack_i64(message.at)
            if len(at) != len(message.timelines):
                raise InvalidRequest("an AskDigests with another number of versions than timelines")
            return list(zip(message.timelines, at, strict=True))
        self.core.mark_all()
        start = b"M" + (message.cursor or bucket_prefix(max(message.bucket, 0)))
        names = (name[1:] for name, _ in self.core.engine.scan(start, b"N"))
        return [(key, -1) for key in islice((n for n in names if bucket_of(n) in owned), TIMELINES_PER_ANSWER + 1)]

    def of(self, timeline: Timeline, at: int) -> tuple[bytes | None, int]:
        """Digest as of version `at`, None where this replica can't tell, and the bytes that were read for it."""
        found = in_one_slice(_Digest(self, timeline.key, at).read(True))
        assert found is not None, "nothing happens within one slice"
        return found.digest, found.nbytes


class _Found(NamedTuple):
    """Digest of a timeline as of `version` and of `system_version` of its bucket's links; None: it can't be told.

    `dirty`: engine batch that must be durable first; `nbytes`: of the rows that were read.
    """

    version: int
    system_version: int
    digest: bytes | None
    dirty: int
    nbytes: int


class _Digest:
    """The digest of one timeline as of a version, -1 for the present one."""

    def __init__(self, index: DigestIndex, key: bytes, at: int) -> None:
        self._core = index.core
        self._links = index.links
        self._key = key
        self._at = at

    def read(self, whole: bool) -> Slices[_Found | None]:
        """The digest; None if rows of the version may have gone meanwhile."""
        timeline = self._core.timeline(self._key)
        at = timeline.chosen if self._at < 0 else self._at
        system = self._core.timeline(system_timeline(bucket_of(self._key)))
        pinned = Pinned(self._core, timeline, system, at)
        low = max(at - self._core.settings.request_id_entries + 1, 1)
        ids_are_whole = timeline.log_low <= low or at == timeline.chosen
        if not timeline.floor <= at <= timeline.chosen or 0 < at <= timeline.wiped or not ids_are_whole:
            return _Found(at, pinned.system_version, None, pinned.dirty, 0)
        ids = self._request_ids(max(low, timeline.log_low), at)
        is_linked = self._rule_of_links()
        digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
        nbytes = 64
        newest = NewestRows(rows_prefix(self._key), pinned.wiped, at)
        prefix = rows_prefix(self._key)
        for part in pinned.rows(prefix, prefix_end(prefix), whole=whole):
            if part is None:
                return None
            for name, row in newest.of(part):
                if not is_linked(name, row):
                    digest.update(len(name).to_bytes(4, "big") + name + len(row).to_bytes(4, "big") + row)
                    nbytes += len(name) + len(row)
            if len(part) == self._core.settings.chore_rows and not whole:
                yield
        for name, row in newest.last():
            if not is_linked(name, row):
                digest.update(len(name).to_bytes(4, "big") + name + len(row).to_bytes(4, "big") + row)
                nbytes += len(name) + len(row)
        digest.update(b"ids" + ids)
        return _Found(at, pinned.system_version, digest.digest(), pinned.dirty, nbytes)

    def _request_ids(self, low: int, at: int) -> bytes:
        ids = bytearray()
        for name, encoded in self._core.engine.scan(log_key(self._key, low), log_key(self._key, at + 1)):
            for request_id in decode_record(encoded).request_ids:
                ids += log_entry(name).to_bytes(8, "big") + request_id
        return bytes(ids)

    def _rule_of_links(self) -> Callable[[bytes, bytes], bool]:
        """Whether a link allows a row to be evicted, or a horizon hides it, whether or not this replica has come to
        that."""
        if is_system(self._key):
            return lambda name, row: False
        bucket, table, owner = split_timeline(self._key)
        links = self._links.of_bucket(bucket).tables.get(table, NO_LINKS)
        owner_hash = timeline_hash(table, owner)

        def is_linked(name: bytes, row: bytes) -> bool:
            timestamp = split_item_key(name[:-VERSION_BYTES])[0]
            written = decode_row(row)[0]
            return timestamp < links.horizon or any(
                version_of(name) <= rule.version and timestamp < rule.event_before and written < rule.written_before
                for link in links.overlapping(timestamp, timestamp)
                for rule in link.rules_of(owner_hash)
            )

        return is_linked if links.links or links.horizon != MIN_TIMESTAMP else lambda name, row: False


class NewestRows:
    """The newest row of each item as of a version, by name (item key and version), from rows in their order."""

    def __init__(self, prefix: bytes, wiped: int, version: int) -> None:
        self._start = len(prefix)
        self._wiped = wiped
        self._version = version
        self._known: tuple[bytes, bytes] | None = None

    def of(self, rows: list[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, bytes]]:
        for name, row in rows:
            if not self._wiped < version_of(name) <= self._version:
                continue
            short = name[self._start :]
            if self._known is not None and self._known[0][:-VERSION_BYTES] != short[:-VERSION_BYTES]:
                yield self._known
            self._known = short, row

    def last(self) -> Iterator[tuple[bytes, bytes]]:
        if self._known is not None:
            yield self._known
            self._known = None
