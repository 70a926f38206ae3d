"""Rate limits of the sink: token buckets around the effects of a script. *Pure* (see `effects.py`).

Whatever the sink does, it does by calls, and each call is to a storage node or to a cold node. So the limits are kept
in one place, around the script as a whole: a call waits until its end of the system has tokens again, for operations
and for bytes. What an answer brings is known only afterwards, so a bucket may go into debt, which the next call has to
wait for: over any time t no more than rate x (t + burst) plus one effect goes through.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from ..effects import Call, CallFailed, Script, Sleep
from ..messages import BlockRead, Checked, FileInfo, FileList, FileRemove, FileWrite, Message, Scanned, Write

BURST_S = 1.0
_SHORTEST_S = 1e-6
_COLD = (BlockRead, FileWrite, FileRemove, FileList, FileInfo)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Limits:
    """Rates that a run keeps to, 0 for none. `storage_reads_per_s`: questions to storage nodes, `cold_writes_per_s`:
    pieces of files, blocks read and files removed at cold nodes; `..._bytes_per_s`: rows and links, files and blocks.
    """

    storage_bytes_per_s: float = 0.0
    storage_reads_per_s: float = 0.0
    cold_bytes_per_s: float = 0.0
    cold_writes_per_s: float = 0.0


NO_LIMITS = Limits()


class TokenBucket:
    """Tokens that come at `rate` a second, at most a burst of them; a negative level is debt. `rate` 0: no limit."""

    def __init__(self, rate: float, now_s: float) -> None:
        self._rate = rate
        self._level = self._most = rate * BURST_S
        self._at_s = now_s

    def take(self, tokens: float, now_s: float) -> None:
        """Take tokens, there or not."""
        self._refill(now_s)
        self._level -= tokens

    def wait_s(self, now_s: float) -> float:
        """Seconds until the debt is paid."""
        self._refill(now_s)
        return -self._level / self._rate if self._rate and self._level < 0 else 0.0

    def _refill(self, now_s: float) -> None:
        self._level = min(self._most, self._level + self._rate * max(0.0, now_s - self._at_s))
        self._at_s = now_s


@dataclass(slots=True)
class Traffic:
    """What a script has done. Bytes are those of rows, links, files and blocks."""

    storage_calls: int = 0
    storage_bytes: int = 0
    cold_calls: int = 0
    cold_bytes: int = 0
    waited_s: float = 0.0

    @property
    def calls(self) -> int:
        """Messages sent."""
        return self.storage_calls + self.cold_calls


class _End:
    """One end of the system: its two buckets."""

    def __init__(self, operations_per_s: float, bytes_per_s: float, now_s: float) -> None:
        self._operations = TokenBucket(operations_per_s, now_s)
        self._bytes = TokenBucket(bytes_per_s, now_s)

    def wait_s(self, now_s: float) -> float:
        return max(self._operations.wait_s(now_s), self._bytes.wait_s(now_s))

    def take(self, operations: int, nbytes: int, now_s: float) -> None:
        self._operations.take(operations, now_s)
        self._bytes.take(nbytes, now_s)


def paced(script: Script[T], limits: Limits, now: Callable[[], float], traffic: Traffic) -> Script[T]:
    """The same script, with pauses that keep it within `limits`. `now`: monotonic seconds; `traffic` is counted up."""
    limited = limits != NO_LIMITS
    began_s = now() if limited else 0.0
    storage = _End(limits.storage_reads_per_s, limits.storage_bytes_per_s, began_s)
    cold = _End(limits.cold_writes_per_s, limits.cold_bytes_per_s, began_s)
    try:
        result: Any = None
        error: Exception | None = None
        while True:
            try:
                effect = script.send(result) if error is None else script.throw(error)
            except StopIteration as stop:
                value: T = stop.value
                return value
            if limited and isinstance(effect, list):
                ends = {id(end): end for end in (cold if _is_cold(call) else storage for call in effect)}
                pause_s = max((end.wait_s(now()) for end in ends.values()), default=0.0)
                if pause_s > _SHORTEST_S:
                    traffic.waited_s += pause_s
                    yield Sleep(pause_s)
            result, error = None, None
            try:
                result = yield effect
            except Exception as raised:  # the script decides what it means
                error = raised
            if isinstance(effect, list):
                for call, answer in zip(effect, result or [None] * len(effect), strict=True):
                    operations, nbytes = _operations(call.message), _bytes_of(call.message, answer)
                    _count(traffic, call, nbytes)
                    if limited:
                        (cold if _is_cold(call) else storage).take(operations, nbytes, now())
    finally:
        script.close()


def _count(traffic: Traffic, call: Call, nbytes: int) -> None:
    if _is_cold(call):
        traffic.cold_calls += 1
        traffic.cold_bytes += nbytes
    else:
        traffic.storage_calls += 1
        traffic.storage_bytes += nbytes


def _is_cold(call: Call) -> bool:
    return isinstance(call.message, _COLD) or call.node.startswith("cold-")


def _operations(message: Message) -> int:
    return max(1, len(message.files)) if isinstance(message, FileRemove) else 1


def _bytes_of(message: Message, answer: Message | CallFailed | None) -> int:
    if isinstance(message, FileWrite):
        return len(message.data)
    if isinstance(message, BlockRead):
        return message.length
    if isinstance(message, Write):
        return sum(map(len, message.values))
    if isinstance(answer, Scanned | Checked):
        return sum(map(len, answer.keys)) + sum(map(len, answer.values))
    return 0
