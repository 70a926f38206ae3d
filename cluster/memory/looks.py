"""What a node that answers reads can tell of itself to whoever looks: ages of what is read, and of what is held."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from random import Random

from ..carriers.base import Reply
from ..messages import AskHeld, AskReads, Held, Message, ReadAges
from ..topology import TablePolicy
from .columns import Glance
from .held import count_held
from .page_cache import PageCache
from .read_ages import ReadAgeCounter
from .requests import Read

_log = logging.getLogger(__name__)


class Looks:
    """Takes note of reads on their way, and answers `AskReads` and `AskHeld`."""

    def __init__(
        self,
        cache: PageCache,
        policy: Callable[[str], TablePolicy | None],
        *,
        clock: Callable[[], float],
        wall_us: Callable[[], int],
        random: Random,
    ) -> None:
        """Arguments as of `ReadAgeCounter`."""
        self.read_ages = ReadAgeCounter(policy, clock=clock, wall_us=wall_us, random=random)
        self._cache = cache
        self._clock = clock
        self._counting = asyncio.Lock()  # one count of what is held at a time

    async def answer(self, message: AskReads | AskHeld) -> ReadAges | Held:
        """The answer. What is held is counted half of the time at the most; reads have their turn after each slice."""
        if isinstance(message, AskReads):
            return self.read_ages.read()
        async with self._counting:
            work = count_held(self._cache, message)
            while True:
                began = self._clock()
                try:
                    next(work)
                except StopIteration as stop:
                    found: Held = stop.value
                    return found
                await asyncio.sleep(self._clock() - began)

    def see_items(self, timelines: Sequence[bytes], keys: Sequence[bytes]) -> None:
        """Single items are asked for."""
        weight = self.read_ages.wants(len(keys))
        if weight:
            self._note(self.read_ages.note_items, weight, timelines, keys)

    def see_pages(
        self,
        reply: Reply,
        timelines: Sequence[bytes],
        glance: Glance,
        before: Sequence[bytes],
        limits: Sequence[int],
        reads: Mapping[int, Read],
    ) -> Reply:
        """Pages are asked for: how to reply. What they brought is noted, if at all, when the reply has left."""
        weight = self.read_ages.wants(len(timelines))
        if not weight:
            return reply

        def told(answer: Message | Exception | None) -> None:
            reply(answer)
            if not isinstance(answer, Exception):
                self._note(self.read_ages.note_pages, weight, timelines, glance, before, limits, reads)

        return told

    @staticmethod
    def _note(note: Callable[..., None], *arguments: object) -> None:
        """These are figures alone: whatever goes wrong with them, no read fails for their sake."""
        try:
            note(*arguments)
        except Exception:
            _log.exception("reads were not counted by age")
