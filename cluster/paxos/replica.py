"""One replica of a storage group, as a pure object: messages and time in, messages out.

    replica.write(now, token, message)      a client's write batch
    replica.settle(now, token, message)     a reader's question whether an entry was chosen
    replica.ask(now, token, message)        a reader's, a peer's or the sink's question
    replica.peer(now, sender, batch)        what another replica has to say
    replica.tick(now)                       time passes
    replica.durable(now, batch)             the engine has fsync'd its batches up to this one
    replica.take(now) -> Output             what may leave: replies by token, one batch a peer

The order that keeps it safe: hand the inputs in, `take` and send, `engine.commit()`, `engine.sync()`, `durable`,
`take` and send. What depends on a write stays in the outbox until `durable` has named its batch.

States: `joining` (before anything is answered the peers must confirm that they have noted this life, or one of them
if the other does not answer for a while: so a folder from the past is found out), `voting`, `fenced` (a peer has seen
another life of this replica, of which this folder does not know: it must not vote again), `learning` (its data was
lost; it takes entries and states, and is in no quorum).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..counters import Counters
from ..errors import InvalidRequest, Unavailable
from ..gate import overloaded
from ..keys import is_system
from ..messages import (
    NO_LIFE,
    Accept,
    Accepted,
    AcceptedAll,
    Accepts,
    AskAccepted,
    AskAges,
    AskChanged,
    AskChosen,
    AskDigests,
    AskOverlay,
    AskRestored,
    AskSame,
    AskTables,
    AskTimeline,
    AskVersions,
    Check,
    Checked,
    Chosen,
    ChosenAll,
    Dump,
    Dumped,
    Entries,
    Fetch,
    Life,
    Lives,
    Mend,
    Message,
    Nack,
    Overlay,
    PeerBatch,
    PeerMessage,
    Pong,
    Prepare,
    Promise,
    Restore,
    Scan,
    Scanned,
    Settle,
    SingleMessage,
    State,
    Unheard,
    Write,
    unpack_i64,
)
from ..storage.engine import Engine
from ..storage.version_cache import VersionCache
from .acceptor import Acceptor
from .age_scans import AgeScans
from .catchup import CatchUp
from .chores import Chores
from .core import Core, Settings
from .digests import DigestIndex
from .dumps import Dumps
from .flights import Arrivals
from .intake import MAX_TIMEOUT_MS, Intake
from .learning import Learning
from .links import LinkIndex
from .lives import decode_life, encode_life, follows, is_of_past
from .overlay import Overlays
from .peer_messages import is_sound, parts_of
from .proposer import Proposer
from .reads import Reads
from .restores import Restores
from .rows import life_key
from .scans import Scans
from .slices import Slices
from .timeline import Job, SettleWaiter, Timeline
from .timeline_facts import TimelineLooks

JOINING, VOTING, FENCED, LEARNING = "joining", "voting", "fenced", "learning"
Question = Check | AskVersions | AskSame | AskChosen | AskChanged | AskTables | AskAccepted | AskDigests | Mend | Scan
LongQuestion = Scan | AskOverlay | AskDigests | AskTimeline | AskAges | Dump | AskRestored
_FOR_LEARNERS = (Entries, State)
_OF_FLIGHTS = (Accepts, AcceptedAll, ChosenAll, Unheard)
HELLO_S = 0.2
JOIN_S = 1.0  # how long a further peer is waited for, when one has confirmed this life


@dataclass(slots=True)
class Output:
    """What may leave this replica: answers by the caller's token, and one batch for each peer that has any."""

    replies: list[tuple[int, Message]] = field(default_factory=list)
    peers: list[tuple[int, PeerBatch]] = field(default_factory=list)


class Replica:
    """See the module's text. `owned`: buckets of this group, ascending. `buckets`: of the whole cluster.

    `past`: boots of earlier lives of this folder in this incarnation, oldest first. `learner`: it lost its data.
    `versions`: of this life; None for a small one in memory.
    """

    def __init__(
        self,
        *,
        replica: int,
        replicas: int,
        life: Life,
        buckets: int,
        owned: Sequence[int],
        engine: Engine,
        settings: Settings,
        rng: random.Random,
        wall_us: Callable[[], int],
        counters: Counters,
        past: Sequence[int] = (),
        learner: bool = False,
        versions: VersionCache | None = None,
    ) -> None:
        self.core = Core(
            replica=replica,
            replicas=replicas,
            life=life,
            buckets=buckets,
            engine=engine,
            settings=settings,
            rng=rng,
            wall_us=wall_us,
            counters=counters,
            versions=versions,
        )
        self.owned = owned
        self._owned_set = self.core.owned = frozenset(owned)
        self.links = LinkIndex(self.core)
        self.acceptor = Acceptor(self.core)
        self.proposer = Proposer(self.core, self.acceptor)
        self.intake = Intake(self.core, self.proposer)
        self.arrivals = Arrivals(self.core, self.acceptor)
        self.catch_up = CatchUp(self.core, self.acceptor)
        self.chores = Chores(self.core, self.acceptor, self.links, self._settle_quietly)
        self.reads = Reads(self.core, self.acceptor, self.links)
        self.scans = Scans(self.core, self.links)
        self.overlays = Overlays(self.core, self.links)
        self.digests = DigestIndex(self.core, self.links)
        self.learning = Learning(self.core, self.acceptor)
        self.dumps = Dumps(self.core, self.catch_up)
        self.restores = Restores(self.core, self.catch_up)
        self.looks = TimelineLooks(self.core, self.links)
        self.ages = AgeScans(self.core, self.links)
        self.past = list(past)
        self.confirmed: set[int] = set()  # peers that have noted this life
        if learner:
            self.state, self.reason = LEARNING, "copying what was lost from its peers"
        elif self.core.peers:
            self.state, self.reason = JOINING, "waiting for a peer to confirm this life"
        else:
            self.state, self.reason = VOTING, ""
        self._now = 0.0
        self._hello_at = 0.0
        self._join_at = math.inf
        self._hello = False
        self._life_noted_in = 0  # engine batch that holds the last change of a peer's life
        self._mark_at: float | None = None
        self.core.on_chosen = self._on_chosen
        for peer in self.core.peers:
            row = engine.get(life_key(peer))
            if row is not None:
                self.core.lives[peer] = decode_life(row)
        self.core.standings.begin(owned)
        self.chores.recover()

    # ---- requests

    def require_voting(self) -> None:
        """Raises Unavailable unless this replica takes part in quorums."""
        if self.state != VOTING:
            reason = f"storage replica {self.core.replica} is {self.state}: {self.reason}"
            raise Unavailable(reason, retry_after_s=HELLO_S)

    def write(self, now: float, token: int, message: Write) -> None:
        """Take a write batch; its `Written` leaves by `token` when every request has an outcome."""
        self.require_voting()
        self._now = now
        self.intake.take(now, token, message)

    def settle(self, now: float, token: int, message: Settle) -> None:
        """Settle entries for a reader; the `Settled` leaves by `token`."""
        self.require_voting()
        self._now = now
        entries = unpack_i64(message.entries)
        self._require_owned(message.timelines)
        if len(entries) != len(message.timelines) or not entries:
            raise Unavailable("a Settle without timelines, or with another number of entries")
        job = Job(token, bytearray(len(entries)), [0] * len(entries), len(entries), settle=True)
        for key in message.timelines:
            self.core.timeline(key)  # one that can't be is refused before any other is begun
        deadline = now + min(message.timeout_ms, MAX_TIMEOUT_MS) / 1000
        self.core.counters.add("settles", len(entries))
        for index, (key, entry) in enumerate(zip(message.timelines, entries, strict=True)):
            self.proposer.settle(self.core.timeline(key), SettleWaiter(entry, deadline, job, index), now)

    def ask(self, now: float, token: int, message: Question) -> None:
        """Answer a question about what this replica has; the answer leaves by `token`, after what it depends on."""
        self.require_voting()
        self._now = now
        answer: Message
        if isinstance(message, Check):
            self._require_owned(message.timelines)
            answer, after = self.reads.check(message, now)
        elif isinstance(message, AskVersions):
            self._require_owned(message.timelines)
            answer, after = self.reads.versions(message)
        elif isinstance(message, AskSame):
            answer, after = self.reads.same(message)
        elif isinstance(message, AskChosen):
            answer, after = self.reads.chosen_list(message, self._owned_set), 0
        elif isinstance(message, AskChanged):
            answer, after = self.core.journal.answer(message), 0
        elif isinstance(message, AskTables):
            answer, after = self.scans.tables(message, self.owned), 0
        elif isinstance(message, AskAccepted):
            answer, after = self._accepted_list(message)
        elif isinstance(message, AskDigests):
            self._require_owned(message.timelines)
            answer, after = self.digests.answer(message, self._owned_set)
        elif isinstance(message, Mend):
            answer, after = self._mend(message, now), 0
        else:
            answer, after = self.scans.scan(message, self.owned)
        if isinstance(message, Check | AskVersions):
            for system in self.reads.doubts(now):
                self._settle_quietly(system, now)
        self.answer(token, answer, after)

    def slices(self, message: LongQuestion) -> Slices[tuple[Message, int]]:
        """The answer to a question about many rows, made a slice at a time, and what it depends on, for `answer`."""
        self.require_voting()
        if isinstance(message, Scan):
            return self.scans.slices(message, self.owned)
        if isinstance(message, AskOverlay):
            return self.overlays.slices(message)
        if isinstance(message, AskTimeline):
            self._require_owned([message.timeline])
            return self.looks.slices(message)
        if isinstance(message, AskAges):
            return self.ages.slices(message, self._owned_set)
        if isinstance(message, Dump):
            return self.dumps.slices(message, self._owned_set)
        if isinstance(message, AskRestored):
            return self.restores.slices(message, self._owned_set)
        self._require_owned(message.timelines)
        return self.digests.slices(message, self._owned_set)

    def begin_restore(self, now: float, token: int, restore: str, epoch: int, *, first: bool) -> None:
        """Take part in a restore; the `Pong` leaves by `token` when that is durable. See `Restores.begin`."""
        self.require_voting()
        self._now = now
        self.core.reply(token, Pong(), self.restores.begin(restore, epoch, first=first))

    def restore(self, now: float, token: int, message: Restore) -> None:
        """Have the states of a backup; the `Pong` leaves by `token` when they are durable."""
        self.require_voting()
        self._now = now
        self.core.reply(token, Pong(), self.restores.take(message))

    def answer(self, token: int, answer: Message, after: int) -> None:
        """Have an answer leave by `token` when batch `after` is durable. Raises Unavailable if too much waits."""
        if after > self.core.durable and not self.core.has_room(_answer_bytes(answer), after):
            raise overloaded(f"storage replica {self.core.replica}: too many answers wait for the disk")
        self.core.reply(token, answer, after)

    def _accepted_list(self, message: AskAccepted) -> tuple[Message, int]:
        learner = message.life[0]
        if self.core.lives.get(learner) != message.life or self._life_noted_in > self.core.durable:
            self._hello = True
            raise Unavailable(f"life {message.life} of replica {learner} is not noted yet", retry_after_s=HELLO_S)
        return self.learning.accepted_list(message, self._owned_set)

    def _mend(self, message: Mend, now: float) -> Pong:
        self._require_owned(message.timelines)
        if message.source not in self.core.peers:
            raise InvalidRequest(f"replica {message.source} is no peer of replica {self.core.replica}")
        for key in message.timelines:
            self.catch_up.mend(self.core.timeline(key), message.source, now)
        return Pong()

    def lives(self) -> Lives:
        """Who this replica is, and whom it knows; answered in any state, as far as it is durable."""
        if self._life_noted_in > self.core.durable:
            return Lives(self.core.life, False, [])
        return Lives(self.core.life, self.state == VOTING, list(self.core.lives.values()))

    def note_lives(self, lives: Sequence[Life]) -> None:
        """Take over from a peer which lives of the others it has noted, so that a learner fences what it fenced."""
        for life in lives:
            if life[0] in self.core.peers and life > self.core.lives.get(life[0], NO_LIFE):
                self._note_life(life)

    def begin_voting(self) -> None:
        """Everything was copied, verified and made durable: take part in quorums."""
        assert self.state == LEARNING, "only a learner begins to vote so"
        assert not self.proposer.waits_for_disk, "a learner proposes nothing"
        self.state, self.reason = VOTING, ""

    def _require_owned(self, timelines: list[bytes]) -> None:
        for key in timelines:
            if int.from_bytes(key[:4], "big") not in self._owned_set:
                raise Unavailable(f"bucket {int.from_bytes(key[:4], 'big')} belongs to another group: the map is old")

    # ---- peers

    def peer(self, now: float, sender: int, batch: PeerBatch) -> None:
        """Take what a peer has to say. Its life is noted durably before anything is answered."""
        self._now = now
        if sender not in self.core.peers or batch.life[0] != sender or min(batch.life) < 0:
            return
        mine = self.core.life
        if self._is_foreign(batch.incarnation_seen, batch.boot_seen):
            self.state = FENCED
            self.proposer.close_step()
            self.core.messages.clear()  # votes too
            self.reason = (
                f"replica {sender} has seen a life of this one that its folder does not know (incarnation "
                f"{batch.incarnation_seen}, boot {batch.boot_seen}; this is {mine[1]}, {mine[2]}): the folder is from "
                "the past"
            )
            return
        known = self.core.lives.get(sender)
        if known is not None and not follows(batch, known):
            self.core.counters.add("outdated_lives_refused")
            self._hello_at = min(self._hello_at, now + HELLO_S)  # from which it learns that there was another life
            return
        if batch.life != known:
            self._note_life(batch.life)
        if (batch.incarnation_seen, batch.boot_seen) == mine[1:]:
            self.confirmed.add(sender)
            if self.state == JOINING:
                self._join(now)
        if self.state not in (VOTING, LEARNING):
            return
        if len(batch.messages) > 1:
            self.core.load([message.timeline for message in batch.messages if isinstance(message, SingleMessage)])
        for message in batch.messages:
            if self.state == LEARNING and not isinstance(message, _FOR_LEARNERS):
                continue
            try:
                if not is_sound(message):
                    raise InvalidRequest("its columns don't fit")
                if isinstance(message, _OF_FLIGHTS):
                    self._peer_flight(now, sender, batch.life[1], message)
                elif int.from_bytes(message.timeline[:4], "big") in self._owned_set:
                    self._peer_message(now, sender, batch.life[1], message)
            except InvalidRequest:
                self.core.counters.add("malformed_peer_messages")

    def _settle_quietly(self, timeline: Timeline, now: float) -> None:
        """Settle for a chore. Not while learning: the own promise would be older than what is copied after it."""
        if self.state == VOTING:
            self.proposer.settle_quietly(timeline, now)

    def _join(self, now: float) -> None:
        """Vote, once every peer has confirmed this life; or one of them, and the other had time to object."""
        everybody = len(self.confirmed) == len(self.core.peers)
        if self.state == JOINING and (everybody or (self.confirmed and now >= self._join_at)):
            self.state, self.reason = VOTING, ""

    def _is_foreign(self, incarnation: int, boot: int) -> bool:
        """Whether a life of this replica that a peer has seen is neither the present one nor one of its past."""
        mine = self.core.life
        if (incarnation, boot) > mine[1:]:
            return True
        return incarnation == mine[1] and boot != mine[2] and not is_of_past(boot, self.past)

    def _note_life(self, life: Life) -> None:
        """Write down the greatest life of a peer. Nothing leaves for it before that is durable."""
        if life[1] != self.core.lives.get(life[0], NO_LIFE)[1]:
            self.confirmed.discard(life[0])  # that was an incarnation which is no more
        self.core.lives[life[0]] = life
        self.core.engine.put(life_key(life[0]), encode_life(life))
        self._life_noted_in = self.core.engine.sequence
        self._hello = True  # it may wait for our confirmation

    def _peer_flight(
        self, now: float, sender: int, incarnation: int, message: Accepts | AcceptedAll | ChosenAll | Unheard
    ) -> None:
        match message:
            case Accepts():
                self.arrivals.on_accepts(sender, message, now)
            case AcceptedAll():
                self.proposer.on_accepted_all(sender, incarnation, message, now)
            case ChosenAll():
                self.arrivals.on_chosen_all(sender, message, now)
            case Unheard():
                self.proposer.departures.on_unheard(sender, message)

    def _peer_message(self, now: float, sender: int, incarnation: int, message: SingleMessage) -> None:
        timeline = self.core.timeline(message.timeline)
        match message:
            case Accept():
                self.acceptor.on_accept(timeline, sender, message, now)
            case Accepted():
                self.proposer.on_accepted(timeline, sender, incarnation, message, now)
            case Chosen():
                self.acceptor.on_chosen(timeline, sender, message, now)
            case Prepare():
                self.acceptor.on_prepare(timeline, sender, message, now)
            case Promise():
                self.proposer.on_promise(timeline, sender, incarnation, message, now)
            case Nack():
                self.proposer.on_nack(timeline, sender, message, now)
            case Fetch():
                self.catch_up.on_fetch(timeline, sender, message)
            case Entries():
                self.catch_up.on_entries(timeline, sender, message, now)
            case State():
                self.catch_up.on_state(timeline, sender, message, now)

    def note_behind(self, now: float, peer: int, timeline: bytes, chosen: int) -> bool:
        """A comparison showed that `peer` has `chosen` entries: fetch what is missing. True if something is."""
        found = self.core.timeline(timeline)
        if found.chosen >= chosen:
            return False
        self.acceptor.fetch(found, peer, now)
        return True

    # ---- time and durability

    def tick(self, now: float) -> None:
        """Let deadlines, repeats and delayed notes happen."""
        self._now = now
        if self.state == JOINING:
            self._join_at = min(self._join_at, now + JOIN_S)
            self._join(now)
        for timeline in self.core.due(now):
            self.proposer.wake(timeline, now)
        self.proposer.telling.send(now)
        if self.core.unmarked and self._mark_at is None:
            self._mark_at = now + self.core.settings.mark_delay_s
        elif self._mark_at is not None and now >= self._mark_at:
            self.core.mark_all()
            self._mark_at = None
        if self.core.peers and now >= self._hello_at:
            waits = self.state == JOINING or (self.state == LEARNING and len(self.confirmed) < len(self.core.peers))
            self._hello_at = now + (HELLO_S if waits else 10 * HELLO_S)
            self._hello = True

    def next_due(self) -> float:
        """When `tick` has something to do next (monotonic seconds)."""
        due = self._hello_at if self.core.peers else math.inf
        for time in (self.core.next_due(), self.proposer.telling.next_due(), self._mark_at):
            if time is not None and time < due:
                due = time
        return due

    def durable(self, now: float, batch: int) -> None:
        """All engine batches up to `batch` are on disk."""
        self._now = now
        self.core.durable = max(self.core.durable, batch)
        self.core.versions.durable(batch)
        self.proposer.durable(now)

    def run_chores(self, now: float) -> bool:
        """Do a slice of background work; True if there is more."""
        self._now = now
        if self.state not in (VOTING, LEARNING):
            return False
        trims = self.core.journal.trim()
        return self.chores.run(now) or trims

    # ---- output

    def is_stirred(self, now: float) -> bool:
        """Whether the step has to end soon: something is to leave, was proposed, or is due. Else all that the step has
        done can wait for the end of another one."""
        core = self.core
        if core.messages or core.replies or self._hello or self.proposer.is_stirred:
            return True
        return self.next_due() <= now

    @property
    def waits_for_disk(self) -> bool:
        """Whether anything in the outbox, or an own vote, waits for the engine's log to be flushed."""
        durable = self.core.durable
        if self.proposer.waits_for_disk or self._life_noted_in > durable:
            return True
        for after, _, _ in self.core.messages:
            if after > durable:
                return True
        return any(after > durable for after, _, _ in self.core.replies)

    def answers(self) -> list[tuple[int, Message]]:
        """Answers that wait for nothing any more; they need not wait for the end of the step either."""
        core = self.core
        if not core.replies:
            return []
        core.versions.flush()  # before anything leaves
        durable = core.durable
        ready = [(token, message) for after, token, message in core.replies if after <= durable]
        if ready:
            core.replies = [reply for reply in core.replies if reply[0] > durable]
        return ready

    def take(self, now: float) -> Output:
        """What may leave now."""
        core = self.core
        core.versions.flush()  # before anything leaves, and while what has changed is in memory
        core.shrink()
        for timeline in core.due(now):
            self.proposer.wake(timeline, now)
        output = Output(self.answers())
        core.forget_sent()
        self.proposer.close_step()
        if self._life_noted_in > core.durable:
            return output  # a peer's life must be on disk before it hears from us
        leaving: dict[int, list[PeerMessage]] = {peer: [] for peer in core.peers} if self._hello else {}
        self._hello = False
        if core.messages:
            staying = []
            for after, peer, message in core.messages:
                if after <= core.durable:
                    leaving.setdefault(peer, []).append(message)
                else:
                    staying.append((after, peer, message))
            core.messages = staying
        for peer, messages in leaving.items():
            if messages:
                # First in the batch: a Prepare for the next entry behind it then finds its receiver up to date.
                messages[:0] = self.proposer.telling.take(peer)
            output.peers += [(peer, batch) for batch in self._batches(peer, messages)]
        return output

    def _batches(self, peer: int, messages: list[PeerMessage]) -> list[PeerBatch]:
        """Messages for one peer as frames of bounded size; normally one."""
        # A learner has lost the lives that it knew, so its word confirms no other's.
        known = NO_LIFE if self.state == LEARNING else self.core.lives.get(peer, NO_LIFE)
        _, incarnation, boot = known
        batches = parts_of(messages, self.core.settings.message_bytes)
        self.core.counters.add("peer_batches", len(batches))
        self.core.counters.add("peer_messages", len(messages))
        past = [] if peer in self.confirmed else self.past
        return [PeerBatch(self.core.life, incarnation, boot, batch, past) for batch in batches]

    def _on_chosen(self, timeline: Timeline, entry: int, request_ids: list[bytes]) -> None:
        if timeline.proposal is not None or timeline.waiting or timeline.settles or timeline.incoming is not None:
            self.proposer.on_chosen(timeline, entry, request_ids, self._now)
        if is_system(timeline.key):
            self.catch_up.on_system_chosen(timeline, self._now)
        if self.chores.tail_is_long(timeline) and not self.catch_up.keeps_tail(timeline):
            self.chores.trim(timeline)


def _answer_bytes(answer: Message) -> int:
    if isinstance(answer, Checked | Scanned):
        return 64 + sum(map(len, answer.values)) + sum(map(len, answer.keys)) + 100 * len(answer.keys)
    if isinstance(answer, Dumped):
        return 64 + sum(sum(map(len, state.rows)) + 100 * len(state.rows) for state in answer.states)
    if isinstance(answer, Overlay):
        links = sum(sum(map(len, part.links)) for part in answer.parts)
        return 64 + links + sum(sum(map(len, part.keys)) + 100 * len(part.keys) for part in answer.parts)
    return 64
