"""Gathers the cold links of a table, and what hides rows of their blocks, strongly. *Pure* (a script of `effects.py`).

A majority of the replicas of each storage group is asked (`paxos/overlay.py` says for what). An answer is a set of
facts that never stop being true, so all that two replicas tell is put together. What makes the sum strong:

- A write that was acknowledged before the question has been accepted by one at least of any majority. That one tells
  it, has it in a block that its links name, or has it *open*: accepted, and not known to be chosen. All that are asked
  then find out, and are asked again; one of them is enough. What is opened afterwards was not acknowledged before.
- Replicas evict what a link covers, so of two that know different versions of a bucket's links the one that is behind
  may lack nothing, but may name blocks that were replaced. The later links count, and the replica that is behind is
  brought up to them and asked again: so its facts are of the windows that count.
- An answer of an incarnation that was replaced counts for nothing (`memory/incarnations.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ..client.view import View
from ..effects import Call, CallFailed, Script, Sleep
from ..errors import ProtocolError, Unavailable
from ..keys import bucket_of, split_timeline, system_timeline
from ..memory.incarnations import Incarnations
from ..messages import (
    OK,
    AskOverlay,
    BucketOverlay,
    Message,
    Overlay,
    Settle,
    Settled,
    pack_i64,
    pack_u32,
    unpack_i64,
    unpack_u32,
)
from .link import Link, decode_link
from .sink_calls import why_not


@dataclass(frozen=True, slots=True)
class LookSettings:
    """How the storage tier is asked.

    `buckets`: in one question. `answer_bytes`: of one answer, about. `call_timeout_s`: for one answer;
    `settle_timeout_s`: to find out about open entries. `attempts`: how often a replica is asked again for buckets with
    open entries, or with links that it lacks. `back_off_s`: pause before that, doubling. `fragment_bytes`: encoded
    blocks that a reader takes at a time.
    """

    buckets: int = 64
    answer_bytes: int = 4 << 20
    call_timeout_s: float = 10.0
    settle_timeout_s: float = 1.0
    attempts: int = 5
    back_off_s: float = 0.02
    fragment_bytes: int = 4 << 20


@dataclass(slots=True)
class Facts:
    """Links of one table in one bucket as of `system_version`, and what hides rows of their blocks.

    `items`: by (owner, item key), rows of a lower version are hidden. `wiped`: by owner, rows up to this version are
    deleted. `horizon`: rows with a timestamp below have expired. `opens`: entries by timeline.
    """

    bucket: int
    system_version: int
    horizon: int
    links: list[Link]
    items: dict[tuple[bytes, bytes], int] = field(default_factory=dict)
    wiped: dict[bytes, int] = field(default_factory=dict)
    opens: dict[bytes, int] = field(default_factory=dict)

    def take(self, part: BucketOverlay) -> None:
        """Add a part that goes on with this one. Raises ProtocolError."""
        counts, wiped = unpack_u32(part.counts), unpack_i64(part.wiped)
        versions, entries = unpack_i64(part.versions), unpack_i64(part.open_entries)
        same = len(part.timelines) == len(counts) == len(wiped) and sum(counts) == len(part.keys) == len(versions)
        if not same or len(part.opens) != len(entries):
            raise ProtocolError("the columns of an Overlay differ in length")
        self.horizon = max(self.horizon, part.horizon)
        rows = zip(part.keys, versions, strict=True)
        for timeline, count, version in zip(part.timelines, counts, wiped, strict=True):
            owner = split_timeline(timeline)[2]
            if version:
                self.wiped[owner] = version
            for _ in range(count):
                key, row_version = next(rows)
                self.items[owner, key] = row_version
        self.opens.update(zip(part.opens, entries, strict=True))

    def join(self, other: Facts) -> None:
        """Add the facts of another replica. Links are those of the later version."""
        if other.system_version > self.system_version:
            self.system_version, self.links = other.system_version, other.links
        self.horizon = max(self.horizon, other.horizon)
        for place, version in other.items.items():
            self.items[place] = max(version, self.items.get(place, 0))
        for owner, version in other.wiped.items():
            self.wiped[owner] = max(version, self.wiped.get(owner, 0))


class _Asked:
    """One replica, and what it has told so far of the buckets of one question. `left`: those to be asked for."""

    def __init__(self, node: str, table: bytes, buckets: Sequence[int]) -> None:
        self.node = node
        self.left = list(buckets)
        self.found: dict[int, Facts] = {}
        self.doubts: dict[bytes, int] = {}  # entries that were open here when it was first asked, by timeline
        self.settled: dict[bytes, int] = {}  # entries that it has found out about, before it was asked last
        self.attempts = 0
        self._table = table
        self._cursor = b""

    def question(self, limit_bytes: int) -> AskOverlay:
        return AskOverlay(self._table, pack_u32(self.left), self._cursor, limit_bytes)

    def take(self, answer: Overlay) -> None:
        """Note an answer. Raises ProtocolError."""
        if not answer.parts or [part.bucket for part in answer.parts] != self.left[: len(answer.parts)]:
            raise ProtocolError(f"{self.node} told of other buckets than it was asked for")
        for part in answer.parts:
            known = self.found.get(part.bucket) if self._cursor else None
            going_on, self._cursor = bool(self._cursor), b""
            if known is None:
                known = Facts(part.bucket, part.system_version, part.horizon, list(map(decode_link, part.links)))
                self.found[part.bucket] = known
            if going_on and known.system_version != part.system_version:
                del self.found[part.bucket]  # a link was chosen meanwhile: begin the bucket again
                return
            known.take(part)
            self.left.pop(0)
        if answer.next_cursor:
            last = answer.parts[-1].bucket
            self._cursor = answer.next_cursor
            self.left.insert(0, last)

    def lacks(self, versions: dict[int, int], asked: Sequence[_Asked]) -> dict[bytes, int]:
        """Entries about which somebody has to find out before the facts count, by timeline.

        `versions`: the latest version of each bucket's links that any replica has told. This replica itself has to
        reach that; of what is open here it is enough that one of `asked` knows.
        """
        wanted: dict[bytes, int] = {}
        for bucket, facts in self.found.items():
            for timeline, entry in facts.opens.items():
                first = self.doubts.setdefault(timeline, entry)
                if entry <= first and all(one.settled.get(timeline, 0) < first for one in asked):
                    wanted[timeline] = entry
            if facts.system_version < versions[bucket]:
                wanted[system_timeline(bucket)] = versions[bucket]
        return wanted

    def take_settled(self, wanted: dict[bytes, int], answer: Message | CallFailed) -> None:
        """Note what it has found out, and that it is to be asked again about the buckets of these timelines."""
        again = {bucket_of(timeline) for timeline in wanted}
        for bucket in again:
            self.found.pop(bucket, None)
        self.left, self._cursor = sorted(again), b""
        self.attempts += 1
        if isinstance(answer, Settled) and len(answer.outcomes) == len(wanted) == len(answer.versions) // 8:
            told = zip(wanted.items(), answer.outcomes, unpack_i64(answer.versions), strict=True)
            self.settled.update({t: entry for (t, entry), outcome, v in told if outcome == OK and v >= entry - 1})


def facts_of(view: View, table: bytes, settings: LookSettings) -> Iterator[tuple[int, list[int]]]:
    """Questions that cover all buckets of a table: storage group and buckets of each."""
    for group in range(view.routing.topology.storage_groups):
        buckets: list[int] = view.routing.buckets_of_storage_group(group).tolist()
        for start in range(0, len(buckets), settings.buckets):
            yield group, buckets[start : start + settings.buckets]


def look(view: View, table: bytes, group: int, buckets: Sequence[int], settings: LookSettings) -> Script[list[Facts]]:
    """Facts of some buckets of one storage group, in their order, as of an instant after the call. Raises Unavailable,
    ProtocolError."""
    waiting = sorted(view.routing.storage_nodes(group), key=view.is_suspect)
    needed = len(waiting) // 2 + 1
    incarnations = Incarnations()
    asked: list[_Asked] = []
    seen: dict[str, Sequence[int]] = {}
    reason = "there is no node to ask"
    while True:
        while len(asked) < needed:
            if not waiting:
                raise Unavailable(f"no majority tells what hides rows of cold blocks ({reason})")
            asked.append(_Asked(waiting.pop(0), table, buckets))
        open_ones = [one for one in asked if one.left]
        questions = [Call(o.node, o.question(settings.answer_bytes), settings.call_timeout_s) for o in open_ones]
        answers: list[Message] = yield questions
        for one, answer in zip(open_ones, answers, strict=True):
            try:
                if not isinstance(answer, Overlay):
                    raise ProtocolError(why_not(answer))
                one.take(answer)
                seen[one.node] = answer.incarnations
                view.trust(one.node)
            except ProtocolError as error:
                reason = f"{one.node}: {error.message}"
                view.suspect(one.node)
                asked.remove(one)
        for node, incarnation in seen.items():
            incarnations.is_current(node, incarnation)
        asked = [one for one in asked if incarnations.is_current(one.node, seen.get(one.node, []))]
        if len(asked) < needed or any(one.left for one in asked):
            continue
        versions = {b: max(one.found[b].system_version for one in asked) for b in buckets}
        lacking = [(one, wanted) for one in asked if (wanted := one.lacks(versions, asked))]
        if not lacking:
            return [_joined([one.found[bucket] for one in asked]) for bucket in buckets]
        for one, _ in lacking:
            if one.attempts == settings.attempts:
                reason = f"{one.node} does not get to know what was decided"
                asked.remove(one)
        if len(asked) == needed:
            yield from _settle(asked, [wanted for _, wanted in lacking], settings)


def _settle(asked: Sequence[_Asked], lacking: Sequence[dict[bytes, int]], settings: LookSettings) -> Script[None]:
    """Have all that are asked find out about entries; each will be asked again about their buckets."""
    attempt = max(one.attempts for one in asked)
    if attempt:
        yield Sleep(settings.back_off_s * 2 ** (attempt - 1))
    wanted: dict[bytes, int] = {}
    for entries in lacking:
        for timeline, entry in entries.items():
            wanted[timeline] = max(entry, wanted.get(timeline, 0))
    message = Settle(list(wanted), pack_i64(list(wanted.values())), int(settings.settle_timeout_s * 1_000))
    answers = yield [Call(one.node, message, settings.settle_timeout_s + 0.1) for one in asked]
    for one, answer in zip(asked, answers, strict=True):
        one.take_settled(wanted, answer)


def _joined(facts: Sequence[Facts]) -> Facts:
    first = facts[0]
    for other in facts[1:]:
        first.join(other)
    return first
