"""Whether the replicas of a group hold the same of one timeline, by what they told. *Pure*.

Each replica tells, as of some version of the timeline and some version of the bucket's cold links, a digest of all
that it holds. Digests can be compared only where both versions agree. While writes and the sink go on they often do
not agree at first; so a timeline is asked for again, until a verdict falls or the rounds are used up. What could not
be compared is never counted as equal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from .keys import split_timeline

EQUAL, DIFFERS, BEHIND, UNDECIDED = "equal", "differs", "behind", "undecided"
UNKNOWN_VERSION = -1


@dataclass(frozen=True, slots=True)
class Told:
    """What one replica told of a timeline. `version`: as of which, -1 where it can't tell. `system`: the version of
    the bucket's cold links. `digest`: 16 bytes."""

    version: int
    system: int
    digest: bytes

    @property
    def known(self) -> bool:
        return self.version != UNKNOWN_VERSION


@dataclass(slots=True)
class Difference:
    """A timeline that the replicas do not hold alike, or of which that could not be found out.

    `kind`: DIFFERS (two replicas have different digests of one version), BEHIND (a replica lacks entries that the
    others had when the comparison began, and did not catch up meanwhile) or UNDECIDED. `told`: by replica number.
    `outliers`: the replicas that a majority disagrees with, none when there is no majority. `source`: a replica of
    that majority, or -1. `mended`: whether a repair made it equal; None when none was tried.
    """

    group: int
    timeline: bytes
    kind: str
    told: dict[int, Told] = field(default_factory=dict)
    outliers: tuple[int, ...] = ()
    source: int = -1
    mended: bool | None = None

    @property
    def bucket(self) -> int:
        return split_timeline(self.timeline)[0]

    @property
    def table(self) -> bytes:
        """Empty for the bucket's own timeline of cold links."""
        return split_timeline(self.timeline)[1]

    @property
    def owner(self) -> bytes:
        return split_timeline(self.timeline)[2]

    def in_words(self) -> str:
        """Which replica disagrees with which, in one sentence."""
        numbers = _listed(self.outliers)
        if self.kind == BEHIND and self.outliers:
            return f"replica {numbers} is behind"
        if self.kind == DIFFERS and self.outliers:
            others = _listed(r for r in sorted(self.told) if r not in self.outliers)
            return f"replica {numbers} differs from {others}"
        if self.kind == DIFFERS:
            apart = len({told.digest for told in self.told.values() if told.known})
            return "all replicas differ" if apart > 2 else "two replicas differ, and no majority tells which is right"
        return "could not be compared: it changed all the time, or a replica could not tell"


def _listed(numbers: object) -> str:
    return " and ".join(map(str, numbers))  # type: ignore[call-overload]


def verdict(told: Mapping[int, Told], asked: int) -> str:
    """EQUAL, DIFFERS or UNDECIDED for what `asked` replicas have told of one timeline."""
    known = [answer for answer in told.values() if answer.known]
    digests: dict[tuple[int, int], set[bytes]] = {}
    for answer in known:
        digests.setdefault((answer.version, answer.system), set()).add(answer.digest)
    if any(len(found) > 1 for found in digests.values()):
        # Whether one of them stands alone shows only when all of them told of one version.
        return DIFFERS if len(digests) == 1 and len(known) == asked else UNDECIDED
    return EQUAL if len(digests) == 1 and len(known) == asked else UNDECIDED


def conclusion(group: int, timeline: bytes, told: dict[int, Told], target: int, replicas: int) -> Difference:
    """What to say of a timeline that is not equal, or stayed undecided.

    `told`: the last answers of each replica. `target`: the version that at least one replica had when the comparison
    began. `replicas`: of the group, of which a majority decides who is right.
    """
    current = {r: answer for r, answer in told.items() if answer.known and answer.version >= target}
    lagging = tuple(sorted(r for r, answer in told.items() if answer.known and answer.version < target))
    apart: dict[tuple[int, int], set[bytes]] = {}
    for answer in current.values():
        apart.setdefault((answer.version, answer.system), set()).add(answer.digest)
    counted = Counter((answer.version, answer.system, answer.digest) for answer in current.values())
    most, count = counted.most_common(1)[0] if counted else ((0, 0, b""), 0)
    right = [r for r, answer in current.items() if (answer.version, answer.system, answer.digest) == most]
    has_majority = count >= replicas // 2 + 1
    if any(len(found) > 1 for found in apart.values()):
        wrong = tuple(sorted(r for r, a in current.items() if a.digest != most[2] and a.version == most[0]))
        outliers = wrong if has_majority else ()
        return Difference(group, timeline, DIFFERS, told, outliers, right[0] if outliers else -1)
    if lagging and has_majority:
        return Difference(group, timeline, BEHIND, told, lagging, right[0])
    return Difference(group, timeline, UNDECIDED, told)
