"""Production scripts (`effects.py`) whose calls an interaction script answers, one at a time, when it likes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from interaction_text import timeline_text
from timetier.cluster.effects import Call, CallFailed, Script, Sleep
from timetier.cluster.messages import (
    DELTA,
    AskAccepted,
    AskDigests,
    AskVersions,
    BlockRead,
    Check,
    Message,
    Settle,
    unpack_i64,
)


def name_text(node: str) -> str:
    """`r1` for a storage node, `c1` for a cold node."""
    tier, dash, number = node.partition("-0-")
    if not dash:
        return node
    return f"{'r' if tier == 'storage' else 'c'}{number}"


def question_text(message: Message) -> str:
    """What a call asks."""
    match message:
        case Check(timelines=timelines, have=have, wants=wants, known=known):
            proof = "".join(f", entry {found.entry} was chosen" for found in known)
            what = f"what is new since {unpack_i64(have)[0]}" if wants[0] == DELTA else "newest items"
            return f"{timeline_text(timelines[0])}, {what}{proof}"
        case AskVersions(timelines=timelines):
            return f"version of {timeline_text(timelines[0])}"
        case Settle(timelines=timelines, entries=entries):
            return f"settle {timeline_text(timelines[0])}/{unpack_i64(entries)[0]}"
        case BlockRead(file=file):
            return f"block of {file}"
        case AskAccepted():
            return "what was promised and accepted"
        case AskDigests(timelines=timelines):
            return "digests" + (f" of {', '.join(map(timeline_text, timelines))}" if timelines else "")
        case _:
            return type(message).__name__


class HandAnswered:
    """Runs scripts one after another. `say` takes what happens as text; `name` is who asks.

    A subclass says in `next_script` what to run, in `ended` what becomes of a result, and in `slept` whether a script
    that sleeps goes on at once.
    """

    def __init__(self, name: str, say: Callable[[str], None]) -> None:
        self.name = name
        self.say = say
        self._script: Script[Any] | None = None
        self._calls: list[Call] = []
        self._results: dict[int, Message | CallFailed] = {}

    def next_script(self) -> Script[Any] | None:
        raise AssertionError("a subclass says what to run")

    def ended(self, result: Any) -> None:
        raise AssertionError("a subclass takes the result")

    def slept(self, seconds: float) -> float | None:
        """The time after a sleep, or None to wait for `go_on`."""
        raise AssertionError("a subclass says how to sleep")

    @property
    def asks(self) -> bool:
        """Whether it waits for answers."""
        return bool(self._calls)

    def waiting(self, node: str) -> list[tuple[int, Message]]:
        """Questions to a node that have no answer, each with its number."""
        return [
            (at, call.message)
            for at, call in enumerate(self._calls)
            if name_text(call.node) == node and at not in self._results
        ]

    def answer(self, at: int, message: Message | None) -> None:
        """Bring the answer to a question; None: there is none."""
        call = self._calls[at]
        self._results[at] = message if message is not None else CallFailed(call.node, "no answer", True)
        if len(self._results) == len(self._calls):
            results = [self._results[number] for number in range(len(self._calls))]
            self._calls, self._results = [], {}
            self.go_on(results)

    def go_on(self, results: Any = None) -> None:
        """Run until something is asked, or nothing is left to do."""
        while True:
            if self._script is None:
                self._script, results = self.next_script(), None
                if self._script is None:
                    return
            try:
                effect = self._script.send(results)
            except StopIteration as done:
                self._script = None
                self.ended(done.value)
                continue
            if isinstance(effect, Sleep):
                results = self.slept(effect.seconds) if effect.seconds else 0.0  # a turn for others is no pause
                if results is None:
                    return
                continue
            self._calls = effect
            for call in effect:
                self.say(f"{self.name} asks {name_text(call.node)}: {question_text(call.message)}")
            return
