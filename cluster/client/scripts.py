"""What a client does with a batch of requests, as scripts (see `effects.py`). *Pure*.

All three kinds of batch share the loop of `batch.py`. The rules for one request:

| answer | read | write |
|---|---|---|
| OK | done | done |
| no answer | next node at once | next node at once; its fate is unknown if the node may have seen it |
| Unavailable, with a hint | next node at once; after the hint if the node is overloaded, or all gave one | the same |
| UNAVAILABLE | next node, after a pause | the same: this attempt was surely not applied |
| UNKNOWN | next node, after a pause | next node, after a pause; its fate is unknown |
| CONFLICT | | VersionConflict |
| STALE | | again with the present version; OutcomeUnknown if the fate of an earlier attempt is unknown |
| MISPLACED | have the map fetched, and again after a pause | the same |
| INVALID | InvalidRequest | InvalidRequest, or OutcomeUnknown if the fate of an earlier attempt is unknown |
| CORRUPT | Corrupt: every copy is damaged | like UNKNOWN: another replica may do better |

Every attempt of a write carries the same request id and the same `seen`, and a store applies an id at most once: so
a write of unknown fate is simply sent again. Only STALE ends that: the store no longer remembers the ids of that
time. At the deadline a write of unknown fate ends as OutcomeUnknown, everything else as Unavailable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import msgspec

from ..effects import Call, CallFailed, Script
from ..errors import Corrupt, InvalidRequest, OutcomeUnknown, TimeTierError, Unavailable, VersionConflict
from ..messages import (
    CONFLICT,
    CORRUPT,
    INVALID,
    MISPLACED,
    OK,
    STALE,
    UNAVAILABLE,
    Damage,
    FoundItems,
    Message,
    Pages,
    ReadItems,
    ReadPages,
    StatusRequest,
    Write,
    Written,
    pack_i64,
    pack_u32,
    unpack_i64,
)
from .batch import ANSWER_SHARE, MAX_MESSAGE_BYTES, MAX_MESSAGE_ITEMS, Batch, describe
from .item_reads import ItemQueries, ItemQuery, ItemResult, ItemResults
from .page_reads import PageQueries, PageQuery, PageResult, PageResults
from .view import ClientSettings, View

__all__ = [
    "ClientSettings",
    "ItemQueries",
    "ItemQuery",
    "ItemResult",
    "ItemResults",
    "PageQueries",
    "PageQuery",
    "PageResult",
    "PageResults",
    "View",
    "WriteRequest",
    "ask_status",
    "read_items",
    "read_pages",
    "write",
]

REQUEST_BYTES = 50  # of the fixed columns
_STATUS_CALLS = 64  # status questions in flight at once
_READ_SLACK_S = 0.001  # that a node may take longer for each read in a message: many make work, not silence


class WriteRequest(msgspec.Struct, gc=False):
    """One atomic write. `kinds[i]` says what is done with `keys[i]` and `values[i]` (see `messages/base.py`).

    `if_version`: apply only if this is the timeline's version, -1 = unconditional. `request_id`: 16 bytes; without
    one the client gives it its own. `known_size_bytes`: as `size_bytes`, filled in when that is first asked for.
    """

    timeline: bytes
    kinds: bytes
    keys: list[bytes]
    values: list[bytes]
    if_version: int = -1
    request_id: bytes = b""
    known_size_bytes: int = -1

    @property
    def size_bytes(self) -> int:
        """Bytes that the request takes in a message, nearly."""
        if self.known_size_bytes < 0:
            self.known_size_bytes = (
                REQUEST_BYTES + len(self.timeline) + sum(map(len, self.keys)) + sum(map(len, self.values))
            )
        return self.known_size_bytes


Q = TypeVar("Q", PageQuery, ItemQuery)
R = TypeVar("R")


def write(view: View, requests: Sequence[WriteRequest], timeout_s: float) -> Script[list[int | TimeTierError]]:
    """Apply the requests, each atomically. Result per request: the version that it got, or its error.

    Requests of one timeline in one call are in no order among themselves.
    """
    return (yield from _WriteBatch(view, requests, timeout_s).run())


def read_pages(view: View, requests: PageQueries, timeout_s: float) -> Script[PageResults]:
    """Read a page of each timeline: from the cache nodes, or the storage nodes when none of them answers.

    A page may be shorter than its limit although `more` is set, when its items are large.
    """
    node, began = view.sole_cache, view.now()
    first = None
    if node is not None and view.is_well(node) and sum(requests.limits) <= MAX_MESSAGE_ITEMS:
        attempt_s, node_ms = _first_times(view, len(requests), timeout_s)
        question = _page_question(view, requests, node_ms)
        (answer,) = yield [Call(node, question, attempt_s)]
        if _are_whole(answer, len(requests)) and answer.outcomes.count(OK) == len(requests) and _can_go_on(answer):
            results = PageResults.of(answer)
            view.remember_all(requests.timelines, results.versions)
            return results
        first = (node, answer)
    batch = _PageBatch(view, requests, timeout_s - (view.now() - began))
    yield from batch.run(first)
    return batch.columns()


def read_items(view: View, requests: ItemQueries, timeout_s: float) -> Script[ItemResults]:
    """Read single items: from the cache nodes, or the storage nodes when none of them answers."""
    node, began = view.sole_cache, view.now()
    first = None
    if node is not None and view.is_well(node) and len(requests) <= MAX_MESSAGE_ITEMS:
        attempt_s, node_ms = _first_times(view, len(requests), timeout_s)
        question = ReadItems(view.routing.topology.epoch, requests.timelines, requests.keys, node_ms)
        (answer,) = yield [Call(node, question, attempt_s, view.settings.quiet_s)]
        if _is_whole(answer, len(requests)) and answer.outcomes.count(OK) == len(requests):
            return ItemResults.of(answer)
        first = (node, answer)
    batch = _ItemBatch(view, requests, timeout_s - (view.now() - began))
    yield from batch.run(first)
    return batch.columns()


def _first_times(view: View, reads: int, timeout_s: float) -> tuple[float, int]:
    """Times of the usual case, which needs nothing of what a batch has to remember for others: seconds that the node
    has, and milliseconds that it is told."""
    attempt_s = min(view.settings.attempt_timeout_s + _READ_SLACK_S * reads, timeout_s)
    return attempt_s, max(1, int(attempt_s * 1_000 * ANSWER_SHARE))


def _is_whole(answer: Message | CallFailed, requests: int) -> bool:
    """Whether an answer has a result for each of the items that were asked for."""
    return (
        isinstance(answer, FoundItems)
        and len(answer.outcomes) == len(answer.items) == requests
        and len(answer.timeline_versions) == 8 * requests
    )


def _are_whole(answer: Message | CallFailed, requests: int) -> bool:
    """Whether an answer has a result for each of the pages that were asked for."""
    return (
        isinstance(answer, Pages)
        and len(answer.outcomes) == len(answer.items) == len(answer.more) == requests
        and len(answer.timeline_versions) == 8 * requests
    )


def _can_go_on(answer: Pages) -> bool:
    """Whether all pages that claim to go on have an item: an empty one could not say where the next one starts."""
    return all(answer.items) or all(items for more, items in zip(answer.more, answer.items, strict=True) if more)


def _page_question(view: View, queries: PageQueries, timeout_ms: int) -> ReadPages:
    epoch = view.routing.topology.epoch
    return ReadPages(epoch, queries.timelines, queries.before, pack_u32(queries.limits), timeout_ms)


def ask_status(nodes: Sequence[str], timeout_s: float) -> Script[dict[str, Message | CallFailed]]:
    """What each node answers when it is asked for its status."""
    found: dict[str, Message | CallFailed] = {}
    for start in range(0, len(nodes), _STATUS_CALLS):
        part = nodes[start : start + _STATUS_CALLS]
        answers = yield [Call(node, StatusRequest(), timeout_s) for node in part]
        found.update(zip(part, answers, strict=True))
    return found


class _WriteBatch(Batch[WriteRequest, int]):
    def __init__(self, view: View, requests: Sequence[WriteRequest], timeout_s: float) -> None:
        super().__init__(view, requests, timeout_s)
        fresh = view.next_request_ids(len(requests))
        self.ids = [request.request_id or own for request, own in zip(requests, fresh, strict=True)]
        known = view.all_seen([request.timeline for request in requests])
        self.seen = [max(seen, request.if_version) for request, seen in zip(requests, known, strict=True)]
        self.doubtful: set[int] = set()

    def candidates(self, index: int) -> list[str]:
        return self.view.routing.storage_order(self.requests[index].timeline)

    def plan(self) -> dict[str, list[int]]:
        if self._tried or not self.view.all_well:
            return super().plan()
        timelines = [self.requests[index].timeline for index in self.pending]
        by_node: dict[str, list[int]] = {}
        for index, node in zip(self.pending, self.view.routing.first_storage_nodes(timelines), strict=True):
            by_node.setdefault(node, []).append(index)
        return by_node

    def cost(self, index: int) -> tuple[int, int]:
        request = self.requests[index]
        return len(request.keys), request.size_bytes

    def split(self, indices: list[int]) -> list[list[int]]:
        requests = self.requests
        if (
            len(indices) <= self.max_requests
            and sum([requests[index].size_bytes for index in indices]) <= (MAX_MESSAGE_BYTES)
            and sum([len(requests[index].keys) for index in indices]) <= MAX_MESSAGE_ITEMS
        ):
            return [indices]
        return super().split(indices)

    def message(self, indices: list[int], timeout_ms: int) -> Write:
        requests = [self.requests[index] for index in indices]
        return Write(
            epoch=self.view.routing.topology.epoch,
            timelines=[request.timeline for request in requests],
            request_ids=[self.ids[index] for index in indices],
            seen=pack_i64([self.seen[index] for index in indices]),
            if_version=pack_i64([request.if_version for request in requests]),
            counts=pack_u32([len(request.keys) for request in requests]),
            kinds=b"".join([request.kinds for request in requests]),
            keys=[key for request in requests for key in request.keys],
            values=[value for request in requests for value in request.values],
            timeout_ms=timeout_ms,
        )

    def doubt(self, indices: Sequence[int]) -> None:
        self.doubtful.update(indices)

    def late(self, index: int, message: str, retry_after_s: float) -> TimeTierError:
        if index in self.doubtful:
            return OutcomeUnknown(f"{message}; the write may have been applied, or still be: read before you retry")
        return Unavailable(f"{message}; the write was not applied", retry_after_s=retry_after_s)

    def reject(self, index: int, error: TimeTierError) -> None:
        if index in self.doubtful:
            error = OutcomeUnknown(f"{error.message}; an earlier attempt may have been applied: read before you retry")
        self.results[index] = error

    def shrink(self, indices: list[int], error: TimeTierError) -> None:
        for index in indices:
            self.reject(index, error)

    def settle(self, node: str, indices: list[int], answer: Message) -> bool:
        if not isinstance(answer, Written) or len(answer.outcomes) != len(indices):
            return False
        if len(answer.versions) != 8 * len(indices):
            return False
        versions = unpack_i64(answer.versions)
        good: list[bytes] = []
        reached: list[int] = []
        for index, outcome, version in zip(indices, answer.outcomes, versions, strict=True):
            if outcome == OK:
                self.results[index] = version
                good.append(self.requests[index].timeline)
                reached.append(version)
            else:
                self._not_ok(node, index, outcome, version)
        self.view.remember_all(good, reached)
        return True

    def _not_ok(self, node: str, index: int, outcome: int, version: int) -> None:
        request = self.requests[index]
        if outcome == CONFLICT:
            self.view.remember(request.timeline, version)
            conflict = VersionConflict(
                f"{describe(request.timeline)} has version {version}, not if_version={request.if_version}",
                version=version,
            )
            # At a later version the entry that this write could have become is another's. Below it that is open.
            self.results[index] = conflict
            if version < request.if_version:
                self.reject(index, conflict)
        elif outcome == STALE:
            self.view.remember(request.timeline, version)
            if index in self.doubtful:
                self.results[index] = OutcomeUnknown(
                    f"{describe(request.timeline)}: the store no longer knows whether an earlier attempt was applied: "
                    "read before you retry"
                )
            elif version > self.seen[index]:
                self.seen[index] = version  # another node is not needed: the same one answers next
                self._reasons[index] = f"{node}: it had entries that this client had not seen"
            else:
                self.retry_outcome(node, index, outcome)
        elif outcome == INVALID:
            self.reject(index, InvalidRequest(f"{node} refused the write to {describe(request.timeline)} as invalid"))
        else:
            if outcome not in (UNAVAILABLE, MISPLACED):
                self.doubt([index])
            self.retry_outcome(node, index, outcome)


class _ReadBatch(Batch[Q, R]):
    slack_s = _READ_SLACK_S
    gives_up_silent = True

    def candidates(self, index: int) -> list[str]:
        timeline = self.requests[index].timeline
        routing = self.view.routing
        return routing.cache_order(timeline) + routing.storage_order(timeline)

    def pick(self, index: int) -> str:
        if index not in self._tried:
            caches = self.view.routing.cache_order(self.requests[index].timeline)
            if caches and not self.view.is_suspect(caches[0]):
                return caches[0]
        return super().pick(index)

    def plan(self) -> dict[str, list[int]]:
        if self._tried or not self.view.all_well or not self.view.routing.topology.cache_nodes:
            return super().plan()
        if self.view.sole_cache is not None:
            return {self.view.sole_cache: self.pending}
        by_node: dict[str, list[int]] = {}
        timelines = [self.requests[index].timeline for index in self.pending]
        for index, node in zip(self.pending, self.view.routing.first_cache_nodes(timelines), strict=True):
            by_node.setdefault(node, []).append(index)
        return by_node

    def _not_ok(self, node: str, index: int, outcome: int, damage: Damage | None) -> None:
        what = describe(self.requests[index].timeline)
        if outcome == INVALID:
            self.results[index] = InvalidRequest(f"{node} refused the read of {what} as invalid")
        elif outcome == CORRUPT:
            self.results[index] = _corrupt(what, damage)
        else:
            self.retry_outcome(node, index, outcome)


class _PageBatch(_ReadBatch[PageQuery, bool]):
    """Answers stay in columns; `results` only says which requests have one."""

    def __init__(self, view: View, requests: PageQueries, timeout_s: float) -> None:
        super().__init__(view, requests, timeout_s)
        self.limits = list(requests.limits)
        self._parts: list[tuple[Sequence[int], PageResults]] = []

    def columns(self) -> PageResults:
        """All results, once the batch has run."""
        results = PageResults.gathered(len(self.requests), self._parts)
        results.errors = {
            index: result for index, result in enumerate(self.results) if isinstance(result, TimeTierError)
        }
        return results

    def cost(self, index: int) -> tuple[int, int]:
        return self.limits[index], len(self.requests[index].timeline) + len(self.requests[index].before)

    def message(self, indices: list[int], timeout_ms: int) -> ReadPages:
        queries = PageQueries.of(self.requests[index]._replace(limit=self.limits[index]) for index in indices)
        return _page_question(self.view, queries, timeout_ms)

    def shrink(self, indices: list[int], error: TimeTierError) -> None:
        if len(indices) == 1 and self.limits[indices[0]] > 1:
            self.limits[indices[0]] //= 2
        else:
            super().shrink(indices, error)

    def settle(self, node: str, indices: list[int], answer: Message) -> bool:
        if not isinstance(answer, Pages) or not _are_whole(answer, len(indices)):
            return False
        part = PageResults.of(answer)
        self._parts.append((indices, part))
        damages = _damages_of(answer, indices)
        for index, outcome, more, items, version in zip(
            indices, answer.outcomes, part.more, part.items, part.versions, strict=True
        ):
            if outcome != OK:
                self._not_ok(node, index, outcome, damages.get(index))
            elif more and not items:
                self.retry(node, [index], "it sent an empty page that claims to go on", wait=True)
            else:
                self.results[index] = True
                self.view.remember(self.requests[index].timeline, version)
        return True


class _ItemBatch(_ReadBatch[ItemQuery, bool]):
    """Answers stay in columns; `results` only says which requests have one."""

    def __init__(self, view: View, requests: ItemQueries, timeout_s: float) -> None:
        super().__init__(view, requests, timeout_s)
        self._queries = requests
        self._parts: list[tuple[Sequence[int], ItemResults]] = []

    def columns(self) -> ItemResults:
        """All results, once the batch has run."""
        count = len(self.requests)
        errors = {index: result for index, result in enumerate(self.results) if isinstance(result, TimeTierError)}
        if not errors and len(self._parts) == 1 and len(self._parts[0][0]) == count:
            return self._parts[0][1]
        results = ItemResults.gathered(count, self._parts)
        results.errors = errors
        return results

    def split(self, indices: list[int]) -> list[list[int]]:
        most = self.max_requests  # each is one item of less than 1 KB
        if len(indices) <= most:
            return [indices]
        return [indices[low : low + most] for low in range(0, len(indices), most)]

    def message(self, indices: list[int], timeout_ms: int) -> ReadItems:
        timelines, keys = self._queries.timelines, self._queries.keys
        if len(indices) < len(keys):
            timelines, keys = [timelines[index] for index in indices], [keys[index] for index in indices]
        return ReadItems(epoch=self.view.routing.topology.epoch, timelines=timelines, keys=keys, timeout_ms=timeout_ms)

    def settle(self, node: str, indices: list[int], answer: Message) -> bool:
        requests = len(indices)
        if not isinstance(answer, FoundItems) or not _is_whole(answer, requests):
            return False
        self._parts.append((indices, ItemResults.of(answer)))
        if answer.outcomes.count(OK) == requests == len(self.requests):
            self.results = [True] * requests
            return True
        damages = _damages_of(answer, indices)
        for index, outcome in zip(indices, answer.outcomes, strict=True):
            if outcome == OK:
                self.results[index] = True
            else:
                self._not_ok(node, index, outcome, damages.get(index))
        return True


def _damages_of(answer: FoundItems | Pages, indices: Sequence[int]) -> dict[int, Damage]:
    """What the node tells of damaged reads, by the index of the request."""
    return {indices[one.index]: one for one in answer.damages if 0 <= one.index < len(indices)}


def _corrupt(what: str, damage: Damage | None) -> Corrupt:
    """The error of a damaged read. `what`: the timeline, in words."""
    if damage is None or not damage.file:
        return Corrupt(f"{what}: stored bytes are damaged in every copy")
    return Corrupt(f"{what}: {damage.reason}", file=damage.file, offset=damage.offset)
