"""The steps of a storage node: whatever arrives in one turn of the event loop is one step.

The replica takes it all, the engine gets one batch, the log is flushed once (while a flush runs the next step
gathers), and each peer gets one message. Only what waits for the disk waits; the rest of a step leaves at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from ..counters import Counters
from ..errors import OutcomeUnknown, TimeTierError, Unavailable
from ..messages import PeerBatch
from ..paxos.replica import Replica
from .engine import DurableEngine, EngineFailed
from .flusher import Flusher
from .learning import Step
from .life_cycle import LifeCycle
from .waiting import Waiting

T = TypeVar("T")

IDLE_S = 0.5  # after so long a step ends, whatever it has done


class Steps:
    """The steps of one node. All methods are called on its event loop."""

    def __init__(
        self,
        name: str,
        life: LifeCycle,
        waiting: Waiting,
        flusher: Flusher,
        send: Callable[[int, PeerBatch], None],
        counters: Counters,
        clock: Callable[[], float],
    ) -> None:
        """`send`: sends a message to another replica, by its number. `clock`: monotonic seconds."""
        self._name = name
        self._life = life
        self._waiting = waiting
        self._flusher = flusher
        self._send_to_peer = send
        self._counters = counters
        self._now = clock
        self._end_planned = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = 0.0

    def stop(self) -> None:
        """Plan nothing any more."""
        if self._timer is not None:
            self._timer.cancel()

    # ------------------------------------------------------------ what the replica takes

    def take(self, work: Callable[[Replica], None], *, question: bool = False) -> None:
        """Let the replica take something. Errors of the request go to its sender; all others end this life: whatever
        broke off in the middle may have left memory ahead of the engine. A question changes nothing, so any error
        but a broken engine or invariant goes to who asked it.
        """
        replica = self._life.replica
        if replica is None:
            return
        try:
            work(replica)
        except Exception as error:
            of_request = isinstance(error, TimeTierError) or (question and not isinstance(error, AssertionError))
            if of_request and not isinstance(error, EngineFailed):
                self.plan_end()  # what was taken before the error has its answers
                raise
            self._life.break_off(error)
            raise OutcomeUnknown(f"{self._name} failed: {error}") from error
        self._taken(replica)

    def of(self, replica: Replica) -> Step:
        """Lets this life of the replica do something, as a step. It raises Unavailable when the life has ended."""

        def step(work: Callable[[Replica], T]) -> T:
            results: list[T] = []
            self.require_life(replica)
            self.take(lambda r: results.append(work(r)))
            return results[0]

        return step

    def require_life(self, replica: Replica) -> None:
        """Raises Unavailable when the life of this replica has ended."""
        if self._life.replica is not replica:
            raise Unavailable(f"{self._name}: this life has ended")

    def _taken(self, replica: Replica) -> None:
        """Answers that wait for nothing leave at once, all else with what other messages of this turn stir."""
        try:
            answers = replica.answers()
            stirred = replica.is_stirred(self._now())
        except Exception as error:
            self._life.break_off(error)
            return
        for token, answer in answers:
            self._waiting.answer(token, answer)
        if stirred:
            self.plan_end()
        else:
            self._plan_timer(replica)

    # ------------------------------------------------------------ the end of a step

    def plan_end(self) -> None:
        """End the step with this turn of the event loop."""
        if not self._end_planned:
            self._end_planned = True
            asyncio.get_running_loop().call_soon(self._end)

    def _end(self) -> None:
        """End a step: send what may leave, give the engine its batch, flush it if anything waits for that."""
        self._end_planned = False
        replica, engine = self._life.replica, self._life.engine
        if replica is None or engine is None or not self._life.votes_allowed:
            return
        now = self._now()
        try:
            replica.tick(now)
            self._send(replica, now)
            batch = engine.commit()
            if not self._flusher.busy and replica.waits_for_disk:
                self._flush(replica, engine, batch)
        except Exception as error:
            self._life.break_off(error)
            return
        if self._life.replica is replica:
            self._plan_timer(replica)

    def _send(self, replica: Replica, now: float) -> None:
        output = replica.take(now)
        for token, answer in output.replies:
            self._waiting.answer(token, answer)
        for peer, batch in output.peers:
            self._send_to_peer(peer, batch)

    def _flush(self, replica: Replica, engine: DurableEngine, batch: int) -> None:
        """Have what was written up to a batch made durable."""
        began = self._now()
        self._flusher.flush(engine.sync, lambda error: self._flushed(error, replica, batch, began))

    def _flushed(self, error: BaseException | None, replica: Replica, batch: int, began: float) -> None:
        """Go on with what waited for the disk, and flush again soon if something has come to wait meanwhile."""
        if error is None:
            self._counters.add("fsyncs")
            self._counters.add("fsync_us", int((self._now() - began) * 1e6))
        if self._life.replica is not replica:
            self.plan_end()
            return
        try:
            if error is not None:
                raise error
            replica.durable(self._now(), batch)
            self._send(replica, self._now())
            if replica.waits_for_disk:
                self.plan_end()
        except Exception as failed:
            self._life.break_off(failed)
            return
        self._plan_timer(replica)

    def _plan_timer(self, replica: Replica) -> None:
        """End a step when time brings the next thing to do, or in half a second. A timer that comes too early stays: to
        be woken for nothing is cheaper than to set another one for each message."""
        due = replica.next_due()
        if self._timer is not None and self._timer_due <= due:
            return
        now = self._now()
        wait_s = min(max(due - now, 0.0005), IDLE_S)
        if self._timer is not None:
            if self._timer_due <= now + wait_s:
                return
            self._timer.cancel()
        self._timer_due = now + wait_s
        self._timer = asyncio.get_running_loop().call_later(wait_s, self._time_has_come)

    def _time_has_come(self) -> None:
        self._timer = None
        self._end()
