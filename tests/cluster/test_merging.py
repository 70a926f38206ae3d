"""Merging blocks and what lies above them gives the newest row of each item, whatever way the rows take."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from timetier.cluster.cold.link import FORMAT, Link
from timetier.cluster.cold.merging import merge_window
from timetier.cluster.cold.rows import Rows
from timetier.cluster.cold.sinking import Timeline, Window
from timetier.cluster.keys import item_key, timeline_key, timestamp_floor
from timetier.cluster.messages import DELETE, PUT

OWNERS = [b"a", b"b", b"c"]
LINK = Link(FORMAT, 0, b"t", 0, 100, 1, 100, 100, b"", b"", 0, 0, "r", [])
Row = tuple[int, bytes, int, int]  # kind, value, version, written


def slow_merge(
    old: dict[tuple[bytes, bytes], Row], young: dict[tuple[bytes, bytes], Row], wiped: dict[bytes, int], horizon: int
) -> list[tuple[bytes, bytes, bytes, int, int]]:
    """The rule, item by item."""
    newest = dict(old)
    for place, row in young.items():
        if place not in newest or row[2] >= newest[place][2]:
            newest[place] = row
    return [
        (owner, key, value, version, written)
        for (owner, key), (kind, value, version, written) in sorted(newest.items())
        if kind == PUT and version > wiped.get(owner, 0) and key >= timestamp_floor(horizon)
    ]


def part_of(owner: bytes, rows: dict[bytes, Row], wiped: int) -> tuple[Timeline, int, int]:
    keys = sorted(rows)
    kinds, values, versions, written = zip(*[rows[key] for key in keys], strict=True)
    columns = list(values), list(versions), list(written)
    return Timeline(timeline_key(b"t", owner, 64), owner, 9, wiped, bytes(kinds), keys, *columns), 0, len(keys)


PLACES = st.tuples(st.sampled_from(OWNERS), st.builds(item_key, st.integers(0, 12), st.sampled_from([b"", b"x"])))
VERSIONS = st.integers(1, 9)


@settings(max_examples=400, deadline=None)
@given(
    st.dictionaries(PLACES, st.tuples(st.just(PUT), st.binary(max_size=2), VERSIONS, st.integers(0, 5)), max_size=20),
    st.dictionaries(
        PLACES,
        st.tuples(st.sampled_from([PUT, DELETE]), st.binary(max_size=2), VERSIONS, st.integers(0, 5)),
        max_size=20,
    ),
    st.dictionaries(st.sampled_from(OWNERS), st.integers(0, 9)),
    st.integers(-1, 14),
    st.integers(0, 20),
)
def test_the_newest_row_of_each_item_is_kept(
    old: dict[tuple[bytes, bytes], Row],
    young: dict[tuple[bytes, bytes], Row],
    wiped: dict[bytes, int],
    horizon: int,
    cut: int,
) -> None:
    """`cut`: where the old rows end in the first block and begin in the second."""
    rows = Rows()
    for (owner, key), (_, value, version, written) in sorted(old.items()):
        rows.append(owner, key, value, version, written)
    window = Window(0, 100, LINK if old else None)
    for owner in sorted({owner for owner, _ in young}, reverse=True):
        mine = {key: row for (of, key), row in young.items() if of == owner}
        window.parts.append(part_of(owner, mine, wiped.get(owner, 0)))
    blocks = [rows.part(0, cut), rows.part(cut, len(rows))]
    found = merge_window(window, blocks, wiped, horizon)
    merged = zip(found.owners, found.keys, found.values, found.versions, found.written, strict=True)
    assert list(merged) == slow_merge(old, young, wiped, horizon)


def test_a_timeline_that_was_scanned_in_two_parts_stays_in_order() -> None:
    rows = {item_key(at): (PUT, b"%d" % at, at + 1, 1) for at in range(10)}
    timeline, _, _ = part_of(b"a", rows, 0)
    window = Window(0, 100, None, [(timeline, 0, 4), (timeline, 4, 10)])
    assert merge_window(window, [], {}, 0).keys == sorted(rows)
    assert merge_window(Window(0, 100, None, [(timeline, 3, 3)]), [], {}, 0).keys == []
