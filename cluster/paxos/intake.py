"""Write requests on their way in: checked, and given to the proposer (*pure*).

Most requests of a large batch are alike: one item, for a timeline that this replica is the origin of and where nothing
is under way. These become entries in one loop (`Intake._take_usual`), by the same rules by which `Proposer` takes any
other request; whatever is not plainly one of them goes there by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from ..errors import InvalidRequest
from ..keys import MAX_ID_BYTES, bucket_of, is_placed_right, is_system
from ..messages import (
    DELETE,
    INVALID,
    MAX_FRAME_BYTES,
    MISPLACED,
    NO_BALLOT,
    PUT,
    WIPE,
    Value,
    Write,
    Written,
    pack_i64,
    unpack_i64,
    unpack_u32,
)
from .acceptances import Acceptances
from .core import Core
from .flights import Leaving
from .links import is_record
from .proposer import Proposer
from .rows import SHORT_ITEM
from .timeline import ACCEPT, Job, Proposal, Waiter

MAX_TIMEOUT_MS = 300_000
MAX_REQUEST_BYTES = MAX_FRAME_BYTES // 2  # an Accept or a Promise with it fits in a frame, also beside a State's piece
MIN_ITEM_KEY_BYTES, MAX_ITEM_KEY_BYTES = 10, 8 + 2 * MAX_ID_BYTES + 2
ITEM_KEY_END = b"\x00\x01"
REQUEST_ID_BYTES = 16
SYSTEM_BYTES = 6  # of a system timeline's key


@dataclass(slots=True)
class _Columns:
    """A `Write` message, unpacked. `lows`: where the items of each request begin in the flat columns."""

    message: Write
    seen: list[int]
    conditions: list[int]
    counts: list[int]
    lows: list[int]
    deadline: float

    def waiter(self, index: int, job: Job) -> Waiter:
        """A request by itself."""
        message, low = self.message, self.lows[index]
        high = low + self.counts[index]
        keys, values = message.keys[low:high], message.values[low:high]
        return Waiter(
            message.request_ids[index],
            self.seen[index],
            self.conditions[index],
            message.kinds[low:high],
            keys,
            values,
            sum(map(len, values)) + sum(map(len, keys)),
            self.deadline,
            [(job, index)],
        )


class Intake:
    """Takes the write requests of one replica."""

    def __init__(self, core: Core, proposer: Proposer) -> None:
        self.core = core
        self.proposer = proposer

    def take(self, now: float, token: int, message: Write) -> None:
        """Take a write batch; its `Written` leaves by `token` when every request has an outcome."""
        core, proposer = self.core, self.proposer
        count = len(message.timelines)
        seen, conditions = unpack_i64(message.seen), unpack_i64(message.if_version)
        counts = unpack_u32(message.counts)
        if not (
            count == len(message.request_ids) == len(seen) == len(conditions) == len(counts)
            and sum(counts) == len(message.kinds) == len(message.keys) == len(message.values)
        ):
            core.reply(token, Written(bytes((INVALID,)) * count, pack_i64([0] * count)))
            return
        core.counters.add("write_batches")
        core.counters.add("write_requests", count)
        core.counters.add("items_written", len(message.keys))
        if not count:
            core.reply(token, Written(b"", b""))
        deadline = now + min(message.timeout_ms, MAX_TIMEOUT_MS) / 1000
        columns = _Columns(message, seen, conditions, counts, list(accumulate(counts, initial=0)), deadline)
        job = Job(token, bytearray(count), [0] * count, count)
        for index in self._take_usual(columns, job, now):
            key, waiter = message.timelines[index], columns.waiter(index, job)
            refusal = self._refusal(key, waiter)
            if refusal:
                proposer.refuse(waiter, refusal)
            else:
                proposer.enqueue(core.timeline(key), waiter, now)

    def _take_usual(self, columns: _Columns, job: Job, now: float) -> Sequence[int]:
        """Make entries of the requests that are as nearly all are; indices of the others.

        A request is one of them if `Proposer` would make an entry of it at once and of it alone: see there for the
        reasons. Nothing is read from the engine between the first and the last.
        """
        core, message = self.core, columns.message
        found = core.find_all(message.timelines)
        size = sum(map(len, message.values)) + sum(map(len, message.keys))
        due = now + core.settings.accept_timeout_s
        if columns.deadline < due or size > MAX_REQUEST_BYTES or not self.proposer.has_room(len(columns.seen), size):
            return range(len(columns.seen))
        life, ballot = core.life, core.first_ballot
        remembered, written = core.settings.request_id_entries, core.wall_us()
        acceptances = Acceptances(core, ballot)
        leaving: list[Leaving] = []
        others: list[int] = []
        size = 0
        kinds, keys, values = message.kinds, message.keys, message.values
        requests = zip(
            found,
            message.request_ids,
            columns.seen,
            columns.conditions,
            columns.counts,
            columns.lows,
            strict=False,  # `lows` has one more, the end
        )
        for index, (timeline, request_id, seen, condition, items, low) in enumerate(requests):
            if (
                timeline is None
                or items != 1
                or timeline.origin != life
                or timeline.promised is not NO_BALLOT
                or timeline.accepted is not NO_BALLOT
                or timeline.is_occupied
                or timeline.ids is None
                or request_id in timeline.ids
                or not timeline.chosen - remembered <= seen <= timeline.chosen
                or (condition != timeline.chosen and condition >= 0)
                or not _is_plain(kinds[low], keys[low], request_id, timeline.key)
            ):
                others.append(index)
                continue
            item, content, mutation = keys[low], values[low], kinds[low : low + 1]
            value = Value(life, written, [request_id], mutation, [item], [content])
            nbytes = len(item) + len(content)
            size += nbytes
            timeline.waiting[request_id] = Waiter(
                request_id,
                seen,
                condition,
                mutation,
                value.keys,
                value.values,
                nbytes,
                columns.deadline,
                [(job, index)],
                True,
            )
            timeline.proposal = proposal = Proposal(timeline.chosen + 1, ballot, ACCEPT, due, value)
            leaving.append((timeline, proposal, timeline.ballot, acceptances.batch))
            acceptances.add(timeline, written, request_id, kinds[low], item, content)
        acceptances.close()
        self.proposer.proposed(leaving, size)
        return others

    def _refusal(self, key: bytes, waiter: Waiter) -> int:
        """Outcome for a request that this replica can't take at all, or 0.

        What passes here goes to disks and peers and must not trouble any of them: an entry that exceeds a frame, or
        a link that can't be read, would stop its timeline for good.
        """
        if not self.core.holds(key):  # else it was judged when it came into memory
            try:
                if not is_placed_right(key, self.core.buckets):
                    return INVALID
            except InvalidRequest:
                return INVALID
            if int.from_bytes(key[:4], "big") not in self.core.owned:
                return MISPLACED
        system = is_system(key)
        for kind, item, value in zip(waiter.kinds, waiter.keys, waiter.values, strict=True):
            if kind == WIPE:
                if item or value or system:
                    return INVALID
                continue
            if kind not in (PUT, DELETE) or not is_item_key(item):
                return INVALID
            if system and kind == PUT and not is_record(bucket_of(key), item, value):
                return INVALID
        if len(waiter.keys) > self.core.settings.entry_items or waiter.size > MAX_REQUEST_BYTES:
            return INVALID
        return 0 if waiter.keys and len(waiter.request_id) == REQUEST_ID_BYTES else INVALID


def is_item_key(key: bytes) -> bool:
    """Whether bytes can be an item key: long enough for a timestamp, with an end, and not too long."""
    return MIN_ITEM_KEY_BYTES <= len(key) <= MAX_ITEM_KEY_BYTES and key[-2:] == ITEM_KEY_END


def _is_plain(kind: int, item: bytes, request_id: bytes, timeline: bytes) -> bool:
    """Whether a mutation of one item of a timeline is as nearly all are."""
    return (
        kind <= DELETE
        and MIN_ITEM_KEY_BYTES <= len(item) <= SHORT_ITEM
        and item[-2:] == ITEM_KEY_END
        and len(request_id) == REQUEST_ID_BYTES
        and len(timeline) != SYSTEM_BYTES
    )
