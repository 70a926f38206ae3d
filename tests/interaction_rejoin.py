"""The rejoin of a replica that lost its data, for interaction scripts: the production script, driven by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from interaction_calls import HandAnswered
from interaction_group import HandDriven
from timetier.cluster.effects import Script
from timetier.cluster.paxos.replica import Replica
from timetier.cluster.storage.learning import Progress, Rejoin

T = TypeVar("T")

BYTES_PER_S = 1e9
SHORT_S = 0.001  # a pause that keeps to the rate; the others wait for what a peer sends


class ScriptedRejoin(HandAnswered):
    """One rejoin in one life of a replica. A wait for messages lasts until the next `rejoin` command."""

    def __init__(self, group: HandDriven, number: int, say: Callable[[str], None]) -> None:
        super().__init__(f"r{number}", say)
        self._group = group
        self._number = number
        self._replica = group.replica(number)
        self._peers = {peer: f"r{peer}" for peer in self._replica.core.peers}
        self._progress = Progress()
        self._left: Script[None] | None = Rejoin(
            self._step, self._now, self._peers, BYTES_PER_S, self._progress
        ).script()

    @property
    def is_of_present_life(self) -> bool:
        return self._group.members[self._number].replica is self._replica

    def _now(self) -> float:
        return self._group.members[self._number].now

    def _step(self, work: Callable[[Replica], T]) -> T:
        assert self.is_of_present_life, "a rejoin ends with the life that began it"
        found = work(self._replica)
        self._group.after_step(self._number)
        return found

    def next_script(self) -> Script[None] | None:
        script, self._left = self._left, None
        return script

    def slept(self, seconds: float) -> float | None:
        if seconds < SHORT_S:
            return self._now()
        self.say(
            f"{self.name} is {self._progress.phase}" + (f": {self._progress.reason}" if self._progress.reason else "")
        )
        return None

    def ended(self, _result: None) -> None:
        """What the node does last: everything on disk, then the vote."""
        self._step(lambda replica: replica.learning.forget_positions())
        self._group.sync(self._number)
        self._group.members[self._number].learner = False
        self._step(lambda replica: replica.begin_voting())
