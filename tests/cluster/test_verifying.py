"""The comparison of replicas, against replicas that answer by hand: pages, races, silence, majorities, mending."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from storage_cluster import topology
from timetier.cluster.comparing import BEHIND, DIFFERS, UNDECIDED
from timetier.cluster.effects import Call, CallFailed, Script, Sleep
from timetier.cluster.errors import InvalidRequest
from timetier.cluster.keys import bucket_prefix, timeline_key
from timetier.cluster.messages import AskDigests, Digests, Failure, Mend, Message, Pong, pack_i64, unpack_i64
from timetier.cluster.routing import Routing
from timetier.cluster.verifying import VerifyProgress, VerifyReport, VerifySettings, verify

BUCKETS = 64
ROUTING = Routing(topology())
ALICE, BOB, CAROL = (timeline_key(b"t", owner, BUCKETS) for owner in (b"alice", b"bob", b"carol"))
MANY = [timeline_key(b"t", b"owner%d" % n, BUCKETS) for n in range(100)]

State = tuple[int, int, bytes]  # version, system version, what the digest is of


@dataclass
class Node:
    """One replica. `past`: digests of former versions that it can still give."""

    has: dict[bytes, State] = field(default_factory=dict)
    past: dict[tuple[bytes, int], bytes] = field(default_factory=dict)
    page: int = 7
    reason: str = ""
    before: Callable[[], None] = lambda: None

    def answer(self, nodes: list[Node], message: Message) -> Message | CallFailed:
        self.before()
        if self.reason:
            return Failure("Unavailable", self.reason)
        if isinstance(message, Mend):
            for name in message.timelines:
                self.has[name] = nodes[message.source].has[name]
            return Pong()
        assert isinstance(message, AskDigests)
        if message.timelines:
            rows = [self.row(n, at) for n, at in zip(message.timelines, unpack_i64(message.at), strict=True)]
            return digests(list(message.timelines), rows, -1, b"")
        start = message.cursor or bucket_prefix(message.bucket)
        names = [name for name in sorted(self.has) if name >= start]
        shown, rest = names[: self.page], names[self.page :]
        following = (int.from_bytes(rest[0][:4], "big"), rest[0]) if rest else (-1, b"")
        return digests(shown, [self.row(name, -1) for name in shown], *following)

    def row(self, name: bytes, at: int) -> State:
        version, system, content = self.has.get(name, (0, 0, b""))
        if at in (-1, version):
            return version, system, content
        return (at, system, self.past[name, at]) if (name, at) in self.past else (-1, system, b"")


def digests(names: list[bytes], rows: list[State], next_bucket: int, next_cursor: bytes) -> Digests:
    return Digests(
        names,
        pack_i64([row[0] for row in rows]),
        pack_i64([row[1] for row in rows]),
        b"".join(row[2].ljust(16, b"\0") for row in rows),
        next_bucket,
        next_cursor,
    )


class Group:
    """Three nodes under a script, and the time that its pauses take."""

    def __init__(self, has: dict[bytes, State]) -> None:
        self.nodes = [Node(dict(has)) for _ in range(3)]
        self.now_s = 0.0
        self.mended: list[Mend] = []
        self.told: list[VerifyProgress] = []

    def run(self, *, mend: bool = False, table: bytes | None = None, **settings: Any) -> VerifyReport:
        chosen = VerifySettings(**settings)
        script: Script[VerifyReport] = verify(
            ROUTING, settings=chosen, table=table, mend=mend, progress=self.told.append
        )
        try:
            effect = next(script)
            while True:
                effect = script.send(self._do(effect))
        except StopIteration as stop:
            report: VerifyReport = stop.value
            return report

    def _do(self, effect: list[Call] | Sleep) -> Any:
        if isinstance(effect, Sleep):
            self.now_s += effect.seconds
            return self.now_s
        return [self._answer(call) for call in effect]

    def _answer(self, call: Call) -> Message | CallFailed:
        if isinstance(call.message, Mend):
            self.mended.append(call.message)
        return self.nodes[int(call.node[-1])].answer(self.nodes, call.message)


def alike(names: list[bytes]) -> dict[bytes, State]:
    return {name: (3, 0, name[-8:]) for name in names}


def test_equal_replicas_are_equal_whatever_the_sizes_of_their_pages() -> None:
    group = Group(alike(MANY))
    for node, page in zip(group.nodes, (7, 3, 100), strict=True):
        node.page = page
    report = group.run()
    assert report.ok
    assert (report.timelines, report.equal, report.buckets_done, report.buckets) == (100, 100, BUCKETS, BUCKETS)
    done = [progress.buckets_done for progress in group.told]
    assert done == sorted(done)
    assert done[-1] == BUCKETS


@pytest.mark.parametrize("page", [1, 7, 1000])
def test_the_replica_that_differs_from_the_others_is_named(page: int) -> None:
    group = Group(alike(MANY))
    for node in group.nodes:
        node.page = page
    for number, name in ((0, MANY[3]), (2, MANY[50])):
        group.nodes[number].has[name] = (3, 0, b"changed")
    report = group.run()
    assert not report.ok
    assert (report.differing, report.equal) == (2, 98)
    found = {d.timeline: (d.kind, d.outliers, d.told[0].version) for d in report.differences}
    assert found == {MANY[3]: (DIFFERS, (0,), 3), MANY[50]: (DIFFERS, (2,), 3)}
    assert "replica 2 differs from 0 and 1" in [d.in_words() for d in report.differences]


def test_a_timeline_that_only_one_replica_lacks_or_only_one_has_is_found() -> None:
    group = Group(alike([ALICE, BOB]))
    del group.nodes[1].has[ALICE]
    group.nodes[0].has[CAROL] = (2, 0, b"only here")
    report = group.run()
    found = {d.timeline: d for d in report.differences}
    assert (found[ALICE].kind, found[ALICE].outliers) == (BEHIND, (1,))
    assert (found[CAROL].kind, found[CAROL].outliers) == (UNDECIDED, ())
    assert (report.behind, report.undecided, report.equal, report.timelines) == (1, 1, 1, 3)


def test_a_replica_that_gets_there_meanwhile_is_equal() -> None:
    group = Group(alike([ALICE]))
    group.nodes[2].has[ALICE] = (2, 0, b"older")
    asked = 0

    def arrive() -> None:
        nonlocal asked
        asked += 1
        if asked == 4:
            group.nodes[2].has[ALICE] = group.nodes[0].has[ALICE]

    group.nodes[2].before = arrive
    assert group.run().ok


def test_a_replica_that_never_gets_there_is_behind_and_never_counts_as_equal() -> None:
    group = Group(alike([ALICE]))
    group.nodes[2].has[ALICE] = (2, 0, b"older")
    for node in group.nodes:
        node.past[ALICE, 2] = b"older"
    report = group.run()
    assert [(d.kind, d.outliers) for d in report.differences] == [(BEHIND, (2,))]
    assert not report.ok


def busy(group: Group, same: bool) -> None:
    """Every replica goes on by one version with each question, and is asked at its own moment."""
    for number, node in enumerate(group.nodes):

        def go_on(node: Node = node, number: int = number) -> None:
            version, system, _ = node.has[ALICE]
            step = 1 + number
            for passed in range(version, version + step + 1):
                right = b"as of %d" % passed
                node.past[ALICE, passed] = right if same or number != 1 else b"other %d" % passed
            node.has[ALICE] = (version + step, system, node.past[ALICE, version + step])

        node.before = go_on


def test_a_timeline_that_is_written_all_the_time_is_compared_as_of_one_version() -> None:
    group = Group(alike([ALICE]))
    busy(group, same=True)
    assert group.run().ok


def test_a_difference_in_a_timeline_that_is_written_all_the_time_is_found() -> None:
    group = Group(alike([ALICE]))
    busy(group, same=False)
    report = group.run()
    assert [(d.kind, d.outliers) for d in report.differences] == [(DIFFERS, (1,))]


def test_other_cold_links_are_no_difference_and_no_equality() -> None:
    group = Group(alike([ALICE]))
    group.nodes[0].has[ALICE] = (3, 1, b"evicted here")
    report = group.run()
    assert [(d.kind, d.outliers) for d in report.differences] == [(UNDECIDED, ())]
    group.nodes[1].has[ALICE] = group.nodes[2].has[ALICE] = (3, 1, b"evicted here")
    assert group.run().ok


def test_a_replica_that_can_not_tell_is_undecided() -> None:
    group = Group(alike([ALICE]))
    group.nodes[0].has[ALICE] = (-1, 0, b"")
    report = group.run()
    assert [(d.kind, d.outliers) for d in report.differences] == [(UNDECIDED, ())]
    assert not report.ok


def test_where_all_differ_all_are_named_and_nothing_is_touched() -> None:
    group = Group(alike([ALICE]))
    for number, node in enumerate(group.nodes):
        node.has[ALICE] = (3, 0, b"%d" % number)
    report = group.run(mend=True)
    (difference,) = report.differences
    assert (difference.kind, difference.outliers, difference.mended) == (DIFFERS, (), None)
    assert difference.in_words() == "all replicas differ"
    assert group.mended == []


def test_a_replica_that_does_not_answer_is_reported_and_the_others_are_compared() -> None:
    group = Group(alike(MANY))
    group.nodes[1].reason = "it is learning"
    group.nodes[2].has[MANY[0]] = (3, 0, b"changed")
    report = group.run()
    assert not report.ok
    assert [(n.replica, n.node, n.bucket, n.reason) for n in report.not_compared] == [
        (1, "storage-0-1", 0, "it is learning")
    ]
    (difference,) = report.differences
    assert (difference.kind, difference.outliers) == (DIFFERS, ())
    assert "no majority" in difference.in_words()
    assert report.equal == 99


def test_one_replica_alone_compares_nothing() -> None:
    group = Group(alike(MANY))
    group.nodes[0].reason = group.nodes[1].reason = "away"
    report = group.run()
    assert not report.ok
    assert (report.timelines, report.buckets_done, len(report.not_compared)) == (0, 0, 2)


def test_a_replica_that_comes_back_within_patience_is_compared() -> None:
    group = Group(alike(MANY))
    asked = 0

    def come_back() -> None:
        nonlocal asked
        asked += 1
        group.nodes[0].reason = "" if asked > 3 else "it restarts"

    group.nodes[0].before = come_back
    assert group.run().ok


def test_what_differs_is_mended_from_the_majority_and_compared_again() -> None:
    group = Group(alike(MANY))
    for name in MANY[:10]:
        group.nodes[2].has[name] = (3, 0, b"changed")
    del group.nodes[1].has[MANY[20]]
    report = group.run(mend=True)
    assert report.ok
    assert (report.mended, report.equal, report.differing) == (11, 100, 0)
    assert all(d.mended for d in report.differences)
    assert {(m.source in (0, 1), MANY[20] in m.timelines) for m in group.mended} >= {(True, False)}
    assert all(message.source != 2 for message in group.mended if MANY[20] not in message.timelines)
    assert group.run().ok


def test_what_can_not_be_mended_is_left_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group(alike([ALICE]))
    wrong = (3, 0, b"changed")
    group.nodes[2].has[ALICE] = wrong

    def stay() -> None:
        group.nodes[2].has[ALICE] = wrong

    group.nodes[2].before = stay
    report = group.run(mend=True)
    assert [(d.kind, d.mended) for d in report.differences] == [(DIFFERS, False)]
    assert (report.mended, report.differing) == (0, 1)
    assert not report.ok


def test_named_differences_are_bounded_and_all_are_counted() -> None:
    group = Group(alike(MANY))
    for name in MANY[:30]:
        group.nodes[2].has[name] = (3, 0, b"changed")
    report = group.run(named=5)
    assert (len(report.differences), report.differing) == (5, 30)


def test_a_rate_is_kept_to() -> None:
    group = Group(alike(MANY))
    group.run(timelines_per_s=20.0)
    assert 4.9 < group.now_s < 5.5


def test_one_table_is_compared_alone() -> None:
    other = timeline_key(b"other", b"alice", BUCKETS)
    group = Group(alike([ALICE, BOB, other]))
    group.nodes[0].has[other] = (3, 0, b"changed")
    report = group.run(table=b"t")
    assert (report.ok, report.timelines) == (True, 2)
    assert not group.run(table=b"other").ok


def test_groups_of_one_replica_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="nothing to compare"):
        next(verify(Routing(topology(storage_replicas=1))))
