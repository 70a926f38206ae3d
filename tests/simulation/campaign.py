"""Many runs on several processor cores: seeds go out, outcomes come back."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator
from itertools import islice

from .plan import make_plan
from .runner import Outcome, run_plan

Patch = Callable[[], None]

HANG_S = 300  # of one run; a healthy one takes less than a second

_CHUNK = 4


def run_seeds(
    seeds: Iterator[int], *, operations: int, jobs: int, seconds: float | None, patch: Patch | None = None
) -> Iterator[Outcome]:
    """Outcomes of the seeds, as they come; no further seed is begun after `seconds`.

    `patch`: applied in each process, before its first run.
    """
    ends = None if seconds is None else time.monotonic() + seconds
    in_time = _until(seeds, ends)
    if jobs == 1:
        if patch is not None:
            patch()
        for seed in in_time:
            yield _one(seed, operations)
        return
    context = multiprocessing.get_context("fork")
    with context.Pool(jobs, _begin, (patch, operations, ends)) as pool:
        while chunk := list(islice(in_time, jobs * _CHUNK)):
            for outcome in pool.imap_unordered(_run, chunk):
                if outcome is not None:
                    yield outcome


def _until(seeds: Iterator[int], ends: float | None) -> Iterator[int]:
    for seed in seeds:
        if ends is not None and time.monotonic() >= ends:
            return
        yield seed


_operations = 0
_ends: float | None = None


def _begin(patch: Patch | None, operations: int, ends: float | None) -> None:
    global _operations, _ends
    _operations, _ends = operations, ends
    if patch is not None:
        patch()


def _run(seed: int) -> Outcome | None:
    if _ends is not None and time.monotonic() >= _ends:
        return None
    return _one(seed, _operations)


class Hangs(BaseException):
    """A run does not end: one of the processes computes for ever."""


def _one(seed: int, operations: int) -> Outcome:
    """One run, which is broken off when a step of it does not end; the loop takes that down as an error."""

    def stop(*_: object) -> None:
        raise Hangs(f"a run takes more than {HANG_S} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANG_S)
    try:
        return run_plan(make_plan(seed, operations))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
