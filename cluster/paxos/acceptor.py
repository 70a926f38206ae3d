"""The acceptor: promises, acceptances, and what makes an entry chosen here.

Rules (DESIGN section 3; Lamport, "Paxos Made Simple", 2001, with per-entry instances and round-0 fast accept):

* Only entry chosen+1 can be open. Who asks for an older one is behind and is sent what it misses; for a later one,
  this replica is behind, holds the message and fetches.
* Nothing is answered before its record is durable: answers carry the number of the engine batch.
* Round 0 of entry e belongs to one life: the origin of chosen entry e-1, for e = 1 the replica of first priority in
  its first incarnation. The claim is checked against this replica's own entry e-1.
* A peer's word that an entry is chosen counts only at the very ballot at which this replica accepted it.
* What a replica that had lost its data copied from its peers (`learned`) is told in promises like an acceptance of
  its own, and never counts as a vote.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..keys import bucket_of, is_system, priority
from ..messages import (
    NO_BALLOT,
    WIPE,
    Accept,
    Accepted,
    Ballot,
    Chosen,
    Entries,
    Fetch,
    Life,
    Nack,
    Prepare,
    Promise,
    Value,
)
from .core import Core, value_bytes
from .rows import (
    VERSION_BYTES,
    chore_key,
    decode_record,
    decode_row,
    encode_record,
    encode_row,
    log_key,
    record_of,
    row_key,
    rows_prefix,
)
from .standings import horizons_in
from .timeline import Timeline

FIRST_INCARNATION = 1


class Acceptor:
    """Acceptor of all timelines of one replica."""

    def __init__(self, core: Core) -> None:
        self.core = core

    # ---- messages

    def on_prepare(self, timeline: Timeline, sender: int, message: Prepare, now: float) -> None:
        """Promise, refuse, or see to it that whoever is behind catches up."""
        if not self._is_next(timeline, sender, message, now):
            return
        against = max(timeline.promised, timeline.accepted)
        if message.ballot < against:
            self.core.send(sender, Nack(timeline.key, message.entry, message.ballot, against), timeline.dirty)
            return
        if message.ballot > timeline.promised:
            self.promise(timeline, message.ballot)
        value = self.accepted_value(timeline)
        if value is None or self.core.has_room(value_bytes(value), timeline.dirty):
            answer = Promise(timeline.key, message.entry, message.ballot, timeline.accepted, value)
            self.core.send(sender, answer, timeline.dirty)

    def on_accept(self, timeline: Timeline, sender: int, message: Accept, now: float) -> None:
        """Accept, refuse, or see to it that whoever is behind catches up."""
        if message.entry == timeline.chosen + 2 and timeline.accepted == message.before != NO_BALLOT:
            self.choose(timeline)
        if not self._is_next(timeline, sender, message, now):
            return
        ballot = message.ballot
        claim_holds = self.claim_holds(timeline, message.entry, ballot, message.value.origin)
        if ballot < max(timeline.promised, timeline.accepted) or not claim_holds:
            against = max(timeline.promised, timeline.accepted)
            self.core.send(sender, Nack(timeline.key, message.entry, ballot, against), timeline.dirty)
            return
        if ballot != timeline.accepted or timeline.learned:
            self.accept(timeline, ballot, message.value)
        self.core.send(sender, Accepted(timeline.key, message.entry, ballot), timeline.dirty)

    def on_chosen(self, timeline: Timeline, sender: int, message: Chosen, now: float) -> None:
        """Apply the open entry if it was accepted at that very ballot, else fetch what was chosen."""
        if message.entry == timeline.chosen + 1 and timeline.accepted == message.ballot != NO_BALLOT:
            self.choose(timeline)
        elif message.entry > timeline.chosen:
            self.fetch(timeline, sender, now)

    # ---- what on_* decide by

    def _is_next(self, timeline: Timeline, sender: int, message: Prepare | Accept, now: float) -> bool:
        if message.entry == timeline.chosen + 1:
            return True
        if message.entry <= timeline.chosen:
            self.send_entries(timeline, sender, message.entry)
        else:
            self.core.hold(timeline, sender, message)
            self.fetch(timeline, sender, now)
        return False

    def claim_holds(self, timeline: Timeline, entry: int, ballot: Ballot, origin: Life) -> bool:
        """Whether a round-0 ballot is used by the one life that has the right to it, with a value of its own."""
        number, life = ballot
        if number > 0:
            return True
        if origin != life:
            return False
        if entry == 1:
            first = priority(timeline.key, self.core.replicas)[0]
            return life[0] == first and life[1] == FIRST_INCARNATION
        return timeline.origin == life

    # ---- state changes

    def promise(self, timeline: Timeline, ballot: Ballot) -> int:
        """Durably promise not to accept below `ballot`. Returns the engine batch to wait for."""
        timeline.promised = ballot
        batch = self.core.touch(timeline)
        self.core.mark(timeline)
        return batch

    def accept(self, timeline: Timeline, ballot: Ballot, value: Value) -> int:
        """Write `value` as the accepted one of entry chosen+1. Returns the engine batch to wait for."""
        entry = timeline.chosen + 1
        self._write_entry(timeline, entry, ballot, value)
        timeline.accepted, timeline.learned = ballot, False
        return timeline.dirty

    def learn(self, timeline: Timeline, ballot: Ballot, value: Value) -> None:
        """Write that somebody accepted `value` for entry chosen+1, as knowledge of a replica that lost its votes."""
        self._write_entry(timeline, timeline.chosen + 1, ballot, value, vote=False)
        timeline.accepted, timeline.learned = ballot, True

    def install(self, timeline: Timeline, ballot: Ballot, value: Value) -> None:
        """Write an entry that a peer knows to be chosen, and apply it."""
        self._write_entry(timeline, timeline.chosen + 1, ballot, value)
        timeline.accepted = ballot
        self.choose(timeline)

    def _write_entry(self, timeline: Timeline, entry: int, ballot: Ballot, value: Value, *, vote: bool = True) -> None:
        """One log record and one row an item, in the pending batch; rows of a replaced value go with it."""
        engine, key = self.core.engine, timeline.key
        if timeline.record is not None and timeline.record.keys:
            kept = set(value.keys)
            for old in timeline.record.keys:
                if old and old not in kept:
                    engine.delete(row_key(key, old, entry))
        facts = record_of(ballot, value, vote=vote)
        record = encode_record(facts)
        engine.put(log_key(key, entry), record)
        open_bytes = len(record)
        prefix, version = rows_prefix(key), entry.to_bytes(VERSION_BYTES, "big")
        for kind, item, content in zip(value.kinds, value.keys, value.values, strict=True):
            if kind != WIPE:
                engine.put(prefix + item + version, encode_row(value.written, kind, content))
                open_bytes += len(content)
        if is_system(key) or WIPE in value.kinds:
            engine.put(chore_key(key, entry), b"")
        if is_system(key):
            self.core.standings.stir(bucket_of(key))
            if horizons_in(value.keys):
                self.core.versions.horizon_moved()
        timeline.record, timeline.open_bytes = facts, open_bytes
        if entry == 1:
            self.core.mark(timeline)  # every timeline with any state has a Meta, by which peers find it
        self.core.quiet.note(key, value.written, value.keys)
        self.core.expiry.note(key, value.keys)
        self.core.touch(timeline)

    def choose(self, timeline: Timeline) -> None:
        """Apply the open entry: it is known to be chosen."""
        core, key, record = self.core, timeline.key, timeline.record
        assert record is not None, "only an accepted entry can be applied"
        entry = timeline.chosen = timeline.chosen + 1
        timeline.log_bytes += timeline.open_bytes
        timeline.ballot, timeline.origin = timeline.accepted, record.origin
        timeline.accepted = timeline.promised = NO_BALLOT
        timeline.record = None
        timeline.learned = False
        core.versions.changed.append(timeline)
        if WIPE in record.kinds:
            timeline.wiped = timeline.chosen - 1
            core.chores_due.append((key, entry))
        elif is_system(key):
            core.chores_due.append((key, entry))
        core.unmarked[key] = timeline
        core.journal.note(key)
        if timeline.ballot == NO_BALLOT:
            # Fetched without its ballot, the record may stand where our vote for it stood. By itself it proves
            # nothing after a restart, so the word that it is chosen goes to disk in the same write.
            core.mark(timeline)
        if timeline.ids is not None:
            core.remember_ids(timeline, entry, record.request_ids)
        core.counters.add("entries_chosen")
        core.on_chosen(timeline, entry, record.request_ids)

    def choose_all(self, entries: Iterable[tuple[Timeline, int]], ballot: Ballot) -> list[tuple[Timeline, int]]:
        """Apply the open entries, by number, that were accepted at `ballot` and are as nearly all are: one item of a
        timeline that is no system timeline. Returns the others. What `choose` does for each, it does in columns."""
        core = self.core
        chosen: list[tuple[Timeline, int, list[bytes]]] = []
        others: list[tuple[Timeline, int]] = []
        for timeline, entry in entries:
            facts = timeline.facts
            if type(facts) is not tuple or timeline.accepted != ballot or timeline.chosen + 1 != entry:
                others.append((timeline, entry))
                continue
            timeline.chosen = entry
            timeline.log_bytes += timeline.open_bytes
            timeline.ballot, timeline.origin = ballot, ballot[1]
            timeline.accepted = timeline.promised = NO_BALLOT
            timeline.facts = None
            request_ids = [facts[1]]
            if timeline.ids is not None:
                core.remember_ids(timeline, entry, request_ids)
            chosen.append((timeline, entry, request_ids))
        timelines = [timeline for timeline, _, _ in chosen]
        keys = [timeline.key for timeline in timelines]
        core.versions.changed += timelines
        core.unmarked.update(zip(keys, timelines, strict=True))
        core.journal.note_all(keys)
        core.counters.add("entries_chosen", len(chosen))
        on_chosen = core.on_chosen
        for timeline, entry, request_ids in chosen:
            on_chosen(timeline, entry, request_ids)
        return others

    # ---- values and catching up by log

    def accepted_value(self, timeline: Timeline) -> Value | None:
        """The value accepted for the open entry, put together from its record and rows.

        It is not kept in memory: open entries of writers that are gone would add up without a bound.
        """
        return None if timeline.record is None else self.read_value(timeline, timeline.chosen + 1)

    def read_value(self, timeline: Timeline, entry: int) -> Value:
        """Value of a log entry above the floor."""
        encoded = self.core.engine.get(log_key(timeline.key, entry))
        assert encoded is not None, f"entry {entry} above the floor {timeline.floor} has no record"
        record = decode_record(encoded)
        rows = self.core.engine.get_many([row_key(timeline.key, item, entry) for item in record.keys if item])
        contents = iter(rows)
        values = []
        for item in record.keys:
            row = next(contents) if item else None
            assert not item or row is not None, f"a row of entry {entry} above the floor {timeline.floor} is gone"
            values.append(decode_row(row)[2] if row is not None else b"")
        return Value(record.origin, record.written, record.request_ids, record.kinds, record.keys, values)

    def fetch(self, timeline: Timeline, peer: int, now: float) -> None:
        """Ask a peer for what was chosen after our last entry; one question at a time."""
        if now < timeline.asked_until:
            return
        timeline.asked_until = now + self.core.settings.fetch_timeout_s
        self.core.counters.add("fetches")
        self.core.send(peer, Fetch(timeline.key, timeline.chosen + 1))

    def send_entries(self, timeline: Timeline, peer: int, first: int) -> None:
        """Send chosen entries from `first` on, as many as one message bears; below the floor there are none."""
        if first <= timeline.floor:
            # A Fetch from the peer leads to a state transfer; this tells it that it is behind.
            self.core.send(peer, Entries(timeline.key, first, [], NO_BALLOT, timeline.chosen), timeline.dirty)
            return
        values: list[Value] = []
        size = 0
        last = first - 1
        while last < timeline.chosen and len(values) < 256 and size < self.core.settings.transfer_bytes:
            last += 1
            value = self.read_value(timeline, last)
            size += value_bytes(value)
            values.append(value)
        if not self.core.has_room(size, timeline.dirty):
            return
        ballot = timeline.ballot if last == timeline.chosen else NO_BALLOT
        self.core.send(peer, Entries(timeline.key, first, values, ballot, timeline.chosen), timeline.dirty)
