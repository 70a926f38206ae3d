"""Cold links: the records in a bucket's system timeline that make sunk items findable.

A link covers one window of one table in one bucket. It is an item of the bucket's system timeline with key
(window start, table name); a later generation replaces it by having the same key. The storage tier needs no more
than the link to know which rows may be evicted, and a reader no more than it to read the block.

Two more items of a system timeline lie at `RECORDS_AT`, before all windows: `horizon/TABLE` (int64, items with an
older timestamp have expired) and `fence` (written to make pending conditional writes of a stale run fail).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from ..errors import ProtocolError
from ..keys import MIN_TIMESTAMP, item_key, priority, timeline_hash

FORMAT = 1
RECORDS_AT = MIN_TIMESTAMP
FENCE_KEY = item_key(RECORDS_AT, b"fence")
HORIZON_PREFIX = b"horizon/"


class Block(msgspec.Struct, array_like=True, frozen=True):
    """One Arrow record batch in a cold file: rows sorted by (owner, timestamp, id).

    `offset`, `length`: the encapsulated IPC message (metadata and body) in the file; `crc`: its CRC32C.
    `low`, `high`: every row has low <= item key < high. `first_owner`, `last_owner`: inclusive range of owners.
    """

    file: str
    offset: int
    length: int
    crc: int
    rows: int
    low: bytes
    high: bytes
    first_owner: bytes
    last_owner: bytes


class Carried(msgspec.Struct, array_like=True, frozen=True):
    """Owners whose rows came with an earlier generation, with the cut-offs and versions of the run that read them.

    Columns as in `Link`. An owner may be in several of them, and beside that in the link itself: each one is a
    reason of its own to evict.
    """

    event_before: int
    written_before: int
    owners: bytes
    versions: bytes


class Rule(NamedTuple):
    """One reason to evict rows of one owner within the link's window (see `evict_up_to`)."""

    version: int
    event_before: int
    written_before: int


class Link(msgspec.Struct, array_like=True, frozen=True):
    """All blocks of one (bucket, table, window), and exactly which rows they stand for.

    The blocks hold, for the owner with `owners[i]`, the newest version (not above `versions[i]`) of each item in
    [window_start, window_end) whose timestamp is < `event_before` and that was written < `written_before`, and
    whatever the generation before held and nobody has replaced since. Those rows, and the versions that they
    supersede, may be evicted once this link is chosen: `rules_of` and `evict_up_to` say which. A replica does so for
    an owner only when it has itself applied that timeline up to the rule's version; before that it may not know
    which version of an item is the newest.

    `owners`: sorted uint64 hashes (`keys.timeline_hash`) of all owners that the blocks hold. `versions`: int64,
    parallel: the chosen version of that timeline at which this run read it, 0 when it did not (then the owner is
    in `carried`). `written_before`: microseconds since 1970.
    """

    format: int
    bucket: int
    table: bytes
    window_start: int
    window_end: int
    generation: int
    event_before: int
    written_before: int
    owners: bytes
    versions: bytes
    rows: int
    raw_bytes: int  # keys, ids and values before encoding
    run: str
    blocks: list[Block]
    carried: list[Carried] = []

    @property
    def key(self) -> bytes:
        """Item key of this link in the system timeline."""
        return item_key(self.window_start, self.table)

    def owner_hashes(self) -> npt.NDArray[np.uint64]:
        """Sorted hashes of the owners that the blocks hold: uint64[n]."""
        return np.frombuffer(self.owners, dtype="<u8")

    def version_of(self, owner_hash: int) -> int:
        """Version at which this run read the owner with this hash.

        0 if it only carried its rows over, -1 if the blocks hold nothing of it.
        """
        return _version_of(self.owners, self.versions, owner_hash)

    def rules_of(self, owner_hash: int) -> list[Rule]:
        """The rules by which rows of this owner may be evicted; empty if none may."""
        own = Carried(self.event_before, self.written_before, self.owners, self.versions)
        rules = []
        for part in (own, *self.carried):
            version = _version_of(part.owners, part.versions, owner_hash)
            if version > 0:
                rules.append(Rule(version, part.event_before, part.written_before))
        return rules

    def holds_wiped(self, owner_hash: int, wiped: int) -> bool:
        """Whether the blocks may hold rows of an owner whose timeline was wiped up to the version `wiped`.

        They do not when the owner was read at a later version, by this run or by the one whose rows were carried over:
        merging leaves out what was wiped by then.
        """
        if self.version_of(owner_hash) < 0:
            return False
        return max([rule.version for rule in self.rules_of(owner_hash)], default=0) <= wiped

    def blocks_of(self, owner: bytes) -> list[Block]:
        """Blocks that may hold items of `owner`."""
        if self.version_of(timeline_hash(self.table, owner)) < 0:
            return []
        return [block for block in self.blocks if block.first_owner <= owner <= block.last_owner]


def _version_of(owners: bytes, versions: bytes, owner_hash: int) -> int:
    hashes = np.frombuffer(owners, dtype="<u8")
    at = int(np.searchsorted(hashes, np.uint64(owner_hash)))
    if at == len(hashes) or int(hashes[at]) != owner_hash:
        return -1
    return int(np.frombuffer(versions, dtype="<i8")[at])


def evict_up_to(rules: Sequence[Rule], timestamp: int, rows: Sequence[tuple[int, int]]) -> int:
    """Greatest version up to which the rows of one item may be evicted, 0 for none.

    `rules`: of the item's owner, from a link whose window has `timestamp` in it. `rows`: (version, written) of the
    item's rows, tombstones included, newest first. The rows that go must go together, in one write: an older row
    that outlives a tombstone would come back to life.
    """
    found = 0
    for version, event_before, written_before in rules:
        newest = next((row for row in rows if row[0] <= version), None)
        if newest is not None and timestamp < event_before and newest[1] < written_before:
            found = max(found, newest[0])
    return found


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Link)


def encode_link(link: Link) -> bytes:
    """Value of the link's item."""
    return _encoder.encode(link)


def decode_link(value: bytes) -> Link:
    """Link of an item's value. Raises ProtocolError if it is none or of a later format."""
    try:
        link = _decoder.decode(value)
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"malformed cold link: {error}") from None
    if link.format > FORMAT:
        raise ProtocolError(f"a cold link of format {link.format}; this version reads up to {FORMAT}")
    return link


def cold_order(bucket: int, window_start: int, replicas: int) -> tuple[int, ...]:
    """Cold replicas in the order in which a block of this bucket and window is to be asked for."""

    return priority(bucket.to_bytes(4, "big") + window_start.to_bytes(8, "big", signed=True), replicas)
