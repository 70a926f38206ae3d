"""The garbage collector of a node runs seldom, and still finds what only it can free."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
from timetier.cluster.collecting import YOUNG_OBJECTS, collect_rarely


class Knot:
    """Refers to itself, so reference counts alone never free it."""

    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def _collector_as_before() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)
    gc.unfreeze()


def test_cycles_are_freed_within_so_many_new_objects() -> None:
    collect_rarely()
    knot = weakref.ref(Knot())
    some = [[] for _ in range(YOUNG_OBJECTS // 2)]  # type: ignore[var-annotated]
    assert knot() is not None, "the collector ran too soon"
    more = [[] for _ in range(YOUNG_OBJECTS)]  # type: ignore[var-annotated]
    assert knot() is None, f"the collector did not run within {len(some) + len(more)} objects"
