"""Runs scripts (see `effects.py`) under asyncio, over a carrier."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Generic, TypeVar

from .carriers.base import CallError, Carrier
from .effects import Call, CallFailed, Script, Sleep
from .errors import InvalidRequest
from .messages import Message, Ping

T = TypeVar("T")

_LOOP_TURNS_S = 10.0  # an event loop whose thread is held for so long is taken for one that waits for its caller

_Result = Message | CallFailed | Exception | None


class Running(Generic[T]):
    """A script under way, in no task: each answer resumes it where it arrives.

    A turn of the event loop costs as much as a small step of a script, so answers don't wait for one.

    An error other than CallError (a message beyond the frame limit, say) is raised inside the script, at its yield.
    """

    __slots__ = ("_carrier", "_done", "_left", "_results", "_script", "_timer", "_watches", "error", "is_over", "value")

    def __init__(self, script: Script[T], carrier: Carrier, done: Callable[[Running[T]], None]) -> None:
        """`done` is called once, when the script has ended, maybe before `start` returns; not after `cancel`."""
        self.is_over = False
        self.value: T | None = None
        self.error: Exception | None = None
        self._script = script
        self._carrier = carrier
        self._done = done
        self._left = 0  # answers to come, and one more while calls are being made
        self._results: list[_Result] = []  # of the present calls
        self._timer: asyncio.TimerHandle | None = None
        self._watches: list[asyncio.TimerHandle] = []  # over the present calls

    def start(self) -> None:
        """Run the script until it waits."""
        self._resume(None, None)

    def result(self) -> T:
        """What the script returned, or its error raised."""
        if self.error is not None:
            raise self.error
        value: T = self.value  # type: ignore[assignment]  # T may be None itself
        return value

    def cancel(self) -> None:
        """Close the script; what its calls bring counts no more."""
        if not self.is_over:
            self.is_over = True
            self._results = []
            self._end_watches()
            if self._timer is not None:
                self._timer.cancel()
            self._script.close()

    def _resume(self, result: Any, error: Exception | None) -> None:
        """Send the script results, or raise an error in it, until it waits for others."""
        script = self._script
        while True:
            try:
                effect = script.send(result) if error is None else script.throw(error)
            except StopIteration as stop:
                self._end(stop.value, None)
                return
            except Exception as raised:
                self._end(None, raised)
                return
            if isinstance(effect, Sleep):
                self._timer = asyncio.get_running_loop().call_later(effect.seconds, self._slept)
                return
            self._call(effect)
            if self._left:
                return
            result, error = self._gathered()

    def _slept(self) -> None:
        self._resume(asyncio.get_running_loop().time(), None)

    def _call(self, calls: list[Call]) -> None:
        """Make calls in parallel."""
        results: list[_Result] = [None] * len(calls)
        self._results = results
        self._left = len(calls) + 1
        begin = self._carrier.begin
        for index, call in enumerate(calls):
            then = partial(self._answered, results, index, call)
            try:
                begin(call.node, call.message, call.timeout_s, then)
            except Exception as error:
                then(error)
            if call.quiet_s and results[index] is None:
                self._watch(results, index, call)
        self._left -= 1

    def _answered(self, results: list[_Result], index: int, call: Call, outcome: Message | Exception) -> None:
        if results is not self._results or results[index] is not None:
            return  # cancelled, or given up
        if isinstance(outcome, CallError):
            results[index] = CallFailed(call.node, outcome.message, outcome.sent)
        else:
            results[index] = outcome
        self._left -= 1
        if not self._left:
            self._resume(*self._gathered())

    def _watch(self, results: list[_Result], index: int, call: Call) -> None:
        """See after a while whether the node of a call is there at all."""
        loop = asyncio.get_running_loop()
        self._watches.append(loop.call_later(call.quiet_s, self._ask_for_life, results, index, call))

    def _ask_for_life(self, results: list[_Result], index: int, call: Call) -> None:
        def then(outcome: Message | Exception) -> None:
            if results is not self._results or results[index] is not None:
                return
            if isinstance(outcome, Exception):
                reason = f"{call.node} does not even say that it is there"
                self._answered(results, index, call, CallError(reason, sent=True))
            else:
                self._watch(results, index, call)

        if results is self._results and results[index] is None:
            self._carrier.begin(call.node, Ping(), call.quiet_s, then)

    def _end_watches(self) -> None:
        for watch in self._watches:
            watch.cancel()
        self._watches.clear()

    def _gathered(self) -> tuple[list[_Result], Exception | None]:
        """What the calls brought, and the first error to be raised."""
        if self._watches:
            self._end_watches()
        return self._results, next((one for one in self._results if isinstance(one, Exception)), None)

    def _end(self, value: T | None, error: Exception | None) -> None:
        self.is_over = True
        self.value, self.error = value, error
        self._done(self)


def run_from_thread(
    loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, T], *, patience_s: float = _LOOP_TURNS_S
) -> T:
    """Result of a coroutine that runs on `loop`, for another thread, which waits for it.

    Raises InvalidRequest when the loop does not turn for `patience_s` seconds, as when its own thread waits for the
    caller.
    """
    begun = threading.Event()
    try:
        loop.call_soon_threadsafe(begun.set)
    except RuntimeError:  # it is closed
        coroutine.close()
        raise InvalidRequest("the event loop of the store is closed: connect again") from None
    if not begun.wait(patience_s):
        coroutine.close()
        raise InvalidRequest(
            "the event loop of the store does not turn: it waits for this very call; use `await asyncio.to_thread(...)`"
        )
    return asyncio.run_coroutine_threadsafe(coroutine, loop).result()


async def drive(script: Script[T], carrier: Carrier) -> T:
    """Result of a script whose calls go over `carrier`. When the driver is cancelled, the script is closed."""
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def done(_: Running[T]) -> None:
        if not future.done():
            future.set_result(None)

    running = Running(script, carrier, done)
    running.start()
    try:
        if not running.is_over:
            await future
    finally:
        running.cancel()
    return running.result()
