"""Comparing all replicas of every group by digest, while reads and writes go on, and mending what differs.

*Pure* (a script, see `effects.py`). Group by group, the replicas are asked for pages of digests from the same place
on; timelines of which all of them told the same version and digest are done. The others are asked for again by name:
first as of the greatest version that any replica had at first (so a replica that lags behind must get there, and one
that has gone on tells of the past), then as of the present, with pauses that grow. What is still undecided after the
last round is reported as such. So is a replica that gives no answer: the others are compared without it.

A repair is the same walk. A replica that a majority disagrees with is told to replace the timeline by the state of a
replica of that majority, and both are compared again. Where no majority agrees nothing is touched: nobody knows who
is right.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from .comparing import BEHIND, DIFFERS, EQUAL, Difference, Told, conclusion, verdict
from .effects import Call, CallFailed, Script, Sleep
from .errors import InvalidRequest
from .keys import bucket_of, bucket_prefix, split_timeline
from .messages import AskDigests, Digests, Failure, Mend, Message, Pong, pack_i64, unpack_i64
from .routing import Routing

DIGEST_BYTES = 16
_REST = 1.0  # times as long as a page took, so that reads and writes have the nodes for half of the time at least
_END = b"\xff" * 8  # after every timeline key


@dataclass(frozen=True, slots=True)
class VerifySettings:
    """Settings of a comparison.

    `timelines_per_s`: rate limit, over all replicas of a group at once. `rounds`: how often a timeline that changes is
    asked for again; the pause between them starts at `pause_s` and doubles up to `pause_max_s`, in all some seconds
    more than the interval at which replicas compare how far they are. `patience_s`: how long a replica may give no
    answer until the others go on without it. `named`: differences that are listed; further ones are only counted.
    `by_name`: timelines of one question by name, and of one order to mend. `mend_patience_s`: how long the timelines
    of a page may take until those that still differ count as left.
    """

    timelines_per_s: float = 20_000.0
    rounds: int = 12
    pause_s: float = 0.02
    pause_max_s: float = 1.0
    patience_s: float = 5.0
    call_timeout_s: float = 20.0
    named: int = 1_000
    by_name: int = 100
    mend_patience_s: float = 20.0


@dataclass(frozen=True, slots=True)
class NotCompared:
    """A replica that was left out of its group's comparison, from `bucket` on."""

    group: int
    replica: int
    node: str
    bucket: int
    reason: str


@dataclass(slots=True)
class VerifyReport:
    """What a comparison found.

    `timelines`: looked at, `equal`: on all replicas that were compared. `differing`, `behind`, `undecided`: see
    `comparing.Difference`; those that were mended count as `mended` and `equal`. `differences`: the first of them by
    name, mended ones too. `buckets_done`: compared on two replicas at least, of `buckets`.
    """

    groups: int = 0
    buckets: int = 0
    buckets_done: int = 0
    timelines: int = 0
    equal: int = 0
    differing: int = 0
    behind: int = 0
    undecided: int = 0
    mended: int = 0
    seconds: float = 0.0
    differences: list[Difference] = field(default_factory=list)
    not_compared: list[NotCompared] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every replica of every bucket was compared, and all of them are equal."""
        wrong = self.differing or self.behind or self.undecided or self.not_compared
        return not wrong and self.buckets_done == self.buckets


@dataclass(frozen=True, slots=True)
class VerifyProgress:
    """How far a comparison is."""

    buckets_done: int
    buckets: int
    timelines: int
    found: int  # timelines that are not equal


def verify(
    routing: Routing,
    *,
    settings: VerifySettings | None = None,
    table: bytes | None = None,
    mend: bool = False,
    progress: Callable[[VerifyProgress], None] = lambda _: None,
) -> Script[VerifyReport]:
    """Compare all replicas of every storage group. Raises InvalidRequest when the groups have only one replica.

    `table`: only its timelines; else all, the cold links of each bucket too. `mend`: replace what a majority of the
    replicas disagrees with.
    """
    if routing.topology.storage_replicas < 2:
        raise InvalidRequest("the groups of this cluster have one replica each: there is nothing to compare")
    return (yield from _Comparison(routing, settings or VerifySettings(), table, mend, progress).go())


Answers = dict[int, Told]
"""What was told of one timeline, by replica."""


class _Comparison:
    """One run. `live`: replicas of the present group that answer."""

    def __init__(
        self,
        routing: Routing,
        settings: VerifySettings,
        table: bytes | None,
        mend: bool,
        progress: Callable[[VerifyProgress], None],
    ) -> None:
        self.routing = routing
        self.settings = settings
        self.table = table
        self.mend = mend
        self.progress = progress
        self.report = VerifyReport()
        self.group = 0
        self.live: list[int] = []
        self.at = b""  # the walk has come so far: a timeline key, or a part of one

    def go(self) -> Script[VerifyReport]:
        topology = self.routing.topology
        began_s = yield Sleep(0)
        self.report.groups = topology.storage_groups
        self.report.buckets = topology.buckets
        for group in range(topology.storage_groups):
            yield from self._compare_group(group)
        self.report.seconds = (yield Sleep(0)) - began_s
        return self.report

    def _compare_group(self, group: int) -> Script[None]:
        self.group = group
        self.live = list(range(self.routing.topology.storage_replicas))
        owned = self.routing.buckets_of_storage_group(group).tolist()
        done_before = self.report.buckets_done
        self.at = bucket_prefix(owned[0]) if owned else _END
        while self.at < _END:
            began_s = yield Sleep(0)
            pages = yield from self._ask_all(AskDigests(bucket_of(self.at), self.at if len(self.at) > 4 else b""))
            if len(pages) < 2:
                break
            end = min(_end_of(page) for page in pages.values())
            told = self._told(pages, end)
            yield from self._compare(told)
            self.at = end
            passed = bisect_left(owned, bucket_of(end)) if end < _END else len(owned)
            self.report.buckets_done = done_before + passed
            self._tell()
            spent_s = (yield Sleep(0)) - began_s
            yield Sleep(max(len(told) / self.settings.timelines_per_s - spent_s, spent_s * _REST))
        self._tell()

    def _tell(self) -> None:
        found = self.report.differing + self.report.behind + self.report.undecided
        self.progress(VerifyProgress(self.report.buckets_done, self.report.buckets, self.report.timelines, found))

    # ---- questions

    def _node(self, replica: int) -> str:
        return self.routing.topology.storage_node(self.group, replica)

    def _ask_all(self, message: AskDigests) -> Script[dict[int, Digests]]:
        """Answers by replica. Who gives none for a while is left out for the rest of the group."""
        found: dict[int, Digests] = {}
        waited_s, pause_s = 0.0, 0.1
        while waiting := [replica for replica in self.live if replica not in found]:
            answers = yield [Call(self._node(r), message, self.settings.call_timeout_s) for r in waiting]
            reasons: dict[int, str] = {}
            for replica, answer in zip(waiting, answers, strict=True):
                reason = self._why_not(message, answer)
                if reason:
                    reasons[replica] = reason
                else:
                    found[replica] = answer
            if reasons and waited_s >= self.settings.patience_s:
                for replica, reason in reasons.items():
                    self._leave_out(replica, reason)
            elif reasons:
                yield Sleep(pause_s)
                waited_s, pause_s = waited_s + pause_s, min(2 * pause_s, self.settings.pause_max_s)
        return found

    def _why_not(self, message: AskDigests, answer: Message | CallFailed) -> str:
        """Why an answer can't be used; "" if it can."""
        if isinstance(answer, CallFailed):
            return answer.reason
        if isinstance(answer, Failure):
            return answer.message
        if not isinstance(answer, Digests):
            return f"it answered with {type(answer).__name__}"
        count = len(answer.timelines)
        if not len(answer.versions) == len(answer.systems) == 8 * count or len(answer.digests) != DIGEST_BYTES * count:
            return "it answered with columns of different lengths"
        if message.timelines:
            return "" if count else "it told nothing of the timelines that it was asked for"
        return "" if _end_of(answer) > self.at else "its pages do not go on"

    def _leave_out(self, replica: int, reason: str) -> None:
        self.live.remove(replica)
        bucket = bucket_of(self.at)
        self.report.not_compared.append(NotCompared(self.group, replica, self._node(replica), bucket, reason))

    def _ask_by_name(self, at: Mapping[bytes, int]) -> Script[dict[bytes, Answers]]:
        """What the replicas tell of single timelines, as of the versions that `at` gives (-1: the present one)."""
        found: dict[bytes, Answers] = {name: {} for name in at}
        for names in _chunks(sorted(at), self.settings.by_name):
            question = AskDigests(bucket_of(names[0]), b"", names, pack_i64([at[name] for name in names]))
            answers = yield from self._ask_all(question)
            for replica, answer in answers.items():
                for name, told in _rows(answer):
                    if name in found:
                        found[name][replica] = told
        return found

    def _told(self, pages: Mapping[int, Digests], end: bytes) -> dict[bytes, Answers]:
        """The wanted timelines of the pages up to `end`, with what each replica told of them."""
        found: dict[bytes, Answers] = {}
        for replica, page in pages.items():
            for name, told in _rows(page):
                if self.at <= name < end and (self.table is None or split_timeline(name)[1] == self.table):
                    found.setdefault(name, {})[replica] = told
        return found

    # ---- comparing

    def _compare(self, told: dict[bytes, Answers]) -> Script[None]:
        """Compare the timelines of a page, mend if wanted, and count."""
        self.report.timelines += len(told)
        differences = yield from self._judge(told)
        self.report.equal += len(told) - len(differences)
        if self.mend:
            yield from self._mend(differences)
        for difference in differences:
            if difference.mended:
                self.report.mended += 1
                self.report.equal += 1
            elif difference.kind == DIFFERS:
                self.report.differing += 1
            elif difference.kind == BEHIND:
                self.report.behind += 1
            else:
                self.report.undecided += 1
            if len(self.report.differences) < self.settings.named:
                self.report.differences.append(difference)

    def _judge(self, told: dict[bytes, Answers]) -> Script[list[Difference]]:
        """Differences among timelines, after as many rounds of questions as are needed."""
        last = dict(told)
        target = {name: max((a.version for a in answers.values()), default=0) for name, answers in told.items()}
        differences: dict[bytes, Difference] = {}
        undecided = self._sort_out(told, last, target, differences)
        pause_s = self.settings.pause_s
        for _ in range(self.settings.rounds):
            if not undecided or len(self.live) < 2:
                break
            yield Sleep(pause_s)
            pause_s = min(2 * pause_s, self.settings.pause_max_s)
            past = yield from self._ask_by_name({name: target[name] for name in undecided})
            gone = {name for name in undecided if _is_gone(past[name], last[name], target[name])}
            undecided = self._sort_out(past, last, target, differences)
            present = yield from self._ask_by_name(dict.fromkeys(undecided, -1))
            undecided = self._sort_out(present, last, target, differences)
            for name in gone.intersection(undecided):
                target[name] = max([target[name], *(answer.version for answer in present[name].values())])
        replicas = self.routing.topology.storage_replicas
        for name in undecided:
            differences[name] = conclusion(self.group, name, last[name], target[name], replicas)
        return [differences[name] for name in sorted(differences)]

    def _sort_out(
        self,
        told: Mapping[bytes, Answers],
        last: dict[bytes, Answers],
        target: Mapping[bytes, int],
        differences: dict[bytes, Difference],
    ) -> list[bytes]:
        """Note what differs and what was told `last` of the rest; the timelines that are still undecided."""
        undecided = []
        for name, answers in told.items():
            found = verdict(answers, len(self.live))
            if found == EQUAL and next(iter(answers.values())).version >= target[name]:
                continue
            if found == DIFFERS:
                replicas = self.routing.topology.storage_replicas
                differences[name] = conclusion(self.group, name, answers, 0, replicas)
                continue
            last[name] = {r: a for r, a in {**last.get(name, {}), **answers}.items() if r in self.live}
            undecided.append(name)
        return undecided

    # ---- mending

    def _mend(self, differences: Sequence[Difference]) -> Script[None]:
        """Have the outliers replace what they have, and note which timelines are equal afterwards."""
        mendable = {d.timeline: d for d in differences if d.outliers}
        ends_s = (yield Sleep(0)) + self.settings.mend_patience_s
        now_s, pause_s = 0.0, self.settings.pause_s
        while now_s < ends_s and len(self.live) >= 2:
            waiting = [d for d in mendable.values() if not d.mended]
            if not waiting:
                return
            # Told again each time: a state that came for a version that is no longer the present one was in vain.
            yield from self._order_mending(waiting)
            now_s = yield Sleep(pause_s)
            pause_s = min(2 * pause_s, self.settings.pause_max_s)
            told = yield from self._ask_by_name({d.timeline: -1 for d in waiting})
            unequal = {difference.timeline for difference in (yield from self._judge(told))}
            for difference in waiting:
                difference.mended = difference.timeline not in unequal

    def _order_mending(self, differences: Sequence[Difference]) -> Script[None]:
        orders: dict[tuple[int, int], list[bytes]] = {}
        for difference in differences:
            for outlier in difference.outliers:
                orders.setdefault((outlier, difference.source), []).append(difference.timeline)
        for (outlier, source), names in orders.items():
            for chunk in _chunks(names, self.settings.by_name):
                (answer,) = yield [Call(self._node(outlier), Mend(chunk, source), self.settings.call_timeout_s)]
                if not isinstance(answer, Pong):
                    return  # it went away: what is left shows in the comparison that follows


def _is_gone(past: Answers, before: Answers, target: int) -> bool:
    """Whether a replica that had reached the target no longer has all of it: then a later version must do."""
    return any(not told.known and r in before and before[r].version >= target for r, told in past.items())


def _rows(page: Digests) -> Iterator[tuple[bytes, Told]]:
    versions, systems = unpack_i64(page.versions), unpack_i64(page.systems)
    for at, name in enumerate(page.timelines):
        digest = page.digests[at * DIGEST_BYTES : (at + 1) * DIGEST_BYTES]
        yield name, Told(versions[at], systems[at], digest)


def _end_of(page: Digests) -> bytes:
    """The least key that a page tells nothing of."""
    if page.next_bucket < 0:
        return _END
    return page.next_cursor or bucket_prefix(page.next_bucket)


def _chunks(names: Sequence[bytes], size: int) -> Iterator[list[bytes]]:
    for start in range(0, len(names), size):
        yield list(names[start : start + size])
