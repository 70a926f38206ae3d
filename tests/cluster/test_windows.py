"""Which windows are rewritten though nothing of them sinks, and which wait for more."""

from __future__ import annotations

from cold_model import BUCKETS, TABLE
from timetier.cluster.cold.link import FORMAT, Block, Carried, Link
from timetier.cluster.cold.sinking import CutOffs, Timeline, Window
from timetier.cluster.cold.windows import Waiting, split_waiting, with_rewritten, with_wiped
from timetier.cluster.keys import MAX_TIMESTAMP, MIN_TIMESTAMP, item_key, timeline_hash, timeline_key
from timetier.cluster.messages import PUT, pack_i64

NEVER = CutOffs(MIN_TIMESTAMP, MIN_TIMESTAMP)
ALL = MIN_TIMESTAMP


def timeline(owner: bytes, *timestamps: int, version: int = 9, wiped: int = 0, written: int = 5) -> Timeline:
    keys = [item_key(at) for at in timestamps]
    count = len(keys)
    rows = bytes((PUT,)) * count, keys, [b"v" * 10] * count, [version] * count, [written] * count
    return Timeline(timeline_key(TABLE, owner, BUCKETS), owner, version, wiped, *rows)


def link(start: int, owner: bytes, version: int, file: str = "a.arrow", carried: int = 0) -> Link:
    owners = timeline_hash(TABLE, owner).to_bytes(8, "little")
    block = Block(file, 0, 10, 0, 1, item_key(start), item_key(start + 50), owner, owner)
    others = [Carried(start + 9, 9, owners, pack_i64([carried]))] if carried else []
    return Link(
        FORMAT, 1, TABLE, start, start + 50, 1, start + 50, 10, owners, pack_i64([version]), 1, 1, "r", [block], others
    )


def test_each_window_that_may_hold_wiped_rows_is_rewritten_until_a_run_has_read_the_wipe() -> None:
    links = [link(0, b"a", 3), link(50, b"a", 4), link(100, b"a", 5), link(150, b"b", 1), link(200, b"a", 0, carried=5)]
    gone = timeline(b"a", wiped=4)  # wiped by its entry 5
    windows = with_wiped([], [gone], links, ALL)
    assert [window.start for window in windows] == [0, 50], "a run that has read entry 5 has left out what it wiped"
    assert all(window.due and window.parts == [(gone, 0, 0)] for window in windows)
    assert with_wiped([], [timeline(b"a", wiped=0)], links, ALL) == []
    assert [window.start for window in with_wiped([], [gone], links, 50)] == [50], "the first one has expired"


def test_a_window_with_rows_of_the_wiped_timeline_itself_names_it_once_and_does_not_wait() -> None:
    again = timeline(b"a", 3, 7, wiped=4)
    window = Window(0, 50, link(0, b"a", 3), [(again, 0, 2)])
    (found,) = with_wiped([window], [again], [link(0, b"a", 3)], ALL)
    assert found.parts == [(again, 0, 2)]
    assert split_waiting([found], NEVER, 10_000) == ([found], Waiting(0, 0))


def test_windows_of_files_that_go_are_rewritten_unless_they_have_expired() -> None:
    links = [link(0, b"a", 3, "x.arrow"), link(50, b"a", 3, "y.arrow"), link(100, b"a", 3, "x.arrow")]
    late = Window(50, 100, links[1], [(timeline(b"a", 60), 0, 1)])
    windows = with_rewritten([late], links, {"x.arrow"}, ALL)
    assert [(window.start, window.due, len(window.parts)) for window in windows] == [
        (0, True, 0),
        (50, False, 1),
        (100, True, 0),
    ]
    assert [window.start for window in with_rewritten([], links, {"x.arrow"}, 50)] == [100]


def test_a_window_waits_for_so_many_bytes_or_for_its_oldest_row() -> None:
    few = Window(0, 50, None, [(timeline(b"a", 10, 20, written=100), 0, 2)])
    assert split_waiting([few], NEVER, 1_000) == ([], Waiting(1, 2))
    assert split_waiting([few], NEVER, 2 * (1 + len(item_key(0)) + 10))[0] == [few]
    assert split_waiting([few], CutOffs(11, 101), 1_000)[0] == [few]
    for patience in (CutOffs(10, 101), CutOffs(11, 100)):
        assert split_waiting([few], patience, 1_000)[0] == [], "event time and write time both count"
    mixed = timeline(b"a", 10, 20)._replace(written=[100, 3])
    two = Window(0, 50, None, [(mixed, 0, 2)])
    assert split_waiting([two], CutOffs(11, 50), 1_000)[0] == [], "of one and the same row"
    assert split_waiting([two], CutOffs(MAX_TIMESTAMP, 50), 1_000)[0] == [two]
