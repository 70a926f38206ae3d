"""A reader counts no answer of a replica that another answer says was replaced."""

from __future__ import annotations

from timetier.cluster.memory.incarnations import Incarnations


def test_an_answer_of_a_replaced_replica_does_not_count_once_anybody_has_named_its_successor() -> None:
    known = Incarnations()
    assert known.is_current("storage-0-0", [1, 1, 1])
    assert known.is_current("storage-0-1", [1, 1, 1])
    assert known.is_current("storage-0-2", [1, 2, 1]), "who names a later incarnation of another is current itself"
    assert not known.is_current("storage-0-1", [1, 1, 1])
    assert known.is_current("storage-0-1", [1, 2, 1])


def test_votes_that_were_gathered_before_a_replacement_was_known_are_thrown_away() -> None:
    known = Incarnations()
    known.is_current("storage-0-1", [1, 1, 1])
    assert known.generation == 0
    known.is_current("storage-0-0", [1, 2, 1])
    assert known.generation == 1
    known.is_current("storage-0-2", [1, 2, 1])
    assert known.generation == 1, "the same news twice is none"


def test_replicas_that_have_not_heard_of_each_other_outdate_nobody() -> None:
    known = Incarnations()
    assert known.is_current("storage-0-0", [1, 0, 0])
    assert known.is_current("storage-0-1", [0, 1, 0])
    assert known.is_current("storage-0-2", [1, 1, 3])
    assert known.generation == 0
    assert known.is_current("storage-0-0", []), "an answer without incarnations tells nothing"
