"""After an outage a replica is current again by itself, while others are served: the small form of `outage.py`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from tempfile import TemporaryDirectory

from outage import measure


def test_a_replica_that_was_killed_is_current_again_and_nobody_is_stopped() -> None:
    # A socket's path is short, so pytest's folder can't be the one.
    with TemporaryDirectory(prefix="tt-outage-") as folder:
        found = asyncio.run(measure(Path(folder), writes=3_000, timelines=300, long=600, steady_s=0.2))
    print(found)
    assert found["verified_equal"]
    assert found["verified_timelines"] >= 301, "and timelines of cold links, where a node has a note of them"
    assert found["current_after_s"] < 60
    assert found["figures"]["entries_fetched"] >= 2_000
    assert found["figures"]["states_installed"] >= 1, "one timeline was beyond the tail of its log"
    for phase, load in found["load"].items():
        assert load["failed"] == 0, phase
    assert {"read", "write"} <= found["load"]["catching_up"].keys()


def test_a_replica_that_was_wiped_learns_everything_and_votes_again() -> None:
    with TemporaryDirectory(prefix="tt-outage-") as folder:
        found = asyncio.run(measure(Path(folder), writes=1_000, timelines=100, long=0, steady_s=0.2, wipe=True))
    print(found)
    assert found["verified_equal"]
    assert found["incarnation"] == 2
    for phase, load in found["load"].items():
        assert load["failed"] == 0, phase
