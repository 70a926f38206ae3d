"""Strong reads through the memory tier (*pure*, scripts of `effects.py`).

A batch of reads costs one parallel round trip. The first replica of each timeline that is not suspected gets a
`Check` ("I have version v"), as many next ones as make a majority get `AskVersions`. Then `votes` tells what
the version is; data as of it or later, from a replica that has applied it, answers the reads:

    round -> version proven, data as of it -> answer, keep the page
          -> too few answers               -> ask the replicas that were not asked
          -> version proven, data behind   -> Check where it was applied (or accepted, with the proof that it counts)
          -> can't tell                    -> ask the third replica and the ballot's owner; then all again; then
                                              have one replica settle the open entry, with doubling back-off
          -> blocks or older rows missing  -> read them

Every script returns a `Step`: reads that it has answered, and further scripts for those that need more. So the one
slow request of a batch goes its own way and delays nobody. Each read has its answer by its deadline, or Unavailable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from ..cold.block import DecodedBlock
from ..cold.block_cache import BlockCache
from ..counters import Counters
from ..effects import Call, CallFailed, Script, Sleep
from ..errors import Corrupt, ProtocolError, Unavailable
from ..keys import bucket_of, digest_seed, priority_index, timeline_digest
from ..messages import (
    OK,
    AskVersions,
    Checked,
    Failure,
    Message,
    Settle,
    Settled,
    Versions,
    pack_i64,
    unpack_i64,
)
from ..routing import Routing
from ..suspicion import Suspicion
from .answering import Answering
from .block_reads import BlockReader
from .glances import MAX_REPLICAS, Glances, Label
from .hot_cold import StartOver
from .incarnations import Incarnations
from .page_cache import PageCache
from .pages import Page
from .planning import Planner
from .requests import Outgoing, Read, Slot, take_checked, take_versions
from .steps import Job, ReaderSettings, ReadScript, Step
from .votes import PROVEN, SHORT, Verdict

_SLOT_S = 0.001  # that a node may take longer for each timeline it is asked about: many make work, not silence
_MAX_BLOCKS_HELD = 8  # decoded blocks that one script gathers at a time


class Reader:
    """Answers reads of one storage group's timelines. All methods are called from one thread."""

    def __init__(
        self,
        routing: Routing,
        cache: PageCache,
        blocks: BlockCache[DecodedBlock],
        *,
        clock: Callable[[], float],
        random: Random,
        settings: ReaderSettings | None = None,
        counters: Counters | None = None,
    ) -> None:
        """`clock`: monotonic seconds."""
        self.settings = settings or ReaderSettings()
        self.cache = cache
        self.blocks = blocks
        self.counters = counters or Counters()
        self.suspicion = Suspicion(clock, first_s=self.settings.suspect_s, longest_s=self.settings.suspect_max_s)
        self.suspicion.know(routing.topology)
        self._routing = routing
        self._planner = Planner(routing, self.suspicion)
        self._digest_seed = digest_seed(routing.topology.secret)
        self._clock = clock
        self._random = random
        self._settling: set[bytes] = set()
        self._incarnations = Incarnations()
        self._glances = Glances(
            self.suspicion,
            self._incarnations,
            self.counters,
            attempt_timeout_s=self.settings.attempt_timeout_s,
            probation_timeout_s=self.settings.probation_timeout_s,
        )
        self._block_reader = BlockReader(
            routing,
            blocks,
            self.suspicion,
            self.counters,
            clock=clock,
            attempt_timeout_s=self.settings.attempt_timeout_s,
            back_off_s=self.settings.back_off_s,
        )

    def update(self, routing: Routing) -> None:
        """Go by another map from the next batch on."""
        self._routing = routing
        self._digest_seed = digest_seed(routing.topology.secret)
        self._planner.routing = routing
        self._block_reader.routing = routing
        self.suspicion.know(routing.topology)

    def is_resident(self, read: Read) -> bool:
        """Whether the page in memory covers the read, so that one version check answers it."""
        page = self.cache.peek(read.timeline)
        if page is None:
            return False
        return page.covers(read.key, read.limit) if read.limit else page.contains(read.key)

    def prove(self, pages: Sequence[Page], group: int) -> Script[list[int]]:
        """Script that asks whether pages of a storage group's timelines are current; the indices of those that can't
        be proven to be. All reads that share the answer must have arrived before it runs."""
        return self._glances.prove(pages, self._routing.storage_nodes(group))

    def probes(self) -> list[Job]:
        """Questions to suspected nodes whether they are back, as far as they are due."""
        if not self.suspicion:
            return []
        return [Job(self._probe(node, question, urgent=False), []) for node, question in self.suspicion.due()]

    def batch(self, reads: Sequence[Read]) -> ReadScript:
        """Script that answers `reads`, as far as one round trip can. All of them must have arrived before it runs."""
        by_timeline: dict[bytes, list[Read]] = {}
        for read in reads:
            by_timeline.setdefault(read.timeline, []).append(read)
        self.counters.add("batches")
        self.counters.add("batch_items", len(reads))
        slots = []
        for timeline, group in by_timeline.items():
            page = self.cache.get(timeline)
            slots.append(self._slot(timeline, page, group, warm=page is None and self.cache.is_warm(timeline)))
        return (yield from self._round(slots))

    # ------------------------------------------------------------ one round

    def _slot(self, timeline: bytes, page: Page | None, reads: list[Read], *, warm: bool = False) -> Slot:
        """A timeline at the start of a strong read."""
        slot = Slot(timeline, self._planner.order(timeline), page, reads)
        slot.generation = self._incarnations.generation
        slot.plan_rows(self.settings.page_items, fetch_page=warm)
        self._planner.plan_first(slot)
        return slot

    def _round(self, slots: list[Slot]) -> ReadScript:
        """Ask what the slots want to know next; answer what can be answered."""
        step = Step()
        outgoing: dict[str, Outgoing] = {}
        for slot in slots:
            if slot.check_at is not None:
                outgoing.setdefault(slot.check_at, Outgoing([], [])).checks.append(slot)
            for node in slot.ask_at:
                outgoing.setdefault(node, Outgoing([], [])).asks.append(slot)
        calls: list[Call] = []
        asked: list[list[Slot]] = []
        timeout_s = self._timeout_s(slots)
        # Only at first: who is asked again must not fail for want of time alone.
        short_s = self.settings.probation_timeout_s + _SLOT_S * len(slots)
        short_s = timeout_s if any(slot.rounds for slot in slots) else short_s
        for node, out in outgoing.items():
            node_s = self.suspicion.timeout_s(node, timeout_s, short_s)
            if out.checks:
                calls.append(Call(node, out.check(), node_s))
                asked.append(out.checks)
            if out.asks:
                calls.append(Call(node, out.ask(), node_s))
                asked.append(out.asks)
        self.counters.add("version_checks", sum(map(len, asked)))
        replies = yield calls
        for call, group, reply in zip(calls, asked, replies, strict=True):
            self._take(call.node, group, reply)
        unsettled = []
        for slot in slots:
            verdict = self._verdict(slot)
            if verdict.state == PROVEN and slot.data_version >= verdict.version:
                self._finish(slot, step)
            else:
                unsettled.append(slot)
        if unsettled:
            self._go_on(unsettled, step)
        if self.suspicion:
            urgent = any(map(self._planner.lacks_nodes, slots))
            for node, question in self.suspicion.due(urgent=urgent):
                step.then.append(Job(self._probe(node, question, urgent=urgent), []))
        return step

    def _timeout_s(self, slots: list[Slot]) -> float:
        rounds = max(slot.rounds for slot in slots)
        left_s = max(read.deadline for slot in slots for read in slot.reads) - self._clock()
        usual_s = self.settings.attempt_timeout_s * (1 << min(rounds, 6)) + _SLOT_S * len(slots)
        return max(0.001, min(usual_s, left_s))

    def _take(self, node: str, slots: list[Slot], reply: Message | CallFailed) -> None:
        """Note what a node answered, or that it did not."""
        try:
            if isinstance(reply, Checked | Versions) and not self._incarnations.is_current(node, reply.incarnations):
                raise ProtocolError(f"{node} answers for an incarnation that was replaced")
            if isinstance(reply, Checked):
                take_checked(node, reply, slots)
            elif isinstance(reply, Versions):
                take_versions(node, reply, slots)
            else:
                self._note_failure(node, slots, reply)
                return
        except ProtocolError as error:
            for slot in slots:
                slot.failed.add(node)
                slot.why = error.message
            self.counters.add("bad_answers")
            return
        if node in self.suspicion:
            self.suspicion.trust(node, at_once=any(map(self._planner.lacks_nodes, slots)))

    def _note_failure(self, node: str, slots: list[Slot], reply: Message | CallFailed) -> None:
        if isinstance(reply, Failure) and reply.kind == "TooLarge":
            for slot in slots:
                slot.why = f"{node}: {reply.message}"
                if len(slots) == 1 and not slot.halve():
                    slot.failed.add(node)
                slot.alone = True
            return
        if isinstance(reply, CallFailed):
            why = f"{node}: {reply.reason}"
        elif isinstance(reply, Failure):
            why = f"{node}: {reply.message}"
        else:
            why = f"{node} answered with a {type(reply).__name__}"
        for slot in slots:
            slot.failed.add(node)
            slot.why = why
        self.counters.add("node_failures")
        self.suspicion.blame(node, reply, AskVersions([slots[0].timeline]))

    def _probe(self, node: str, question: Message, *, urgent: bool) -> ReadScript:
        """See whether a suspected node is back. `urgent`: it is needed."""
        (reply,) = yield [Call(node, question, self.settings.attempt_timeout_s)]
        if not isinstance(reply, CallFailed | Failure):
            self.suspicion.trust(node, at_once=urgent)
        return Step()

    # ------------------------------------------------------------ when one round was not enough

    def _verdict(self, slot: Slot) -> Verdict:
        if slot.generation != self._incarnations.generation:
            slot.generation = self._incarnations.generation
            slot.votes.answers.clear()
        if slot.proven < 0:
            return slot.votes.verdict()
        # A settled Prepare proves as much as a majority of answers.
        answers = slot.votes.answers
        if len(answers) <= len(slot.order) // 2:
            return Verdict(SHORT, slot.proven, None, [])  # the horizon takes a majority that tells it
        nodes = [node for node in answers if node == slot.proven_at or answers[node][0] >= slot.proven]
        return Verdict(PROVEN, slot.proven, None, nodes)

    def _go_on(self, slots: list[Slot], step: Step) -> None:
        """Give each slot its next step: a round at once, a round after a pause, or to settle its open entry."""
        at_once: list[Slot] = []
        later: list[Slot] = []
        for slot in slots:
            if not self._expire(slot, step):
                continue
            slot.rounds += 1
            verdict = self._verdict(slot)
            if self._planner.plan_next(slot, verdict):
                if slot.alone:
                    step.then.append(Job(self._round([slot]), slot.reads, heavy=True))
                else:
                    at_once.append(slot)
            elif verdict.state == SHORT or not slot.waited:
                slot.waited = True
                later.append(slot)
            else:
                slot.waited = False
                step.then.append(Job(self._settle(slot, max(verdict.version, 1)), slot.reads))
        if at_once:
            step.then.append(Job(self._round(at_once), _reads_of(at_once)))
        if later:
            step.then.append(Job(self._later(later), _reads_of(later)))

    def _expire(self, slot: Slot, step: Step) -> bool:
        """Fail the reads whose time is over. Whether others are left."""
        why = f"no majority told the version in time; last: {slot.why or 'an entry stayed open'}"
        slot.reads = self._in_time(slot.reads, why, step)
        return bool(slot.reads)

    def _in_time(self, reads: list[Read], why: str, step: Step) -> list[Read]:
        """The reads whose deadline is to come; the others fail."""
        now = self._clock()
        if all(read.deadline > now for read in reads):
            return reads
        self._fail([read for read in reads if read.deadline <= now], Unavailable(why), step)
        return [read for read in reads if read.deadline > now]

    def _pause_s(self, repeats: int) -> float:
        """Random pause, with a bound that doubles."""
        bound_s = min(self.settings.back_off_s * (1 << min(repeats, 20)), self.settings.back_off_max_s)
        return bound_s * (0.5 + 0.5 * self._random.random())

    def _later(self, slots: list[Slot]) -> ReadScript:
        """Ask everybody again after a pause."""
        yield Sleep(self._pause_s(max(slot.rounds for slot in slots)))
        step = Step()
        ready = []
        for slot in slots:
            if self._expire(slot, step):
                self._planner.plan_all(slot, self._verdict(slot))
                ready.append(slot)
        if ready:
            rest = yield from self._round(ready)
            step.done += rest.done
            step.then += rest.then
        return step

    def _settle(self, slot: Slot, entry: int) -> ReadScript:
        """Have one replica find out whether `entry` was chosen; one script at a time does so per timeline."""
        step = Step()
        yield Sleep(self._pause_s(slot.settles))
        if not self._expire(slot, step):
            return step
        slot.settles += 1
        if slot.timeline not in self._settling:
            self._settling.add(slot.timeline)
            try:
                yield from self._settle_once(slot, entry)
            finally:
                self._settling.discard(slot.timeline)
        if self._verdict(slot).state == PROVEN and slot.data_version >= slot.proven >= 0:
            self._finish(slot, step)
            return step
        self._planner.plan_all(slot, self._verdict(slot))
        rest = yield from self._round([slot])
        step.done += rest.done
        step.then += rest.then
        return step

    def _settle_once(self, slot: Slot, entry: int) -> Script[None]:
        node = self._planner.settler(slot, self._verdict(slot))
        left_s = max(read.deadline for read in slot.reads) - self._clock()
        timeout_s = max(0.001, min(self.settings.settle_timeout_s, left_s))
        self.counters.add("settles")
        question = Settle([slot.timeline], pack_i64([entry]), max(1, int(timeout_s * 1000)))
        (reply,) = yield [Call(node, question, timeout_s + 0.05)]
        if isinstance(reply, Settled) and len(reply.outcomes) == 1 and len(reply.versions) == 8:
            (version,) = unpack_i64(reply.versions)
            if reply.outcomes[0] == OK and version >= entry - 1:
                # Either `entry` is chosen, or a majority had not accepted it: then entry - 1 is the version.
                slot.proven, slot.proven_at = version, node
                slot.why = ""
            else:
                slot.why = f"{node} could not settle entry {entry}"
        else:
            self._note_failure(node, [slot], reply)

    # ------------------------------------------------------------ data

    def _finish(self, slot: Slot, step: Step) -> None:
        """The version is proven and the data is as of it: answer the reads."""
        try:
            work = Answering(slot, self._block_reader.kept)
        except StartOver as reason:
            self._start_over(slot, slot.reads, reason, step)
        else:
            self._conclude(work, step)

    def _conclude(self, work: Answering, step: Step) -> None:
        """Answer what can be answered and keep the page; the rest reads blocks, or older rows."""
        done = work.answer()
        step.done += done
        if done:
            self._count(work, done)
        self._keep(work)
        work.reads = self._in_time(work.reads, "older items or cold blocks were not read in time", step)
        if work.reads and work.pending:
            step.then.append(Job(self._fetch(work), work.reads, heavy=True))
        elif work.reads:
            for page, reads in work.deepen():
                step.then.append(Job(self._round([self._slot(work.slot.timeline, page, reads)]), reads))

    def _count(self, work: Answering, done: list[Read]) -> None:
        page = work.slot.page if work.same else None
        hits = 0
        if page is not None:
            for read in done:
                hits += page.covers(read.key, read.limit) if read.limit else page.contains(read.key)
        self.counters.add("hits", hits)
        self.counters.add("misses", len(done) - hits)
        if work.delta_items:
            self.counters.add("deltas")

    def _keep(self, work: Answering) -> None:
        base, known = work.base, work.slot.page
        if base is None or base.high:
            return
        if base is not known:
            timeline, settings = work.slot.timeline, self.settings
            base = base.trim(settings.max_page_items, settings.max_page_bytes)
            digest = timeline_digest(timeline, self._digest_seed)
            order = priority_index(timeline, self._routing.topology.storage_replicas)
            base.label = Label(digest, base.version, self._marks(work.slot), order).packed()
            self.cache.put(timeline, base)
        elif known.label:
            label = Label.of(base)
            base.label = label._replace(marks=self._marks(work.slot, label.marks)).packed()

    def _marks(self, slot: Slot, known: Sequence[int] = (0,) * MAX_REPLICAS) -> tuple[int, ...]:
        """Marks of the replicas: those of whoever has told the horizon, and what is known of others."""
        group = self._routing.storage_group_of(bucket_of(slot.timeline))
        nodes = self._routing.storage_nodes(group)
        told = [slot.marks.get(node, mark) for node, mark in zip(nodes, known, strict=False)]
        return (*told, *known[len(told) :])

    def _fetch(self, work: Answering) -> ReadScript:
        """Read the blocks that ranges need, then answer from them."""
        step = Step()
        deadline = max(read.deadline for read in work.reads)

        def wanted() -> bool:
            return any(read.wanted() for read in work.reads)

        error: Corrupt | Unavailable
        try:
            while work.pending:
                refs = work.needed()[:_MAX_BLOCKS_HELD]
                blocks = yield from self._block_reader.read(refs, work.owner, deadline, wanted)
                for hot_range in work.pending:
                    for ref, block in zip(refs, blocks, strict=True):
                        hot_range.add(ref, block)
                work.gather()
        except StartOver as reason:
            self._start_over(work.slot, work.reads, reason, step)
            return step
        except (Corrupt, Unavailable) as failure:
            error = failure
        else:
            self._conclude(work, step)
            return step
        if len(work.reads) == 1 or isinstance(error, Unavailable):
            self._fail(work.reads, error, step)
        else:  # only one of these reads may need the damaged block
            for read in work.reads:
                again = self._slot(work.slot.timeline, work.slot.page, [read])
                step.then.append(Job(self._round([again]), [read]))
        return step

    def _start_over(self, slot: Slot, reads: list[Read], reason: StartOver, step: Step) -> None:
        """Read again, at another replica first: the one that gave the links may be behind."""
        if slot.restarts >= self.settings.max_restarts:
            gone = Corrupt(str(reason), file=reason.file, offset=reason.offset)
            self._fail(reads, gone if reason.file else Unavailable(str(reason)), step)
            return
        again = self._slot(slot.timeline, slot.page, reads)
        again.restarts = slot.restarts + 1
        turn = again.restarts % len(again.order)
        again.order = again.order[turn:] + again.order[:turn]
        self._planner.plan_first(again)
        step.then.append(Job(self._round([again]), reads))

    @staticmethod
    def _fail(reads: list[Read], error: Corrupt | Unavailable, step: Step) -> None:
        for read in reads:
            read.answer = error
            step.done.append(read)


def _reads_of(slots: list[Slot]) -> list[Read]:
    return [read for slot in slots for read in slot.reads]
