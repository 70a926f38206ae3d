"""The settings of a reader, and what its scripts hand back (*pure*)."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..effects import Script
from .requests import Read


@dataclass(frozen=True, slots=True)
class ReaderSettings:
    """Limits of a reader.

    `page_items`: items fetched for the newest page of a timeline, at least; reads up to it hit from then on.
    `max_page_items`, `max_page_bytes`: what a kept page may grow to.
    `attempt_timeout_s`: how long a node may take before another one is asked; doubles with each round of one read, and
    is a millisecond longer for each timeline in the question.
    `suspect_s`, `suspect_max_s`: how long a node that failed is left alone, doubling.
    `probation_timeout_s`: how long a node that failed a short while ago may take before another one is asked.
    `back_off_s`, `back_off_max_s`: bound of the random pause before asking again or settling, doubling.
    `settle_timeout_s`: how long one replica may take to settle an entry.
    `max_restarts`: how often a read starts over because a block's file is gone.
    """

    page_items: int = 64
    max_page_items: int = 1024
    max_page_bytes: int = 4 << 20
    attempt_timeout_s: float = 0.3
    suspect_s: float = 1.0
    suspect_max_s: float = 8.0
    probation_timeout_s: float = 0.1
    back_off_s: float = 0.002
    back_off_max_s: float = 0.2
    settle_timeout_s: float = 1.0
    max_restarts: int = 3


@dataclass(slots=True)
class Job:
    """A script, and the reads that wait for it (none, for a probe). `heavy`: it holds blocks, or a large answer."""

    script: Script[Step]
    reads: list[Read]
    heavy: bool = False


@dataclass(slots=True)
class Step:
    """What a script has done: `done` reads have an answer, the others go on in `then`."""

    done: list[Read] = field(default_factory=list)
    then: list[Job] = field(default_factory=list)


ReadScript = Script[Step]
