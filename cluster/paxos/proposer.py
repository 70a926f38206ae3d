"""The proposer: takes write and settle requests and has entries decided.

One proposal a timeline is open at a time; requests that come meanwhile wait and share the next entry. A proposal is

    (right to round 0) -> ACCEPT -> chosen
    PREPARE -> ACCEPT -> chosen
    PREPARE or ACCEPT, refused -> BACKOFF -> PREPARE with a higher round

The right to round 0 of entry e is *not stored*: this life has it if it is the origin of chosen entry e-1 and its own
acceptor has neither promised nor accepted anything for e. Using it writes the own acceptance first, so it can't be
used twice; a restart changes the life, so it dies with the process. At e = 1 no memory can tell whether an earlier
life has sent a value, so there the own acceptance is durable before anything is sent.
"""

from __future__ import annotations

from ..keys import priority
from ..messages import (
    NO_BALLOT,
    OK,
    UNAVAILABLE,
    UNKNOWN,
    Accept,
    Accepted,
    AcceptedAll,
    Ballot,
    Nack,
    Prepare,
    Promise,
    Value,
    unpack_u32,
)
from .acceptor import FIRST_INCARNATION, Acceptor
from .answers import NOBODY
from .core import Core
from .flights import Departures, Flight, Leaving, OwnVote
from .forming import Forming
from .telling import Telling
from .timeline import ACCEPT, BACKOFF, CATCH_UP, FLIGHT, PREPARE, Job, Proposal, SettleWaiter, Timeline, Waiter

QUIET_SETTLE_S = 2.0


class Proposer(Forming):
    """Proposer of all timelines of one replica."""

    def __init__(self, core: Core, acceptor: Acceptor) -> None:
        super().__init__(core, acceptor)
        self.departures = Departures(core)
        self.telling = Telling(core)
        self._own_votes: list[OwnVote] = []

    # ---- requests

    def enqueue(self, timeline: Timeline, waiter: Waiter, now: float) -> None:
        """Take a write request. A request id that waits already gets a second listener, not a second life."""
        present = timeline.waiting.get(waiter.request_id)
        if present is not None:
            present.jobs.extend(waiter.jobs)
            present.deadline = max(present.deadline, waiter.deadline)
            return
        settings = self.core.settings
        if self.queued >= settings.max_queued_requests or self.queued_bytes + waiter.size > settings.max_queued_bytes:
            self.core.counters.add("overload_refusals")
            self._answer(waiter, UNAVAILABLE, timeline.chosen, 0)
            return
        self.queued += 1
        self.queued_bytes += waiter.size
        timeline.waiting[waiter.request_id] = waiter
        if timeline.proposal is None:
            self.start(timeline, now)
        if timeline.proposal is None or waiter.deadline < timeline.proposal.due:
            self.core.wake_at(waiter.deadline, timeline)  # else its proposal's timer comes first

    def has_room(self, requests: int, size: int) -> bool:
        """Whether so many more requests, of so many bytes, may wait."""
        settings = self.core.settings
        return (
            self.queued + requests <= settings.max_queued_requests
            and self.queued_bytes + size <= settings.max_queued_bytes
        )

    def proposed(self, leaving: list[Leaving], size: int) -> None:
        """Requests of `size` bytes were made entries, one each, which this replica has accepted at round 0."""
        self.queued += len(leaving)
        self.queued_bytes += size
        self.core.counters.add("entries_proposed", len(leaving))
        self.core.counters.add("requests_proposed", len(leaving))
        self.telling.forget_all([one[0].key for one in leaving])
        self.departures.add_all(leaving)

    def settle(self, timeline: Timeline, waiter: SettleWaiter, now: float) -> None:
        """Find out whether an entry was chosen, for a reader that can't tell from versions alone."""
        if timeline.chosen >= waiter.entry:
            self._finish(waiter.job, waiter.index, OK, timeline.chosen, timeline.dirty)
            return
        timeline.settles.append(waiter)
        if timeline.proposal is None:
            self.start(timeline, now)
        self.core.wake_at(waiter.deadline, timeline)

    def settle_quietly(self, timeline: Timeline, now: float) -> None:
        """Settle the open entry for a chore of our own: nobody waits for the answer."""
        if not timeline.settles:
            job = Job(NOBODY, bytearray(1), [0], 1, settle=True)
            self.settle(timeline, SettleWaiter(timeline.chosen + 1, now + QUIET_SETTLE_S, job, 0), now)

    # ---- a proposal's life

    def start(self, timeline: Timeline, now: float) -> None:
        """Begin a proposal for entry chosen+1 if anything waits for it."""
        if not (timeline.waiting or timeline.settles):
            return
        entry = timeline.chosen + 1
        if timeline.waiting and self._has_right(timeline):
            value = self._form(timeline, now)
            if value is not None:
                timeline.proposal = Proposal(entry, (0, self.core.life), ACCEPT, 0.0)
                self._send_accept(timeline, timeline.proposal, value, now)
                return
            if timeline.proposal is not None:
                return  # it asks its peers first
        if not timeline.settles and not self._eligible(timeline, now):
            return
        timeline.proposal = Proposal(entry, NO_BALLOT, PREPARE, 0.0)
        self._send_prepare(timeline, timeline.proposal, now)

    def _has_right(self, timeline: Timeline) -> bool:
        if timeline.promised != NO_BALLOT or timeline.accepted != NO_BALLOT:
            return False
        if timeline.chosen == 0:
            first = priority(timeline.key, self.core.replicas)[0]
            return first == self.core.replica and self.core.life[1] == FIRST_INCARNATION
        return timeline.origin == self.core.life

    def _send_prepare(self, timeline: Timeline, proposal: Proposal, now: float) -> None:
        number = max(timeline.promised[0], timeline.accepted[0], proposal.ballot[0], 0) + 1
        proposal.ballot = (number, self.core.life)
        proposal.phase = PREPARE
        self.departures.leave(proposal)
        proposal.promises.clear()
        proposal.votes.clear()
        proposal.resends = 0
        for asking in timeline.all_waiters():
            asking.prepared = proposal.ballot
        self.core.counters.add("prepares")
        batch = self.acceptor.promise(timeline, proposal.ballot)
        self._own_votes.append((batch, timeline.key, proposal.entry, proposal.ballot, PREPARE))
        self.core.broadcast(Prepare(timeline.key, proposal.entry, proposal.ballot))
        self._set_due(timeline, proposal, now)

    def _send_accept(self, timeline: Timeline, proposal: Proposal, value: Value, now: float) -> None:
        against = max(timeline.promised, timeline.accepted)
        if against > proposal.ballot:
            # Our own acceptor has promised somebody else meanwhile: its promise binds us like any other's.
            self._back_off(timeline, proposal, against, now)
            return
        proposal.phase = ACCEPT
        proposal.value = value
        proposal.votes.clear()
        proposal.resends = 0
        for request_id in value.request_ids:
            waiter = timeline.waiting.get(request_id)
            if waiter is not None:
                waiter.sent = True
        batch = self.acceptor.accept(timeline, proposal.ballot, value)
        self.telling.forget(timeline.key)  # `before` in the Accept tells peers that the entry before was chosen
        if proposal.ballot[0] == 0:
            proposal.due = now + self._pause_s(proposal)
            self.departures.add(timeline, proposal, batch)
            return
        self._own_votes.append((batch, timeline.key, proposal.entry, proposal.ballot, ACCEPT))
        self.core.broadcast(self._accept_message(timeline, proposal))
        self._set_due(timeline, proposal, now)

    def close_step(self) -> None:
        """Send what was proposed in round 0 since the last step ended."""
        self._own_votes += self.departures.close()

    def _accept_message(self, timeline: Timeline, proposal: Proposal) -> Accept:
        assert proposal.value is not None
        return Accept(timeline.key, proposal.entry, proposal.ballot, timeline.ballot, proposal.value)

    def _pause_s(self, proposal: Proposal) -> float:
        settings = self.core.settings
        return min(settings.accept_timeout_s * (1 << min(proposal.resends, 8)), settings.resend_max_s)

    def _set_due(self, timeline: Timeline, proposal: Proposal, now: float) -> None:
        proposal.due = now + self._pause_s(proposal)
        self.core.wake_at(proposal.due, timeline)

    # ---- answers of peers

    def on_promise(self, timeline: Timeline, sender: int, incarnation: int, message: Promise, now: float) -> None:
        """Count a promise; with a majority of them go on to Accept, with the value that they bind us to."""
        proposal = timeline.proposal
        if not self._is_about(proposal, message.entry, message.ballot, PREPARE):
            return
        assert proposal is not None
        proposal.promises[sender] = (message.accepted, message.value, incarnation)
        if len(self._current(proposal.promises)) < self.core.majority:
            return
        accepted, value, _ = max(proposal.promises.values(), key=lambda p: p[0])
        if accepted != NO_BALLOT:
            assert value is not None
            self._send_accept(timeline, proposal, value, now)
            return
        # A majority had accepted nothing when it promised, so nothing was chosen then. To a settler that tells what
        # it wants to know, if it asked before: a promise may be older than the question, and the entry chosen since.
        for settle in [s for s in timeline.settles if s.prepared == proposal.ballot]:
            timeline.settles.remove(settle)
            self._finish(settle.job, settle.index, OK, timeline.chosen, timeline.dirty)
        for waiter in timeline.waiting.values():
            if waiter.prepared == proposal.ballot:
                waiter.asked_peers = waiter.confirmed = True
        own = self._form(timeline, now)
        if own is None:
            timeline.proposal = None
            if timeline.waiting or timeline.settles:
                self.core.wake_at(now, timeline)
        else:
            self._send_accept(timeline, proposal, own, now)

    def on_accepted(self, timeline: Timeline, sender: int, incarnation: int, message: Accepted, now: float) -> None:
        """Count a vote; with a majority of them the entry is chosen."""
        proposal = timeline.proposal
        if not self._is_about(proposal, message.entry, message.ballot, ACCEPT):
            return
        assert proposal is not None
        proposal.votes[sender] = incarnation
        if proposal.flight is not None:
            proposal.flight.mixed = True
        if len(self._current(self._votes_of(proposal))) < self.core.majority:
            return
        self.telling.note_entry(timeline.key, proposal.entry, proposal.ballot, now)
        self._choose(timeline, proposal)

    @staticmethod
    def _votes_of(proposal: Proposal) -> dict[int, int]:
        return proposal.votes if proposal.flight is None else {**proposal.flight.votes, **proposal.votes}

    def _choose(self, timeline: Timeline, proposal: Proposal) -> None:
        if timeline.accepted != proposal.ballot:
            # The own acceptor has meanwhile accepted at a higher ballot; the entry is chosen all the same.
            assert proposal.value is not None
            self.acceptor.accept(timeline, proposal.ballot, proposal.value)
        self.acceptor.choose(timeline)

    def on_accepted_all(self, sender: int, incarnation: int, message: AcceptedAll, now: float) -> None:
        """Count a vote for all entries of a flight, or for all but some, whose answers come by themselves."""
        flight = self.departures.find(message.number) if message.life == self.core.life else None
        if flight is None:
            return  # decided, or so old that its entries are repeated one by one
        others = set(unpack_u32(message.others))
        if not others:
            self._count(flight, sender, incarnation, now)
            return
        for index, (timeline, proposal) in enumerate(flight.members):
            if index not in others and timeline.proposal is proposal:
                vote = Accepted(timeline.key, proposal.entry, (0, self.core.life))
                self.on_accepted(timeline, sender, incarnation, vote, now)

    def _count(self, flight: Flight, sender: int, incarnation: int, now: float) -> None:
        """Count a vote for all entries of a flight; with a majority of them all are chosen."""
        flight.votes[sender] = incarnation
        chosen = len(self._current(flight.votes)) >= self.core.majority
        if chosen:
            self.departures.decide(flight)
            self.telling.note_flight(flight.number, now)
        elif not flight.mixed:
            return
        live = [
            (timeline, proposal)
            for timeline, proposal in flight.members
            if timeline.proposal is proposal and proposal.flight is flight and proposal.phase == ACCEPT
        ]
        if chosen:
            entries = [(timeline, proposal.entry) for timeline, proposal in live]
            for timeline, _ in self.acceptor.choose_all(entries, self.core.first_ballot):
                open_one = timeline.proposal
                if open_one is not None and open_one.flight is flight and open_one.phase == ACCEPT:
                    self._choose(timeline, open_one)
            return
        for timeline, proposal in live:
            if proposal.votes:  # those of its own may make a majority with these
                vote = Accepted(timeline.key, proposal.entry, proposal.ballot)
                self.on_accepted(timeline, sender, incarnation, vote, now)

    def on_nack(self, timeline: Timeline, sender: int, message: Nack, now: float) -> None:
        """Step back for a random time that doubles, then prepare a higher round."""
        proposal = timeline.proposal
        if proposal is None or proposal.entry != message.entry or proposal.ballot != message.ballot:
            return
        if message.promised < message.ballot and message.ballot[0] > 0:
            return
        self._back_off(timeline, proposal, message.promised, now)

    def _back_off(self, timeline: Timeline, proposal: Proposal, against: Ballot, now: float) -> None:
        settings = self.core.settings
        timeline.backoff_s = min(max(timeline.backoff_s * 2, settings.backoff_s), settings.backoff_max_s)
        proposal.phase = BACKOFF
        self.departures.leave(proposal)
        proposal.attempts += 1
        proposal.ballot = (max(proposal.ballot[0], against[0]), self.core.life)
        proposal.due = now + self.core.rng.uniform(0, timeline.backoff_s)
        self.core.counters.add("backoffs")
        self.core.wake_at(proposal.due, timeline)

    @staticmethod
    def _is_about(proposal: Proposal | None, entry: int, ballot: Ballot, phase: str) -> bool:
        return (
            proposal is not None and proposal.entry == entry and proposal.ballot == ballot and proposal.phase == phase
        )

    def _current(self, votes: dict[int, int] | dict[int, tuple[Ballot, Value | None, int]]) -> list[int]:
        """Replicas whose vote was given by the incarnation that we know to be their present one."""
        lives = self.core.lives
        return [
            replica
            for replica, vote in votes.items()
            if replica == self.core.replica
            or (vote if isinstance(vote, int) else vote[2]) == lives.get(replica, (0, 0, 0))[1]
        ]

    @property
    def is_stirred(self) -> bool:
        """Whether anything was proposed in this step, or votes of our own wait to be durable."""
        return bool(self._own_votes) or self.departures.is_waiting

    @property
    def waits_for_disk(self) -> bool:
        """Whether votes of our own wait to be durable."""
        return bool(self._own_votes)

    def durable(self, now: float) -> None:
        """Count our own votes whose records are on disk."""
        self.close_step()
        ready = [vote for vote in self._own_votes if vote[0] <= self.core.durable]
        if not ready:
            return
        self._own_votes = [vote for vote in self._own_votes if vote[0] > self.core.durable]
        incarnation = self.core.life[1]
        for _, key, entry, ballot, phase in ready:
            if phase == FLIGHT:
                flight = self.departures.find(entry)
                if flight is not None:
                    self._count(flight, self.core.replica, incarnation, now)
                continue
            timeline = self.core.timeline(key)
            if phase == ACCEPT:
                self.on_accepted(timeline, self.core.replica, incarnation, Accepted(key, entry, ballot), now)
            elif timeline.chosen + 1 == entry:
                value = self.acceptor.accepted_value(timeline)
                promise = Promise(key, entry, ballot, timeline.accepted, value)
                self.on_promise(timeline, self.core.replica, incarnation, promise, now)

    # ---- chosen

    def on_chosen(self, timeline: Timeline, entry: int, request_ids: list[bytes], now: float) -> None:
        """An entry was chosen, by whomever: answer the requests that it serves and go on with the rest."""
        waiting = timeline.waiting
        for request_id in request_ids:
            waiter = waiting.get(request_id)
            if waiter is not None:
                self._drop(timeline, waiter, OK, entry)
        if timeline.settles:
            for settle in [s for s in timeline.settles if s.entry <= entry]:
                timeline.settles.remove(settle)
                self._finish(settle.job, settle.index, OK, entry, timeline.dirty)
        proposal = timeline.proposal
        if proposal is not None and proposal.entry <= entry:
            if waiting and proposal.value is not None and proposal.entry == entry > timeline.floor:
                # Not so when a state transfer went past the entry: what that entry served may be forgotten by now.
                for request_id in proposal.value.request_ids:
                    lost = timeline.waiting.get(request_id)
                    if lost is not None:
                        lost.sent = False  # the entry went to another value, so this attempt is surely not applied
            self.departures.leave(proposal)
            timeline.proposal = None
            timeline.backoff_s /= 2
        if (waiting or timeline.settles) and timeline.proposal is None:
            self.core.wake_at(now, timeline)

    # ---- time

    def wake(self, timeline: Timeline, now: float) -> None:
        """Deadlines, repeated messages, the end of a back-off, the start of what waited; then the next timer."""
        self._expire(timeline, now)
        self._go_on(timeline, now)
        dues = [waiter.deadline for waiter in timeline.all_waiters()]
        if timeline.proposal is not None:
            dues.append(timeline.proposal.due)
        if dues:
            self.core.wake_at(min(dues), timeline)

    def _expire(self, timeline: Timeline, now: float) -> None:
        for waiter in [w for w in timeline.waiting.values() if w.deadline <= now]:
            self._drop(timeline, waiter, UNKNOWN if waiter.sent else UNAVAILABLE, timeline.chosen)
        for settle in [s for s in timeline.settles if s.deadline <= now]:
            timeline.settles.remove(settle)
            self._finish(settle.job, settle.index, UNAVAILABLE, timeline.chosen, 0)

    def _go_on(self, timeline: Timeline, now: float) -> None:
        proposal = timeline.proposal
        if proposal is None:
            self.start(timeline, now)
            return
        if not (timeline.waiting or timeline.settles):
            # Nobody waits any more. What was accepted stays; a later read or write settles it.
            self.departures.leave(proposal)
            timeline.proposal = None
            return
        if now < proposal.due:
            return
        if proposal.phase == CATCH_UP:
            timeline.proposal = None
            self.start(timeline, now)
        elif proposal.phase == BACKOFF:
            self._send_prepare(timeline, proposal, now)
        else:
            self._resend(timeline, proposal, now)

    def _resend(self, timeline: Timeline, proposal: Proposal, now: float) -> None:
        """Repeat the open question, at the same ballot, to the peers that have not answered it."""
        if proposal.flight is not None and not proposal.flight.mixed:
            self._resend_flight(proposal.flight, now)
            return
        proposal.resends += 1
        self.core.counters.add("resends")
        again = (
            Prepare(timeline.key, proposal.entry, proposal.ballot)
            if proposal.phase == PREPARE
            else self._accept_message(timeline, proposal)
        )
        answered = self._current(proposal.promises if proposal.phase == PREPARE else self._votes_of(proposal))
        first_of_all = proposal.phase == ACCEPT and proposal.entry == 1 and proposal.ballot[0] == 0
        for peer in self.core.peers:
            if peer not in answered:
                self.core.send(peer, again, timeline.dirty if first_of_all else 0)
        self._set_due(timeline, proposal, now)

    def _resend_flight(self, flight: Flight, now: float) -> None:
        """The same for all entries of a flight, none of which has an answer of its own."""
        self.core.counters.add("resends")
        answered = self._current(flight.votes)
        for peer in self.core.peers:
            if peer not in answered:
                self.departures.send_again(flight, peer)
        waiting = [(t, proposal) for t, proposal in flight.members if t.proposal is proposal]
        for _, proposal in waiting:
            proposal.resends += 1
            proposal.due = now + self._pause_s(proposal)
        self.core.wake_all_at(min([proposal.due for _, proposal in waiting]), [timeline for timeline, _ in waiting])
