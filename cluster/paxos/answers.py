"""Answers to the requests that wait in a replica, and how many those are (*pure*)."""

from __future__ import annotations

from ..messages import CONFLICT, OK, STALE, Settled, Written, pack_i64
from .core import Core
from .timeline import Job, Timeline, Waiter

NOBODY = -1  # token of a job that nobody waits for


class Answers:
    """What a proposer owes to who sent it requests. `queued`, `queued_bytes`: writes that wait for their entry."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.queued = 0
        self.queued_bytes = 0

    def refuse(self, waiter: Waiter, outcome: int) -> None:
        """Answer a request that can't be taken."""
        self._answer(waiter, outcome, 0, 0)

    def _drop(self, timeline: Timeline, waiter: Waiter, outcome: int, version: int) -> None:
        """Answer a request that waited."""
        del timeline.waiting[waiter.request_id]
        self.queued -= 1
        self.queued_bytes -= waiter.size
        self._answer(waiter, outcome, version, timeline.dirty if outcome in (OK, CONFLICT, STALE) else 0)

    def _answer(self, waiter: Waiter, outcome: int, version: int, after: int) -> None:
        for job, index in waiter.jobs:
            job.outcomes[index] = outcome
            job.versions[index] = version
            if after > job.after:
                job.after = after
            job.open -= 1
            if not job.open:
                self._reply(job)

    def _finish(self, job: Job, index: int, outcome: int, version: int, after: int) -> None:
        """One request of a message has its outcome; the last one lets the answer go, when batch `after` is durable."""
        job.outcomes[index] = outcome
        job.versions[index] = version
        job.after = max(job.after, after)
        job.open -= 1
        if not job.open:
            self._reply(job)

    def _reply(self, job: Job) -> None:
        if job.token != NOBODY:
            answer = (Settled if job.settle else Written)(bytes(job.outcomes), pack_i64(job.versions))
            self.core.reply(job.token, answer, job.after)
