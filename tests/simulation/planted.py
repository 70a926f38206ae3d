"""Bugs that the simulation must find: one-line ones, each against a rule that the store relies on.

A list of planted bugs shows that the checks can find bugs at all, and which of them find what. Some rules guard
against schedules so rare that only a directed one meets them: `planted_runs.py` says which, and by what they are
found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from .planted_expiry import EXPIRY_BUGS
from .planted_sink import SINK_BUGS
from .planting import Bug, Edit, Swap


def _share_late(put: Callable[..., Any]) -> Callable[..., Any]:
    """A read that arrives while an equal one is under way is answered with it, though its batch has left."""

    def share(lane: Any, reads: Iterable[Any]) -> None:
        rest = []
        for read in reads:
            twin = _under_way.get((id(lane), read.timeline, read.key, read.limit))
            if twin is not None and twin.answer is None:
                _followers.setdefault(id(twin), []).append(read)
            else:
                _under_way[id(lane), read.timeline, read.key, read.limit] = read
                rest.append(read)
        put(lane, rest)

    return share


def _answer_followers(done: Callable[..., Any]) -> Callable[..., Any]:
    def answer(service: Any, read: Any) -> None:
        done(service, read)
        for follower in _followers.pop(id(read), []):
            follower.answer = read.answer
            done(service, follower)

    return answer


_under_way: dict[tuple[int, bytes, bytes, int], Any] = {}
_followers: dict[int, list[Any]] = {}


def _bug(
    name: str,
    rule: str,
    *changes: tuple[str, str, str] | Swap,
    plans: str = "everything",
    scripts: tuple[str, ...] = (),
) -> Bug:
    made = tuple(Edit(*change) if isinstance(change, tuple) else change for change in changes)
    return Bug(name, rule, made, plans, scripts)


BUGS = [
    # ---- disk and restart
    _bug(
        "answer before fsync",
        "an acceptance is answered when it is on disk",
        (
            "paxos.acceptor:Acceptor.on_accept",
            "Accepted(timeline.key, message.entry, ballot), timeline.dirty)",
            "Accepted(timeline.key, message.entry, ballot))",
        ),
    ),
    _bug(
        "own vote before fsync",
        "a proposer counts its own vote when it is on disk",
        (
            "paxos.proposer:Proposer.durable",
            "ready = [vote for vote in self._own_votes if vote[0] <= self.core.durable]",
            "ready = list(self._own_votes)",
        ),
        plans="restarts",
    ),
    _bug(
        "flush in place left out",
        "what waits for the disk goes on when it was flushed, by whomever",
        ("storage.flusher:Flusher._flush_in_place", "sync()\n", "pass\n"),
    ),
    _bug(
        "promise not written",
        "a promise is durable before it is given",
        ("paxos.acceptor:Acceptor.promise", "self.core.mark(timeline)", ""),
    ),
    _bug(
        "promise forgotten in a restart",
        "a promise binds all later lives",
        ("paxos.core:Core._from_rows", "if meta.promised_entry == timeline.chosen + 1:", "if False:"),
        plans="restarts",
        scripts=("regained_right",),
    ),
    _bug(
        "ballot reused after a restart",
        "no ballot is used by two lives",
        ("identity:Identity.life_number", "return self.boot << TOKEN_BITS | self.token", "return 1"),
        plans="restarts",
    ),
    _bug(
        "memory ahead of the engine after a restart",
        "an accepted entry is not yet a chosen one",
        (
            "paxos.core:Core._from_rows",
            "if meta.promised_entry ==",
            "if timeline.record is not None:\n        self._apply_loaded(timeline)\n    if meta.promised_entry ==",
        ),
    ),
    _bug(
        "memory behind the engine after a restart",
        "a later record proves that the one before was chosen",
        ("paxos.core:Core._from_rows", "self._apply_loaded(timeline)\n        if entry", "break\n        if entry"),
        scripts=("fsync",),
    ),
    _bug(
        "torn write of many items",
        "the record and the rows of an entry are one write",
        (
            "paxos.acceptor:Acceptor._write_entry",
            "engine.put(log_key(key, entry), record)",
            "engine.put(log_key(key, entry), record)\n    engine.commit()",
        ),
        (
            "paxos.acceptances:Acceptances.close",
            "core.engine.put_all(self._names, self._rows)",
            "core.engine.put_all(self._names[:1], self._rows[:1])\n    core.engine.commit()\n    "
            "core.engine.put_all(self._names[1:], self._rows[1:])",
        ),
        plans="restarts",
        scripts=("fsync",),
    ),
    _bug(
        "version cache ahead of the engine",
        "a version is clean in the cache when all of it is on disk",
        ("paxos.versions:Versions.flush", "elif timeline.dirty > durable:", "elif False:"),
    ),
    _bug(
        "version cache behind the engine",
        "an entry of the version cache is marked before the engine is handed what comes after it",
        ("paxos.versions:Versions.flush", 'self.cache.mark_dirty(b"".join(dirty))', "pass"),
    ),
    _bug(
        "torn row of the version cache taken over",
        "a row that a crash left in the middle of a move is emptied",
        (
            "storage.version_cache:VersionCache._take_over",
            "np.flatnonzero(self._sequence & np.uint64(1))",
            "np.flatnonzero(self._sequence & np.uint64(0))",
        ),
        plans="restarts",
    ),
    _bug(
        "version cache of another life taken over",
        "a version cache belongs to the life that follows the one that wrote it, of the same incarnation",
        (
            "storage.version_cache:VersionCache._take_over",
            "if owner.past is None or found != (*head, owner.past, 1):",
            "if found[:4] != head[:4]:",
        ),
        plans="losses",
    ),
    # ---- proposers and acceptors
    _bug(
        "second value in round 0",
        "the right to round 0 of an entry is used once",
        (
            "paxos.proposer:Proposer._has_right",
            "if timeline.promised != NO_BALLOT or timeline.accepted != NO_BALLOT:",
            "if timeline.promised != NO_BALLOT:",
        ),
        ("paxos.intake:Intake._take_usual", "or timeline.accepted is not NO_BALLOT", ""),
        plans="duels",
        scripts=("first_entry",),
    ),
    _bug(
        "round 0 outlives a promise",
        "who has promised a higher round does not use round 0",
        (
            "paxos.proposer:Proposer._has_right",
            "if timeline.promised != NO_BALLOT or timeline.accepted != NO_BALLOT:",
            "if timeline.accepted != NO_BALLOT:",
        ),
        ("paxos.proposer:Proposer._send_accept", "if against > proposal.ballot:", "if False:"),
        ("paxos.intake:Intake._take_usual", "or timeline.promised is not NO_BALLOT", ""),
        plans="duels",
        scripts=("own_promise",),
    ),
    _bug(
        "round 0 for every life of a replica",
        "the right to round 0 dies with the life that has it",
        (
            "paxos.proposer:Proposer._has_right",
            "return timeline.origin == self.core.life",
            "return timeline.origin[0] == self.core.replica",
        ),
        (
            "paxos.acceptor:Acceptor.claim_holds",
            "return timeline.origin == life",
            "return timeline.origin[0] == life[0]",
        ),
        ("paxos.intake:Intake._take_usual", "timeline.origin != life", "timeline.origin[0] != life[0]"),
        ("paxos.flights:Arrivals._accept_usual", "timeline.origin == life", "timeline.origin[0] == life[0]"),
        plans="restarts",
        scripts=("settle",),
    ),
    _bug(
        "claim to round 0 not checked",
        "acceptors check a claim to round 0 against entry e-1",
        ("paxos.acceptor:Acceptor.claim_holds", "return timeline.origin == life", "return True"),
        ("paxos.proposer:Proposer._has_right", "return timeline.origin == self.core.life", "return True"),
        ("paxos.flights:Arrivals._accept_usual", "and timeline.origin == life", ""),
        ("paxos.intake:Intake._take_usual", "or timeline.origin != life", ""),
        plans="duels",
        scripts=("lost_right",),
    ),
    _bug(
        "accepts below its promise",
        "a promise excludes lower ballots",
        (
            "paxos.acceptor:Acceptor.on_accept",
            "if ballot < max(timeline.promised, timeline.accepted) or",
            "if ballot < timeline.accepted or",
        ),
        plans="duels",
        scripts=("duel",),
    ),
    _bug(
        "value of the lowest ballot",
        "a proposer is bound to the value of the highest ballot that it is told of",
        (
            "paxos.proposer:Proposer.on_promise",
            "accepted, value, _ = max(proposal.promises.values(), key=lambda p: p[0])",
            "accepted, value, _ = min(proposal.promises.values(), key=lambda p: p[0])",
        ),
        plans="duels",
        scripts=("keeps_origin",),
    ),
    _bug(
        "one vote suffices",
        "an entry is chosen by a majority",
        ("paxos.proposer:Proposer.on_accepted", "< self.core.majority", "< self.core.majority - 1"),
    ),
    _bug(
        "chosen at another ballot",
        "word that an entry is chosen counts only at the ballot at which it was accepted",
        (
            "paxos.acceptor:Acceptor.on_chosen",
            "timeline.accepted == message.ballot != NO_BALLOT",
            "timeline.accepted != NO_BALLOT",
        ),
        plans="duels",
        scripts=("very_ballot",),
    ),
    _bug(
        "rows of a replaced value stay",
        "the rows of an accepted value go when it is replaced",
        ("paxos.acceptor:Acceptor._write_entry", "if old and old not in kept:", "if False:"),
        plans="duels",
    ),
    # ---- flights
    _bug(
        "flight answered before fsync",
        "acceptances of a flight are answered when all of them are on disk",
        ("paxos.flights:Arrivals.on_accepts", "pack_u32(others)), after)", "pack_u32(others)))"),
    ),
    _bug(
        "flight accepted below a promise",
        "a promise excludes lower ballots, also of entries that travel with others",
        (
            "paxos.flights:Arrivals.on_accepts",
            "is_next and timeline.promised == NO_BALLOT == timeline.accepted",
            "is_next and timeline.accepted == NO_BALLOT",
        ),
        ("paxos.flights:Arrivals._accept_usual", "and timeline.promised is NO_BALLOT", ""),
        plans="duels",
    ),
    _bug(
        "vote for a flight counted for all of it",
        "an answer to a flight says nothing about the entries that it leaves out",
        (
            "paxos.proposer:Proposer.on_accepted_all",
            "others = set(unpack_u32(message.others))",
            "others: set[int] = set()",
        ),
        plans="duels",
    ),
    # ---- requests
    _bug(
        "retried request applied twice",
        "request ids are checked at each proposal",
        ("paxos.forming:Forming._eligible", "applied = ids.get(waiter.request_id)", "applied = None"),
        ("paxos.intake:Intake._take_usual", "or request_id in timeline.ids", ""),
    ),
    _bug(
        "request ids lost in a state transfer",
        "request ids go with the timeline's state",
        (
            "paxos.catchup:CatchUp._send_state",
            "ids = [] if following else self.recent_ids(timeline, version)",
            "ids = [(version, [])]",
        ),
    ),
    _bug(
        "request ids lost in a restart",
        "request ids are read back from the log",
        ("paxos.core:Core.ids_of", "low = max(timeline.log_low, ", "low = max(timeline.chosen, "),
    ),
    _bug(
        "stale request taken",
        "a request older than the remembered ids is refused",
        (
            "paxos.forming:Forming._eligible",
            "elif waiter.seen < timeline.chosen - self.core.settings.request_id_entries:",
            "elif False:",
        ),
        ("paxos.intake:Intake._take_usual", "timeline.chosen - remembered <= seen", "0 <= seen"),
        plans="transfers",
        scripts=("stale",),
    ),
    _bug(
        "conditional write shares an entry",
        "a conditional write is alone in its entry",
        ("paxos.forming:Forming._form", "alone = waiter.if_version >= 0", "alone = False"),
        plans="crowds",
    ),
    _bug(
        "condition not checked",
        "if_version=v is applied as entry v+1 only",
        ("paxos.forming:Forming._eligible", "elif 0 <= waiter.if_version < timeline.chosen or", "elif"),
        (
            "paxos.intake:Intake._take_usual",
            "condition != timeline.chosen and condition >= 0",
            "condition > timeline.chosen",
        ),
    ),
    _bug(
        "unknown outcome told as unavailable",
        "Unavailable means surely not applied",
        ("paxos.proposer:Proposer._expire", "UNKNOWN if waiter.sent else UNAVAILABLE", "UNAVAILABLE"),
    ),
    # ---- reads and caches
    _bug(
        "read from one replica",
        "a version is proven by a majority",
        ("memory.votes:Votes.verdict", "majority = self._replicas // 2 + 1", "majority = 1"),
    ),
    _bug(
        "open entry not looked at",
        "an entry that may have been chosen is settled before a read answers without it",
        ("memory.votes:Votes.verdict", "if ballot is None or applied < chosen:", "if True:"),
    ),
    _bug(
        "older page served",
        "a page is served when it is of the proven version",
        (
            "memory.reading:Reader._round",
            "verdict.state == PROVEN and slot.data_version >= verdict.version",
            "verdict.state == PROVEN and slot.data is not None",
        ),
    ),
    _bug(
        "late read shares the batch",
        "a read is answered by what was asked after it came",
        Swap("memory.lanes:ReadLane.put", _share_late),
        Swap("memory.service:CacheService._done", _answer_followers),
        plans="crowds",
    ),
    _bug(
        "delta skips an entry",
        "a delta holds all entries since the version that the reader has",
        ("paxos.reads:Reads._delta", "first = have + 1", "first = have + 2"),
    ),
    _bug(
        "delta without deletes",
        "a delta holds tombstones",
        (
            "memory.pages:Page._changed",
            'changes = dict.fromkeys(last, b"")',
            'changes = {key: b"" for key, at in last.items() if delta.kinds[at] == PUT}',
        ),
    ),
    _bug(
        "accepted rows shown",
        "a row above the chosen version is invisible",
        ("paxos.reads:Reads._range", "if version > timeline.chosen or key == last:", "if key == last:"),
    ),
    _bug(
        "wiped rows shown again",
        "delete_timeline hides all that came before it",
        ("paxos.acceptor:Acceptor.choose", "timeline.wiped = timeline.chosen - 1", "pass"),
    ),
    _bug(
        "page skips items at the border of the tiers",
        "a page is complete down to the oldest row of the blocks that were read",
        (
            "memory.hot_cold:HotRange.page",
            "low = max([self._floor, *[source.edge for source in self._sources]])",
            "low = self._floor",
        ),
        plans="sinks",
    ),
    _bug(
        "page ends at the border of the tiers",
        "a page has a token as long as there are older items",
        ("memory.pages:Page.newest", "cut > 0 or bool(self.low)", "cut > 0"),
        ("memory.columns:PageGlance._plain_answer", 'more.append(page.low != b"")', "more.append(0)"),
        plans="sinks",
    ),
    _bug(
        "block wins over a late write",
        "a late write into a sunk window wins over the block",
        ("memory.pages:merge", "if known is None or version > known[0]:", "if known is None or rows is not hot:"),
        plans="sinks",
    ),
    # ---- the sink
    _bug(
        "evicted before the link is chosen",
        "a replica applies a link, and evicts what it covers, when it is chosen",
        (
            "paxos.acceptor:Acceptor.on_accept",
            "self.accept(timeline, ballot, message.value)",
            "self.accept(timeline, ballot, message.value)\n        is_system(timeline.key) and self.choose(timeline)",
        ),
        plans="sinks",
    ),
    _bug(
        "floor not raised by an eviction",
        "the log is not asked for rows that were evicted",
        ("paxos.chores:Chores._delete", "timeline.floor = max(timeline.floor, floor)", ""),
        plans="sinks",
    ),
    # ---- catching up
    _bug(
        "state merged, not replaced",
        "a state transfer replaces what is there",
        ("paxos.catchup:CatchUp._install", "for name in old:", "for name in ():"),
        plans="transfers",
    ),
    _bug(
        "state before its links",
        "a state is installed after the links that its missing rows are behind",
        ("paxos.catchup:CatchUp._install_when_possible", "if system.chosen < incoming.needs_system:", "if False:"),
        plans="sinks",
        scripts=("state_and_links",),
    ),
    _bug(
        "old lives are heard",
        "messages of a replaced life are refused",
        ("paxos.replica:Replica.peer", "if known is not None and not follows(batch, known):", "if False:"),
        plans="losses",
        scripts=("old_life",),
    ),
    # ---- loss of data
    _bug(
        "vote of an old incarnation counted",
        "votes count if they are of the present incarnation",
        (
            "paxos.proposer:Proposer._current",
            "(vote if isinstance(vote, int) else vote[2]) == lives.get(replica, (0, 0, 0))[1]",
            "True",
        ),
        plans="losses",
        scripts=("old_vote",),
    ),
    _bug(
        "learner votes",
        "a replica that lost data is in no quorum until it has copied all",
        ("paxos.replica:Replica.__init__", 'LEARNING, "copying', 'VOTING, "copying'),
        plans="losses",
        scripts=("learner",),
    ),
    _bug(
        "copied acceptance is a vote",
        "what a learner copied is knowledge, not its vote",
        (
            "paxos.acceptor:Acceptor.learn",
            "vote=False)\n    timeline.accepted, timeline.learned = ballot, True",
            "vote=True)\n    timeline.accepted, timeline.learned = ballot, False",
        ),
        plans="losses",
        scripts=("learner",),
    ),
    *SINK_BUGS,
    *EXPIRY_BUGS,
]
