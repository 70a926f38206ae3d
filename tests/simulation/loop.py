"""A deterministic asyncio event loop with virtual time: many processes of a cluster in one thread.

Nothing here waits. Time jumps to the next timer; work for threads is done on the loop, after a virtual delay that a
seed draws. Each handle runs in a context, and the context says which `Life` (one run of one process) it belongs to:
handles of a paused life wait for its end, those of a crashed life are dropped for ever. So the services run
unchanged, and a process can die or stand still between any two of their steps.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
from asyncio import events
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from random import Random
from typing import Any, TypeVar

T = TypeVar("T")

STEP_S = 1e-6  # virtual time that one callback takes; so what repeats itself at once does not stop time
MAX_STEPS = 5_000_000  # of one run


class Crashed(BaseException):
    """The process that executes this has just died. Nothing may catch it but the loop."""


class Stuck(Exception):
    """The simulated cluster did not get where it had to."""


class Life:
    """One run of one process, from start to crash. `io_s`: draws the duration of one piece of work in a thread."""

    def __init__(self, name: str, io_s: Callable[[], float]) -> None:
        self.name = name
        self.io_s = io_s
        self.dead = False
        self.paused = False
        self.held: list[Handle] = []
        self.context = contextvars.Context()
        self.context.run(_LIFE.set, self)
        self.tasks: list[asyncio.Task[Any]] = []
        self._prune_at = 64

    def keep(self, task: asyncio.Task[Any]) -> None:
        """Hold on to a task. A crashed life's tasks must not be collected before the run is over: their `finally`
        blocks would run then, in the middle of somebody else's life."""
        self.tasks.append(task)
        if len(self.tasks) > self._prune_at and not self.dead:
            self.tasks = [kept for kept in self.tasks if not kept.done()]
            self._prune_at = 2 * len(self.tasks) + 64


WORLD = contextvars.Context()
"""Context of what belongs to no process: the network, the faults, the checks."""

_LIFE: contextvars.ContextVar[Life | None] = contextvars.ContextVar("life", default=None)


class Handle:
    """A callback that is due, of one life (None: of the world around the processes)."""

    __slots__ = ("_args", "_callback", "_cancelled", "_context", "_when", "life")

    def __init__(
        self, when: float, callback: Callable[..., Any], args: tuple[Any, ...], context: contextvars.Context
    ) -> None:
        self._when = when
        self._callback = callback
        self._args = args
        self._context = context
        self._cancelled = False
        self.life: Life | None = context.get(_LIFE)

    def cancel(self) -> None:
        """Don't run it."""
        self._cancelled = True
        self._args = ()

    def cancelled(self) -> bool:
        """Whether it was cancelled."""
        return self._cancelled

    def when(self) -> float:
        """Virtual time at which it is due."""
        return self._when

    def run(self) -> None:
        """Run the callback in its context."""
        self._context.run(self._callback, *self._args)


class SimLoop(asyncio.AbstractEventLoop):
    """The loop. `on_error(life, error)` is told of exceptions that a callback let through."""

    def __init__(self, on_error: Callable[[Life | None, BaseException], None]) -> None:
        self.now = 0.0
        self.steps = 0
        self.current: Life | None = None
        self._on_error = on_error
        self._ready: deque[Handle] = deque()
        self._timers: list[tuple[float, int, Handle]] = []
        self._timer_number = 0
        self._closed = False
        self._workers: dict[Executor | None, list[float]] = {}

    # ------------------------------------------------------------ lives

    def pause(self, life: Life) -> None:
        """Have a process stand still."""
        life.paused = True

    def resume(self, life: Life) -> None:
        """Have a process go on: all that came meanwhile comes at once, in order."""
        life.paused = False
        self._ready.extend(life.held)
        life.held = []

    def spawn(self, life: Life, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run a coroutine in a life."""
        return self.create_task(work, context=life.context)

    # ------------------------------------------------------------ running

    def run(self, until: Callable[[], bool], limit_s: float) -> bool:
        """Run until the condition holds, at most `limit_s` virtual seconds. Whether it holds."""
        end = self.now + limit_s
        events._set_running_loop(self)
        try:
            while not until():
                if not self._advance(end):
                    return False
                self._run_ready()
            return True
        finally:
            events._set_running_loop(None)

    def _advance(self, end: float) -> bool:
        """Let what is due become ready, and time pass if nothing is. False when the end is reached."""
        timers, ready = self._timers, self._ready
        if not ready:
            while timers and timers[0][2]._cancelled:
                heapq.heappop(timers)
            when = timers[0][0] if timers else end
            self.now = max(self.now, min(when, end))
        if self.now >= end:
            return False
        while timers and timers[0][0] <= self.now:
            handle = heapq.heappop(timers)[2]
            if not handle._cancelled:
                ready.append(handle)
        return True

    def _run_ready(self) -> None:
        ready = self._ready
        for _ in range(len(ready)):
            handle = ready.popleft()
            life = handle.life
            if handle._cancelled:
                continue
            if life is not None:
                if life.dead:
                    continue
                if life.paused:
                    life.held.append(handle)
                    continue
            self.current = life
            self.now += STEP_S
            self.steps += 1
            try:
                handle.run()
            except Crashed:
                continue  # its life is over; whatever it had planned is dropped
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:
                self._on_error(life, error)
        self.current = None
        if self.steps > MAX_STEPS:
            raise Stuck(f"more than {MAX_STEPS} steps")

    # ------------------------------------------------------------ asyncio's interface

    def time(self) -> float:
        return self.now

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> Handle:
        handle = Handle(self.now, callback, args, contextvars.copy_context() if context is None else context)
        if not self._closed and not (handle.life is not None and handle.life.dead):
            self._ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> Handle:
        return self.call_at(self.now + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> Handle:
        handle = Handle(when, callback, args, contextvars.copy_context() if context is None else context)
        if not self._closed and not (handle.life is not None and handle.life.dead):
            self._timer_number += 1
            heapq.heappush(self._timers, (when, self._timer_number, handle))
        return handle

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(  # type: ignore[override]
        self, coro: Coroutine[Any, Any, T], *, name: str | None = None, context: contextvars.Context | None = None
    ) -> asyncio.Task[T]:
        if context is None:
            context = contextvars.copy_context()
        task = asyncio.Task(coro, loop=self, name=name or "task", context=context)
        life = context.get(_LIFE)
        if life is not None:
            life.keep(task)
        return task

    def run_in_executor(  # type: ignore[override]
        self, executor: Executor | None, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        """Do the work on the loop, when one of the executor's threads would have done it.

        An object whose method is the work may want to know when it begins: it has `work_begins(name)`.
        """
        begins = getattr(getattr(func, "__self__", None), "work_begins", None)
        if begins is not None:
            begins(func.__name__)
        future: asyncio.Future[T] = self.create_future()
        life = _LIFE.get()
        work_s = life.io_s() if life is not None else 0.0
        if executor is None:
            done_at = self.now + work_s
        else:
            workers = self._workers.setdefault(executor, [0.0] * getattr(executor, "_max_workers", 1))
            done_at = max(self.now, heapq.heappop(workers)) + work_s
            heapq.heappush(workers, done_at)
        self.call_at(done_at, _work, future, func, args)
        return future

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Destroyed tasks and errors that nobody asked for: what matters is seen where it happens."""

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        """As `call_exception_handler`."""

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return not self._closed

    def is_closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """Drop everything."""
        self._closed = True
        self._ready.clear()
        self._timers.clear()


def _work(future: asyncio.Future[Any], func: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        result = func(*args)
    except Exception as error:
        if not future.cancelled():
            future.set_exception(error)
    else:
        if not future.cancelled():
            future.set_result(result)


def io_times(random: Random, low_s: float, high_s: float) -> Callable[[], float]:
    """Durations of a disk's work: mostly short, now and then ten times as long."""

    def draw() -> float:
        stretch = 10.0 if random.random() < 0.03 else 1.0
        return random.uniform(low_s, high_s) * stretch

    return draw
