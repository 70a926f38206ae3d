"""Who failed lately, and when to try them again (*pure*).

A node that brought no answer is asked last. It stays suspected until it has answered something: one small question
of its own finds that out, so that no request waits for it.
"""

from __future__ import annotations

from ..messages import Message


class Suspicion:
    """Suspected nodes. Times are monotonic seconds."""

    def __init__(self, *, first_s: float, longest_s: float) -> None:
        """A node is asked again after `first_s`, then after twice as long each time, up to `longest_s`."""
        self._first_s = first_s
        self._longest_s = longest_s
        self._suspects: dict[str, tuple[float, float, Message]] = {}  # node -> (next probe, pause, probe)

    def __contains__(self, node: str) -> bool:
        return node in self._suspects

    def names(self) -> list[str]:
        """Suspected nodes."""
        return sorted(self._suspects)

    def suspect(self, node: str, now: float, probe: Message) -> None:
        """Note that a node brought no answer. `probe`: a small question that it ought to answer."""
        known = self._suspects.get(node)
        if known is None:
            self._suspects[node] = (now + self._first_s, self._first_s, probe)
        elif now >= known[0]:
            pause_s = min(known[1] * 2, self._longest_s)
            self._suspects[node] = (now + pause_s, pause_s, known[2])

    def trust(self, node: str) -> None:
        """Note that a node answered."""
        if self._suspects:
            self._suspects.pop(node, None)

    def due(self, now: float) -> list[tuple[str, Message]]:
        """Nodes that are to be probed, with the question; each is given out once per pause."""
        ready = [(node, item[2]) for node, item in self._suspects.items() if item[0] <= now]
        for node, _ in ready:
            _, pause_s, probe = self._suspects[node]
            pause_s = min(pause_s * 2, self._longest_s)
            self._suspects[node] = (now + pause_s, pause_s, probe)
        return ready

    def last(self, nodes: list[str]) -> list[str]:
        """The same nodes in the same order, but the suspected ones last."""
        if not self._suspects or not any(node in self._suspects for node in nodes):
            return nodes
        return [n for n in nodes if n not in self._suspects] + [n for n in nodes if n in self._suspects]
