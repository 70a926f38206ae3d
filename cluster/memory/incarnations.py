"""Which incarnations of the replicas a reader has heard of (*pure*).

A replica that lost its data comes back under a new incarnation, after every other voter has noted that durably. Its
old process may run on somewhere and still answer readers. So an answer counts as a vote only if no other answer has
named a later incarnation of its sender: any majority with the old one in it has a voter that knows of the new one.
"""

from __future__ import annotations

from collections.abc import Sequence


class Incarnations:
    """The greatest incarnation of each replica that any answer has named.

    `generation` grows whenever one that was known is outdated: votes that were gathered before may be of the old one.
    """

    def __init__(self) -> None:
        self.generation = 0
        self._usual: dict[str, Sequence[int]] = {}
        self._greatest: dict[str, int] = {}

    def is_current(self, node: str, seen: Sequence[int]) -> bool:
        """Note an answer of `node`, which has seen these incarnations, by replica; whether it may be counted."""
        if not seen or self._usual.get(node) == seen:
            return True
        prefix, _, number = node.rpartition("-")
        for replica, incarnation in enumerate(seen):
            name = f"{prefix}-{replica}"
            known = self._greatest.get(name, 0)
            if incarnation > known:
                self._greatest[name] = incarnation
                if known:
                    self.generation += 1
                    self._usual.clear()
        replica = int(number)
        if replica >= len(seen) or seen[replica] < self._greatest.get(node, 0):
            return False
        self._usual[node] = seen
        return True
