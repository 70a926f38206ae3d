"""The rule of the strong read: which version of a timeline is proven by what replicas answered (*pure*).

Each voter answers `(chosen, open)`: the version up to which it has applied the timeline, and the ballot at which it
has accepted entry chosen+1, if it has. All answers of one read were given after the read began. Let m be the
greatest `chosen`; it is truly chosen, and only entry m+1 can be the last chosen one:

* A replica that answered without "m+1 is open" had not accepted m+1 when it answered, also if it is behind, because
  only entry chosen+1 can be open. If a majority is like that, m+1 was not chosen when the read began: version m.
* If a majority has accepted m+1 at one ballot, it is chosen: version m+1.
* Otherwise the answers can't tell.
"""

from __future__ import annotations

from typing import NamedTuple

from ..messages import Ballot

SHORT = 0  # fewer answers than a majority
OPEN = 1  # a majority answered, but nobody can tell whether entry `version` was chosen
PROVEN = 2  # the timeline's version is `version`


class Verdict(NamedTuple):
    """`ballot`: for PROVEN, the one at which a majority accepted `version` if that is the proof; for OPEN, the
    highest one at which `version` was accepted. `nodes`: who has applied `version`, or accepted it at `ballot`.
    """

    state: int
    version: int
    ballot: Ballot | None
    nodes: list[str]


class Votes:
    """Answers of the voters of one timeline to one strong read."""

    __slots__ = ("_replicas", "answers")

    def __init__(self, replicas: int) -> None:
        self._replicas = replicas
        self.answers: dict[str, tuple[int, Ballot | None]] = {}

    def add(self, node: str, chosen: int, ballot: Ballot | None) -> None:
        """Note an answer of `node`. `ballot`: at which it has accepted chosen+1, or None.

        A ballot below round 0 says that something is known about chosen+1, but that it is not this voter's vote.
        """
        known = self.answers.get(node)
        if known is None or chosen >= known[0]:
            self.answers[node] = (chosen, ballot)

    def verdict(self) -> Verdict:
        """What the answers prove."""
        majority = self._replicas // 2 + 1
        answers = self.answers
        if not answers:
            return Verdict(SHORT, 0, None, [])
        chosen = max([answer[0] for answer in answers.values()])
        accepted: dict[Ballot, list[str]] = {}
        silent = 0
        for node, (applied, ballot) in answers.items():
            if ballot is None or applied < chosen:
                silent += 1
            else:
                accepted.setdefault(ballot, []).append(node)
        if silent >= majority:
            return Verdict(PROVEN, chosen, None, [node for node, answer in answers.items() if answer[0] == chosen])
        for ballot, nodes in accepted.items():
            if len(nodes) >= majority and ballot[0] >= 0:
                return Verdict(PROVEN, chosen + 1, ballot, nodes)
        if len(answers) < majority:
            return Verdict(SHORT, chosen, None, [])
        highest = max(accepted)
        return Verdict(OPEN, chosen + 1, highest, accepted[highest])
