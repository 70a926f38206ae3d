"""How much data of which age lies in which tier, and how old is what is read. *Pure* (a script, see `effects.py`).

The storage tier is asked for the ages of rows and of cold links in a sample of buckets (`sampling.py`), until the
stated error is small enough, or in all of them; cache nodes for the ages of what their pages hold; cache and storage
nodes for the ages of what was read. After each answer the script rests as long as that took.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from .ages import BINS, add_to, edges_of, youngest_first
from .client.view import View
from .effects import Call, CallFailed, Script, Sleep
from .errors import InvalidRequest, Unavailable
from .messages import (
    Ages,
    AskAges,
    AskHeld,
    AskReads,
    AskTables,
    Failure,
    Held,
    Message,
    ReadAges,
    Tables,
    pack_i64,
    pack_u32,
    unpack_i64,
)
from .paxos.age_scans import buckets_at_once
from .sampling import needed_sample, relative_error, sample_order

FIRST_SAMPLE = 64
MAX_SAMPLE = 8_192  # buckets, unless all are wanted
DEFAULT_ERROR = 0.05
_CALL_TIMEOUT_S = 20.0
_QUIET_S = 1.0  # a node that does not even say that it is there is given up after twice as long
_ATTEMPTS = 2  # with all nodes that may answer
_REST = 1.0  # times as long as an answer took
_LONGEST_REST_S = 2.0
_FEW_PAGES = 500  # are all looked at

M = TypeVar("M", bound=Message)


@dataclass(slots=True)
class TableTiers:
    """Figures of one table, each by age: lists in the order of `ages.BIN_NAMES`, youngest first.

    `storage_items`: visible items in the storage tier, `storage_bytes`: of all their rows, one copy. `cold_items`: rows
    of the blocks that links name (they may have been replaced or deleted since), `cold_raw_bytes` and `cold_bytes`:
    before and after encoding, one copy. `memory_items`, `memory_bytes`: in the pages of all cache nodes. `reads_hour`,
    `reads_day`: items read.
    `buckets_asked` of `buckets`: storage and cold figures are scaled by `factor`; the totals of `storage_bytes` and
    `cold_raw_bytes` are right within `storage_error` and `cold_error` (relative) in 95 of 100 cases.
    """

    table: str
    per_second: int
    buckets: int
    buckets_asked: int = 0
    factor: float = 1.0
    storage_error: float = 0.0
    cold_error: float = 0.0
    storage_items: list[int] = field(default_factory=lambda: [0] * BINS)
    storage_bytes: list[int] = field(default_factory=lambda: [0] * BINS)
    cold_items: list[int] = field(default_factory=lambda: [0] * BINS)
    cold_raw_bytes: list[int] = field(default_factory=lambda: [0] * BINS)
    cold_bytes: list[int] = field(default_factory=lambda: [0] * BINS)
    memory_items: list[int] = field(default_factory=lambda: [0] * BINS)
    memory_bytes: list[int] = field(default_factory=lambda: [0] * BINS)
    reads_hour: list[int] = field(default_factory=lambda: [0] * BINS)
    reads_day: list[int] = field(default_factory=lambda: [0] * BINS)

    def data_curve(self) -> list[float]:
        """Share of the data (bytes before encoding, both tiers) up to each age."""
        return cumulative([hot + cold for hot, cold in zip(self.storage_bytes, self.cold_raw_bytes, strict=True)])

    def read_curve(self) -> list[float]:
        """Share of the last day's reads up to each age."""
        return cumulative(self.reads_day)


@dataclass(slots=True)
class Survey:
    """What was found. `silent`: nodes that gave no answer, and why: their reads and pages are missing."""

    asked_at_us: int
    exact: bool
    tables: list[TableTiers] = field(default_factory=list)
    silent: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def cumulative(figures: Sequence[int]) -> list[float]:
    """Shares of the total up to each place; zeros when there is nothing."""
    total, reached, shares = sum(figures), 0, []
    for figure in figures:
        reached += figure
        shares.append(reached / total if total else 0.0)
    return shares


def survey(
    view: View,
    *,
    now_us: int,
    table: str | None = None,
    exact: bool = False,
    error: float = DEFAULT_ERROR,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> Script[Survey]:
    """Look at all tiers. `now_us`: microseconds since 1970. `table`: only this one. `exact`: ask for all buckets.

    `error`: the relative error up to which the sample grows. `progress` is told buckets asked and wanted.
    Raises InvalidRequest for an unknown table, Unavailable when a storage group does not answer.
    """
    if not 0 < error <= 1:
        raise InvalidRequest(f"error={error!r}: pass a number above 0 and up to 1, such as 0.05")
    return (yield from _Survey(view, now_us, exact, error, progress).go(table))


class _Survey:
    def __init__(
        self, view: View, now_us: int, exact: bool, error: float, progress: Callable[[int, int | None], None]
    ) -> None:
        self.view = view
        self.topology = view.routing.topology
        self.target = error
        self.found = Survey(now_us, exact)
        self.progress = progress
        self.order = sample_order(self.topology.buckets)
        self.turn = 0  # so that questions go to all replicas alike

    def go(self, only: str | None) -> Script[Survey]:
        began_s = self.view.now()
        names = [only] if only is not None else (yield from self._names())
        for name in names:
            policy = self.view.routing.policy(name)
            tiers = TableTiers(name, policy.per_second, self.topology.buckets)
            edges = edges_of(self.found.asked_at_us, policy.per_second)
            yield from self._sample(tiers, edges)
            yield from self._memory(tiers, edges)
            self.found.tables.append(tiers)
        yield from self._reads()
        self.found.seconds = self.view.now() - began_s
        return self.found

    def _names(self) -> Script[list[str]]:
        """Tables that have a policy, and rows or cold links anywhere."""
        names: set[bytes] = set()
        for group in range(self.topology.storage_groups):
            bucket = 0
            while bucket >= 0:
                answer = yield from self._ask(group, AskTables(bucket), Tables)
                names.update(answer.names)
                if 0 <= answer.next_bucket <= bucket:
                    raise Unavailable(f"storage group {group} names tables without going on")
                bucket = answer.next_bucket
        return sorted(name for name in map(bytes.decode, names) if self.topology.policy(name) is not None)

    # ------------------------------------------------------------ storage and cold

    def _sample(self, tiers: TableTiers, edges: list[int]) -> Script[None]:
        """Ask for more and more buckets, until the error is small enough."""
        sums = _Sums()
        wanted = tiers.buckets if self.found.exact else min(FIRST_SAMPLE, tiers.buckets)
        most = tiers.buckets if self.found.exact else min(MAX_SAMPLE, tiers.buckets)
        while sums.asked < wanted:
            yield from self._ask_buckets(tiers.table, self.order[sums.asked : wanted], edges, sums, wanted)
            needed = max(needed_sample(figures, tiers.buckets, self.target) for figures in sums.of_error())
            if needed > sums.asked:
                wanted = min(most, max(needed, sums.asked + sums.asked // 2))
        tiers.buckets_asked = sums.asked
        tiers.factor = tiers.buckets / sums.asked
        storage, cold = (relative_error(figures, tiers.buckets) for figures in sums.of_error())
        tiers.storage_error, tiers.cold_error = storage, cold
        for name, by_bin in zip(_COLUMNS, sums.by_bin, strict=True):
            setattr(tiers, name, [round(figure * tiers.factor) for figure in youngest_first(by_bin)])

    def _ask_buckets(self, table: str, buckets: list[int], edges: list[int], sums: _Sums, wanted: int) -> Script[None]:
        by_group: dict[int, list[int]] = {}
        for bucket in buckets:
            by_group.setdefault(self.view.routing.storage_group_of(bucket), []).append(bucket)
        done = sums.asked
        for group, owned in by_group.items():
            for part in buckets_at_once(owned):
                yield from self._ask_part(group, table, part, edges, sums)
                done += len(part)
                self.progress(done, wanted)
        sums.asked += len(buckets)

    def _ask_part(self, group: int, table: str, buckets: list[int], edges: list[int], sums: _Sums) -> Script[None]:
        """Ask for the ages in buckets of one group, in as many answers as it takes."""
        cursor = b""
        while buckets:
            question = AskAges(table.encode(), pack_u32(buckets), pack_i64(edges), cursor)
            began_s = self.view.now()
            answer = yield from self._ask(group, question, Ages)
            if not 0 <= answer.next <= len(buckets) or (not answer.next and answer.cursor <= cursor):
                raise Unavailable(f"storage group {group} tells of ages without going on")
            sums.add(buckets, answer)
            buckets, cursor = buckets[answer.next :], answer.cursor
            yield Sleep(min(_REST * (self.view.now() - began_s), _LONGEST_REST_S))

    def _ask(self, group: int, message: Message, want: type[M]) -> Script[M]:
        """An answer of one of the replicas of a storage group, of each in turn. Raises Unavailable."""
        nodes = self.view.routing.storage_nodes(group)
        self.turn += 1
        first = self.turn % len(nodes)
        nodes = sorted(nodes[first:] + nodes[:first], key=self.view.is_suspect)
        reason = ""
        for attempt in range(_ATTEMPTS):
            if attempt:
                yield Sleep(0.5)
            for node in nodes:
                (answer,) = yield [Call(node, message, _CALL_TIMEOUT_S, _QUIET_S)]
                if isinstance(answer, want):
                    return answer
                if isinstance(answer, CallFailed):
                    self.view.suspect(node)
                reason = f"{node}: {_why_not(answer)}"
        raise Unavailable(f"storage group {group} does not answer ({reason})")

    # ------------------------------------------------------------ memory and reads

    def _memory(self, tiers: TableTiers, edges: list[int]) -> Script[None]:
        """What cache nodes hold of a table. A sample's figures are scaled to the memory that all its pages take."""
        asked = self.order[: tiers.buckets_asked] if tiers.buckets_asked < tiers.buckets else []
        nodes = self._cache_nodes()
        table = tiers.table.encode()
        answers = yield [
            Call(node, AskHeld(table, pack_u32(asked), pack_i64(edges)), _CALL_TIMEOUT_S, _QUIET_S) for node in nodes
        ]
        for node, first in zip(nodes, answers, strict=True):
            answer = first
            if isinstance(answer, Held) and answer.looked_at < min(answer.pages, _FEW_PAGES):
                (answer,) = yield [Call(node, AskHeld(table, b"", pack_i64(edges)), _CALL_TIMEOUT_S, _QUIET_S)]
            if not isinstance(answer, Held):
                self.found.silent[node] = _why_not(answer)
                continue
            items, nbytes = unpack_i64(answer.items), unpack_i64(answer.nbytes)
            factor = answer.pages_bytes / sum(nbytes) if sum(nbytes) else 1.0
            add_to(tiers.memory_items, [round(figure * factor) for figure in youngest_first(items)])
            add_to(tiers.memory_bytes, [round(figure * factor) for figure in youngest_first(nbytes)])

    def _reads(self) -> Script[None]:
        """What was read of the tables, through cache nodes and, while there was none, from storage nodes."""
        groups = range(self.topology.storage_groups)
        nodes = self._cache_nodes() + [node for group in groups for node in self.view.routing.storage_nodes(group)]
        answers = yield [Call(node, AskReads(), _CALL_TIMEOUT_S, _QUIET_S) for node in nodes]
        tables = {tiers.table.encode(): tiers for tiers in self.found.tables}
        for node, answer in zip(nodes, answers, strict=True):
            if not isinstance(answer, ReadAges):
                self.found.silent[node] = _why_not(answer)
                continue
            hour, day = unpack_i64(answer.hour), unpack_i64(answer.day)
            for number, name in enumerate(answer.tables):
                if name in tables:
                    part = slice(number * BINS, (number + 1) * BINS)
                    add_to(tables[name].reads_hour, hour[part])
                    add_to(tables[name].reads_day, day[part])

    def _cache_nodes(self) -> list[str]:
        shape = self.topology
        return [shape.cache_node(g, n) for g in range(shape.storage_groups) for n in range(shape.cache_nodes)]


_COLUMNS = ("storage_items", "storage_bytes", "cold_items", "cold_raw_bytes", "cold_bytes")


class _Sums:
    """Figures of the buckets asked so far: by bin in the order of edges, and of single buckets."""

    def __init__(self) -> None:
        self.asked = 0
        self.by_bin = [[0] * BINS for _ in _COLUMNS]
        self._storage: dict[int, int] = {}
        self._cold: dict[int, int] = {}

    def add(self, buckets: list[int], answer: Ages) -> None:
        columns = answer.items, answer.nbytes, answer.cold_items, answer.cold_raw, answer.cold_bytes
        for sums, column in zip(self.by_bin, columns, strict=True):
            add_to(sums, unpack_i64(column))
        pairs = zip(buckets, unpack_i64(answer.bucket_nbytes), unpack_i64(answer.bucket_cold_raw), strict=False)
        for bucket, nbytes, cold_raw in pairs:
            self._storage[bucket] = self._storage.get(bucket, 0) + nbytes
            self._cold[bucket] = self._cold.get(bucket, 0) + cold_raw

    def of_error(self) -> tuple[list[int], list[int]]:
        """By bucket, the figures whose totals are to be right: bytes of the storage tier, raw bytes of the cold one."""
        return list(self._storage.values()), list(self._cold.values())


def _why_not(answer: Message | CallFailed) -> str:
    if isinstance(answer, Failure):
        return answer.message
    if isinstance(answer, CallFailed):
        return answer.reason
    return f"it answered with {type(answer).__name__}"


@dataclass(frozen=True, slots=True)
class Prices:
    """Price of a GB (10^9 bytes) and month in each tier, of one copy."""

    memory: float
    storage: float
    cold: float


@dataclass(frozen=True, slots=True)
class Costs:
    """What data costs a month, all copies counted. `all_in_storage`, `all_in_memory`: if all of it lay there instead
    (in memory once, beside no other tier)."""

    memory: float
    storage: float
    cold: float
    all_in_storage: float
    all_in_memory: float

    @property
    def total(self) -> float:
        """Of the tiers as they are."""
        return self.memory + self.storage + self.cold


def costs_of(tables: Sequence[TableTiers], prices: Prices, *, storage_replicas: int, cold_replicas: int) -> Costs:
    """Costs a month of some tables."""
    memory = sum(sum(tiers.memory_bytes) for tiers in tables) / 1e9
    storage = sum(sum(tiers.storage_bytes) for tiers in tables) / 1e9
    cold = sum(sum(tiers.cold_bytes) for tiers in tables) / 1e9
    everything = storage + sum(sum(tiers.cold_raw_bytes) for tiers in tables) / 1e9
    return Costs(
        memory * prices.memory,
        storage * storage_replicas * prices.storage,
        cold * cold_replicas * prices.cold,
        everything * storage_replicas * prices.storage,
        everything * prices.memory,
    )


def error_words(tiers: TableTiers) -> str:
    """How exact the storage and cold figures are, in words."""
    if tiers.buckets_asked >= tiers.buckets:
        return f"all {tiers.buckets:,} buckets were asked"
    errors = [
        f"{tier} bytes within {error:.1%}" if math.isfinite(error) else f"{tier} bytes of unknown error"
        for tier, error in (("storage", tiers.storage_error), ("cold", tiers.cold_error))
    ]
    return (
        f"{tiers.buckets_asked:,} of {tiers.buckets:,} buckets were asked, figures are scaled by {tiers.factor:.4g}: "
        f"{', '.join(errors)} in 95 of 100 cases"
    )
