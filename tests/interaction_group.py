"""A storage group driven by hand: nothing happens by itself.

Real replicas over engines in memory. A message that a replica sends flies until it is delivered or dropped, what it
writes is volatile until it syncs, and each replica's own clock stands until it is ticked. What happens is noted in
`events`, one line of text each.

Checked throughout, whatever a script does: all replicas and all their lives apply one value per entry, and no request
is applied by two entries.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from interaction_text import BUCKETS, ballot_text, id_text, life_text, message_text, timeline_text, value_text
from memory_engine import MemoryEngine
from timetier.cluster.counters import Counters
from timetier.cluster.messages import NO_BALLOT, Accepts, Life, Message, PeerBatch, PeerMessage, decode, encode
from timetier.cluster.paxos.core import Settings
from timetier.cluster.paxos.flights import singles
from timetier.cluster.paxos.replica import FENCED, JOIN_S, JOINING, VOTING, Replica
from timetier.cluster.paxos.rows import log_entry, log_key
from timetier.cluster.paxos.timeline import Timeline

MAX_ROUNDS = 1_000  # of `stabilize`: a group that does not come to rest is an error


def _one_by_one(messages: list[PeerMessage]) -> list[PeerMessage]:
    """Messages with each timeline's Accept by itself, so that a script can drop and delay it."""
    return [one for message in messages for one in (singles(message) if isinstance(message, Accepts) else [message])]


class MiddleOfTheRange(random.Random):
    """Randomness without surprise: every pause lasts half of its bound."""

    def random(self) -> float:
        return 0.5


@dataclass(slots=True)
class Flight:
    """One message on its way; a batch without messages tells of its sender's life alone (`Hello`)."""

    source: int
    target: int
    batch: PeerBatch

    @property
    def message(self) -> PeerMessage | None:
        return self.batch.messages[0] if self.batch.messages else None

    def __str__(self) -> str:
        return f"r{self.source}->r{self.target} {message_text(self.message)}"


@dataclass(slots=True)
class Member:
    """One replica's process, disk and clock."""

    engine: MemoryEngine = field(default_factory=MemoryEngine)
    life: Life = (0, 1, 0)
    replica: Replica | None = None
    past: list[int] = field(default_factory=list)  # boots of earlier lives of this folder
    learner: bool = False
    now: float = 0.0
    paused: bool = False
    waits: bool = False  # for its disk, as noted last
    state: str = ""  # of its replica, as noted last


class HandDriven:
    """See the module's text. `on_answer(replica, token, message)` is called with each answer to a request."""

    def __init__(self, replicas: int, settings: Settings) -> None:
        self.settings = settings
        self.events: list[str] = []
        self.flights: list[Flight] = []
        self.members = [Member(life=(number, 1, 0)) for number in range(replicas)]
        self.on_answer: Callable[[int, int, Message], None] = lambda _r, _t, _m: None
        self._entries: dict[tuple[bytes, int], tuple[Life, list[bytes]]] = {}
        self._applied: dict[tuple[bytes, bytes], int] = {}
        for number in range(replicas):
            self.start(number)
        self.greet()

    def replica(self, number: int) -> Replica:
        found = self.members[number].replica
        assert found is not None, f"r{number} is down"
        return found

    def up(self) -> list[int]:
        """Replicas whose process runs."""
        return [n for n, member in enumerate(self.members) if member.replica is not None and not member.paused]

    # ---- lives

    def start(self, number: int, boot: int = 0) -> None:
        """Begin the next life of a replica, by default with the boot number that follows."""
        member = self.members[number]
        last = member.life[2]
        member.past += [last] if last else []
        member.life = (number, member.life[1], boot or last + 1)
        replica = Replica(
            replica=number,
            replicas=len(self.members),
            life=member.life,
            buckets=BUCKETS,
            owned=range(BUCKETS),
            engine=member.engine,
            settings=self.settings,
            rng=MiddleOfTheRange(),
            wall_us=lambda: 1_000_000,
            counters=Counters(),
            past=member.past,
            learner=member.learner,
        )
        inner = replica.core.on_chosen

        def on_chosen(timeline: Timeline, entry: int, request_ids: list[bytes]) -> None:
            self._check(number, timeline, entry, request_ids)
            inner(timeline, entry, request_ids)

        replica.core.on_chosen = on_chosen
        member.replica, member.state = replica, replica.state
        replica.tick(member.now)
        self.after_step(number)

    def join(self, number: int) -> None:
        """Have all greet each other, and as much time pass as a replica waits for peers that are down."""
        self.greet()
        if self.replica(number).state == JOINING:
            self.tick(number, JOIN_S)
            self.greet()

    def greet(self) -> None:
        """Have all replicas that are up exchange and fsync who they are."""
        for _ in range(MAX_ROUNDS):
            hellos = [flight for flight in self.flights if flight.message is None and flight.target in self.up()]
            if not hellos:
                return
            for flight in hellos:
                self.flights.remove(flight)
                self.deliver(flight)
            for number in self.up():
                self.sync(number)
        raise AssertionError("the replicas greet each other without end")

    def crash(self, number: int, keep: int) -> None:
        """End a process. Of the writes that were not fsync'd the first `keep` have reached the disk."""
        member = self.members[number]
        lost = max(0, member.engine.unsynced - keep)
        self.events.append(f"r{number} is down" + (f", {lost} writes lost that were not fsync'd" if lost else ""))
        member.replica, member.paused, member.waits = None, False, False
        member.engine.crash(keep)

    def lose_disk(self, number: int) -> None:
        """All data of a replica that is down is gone: its next life is the first of a further incarnation."""
        member = self.members[number]
        assert member.replica is None, f"r{number} is up: crash it first"
        lost = Member(life=(number, member.life[1] + 1, 0), learner=True, now=member.now)
        self.members[number] = lost

    def copy_disk(self, number: int) -> Member:
        """A copy of the folder of a replica that is down."""
        assert self.members[number].replica is None, f"r{number} is up: crash it first"
        return copy.deepcopy(self.members[number])

    def put_back(self, number: int, folder: Member) -> None:
        """Replace a folder by an earlier copy of it."""
        member = self.members[number]
        assert member.replica is None, f"r{number} is up: crash it first"
        self.members[number] = replace(folder, engine=copy.deepcopy(folder.engine), now=member.now)

    # ---- steps

    def after_step(self, number: int) -> None:
        """Let out what may leave after a replica has taken an input, and note what became of it."""
        member = self.members[number]
        replica = self.replica(number)
        if replica.state != member.state:
            member.state = replica.state
            self.events.append(f"r{number} is {replica.state}")
        output = replica.take(member.now)
        for token, answer in output.replies:
            self.on_answer(number, token, decode(encode(answer)))
        sent: dict[str, list[int]] = {}
        for peer, batch in output.peers:
            for message in _one_by_one(batch.messages) or (None,):
                flight = self._flight(number, peer, batch, message)
                if message is not None or self._is_news(flight):
                    self.flights.append(flight)
                    sent.setdefault(message_text(message), []).append(peer)
        for text, peers in sent.items():
            self.events.append(f"r{number} sends {','.join(f'r{peer}' for peer in peers)}: {text}")
        member.engine.commit()
        if replica.waits_for_disk and not member.waits:
            self.events.append(f"r{number} waits for its disk")
        member.waits = replica.waits_for_disk

    @staticmethod
    def _flight(source: int, target: int, batch: PeerBatch, message: PeerMessage | None) -> Flight:
        messages = [message] if message is not None else []
        alone = PeerBatch(batch.life, batch.incarnation_seen, batch.boot_seen, messages, batch.past)
        decoded = decode(encode(alone))
        assert isinstance(decoded, PeerBatch)
        return Flight(source, target, decoded)

    def _is_news(self, flight: Flight) -> bool:
        """Whether a greeting tells its receiver anything. The others, one every 2 s, would only fill the scripts."""
        target = self.members[flight.target].replica
        batch = flight.batch
        if target is None:
            return False
        is_of_now = (batch.incarnation_seen, batch.boot_seen) == target.core.life[1:]
        return target.core.lives.get(flight.source) != batch.life or (
            target.state != FENCED and (flight.source not in target.confirmed or not is_of_now)
        )

    def deliver(self, flight: Flight) -> None:
        """Have a message arrive."""
        number = flight.target
        if self.members[number].replica is None:
            self.events.append(f"r{number} is down: lost {message_text(flight.message)}")
            return
        self.events.append(f"r{number} receives from r{flight.source}: {message_text(flight.message)}")
        self.replica(number).peer(self.members[number].now, flight.source, flight.batch)
        self.after_step(number)

    def sync(self, number: int) -> None:
        """The disk has all that the replica has written."""
        member = self.members[number]
        replica = self.replica(number)
        replica.durable(member.now, member.engine.sync())
        self.after_step(number)

    def tick(self, number: int, seconds: float) -> None:
        """Move one replica's clock on, and let it see the time."""
        member = self.members[number]
        member.now = round(member.now + seconds, 6)
        self.replica(number).tick(member.now)
        self.after_step(number)

    def stabilize(self, numbers: Iterable[int]) -> None:
        """Sync and deliver among these replicas until nothing is left; then 5 ms pass, and all that again."""
        numbers = list(numbers)
        for delayed in (False, True):
            if delayed:
                for number in numbers:
                    self.tick(number, 0.005)
            self._exhaust(numbers)
        for number in numbers:
            self.sync(number)
        self._exhaust(numbers)

    def rest(self) -> None:
        """Come to rest, and let a second pass, after which all that is known is on all disks."""
        self.stabilize(self.up())
        for _ in range(2):
            for number in self.up():
                self.tick(number, 0.5)
                self.sync(number)
        self._exhaust(self.up())

    def _exhaust(self, numbers: list[int]) -> None:
        for _ in range(MAX_ROUNDS):
            ready = [f for f in self.flights if f.source in numbers and f.target in numbers]
            waiting = [n for n in numbers if self.replica(n).waits_for_disk]
            if not ready and not waiting:
                return
            for number in waiting:
                self.sync(number)
            for flight in ready:
                self.flights.remove(flight)
                self.deliver(flight)
        raise AssertionError(f"the group does not come to rest in {MAX_ROUNDS} rounds")

    # ---- what must hold whatever happens

    def _check(self, number: int, timeline: Timeline, entry: int, request_ids: list[bytes]) -> None:
        key = timeline.key
        newest = entry == timeline.chosen
        origin, ids = self._entries.setdefault((key, entry), (timeline.origin, request_ids))
        assert ids == request_ids, (
            f"r{number} applies {timeline_text(key)}/{entry} with {list(map(id_text, request_ids))}, "
            f"but it was chosen with {list(map(id_text, ids))}"
        )
        assert not newest or timeline.origin == origin, f"the origin of {timeline_text(key)}/{entry} has changed"
        for request_id in request_ids:
            first = self._applied.setdefault((key, request_id), entry)
            assert first == entry, f"request {id_text(request_id)} was applied by entries {first} and {entry}"
        if newest:
            listed = ",".join(map(id_text, request_ids))
            self.events.append(f"r{number} applies {timeline_text(key)}/{entry} [{listed}]")

    # ---- what a replica knows

    def describe(self, number: int, key: bytes) -> str:
        """One replica's state of a timeline."""
        member = self.members[number]
        if member.replica is None:
            return "down"
        core = member.replica.core
        timeline = core.timeline(key)
        parts = [f"chosen {timeline.chosen}"]
        if timeline.chosen:
            origin = "" if timeline.origin == timeline.ballot[1] else f" (origin {life_text(timeline.origin)})"
            parts[0] += f" at {ballot_text(timeline.ballot)}{origin}"
        if timeline.promised != NO_BALLOT:
            parts.append(f"promised {ballot_text(timeline.promised)}")
        value = member.replica.acceptor.accepted_value(timeline)
        if value is not None:
            verb = "knows of" if timeline.learned else "accepted"
            parts.append(f"{verb} {value_text(value)} at {ballot_text(timeline.accepted)}")
        proposal = timeline.proposal
        if proposal is not None:
            at = "" if proposal.ballot == NO_BALLOT else f" at {ballot_text(proposal.ballot)}"
            parts.append(f"proposes {proposal.entry}{at} ({proposal.phase})")
        if timeline.floor:
            end = log_key(key, timeline.chosen + 1)
            kept = [log_entry(name) for name, _ in member.engine.scan(log_key(key, 0), end)]
            parts.append(f"floor {timeline.floor}" + (f", records {kept[0]}..{kept[-1]}" if kept else ""))
        if timeline.wiped:
            parts.append(f"wiped up to {timeline.wiped}")
        if timeline.dirty > core.durable:
            parts.append("not on disk yet")
        mood = "paused" if member.paused else member.replica.state
        return ("" if mood == VOTING else f"{mood}, ") + ", ".join(parts)
