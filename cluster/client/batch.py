"""The loop that all batches of a client share; `scripts.py` has the kinds of batch and their rules. *Pure*.

Round by round, each pending request picks a node, requests that picked the same node travel in one message (split
below the limits of a message), all messages of a round fly in parallel, and what was not settled goes into the next
round, after a pause where haste would not help. At the deadline what is still pending gets its error.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, Protocol, TypeVar, cast

from .. import errors
from ..effects import Call, CallFailed, Script, Sleep
from ..errors import Rejected, TimeTierError, TooLarge, Unavailable
from ..keys import MAX_BATCH_ITEMS, is_system, split_timeline
from ..messages import MISPLACED, STALE, UNAVAILABLE, Failure, Message
from ..suspicion import hint_s
from .view import View

MAX_MESSAGE_BYTES = 8 << 20  # a message with more than one request stays below this
MAX_MESSAGE_ITEMS = MAX_BATCH_ITEMS
_HASTY_ROUNDS = 3  # as many as a group has replicas; each further so many double the time of an attempt
_MAX_DOUBLINGS = 6
ANSWER_SHARE = 0.9  # of an attempt's time is the node's: it should still be able to say what became of the request


class Request(Protocol):
    """What the loop has to know of a request."""

    @property
    def timeline(self) -> bytes:
        """Key of the timeline that the request is about."""


Q = TypeVar("Q", bound=Request)
R = TypeVar("R")


class Batch(ABC, Generic[Q, R]):
    """One batch of requests on its way. A kind of batch says where its requests may go and what answers mean.

    `slack_s`: how much longer than usual a node may take for each request of a message. `gives_up_silent`: whether a
    node that is not there loses its requests before its time is over.
    """

    slack_s = 0.0
    gives_up_silent = False

    def __init__(self, view: View, requests: Sequence[Q], timeout_s: float) -> None:
        self.view = view
        self.requests = requests
        self.timeout_s = timeout_s
        self.deadline = view.now() + timeout_s
        self.results: list[R | TimeTierError | None] = [None] * len(requests)
        self.pending = list(range(len(requests)))
        self.max_requests = MAX_MESSAGE_ITEMS  # per message; less once an answer was too large
        self.must_wait = False
        self._tried: dict[int, set[str]] = {}
        self._reasons: dict[int, str] = {}
        self._hints: dict[int, float] = {}  # seconds after which the last node wanted to be asked again
        self._come_back: dict[str, float] = {}  # when each node that gave a hint may be asked again
        self._busy_s = 0.0
        self._pauses = 0
        self._silent_rounds = 0  # in which a node did not answer in time

    def run(self, first: tuple[str, Message | CallFailed] | None = None) -> Script[list[R | TimeTierError]]:
        """`first`: a node that all requests were given to already, and its answer."""
        view = self.view
        while self.pending:
            left_s = self.deadline - view.now()
            if left_s <= 0 or view.closing:
                self._give_up()
                break
            if first is None:
                plan = [(node, part) for node, indices in self.plan().items() for part in self.split(indices)]
                answers = yield [self._call(node, indices, left_s) for node, indices in plan]
            else:
                plan, answers, first = [(first[0], self.pending)], [first[1]], None
            self.must_wait, self._busy_s = False, 0.0
            self._silent_rounds += any(isinstance(answer, CallFailed) and answer.sent for answer in answers)
            for (node, indices), answer in zip(plan, answers, strict=True):
                self._take(node, indices, answer)
            self.pending = [index for index in self.pending if self.results[index] is None]
            if self.pending and self.must_wait:
                pause_s = view.back_off_s(self._pauses) + self._hinted_pause_s()
                self._pauses += 1
                yield Sleep(max(0.0, min(pause_s, self.deadline - view.now())))
        return cast("list[R | TimeTierError]", self.results)

    # what a kind of batch has to say

    @abstractmethod
    def candidates(self, index: int) -> list[str]:
        """Nodes that may answer the request, first choice first."""

    def cost(self, index: int) -> tuple[int, int]:
        """(items, bytes) that the request adds to its message or to the answer."""
        return 1, len(self.requests[index].timeline)

    @abstractmethod
    def message(self, indices: list[int], timeout_ms: int) -> Message:
        """Message that carries these requests."""

    @abstractmethod
    def settle(self, node: str, indices: list[int], answer: Message) -> bool:
        """Take an answer of the right kind. False if it is none, or its columns don't fit the requests."""

    def doubt(self, indices: Sequence[int]) -> None:
        """An attempt of these requests may have taken effect, or may still."""

    def late(self, index: int, message: str, retry_after_s: float) -> TimeTierError:
        """Error of a request whose time is over. `retry_after_s`: the hint that the caller gets."""
        return Unavailable(message, retry_after_s=retry_after_s)

    def reject(self, index: int, error: TimeTierError) -> None:
        """End a request that can't succeed as it is."""
        self.results[index] = error

    def shrink(self, indices: list[int], error: TimeTierError) -> None:
        """The answer to these requests would exceed a frame: ask for less at once."""
        if len(indices) > 1:
            self.max_requests = max(1, len(indices) // 2)
        else:
            self.reject(indices[0], error)

    # the loop's steps

    def pick(self, index: int) -> str:
        """The node that gets the request in this round."""
        tried = self._tried.get(index, ())
        node = self.view.choose(self.candidates(index), tried)
        if node is None:  # the map has changed, and its nodes were all tried
            self._tried.pop(index, None)
            node = self.candidates(index)[0]
        return node

    def plan(self) -> dict[str, list[int]]:
        """Pending requests by the node that gets them in this round."""
        by_node: dict[str, list[int]] = {}
        for index in self.pending:
            by_node.setdefault(self.pick(index), []).append(index)
        return by_node

    def split(self, indices: list[int]) -> list[list[int]]:
        if len(indices) == 1:
            return [indices]
        parts: list[list[int]] = []
        part: list[int] = []
        items = size_bytes = 0
        for index in indices:
            more_items, more_bytes = self.cost(index)
            items += more_items
            size_bytes += more_bytes
            full = items > MAX_MESSAGE_ITEMS or size_bytes > MAX_MESSAGE_BYTES or len(part) >= self.max_requests
            if full and part:
                parts.append(part)
                part, items, size_bytes = [], more_items, more_bytes
            part.append(index)
        parts.append(part)
        return parts

    def _call(self, node: str, indices: list[int], left_s: float) -> Call:
        # A repeated request gets all the time there is: it must not fail for want of that alone.
        hasty = self._tried.keys().isdisjoint(indices)
        # When all of them have been silent, the store may be slow: more haste would be more load, and never an answer.
        patience = 1 << min(self._silent_rounds // _HASTY_ROUNDS, _MAX_DOUBLINGS)
        usual_s = self.view.attempt_timeout_s(node, hasty=hasty) * patience
        attempt_s = min(usual_s + self.slack_s * len(indices), left_s)
        node_ms = max(1, int(attempt_s * 1_000 * ANSWER_SHARE))
        quiet_s = self.view.settings.quiet_s if self.gives_up_silent else 0.0
        return Call(node, self.message(indices, node_ms), attempt_s, quiet_s)

    def _take(self, node: str, indices: list[int], answer: Any) -> None:
        if isinstance(answer, CallFailed):
            if answer.sent:
                self.view.suspect(node)
                self.doubt(indices)
            else:
                self.view.unreachable(node)
            self.retry(node, indices, answer.reason)
        elif isinstance(answer, Failure):
            self._take_failure(node, indices, answer)
        elif self.settle(node, indices, answer):
            self.view.trust(node)
        else:
            self.view.suspect(node)
            self.doubt(indices)
            self.retry(node, indices, f"it sent an unfit answer ({type(answer).__name__})")

    def _take_failure(self, node: str, indices: list[int], answer: Failure) -> None:
        kind = getattr(errors, answer.kind, None)
        if kind is TooLarge:
            self.shrink(indices, TooLarge(answer.message, **answer.fields))
        elif isinstance(kind, type) and issubclass(kind, Rejected):
            for index in indices:
                self.reject(index, kind(answer.message, **answer.fields))
        else:
            if kind is not Unavailable or answer.fields.get("internal"):
                self.doubt(indices)
            seconds = hint_s(answer)
            if seconds:
                self._take_hint(node, indices, answer, seconds)
            else:
                self.view.suspect(node)
                self.retry(node, indices, answer.message)

    def _take_hint(self, node: str, indices: Sequence[int], answer: Failure, hint_s: float) -> None:
        """The node said when to come back: it is not asked before, and others first.

        One that has too much to do is waited for in any case: if all that it refuses went to the others at once,
        they would be the next to have too much to do.
        """
        self.view.rest(node, hint_s)
        self._come_back[node] = self.view.now() + hint_s
        busy = bool(answer.fields.get("busy"))
        if busy:
            self._busy_s = max(self._busy_s, hint_s)
        self.retry(node, indices, f"{answer.message}; it asked to come back in {hint_s:g} s", wait=busy)
        for index in indices:
            self._hints[index] = hint_s

    def _hinted_pause_s(self) -> float:
        """How long to wait at least: until one of the nodes wants to be asked again, if they all gave a hint."""
        candidates = self.candidates(self.pending[0])
        earliest = min(self._come_back.get(node, 0.0) for node in candidates)
        return max(self._busy_s, earliest - self.view.now(), 0.0)

    def retry(self, node: str, indices: Sequence[int], reason: str, *, wait: bool = False) -> None:
        """Let the requests go to another node in the next round; pause before it if all of them were tried."""
        reason = f"{node}: {reason}"
        self.must_wait = self.must_wait or wait
        for index in indices:
            tried = self._tried.setdefault(index, set())
            tried.add(node)
            self._reasons[index] = reason
            self._hints.pop(index, None)
            if tried.issuperset(self.candidates(index)):
                tried.clear()
                self.must_wait = True

    def retry_outcome(self, node: str, index: int, outcome: int) -> None:
        """Like `retry`, for the outcome of a single request."""
        if outcome == MISPLACED:
            self.view.mark_stale()
            reason = f"it does not own that bucket; the client's map is of epoch {self.view.routing.topology.epoch}"
        elif outcome == UNAVAILABLE:
            reason = "no majority of the replicas answers in time, or too much is under way"
        elif outcome == STALE:
            reason = "the timeline moves on faster than its writes arrive"
        else:
            reason = f"outcome {outcome}"
        self.retry(node, [index], reason, wait=True)

    def _give_up(self) -> None:
        for index in self.pending:
            what = describe(self.requests[index].timeline)
            last = self._reasons.get(index, "no answer yet")
            why = "the store was closed" if self.view.closing else f"no answer within {self.timeout_s:g} s"
            hint_s = self._hints.get(index, self.view.settings.back_off_max_s)
            self.results[index] = self.late(index, f"{what}: {why} (last: {last})", hint_s)


def describe(timeline: bytes) -> str:
    """A timeline key in words, for messages to people."""
    bucket, table, owner = split_timeline(timeline)
    if is_system(timeline):
        return f"system timeline of bucket {bucket}"
    return f"timeline of owner {owner.decode(errors='backslashreplace')!r} in table {table.decode()!r}"
