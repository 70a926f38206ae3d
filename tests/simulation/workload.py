"""What applications do to the simulated cluster: clients through the production client, and runs of the sink."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from timetier.cluster.carriers.base import CallError, Carrier
from timetier.cluster.cold import sink_script
from timetier.cluster.cold.sink_calls import SinkSettings
from timetier.cluster.cold.sinking import CutOffs, chosen_cut_offs
from timetier.cluster.drive import drive
from timetier.cluster.errors import OutcomeUnknown, TimeTierError, Unavailable, VersionConflict, WriteManyError
from timetier.cluster.keys import (
    decode_token,
    is_internal,
    is_system,
    item_key,
    split_item_key,
    split_timeline,
    timeline_hash,
    timeline_key,
)
from timetier.cluster.messages import DELETE, PUT, WIPE, Settle, pack_i64

from .history import (
    Arguments,
    Conflict,
    Done,
    Expire,
    Get,
    Item,
    Mutation,
    Operation,
    Page,
    ReadPage,
    Recorder,
    Refused,
    Result,
    Seen,
    Unknown,
    Write,
    delete,
    key_of,
    put,
    text_of,
    wipe,
)
from .loop import Life
from .plan import BUCKETS, TABLE, Planned, stream
from .world import World

SINK_TIMEOUT_S = 1.0
SETTLE_ATTEMPTS = 9


class Client:
    """One client process, over all its lives: a killed one is followed by another with the operations that are left."""

    def __init__(self, number: int, planned: list[Planned]) -> None:
        self.number = number
        self.left = planned
        self.lives = 0
        self.life: Life | None = None
        self.done = False

    @property
    def name(self) -> str:
        return f"client-{self.number}"


class Workload:
    """Runs the planned operations, and records them."""

    def __init__(self, world: World) -> None:
        self.history = Recorder(world.loop.time)
        self.sinks_running = 0
        self.sink_reports: list[sink_script.SinkReport] = []
        self._world = world
        world.watch.expiry.on_chosen = self._expired
        shape = world.plan.shape
        self._clients = [
            Client(number, [one for one in world.plan.operations if one.client == number])
            for number in range(shape.clients)
        ]

    def names(self) -> list[str]:
        """Names of the clients, as the network knows them."""
        return [client.name for client in self._clients]

    @property
    def done(self) -> bool:
        """Whether all clients and all runs of the sink have ended."""
        return all(client.done for client in self._clients) and not self.sinks_running

    # ------------------------------------------------------------ clients

    def begin(self) -> None:
        """Start the clients."""
        for client in self._clients:
            self._start(client)

    def kill_client(self, name: str) -> None:
        """Kill a client; what it was waiting for may or may not happen. Another one takes its place."""
        for client in self._clients:
            if client.name == name and client.life is not None and not client.done:
                self._world.end_life(client.life)
                self._world.trace.note(name, "is killed")
                self._start(client)

    def _start(self, client: Client) -> None:
        client.lives += 1
        random = stream(self._world.plan.seed, f"{client.name}, life {client.lives}")
        client.life = self._world.new_life(client.name, random)
        session = Session(self._world, self.history, f"{client.name}.{client.lives}")
        self._world.loop.spawn(client.life, self._live(client, client.life, session, random))

    async def _live(self, client: Client, life: Life, session: Session, random: Any) -> None:
        session.open(self._world.connect(life, random))
        while client.left:
            planned = client.left.pop(0)
            await asyncio.sleep(max(0.0, planned.at_s - self._world.loop.now))
            await session.do(planned)
        client.done = True

    def audit(self, owners: Sequence[str]) -> asyncio.Task[bool]:
        """Write to every timeline and read all of it. Whether everything was answered."""
        random = stream(self._world.plan.seed, "audit")
        life = self._world.new_life("auditor", random)
        session = Session(self._world, self.history, "auditor")

        async def look() -> bool:
            store = self._world.connect(life, random)
            session.open(store)
            await self._settle_links(store.carrier)
            for number, owner in enumerate(owners):
                key, value = (0, b"audit"), f"audit.{number}".encode()
                await session.do(Planned(-1, 0, 0, "put", (owner,), (key,), (value,)))
                await session.do(Planned(-1, 0, 0, "walk", (owner,), limit=3, pages=1_000))
                await session.do(Planned(-1, 0, 0, "page", (owner,), limit=1_000))
            return not session.refused

        return self._world.loop.spawn(life, look())

    async def _settle_links(self, carrier: Carrier) -> None:
        """Find out about the last entries of what only the sink writes: if nobody remembers that one is chosen, only
        its next run would."""
        for timeline, history in sorted(self._world.watch.truth.timelines.items()):
            if is_system(timeline) or is_internal(split_timeline(timeline)[1]):
                question = Settle([timeline], pack_i64([max(history.entries, default=0)]), 2_000)
                for attempt in range(SETTLE_ATTEMPTS):  # some messages are lost even now, as on any network
                    with contextlib.suppress(CallError):
                        await carrier.call(self._world.voters(timeline)[attempt % 3], question, 5.0)
                        break

    # ------------------------------------------------------------ the sink

    def _expired(self, bucket: int, horizon: int, since_s: float) -> None:
        """A retention horizon was chosen at some time since."""
        for owner in self._world.plan.shape.owners:
            if timeline_hash(TABLE.encode(), owner.encode()) % BUCKETS == bucket:
                self.history.happened("sink", owner, "expire", Expire(horizon), since_s)

    def run_sink(self, name: str, killed_after_s: float = 0.0) -> None:
        """Run the sink once; kill it after some time, unless that is 0. Its report is the last of `sink_reports`."""
        random = stream(self._world.plan.seed, name)
        life = self._world.new_life(name, random)
        self.sinks_running += 1

        def end() -> None:
            if not life.dead:
                self._world.trace.note(name, "ends")
                self._world.end_life(life)
                self.sinks_running -= 1

        async def run() -> None:
            try:
                await self._sink(life, name, random)
            finally:
                end()

        self._world.loop.spawn(life, run())
        if killed_after_s:
            self._world.later(killed_after_s, end)

    async def _sink(self, life: Life, name: str, random: Any) -> None:
        world, shape = self._world, self._world.plan.shape
        store = world.connect(life, random)
        now_us = world.wall_us(name)
        policy = world.topology.tables[TABLE]
        cut_offs = chosen_cut_offs(policy, now_us, before=None, by_event_time=False)
        settings = SinkSettings(
            block_rows=shape.block_rows,
            file_bytes=2_000,
            orphan_grace_s=world.watch.sinks.grace_s,
            scan_bytes=shape.scan_bytes,
            piece_bytes=700,
            call_timeout_s=SINK_TIMEOUT_S,
            write_timeout_s=2.0,
            back_off_s=0.05,
            min_live_share=random.choice([0.0, 0.5, 0.9]),
            merge_files=random.choice([2, 5]),
            min_block_bytes=random.choice([0, 0, 60, 300]),
        )
        longest_wait = CutOffs(cut_offs.event_before - 1_000_000, cut_offs.written_before - 1_000_000)
        task = sink_script.TableSink(TABLE.encode(), policy, cut_offs, longest_wait)
        script = sink_script.sink(store.view, [task], run=name, now_us=now_us, settings=settings)
        report = await drive(script, store.carrier)
        world.trace.note(name, f"ends: {report.to_json()}")
        self.sink_reports.append(report)
        world.watch.all_links()


class Session:
    """One client's connection: carries out planned operations and takes down what comes back."""

    def __init__(self, world: World, history: Recorder, name: str) -> None:
        self.refused = 0
        self._world = world
        self._history = history
        self._name = name
        self._versions: dict[str, list[int]] = {}  # that this client has seen, by owner
        self._table: Any = None

    def open(self, store: Any) -> None:
        """Work with this connection."""
        self._table = store.table(TABLE)

    async def do(self, planned: Planned) -> None:
        """Carry out one operation."""
        self._world.trace.note(self._name, f"begins operation {planned.number}: {planned.kind} {planned.owners}")
        await _DOES[planned.kind](self, planned)

    # ------------------------------------------------------------ writes

    async def _put(self, planned: Planned) -> None:
        (owner, *_), ((timestamp, item_id), *_), (value, *_) = planned.owners, planned.keys, planned.values
        condition = self._condition(owner, planned.condition)
        await self._write(
            planned.kind,
            owner,
            (put(timestamp, value, item_id),),
            condition,
            lambda: self._table.put(owner, timestamp, value, id=item_id, if_version=condition),
        )

    async def _delete(self, planned: Planned) -> None:
        (owner, *_), ((timestamp, item_id), *_) = planned.owners, planned.keys
        condition = self._condition(owner, planned.condition)
        await self._write(
            planned.kind,
            owner,
            (delete(timestamp, item_id),),
            condition,
            lambda: self._table.delete(owner, timestamp, id=item_id, if_version=condition),
        )

    async def _wipe(self, planned: Planned) -> None:
        owner = planned.owners[0]
        condition = self._condition(owner, planned.condition)
        await self._write(
            planned.kind,
            owner,
            (wipe(),),
            condition,
            lambda: self._table.delete_timeline(owner, if_version=condition),
        )

    async def _write(
        self,
        kind: str,
        owner: str,
        mutations: tuple[Mutation, ...],
        condition: int | None,
        call: Callable[[], Coroutine[Any, Any, int]],
    ) -> None:
        operation = self._called(owner, kind, Write(mutations, condition))
        try:
            outcome: int | TimeTierError = await call()
        except TimeTierError as error:
            outcome = error
        self._wrote(operation, owner, mutations, outcome)

    async def _put_many(self, planned: Planned) -> None:
        mutations: dict[str, list[Mutation]] = {}
        items = []
        for owner, (timestamp, item_id), value in zip(planned.owners, planned.keys, planned.values, strict=True):
            mutations.setdefault(owner, []).append(put(timestamp, value, item_id))
            items.append((owner, timestamp, value, item_id))
        operations = {o: self._called(o, planned.kind, Write(tuple(its))) for o, its in mutations.items()}
        outcomes: Sequence[int | TimeTierError]
        try:
            outcomes = await self._table.put_many(items)
        except WriteManyError as error:
            outcomes = error.results
        except TimeTierError as error:
            outcomes = [error] * len(items)
        by_owner = dict(zip(planned.owners, outcomes, strict=True))
        for owner, operation in operations.items():
            self._wrote(operation, owner, tuple(mutations[owner]), by_owner[owner])

    def _wrote(
        self, operation: Operation, owner: str, mutations: tuple[Mutation, ...], outcome: int | TimeTierError
    ) -> None:
        result: Result
        if isinstance(outcome, int):
            result = Done(outcome)
            self._saw(owner, outcome)
            self._check_durable(owner, outcome, mutations)
        elif isinstance(outcome, VersionConflict):
            result = self._conflict(operation, owner, outcome.version)
        elif isinstance(outcome, OutcomeUnknown):
            result = Unknown()
        else:
            result = self._failed(operation, outcome)
        self._returned(operation, result)

    def _check_durable(self, owner: str, version: int, mutations: tuple[Mutation, ...]) -> None:
        timeline = timeline_key(TABLE.encode(), owner.encode(), BUCKETS)
        last = {mutation.key: mutation for mutation in mutations}
        for mutation in last.values():
            kind = {"put": PUT, "delete": DELETE, "wipe": WIPE}[mutation.action]
            key = b""
            if mutation.key is not None:
                key = item_key(mutation.key[0], mutation.key[1].encode("latin-1"))
            value = mutation.value.encode("latin-1")
            self._world.watch.acknowledged(timeline, version, key, kind, value, self._name)

    def _conflict(self, operation: Operation, owner: str, version: int) -> Result:
        """The version that comes with a conflict is one that the timeline has reached, not always the present one:
        a replica that is behind can tell that a condition is older still."""
        assert isinstance(operation.arguments, Write)
        timeline = timeline_key(TABLE.encode(), owner.encode(), BUCKETS)
        reached = max(self._world.watch.truth.of(timeline).entries, default=0)
        if version == operation.arguments.if_version or version > reached:
            told = f"if_version={operation.arguments.if_version} conflicts with {version}; chosen is {reached}"
            self._world.report("errors say what happened", f"{self._name}: {owner}: {told}")
        self._saw(owner, version)
        return Conflict()

    def _condition(self, owner: str, condition: str) -> int | None:
        seen = self._versions.get(owner, [0])
        if not condition:
            return None
        return seen[-1] if condition == "seen" else seen[0]

    # ------------------------------------------------------------ reads

    async def _get(self, planned: Planned) -> None:
        (owner, *_), ((timestamp, item_id), *_) = planned.owners, planned.keys
        operation = self._called(owner, planned.kind, Get(key_of(timestamp, item_id)))
        try:
            found = await self._table.get(owner, timestamp, id=item_id)
        except TimeTierError as error:
            self._returned(operation, self._failed(operation, error))
            return
        self._returned(operation, Item(_seen(found) if found is not None else None))

    async def _get_many(self, planned: Planned) -> None:
        asked = list(zip(planned.owners, planned.keys, strict=True))
        operations = [self._called(owner, planned.kind, Get(key_of(*key))) for owner, key in asked]
        try:
            found = await self._table.get_many([(owner, *key) for owner, key in asked])
        except TimeTierError as error:
            for operation in operations:
                self._returned(operation, self._failed(operation, error))
            return
        for operation, item in zip(operations, found, strict=True):
            self._returned(operation, Item(_seen(item) if item is not None else None))

    async def _page(self, planned: Planned) -> None:
        before = planned.keys[0][0] if planned.keys else None
        await self._read_page(planned, before)

    async def _walk(self, planned: Planned) -> None:
        token: str | int | None = None
        for _ in range(planned.pages):
            token = await self._read_page(planned, token)
            if token is None:
                return

    async def _read_page(self, planned: Planned, before: str | int | None) -> str | None:
        owner = planned.owners[0]
        bound = None
        if isinstance(before, str):
            bound = key_of(*split_item_key(decode_token(before)))
        elif before is not None:
            bound = key_of(before)
        operation = self._called(owner, planned.kind, ReadPage(bound, planned.limit))
        try:
            page = await self._table.timeline(owner, limit=planned.limit, before=before)
        except TimeTierError as error:
            self._returned(operation, self._failed(operation, error))
            return None
        self._saw(owner, page.version)
        items = tuple(_seen(item) for item in page.items)
        self._returned(operation, Page(items, page.next is not None, page.version))
        next_token: str | None = page.next
        return next_token

    # ------------------------------------------------------------ taking down

    def _called(self, owner: str, kind: str, arguments: Arguments) -> Operation:
        return self._history.call(self._name, owner, kind, arguments)

    def _returned(self, operation: Operation, result: Result) -> None:
        self._history.returned(operation, result)
        self._world.trace.note(self._name, f"has {operation.kind} of {operation.timeline}: {result}")

    def _failed(self, operation: Operation, error: TimeTierError) -> Result:
        self.refused += 1
        if not isinstance(error, Unavailable):
            self._world.report(
                "errors say what happened",
                f"{self._name}: {operation.kind} of {operation.timeline} raised {type(error).__name__}: {error}",
            )
        return Refused()

    def _saw(self, owner: str, version: int) -> None:
        versions = self._versions.setdefault(owner, [])
        if not versions or version > versions[-1]:
            versions.append(version)
            del versions[:-3]


def _seen(item: Any) -> Seen:
    return Seen(key_of(item.timestamp, item.id), text_of(item.value), item.version)


_DOES: dict[str, Callable[[Session, Planned], Coroutine[Any, Any, None]]] = {
    "put": Session._put,
    "put_if": Session._put,
    "put_many": Session._put_many,
    "delete": Session._delete,
    "delete_if": Session._delete,
    "wipe": Session._wipe,
    "get": Session._get,
    "get_many": Session._get_many,
    "page": Session._page,
    "walk": Session._walk,
}
