"""State transfers of timelines that are large and written all the time: they end, and the log is bounded again."""

from __future__ import annotations

import pytest
from replica_group import Group, key_of, write_message
from timetier.cluster.keys import priority
from timetier.cluster.messages import Check, Checked, pack_i64, pack_u32
from timetier.cluster.paxos.catchup import TRANSFER_TAILS
from timetier.cluster.paxos.core import Settings
from timetier.cluster.paxos.rows import log_key, prefix_end, rows_prefix

ALICE = key_of("alice")
FIRST, SECOND, THIRD = priority(ALICE, 3)
SETTINGS = Settings(log_keep_entries=16, request_id_entries=8, transfer_bytes=400)
ITEMS = 600


def rid(number: int) -> bytes:
    return number.to_bytes(16, "big")


class BusyGroup:
    """A group in which one timeline gets an entry every few milliseconds, whatever else happens."""

    def __init__(self, seed: int) -> None:
        self.group = Group(seed, settings=SETTINGS)
        self.requests = 0
        self.next_at = 0.0

    def write(self) -> None:
        self.requests += 1
        item = (self.requests % ITEMS, b"", b"%d" % self.requests)
        # The version is not waited for; a sender that names the present one is never too old.
        seen = self.group.replica(FIRST).core.timeline(ALICE).chosen
        self.group.send(FIRST, write_message(ALICE, rid(self.requests), [item], seen=seen))

    def fill(self, entries: int) -> None:
        for _ in range(entries):
            self.requests += 1
            item = (self.requests % ITEMS, b"", b"%d" % self.requests)
            self.group.put(FIRST, ALICE, rid(self.requests), [item], seen=self.requests - 1)

    def run_busily_until(self, condition: object, limit_s: float) -> float:
        """Step with a write every 4 ms. The time that it took."""
        began = self.group.now
        while not condition():  # type: ignore[operator]
            assert self.group.now < began + limit_s, "it never gets across"
            if self.group.now >= self.next_at:
                self.write()
                self.next_at = self.group.now + 0.004
            self.group.step()
        return self.group.now - began

    def log_entries(self, number: int) -> int:
        engine = self.group.members[number].engine
        return len(list(engine.scan(log_key(ALICE, 0), log_key(ALICE, 1 << 40))))

    def rows_of(self, number: int) -> tuple[int, dict[bytes, bytes]]:
        answer = self.group.call(number, Check([ALICE], pack_i64([-1]), b"\x01", [b""], pack_u32([2 * ITEMS])))
        assert isinstance(answer, Checked)
        return answer.chosen[0], dict(zip(answer.keys, answer.values, strict=True))


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_large_timeline_gets_across_while_it_is_written(seed: int) -> None:
    busy = BusyGroup(seed)
    group = busy.group
    group.crash(THIRD)
    busy.fill(2 * ITEMS)
    group.start(THIRD)
    group.run_until(lambda: group.votes(THIRD))
    behind = group.replica(THIRD)
    source = group.replica(FIRST)

    def is_current() -> bool:
        timeline = behind.core.timeline(ALICE)
        if timeline.chosen < 2 * ITEMS:
            behind.note_behind(group.now, FIRST, ALICE, source.core.timeline(ALICE).chosen)
            group.pump(THIRD)
        return timeline.chosen >= source.core.timeline(ALICE).chosen - 2

    busy.run_busily_until(is_current, limit_s=10.0)
    assert source.core.timeline(ALICE).chosen - 2 * ITEMS > 2 * SETTINGS.log_keep_entries, "the tail went on meanwhile"
    counted = source.core.counters.totals
    assert counted["state_pieces_sent"] > 5
    assert behind.core.counters.totals["states_installed"] == 1, "it came in one go"

    for _ in range(3 * SETTINGS.log_keep_entries):
        busy.write()
        group.run(0.004)
    group.run(1.0)
    assert busy.log_entries(FIRST) <= 2 * SETTINGS.log_keep_entries + 1, "the tail is bounded as before"
    assert busy.rows_of(THIRD) == busy.rows_of(FIRST)


def test_a_receiver_that_goes_away_holds_the_log_up_only_so_long() -> None:
    busy = BusyGroup(4)
    group = busy.group
    group.crash(THIRD)
    busy.fill(2 * ITEMS)
    group.start(THIRD)
    group.run_until(lambda: group.votes(THIRD))
    group.replica(THIRD).note_behind(group.now, FIRST, ALICE, 2 * ITEMS)
    group.pump(THIRD)
    pieces = group.replica(FIRST).core.counters.totals
    group.run_until(lambda: pieces.get("state_pieces_sent", 0) >= 2)
    group.crash(THIRD)
    longest = 0
    for _ in range((TRANSFER_TAILS + 4) * SETTINGS.log_keep_entries):
        busy.fill(1)
        longest = max(longest, busy.log_entries(FIRST))
    assert 4 * SETTINGS.log_keep_entries < longest <= (TRANSFER_TAILS + 2) * SETTINGS.log_keep_entries
    assert busy.log_entries(FIRST) <= 2 * SETTINGS.log_keep_entries + 1


def damage(group: Group, number: int) -> None:
    """Another value in each row of a replica, behind its back."""
    engine = group.members[number].engine
    prefix = rows_prefix(ALICE)
    for name, row in list(engine.scan(prefix, prefix_end(prefix))):
        engine.put(name, row[:-1] + bytes((row[-1] ^ 1,)))
    engine.commit()


def digest_of(group: Group, number: int, at: int) -> bytes | None:
    replica = group.replica(number)
    return replica.digests.of(replica.core.timeline(ALICE), at)[0]


@pytest.mark.parametrize("writing", [False, True])
def test_a_large_timeline_is_mended_also_while_it_is_written(writing: bool) -> None:
    busy = BusyGroup(5)
    group = busy.group
    busy.fill(2 * ITEMS)
    group.run(1.0)
    damage(group, THIRD)
    assert digest_of(group, THIRD, 2 * ITEMS) != digest_of(group, FIRST, 2 * ITEMS)
    mended = group.replica(THIRD)
    mended.catch_up.mend(mended.core.timeline(ALICE), FIRST, group.now)
    group.pump(THIRD)
    installed = mended.core.counters.totals

    def is_installed() -> bool:
        return installed.get("states_installed", 0) == 1

    if writing:
        busy.run_busily_until(is_installed, limit_s=10.0)
        assert group.replica(FIRST).core.timeline(ALICE).chosen > 2 * ITEMS + SETTINGS.log_keep_entries
    else:
        group.run_until(is_installed)
    group.run(1.0)
    version = group.replica(FIRST).core.timeline(ALICE).chosen
    assert mended.core.timeline(ALICE).chosen == version
    digests = [digest_of(group, number, version) for number in range(3)]
    assert digests[0] is not None
    assert digests[0] == digests[1] == digests[2]
    assert busy.rows_of(THIRD) == busy.rows_of(FIRST)
    group.crash(THIRD)
    group.start(THIRD)
    group.run_until(lambda: group.votes(THIRD))
    assert busy.rows_of(THIRD) == busy.rows_of(FIRST)
