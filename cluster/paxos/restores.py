"""A replica's part in a restore: it takes the states of a backup as the first thing that was ever decided (*pure*).

Why that is safe (docs/decisions/027-backup.md has the whole argument): a state is installed at version V only where
nothing was ever promised, accepted or chosen for any entry, and no client is answered, and so nothing is proposed,
until all replicas of the group have the same state durably. From then on they are as replicas that have decided entries
1 to V together and trimmed them all. Nobody is the origin of entry V, so nobody has the right to round 0 of entry V+1:
the first write of a timeline runs Prepare.

Timelines of the store's own tables (`keys.is_internal`) are in no backup, and what a cluster has of them stays: they
tell of this cluster's runs of the sink, not of data.

Whoever holds something else than the backup's state refuses it. So a restore can be repeated at any time: what is there
is compared, what is missing is installed.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence, Set
from itertools import islice

import msgspec

from ..errors import InvalidRequest, Unavailable
from ..keys import bucket_of, bucket_prefix, is_internal, is_system, split_timeline
from ..messages import (
    NO_BALLOT,
    AskRestored,
    Restore,
    RestoredBuckets,
    TimelineState,
    pack_i64,
)
from .catchup import CatchUp
from .core import Core
from .digests import NewestRows
from .rows import RESTORE_KEY, decode_record, log_entry, log_key, prefix_end, rows_prefix
from .slices import Slices
from .timeline import Incoming, Timeline

DIGEST_BYTES = 16
BUCKETS_PER_ANSWER = 1_000
ROWS_PER_ANSWER = 200_000
ROWS_PER_SLICE = 2_000  # nobody else is served meanwhile, but peers must hear from this replica
_HEAD = struct.Struct("<qqI")

Ids = Sequence[tuple[int, list[bytes]]]


class Mark(msgspec.Struct, array_like=True):
    """Which restore a replica takes part in, and the epoch of the topology that told of it: one that is no later may
    not know that the cluster was closed for it."""

    restore: str = ""
    epoch: int = -1


class BucketDigest:
    """What a bucket holds, timeline by timeline in the order of the keys: for a replica, and for who has the backup."""

    def __init__(self) -> None:
        self.timelines = self.rows = 0
        self._digest = hashlib.blake2b(digest_size=DIGEST_BYTES)

    def begin(self, timeline: bytes, version: int, wiped: int, request_ids: Ids) -> None:
        """A timeline begins; its rows follow."""
        self.timelines += 1
        update = self._digest.update
        update(len(timeline).to_bytes(4, "little") + timeline + _HEAD.pack(version, wiped, len(request_ids)))
        for entry, ids in request_ids:
            update(_HEAD.pack(entry, len(ids), 0) + b"".join(ids))

    def add(self, names: Iterable[bytes], rows: Iterable[bytes]) -> None:
        """Rows of the timeline: item key and version, and what the engine holds."""
        update = self._digest.update
        for name, row in zip(names, rows, strict=True):
            update(len(name).to_bytes(4, "little") + name + len(row).to_bytes(4, "little") + row)
            self.rows += 1

    def digest(self) -> bytes:
        return self._digest.digest()


class Restores:
    """A restore as one replica sees it."""

    def __init__(self, core: Core, catch_up: CatchUp) -> None:
        self._core = core
        self._catch_up = catch_up
        self._pieces: dict[bytes, Incoming] = {}  # of timelines that come in pieces
        self._pieces_bytes = 0
        row = core.engine.get(RESTORE_KEY)
        self.mark = _marks.decode(row) if row is not None else Mark()
        self._mark_dirty = 0  # engine batch with the mark

    # ---- beginning

    def is_empty(self) -> bool:
        """Whether there is no trace of any timeline, on disk (each has a mark there) or in memory."""
        on_disk = any(not _is_own(name[1:]) for name, _ in self._core.engine.scan(b"M", b"N"))
        return not on_disk and self._core.is_idle()

    def begin(self, restore: str, epoch: int, *, first: bool) -> int:
        """Mark that this replica takes part. Returns the engine batch that must be durable before it is told.

        `first`: nothing was installed anywhere yet, so every replica must be empty. Later, one without a mark may be
        one that has lost its data since, and has copied from its peers what they had by then; what it holds is compared
        state by state. Raises InvalidRequest for a replica that holds anything else.
        """
        if first or self.mark.restore != restore:
            lost = not first and self._core.life[1] > 1
            if not (lost or self.is_empty()):
                raise InvalidRequest(
                    f"storage replica {self._core.replica} is not empty: a backup is restored to a cluster that has "
                    "never held any data"
                )
            self.mark = Mark(restore, epoch)
            self._core.engine.put(RESTORE_KEY, _encoder.encode(self.mark))
            self._mark_dirty = self._core.engine.sequence
        return self._mark_dirty

    # ---- states

    def take(self, message: Restore) -> int:
        """Install states, or find that they are there. Returns the engine batch that must be durable before the answer.

        Raises InvalidRequest where this replica has something else, Unavailable when pieces are missing.
        """
        if message.restore != self.mark.restore:
            raise Unavailable(f"storage replica {self._core.replica} takes no part in restore {message.restore} yet")
        after = 0
        for state in message.states:
            if bucket_of(state.timeline) not in self._core.owned:
                raise InvalidRequest(f"timeline {state.timeline!r} is of another group")
            whole = self._gathered(state)
            if whole is not None:
                timeline = self._core.timeline(state.timeline)
                self._have(timeline, whole)
                after = max(after, timeline.dirty)
        return after

    def _gathered(self, state: TimelineState) -> Incoming | None:
        """The whole state, when this was its last piece."""
        incoming = self._pieces.pop(state.timeline, None)
        self._pieces_bytes -= incoming.size if incoming is not None else 0
        if not state.before:
            incoming = Incoming(state.version, wiped=state.wiped, request_ids=state.request_ids)
        elif incoming is None or (incoming.version, len(incoming.rows)) != (state.version, state.before):
            raise Unavailable(
                f"storage replica {self._core.replica} has lost the first pieces of a timeline: restore again"
            )
        incoming.rows.extend(zip(state.row_keys, state.rows, strict=True))
        incoming.size += sum(map(len, state.row_keys)) + sum(map(len, state.rows)) + 100 * len(state.rows)
        if not state.more:
            return incoming
        if self._pieces_bytes + incoming.size > self._core.settings.incoming_bytes:
            raise InvalidRequest(
                f"a timeline of more than {self._core.settings.incoming_bytes} bytes in the storage tier does not fit "
                "in the memory for state transfers: raise storage.max_queued_mb"
            )
        self._pieces[state.timeline] = incoming
        self._pieces_bytes += incoming.size
        return None

    def _have(self, timeline: Timeline, whole: Incoming) -> None:
        if timeline.chosen:
            self._compare(timeline, whole)
            return
        if timeline.promised != NO_BALLOT or timeline.accepted != NO_BALLOT or timeline.proposal or timeline.waiting:
            raise InvalidRequest(f"{_name(timeline.key)} is being written: a backup is restored to an empty cluster")
        assert whole.version > 0, "a state has a version"
        self._catch_up.install_first(timeline, whole)

    def _compare(self, timeline: Timeline, whole: Incoming) -> None:
        same = (timeline.chosen, timeline.wiped) == (whole.version, whole.wiped)
        if same:
            held = zip(_newest(self._core, timeline), whole.rows, strict=False)
            same = all(mine == its for mine, its in held) and _count(_newest(self._core, timeline)) == len(whole.rows)
        if not same:
            raise InvalidRequest(
                f"{_name(timeline.key)} is at version {timeline.chosen} on storage replica {self._core.replica}, and "
                f"not what the backup has at version {whole.version}"
            )

    # ---- what is there

    def slices(self, message: AskRestored, owned: Set[int]) -> Slices[tuple[RestoredBuckets, int]]:
        """What this replica's buckets hold, from one on, and the engine batch that must be durable first."""
        core = self._core
        core.mark_all()
        answer = RestoredBuckets([], b"", b"", b"", -1)
        timelines: list[int] = []
        rows: list[int] = []
        seen = after = 0
        at = b"M" + bucket_prefix(max(message.bucket, 0))
        while (found := next(iter(core.engine.scan(at, b"N")), None)) is not None:
            bucket = bucket_of(found[0][1:])
            if len(timelines) >= BUCKETS_PER_ANSWER or seen >= ROWS_PER_ANSWER:
                answer.next_bucket = bucket
                break
            at = b"M" + prefix_end(bucket_prefix(bucket))
            if bucket not in owned:
                continue
            digest = BucketDigest()
            after = max(after, (yield from self._add_bucket(bucket, digest)))
            seen += digest.rows + digest.timelines
            if digest.timelines:
                answer.buckets.append(bucket)
                timelines.append(digest.timelines)
                rows.append(digest.rows)
                answer.digests += digest.digest()
        answer.timelines, answer.rows = pack_i64(timelines), pack_i64(rows)
        return answer, after

    def _add_bucket(self, bucket: int, digest: BucketDigest) -> Slices[int]:
        core = self._core
        after = since = 0
        prefix = b"M" + bucket_prefix(bucket)
        names = [name[1:] for name, _ in core.engine.scan(prefix, prefix_end(prefix))]
        for key in names:
            timeline = core.timeline(key)
            if not timeline.chosen or _is_own(key):
                continue
            after = max(after, timeline.dirty)
            digest.begin(key, timeline.chosen, timeline.wiped, _all_ids(core, timeline))
            rows = iter(_newest(core, timeline))
            while part := list(islice(rows, ROWS_PER_SLICE)):
                digest.add([name for name, _ in part], [row for _, row in part])
                since += len(part)
                if since >= ROWS_PER_SLICE:
                    since = 0
                    yield
        return after


def _newest(core: Core, timeline: Timeline) -> Iterable[tuple[bytes, bytes]]:
    """Item key and version, and row, of each item's newest row."""
    prefix = rows_prefix(timeline.key)
    newest = NewestRows(prefix, timeline.wiped, timeline.chosen)
    for found in core.engine.scan(prefix, prefix_end(prefix)):
        yield from newest.of([found])
    yield from newest.last()


def _is_own(key: bytes) -> bool:
    """Whether a timeline is of the store's own tables."""
    return is_internal(split_timeline(key)[1])


def _count(rows: Iterable[tuple[bytes, bytes]]) -> int:
    return sum(1 for _ in rows)


def _all_ids(core: Core, timeline: Timeline) -> list[tuple[int, list[bytes]]]:
    """Request ids that the log holds, by entry."""
    rows = core.engine.scan(log_key(timeline.key, timeline.log_low), log_key(timeline.key, timeline.chosen + 1))
    return [(log_entry(name), decode_record(row).request_ids) for name, row in rows]


def _name(key: bytes) -> str:
    if is_system(key):
        return f"the links of bucket {bucket_of(key)}"
    _, table, owner = split_timeline(key)
    return f"timeline {owner!r} of table {table.decode()!r}"


_encoder = msgspec.msgpack.Encoder()
_marks = msgspec.msgpack.Decoder(Mark)
