"""What a reader makes of a disk that is out: it goes elsewhere at once, and never takes a file on it for missing."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
from cold_model import cold_file, topology
from timetier.cluster.cold.block import DecodedBlock, read_index
from timetier.cluster.cold.block_cache import BlockCache
from timetier.cluster.cold.link import FORMAT
from timetier.cluster.counters import Counters
from timetier.cluster.effects import Call, Sleep
from timetier.cluster.errors import Corrupt, Unavailable
from timetier.cluster.memory.block_reads import BlockReader
from timetier.cluster.memory.hot_cold import StartOver
from timetier.cluster.messages import BlockBytes, Failure, LinkRef, Message
from timetier.cluster.routing import Routing
from timetier.cluster.suspicion import Suspicion

DATA = cold_file("a")
ENTRY = read_index(DATA).blocks[0]
REF = LinkRef(1, 0, FORMAT, "a", ENTRY.offset, ENTRY.length, ENTRY.crc, b"", b"\xff")
GOOD = BlockBytes(DATA[ENTRY.offset : ENTRY.offset + ENTRY.length])
AWAY = Failure("Unavailable", "disk 1 is failed", {"reason": "disk"})
MISSING = Failure("Corrupt", "a is missing", {"reason": "missing"})
DAMAGED = Failure("Corrupt", "a is damaged", {"reason": "checksum"})


class Reading:
    """Reads one block; `answers`: by replica in the order of asking, one for good, or one after the other."""

    def __init__(self, answers: Callable[[int, int], Message], deadline_s: float = 5.0) -> None:
        self.now = 0.0
        self.suspicion = Suspicion(lambda: self.now, first_s=0.1, longest_s=1.0)
        routing = Routing(topology())
        self.order = routing.cold_order(REF.bucket, REF.window_start)
        self.asked: list[str] = []
        self._answers = answers
        reader = BlockReader(
            routing,
            BlockCache[DecodedBlock](1 << 20),
            self.suspicion,
            Counters(),
            clock=lambda: self.now,
            attempt_timeout_s=0.5,
            back_off_s=0.05,
        )
        self._script = reader.read([REF], b"owner-000", deadline_s)

    def run(self) -> list[DecodedBlock]:
        """What the read brings, or raises."""
        answer: object = None
        while True:
            try:
                effect = self._script.send(answer)
            except StopIteration as end:
                blocks: list[DecodedBlock] = end.value
                return blocks
            if isinstance(effect, Sleep):
                self.now += effect.seconds
                answer = None
                continue
            assert isinstance(effect, list)
            answer = [self._answer(call) for call in effect]

    def _answer(self, call: Call) -> Message:
        turn = self.asked.count(call.node)
        self.asked.append(call.node)
        self.now += 0.001
        return self._answers(self.order.index(call.node), turn)


def test_the_next_replica_is_asked_at_once_and_nothing_is_held_against_the_node() -> None:
    reading = Reading(lambda replica, turn: AWAY if replica == 0 else GOOD)
    assert len(reading.run()) == 1
    assert reading.asked == reading.order[:2]
    assert reading.now < 0.01
    assert all(reading.suspicion.is_clean(node) for node in reading.order), "its other disks are well"


def test_a_block_with_one_copy_away_and_the_others_damaged_is_not_given_up_as_corrupt() -> None:
    reading = Reading(lambda replica, turn: AWAY if replica == 1 else DAMAGED)
    with pytest.raises(Unavailable):
        reading.run()
    back = Reading(lambda replica, turn: (AWAY if turn < 3 else GOOD) if replica == 1 else DAMAGED)
    assert len(back.run()) == 1


def test_a_file_that_is_away_on_one_node_and_missing_on_the_others_starts_the_read_over_but_is_never_called_lost() -> (
    None
):
    reading = Reading(lambda replica, turn: AWAY if replica == 2 else MISSING)
    with pytest.raises(StartOver) as caught:
        reading.run()
    assert not caught.value.file, "a read that has started over too often ends with Unavailable, not with Corrupt"
    gone = Reading(lambda replica, turn: MISSING)
    with pytest.raises(StartOver) as caught:
        gone.run()
    assert caught.value.file == "a"


def test_all_copies_damaged_is_corrupt_and_all_away_is_unavailable() -> None:
    with pytest.raises(Corrupt):
        Reading(lambda replica, turn: DAMAGED).run()
    with pytest.raises(Unavailable):
        Reading(lambda replica, turn: AWAY).run()


@pytest.mark.parametrize("seed", range(20))
def test_a_read_ends_well_as_soon_as_one_copy_is_good(seed: int) -> None:
    print(f"seed {seed}")
    random = Random(seed)
    until = [random.randrange(4) for _ in range(3)]
    kinds = [random.choice([AWAY, DAMAGED]) for _ in range(3)]
    kinds[random.randrange(3)] = AWAY  # else it is given up, rightly
    reading = Reading(lambda replica, turn: kinds[replica] if turn < until[replica] else GOOD)
    assert len(reading.run()) == 1
