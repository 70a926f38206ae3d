"""Word of what was chosen here, on its way to the peers (*pure*).

It travels with the next message, at the latest after `Settings.chosen_delay_s`, and is forgotten where an `Accept` of
the entry after says the same.
"""

from __future__ import annotations

from ..messages import Ballot, Chosen, ChosenAll, PeerMessage
from .core import Core


class Telling:
    """What was chosen by proposals of this replica, and peers are not told of yet."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self._entries: dict[bytes, tuple[int, Ballot]] = {}
        self._flights: list[int] = []
        self._due: float | None = None

    def note_entry(self, timeline: bytes, entry: int, ballot: Ballot, now: float) -> None:
        """An entry was chosen."""
        self._entries[timeline] = (entry, ballot)
        self._plan(now)

    def note_flight(self, number: int, now: float) -> None:
        """All entries of a flight were chosen."""
        self._flights.append(number)
        self._plan(now)

    def forget(self, timeline: bytes) -> None:
        """Peers learn by another message that the last entry of a timeline was chosen."""
        self._entries.pop(timeline, None)

    def send(self, now: float, *, force: bool = False) -> None:
        """Tell peers what was chosen, when the delay is over or when a message leaves for them anyway."""
        if self._due is None or not (force or now >= self._due):
            return
        told: list[PeerMessage] = [Chosen(key, entry, ballot) for key, (entry, ballot) in self._entries.items()]
        told += [ChosenAll(number, self.core.life) for number in self._flights]
        # First in the batch: a Prepare for the next entry behind it then finds its receiver up to date.
        self.core.messages[:0] = [(0, peer, message) for message in told for peer in self.core.peers]
        self._entries.clear()
        self._flights.clear()
        self._due = None

    def next_due(self) -> float | None:
        """When `send` has something to do."""
        return self._due

    def _plan(self, now: float) -> None:
        if self._due is None:
            self._due = now + self.core.settings.chosen_delay_s
