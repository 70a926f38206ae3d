"""Which faults a run has, in which order, on whom and for how long: from a seed alone.

Three replicas bear one fault, so there is one at a time, and the next one waits until all nodes serve again. How long
that takes is not for the plan to say; a run ends after its seconds, with as many faults as there was time for. So the
kinds that are worth most come first, in an order of the seed's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

REPLICAS = 3  # of each tier, one in each zone
LONGEST_FLAP_S = 60.0
FLAP_SHARE = 0.2  # of a run


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of fault. `tier`: whom it hits: `storage`, `cache`, `cold`, `router` or `zone`.

    `first`: it belongs to those that every run has, if there is time. `cuts`: it needs a network that can be cut.
    """

    name: str
    tier: str
    shortest_s: float
    longest_s: float
    what: str
    first: bool = False
    cuts: bool = False


KINDS = {
    kind.name: kind
    for kind in (
        Kind("kill-storage", "storage", 0, 0, "kill -9 of a storage node; Ray starts it again", first=True),
        Kind("pause-storage", "storage", 5, 10, "SIGSTOP of a storage node, SIGCONT later", first=True),
        Kind("cut-zone", "zone", 5, 10, "no packet into or out of a zone", first=True, cuts=True),
        Kind("wipe-storage", "storage", 0, 0, "kill -9 of a storage node, and its data are gone", first=True),
        Kind("flap", "storage", 1, 2, "a storage node is paused and goes on, every second or two", first=True),
        Kind("kill-zone", "zone", 5, 8, "kill -9 of a Ray node with all its actors, later started again", first=True),
        Kind("flap-kill", "storage", 1, 2, "kill -9 of a storage node a second or two after it is back, over and over"),
        Kind("flap-cut", "zone", 1, 2, "a zone is cut off and joined, every second or two", cuts=True),
        Kind("kill-cache", "cache", 0, 0, "kill -9 of a cache node; Ray starts it again"),
        Kind("pause-cache", "cache", 5, 10, "SIGSTOP of a cache node, SIGCONT later"),
        Kind("kill-cold", "cold", 0, 0, "kill -9 of a cold node while a sink runs"),
        Kind("pause-cold", "cold", 5, 10, "SIGSTOP of a cold node, SIGCONT later"),
        Kind("kill-router", "router", 0, 0, "kill -9 of the Router; Ray starts it again"),
        Kind("restart-storage", "storage", 0, 0, "Ray ends the actor of a storage node and starts it again"),
    )
}


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault to be. `target`: replica or number of the node, or number of the zone.

    `hold_s`: how long it lasts, 0 for one that passes by itself. `beat_s`: of one that comes and goes, the length of
    each half; `seed`: for what it decides meanwhile.
    """

    kind: Kind
    target: int
    hold_s: float
    beat_s: float = 0.0
    seed: int = 0

    def describe(self) -> str:
        """In words, for people."""
        where = "" if self.kind.tier == "router" else f" of {self.kind.tier} {self.target}"
        length = f" for {self.hold_s:.1f} s" if self.hold_s else ""
        return f"{self.kind.name}{where}{length}"


def plan(seed: int, seconds: float, *, only: Sequence[str] = (), cuts: bool = True) -> Iterator[Fault]:
    """Faults of a run, without end: first those that every run has, then all kinds, then all over again.

    `seconds`: of the run, for what comes and goes. `only`: names of the kinds to be had; all of them if it is empty.
    `cuts`: whether the network can be cut. Raises ValueError for an unknown kind, and when none is left.
    """
    unknown = [name for name in only if name not in KINDS]
    if unknown:
        raise ValueError(f"no fault is called {unknown[0]!r}: pass one of {', '.join(KINDS)}")
    kinds = [kind for kind in KINDS.values() if (not only or kind.name in only) and (cuts or not kind.cuts)]
    if not kinds:
        raise ValueError("this machine can't cut a network, and other faults were not asked for")
    random = Random(seed)
    return _faults(kinds, random, min(LONGEST_FLAP_S, max(6.0, seconds * FLAP_SHARE)))


def _faults(kinds: list[Kind], random: Random, flap_s: float) -> Iterator[Fault]:
    first = [kind for kind in kinds if kind.first]
    rest = [kind for kind in kinds if not kind.first]
    while True:
        for part in (first, rest):
            random.shuffle(part)
            for kind in part:
                yield _fault(kind, random, flap_s)


def _fault(kind: Kind, random: Random, flap_s: float) -> Fault:
    target = random.randrange(REPLICAS)
    length_s = random.uniform(kind.shortest_s, kind.longest_s)
    seed = random.getrandbits(32)
    if kind.name.startswith("flap"):
        return Fault(kind, target, flap_s, length_s, seed)
    return Fault(kind, target, length_s, 0.0, seed)
