"""What the parts of a replica share: its identity, its engine, its outbox, and the timelines in memory.

Nothing here touches a clock, a socket or a disk directly. Time comes in as an argument (`now`, monotonic seconds),
the wall clock and randomness as injected callables, the disk as an `Engine`. What leaves is put in the outbox
together with the number of the engine batch that must be durable first (0: at once): an answer never overtakes the
fsync that it depends on.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass

from ..counters import Counters
from ..errors import InvalidRequest
from ..keys import is_placed_right
from ..messages import NO_BALLOT, WIPE, Accept, Ballot, Life, Message, PeerMessage, Prepare, Value
from ..storage.engine import Engine
from ..storage.version_cache import VersionCache
from .expiry import Expiry
from .journal import Journal
from .quiet import Quiet
from .rows import Meta, decode_record, log_entry, log_key, meta_key
from .standings import Standings
from .timeline import Timeline
from .versions import Versions
from .wipes import Wipes

MAX_ENTRY = (1 << 62) - 1  # of entries, rounds and boots: below what the disk's formats hold


@dataclass(frozen=True, slots=True)
class Settings:
    """Limits and times of a replica.

    `request_id_entries` (W): a write whose sender has seen a version older than the last W entries is refused with
    the present one, so W bounds how long a retry stays safe; of all timelines `request_ids_in_memory` ids are held in
    memory, the others are in the log. `log_keep_entries`: a replica or cache that is further
    behind gets the timeline's state instead of its log; at least W. `log_keep_bytes`: the same in bytes of keys and
    values, but the ids of W entries stay. `journal_bytes`: of the journal of changes (`journal.py`); a replica that was
    away for longer compares all timelines. `accept_timeout_s`: after this time without a majority the message is sent
    again; well above a round trip plus an fsync. `backoff_s`: first bound of the random pause after a lost duel;
    doubles up to `backoff_max_s`. `flight_entries`: so many entries of one step, or more, travel as one message.
    `chore_rows`: rows that a slice of background work, or of a long answer, looks at. `expire_rest_s`: how long rows
    that are written below a retention horizon wait for others, before they are freed together.
    """

    timelines_in_memory: int = 200_000
    request_id_entries: int = 128
    request_ids_in_memory: int = 1_600_000
    log_keep_entries: int = 256
    log_keep_bytes: int = 8 << 20
    max_queued_requests: int = 100_000
    max_queued_bytes: int = 256 << 20
    accept_timeout_s: float = 0.2
    resend_max_s: float = 1.0
    backoff_s: float = 0.01
    backoff_max_s: float = 0.5
    chosen_delay_s: float = 0.003
    mark_delay_s: float = 0.5
    fetch_timeout_s: float = 1.0
    entry_items: int = 10_000
    entry_bytes: int = 8 << 20
    transfer_bytes: int = 1 << 20
    incoming_bytes: int = 256 << 20
    message_bytes: int = 8 << 20
    flight_entries: int = 2
    journal_bytes: int = 256 << 20
    chore_rows: int = 250
    expire_rest_s: float = 60.0


class Core:
    """Shared context of one replica. `on_chosen(timeline, entry, request_ids)` is called after each chosen entry."""

    def __init__(
        self,
        *,
        replica: int,
        replicas: int,
        life: Life,
        buckets: int,
        engine: Engine,
        settings: Settings,
        rng: random.Random,
        wall_us: Callable[[], int],
        counters: Counters,
        versions: VersionCache | None = None,
    ) -> None:
        self.replica = replica
        self.replicas = replicas
        self.majority = replicas // 2 + 1
        self.peers = [r for r in range(replicas) if r != replica]
        self.life = life
        self.first_ballot: Ballot = (0, life)  # of entries to which this life has the right
        self.buckets = buckets
        self.engine = engine
        self.settings = settings
        self.rng = rng
        self.wall_us = wall_us
        self.counters = counters
        self.durable = 0
        self.versions = Versions(versions, life)
        self.lives: dict[int, Life] = {}
        self.owned: Set[int] = frozenset()  # buckets of this group
        self.chores_due: list[tuple[bytes, int]] = []
        self.on_chosen: Callable[[Timeline, int, list[bytes]], None] = lambda _t, _e, _i: None
        self._timelines: OrderedDict[bytes, Timeline] = OrderedDict()
        self.unmarked: dict[bytes, Timeline] = {}
        self._timers: list[tuple[float, int, list[bytes]]] = []
        self._timer_number = 0
        self.messages: list[tuple[int, int, PeerMessage]] = []  # (after, peer, message)
        self.replies: list[tuple[int, int, Message]] = []  # (after, token, message)
        self._large: list[tuple[int, int]] = []  # (after, bytes) of what is large in the outbox
        self._large_bytes = 0
        self._held: OrderedDict[bytes, tuple[Timeline, int]] = OrderedDict()  # timelines with `held`, and its bytes
        self._held_bytes = 0
        self._with_ids: OrderedDict[bytes, Timeline] = OrderedDict()  # whose ids are in memory, last used last
        self._ids_held = 0
        self.journal = Journal(self)
        self.quiet = Quiet(self)
        self.expiry = Expiry(self)
        self.wipes = Wipes(self)
        self.standings = Standings(self)
        engine.before_commit = self._before_commit

    def incarnations(self) -> list[int]:
        """By replica, the greatest incarnation that this replica has seen; 0 for none."""
        return [
            self.life[1] if replica == self.replica else self.lives[replica][1] if replica in self.lives else 0
            for replica in range(self.replicas)
        ]

    def _before_commit(self) -> None:
        self.versions.flush()
        self.journal.write_row()

    # ---- outbox

    def send(self, peer: int, message: PeerMessage, after: int = 0) -> None:
        """Queue a message for a peer; it leaves when engine batch `after` is durable."""
        self.messages.append((after, peer, message))

    def broadcast(self, message: PeerMessage, after: int = 0) -> None:
        """Queue a message for all peers."""
        for peer in self.peers:
            self.messages.append((after, peer, message))

    def reply(self, token: int, message: Message, after: int = 0) -> None:
        """Queue the answer to a request."""
        self.replies.append((after, token, message))

    def has_room(self, size: int, after: int = 0) -> bool:
        """Whether the outbox has room for something large, which then counts until it leaves.

        A replica that flushes slowly, and is asked quickly, would else hold any number of answers. Whoever gets none
        of them asks again.
        """
        if self._large and self._large_bytes + size > self.settings.max_queued_bytes:
            self.counters.add("outbox_refusals")
            return False
        self._large.append((after, size))
        self._large_bytes += size
        return True

    def forget_sent(self) -> None:
        """Count only what the disk still holds back."""
        if self._large:
            self._large = [large for large in self._large if large[0] > self.durable]
            self._large_bytes = sum(size for _, size in self._large)

    # ---- messages that came too early

    def hold(self, timeline: Timeline, sender: int, message: Prepare | Accept) -> None:
        """Keep a message about a later entry until this replica has caught up; the last one of a timeline counts.

        Beyond a bound the oldest goes, since who sent it repeats it.
        """
        self.drop_held(timeline)
        timeline.held = (sender, message)
        size = value_bytes(message.value) if isinstance(message, Accept) else 64
        self._held[timeline.key] = (timeline, size)
        self._held_bytes += size
        while self._held_bytes > self.settings.max_queued_bytes and len(self._held) > 1:
            self.drop_held(next(iter(self._held.values()))[0])

    def drop_held(self, timeline: Timeline) -> None:
        """Forget the message that was held for a timeline, if there is one."""
        if timeline.held is not None:
            timeline.held = None
            self._held_bytes -= self._held.pop(timeline.key)[1]

    # ---- timers

    def wake_at(self, due: float, timeline: Timeline) -> None:
        """Have the proposer look at a timeline at time `due` at the latest.

        A timeline has one timer that counts, its earliest; who is woken by it sets the next. So the timers are
        bounded by the timelines at work, whatever the rate of requests and their deadlines.
        """
        if due < timeline.wakes_at:
            timeline.wakes_at = due
            self._timer_number += 1
            heapq.heappush(self._timers, (due, self._timer_number, [timeline.key]))

    def wake_all_at(self, due: float, timelines: list[Timeline]) -> None:
        """The same for many timelines, with one timer."""
        keys = []
        for timeline in timelines:
            if due < timeline.wakes_at:
                timeline.wakes_at = due
                keys.append(timeline.key)
        if keys:
            self._timer_number += 1
            heapq.heappush(self._timers, (due, self._timer_number, keys))

    def due(self, now: float) -> list[Timeline]:
        """Timelines whose time has come and that wait for something, each once."""
        ready: dict[bytes, Timeline] = {}
        while self._timers and self._timers[0][0] <= now:
            due, _, keys = heapq.heappop(self._timers)
            for key in keys:
                timeline = self._timelines.get(key)
                if timeline is None:
                    continue  # what has left memory had nothing to wait for
                if timeline.wakes_at == due:
                    timeline.wakes_at = math.inf
                if timeline.proposal is not None or timeline.waiting or timeline.settles:
                    ready[key] = timeline
        return list(ready.values())

    def next_due(self) -> float | None:
        """Time of the earliest timer that anything waits for; those before it are dropped."""
        while self._timers:
            due, _, keys = self._timers[0]
            for key in keys:
                timeline = self._timelines.get(key)
                if timeline is None:
                    continue
                if timeline.proposal is not None or timeline.waiting or timeline.settles:
                    return due
                if timeline.wakes_at == due:
                    timeline.wakes_at = math.inf
            heapq.heappop(self._timers)
        return None

    # ---- timelines in memory

    def timeline(self, key: bytes) -> Timeline:
        """State of a timeline, from memory or from the engine. Unknown timelines are empty.

        Raises InvalidRequest for bytes that are no timeline key of this cluster: their rows would lie among those
        of others.
        """
        found = self._timelines.get(key)
        if found is None:
            if not is_placed_right(key, self.buckets):
                raise InvalidRequest(f"timeline {key!r} does not lie in the bucket that it names")
            found = self._load(key)
            self._timelines[key] = found
        else:
            self._timelines.move_to_end(key)
        return found

    def find_all(self, keys: Sequence[bytes]) -> list[Timeline | None]:
        """Timelines for a step to work on, loaded if need be; None for those that `load` does not take."""
        timelines = self._timelines
        found = list(map(timelines.get, keys))
        if None in found:
            self.load(keys)
            found = list(map(timelines.get, keys))
        deque(map(timelines.move_to_end, keys if None not in found else filter(timelines.__contains__, keys)), 0)
        return found

    def chosen_of(self, keys: Sequence[bytes]) -> list[int]:
        """How far timelines are chosen, by memory and marks, without taking any into memory.

        Low where a mark was lost in a crash and nobody has loaded the timeline since; see `journal.py`.
        """
        absent = [key for key in keys if key not in self._timelines]
        rows = dict(zip(absent, self.engine.get_many([meta_key(key) for key in absent]), strict=True))
        found: list[int] = []
        for key in keys:
            row = rows.get(key)
            found.append(self._timelines[key].chosen if key not in rows else Meta.decode(row).chosen if row else 0)
        return found

    def owned_timeline(self, key: bytes) -> Timeline:
        """The same for a timeline that a peer names. Raises InvalidRequest too for one of another group."""
        found = self._timelines.get(key)
        if found is not None:
            self._timelines.move_to_end(key)
            return found
        if int.from_bytes(key[:4], "big") not in self.owned:
            raise InvalidRequest(f"timeline {key!r} is of another group")
        return self.timeline(key)

    def load(self, keys: Sequence[bytes]) -> None:
        """Take timelines into memory before a step works on them, those that can be and are of this group.

        One by one, each would have the engine commit what the step has written so far, and read. Of a timeline with
        any state there is a mark, or the record of its first entry: the many that have neither are new.
        """
        absent = [key for key in dict.fromkeys(keys) if key not in self._timelines]
        if len(absent) < 2:
            return
        rows = self.engine.get_many([name for key in absent for name in (meta_key(key), log_key(key, 1))])
        marked: list[tuple[bytes, bytes]] = []
        for key, mark, first in zip(absent, rows[::2], rows[1::2], strict=True):
            try:
                if int.from_bytes(key[:4], "big") not in self.owned or not is_placed_right(key, self.buckets):
                    continue
            except InvalidRequest:
                continue  # who works on it is told
            if mark is not None:
                marked.append((key, mark))
            elif first is not None:
                self._timelines[key] = self._load(key)
            else:
                timeline = self._timelines[key] = Timeline(key, Meta(), self.versions.digest(key))
                self.versions.changed.append(timeline)
        self._load_marked(marked)

    def _load_marked(self, marked: Sequence[tuple[bytes, bytes]]) -> None:
        """Take timelines into memory, of which the marks were read: the records behind most of them are two at most,
        which are asked for by name, since opening a scan for each would cost ten times as much."""
        chosen = [Meta.decode(mark).chosen for _, mark in marked]
        names = [log_key(key, at + n) for (key, _), at in zip(marked, chosen, strict=True) for n in range(3)]
        records = self.engine.get_many(names)
        for number, ((key, mark), at) in enumerate(zip(marked, chosen, strict=True)):
            last, following, one_more = records[3 * number : 3 * number + 3]
            if one_more is not None or (last is None and following is not None):
                self._timelines[key] = self._load(key)  # the mark lags behind
                continue
            found = [(at + n, record) for n, record in enumerate((last, following)) if record is not None]
            self._timelines[key] = self._from_rows(key, mark, found)

    def holds(self, key: bytes) -> bool:
        """Whether a timeline is in memory."""
        return key in self._timelines

    def peek(self, key: bytes) -> Timeline | None:
        """A timeline if it is in memory, without any consequence."""
        return self._timelines.get(key)

    def is_idle(self) -> bool:
        """Whether no timeline has a proposal under way, or a request that waits."""
        return not any(timeline.is_occupied for timeline in self._timelines.values())

    def in_memory(self) -> int:
        """Number of timelines held in memory."""
        return len(self._timelines)

    def _load(self, key: bytes) -> Timeline:
        row = self.engine.get(meta_key(key))
        low = Meta.decode(row).chosen if row is not None else 0
        rows = self.engine.scan(log_key(key, low), log_key(key, MAX_ENTRY))
        return self._from_rows(key, row, ((log_entry(name), encoded) for name, encoded in rows))

    def _from_rows(self, key: bytes, row: bytes | None, records: Iterable[tuple[int, bytes]]) -> Timeline:
        """A timeline by its mark and the log records from the marked entry on, by number."""
        meta = Meta.decode(row) if row is not None else Meta()
        timeline = Timeline(key, meta, self.versions.digest(key))
        for entry, encoded in records:
            record = decode_record(encoded)
            if timeline.record is not None:
                self._apply_loaded(timeline)
            if entry > timeline.chosen:
                timeline.open_bytes = len(encoded)
                timeline.record, timeline.accepted, timeline.learned = record, record.ballot, not record.vote
            else:
                timeline.origin, timeline.ballot = record.origin, record.ballot
        if timeline.record is not None and self.versions.proves(timeline):
            # The life before had learnt that it is chosen; the mark that said so is lost.
            self._apply_loaded(timeline)
            self.unmarked[key] = timeline
        if meta.promised_entry == timeline.chosen + 1:
            timeline.promised = meta.promised
        if row is None and (timeline.chosen or timeline.record is not None):
            self.unmarked[key] = timeline
        # What is on disk was read back, but may not have been fsync'd before this process began.
        self.versions.changed.append(timeline)
        return timeline

    def _apply_loaded(self, timeline: Timeline) -> None:
        """A later record proves that the open one was chosen."""
        record = timeline.record
        assert record is not None
        timeline.chosen += 1
        timeline.log_bytes += timeline.open_bytes
        timeline.origin, timeline.ballot = record.origin, record.ballot
        if WIPE in record.kinds:
            timeline.wiped = timeline.chosen - 1
        timeline.record, timeline.accepted, timeline.learned = None, NO_BALLOT, False

    def shrink(self) -> None:
        """Drop timelines that nobody works on, oldest use first; keep the rest, however many they are.

        Called between steps only: within one, two objects for one timeline would each know half of it.
        """
        surplus = len(self._timelines) - self.settings.timelines_in_memory
        if surplus <= 0:
            return
        idle = (t for t in self._timelines.values() if not (t.busy or t.dirty > self.durable))
        for timeline in list(itertools.islice(idle, surplus)):
            if timeline.key in self.unmarked:
                self.mark(timeline)
            self.drop_held(timeline)
            self.forget_ids(timeline)
            timeline.facts = None  # who still holds the object sees that it is the timeline no longer
            del self._timelines[timeline.key]

    # ---- durable notes that need no fsync of their own

    def mark(self, timeline: Timeline) -> None:
        """Write down how far a timeline is chosen. May be lost in a crash: the log proves all but the last entry."""
        self.engine.put(meta_key(timeline.key), timeline.meta().encode())
        self.unmarked.pop(timeline.key, None)

    def mark_all(self) -> None:
        """Write down all that `mark` would."""
        for timeline in list(self.unmarked.values()):
            self.mark(timeline)
        self.journal.marked()

    def touch(self, timeline: Timeline) -> int:
        """Note that the pending engine batch holds state of this timeline; returns the batch's number."""
        timeline.dirty = self.engine.sequence
        self.versions.changed.append(timeline)
        self.journal.note(timeline.key)
        return timeline.dirty

    # ---- request ids

    def ids_of(self, timeline: Timeline) -> dict[bytes, int]:
        """Request ids of the last W chosen entries, with the entry that applied each."""
        if timeline.ids is None:
            timeline.ids = {}
            self._with_ids[timeline.key] = timeline
            if not timeline.chosen:
                return timeline.ids
            low = max(timeline.log_low, timeline.chosen - self.settings.request_id_entries + 1, 1)
            high = log_key(timeline.key, timeline.chosen + 1)
            for log_row, encoded in self.engine.scan(log_key(timeline.key, low), high):
                self._add_ids(timeline, log_entry(log_row), decode_record(encoded).request_ids)
        self._with_ids.move_to_end(timeline.key)
        if self._ids_held > self.settings.request_ids_in_memory:
            self._bound_ids()
        return timeline.ids

    def remember_ids(self, timeline: Timeline, entry: int, request_ids: list[bytes]) -> None:
        """Add the ids of a chosen entry to those in memory, and forget those of entries older than W."""
        self._add_ids(timeline, entry, request_ids)
        if 2 * self._ids_held > self.settings.request_ids_in_memory:
            self._with_ids.move_to_end(timeline.key)  # before that, nobody asks which were used last
        if self._ids_held > self.settings.request_ids_in_memory:
            self._bound_ids()

    def _bound_ids(self) -> None:
        """Leave ids to the log, those of the timelines first whose writes are longest ago."""
        while self._ids_held > self.settings.request_ids_in_memory and len(self._with_ids) > 1:
            self.forget_ids(next(iter(self._with_ids.values())))

    def _add_ids(self, timeline: Timeline, entry: int, request_ids: list[bytes]) -> None:
        ids = timeline.ids
        assert ids is not None
        held = len(ids)
        for request_id in request_ids:
            ids[request_id] = entry
        if entry > self.settings.request_id_entries:
            oldest = entry - self.settings.request_id_entries
            while ids and ids[first := next(iter(ids))] <= oldest:
                del ids[first]
        self._ids_held += len(ids) - held

    def forget_ids(self, timeline: Timeline) -> None:
        """Hold the ids of a timeline no longer in memory."""
        if timeline.ids is not None:
            self._ids_held -= len(timeline.ids)
            timeline.ids = None
            del self._with_ids[timeline.key]


def value_bytes(value: Value) -> int:
    """Bytes that a value takes in a message, nearly."""
    return sum(map(len, value.values)) + 32 * len(value.keys) + 64
