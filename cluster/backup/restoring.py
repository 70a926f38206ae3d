"""Restores a backup to an empty cluster, which may have other numbers of storage and cold groups.

1. All parts are there, the number of buckets is the same, every storage replica is empty.
2. The Router closes the cluster durably (`Topology.restoring`), each replica says that it knows of it, is still empty,
   and marks that durably. Only then the phase `COPYING` begins.
3. Cold files go to the cold nodes, verified on their disks; states go to *all* replicas of their group, the links of a
   bucket before its timelines, and are durable there.
4. Each replica tells by bucket what it holds, read back from its engine: counts and digest must be those of the backup.
5. The Router opens the cluster.

Whatever breaks this off, the cluster stays closed, and the same command goes on: what is there is compared.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from ..carriers.base import CallError, Carrier
from ..client.view import View
from ..cold.sink_calls import SinkSettings
from ..errors import Corrupt, InvalidRequest, ProtocolError, TimeTierError, Unavailable
from ..keys import bucket_of, is_system
from ..messages import (
    AskRestore,
    AskRestored,
    BeginRestore,
    Message,
    Pong,
    Restore,
    RestoredBuckets,
    RestoreFacts,
    TimelineState,
    raise_failure,
    unpack_i64,
)
from ..paxos.restores import DIGEST_BYTES, BucketDigest
from ..topology import BEGINNING, COPYING
from .cold_files import ColdTier, Pace, pace_of
from .format import Manifest
from .links import FILE_BYTES, LinkMover
from .reading import ColdSource, read_part, require_all
from .target import Target

_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 2.0

M = TypeVar("M", bound=Message)

Held = tuple[int, int, bytes]
"""Timelines, rows and digest of a bucket."""


class Control(Protocol):
    """The Router, as a restore needs it."""

    async def set_restoring(self, restore: str, phase: str) -> None:
        """See `RouterState.set_restoring`. Raises InvalidRequest, Unavailable."""


@dataclass(frozen=True, slots=True)
class RestoreSettings:
    """`bytes_per_s`: that are sent to the cluster, 0 for any. `message_bytes`: of states in one message, about.
    `patience_s`: how long one node may be away. `request_id_entries`: of the cluster (`storage.request_id_entries`).
    """

    bytes_per_s: float = 0.0
    message_bytes: int = 4 << 20
    waiting_bytes: int = 16 << 20
    patience_s: float = 60.0
    request_id_entries: int = 128
    file_bytes: int = FILE_BYTES
    calls: SinkSettings = field(default_factory=lambda: SinkSettings(call_timeout_s=30.0))


@dataclass(slots=True)
class RestoreReport:
    """What was done. `bytes`: of states and cold files. `files_written`: the others were there from before."""

    name: str
    restore: str
    timelines: int = 0
    items: int = 0
    files: int = 0
    files_written: int = 0
    bytes: int = 0
    seconds: float = 0.0
    mb_per_s: float = 0.0
    warnings: list[str] = field(default_factory=list)


async def restore_backup(
    view: View,
    carrier: Carrier,
    control: Control,
    target: Target,
    manifest: Manifest,
    *,
    elsewhere: Target | None = None,
    settings: RestoreSettings | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> RestoreReport:
    """Restore a backup. `elsewhere`: where the cold files are that it only names.

    Raises InvalidRequest when this cluster can't take it (then nothing was changed), Corrupt with the name of a part
    that is missing or damaged, Unavailable when a node is away; but for the first the cluster then stays closed.
    """
    return await _Restoring(view, carrier, control, target, manifest, elsewhere, settings, progress).run()


async def abandon_restore(view: View, carrier: Carrier, control: Control) -> str:
    """Open a cluster that was closed for a restore of which nothing was installed; the restore's name, "" if none.

    Raises InvalidRequest when there is something: an empty cluster is had more surely by new data folders.
    """
    restoring = view.routing.topology.restoring
    if restoring is None:
        return ""
    nodes = _Nodes(view, carrier, restoring.restore, RestoreSettings())
    facts = await nodes.ask_all(AskRestore(), RestoreFacts)
    held = [node for node, told in facts.items() if not told.empty]
    if held:
        raise InvalidRequest(
            f"{', '.join(held)} hold a part of the backup: finish it by `timetier restore`; or, to have an empty "
            "cluster, end this one by `timetier down`, remove its data folders, and start it anew"
        )
    await control.set_restoring(restoring.restore, "")
    return restoring.restore


class _Restoring:
    def __init__(
        self,
        view: View,
        carrier: Carrier,
        control: Control,
        target: Target,
        manifest: Manifest,
        elsewhere: Target | None,
        settings: RestoreSettings | None,
        progress: Callable[[str, int, int], None],
    ) -> None:
        self.view = view
        self.control = control
        self.target = target
        self.manifest = manifest
        self.elsewhere = elsewhere
        self.settings = settings or RestoreSettings()
        self.progress = progress
        self.restore = manifest.restore_name
        self.report = RestoreReport(manifest.name, self.restore)
        self.pace: Pace = pace_of(self.settings.bytes_per_s, view.now)
        self.nodes = _Nodes(view, carrier, self.restore, self.settings)
        self.cold = ColdTier(view, carrier, self.settings.calls, self.pace)
        self.held: dict[int, Held] = {}
        self.waiting: dict[int, list[TimelineState]] = {}  # by storage group
        self.waiting_bytes = 0

    async def run(self) -> RestoreReport:
        began_s = self.view.now()
        self._check_shape()
        await asyncio.to_thread(require_all, self.target, self.manifest)
        source = await asyncio.to_thread(ColdSource, self.target, self.manifest, self.elsewhere)
        await asyncio.to_thread(source.require_all)
        await self._close()
        try:
            await self._copy(source)
        finally:
            source.close()
        await self._verify()
        await self.control.set_restoring(self.restore, "")
        await self.nodes.wait_for_phase("")
        self.report.seconds = self.view.now() - began_s
        self.report.mb_per_s = self.report.bytes / 1e6 / max(self.report.seconds, 1e-9)
        return self.report

    def _check_shape(self) -> None:
        topology, manifest = self.view.routing.topology, self.manifest
        if topology.buckets != manifest.buckets:
            raise InvalidRequest(
                f"backup {manifest.name} has {manifest.buckets} buckets, this cluster has {topology.buckets}: "
                f"restore it to one that was created with buckets: {manifest.buckets}"
            )
        if topology.map_checksum != manifest.map_checksum:
            self.report.warnings.append("the map from buckets to groups is another one: cold files are written anew")
        names = sorted({*topology.tables, *manifest.tables})
        for table in names:
            now, then = topology.policy(table), manifest.tables.get(table, manifest.default_table)
            if then is not None and now is None:
                self.report.warnings.append(f"table {table!r} is not configured here: its items can't be reached")
            elif then is not None and now != then:
                self.report.warnings.append(
                    f"table {table!r} has another policy here: {_policy(now)}; in the backup: {_policy(then)}"
                )

    # ------------------------------------------------------------ closing

    async def _close(self) -> None:
        """Have every replica know that the cluster is closed, found empty and marked."""
        facts = await self.nodes.ask_all(AskRestore(), RestoreFacts)
        others = {told.restore for told in facts.values()} - {"", self.restore}
        if others:
            raise InvalidRequest(f"restore {others.pop()} is under way in this cluster, not that of {self.restore}")
        if not any(told.restore for told in facts.values()):
            for node, told in facts.items():
                if not told.empty:
                    raise InvalidRequest(f"{node} is not empty: a backup is restored to a cluster without any data")
        await self.control.set_restoring(self.restore, BEGINNING)
        phase = await self.nodes.wait_for_phase(BEGINNING, COPYING)
        try:
            await self.nodes.ask_all(BeginRestore(self.restore), Pong)
        except InvalidRequest:
            if phase == BEGINNING:
                await self.control.set_restoring(self.restore, "")  # nothing was installed anywhere
            raise
        await self.control.set_restoring(self.restore, COPYING)
        await self.nodes.wait_for_phase(COPYING)

    # ------------------------------------------------------------ copying

    async def _copy(self, source: ColdSource) -> None:
        mover = await self._copy_cold(source)
        await self._copy_states(mover)
        if mover is not None:
            await mover.finish()
            self.report.files = self.report.files_written = mover.files
            self.report.bytes += mover.nbytes

    async def _copy_cold(self, source: ColdSource) -> LinkMover | None:
        """Copy the cold files where they belong; None if the links stay as they are."""
        topology, manifest = self.view.routing.topology, self.manifest
        if (topology.cold_groups, topology.map_checksum) != (manifest.cold_groups, manifest.map_checksum):
            routing = self.view.routing
            return LinkMover(routing, manifest, source, self.cold, self.pace, self.settings.file_bytes)
        for done, file in enumerate(source.files.values()):
            self.progress("cold files", done, len(source.files))
            if await self.cold.put(file, lambda file=file: source.pieces(file)):  # type: ignore[misc]
                self.report.files_written += 1
                self.report.bytes += file.size
        self.report.files = len(source.files)
        return None

    async def _copy_states(self, mover: LinkMover | None) -> None:
        bucket, digest = -1, BucketDigest()
        for done, part in enumerate(self.manifest.parts):
            self.progress("parts", done, len(self.manifest.parts))
            states = await asyncio.to_thread(lambda p: list(read_part(self.target, p, self.manifest.buckets)), part)
            for state in states:
                number = bucket_of(state.timeline)
                if number != bucket:
                    self._keep(bucket, digest)
                    bucket, digest = number, BucketDigest()
                state.request_ids = self._recent(state)
                if mover is not None and is_system(state.timeline):
                    state = await mover.moved(state)
                if not state.before:
                    digest.begin(state.timeline, state.version, state.wiped, state.request_ids)
                digest.add(state.row_keys, state.rows)
                await self._send(state)
        self._keep(bucket, digest)
        await self._flush()
        found = (self.report.timelines, self.report.items)
        if found != (self.manifest.timelines, self.manifest.items):
            raise Corrupt(f"the parts of backup {self.manifest.name} hold {found}, not what its manifest says")

    def _recent(self, state: TimelineState) -> list[tuple[int, list[bytes]]]:
        """As many request ids as this cluster remembers."""
        low = state.version - self.settings.request_id_entries
        return [(entry, ids) for entry, ids in state.request_ids if entry > low]

    def _keep(self, bucket: int, digest: BucketDigest) -> None:
        if bucket < 0:
            return
        if bucket in self.held:
            raise Corrupt(f"the parts of backup {self.manifest.name} have bucket {bucket} in two places")
        self.held[bucket] = digest.timelines, digest.rows, digest.digest()
        self.report.timelines += digest.timelines
        self.report.items += digest.rows

    async def _send(self, state: TimelineState) -> None:
        size = sum(map(len, state.rows)) + sum(map(len, state.row_keys))
        self.waiting.setdefault(self.view.routing.storage_group_of(bucket_of(state.timeline)), []).append(state)
        self.waiting_bytes += size + 100 * (1 + len(state.rows))
        self.report.bytes += size
        await self.pace(size)
        if self.waiting_bytes >= self.settings.waiting_bytes:
            await self._flush()

    async def _flush(self) -> None:
        """Have all replicas of each group take what waits for it."""
        waiting, self.waiting, self.waiting_bytes = self.waiting, {}, 0
        nodes = [(node, states) for group, states in waiting.items() for node in self.view.routing.storage_nodes(group)]
        await asyncio.gather(*(self._have(node, states) for node, states in nodes))

    async def _have(self, node: str, states: list[TimelineState]) -> None:
        part: list[TimelineState] = []
        size = 0
        for state in states:
            more = sum(map(len, state.rows)) + sum(map(len, state.row_keys))
            if part and size + more > self.settings.message_bytes:
                await self.nodes.ask(node, Restore(self.restore, part), Pong)
                part, size = [], 0
            part.append(state)
            size += more
        await self.nodes.ask(node, Restore(self.restore, part), Pong)

    # ------------------------------------------------------------ verifying

    async def _verify(self) -> None:
        """Compare what each replica has read back with the backup. Raises Corrupt."""
        routing = self.view.routing
        groups = range(routing.topology.storage_groups)
        nodes = [(group, node) for group in groups for node in routing.storage_nodes(group)]
        for done, (group, node) in enumerate(nodes):
            self.progress("replicas", done, len(nodes))
            owned = set(routing.buckets_of_storage_group(group).tolist())
            expected = {bucket: held for bucket, held in self.held.items() if bucket in owned}
            found = await self._held_by(node)
            wrong = sorted(bucket for bucket in {*expected, *found} if expected.get(bucket) != found.get(bucket))
            if wrong:
                raise Corrupt(f"{node} does not hold what the backup has in {len(wrong)} buckets, {wrong[0]} the first")

    async def _held_by(self, node: str) -> dict[int, Held]:
        found: dict[int, Held] = {}
        bucket = 0
        while bucket >= 0:
            answer = await self.nodes.ask(node, AskRestored(self.restore, bucket), RestoredBuckets)
            timelines, rows = unpack_i64(answer.timelines), unpack_i64(answer.rows)
            digests = [answer.digests[at : at + DIGEST_BYTES] for at in range(0, len(answer.digests), DIGEST_BYTES)]
            found.update(zip(answer.buckets, zip(timelines, rows, digests, strict=True), strict=True))
            if 0 <= answer.next_bucket <= bucket:
                raise ProtocolError(f"{node}: an answer to AskRestored that does not go on")
            bucket = answer.next_bucket
        return found


class _Nodes:
    """All storage replicas: each of them has to answer."""

    def __init__(self, view: View, carrier: Carrier, restore: str, settings: RestoreSettings) -> None:
        self._view = view
        self._carrier = carrier
        self._restore = restore
        self._settings = settings

    def names(self) -> list[str]:
        routing = self._view.routing
        return [node for group in range(routing.topology.storage_groups) for node in routing.storage_nodes(group)]

    async def ask_all(self, message: Message, want: type[M]) -> dict[str, M]:
        """What each replica answers. Raises what the first one raises that refuses."""
        names = self.names()
        answers = await asyncio.gather(*(self.ask(node, message, want) for node in names))
        return dict(zip(names, answers, strict=True))

    async def ask(self, node: str, message: Message, want: type[M]) -> M:
        """A replica's answer, however often it has to be asked. Raises Unavailable when it is away for too long."""
        ends_s = self._view.now() + self._settings.patience_s
        pause_s = _PAUSE_S
        while True:
            try:
                answer = await self._carrier.call(node, message, self._settings.calls.call_timeout_s)
                raise_failure(answer)
                if isinstance(answer, want):
                    return answer
                raise ProtocolError(f"{node} answered with {type(answer).__name__}")
            except (Unavailable, CallError) as error:
                if self._view.now() > ends_s:
                    raise Unavailable(
                        f"{node} is needed and does not answer ({error.message}): run the same command again"
                    ) from None
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            if isinstance(message, Restore):
                await self._begin_again(node)

    async def _begin_again(self, node: str) -> None:
        """A replica that has lost its data has lost its mark too."""
        try:
            await self._carrier.call(node, BeginRestore(self._restore), self._settings.calls.call_timeout_s)
        except TimeTierError:
            return  # it is asked for what is wanted next, and told of then

    async def wait_for_phase(self, *phases: str) -> str:
        """Wait until each replica has heard of one of these phases ("": of the end). That of the first replica."""
        ends_s = self._view.now() + self._settings.patience_s
        while True:
            facts = await self.ask_all(AskRestore(), RestoreFacts)
            behind = [node for node, told in facts.items() if told.phase not in phases]
            if not behind:
                return next(iter(facts.values())).phase
            if self._view.now() > ends_s:
                raise Unavailable(f"{behind[0]} does not hear from the Router: run the same command again")
            await asyncio.sleep(_PAUSE_S)


def _policy(policy: object) -> str:
    return str(policy).partition("(")[2].rstrip(")")
