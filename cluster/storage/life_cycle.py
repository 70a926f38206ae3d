"""The lives of a storage node: how one begins and ends, and how the next one comes back when the data is lost.

A life is an open engine and the replica in memory over it. A failing disk or a broken invariant ends it, and the next
one begins from what is durable. Who has lost its data begins a new incarnation instead and learns from its peers (see
`learning.py`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from ..carriers.base import Carrier
from ..config import StorageConfig
from ..counters import Counters
from ..drive import drive
from ..errors import Corrupt, TimeTierError
from ..identity import Identity
from ..paxos.replica import FENCED, Replica
from .engine import DurableEngine, EngineDamaged, EngineFailed
from .flusher import Flusher
from .home import EngineHome
from .learning import Progress, Rejoin, Step, ask_lives

logger = logging.getLogger(__name__)

REOPEN_S = 1.0


class LifeCycle:
    """The lives of one node, one after the other. All methods are called on its event loop.

    `replica`, `engine`: of the present life, None between two lives. `failed`: why there is none, else empty.
    `votes_allowed`: whether the replica may answer, as its folder is known as formatted.
    `rejoining`: how far the node has come with copying what it has lost; None if it has lost nothing.
    """

    def __init__(
        self,
        *,
        name: str,
        number: int,
        identity: Identity,
        home: EngineHome,
        make_replica: Callable[[DurableEngine], Replica],
        peers: Callable[[], dict[int, str]],
        carrier: Carrier,
        config: StorageConfig,
        counters: Counters,
        flusher: Flusher,
        clock: Callable[[], float],
        step_of: Callable[[Replica], Step],
        began: Callable[[], None],
        ended: Callable[[str], None],
        keep: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        """`number`: of the replica. `make_replica`: the replica over an engine that was opened. `peers`: nodes of the
        other replicas by number. `clock`: monotonic seconds. `step_of`: lets one life of the replica do something, as
        a step. `began`: is told that a life has followed another one; `ended`: why one ended, so that nobody waits for
        its answers. `keep`: carries out something in the background, until the node stops.
        """
        self.replica: Replica | None = None
        self.engine: DurableEngine | None = None
        self.failed = "not started"
        self.votes_allowed = False
        self.rejoining: Progress | None = None
        self._name = name
        self._number = number
        self._identity = identity
        self._home = home
        self._make_replica = make_replica
        self._peers = peers
        self._carrier = carrier
        self._config = config
        self._counters = counters
        self._flusher = flusher
        self._now = clock
        self._step_of = step_of
        self._began = began
        self._ended = ended
        self._keep = keep
        self._begins_incarnation = False

    # ------------------------------------------------------------ a life

    def start(self) -> None:
        """Open the engine, or begin to rejoin if the data is lost. Raises Corrupt when it is damaged and there is
        nobody to copy it from, Unavailable when the disk refuses."""
        try:
            if self._identity.incarnation:
                self._open()
            else:
                self._lose("its data folder was emptied, or holds what counts no more")
        except (Corrupt, EngineDamaged) as error:
            if not self._may_rejoin:
                raise
            self._lose(error.message)
        if not self._identity.learning:
            self._keep(self._remove_old_engines())  # a crash may have come before

    async def stop(self) -> None:
        """End the life for good, with all that it knows on the disk as far as that is possible."""
        replica, self.replica, self.failed = self.replica, None, "stopped"
        self._ended("the node stops")
        if replica is not None:
            replica.core.mark_all()
        await self._flusher.after(lambda: None)  # a flush under way ends first
        if self.engine is not None:
            try:
                if replica is not None:
                    self.engine.commit()
                    replica.core.journal.settle()
                self.engine.close()
            except Exception as error:  # on a full disk; what was acknowledged is in the log
                logger.warning("%s can't close its engine in order: %s", self._name, str(error))
                self.engine.abandon()
            self.engine = None

    def break_off(self, error: Exception) -> None:
        """The disk or the core failed: nothing in memory can be trusted. End this life, begin the next one."""
        expected = isinstance(error, EngineFailed)
        logger.error("%s ends this life: %s", self._name, error, exc_info=None if expected else error)
        self._counters.add("lives_ended_by_errors")
        if isinstance(error, EngineDamaged) and self._may_rejoin:
            self._lose(str(error))
        else:
            self._keep(self._reopen(self._end(str(error))))

    def rejoin_if_fenced(self) -> None:
        """Come back as a learner if the peers have noted a later life than this one."""
        if self.replica is not None and self.replica.state == FENCED and self._may_rejoin:
            self._lose(self.replica.reason)

    def _open(self) -> None:
        """Open the engine and begin a life."""
        engine = self._home.open()
        try:
            replica = self._make_replica(engine)
        except Exception:
            engine.abandon()  # else its lock would keep every later life out
            raise
        self.engine, self.replica, self.failed = engine, replica, ""
        if self._identity.learning:
            self._keep(self._learn(replica))

    def _end(self, reason: str) -> DurableEngine | None:
        """Answer nothing any more. Returns the engine, which is to be let go of."""
        self.replica, self.failed = None, reason
        self._ended(f"{self._name}: {reason}")
        engine, self.engine = self.engine, None
        return engine

    async def _abandon(self, engine: DurableEngine | None) -> None:
        if engine is not None:
            # In the flusher's thread, so that a flush under way ends before the engine closes.
            await self._flusher.after(engine.abandon)

    async def _reopen(self, ended: DurableEngine | None) -> None:
        await self._abandon(ended)
        while self.replica is None:
            await asyncio.sleep(REOPEN_S)
            try:
                await asyncio.to_thread(self._identity.begin_life)
                self._open()
            except (Corrupt, EngineDamaged) as error:
                if self._may_rejoin:
                    self._lose(str(error))
                    return
                self.failed = str(error)
            except Exception as error:
                # Whatever it was, it may pass, and a node that gave up would need somebody to notice.
                self.failed = str(error)
                logger.warning("%s can't begin its next life: %s", self._name, self.failed)
        self._began()

    # ------------------------------------------------------------ loss of data

    @property
    def _may_rejoin(self) -> bool:
        return self._config.rejoin and bool(self._peers())

    def _lose(self, reason: str) -> None:
        """What this node holds counts no more: come back as a learner."""
        if not self._begins_incarnation:  # a learner too may lose what it has, or find that its folder is an old one
            logger.error("%s has lost its data and copies it from its peers: %s", self._name, reason)
            self._counters.add("rejoins")
            engine = self._end(reason)
            self._begins_incarnation = True
            self.rejoining = Progress(reason=reason)
            self._keep(self._begin_incarnation(self.rejoining, engine))

    async def _begin_incarnation(self, progress: Progress, engine: DurableEngine | None) -> None:
        """Choose an incarnation that nobody has seen. All peers must vote: only they have what was lost."""
        await self._abandon(engine)
        while self.replica is None:
            try:
                await asyncio.to_thread(self._identity.lose_data)
                lives = await drive(ask_lives(self._peers(), progress), self._carrier)
                noted = [life[1] for answer in lives for life in answer.noted if life[0] == self._number]
                incarnation = max(noted, default=1) + 1
                await asyncio.to_thread(self._home.remove, incarnation)
                await asyncio.to_thread(self._identity.begin_incarnation, incarnation)
                self._open()
                self._begins_incarnation = False
                self._began()
                return
            except Exception as error:
                progress.reason = str(error)
                logger.warning("%s can't begin to rejoin: %s", self._name, progress.reason)
            await asyncio.sleep(REOPEN_S)

    async def _learn(self, replica: Replica) -> None:
        """Copy and verify, make it durable, vote."""
        progress = self.rejoining = self.rejoining or Progress()
        peers = self._peers()
        rate = self._config.rejoin_mb_per_s * (1 << 20)
        began = self._now()

        step = self._step_of(replica)
        try:
            # Else an old life of one peer, of which the other knows, could be heard here again.
            lives = await drive(ask_lives(peers, progress), self._carrier)
            step(lambda r: r.note_lives([life for answer in lives for life in (answer.life, *answer.noted)]))
            await drive(Rejoin(step, self._now, peers, rate, progress).script(), self._carrier)
            step(lambda r: r.learning.forget_positions())
            engine = self.engine
            if engine is None or self.replica is not replica:
                return
            engine.commit()
            await self._flusher.after(engine.sync)
            await asyncio.to_thread(self._identity.end_learning)
            step(lambda r: r.begin_voting())
        except (TimeTierError, OSError) as error:
            if self.replica is replica:
                self.break_off(error)  # the next life goes on where this one stopped
            return
        self.rejoining = None
        logger.warning("%s votes again, after %.1f s", self._name, self._now() - began)
        await self._remove_old_engines()

    async def _remove_old_engines(self) -> None:
        """Remove what earlier incarnations have held; this one has everything and votes."""
        for incarnation in range(1, self._identity.incarnation):
            try:
                await asyncio.to_thread(self._home.remove, incarnation)
            except OSError as error:
                logger.warning("%s can't remove its engine %d: %s", self._name, incarnation, error)
