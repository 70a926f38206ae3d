"""Word of what was chosen here, on its way to the peers (*pure*).

It travels with the next message to each of them, at the latest after `Settings.chosen_delay_s`, and is forgotten where
an `Accept` of the entry after says the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..messages import Ballot, Chosen, ChosenAll, PeerMessage
from .core import Core


@dataclass(slots=True)
class _Untold:
    """What one peer is not told of yet: the last entry of each timeline, and numbers of flights."""

    entries: dict[bytes, tuple[int, Ballot]] = field(default_factory=dict)
    flights: list[int] = field(default_factory=list)


class Telling:
    """What was chosen by proposals of this replica, and peers are not told of yet."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self._untold = {peer: _Untold() for peer in core.peers}
        self._due: float | None = None

    def note_entry(self, timeline: bytes, entry: int, ballot: Ballot, now: float) -> None:
        """An entry was chosen."""
        for untold in self._untold.values():
            untold.entries[timeline] = (entry, ballot)
        self._plan(now)

    def note_flight(self, number: int, now: float) -> None:
        """All entries of a flight were chosen."""
        for untold in self._untold.values():
            untold.flights.append(number)
        self._plan(now)

    def forget(self, timeline: bytes) -> None:
        """Peers learn by another message that the last entry of a timeline was chosen."""
        for untold in self._untold.values():
            untold.entries.pop(timeline, None)

    def forget_all(self, timelines: list[bytes]) -> None:
        """The same for many timelines."""
        for untold in self._untold.values():
            if untold.entries:
                for timeline in timelines:
                    untold.entries.pop(timeline, None)

    def take(self, peer: int) -> list[PeerMessage]:
        """What to tell a peer, for which a message leaves."""
        untold = self._untold[peer]
        if not (untold.entries or untold.flights):
            return []
        told: list[PeerMessage] = [Chosen(key, entry, ballot) for key, (entry, ballot) in untold.entries.items()]
        told += [ChosenAll(number, self.core.life) for number in untold.flights]
        untold.entries.clear()
        untold.flights.clear()
        return told

    def send(self, now: float) -> None:
        """Tell all peers, when the delay is over."""
        if self._due is not None and now >= self._due:
            self._due = None
            for peer in self._untold:
                self.core.messages += [(0, peer, message) for message in self.take(peer)]

    def next_due(self) -> float | None:
        """When `send` has something to do."""
        return self._due

    def _plan(self, now: float) -> None:
        if self._due is None:
            self._due = now + self.core.settings.chosen_delay_s
