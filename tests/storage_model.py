"""A small model of one storage group and its cold group, for readers: what replicas answer, step by step.

Each timeline has a true log: entry e is in it from the moment at which a majority has accepted it at one ballot. A
replica knows a prefix of it (it lags), may have accepted the next entry, and may have evicted rows that one of its
links covers. The world can be driven by hand, or left to `noise`, which does one random legal thing.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import google_crc32c
from timetier.cluster.cold.block import FileBuilder, decode_block
from timetier.cluster.cold.rows import Rows as BlockRows
from timetier.cluster.effects import Call, CallFailed, Script, Sleep
from timetier.cluster.keys import (
    MIN_TIMESTAMP,
    digest_seed,
    item_key,
    split_item_key,
    timeline_digest,
    timeline_key,
    timestamp_floor,
)
from timetier.cluster.messages import (
    DELETE,
    DELTA,
    OK,
    POINT,
    PUT,
    RANGE,
    SAME,
    UNAVAILABLE,
    WIPE,
    AskSame,
    AskVersions,
    Ballot,
    BlockBytes,
    BlockRead,
    Check,
    Checked,
    Failure,
    LinkRef,
    Links,
    Message,
    Open,
    Ping,
    Pong,
    Same,
    Settle,
    Settled,
    Versions,
    decode,
    encode,
    pack_i64,
    pack_u32,
    unpack_i64,
    unpack_u32,
)
from timetier.cluster.topology import Topology

BUCKETS = 128
DIGEST_SEED = digest_seed("00")  # of `topology`
WINDOW = 10
Mutation = tuple[int, bytes, bytes]  # kind, item key, value
Entry = list[Mutation]
UP, DEAD, PAUSED = "up", "dead", "paused"


def topology(replicas: int = 3, cache_nodes: int = 1, groups: int = 1) -> Topology:
    return Topology("c", "n", 1, BUCKETS, groups, replicas, 1, 3, 2, cache_nodes, {}, None, {}, "00")


def key_of(owner: str) -> bytes:
    return timeline_key(b"t", owner.encode(), BUCKETS)


@dataclass
class Window:
    """What one link says: rows of versions up to `version` in a window are in these blocks."""

    start: int
    version: int
    refs: list[LinkRef]


@dataclass
class Replica:
    """One replica's knowledge, by timeline."""

    number: int
    state: str = UP
    applied: dict[bytes, int] = field(default_factory=dict)
    accepted: dict[bytes, tuple[Ballot, Entry]] = field(default_factory=dict)
    promised: dict[bytes, Ballot] = field(default_factory=dict)
    links: dict[bytes, dict[int, Window]] = field(default_factory=dict)
    floor: dict[bytes, int] = field(default_factory=dict)
    lags: bool = False  # it has not applied the last horizon
    unsure: bool = False  # it has accepted a horizon, and does not know whether that was chosen

    @property
    def name(self) -> str:
        return f"storage-0-{self.number}"


@dataclass
class ColdNode:
    name: str
    state: str = UP
    lies: bool = False  # sends damaged bytes as if they were good
    files: dict[str, bytearray] = field(default_factory=dict)


class World:
    """Replicas `storage-0-*`, cold nodes `cold-0-*`, true logs, and time."""

    def __init__(self, seed: int, *, replicas: int = 3) -> None:
        self.random = random.Random(seed)
        self.now = 100.0
        self.replicas = [Replica(number) for number in range(replicas)]
        self.cold = [ColdNode(f"cold-0-{number}") for number in range(3)]
        self.truth: dict[bytes, list[Entry]] = {}
        self.votes: dict[tuple[bytes, int, Ballot], set[int]] = {}
        self.in_flight: list[tuple[bytes, int, Ballot, Entry, int]] = []
        self.windows: dict[bytes, dict[int, Window]] = {}
        self.horizon = MIN_TIMESTAMP
        self.noisy = False
        self.answers_ahead = False  # a replica answers also when its links are ahead of it
        self.sent: list[tuple[str, Message]] = []
        self.on_call: Callable[[Call], None] = lambda _call: None
        self._rounds = 100
        self._files = 0

    @property
    def majority(self) -> int:
        return len(self.replicas) // 2 + 1

    # ------------------------------------------------------------ truth

    def log(self, timeline: bytes) -> list[Entry]:
        return self.truth.setdefault(timeline, [])

    def items(self, timeline: bytes, version: int) -> dict[bytes, tuple[bytes, int]]:
        """Visible items as of a version, by key: (value, version)."""
        items: dict[bytes, tuple[bytes, int]] = {}
        for number, entry in enumerate(self.log(timeline)[:version], start=1):
            for kind, key, value in entry:
                if kind == WIPE:
                    items.clear()
                elif kind == DELETE:
                    items.pop(key, None)
                else:
                    items[key] = (value, number)
        low = timestamp_floor(self.horizon)
        return {key: item for key, item in items.items() if key >= low}

    def wiped(self, timeline: bytes, version: int) -> int:
        wipes = [n for n, e in enumerate(self.log(timeline)[:version], 1) if any(m[0] == WIPE for m in e)]
        return max(wipes, default=1) - 1

    # ------------------------------------------------------------ Paxos, one step at a time

    def accept(self, number: int, timeline: bytes, entry: int, ballot: Ballot, value: Entry) -> bool:
        """Have a replica accept, if the rules let it."""
        replica = self.replicas[number]
        if replica.applied.get(timeline, 0) != entry - 1:
            return False
        present = replica.accepted.get(timeline)
        if ballot < replica.promised.get(timeline, ballot) or (present is not None and ballot < present[0]):
            return False
        replica.accepted[timeline] = (ballot, value)
        voters = self.votes.setdefault((timeline, entry, ballot), set())
        voters.add(number)
        if len(voters) >= self.majority:
            log = self.log(timeline)
            if len(log) == entry - 1:
                log.append(value)
            assert log[entry - 1] == value, "the model chose two values"
        return True

    def learn(self, number: int, timeline: bytes) -> bool:
        """Have a replica apply the next chosen entry, if there is one."""
        replica = self.replicas[number]
        applied = replica.applied.get(timeline, 0)
        if applied >= len(self.log(timeline)):
            return False
        replica.applied[timeline] = applied + 1
        replica.accepted.pop(timeline, None)
        replica.promised.pop(timeline, None)
        return True

    def write(self, timeline: bytes, entry: Entry, *, learners: tuple[int, ...] | None = None) -> int:
        """A whole write: accepted by a majority of those that are up, applied by `learners` (default: all up)."""
        number = len(self.log(timeline)) + 1
        self._rounds += 1
        ballot = (self._rounds, (self.replicas[0].number, 1, 1))
        live = [r.number for r in self.replicas if r.state == UP]
        if learners is not None:
            live = sorted(live, key=lambda n: n not in learners)[: max(self.majority, len(learners))]
        assert len(live) >= self.majority
        for replica in live:
            while self.replicas[replica].applied.get(timeline, 0) < number - 1:
                self.learn(replica, timeline)
            assert self.accept(replica, timeline, number, ballot, entry)
        for replica in live if learners is None else learners:
            self.learn(replica, timeline)
        return number

    def put(self, timeline: bytes, timestamp: int, value: bytes = b"v", **more: Any) -> int:
        return self.write(timeline, [(PUT, item_key(timestamp), value)], **more)

    def _propose(self, timeline: bytes) -> None:
        """Some replica begins a proposal: its Accepts are under way from then on."""
        proposer = self.random.choice(self.replicas)
        entry = proposer.applied.get(timeline, 0) + 1
        self._rounds += 1
        ballot: Ballot = (self._rounds, (proposer.number, 1, 1))
        asked = self.random.sample(self.replicas, self.majority)
        if any(r.applied.get(timeline, 0) != entry - 1 or r.state != UP for r in asked):
            return
        found = [r.accepted[timeline] for r in asked if timeline in r.accepted]
        value = max(found, key=lambda pair: pair[0])[1] if found else self._random_entry()
        for replica in asked:
            replica.promised[timeline] = ballot
        self.in_flight += [(timeline, entry, ballot, value, r.number) for r in self.replicas]

    def _random_entry(self) -> Entry:
        roll = self.random.random()
        if roll < 0.04:
            return [(WIPE, b"", b"")]
        count = self.random.choice((1, 1, 1, 3))
        kind = DELETE if roll < 0.25 else PUT
        keys = {item_key(self.random.randrange(60), self.random.choice((b"", b"a"))) for _ in range(count)}
        return [(kind, key, self.random.randbytes(3) if kind == PUT else b"") for key in sorted(keys)]

    def settle(self, number: int, timeline: bytes, entry: int) -> tuple[int, int]:
        """(outcome, version) of a settle at one replica; it may break off at any point."""
        replica = self.replicas[number]
        while replica.applied.get(timeline, 0) < entry - 1 and self.learn(number, timeline):
            pass
        applied = replica.applied.get(timeline, 0)
        if applied >= entry:
            return OK, applied
        peers = [r for r in self.replicas if r is not replica and r.state == UP]
        self.random.shuffle(peers)
        asked = [replica, *peers[: self.majority - 1]]
        if len(asked) < self.majority:
            return UNAVAILABLE, applied
        for peer in asked:
            while peer.applied.get(timeline, 0) < entry - 1 and self.learn(peer.number, timeline):
                pass
        if any(peer.applied.get(timeline, 0) >= entry for peer in asked):
            self.learn(number, timeline)
            return OK, replica.applied[timeline]
        self._rounds += 1
        ballot: Ballot = (self._rounds, (number, 1, 1))
        for peer in asked:
            peer.promised[timeline] = ballot
        found = [peer.accepted[timeline] for peer in asked if timeline in peer.accepted]
        if not found:
            return OK, applied
        value = max(found, key=lambda pair: pair[0])[1]
        for peer in asked:
            if self.noisy and self.random.random() < 0.2:
                return UNAVAILABLE, applied
            self.accept(peer.number, timeline, entry, ballot, value)
        self.learn(number, timeline)
        return OK, replica.applied[timeline]

    # ------------------------------------------------------------ cold tier

    def sink(self, timeline: bytes, start: int, *, block_rows: int = 3) -> Window:
        """Write one window's items, as of the present, to the cold nodes; no replica knows of the link yet."""
        version = len(self.log(timeline))
        owner = timeline[7:]
        items = self.items(timeline, version)
        rows = BlockRows()
        for key in sorted(items):
            if start <= split_item_key(key)[0] < start + WINDOW:
                rows.append(owner, key, items[key][0], items[key][1], 1000 + items[key][1])
        self._files += 1
        file = f"file-{self._files}"
        builder = FileBuilder(file, table=b"t", per_second=1, cold_group=0, run="r")
        bucket = int.from_bytes(timeline[:4], "big")
        blocks = builder.add(
            rows, bucket=bucket, window_start=start, window_end=start + WINDOW, generation=1, block_rows=block_rows
        )
        data = builder.finish()
        for node in self.cold:
            node.files[file] = bytearray(data)
        refs = [LinkRef(bucket, start, 1, b.file, b.offset, b.length, b.crc, b.low, b.high) for b in blocks]
        window = Window(start, version, refs)
        self.windows.setdefault(timeline, {})[start] = window
        return window

    def apply_link(self, number: int, timeline: bytes, window: Window) -> None:
        """The replica learns of a link, and evicts what it covers."""
        self.replicas[number].links.setdefault(timeline, {})[window.start] = window

    def _rows(self, replica: Replica, timeline: bytes) -> list[tuple[bytes, int, int, bytes]]:
        """(key, version, kind, value) that the replica holds, newest first."""
        rows = []
        links = replica.links.get(timeline, {})
        for version, entry in enumerate(self.log(timeline)[: replica.applied.get(timeline, 0)], start=1):
            for kind, key, value in entry:
                if kind == WIPE:
                    continue
                window = links.get(split_item_key(key)[0] // WINDOW * WINDOW)
                if window is None or version > window.version:
                    rows.append((key, version, kind, value))
        return sorted(rows, reverse=True)

    # ------------------------------------------------------------ what a replica answers

    def answer(self, replica: Replica, message: Message) -> Message:
        if isinstance(message, AskVersions):
            chosen = [replica.applied.get(t, 0) for t in message.timelines]
            horizons = pack_i64([self._horizon_at(replica)] * len(chosen))
            opens = self._opens(replica, message.timelines)
            unsure = pack_u32(range(len(chosen)) if replica.unsure else [])
            return Versions(pack_i64(chosen), opens, horizons=horizons, unsure=unsure, mark=self._mark(replica))
        if isinstance(message, AskSame):
            return self._same(replica, message)
        if isinstance(message, Settle):
            pairs = [
                self.settle(replica.number, t, e)
                for t, e in zip(message.timelines, unpack_i64(message.entries), strict=True)
            ]
            return Settled(bytes(p[0] for p in pairs), pack_i64([p[1] for p in pairs]))
        assert isinstance(message, Check)
        return self._check(replica, message)

    def _same(self, replica: Replica, message: AskSame) -> Same:
        digests = [message.digests[at : at + 16] for at in range(0, len(message.digests), 16)]
        named = {timeline_digest(timeline, DIGEST_SEED): timeline for timeline in self.truth}
        others = [
            index
            for index, (digest, version) in enumerate(zip(digests, unpack_i64(message.versions), strict=True))
            if digest not in named
            or named[digest] in replica.accepted
            or replica.applied.get(named[digest], 0) != version
        ]
        return Same(pack_u32(others), self._mark(replica))

    def _mark(self, replica: Replica) -> int:
        horizon = self.horizon if replica.unsure else self._horizon_at(replica)
        return (horizon - MIN_TIMESTAMP) % (1 << 60) * 5 + replica.number + 1

    def _horizon_at(self, replica: Replica) -> int:
        return MIN_TIMESTAMP if replica.lags or replica.unsure else self.horizon

    def _opens(self, replica: Replica, timelines: list[bytes]) -> list[Open]:
        return [Open(i, replica.accepted[t][0]) for i, t in enumerate(timelines) if t in replica.accepted]

    def _check(self, replica: Replica, message: Check) -> Checked:
        for known in message.known:
            timeline = message.timelines[known.index]
            accepted = replica.accepted.get(timeline)
            if accepted and accepted[0] == known.ballot and replica.applied.get(timeline, 0) == known.entry - 1:
                assert self.learn(replica.number, timeline), "a reader's proof was wrong"
        columns: list[list[tuple[bytes, int, int, bytes]]] = []
        payloads, floors, links = bytearray(), [], []
        limits, have = unpack_u32(message.limits), unpack_i64(message.have)
        for index, timeline in enumerate(message.timelines):
            payload, rows, floor, refs = self._one(
                replica, timeline, have[index], message.wants[index], message.bounds[index], limits[index]
            )
            payloads.append(payload)
            columns.append(rows)
            floors.append(floor)
            if refs:
                links.append(Links(index, refs))
        chosen = [self._answers_as_of(replica, t) for t in message.timelines]
        flat = [row for rows in columns for row in rows]
        return Checked(
            pack_i64(chosen),
            self._opens(replica, message.timelines),
            bytes(payloads),
            pack_u32([len(rows) for rows in columns]),
            bytes(row[2] for row in flat),
            [row[0] for row in flat],
            [row[3] for row in flat],
            pack_i64([row[1] for row in flat]),
            pack_i64([1000 + row[1] for row in flat]),
            pack_i64([self.wiped(t, max(c, 0)) for t, c in zip(message.timelines, chosen, strict=True)]),
            pack_i64([self._horizon_at(replica)] * len(chosen)),
            floors,
            links,
            mark=self._mark(replica),
        )

    def _answers_as_of(self, replica: Replica, timeline: bytes) -> int:
        """-1 for a replica that has applied a link, but not yet all that the link's blocks hold."""
        if replica.unsure:
            return -1
        applied = replica.applied.get(timeline, 0)
        covered = max([w.version for w in replica.links.get(timeline, {}).values()], default=0)
        return -1 if covered > applied and not self.answers_ahead else applied

    def _one(
        self, replica: Replica, timeline: bytes, have: int, want: int, bound: bytes, limit: int
    ) -> tuple[int, list[tuple[bytes, int, int, bytes]], bytes, list[LinkRef]]:
        applied = replica.applied.get(timeline, 0)
        if want == DELTA and have == applied:
            return SAME, [], b"", []
        if want == DELTA and replica.floor.get(timeline, 0) <= have < applied:
            entries = enumerate(self.log(timeline)[have:applied], start=have + 1)
            return DELTA, [(key, v, kind, value) for v, entry in entries for kind, key, value in entry], b"", []
        newest: dict[bytes, tuple[bytes, int, int, bytes]] = {}
        for row in self._rows(replica, timeline):
            newest.setdefault(row[0], row)
        wiped = self.wiped(timeline, applied)
        rows = [row for row in newest.values() if row[1] > wiped]
        links = [w for _, w in sorted(replica.links.get(timeline, {}).items(), reverse=True)]
        if want == POINT:
            found = [row for row in rows if row[0] == bound]
            refs = [r for w in links for r in w.refs if r.low <= bound < r.high]
            return POINT, found, b"", [] if found else refs
        before = b"" if want == DELTA else bound
        rows = [row for row in rows if not before or row[0] < before]
        floor, live = b"", 0
        for at, row in enumerate(rows):
            live += row[2] == PUT
            if live >= max(limit, 1) and at + 1 < len(rows):
                rows, floor = rows[: at + 1], row[0]
                break
        chosen_refs: list[LinkRef] = []
        for window in links:
            refs = [r for r in window.refs if r.high > floor and (not before or r.low < before)]
            if chosen_refs and refs and self.noisy and self.random.random() < 0.2:
                floor = max(floor, timestamp_floor(window.start + WINDOW))
                rows = [row for row in rows if row[0] >= floor]
                break
            chosen_refs += refs
        return RANGE, rows, floor, chosen_refs

    def cold_answer(self, node: ColdNode, message: Message) -> Message:
        if isinstance(message, Ping):
            return Pong()
        assert isinstance(message, BlockRead)
        file = node.files.get(message.file)
        if file is None:
            return Failure("Corrupt", f"{message.file} is missing", {"reason": "missing"})
        data = bytes(file[message.offset : message.offset + message.length])
        if not node.lies and google_crc32c.value(data) != message.crc:
            return Failure("Corrupt", f"{message.file} is damaged", {"reason": "checksum"})
        if node.lies or not message.owner:
            return BlockBytes(data)
        part = decode_block(data, message.format).part_of(message.owner)
        return BlockBytes(part, True, google_crc32c.value(part))

    # ------------------------------------------------------------ noise

    def noise(self) -> None:
        """One random thing that may happen at any moment."""
        timeline = self.random.choice(list(self.truth))
        number = self.random.randrange(len(self.replicas))
        roll = self.random.random()
        if roll < 0.2:
            self._propose(timeline)
        elif roll < 0.6 and self.in_flight:
            message = self.in_flight.pop(self.random.randrange(len(self.in_flight)))
            if self.random.random() < 0.8 and self.replicas[message[4]].state == UP:
                self.accept(message[4], *message[:4])
        elif roll < 0.85:
            if self.replicas[number].state == UP:
                self.learn(number, timeline)
        elif roll < 0.9:
            self.sink(timeline, self.random.randrange(6) * WINDOW)
        elif roll < 0.95:
            windows = self.windows.get(timeline)
            if windows and self.replicas[number].state == UP:
                self.apply_link(number, timeline, self.random.choice(list(windows.values())))
        else:
            applied = self.replicas[number].applied.get(timeline, 0)
            self.replicas[number].floor[timeline] = self.random.randint(0, applied)

    # ------------------------------------------------------------ driving scripts

    def call(self, call: Call) -> Message | CallFailed:
        """One call, over encoded frames."""
        self.on_call(call)
        self.sent.append((call.node, call.message))
        node: Replica | ColdNode
        if call.node.startswith("cold"):
            node = next(n for n in self.cold if n.name == call.node)
        else:
            node = self.replicas[int(call.node.rpartition("-")[2])]
        if node.state == DEAD:
            return CallFailed(call.node, "does not run", False)
        if node.state == PAUSED:
            return CallFailed(call.node, f"no answer within {call.timeout_s} s", True)
        message = decode(encode(call.message))
        if isinstance(node, ColdNode):
            return decode(encode(self.cold_answer(node, message)))
        return decode(encode(self.answer(node, message)))

    def carry_out(self, effect: list[Call] | Sleep) -> Any:
        """Result of one effect; calls of one effect are answered in random order, with things happening between."""
        if isinstance(effect, Sleep):
            self.now += effect.seconds
            self._disturb()
            return self.now
        results: list[Any] = [None] * len(effect)
        waited_s = 0.0005
        for index in self.random.sample(range(len(effect)), len(effect)):
            self._disturb()
            results[index] = self.call(effect[index])
            if isinstance(results[index], CallFailed) and results[index].sent:
                waited_s = max(waited_s, effect[index].timeout_s)
        self.now += waited_s
        return results

    def _disturb(self) -> None:
        if self.noisy:
            for _ in range(self.random.choice((0, 0, 1, 2, 6))):
                self.noise()

    def drive(self, script: Script[Any]) -> Any:
        """Result of a script."""
        try:
            effect = next(script)
            while True:
                effect = script.send(self.carry_out(effect))
        except StopIteration as stop:
            return stop.value
