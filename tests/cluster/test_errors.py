"""Errors keep their class, message and fields through pickling and through messages."""

from __future__ import annotations

import doctest
import pickle

import pytest
from timetier.cluster import errors
from timetier.cluster.errors import (
    InvalidRequest,
    OutcomeUnknown,
    Rejected,
    TimeTierError,
    TooLarge,
    Unavailable,
    VersionConflict,
    WriteManyError,
)
from timetier.cluster.messages import decode, encode, failure, raise_failure

ALL = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, TimeTierError)]


@pytest.mark.parametrize("kind", ALL)
def test_every_error_survives_pickling_and_travels_in_a_message(kind: type[TimeTierError]) -> None:
    error = kind("what went wrong", limit=7)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind and str(copy) == "what went wrong" and copy.fields == {"limit": 7}
    assert copy.limit == 7  # type: ignore[attr-defined]
    with pytest.raises(kind, match="what went wrong") as caught:
        raise_failure(decode(encode(failure(error))))
    assert type(caught.value) is kind and caught.value.fields == {"limit": 7}


def test_errors_are_sorted_by_what_the_caller_may_do() -> None:
    assert {kind for kind in ALL if issubclass(kind, Rejected)} >= {VersionConflict, InvalidRequest, TooLarge}
    for kind in (Unavailable, OutcomeUnknown, WriteManyError):
        assert not issubclass(kind, Rejected)
    assert not issubclass(OutcomeUnknown, Unavailable), "who catches Unavailable may retry blindly"


def test_an_unforeseen_error_is_marked_since_a_write_that_ends_so_may_have_been_applied() -> None:
    with pytest.raises(Unavailable, match="ZeroDivisionError") as caught:
        raise_failure(failure(ZeroDivisionError("x")))
    assert caught.value.fields == {"internal": 1}


def test_a_write_many_error_counts_by_reason_and_survives_pickling() -> None:
    conflict = VersionConflict("version 9", version=9)
    error = WriteManyError.of([4, Unavailable("a"), OutcomeUnknown("b"), conflict, Unavailable("c"), 5])
    for one in (error, pickle.loads(pickle.dumps(error))):
        assert (one.written, one.unavailable, one.unknown, one.rejected) == (2, 2, 1, 1)
        assert str(one).startswith("4 of 6 items were not written: 2 Unavailable, 1 OutcomeUnknown, 1 VersionConflict")
        assert one.results[0] == 4 and one.results[5] == 5
        assert isinstance(one.results[3], VersionConflict) and one.results[3].version == 9


def test_examples_in_docstrings_hold() -> None:
    outcome = doctest.testmod(errors)
    assert outcome.attempted > 0 and outcome.failed == 0
