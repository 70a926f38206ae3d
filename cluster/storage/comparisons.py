"""The comparisons of a storage node with its peers: after a start, and now and then (see `catching_up.py`)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from ..carriers.base import CallError, Carrier
from ..drive import drive
from ..errors import TimeTierError
from ..paxos.replica import VOTING
from .catching_up import catch_up
from .life_cycle import LifeCycle
from .steps import Steps

FIRST_PAUSE_S = 0.5
AGAIN_S = 2.0  # at most, while something is behind


class Comparisons:
    """A replica that was away fetches what it missed, for as long as `run` runs.

    `figures`: for the status: complete `rounds`, timelines that were `behind` in the last one, and the `reason` why a
    peer was not compared with.
    """

    def __init__(
        self,
        life: LifeCycle,
        steps: Steps,
        peers: Callable[[], dict[int, str]],
        carrier: Carrier,
        clock: Callable[[], float],
        interval_s: float,
    ) -> None:
        """`peers`: nodes of the other replicas by number. `clock`: monotonic seconds. `interval_s`: between rounds."""
        self.figures: dict[str, Any] = {"rounds": 0, "behind": 0}
        self._life = life
        self._steps = steps
        self._peers = peers
        self._carrier = carrier
        self._now = clock
        self._interval_s = interval_s

    async def run(self) -> None:
        """Compare with each peer, again and again."""
        pause_s = FIRST_PAUSE_S
        while True:
            await asyncio.sleep(pause_s)
            replica = self._life.replica
            if replica is None or replica.state != VOTING:
                continue
            compared = behind = 0
            for peer in replica.core.peers:
                try:
                    script = catch_up(self._steps.of(replica), self._now, peer, self._peers()[peer])
                    behind += await drive(script, self._carrier)
                    compared += 1
                except (CallError, TimeTierError) as error:
                    self.figures["reason"] = f"replica {peer}: {error}"
            complete = compared == len(replica.core.peers)
            self.figures["rounds"] += complete
            self.figures["behind"] = behind
            # Questions and answers get lost, and transfers are put off: what was behind is looked at again soon.
            pause_s = self._interval_s if complete and not behind else min(self._interval_s, AGAIN_S)
