"""Proof that pages in memory are current: one question to two replicas for many timelines, in columns (*pure*).

Most reads meet a page that is current. For these a strong read needs no data, only a majority of the replicas that
say "my version of this timeline is yours, and nothing is open after it" (`messages.Same`), which is the first rule
of `votes`. Asked with fixed-size columns and answered from the replicas' version caches, that costs a fraction of a
microsecond a timeline. Whatever can't be proven so takes the long way, through `reading`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..counters import Counters
from ..effects import Call, CallFailed, Script
from ..errors import ProtocolError
from ..keys import PERMUTATIONS
from ..messages import AskSame, AskVersions, Message, Same, unpack_u32
from ..suspicion import Suspicion
from .incarnations import Incarnations
from .pages import Page

_FEW = 256  # pages; array operations, each of which finds its code and data cold, begin to pay above that
MAX_REPLICAS = 3
_LABELS = np.dtype([("digest", "V16"), ("version", "<i8"), ("marks", "<i8", (MAX_REPLICAS,)), ("order", "<i8")])
_LABEL = struct.Struct(f"<16sq{MAX_REPLICAS}qq")
_DIGEST, _VERSION, _ORDER_AT = slice(16), slice(16, 24), 24 + 8 * MAX_REPLICAS
_MARKS = [slice(24 + 8 * replica, 32 + 8 * replica) for replica in range(MAX_REPLICAS)]
_MASK = (1 << 64) - 1


class Label(NamedTuple):
    """What a question whether a page is current needs, packed into `Page.label`: one column for many pages.

    `digest`, `order`: the timeline's `timeline_digest` and `priority_index`. `version`: of the page. `marks`: by
    replica, one at which it knew of no later horizon than the page's (see `messages.Same`), 0 for none.
    """

    digest: bytes
    version: int
    marks: tuple[int, ...]
    order: int

    @classmethod
    def of(cls, page: Page) -> Label:
        digest, version, *marks, order = _LABEL.unpack(page.label)
        return cls(digest, version, tuple(marks), order)

    def packed(self) -> bytes:
        return _LABEL.pack(self.digest, self.version, *self.marks, self.order)


class Glances:
    """Asks the replicas of one storage group. `names`: their nodes, by replica number."""

    def __init__(
        self,
        suspicion: Suspicion,
        incarnations: Incarnations,
        counters: Counters,
        *,
        attempt_timeout_s: float,
        probation_timeout_s: float,
    ) -> None:
        """The times are those of `ReaderSettings`."""
        self._suspicion = suspicion
        self._incarnations = incarnations
        self._counters = counters
        self._attempt_timeout_s = attempt_timeout_s
        self._probation_timeout_s = probation_timeout_s

    def prove(self, pages: Sequence[Page], names: Sequence[str]) -> Script[list[int]]:
        """Which of the pages could not be proven to be current: their indices. `names`: nodes by replica number."""
        generation = self._incarnations.generation
        unproven = yield from (self._prove_few if len(pages) <= _FEW else self._prove_many)(pages, names)
        if generation != self._incarnations.generation:
            return list(range(len(pages)))  # one of the votes may be of an incarnation that has been replaced
        return unproven

    def _prove_few(self, pages: Sequence[Page], names: Sequence[str]) -> Script[list[int]]:
        labels = [page.label for page in pages]
        groups: dict[int, list[int]] = {}  # places of pages by order of priority, as which they are asked together
        for place, label in enumerate(labels):
            groups.setdefault(label[_ORDER_AT], []).append(place)
        asked: dict[str, list[int]] = {}  # orders of the pages
        voters = {order: self._voters_of(order, names) for order in groups}
        for order in groups:
            for name in voters[order]:
                asked.setdefault(name, []).append(order)
        digests = {order: b"".join([labels[place][_DIGEST] for place in group]) for order, group in groups.items()}
        versions = {order: b"".join([labels[place][_VERSION] for place in group]) for order, group in groups.items()}
        calls = [
            self._call(name, b"".join(map(digests.__getitem__, orders)), b"".join(map(versions.__getitem__, orders)))
            for name, orders in asked.items()
        ]
        replies = yield calls
        marks: dict[str, bytes] = {}  # of who answered as is due
        refused: set[int] = set()  # places of which one of those who were asked does not say `same`
        for (name, orders), reply in zip(asked.items(), replies, strict=True):
            others = self._take(name, sum([len(groups[order]) for order in orders]), reply)
            if others is not None:
                marks[name] = (reply.mark & _MASK).to_bytes(8, "little")
                places = [place for order in orders for place in groups[order]] if others else []
                refused.update([places[at] for at in others])
        unproven: list[int] = []
        for order, group in groups.items():
            if marks.keys() >= set(voters[order]):  # who are no more than a majority
                for name in voters[order]:
                    mark, cut = marks[name], _MARKS[names.index(name)]
                    refused.update([place for place in group if labels[place][cut] != mark])
                unproven += [place for place in group if place in refused] if refused else []
            else:
                unproven += group
        return unproven

    def _prove_many(self, pages: Sequence[Page], names: Sequence[str]) -> Script[list[int]]:
        labels = np.frombuffer(b"".join([page.label for page in pages]), dtype=_LABELS)
        orders, versions, marks, digests = (labels[name] for name in ("order", "version", "marks", "digest"))
        voters = self._voters(names)
        calls: list[Call] = []
        asked: list[npt.NDArray[np.intp]] = []
        for replica, name in enumerate(names):
            places = np.flatnonzero(voters[orders, replica])
            if len(places):
                calls.append(self._call(name, digests[places].tobytes(), versions[places].tobytes()))
                asked.append(places)
        replies = yield calls
        votes = np.zeros(len(pages), dtype=np.int64)
        for call, places, reply in zip(calls, asked, replies, strict=True):
            others = self._take(call.node, len(places), reply)
            if others is not None:
                same = np.delete(places, others) if others else places
                votes[same] += marks[same, names.index(call.node)] == reply.mark
        unproven: list[int] = np.flatnonzero(votes <= len(names) // 2).tolist()
        return unproven

    def _voters(self, names: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Whether a replica is among those that are asked, by order of priority and replica."""
        orders = len(PERMUTATIONS[len(names)])
        voters = np.zeros((orders, len(names)), dtype=np.bool_)
        for order in range(orders):
            asked = self._voters_of(order, names)
            voters[order] = [name in asked for name in names]
        return voters

    def _voters_of(self, order: int, names: Sequence[str]) -> list[str]:
        """As many nodes as make a majority, by priority, suspected ones last."""
        nodes = [names[replica] for replica in PERMUTATIONS[len(names)][order]]
        return self._suspicion.last(nodes)[: len(names) // 2 + 1]

    def _call(self, name: str, digests: bytes, versions: bytes) -> Call:
        self._counters.add("version_checks", len(versions) // 8)
        timeout_s = self._attempt_timeout_s
        if self._suspicion.remembers:
            timeout_s = self._suspicion.timeout_s(name, timeout_s, self._probation_timeout_s)
        return Call(name, AskSame(digests, versions), timeout_s)

    def _take(self, node: str, count: int, reply: Message | CallFailed) -> list[int] | None:
        """Indices of the questions that a node does not say `same` to; None if it brought no answer that counts."""
        if not isinstance(reply, Same):
            self._counters.add("node_failures")
            self._suspicion.blame(node, reply, AskVersions([]))
            return None
        try:
            if not self._incarnations.is_current(node, reply.incarnations):
                raise ProtocolError(f"{node} answers for an incarnation that was replaced")
            others = unpack_u32(reply.others) if reply.others else []
            if others and max(others) >= count:
                raise ProtocolError(f"{node} named question {max(others)} of {count}")
        except ProtocolError:
            self._counters.add("bad_answers")
            return None
        if self._suspicion.remembers:
            self._suspicion.trust(node)
        return others
