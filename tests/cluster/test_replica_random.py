"""Random schedules of the pure consensus core: loss, doubling, cuts, pauses, crashes that lose what was not synced.

Checked at every chosen entry of every life: one value per entry for ever, each request id in one entry only, a
conditional write alone and at its version. Checked at every answer: an acknowledged write is at its version, one that
was surely not applied never is, a strong read (votes, or a settled entry) is never older than what was acknowledged
or read before it began, and data of any kind is exactly what the history gives at the version that it comes with. At
the end faults stop, and everything must complete and agree.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from replica_group import Group, key_of
from timetier.cluster.keys import item_key
from timetier.cluster.messages import (
    CONFLICT,
    DELETE,
    DELTA,
    OK,
    POINT,
    PUT,
    RANGE,
    SAME,
    STALE,
    UNAVAILABLE,
    WIPE,
    AskVersions,
    Ballot,
    Check,
    Checked,
    Known,
    Message,
    Settle,
    Settled,
    Versions,
    Write,
    Written,
    pack_i64,
    pack_u32,
    unpack_i64,
)
from timetier.cluster.paxos.core import Settings
from timetier.cluster.paxos.replica import VOTING, Replica
from timetier.cluster.paxos.timeline import Timeline

OWNERS = [key_of(f"owner{n}") for n in range(3)]
ITEMS = [item_key(stamp, name) for stamp in range(6) for name in (b"", b"a")]
WINDOWS = [(16, 16), (4, 4), (3, 8)]  # remembered ids, kept entries
ALL = 10_000

Rows = dict[bytes, tuple[int, int, bytes]]  # item key -> version, kind, value


@dataclass
class Request:
    timeline: bytes
    id: bytes
    kinds: bytes
    keys: list[bytes]
    values: list[bytes]
    condition: int
    seen: int
    attempts: int = 0
    refusals: int = 0


@dataclass
class Reading:
    """A strong read under way. `floor`: the greatest version that it must not be older than."""

    timeline: bytes
    floor: int
    tokens: list[int]
    settling: bool = False


@dataclass
class Looking:
    """A `Check` under way: what was asked, and what the asker had."""

    timeline: bytes
    token: int
    want: int
    bound: bytes
    limit: int
    have: int


@dataclass
class History:
    """What was chosen, by whomever it was learnt first; any disagreement is a violation."""

    requests: dict[bytes, Request] = field(default_factory=dict)
    entries: dict[tuple[bytes, int], tuple[bytes, ...]] = field(default_factory=dict)
    applied: dict[bytes, tuple[bytes, int]] = field(default_factory=dict)
    floor: dict[bytes, int] = field(default_factory=lambda: dict.fromkeys(OWNERS, 0))  # acknowledged or read
    pages: dict[bytes, tuple[int, Rows]] = field(default_factory=dict)  # a reader's page of all items
    contents: dict[tuple[bytes, int], Rows] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def chosen(self, timeline: Timeline, entry: int, ids: list[bytes]) -> None:
        if not ids and entry <= timeline.floor:
            return  # a state transfer knows an old entry by its ids only, and the sender may have forgotten them
        known = self.entries.setdefault((timeline.key, entry), tuple(ids))
        assert known == tuple(ids), f"entry {entry} has two values"
        for request_id in ids:
            place = self.applied.setdefault(request_id, (timeline.key, entry))
            assert place == (timeline.key, entry), f"{request_id!r} was applied in {place} and {(timeline.key, entry)}"
            condition = self.requests[request_id].condition
            assert condition < 0 or (ids == [request_id] and entry == condition + 1), "a condition was passed over"

    def acknowledged(self, timeline: bytes, request_id: bytes, version: int) -> None:
        assert self.applied[request_id] == (timeline, version)
        self.floor[timeline] = max(self.floor[timeline], version)

    def content(self, timeline: bytes, version: int) -> Rows:
        """Newest rows of all items, tombstones too, as of a version."""
        if not version:
            return {}
        found = self.contents.get((timeline, version))
        if found is None:
            found = dict(self.content(timeline, version - 1))
            for request_id in self.entries[timeline, version]:
                request = self.requests[request_id]
                for kind, key, value in zip(request.kinds, request.keys, request.values, strict=True):
                    if kind == WIPE:
                        found.clear()
                    else:
                        found[key] = (version, kind, value)
            self.contents[timeline, version] = found
        return found

    def count(self, name: str) -> None:
        self.counts[name] = self.counts.get(name, 0) + 1


class Watched(Group):
    def __init__(self, seed: int, settings: Settings) -> None:
        self.history = History()
        self.readings: list[Reading] = []
        self.lookings: list[Looking] = []
        self.writings: list[tuple[int, list[Request], Replica]] = []
        super().__init__(seed, settings=settings)

    def start(self, number: int) -> None:
        super().start(number)
        core = self.replica(number).core
        inner = core.on_chosen

        def watched(timeline: Timeline, entry: int, ids: list[bytes]) -> None:
            self.history.chosen(timeline, entry, ids)
            inner(timeline, entry, ids)

        core.on_chosen = watched


# ---------------------------------------------------------------- what happens


def schedule(seed: int, steps: int) -> Watched:
    rng = random.Random(seed)
    ids, kept = rng.choice(WINDOWS)
    group = Watched(
        seed,
        Settings(
            request_id_entries=ids,
            log_keep_entries=kept,
            timelines_in_memory=2,
            transfer_bytes=rng.choice([100, 400]),
            mark_delay_s=rng.choice([0.01, 0.5, 60.0]),
            fetch_timeout_s=rng.choice([0.02, 1.0]),
        ),
    )
    group.loss, group.double = rng.choice([0.0, 0.05, 0.2]), rng.choice([0.0, 0.1])
    for _ in range(steps):
        act = rng.random()
        if act < 0.42:
            _write(group, rng, [_request(group, rng) for _ in range(rng.choice([1, 1, 2, 4]))])
        elif act < 0.50 and group.history.requests:
            again = rng.choices(list(group.history.requests.values())[-60:], k=rng.choice([1, 2]))
            _write(group, rng, again)  # a retry, perhaps elsewhere, perhaps much later
        elif act < 0.57:
            _read(group, rng)
        elif act < 0.66:
            _look(group, rng)
        elif act < 0.75:
            _fault(group, rng)
        elif act < 0.79:
            group.cut.add(frozenset(rng.sample(range(3), 2)))
        elif act < 0.87:
            group.cut.clear()
        group.run(rng.choice([0.001, 0.003, 0.02, 0.3]))
        _collect(group, rng)
    _finish(group, rng)
    return group


def _fault(group: Watched, rng: random.Random) -> None:
    victim = rng.randrange(3)
    if group.members[victim].replica is None:
        group.start(victim)
    elif victim in group.paused:
        group.resume(victim)
    elif rng.random() < 0.4:
        group.pause(victim)
    else:
        group.crash(victim)


def _request(group: Watched, rng: random.Random) -> Request:
    history = group.history
    timeline = rng.choice(OWNERS)
    number = len(history.requests)
    kinds, keys, values = bytearray(), [], []
    for index in range(rng.choice([1, 1, 2, 3])):
        kind = rng.choices([PUT, DELETE, WIPE], [70, 25, 5])[0]
        kinds.append(kind)
        keys.append(b"" if kind == WIPE else rng.choice(ITEMS))
        values.append(b"%d.%d" % (number, index) if kind == PUT else b"")
    condition = history.floor[timeline] if rng.random() < 0.2 else -1
    request = Request(
        timeline, number.to_bytes(16, "big"), bytes(kinds), keys, values, condition, history.floor[timeline]
    )
    history.requests[request.id] = request
    return request


def _write(group: Watched, rng: random.Random, requests: list[Request]) -> None:
    requests = list({request.id: request for request in requests}.values())
    message = Write(
        1,
        [request.timeline for request in requests],
        [request.id for request in requests],
        pack_i64([request.seen for request in requests]),
        pack_i64([request.condition for request in requests]),
        pack_u32([len(request.keys) for request in requests]),
        b"".join(request.kinds for request in requests),
        [key for request in requests for key in request.keys],
        [value for request in requests for value in request.values],
        rng.choice([50, 1000]),
    )
    replica = rng.randrange(3)
    if not group.votes(replica):
        return
    for request in requests:
        request.attempts += 1
    group.writings.append((group.send(replica, message), requests, group.replica(replica)))


def _read(group: Watched, rng: random.Random) -> None:
    """Begin a strong read: ask two or three replicas."""
    timeline = rng.choice(OWNERS)
    voters = [n for n in rng.sample(range(3), 3) if group.votes(n)][: rng.choice([2, 2, 3])]
    if len(voters) >= 2:
        floor = group.history.floor[timeline]
        group.readings.append(Reading(timeline, floor, [group.send(n, AskVersions([timeline])) for n in voters]))


def _look(group: Watched, rng: random.Random) -> None:
    """Ask one replica for data: with the reader's page for a delta, or for a range or an item."""
    timeline = rng.choice(OWNERS)
    number = rng.randrange(3)
    if not group.votes(number):
        return
    have = group.history.pages.get(timeline, (-1, {}))[0]
    want = rng.choice([DELTA, DELTA, RANGE, POINT])
    bound = rng.choice(ITEMS) if want == POINT else rng.choice([b"", rng.choice(ITEMS)]) if want == RANGE else b""
    limit = rng.choice([1, 2, 5]) if want == RANGE else ALL
    message = Check([timeline], pack_i64([have]), bytes((want,)), [bound], pack_u32([limit]))
    group.lookings.append(Looking(timeline, group.send(number, message), want, bound, limit, have))


# ---------------------------------------------------------------- what is checked


def _collect(group: Watched, rng: random.Random) -> None:
    for writing in list(group.writings):
        token, requests, _ = writing
        answer = group.answers.pop(token, None)
        if answer is not None:
            group.writings.remove(writing)
            _check_written(group.history, requests, answer)
    for reading in list(group.readings):
        _go_on_reading(group, rng, reading)
    for looking in list(group.lookings):
        data = group.answers.pop(looking.token, None)
        if data is not None:
            group.lookings.remove(looking)
            assert isinstance(data, Checked)
            _check_data(group.history, looking, data)


def _check_written(history: History, requests: list[Request], answer: Message) -> None:
    assert isinstance(answer, Written)
    for request, outcome, version in zip(requests, answer.outcomes, unpack_i64(answer.versions), strict=True):
        history.count(f"outcome {outcome}")
        if outcome == OK:
            history.acknowledged(request.timeline, request.id, version)
        elif outcome == CONFLICT:
            assert version != request.condition
        if outcome in (CONFLICT, STALE, UNAVAILABLE):
            request.refusals += 1  # surely not applied by this attempt


def _go_on_reading(group: Watched, rng: random.Random, reading: Reading) -> None:
    answers = [group.answers.get(token) for token in reading.tokens]
    if any(answer is None for answer in answers):
        return
    group.readings.remove(reading)
    for token in reading.tokens:
        del group.answers[token]
    if reading.settling:
        (settled,) = answers
        assert isinstance(settled, Settled)
        if settled.outcomes[0] == OK:
            _found(group.history, reading, unpack_i64(settled.versions)[0], "settled")
        return
    votes: list[tuple[int, Ballot | None]] = []
    for answer in answers:
        assert isinstance(answer, Versions)
        votes.append((unpack_i64(answer.chosen)[0], answer.opens[0].ballot if answer.opens else None))
    top = max(chosen for chosen, _ in votes)
    opens = [ballot for chosen, ballot in votes if chosen == top and ballot is not None]
    agreed = [ballot for ballot in opens if opens.count(ballot) >= 2]
    voters = [n for n in range(3) if group.votes(n)]
    if len(votes) - len(opens) >= 2:
        _found(group.history, reading, top, "read")
    elif agreed:
        _found(group.history, reading, top + 1, "read open")
        if voters:
            message = Check([reading.timeline], pack_i64([-1]), bytes((RANGE,)), [b""], pack_u32([ALL]))
            message.known = [Known(0, top + 1, agreed[0])]
            token = group.send(rng.choice(voters), message)
            group.lookings.append(Looking(reading.timeline, token, RANGE, b"", ALL, -1))
    elif voters:
        token = group.send(rng.choice(voters), Settle([reading.timeline], pack_i64([top + 1]), 500))
        group.readings.append(Reading(reading.timeline, reading.floor, [token], settling=True))


def _found(history: History, reading: Reading, version: int, how: str) -> None:
    history.count(how)
    assert version >= reading.floor, f"{how}: version {version} after {reading.floor} was acknowledged or read"
    history.floor[reading.timeline] = max(history.floor[reading.timeline], version)


def _check_data(history: History, looking: Looking, answer: Checked) -> None:
    """Data is what the history gives at the answered version, and makes the reader's page equal to it."""
    (chosen,) = unpack_i64(answer.chosen)
    if chosen < 0:
        return
    timeline, payload = looking.timeline, answer.payloads[0]
    content = history.content(timeline, chosen)
    rows = list(zip(answer.keys, unpack_i64(answer.versions), answer.kinds, answer.values, strict=True))
    history.count(f"payload {payload}")
    if payload == POINT:
        expected = content.get(looking.bound)
        assert [row[1:] for row in rows] == ([expected] if expected is not None else [])
        return
    if payload == SAME:
        assert chosen == looking.have
        return
    if payload == DELTA:
        page = dict(history.content(timeline, looking.have))
        for key, version, kind, value in rows:
            if kind == WIPE:
                page.clear()
            else:
                page[key] = (version, kind, value)
    else:
        page = {key: (version, kind, value) for key, version, kind, value in rows}
        assert list(page) == sorted(page, reverse=True)
        floor = answer.floors[0]
        content = {k: row for k, row in content.items() if k >= floor and (not looking.bound or k < looking.bound)}
        live = sum(kind == PUT for _, kind, _ in page.values())
        assert live <= looking.limit
        assert live == looking.limit or not floor
    assert page == content
    if not looking.bound and looking.limit == ALL:
        history.pages[timeline] = (chosen, page)


def _finish(group: Watched, rng: random.Random) -> None:
    """Faults stop: everything completes, and all replicas agree with the history."""
    group.loss = group.double = 0.0
    group.cut.clear()
    for number, member in enumerate(group.members):
        if member.replica is None:
            group.start(number)
        elif number in group.paused:
            group.resume(number)
    group.run_until(lambda: all(m.replica and m.replica.state == VOTING for m in group.members))
    group.run(3)
    _collect(group, rng)
    alive = [member.replica for member in group.members]
    assert not [requests for _, requests, replica in group.writings if replica in alive], "a request waits for ever"
    for timeline in OWNERS:
        version = _settled(group, timeline)
        assert version >= group.history.floor[timeline]
        for number in range(3):
            for peer in range(3):
                if peer != number:
                    there = group.replica(peer).core.timeline(timeline).chosen
                    group.replica(number).note_behind(group.now, peer, timeline, there)
            group.pump(number)
        group.run_until(
            lambda t=timeline, v=version: all(m.replica.core.timeline(t).chosen >= v for m in group.members)  # type: ignore[union-attr]
        )
        for number in range(3):
            message = Check([timeline], pack_i64([-1]), bytes((DELTA,)), [b""], pack_u32([ALL]))
            answer = group.call(number, message)
            assert isinstance(answer, Checked)
            assert unpack_i64(answer.chosen)[0] >= version
            _check_data(group.history, Looking(timeline, 0, DELTA, b"", ALL, -1), answer)
    for request in group.history.requests.values():
        if request.refusals == request.attempts:
            assert request.id not in group.history.applied, "applied, though each attempt said that it surely was not"


def _settled(group: Watched, timeline: bytes) -> int:
    chosen = max(group.replica(n).core.timeline(timeline).chosen for n in range(3))
    while True:
        answer = group.call(0, Settle([timeline], pack_i64([chosen + 1]), 5000))
        assert isinstance(answer, Settled)
        assert answer.outcomes[0] == OK, "settling must come to an end when faults have stopped"
        version = unpack_i64(answer.versions)[0]
        if version <= chosen:
            return chosen
        chosen = version


@pytest.mark.parametrize("seed", range(60))
def test_one_history_that_every_answer_agrees_with(seed: int) -> None:
    print(f"seed {seed}")
    schedule(seed, 120)


def test_the_schedules_reach_every_kind_of_answer() -> None:
    """Else the checks above would pass for want of anything to check."""
    counts: dict[str, int] = {}
    for seed in range(1000, 1012):
        for name, count in schedule(seed, 120).history.counts.items():
            counts[name] = counts.get(name, 0) + count
    print(counts)
    reached = {f"outcome {n}" for n in (OK, CONFLICT, STALE, UNAVAILABLE)} | {"read", "read open", "settled"}
    reached |= {f"payload {n}" for n in (SAME, DELTA, RANGE, POINT)}
    assert reached <= counts.keys()


if __name__ == "__main__":
    import sys
    import time

    began = time.perf_counter()
    low, high = int(sys.argv[1]), int(sys.argv[2])
    for one in range(low, high):
        try:
            schedule(one, 200)
        except Exception as error:
            print(f"seed {one}: {type(error).__name__}: {error}", flush=True)
    print(f"{high - low} seeds in {time.perf_counter() - began:.0f} s")
