"""Whom a replica that lost its data believes, before it copies anything."""

from __future__ import annotations

import pytest
from timetier.cluster.effects import CallFailed, Sleep
from timetier.cluster.messages import Life, Lives, Message
from timetier.cluster.storage.learning import Progress, ask_lives

NODES = {0: "storage-0-0", 1: "storage-0-1"}
A: Life = (0, 1, 5)
B: Life = (1, 2, 7)
OLD_B: Life = (1, 1, 9)
MINE: Life = (2, 1, 3)
GOOD = [Lives(A, True, [B, MINE]), Lives(B, True, [A, MINE])]


@pytest.mark.parametrize(
    ("answers", "why"),
    [
        ([GOOD[0], CallFailed("storage-0-1", "no answer", True)], "storage-0-1: no answer"),
        ([GOOD[0], Lives(B, False, [])], "storage-0-1"),
        ([GOOD[0], Lives(OLD_B, True, [A, MINE])], "storage-0-1: what answers is a life of it that is over"),
    ],
)
def test_a_lost_replica_waits_until_the_present_lives_of_all_peers_vote(
    answers: list[Message | CallFailed], why: str
) -> None:
    """An old process of a peer that was itself replaced may run on; what it knows is not all there is to know."""
    progress = Progress()
    script = ask_lives(NODES, progress)
    next(script)
    assert isinstance(script.send(answers), Sleep)
    assert progress.reason.endswith(why)
    script.send(0.0)
    with pytest.raises(StopIteration) as end:
        script.send(GOOD)
    assert end.value.value == GOOD
    assert progress.reason == ""
