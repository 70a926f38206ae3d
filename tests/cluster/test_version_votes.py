"""The rule of the strong read, against all that three replicas can answer."""

from __future__ import annotations

import itertools

import pytest
from timetier.cluster.memory.votes import OPEN, PROVEN, SHORT, Votes
from timetier.cluster.messages import Ballot

A: Ballot = (0, (0, 1, 1))
B: Ballot = (1, (1, 1, 1))


Answer = tuple[int, Ballot | None] | None


def votes(*answers: Answer) -> Votes:
    found = Votes(3)
    for number, answer in enumerate(answers):
        if answer is not None:
            found.add(f"storage-0-{number}", *answer)
    return found


@pytest.mark.parametrize(
    ("answers", "state", "version"),
    [
        ([(5, None), None, None], SHORT, 5),
        ([(5, None), (5, None), None], PROVEN, 5),
        ([(5, None), (3, None), None], PROVEN, 5),
        ([(5, None), (4, A), None], PROVEN, 5),  # the second is open for entry 5, which the first knows as chosen
        ([(5, A), (5, A), None], PROVEN, 6),
        ([(5, A), (5, B), None], OPEN, 6),
        ([(5, A), (5, None), None], OPEN, 6),
        ([(5, A), (4, None), None], OPEN, 6),
        ([(5, A), (5, None), (5, None)], PROVEN, 5),  # two of three had not accepted entry 6
        ([(5, A), (4, None), (3, None)], PROVEN, 5),
        ([(5, A), (5, B), (5, A)], PROVEN, 6),
        ([(5, A), (5, B), (5, None)], OPEN, 6),
        ([(5, A), (5, B), (6, None)], PROVEN, 6),
    ],
)
def test_the_version_is_proven_or_not(
    answers: list[tuple[int, Ballot | None] | None], state: int, version: int
) -> None:
    verdict = votes(*answers).verdict()
    assert (verdict.state, verdict.version) == (state, version)


def test_a_proven_version_is_never_below_what_was_chosen_and_never_above_what_can_be() -> None:
    """All states of three replicas around entry 6: who has applied it, who has accepted it last at which ballot."""
    for states in itertools.product([(5, None), (5, A), (5, B), (6, None)], repeat=3):
        never_accepted = states.count((5, None))
        applied = states.count((6, None)) > 0
        if applied and never_accepted > 1:
            continue  # chosen without a majority: there is no such state
        surely_chosen = applied or states.count((5, A)) > 1 or states.count((5, B)) > 1
        for asked in ((0, 1), (0, 2), (1, 2), (0, 1, 2)):
            verdict = votes(*[states[n] if n in asked else None for n in range(3)]).verdict()
            if verdict.state == PROVEN:
                assert verdict.version in (5, 6)
                assert verdict.version == 6 or never_accepted > 1, f"{states} {asked}: 6 may be chosen"
                assert verdict.version == 5 or surely_chosen, f"{states} {asked}: nobody has chosen 6"


def test_knowledge_that_is_no_vote_neither_proves_nor_denies() -> None:
    hearsay: Ballot = (-1, (0, 1, 1))
    assert votes((5, hearsay), (5, hearsay), None).verdict().state == OPEN
    assert votes((5, hearsay), (5, None), None).verdict().state == OPEN
    assert votes((5, hearsay), (5, None), (5, None)).verdict().version == 5


def test_with_one_replica_its_word_is_the_majority() -> None:
    one = Votes(1)
    assert one.verdict().state == SHORT
    one.add("storage-0-0", 5, A)
    assert (one.verdict().state, one.verdict().version, one.verdict().nodes) == (PROVEN, 6, ["storage-0-0"])
