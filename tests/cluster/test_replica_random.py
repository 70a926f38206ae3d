"""Random schedules of the pure consensus core: loss, doubling, cuts, crashes that lose what was not synced.

Checked at every chosen entry of every life: one value per entry for ever, each request id in one entry only. Checked
at every answer: an acknowledged write is at its version, and a strong read is never older than what was acknowledged
or read before it began. At the end faults stop, and everything must complete and agree.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from replica_group import Group, key_of, write_message
from timetier.cluster.keys import item_key
from timetier.cluster.messages import (
    CONFLICT,
    DELTA,
    OK,
    PUT,
    AskVersions,
    Check,
    Checked,
    Settle,
    Settled,
    Versions,
    Written,
    pack_i64,
    pack_u32,
    unpack_i64,
)
from timetier.cluster.paxos.core import Settings, Timeline
from timetier.cluster.paxos.replica import VOTING

OWNERS = [key_of(f"owner{n}") for n in range(3)]
SETTINGS = Settings(request_id_entries=16, log_keep_entries=16, timelines_in_memory=2, transfer_bytes=200)


@dataclass
class Request:
    timeline: bytes
    id: bytes
    token: int
    replica: int
    deadline: float
    condition: int
    seen: int


class History:
    """What was chosen, by whomever it was learnt first; any disagreement is a violation."""

    def __init__(self) -> None:
        self.entries: dict[tuple[bytes, int], tuple[bytes, ...]] = {}
        self.applied: dict[bytes, tuple[bytes, int]] = {}
        self.floor: dict[bytes, int] = dict.fromkeys(OWNERS, 0)  # greatest version acknowledged or read

    def chosen(self, timeline: bytes, entry: int, ids: list[bytes]) -> None:
        known = self.entries.setdefault((timeline, entry), tuple(ids))
        assert known == tuple(ids), f"entry {entry} has two values"
        for request_id in ids:
            place = self.applied.setdefault(request_id, (timeline, entry))
            assert place == (timeline, entry), f"request {request_id!r} was applied in {place} and {(timeline, entry)}"

    def acknowledged(self, timeline: bytes, request_id: bytes, version: int) -> None:
        if request_id in self.applied:
            assert self.applied[request_id] == (timeline, version)
        self.floor[timeline] = max(self.floor[timeline], version)

    def content(self, timeline: bytes, version: int) -> set[bytes]:
        """Ids of all requests applied up to a version (each wrote one item named after its id)."""
        found: set[bytes] = set()
        for entry in range(1, version + 1):
            found.update(self.entries[timeline, entry])
        return found


class Watched(Group):
    def __init__(self, seed: int) -> None:
        self.history = History()
        super().__init__(seed, settings=SETTINGS)

    def start(self, number: int) -> None:
        super().start(number)
        core = self.replica(number).core
        inner = core.on_chosen

        def watched(timeline: Timeline, entry: int, ids: list[bytes]) -> None:
            # A state transfer knows old entries by ids only, in the same shape; trimmed records may lack them.
            self.history.chosen(timeline.key, entry, ids)
            inner(timeline, entry, ids)

        core.on_chosen = watched


def schedule(seed: int, steps: int) -> Watched:
    rng = random.Random(seed)
    group = Watched(seed)
    history = group.history
    requests: list[Request] = []
    number = 0
    group.loss, group.double = rng.choice([0.0, 0.05, 0.2]), rng.choice([0.0, 0.1])
    for _ in range(steps):
        act = rng.random()
        if act < 0.45:
            number += 1
            timeline = rng.choice(OWNERS)
            request_id = seed.to_bytes(8, "big") + number.to_bytes(8, "big")
            condition = history.floor[timeline] if rng.random() < 0.2 else -1
            _send(group, requests, Request(timeline, request_id, 0, 0, 0.0, condition, history.floor[timeline]), rng)
        elif act < 0.55 and requests:
            _send(group, requests, rng.choice(requests), rng)  # a retry, perhaps elsewhere, perhaps much later
        elif act < 0.65:
            _read(group, rng)
        elif act < 0.72:
            victim = rng.randrange(3)
            if group.members[victim].replica is not None:
                group.crash(victim)
            else:
                group.start(victim)
        elif act < 0.77:
            group.cut.add(frozenset(rng.sample(range(3), 2)))
        elif act < 0.85:
            group.cut.clear()
        group.run(rng.choice([0.001, 0.003, 0.02, 0.3]))
        _collect(group, requests)
    _finish(group, requests)
    return group


def _send(group: Watched, requests: list[Request], request: Request, rng: random.Random) -> None:
    replica = rng.randrange(3)
    message = write_message(
        request.timeline,
        request.id,
        [(int.from_bytes(request.id[8:], "big") % 50, request.id, request.id)],
        seen=request.seen,
        if_version=request.condition,
        timeout_ms=rng.choice([50, 1000]),
    )
    token = group.send(replica, message)
    if token > 0:
        requests.append(
            Request(request.timeline, request.id, token, replica, group.now, request.condition, request.seen)
        )


def _collect(group: Watched, requests: list[Request]) -> None:
    for request in requests:
        answer = group.answers.pop(request.token, None)
        if answer is None:
            continue
        assert isinstance(answer, Written)
        outcome, version = answer.outcomes[0], unpack_i64(answer.versions)[0]
        if outcome == OK:
            group.history.acknowledged(request.timeline, request.id, version)
            if request.condition >= 0:
                assert version == request.condition + 1, "a conditional write was applied at another version"
        elif outcome == CONFLICT:
            assert version != request.condition


def _read(group: Watched, rng: random.Random) -> None:
    """A strong read by two replicas' answers of one instant each; skipped when votes alone do not tell."""
    timeline = rng.choice(OWNERS)
    voters = [n for n in rng.sample(range(3), 3) if group.votes(n)]
    if len(voters) < 2:
        return
    floor = group.history.floor[timeline]
    tokens = [group.send(n, AskVersions([timeline])) for n in voters[:2]]
    group.run(0.01)
    answers = [group.answers.pop(token, None) for token in tokens]
    if not all(isinstance(answer, Versions) for answer in answers):
        return
    found = [(unpack_i64(a.chosen)[0], a.opens[0].ballot if a.opens else None) for a in answers]  # type: ignore[union-attr]
    top = max(chosen for chosen, _ in found)
    opens = [ballot for chosen, ballot in found if chosen == top and ballot is not None]
    if opens and not (len(opens) == 2 and opens[0] == opens[1]):
        return
    version = top + bool(opens)
    assert version >= floor, f"a strong read found version {version} after {floor} was acknowledged or read"
    group.history.floor[timeline] = max(group.history.floor[timeline], version)


def _finish(group: Watched, requests: list[Request]) -> None:
    """Faults stop: everything completes, and all replicas agree with the history."""
    group.loss = group.double = 0.0
    group.cut.clear()
    for number, member in enumerate(group.members):
        if member.replica is None:
            group.start(number)
    group.run_until(lambda: all(m.replica and m.replica.state == VOTING for m in group.members))
    group.run(3)
    _collect(group, requests)
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
            _compare(group, number, timeline, version)


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


def _compare(group: Watched, number: int, timeline: bytes, version: int) -> None:
    message = Check([timeline], pack_i64([-1]), bytes((DELTA,)), [b""], pack_u32([10_000]))
    answer = group.call(number, message)
    assert isinstance(answer, Checked)
    assert unpack_i64(answer.chosen)[0] >= version
    shown = {value for kind, value in zip(answer.kinds, answer.values, strict=True) if kind == PUT}
    assert shown == group.history.content(timeline, unpack_i64(answer.chosen)[0])
    assert answer.keys == sorted(answer.keys, reverse=True)
    assert all(item_key(0) <= key for key in answer.keys)


@pytest.mark.parametrize("seed", [167, 227, 1176])
def test_the_own_acceptors_promise_binds_the_own_proposer(seed: int) -> None:
    """Schedules in which a replica promised a peer's higher ballot between its own Prepare and its own Accept."""
    print(f"seed {seed}")
    schedule(seed, 200)


@pytest.mark.parametrize("seed", range(40))
def test_one_value_per_entry_and_nothing_acknowledged_is_lost(seed: int) -> None:
    print(f"seed {seed}")
    schedule(seed, 120)


if __name__ == "__main__":
    import sys
    import time

    began = time.perf_counter()
    low, high = int(sys.argv[1]), int(sys.argv[2])
    for one in range(low, high):
        try:
            schedule(one, 200)
        except Exception as error:
            print(f"seed {one}: {type(error).__name__}: {error}")
    print(f"{high - low} seeds in {time.perf_counter() - began:.0f} s")
