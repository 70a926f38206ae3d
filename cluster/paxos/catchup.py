"""Catching up: by log entries while the sender still has them, by the timeline's whole state after that.

A state transfer comes in pieces and replaces what the receiver has, in one write. Rows that the sender has evicted
are found only through cold links, so a state is installed only after the receiver has applied the bucket's system
timeline as far as the sender had; else there would be a moment with neither row nor link.
"""

from __future__ import annotations

from ..keys import bucket_of, is_system, system_timeline
from ..messages import NO_BALLOT, Accept, Entries, Fetch, Prepare, State
from .acceptor import Acceptor
from .core import MAX_ENTRY, Core
from .rows import (
    chore_key,
    decode_record,
    ids_record,
    log_entry,
    log_key,
    prefix_end,
    rows_prefix,
    version_of,
)
from .timeline import Incoming, Timeline

TRANSFER_TAILS = 16  # times `log_keep_entries` and `log_keep_bytes`, that a tail may grow to during a transfer
MAX_SENDING = 1_000


class CatchUp:
    """Both ends of catching up, for all timelines of one replica."""

    def __init__(self, core: Core, acceptor: Acceptor) -> None:
        self.core = core
        self.acceptor = acceptor
        self._incoming_bytes = 0
        self._sending: dict[bytes, int] = {}  # timelines that go out in pieces -> version that the receiver will have
        self._waiting: dict[int, set[bytes]] = {}  # bucket -> timelines whose state waits for its system timeline

    # ---- the end that has

    def on_fetch(self, timeline: Timeline, sender: int, message: Fetch) -> None:
        """Answer with entries, or with a piece of state when the log does not reach back far enough (never to 0)."""
        if message.first <= timeline.floor and message.first <= timeline.chosen:
            self._send_state(timeline, sender, message)
        else:
            self._note_progress(timeline, message.first)
            self.acceptor.send_entries(timeline, sender, max(message.first, timeline.floor + 1))

    def keeps_tail(self, timeline: Timeline) -> bool:
        """Whether a state that is being sent needs the log tail as it is: its rows as of that version, and the entries
        since. Else a large timeline that is written all the time would outrun its own transfer for ever.

        For a number of entries and bytes that is bounded, so that who went away holds it up only so long.
        """
        settings = self.core.settings
        if timeline.mending and timeline.chosen - timeline.log_low < TRANSFER_TAILS * settings.log_keep_entries:
            return True  # else the floor would outrun the state that is to replace what is here
        since = self._sending.get(timeline.key)
        if since is None:
            return False
        if (
            timeline.chosen - since < TRANSFER_TAILS * settings.log_keep_entries
            and timeline.log_bytes < TRANSFER_TAILS * settings.log_keep_bytes
        ):
            return True
        del self._sending[timeline.key]
        return False

    def _note_progress(self, timeline: Timeline, first: int) -> None:
        """Who was sent a state goes on with entries: as soon as the usual tail has all that it lacks, that will do."""
        if timeline.key in self._sending:
            self._sending[timeline.key] = max(first - 1, self._sending[timeline.key])
            if timeline.chosen - first < self.core.settings.log_keep_entries:
                del self._sending[timeline.key]

    def _send_state(self, timeline: Timeline, sender: int, message: Fetch) -> None:
        key = timeline.key
        # A cursor goes on where this very state was cut, as long as its rows are all there: none trimmed or wiped
        # since for the sake of later versions, and its version not forgotten to be chosen in a restart.
        whole = max(timeline.floor, timeline.wiped + 1) <= message.state_version <= timeline.chosen
        goes_on = bool(message.cursor) and whole
        version, cursor = (message.state_version, message.cursor) if goes_on else (timeline.chosen, b"")
        prefix = rows_prefix(key)
        names: list[bytes] = []
        rows: list[bytes] = []
        size = 0
        following = b""
        for name, row in self.core.engine.scan(prefix + cursor, prefix_end(prefix)):
            if size >= self.core.settings.transfer_bytes:
                following = name[len(prefix) :]
                break
            if timeline.wiped < version_of(name) <= version:
                names.append(name[len(prefix) :])
                rows.append(row)
                size += len(name) + len(row)
        needs = 0 if is_system(key) else self.core.timeline(system_timeline(bucket_of(key))).chosen
        ids = [] if following else self.recent_ids(timeline, version)
        exact = version == timeline.chosen
        if following:
            self.hold_tail(key, version)
        if not self.core.has_room(size, timeline.dirty):
            return
        self.core.counters.add("state_pieces_sent")
        self.core.send(
            sender,
            State(
                key,
                version,
                timeline.ballot if exact else NO_BALLOT,
                timeline.origin if exact else self._origin_at(timeline, version),
                timeline.wiped,
                needs,
                ids,
                cursor,
                following,
                names,
                rows,
            ),
            timeline.dirty,
        )

    def hold_tail(self, key: bytes, version: int) -> None:
        """A timeline's state as of `version` goes out in pieces; see `keeps_tail`."""
        self._sending[key] = min(self._sending.get(key, version), version)
        if len(self._sending) > MAX_SENDING:
            del self._sending[next(iter(self._sending))]

    def let_tail_go(self, key: bytes, version: int) -> None:
        """The state as of `version` has gone out whole."""
        if self._sending.get(key) == version:
            del self._sending[key]

    def recent_ids(self, timeline: Timeline, version: int) -> list[tuple[int, list[bytes]]]:
        """Request ids of the last entries up to `version`, by entry."""
        low = max(timeline.log_low, version - self.core.settings.request_id_entries + 1, 1)
        records = self.core.engine.scan(log_key(timeline.key, low), log_key(timeline.key, version + 1))
        return [(log_entry(name), decode_record(row).request_ids) for name, row in records]

    def _origin_at(self, timeline: Timeline, version: int) -> tuple[int, int, int]:
        row = self.core.engine.get(log_key(timeline.key, version))
        return decode_record(row).origin if row is not None else (-1, 0, 0)

    # ---- the end that lacks

    def mend(self, timeline: Timeline, peer: int, now: float) -> None:
        """Replace what this replica has of a timeline by what a peer has, also at the same version."""
        if timeline.mending and timeline.incoming is not None and now < timeline.incoming.due:
            return  # it is on its way
        timeline.mending = True
        timeline.asked_until = now + self.core.settings.fetch_timeout_s
        self.core.send(peer, Fetch(timeline.key, 0))

    def on_entries(self, timeline: Timeline, sender: int, message: Entries, now: float) -> None:
        """Apply the entries that come next, and ask on if there is more."""
        timeline.asked_until = 0.0
        for offset, value in enumerate(message.values):
            entry = message.first + offset
            if entry == timeline.chosen + 1:
                last = offset == len(message.values) - 1
                self.acceptor.install(timeline, message.ballot if last else NO_BALLOT, value)
                self.core.counters.add("entries_fetched")
                self.core.counters.add("catch_up_bytes", sum(map(len, value.values)) + sum(map(len, value.keys)))
        if message.chosen > timeline.chosen:
            self.acceptor.fetch(timeline, sender, now)
        self._release(timeline, now)

    def on_state(self, timeline: Timeline, sender: int, message: State, now: float) -> None:
        """Gather the pieces; install them when complete."""
        timeline.asked_until = 0.0
        incoming = timeline.incoming
        if message.version < 1 or not self._is_wanted(timeline, message.version):
            timeline.mending = False
            self._forget(timeline)
            self._release(timeline, now)
            return
        if not message.cursor:
            self._forget(timeline)
            incoming = timeline.incoming = Incoming(message.version)
        elif (
            incoming is None
            or incoming.complete
            or (incoming.version, incoming.expected) != (message.version, message.cursor)
        ):
            return  # a piece of a transfer that was given up, or one that comes twice
        size = sum(map(len, message.row_keys)) + sum(map(len, message.rows)) + 100 * len(message.rows)
        if self._incoming_bytes + size > self.core.settings.incoming_bytes:
            self.core.counters.add("transfers_postponed")
            self._forget(timeline)
            return
        incoming.rows.extend(zip(message.row_keys, message.rows, strict=True))
        incoming.size += size
        self._incoming_bytes += size
        self.core.counters.add("catch_up_bytes", size)
        incoming.needs_system = max(incoming.needs_system, message.needs_system)
        if message.next:
            incoming.expected = message.next
            incoming.due = timeline.asked_until = now + self.core.settings.fetch_timeout_s
            first = 0 if timeline.mending else timeline.chosen + 1  # what is mended need not be behind
            self.core.send(sender, Fetch(timeline.key, first, message.next, message.version))
            return
        incoming.complete = True
        incoming.ballot, incoming.origin, incoming.wiped = message.ballot, message.origin, message.wiped
        incoming.request_ids = message.request_ids
        self._install_when_possible(timeline, sender, now)

    def _install_when_possible(self, timeline: Timeline, sender: int, now: float) -> None:
        incoming = timeline.incoming
        assert incoming is not None
        bucket = bucket_of(timeline.key)
        system = self.core.timeline(system_timeline(bucket))
        if system.chosen < incoming.needs_system:
            self._waiting.setdefault(bucket, set()).add(timeline.key)
            self.acceptor.fetch(system, sender, now)
            return
        self._install(timeline, incoming)
        self._forget(timeline)
        if timeline.ballot == NO_BALLOT:
            self.acceptor.fetch(timeline, sender, now)  # the sender has gone on while it sent the pieces
        self._release(timeline, now)

    def install_first(self, timeline: Timeline, first: Incoming) -> None:
        """Have a whole state as the first thing that a timeline knows; see `restores.py`."""
        self._forget(timeline)
        self._install(timeline, first)

    @staticmethod
    def _is_wanted(timeline: Timeline, version: int) -> bool:
        """Whether a state as of `version` is of use: it is ahead, or replaces what is there up to that version.

        One from before the floor would bring back rows whose successors were evicted.
        """
        return version > timeline.chosen or (timeline.mending and version >= timeline.floor)

    def _install(self, timeline: Timeline, incoming: Incoming) -> None:
        """Replace everything that is known of the timeline up to the state's version, in one write. What is mended may
        have gone on meanwhile: what came after that version stays, and what is promised and accepted too."""
        assert self._is_wanted(timeline, incoming.version), "a state never takes a timeline back"
        engine, key = self.core.engine, timeline.key
        if not is_system(key):
            # In the same write: what these rows leave out is found through links only, also after a crash.
            self.core.mark(self.core.timeline(system_timeline(bucket_of(key))))
        stays = incoming.version <= timeline.chosen
        open_entry = incoming.version + 1 if stays else MAX_ENTRY
        prefix = rows_prefix(key)
        rows = engine.scan(prefix, prefix_end(prefix))
        old = [name for name, _ in rows if version_of(name) < open_entry]
        old += [name for name, _ in engine.scan(log_key(key, 0), log_key(key, open_entry))]
        for name in old:
            engine.delete(name)
        for name, row in incoming.rows:
            engine.put(prefix + name, row)
        self.core.quiet.forget(key)
        if incoming.rows:
            self.core.expiry.note(key, [min(incoming.rows)[0]])
        ids = {incoming.version: [], **dict(incoming.request_ids)}
        if stays and timeline.log_low > incoming.version + 1:
            ids = {}  # the own log begins later: it would have a gap
        for entry, request_ids in ids.items():
            last = entry == incoming.version
            ballot = incoming.ballot if last else NO_BALLOT
            engine.put(log_key(key, entry), ids_record(ballot, incoming.origin, request_ids))
        if is_system(key):
            self.core.standings.stir(bucket_of(key))
            self.core.versions.horizon_moved()
            for version in sorted({incoming.version, *(version_of(name) for name, _ in incoming.rows)}):
                engine.put(chore_key(key, version), b"")
                self.core.chores_due.append((key, version))
        elif incoming.wiped > timeline.wiped:
            engine.put(chore_key(key, incoming.version), b"")
            self.core.chores_due.append((key, incoming.version))
        timeline.log_low = min(ids, default=timeline.log_low)
        timeline.floor = max(timeline.floor, incoming.version)
        timeline.wiped = max(timeline.wiped, incoming.wiped)
        if not stays:
            timeline.chosen = incoming.version
            timeline.log_mark, timeline.log_bytes = incoming.version + 1, 0
            timeline.ballot, timeline.origin = incoming.ballot, incoming.origin
            timeline.promised = timeline.accepted = NO_BALLOT
            timeline.record = None
            timeline.learned = False
        timeline.mending = False
        self.core.forget_ids(timeline)
        self.core.mark(timeline)
        self.core.touch(timeline)
        self.core.counters.add("states_installed")
        for entry, request_ids in sorted(ids.items()):
            self.core.on_chosen(timeline, entry, request_ids)

    def on_system_chosen(self, system: Timeline, now: float) -> None:
        """Install what waited for this system timeline."""
        for key in list(self._waiting.get(bucket_of(system.key), ())):
            timeline = self.core.timeline(key)
            incoming = timeline.incoming
            if incoming is None or not incoming.complete:
                self._waiting[bucket_of(key)].discard(key)
            elif not self._is_wanted(timeline, incoming.version):
                # Meanwhile it has caught up by the log: what it promised and accepted since then must stay.
                self._waiting[bucket_of(key)].discard(key)
                self._forget(timeline)
            elif system.chosen >= incoming.needs_system:
                self._waiting[bucket_of(key)].discard(key)
                self._install(timeline, incoming)
                self._forget(timeline)
                self._release(timeline, now)
        if not self._waiting.get(bucket_of(system.key)):
            self._waiting.pop(bucket_of(system.key), None)

    def _forget(self, timeline: Timeline) -> None:
        if timeline.incoming is not None:
            self._incoming_bytes -= timeline.incoming.size
            timeline.incoming = None

    def _release(self, timeline: Timeline, now: float) -> None:
        """Go on with a message that came while we were behind."""
        held = timeline.held
        if held is None:
            return
        sender, message = held
        if message.entry > timeline.chosen + 1 and timeline.asked_until > now:
            return
        self.core.drop_held(timeline)
        if message.entry > timeline.chosen + 1:
            return  # we did not get there; the proposer repeats itself
        if isinstance(message, Accept):
            self.acceptor.on_accept(timeline, sender, message, now)
        elif isinstance(message, Prepare):
            self.acceptor.on_prepare(timeline, sender, message, now)
