"""Whom a strong read asks in its next round (*pure*).

`check_at`: the one replica that is asked for data; `ask_at`: those that only tell their version. What the answers mean
is for `votes.py`, when to ask for `reading.py`.
"""

from __future__ import annotations

from ..keys import bucket_of
from ..routing import Routing
from ..suspicion import Suspicion
from .requests import Slot
from .votes import PROVEN, SHORT, Verdict


class Planner:
    """Plans rounds. `routing`: the map to go by."""

    def __init__(self, routing: Routing, suspicion: Suspicion) -> None:
        self.routing = routing
        self._suspicion = suspicion

    def order(self, timeline: bytes) -> list[str]:
        """Replicas of a timeline by priority, the suspected ones last."""
        return self._suspicion.last(self.routing.storage_order(timeline))

    def plan_first(self, slot: Slot) -> None:
        """Ask the first replica, and as many next ones as make a majority."""
        slot.check_at = slot.order[0]
        slot.ask_at = slot.order[1 : len(slot.order) // 2 + 1]

    def plan_next(self, slot: Slot, verdict: Verdict) -> bool:
        """Whom to ask at once to get on. False if all that has been done."""
        slot.known, slot.check_at, slot.ask_at = None, None, []
        reachable = self._reachable(slot)
        unasked = [node for node in reachable if node not in slot.votes.answers]
        if verdict.state == PROVEN:
            self._plan_data(slot, verdict, reachable)
        elif verdict.state == SHORT:
            unasked = unasked[: len(slot.order) // 2 + 1 - len(slot.votes.answers)]
            if unasked and slot.data is None:
                slot.check_at = unasked.pop(0)
            slot.ask_at = unasked
        elif slot.rounds == 1 and reachable:
            owner = self._owner(slot, verdict)
            if owner in reachable:
                slot.check_at = owner  # it may know by now that the entry was chosen; then it has the data too
            elif slot.data is None:
                slot.check_at = reachable[0]
            slot.ask_at = [node for node in unasked if node != slot.check_at]
        return slot.check_at is not None or bool(slot.ask_at)

    def plan_all(self, slot: Slot, verdict: Verdict) -> None:
        """Ask everybody again, those too that failed if there are too few others."""
        slot.known = None
        slot.tried.clear()
        reachable = self._reachable(slot)
        if len(reachable) <= len(slot.order) // 2:
            slot.failed.clear()
            reachable = list(slot.order)
        slot.check_at = next((node for node in reachable if node in verdict.nodes), reachable[0])
        slot.ask_at = [node for node in reachable if node != slot.check_at]

    def settler(self, slot: Slot, verdict: Verdict) -> str:
        """Who is to settle the open entry: by turns the owner of its ballot and one of all."""
        reachable = self._reachable(slot) or slot.order
        owner = self._owner(slot, verdict)
        return owner if owner in reachable and slot.settles % 2 else reachable[slot.settles % len(reachable)]

    def _reachable(self, slot: Slot) -> list[str]:
        """Replicas worth asking, by priority: not failed; not suspected either, unless too few are left."""
        able = [node for node in slot.order if node not in slot.failed]
        trusted = [node for node in able if node not in self._suspicion]
        return trusted if len(trusted) > len(slot.order) // 2 else able

    def lacks_nodes(self, slot: Slot) -> bool:
        """Whether too few replicas are trusted to make a majority."""
        return sum(node not in self._suspicion for node in slot.order) <= len(slot.order) // 2

    @staticmethod
    def _plan_data(slot: Slot, verdict: Verdict, reachable: list[str]) -> None:
        """Ask a replica that has applied the proven version, or can apply it by the proof; each of them once."""
        for node in reachable:
            if node in verdict.nodes and (node, verdict.version) not in slot.tried:
                slot.tried.add((node, verdict.version))
                slot.check_at = node
                if verdict.ballot is not None:
                    slot.known = (verdict.version, verdict.ballot)
                return

    def _owner(self, slot: Slot, verdict: Verdict) -> str | None:
        """Node of the replica that made the ballot of an open entry."""
        if verdict.ballot is None or verdict.ballot[1][0] < 0:
            return None
        group = self.routing.storage_group_of(bucket_of(slot.timeline))
        return self.routing.topology.storage_node(group, verdict.ballot[1][0])
