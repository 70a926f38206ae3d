"""Checks that look on while a run goes: into replicas, engines, caches and cold folders, and at what they send.

They change nothing: no row is read through the engine's own calls, which would commit what is pending.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from timetier.cluster.cold.block import DecodedBlock, checksum, decode_block
from timetier.cluster.cold.link import Block, Link, decode_link
from timetier.cluster.cold.run_record import run_timeline
from timetier.cluster.errors import TimeTierError
from timetier.cluster.keys import (
    bucket_of,
    is_system,
    split_item_key,
    split_timeline,
    system_timeline,
    timeline_hash,
    timestamp_floor,
)
from timetier.cluster.memory.pages import Page
from timetier.cluster.messages import (
    PUT,
    WIPE,
    Accepted,
    AcceptedAll,
    Accepts,
    Life,
    PeerBatch,
    PeerMessage,
    Promise,
    unpack_u32,
)
from timetier.cluster.paxos.flights import singles
from timetier.cluster.paxos.lives import decode_life
from timetier.cluster.paxos.rows import (
    Meta,
    decode_record,
    decode_row,
    life_key,
    log_entry,
    log_key,
    meta_key,
    prefix_end,
    row_key,
    rows_prefix,
    version_of,
)
from timetier.cluster.paxos.timeline import Timeline

from .disk import Batch, SimDisk, SimEngine
from .expiry_watch import ExpiryWatch
from .plan import BUCKETS
from .sink_watch import SinkWatch
from .trace import show_key, show_timeline
from .truth import Entry, History, Truth
from .version_watch import VersionWatch

if TYPE_CHECKING:
    from timetier.cluster.paxos.replica import Replica

    from .world import World

VERSION_BYTES = 8


class Watch:
    """The checks of one run. `report(guarantee, how)` takes violations."""

    def __init__(self, world: World, report: Callable[[str, str], None]) -> None:
        self.truth = Truth(report)
        self.checked_pages = 0
        self.checked_evictions = 0
        self.checked_answers = 0
        self.versions = VersionWatch(world.plan, self.truth, report)
        self.sinks = SinkWatch(world, self.truth, report)
        self.expiry = ExpiryWatch(world, self.truth, report)
        self._runs = run_timeline(BUCKETS)
        self._world = world
        self._report = report
        self._early_pages: list[tuple[str, bytes, Page]] = []
        self._evicted: dict[str, set[bytes]] = {}
        self._flights: dict[tuple[Life, int], Accepts] = {}
        self._decoded: dict[tuple[str, int, int], DecodedBlock] = {}

    # ------------------------------------------------------------ chosen entries

    def replica(self, name: str, replica: Replica, engine: SimEngine) -> None:
        """Look on a replica's life from its beginning."""
        inner = replica.core.on_chosen

        def on_chosen(timeline: Timeline, number: int, request_ids: list[bytes]) -> None:
            known = self.truth.of(timeline.key).version
            self.truth.chosen(name, timeline.key, number, _entry(engine, timeline.key, number, request_ids))
            if self.truth.of(timeline.key).version > known:
                self._on_version(timeline.key, number)
                if is_system(timeline.key):
                    self.expiry.chosen(timeline.key, known)
            self._check_majority(name, timeline.key, number, request_ids)
            inner(timeline, number, request_ids)

        replica.core.on_chosen = on_chosen
        engine.on_commit = lambda batch: self._on_commit(name, batch)
        self.versions.replica(name, replica.core.versions, engine, self._world.nodes[name].disk)

    def _on_version(self, timeline: bytes, number: int) -> None:
        """A timeline has reached a version, at the first replica that says so."""
        if is_system(timeline):
            self._check_links(timeline)
            self.sinks.links_chosen(
                timeline, self.links(timeline, number), lambda link, block: self._block(link, block)[0]
            )
        elif timeline == self._runs:
            self.sinks.record(number)
        else:
            self.sinks.chosen(timeline, number)

    def cold_file_removed(self, node: str, path: Path) -> None:
        """A cold node removes a file."""
        self.sinks.file_removed(node, path)
        self._world.after_step(self.all_links)

    def _check_majority(self, name: str, timeline: bytes, number: int, request_ids: list[bytes]) -> None:
        """What a replica takes for chosen must be on the disks of a majority."""
        disks = self._disks_of(timeline)
        copies = sum(_holds_entry(disk.engine.synced, timeline, number, request_ids) for disk in disks)
        if copies <= len(disks) // 2 and not self._world.lately_lost():
            self._report(
                "chosen by a majority",
                f"{name} takes entry {number} of {show_timeline(timeline)} for chosen, which {copies} disks hold",
            )

    # ------------------------------------------------------------ answers and what they promise

    def peer_batch(self, disk: SimDisk, peer: str, batch: PeerBatch) -> None:
        """A replica tells a peer: whatever it promises or accepts with that must be on its disk."""
        rows = disk.engine.synced
        for message in self._one_by_one(batch.messages):
            if isinstance(message, Accepted | Promise):
                self.checked_answers += 1
                chosen = self.truth.of(message.timeline).entries.get(message.entry)
                if not _is_durable(rows, message, chosen):
                    self._report(
                        "answers after the fsync",
                        f"{disk.name} sends {peer} {type(message).__name__} of entry {message.entry} of "
                        f"{show_timeline(message.timeline)} at {message.ballot}, which is not on its disk",
                    )

    def _one_by_one(self, messages: list[PeerMessage]) -> Iterator[PeerMessage]:
        """Messages, with the vote for each entry of a flight by itself."""
        for message in messages:
            if isinstance(message, Accepts):
                self._flights[message.life, message.number] = message
            elif isinstance(message, AcceptedAll):
                others = unpack_u32(message.others)
                for index, accept in enumerate(singles(self._flights[message.life, message.number])):
                    if index not in others:
                        yield Accepted(accept.timeline, accept.entry, accept.ballot)
            else:
                yield message

    def acknowledged(self, timeline: bytes, version: int, key: bytes, kind: int, value: bytes, who: str) -> None:
        """A client was told that its write is in the entry `version`."""
        entry = self.truth.of(timeline).entries.get(version)
        where = f"entry {version} of {show_timeline(timeline)}"
        if entry is None:
            self._report("acknowledged writes survive", f"{where} was acknowledged to {who}, but no replica has it")
            return
        if entry.keys is not None:
            wanted = (kind, key, value)
            merged_away = len(entry.request_ids) > 1 and (key in entry.keys or WIPE in entry.kinds)
            if wanted not in zip(entry.kinds, entry.keys, entry.values, strict=True) and not merged_away:
                told = f"{show_key(key)} = {value[:24]!r}"
                self._report("acknowledged writes survive", f"{who} was told that {where} has {told}; it has {entry}")
        copies = sum(_knows_entry(disk.engine.synced, timeline, version) for disk in self._disks_of(timeline))
        if copies < 2 and not self._world.lately_lost():
            self._report("acknowledged writes survive", f"{where} was acknowledged to {who} with {copies} copies")

    def _disks_of(self, timeline: bytes) -> list[SimDisk]:
        return [self._world.nodes[name].disk for name in self._world.voters(timeline)]

    # ------------------------------------------------------------ cache pages

    def page(self, name: str, timeline: bytes, page: Page) -> None:
        """A cache keeps this page."""
        if page.version > self.truth.of(timeline).version:
            self._early_pages.append((name, timeline, page))  # a reader may know before any replica has applied it
        else:
            self._check_page(name, timeline, page)

    def early_pages(self) -> None:
        """Check the pages that were ahead of what any replica had applied."""
        waiting, self._early_pages = self._early_pages, []
        for name, timeline, page in waiting:
            if page.version > self.truth.of(timeline).version:
                self._report("cached pages are true", f"{name}: {_page_name(timeline, page)} is of no chosen version")
            else:
                self._check_page(name, timeline, page)

    def _check_page(self, name: str, timeline: bytes, page: Page) -> None:
        self.checked_pages += 1
        items = self.truth.of(timeline).items(page.version)
        floor = timestamp_floor(page.horizon)
        wanted = {key: (row.version, row.value) for key, row in items.items() if page.contains(key) and key >= floor}
        found = {key: (item.version, item.value) for key, item in zip(page.keys, page.unpacked(), strict=True)}
        if found != wanted:
            self._report(
                "cached pages are true",
                f"{name}: {_page_name(timeline, page)} has {_difference(found, wanted)}",
            )

    # ------------------------------------------------------------ G8: hot, or behind a link

    def _on_commit(self, name: str, batch: Batch) -> None:
        self.expiry.committed(batch)
        for key, value in batch:
            if value is None and key[:1] == b"R":
                timeline = _timeline_of_row(key)
                if not is_system(timeline):
                    self._evicted.setdefault(name, set()).add(timeline)
        if name in self._evicted:
            self._world.after_step(lambda: self._check_evicted(name))

    def _check_evicted(self, name: str) -> None:
        timelines = self._evicted.pop(name, set())
        for timeline in sorted(timelines):
            self.replica_has_all(name, timeline)

    def replica_has_all(self, name: str, timeline: bytes) -> None:
        """Whatever is alive at the version that a replica has applied is in its rows or behind a link."""
        found = self._world.replica(name)
        if found is None:
            return
        replica, engine = found
        self.checked_evictions += 1
        version = chosen_of(replica, engine, timeline)
        history = self.truth.of(timeline)
        if version > history.version:
            return  # a state whose entries nobody has shown
        system = system_timeline(bucket_of(timeline))
        floor = timestamp_floor(self.expiry.horizon_of(timeline, chosen_of(replica, engine, system)))
        prefix = rows_prefix(timeline)
        rows = engine.peek_range(prefix, prefix_end(prefix))
        hot = {(row[len(prefix) : -VERSION_BYTES], version_of(row)): value for row, value in rows.items()}
        cold: dict[tuple[bytes, int], bytes] | None = None
        for key, row in history.items(version).items():
            value = hot.get((key, row.version))
            if key < floor:
                continue
            if value is not None:
                if decode_row(value)[1:] != (PUT, row.value):
                    self._report("rows are what was written", f"{name}: {show_timeline(timeline)} {show_key(key)}")
                continue
            if cold is None:
                cold = self._cold_rows(replica, engine, timeline)
            if cold.get((key, row.version)) != row.value and not self._is_overtaken(
                timeline, version, key, row.version
            ):
                self._report(
                    "G8: every item is hot or behind a link",
                    f"{name} at version {version} of {show_timeline(timeline)} has neither row nor block of "
                    f"{show_key(key)} of version {row.version}",
                )

    def _is_overtaken(self, timeline: bytes, version: int, key: bytes, item_version: int) -> bool:
        """Whether an item is no more as of what a link stands for that is ahead of a replica at `version`.

        A replica that is behind may have evicted the item by a link that the next generation has replaced: the block
        then holds what came after the item, up to a version that this replica is yet to reach. Until then its rows
        answer nobody, since that version was read from a majority. So it is with an item that has expired by a horizon
        which this replica is yet to reach: every reader is told of the greatest one of a majority.
        """
        _, table, owner = split_timeline(timeline)
        history, system = self.truth.of(timeline), system_timeline(bucket_of(timeline))
        if key < timestamp_floor(self.expiry.horizon_of(timeline, self.truth.of(system).version)):
            return True
        timestamp = split_item_key(key)[0]
        for link in self.links(system, self.truth.of(system).version):
            if link.table == table and link.window_start <= timestamp < link.window_end:
                for rule in link.rules_of(timeline_hash(table, owner)):
                    later = history.items(min(rule.version, history.version)).get(key)
                    if rule.version > version and (later is None or later.version > item_version):
                        return True
        return False

    def _cold_rows(self, replica: Replica, engine: SimEngine, timeline: bytes) -> dict[tuple[bytes, int], bytes]:
        """What links hold of a timeline: those that a replica has applied, and those that are valid last, because a
        replica that is behind may know only links whose files have been replaced."""
        _, table, owner = split_timeline(timeline)
        system = system_timeline(bucket_of(timeline))
        versions = {chosen_of(replica, engine, system), self.truth.of(system).version}
        found: dict[tuple[bytes, int], bytes] = {}
        for link in [link for version in sorted(versions) for link in self.links(system, version)]:
            for block in link.blocks_of(owner) if link.table == table else []:
                decoded, _ = self._block(link, block)
                if decoded is not None:
                    keys, values, of_version, _ = decoded.rows_of(owner)
                    rows = zip(keys, of_version, values, strict=True)
                    found.update(((key, version), value) for key, version, value in rows)
        return found

    def links(self, system: bytes, version: int) -> list[Link]:
        """Links of a bucket as of a version of its system timeline."""
        history = self.truth.of(system)
        if version > history.version:
            return []
        links = []
        for row in history.items(version).values():
            try:
                links.append(decode_link(row.value))
            except TimeTierError:
                continue  # a fence or a horizon
        return links

    def _block(self, link: Link, block: Block) -> tuple[DecodedBlock | None, int]:
        """A block, and the number of cold nodes that have it whole on their disks."""
        copies = 0
        place = block.file, block.offset, block.length
        for folder in self._world.cold_folders(link.bucket):
            for path, inode in folder.synced_names.items():
                if path.name == block.file:
                    data = inode.synced[block.offset : block.offset + block.length]
                    if len(data) == block.length and checksum(data) == block.crc:
                        copies += 1
                        if place not in self._decoded:
                            self._decoded[place] = decode_block(data, link.format)
        return (self._decoded[place] if copies else None), copies

    def expired_and_wiped_rows_are_gone(self, *, sunk: bool) -> None:
        """After everything came to rest. `sunk`: and the sink has run since without any error."""
        self.expiry.rows_are_gone()
        self.expiry.wipes_are_noted(self.links)
        if sunk:
            self.expiry.wiped_rows_are_gone(self.links, lambda link, block: self._block(link, block)[0])

    def all_links(self) -> None:
        """The blocks of all links that are valid last are there."""
        for timeline in sorted(self.truth.timelines):
            if is_system(timeline):
                self._check_links(timeline)

    def _check_links(self, system: bytes) -> None:
        needed = self._world.cold_copies_needed
        for link in self.links(system, self.truth.of(system).version):
            for block in link.blocks:
                _, copies = self._block(link, block)
                if copies < needed:
                    self._report(
                        "G8: every item is hot or behind a link",
                        f"the link of {show_timeline(system)} to {block.file} at {block.offset} is chosen, but "
                        f"{copies} cold nodes have that block whole; {needed} should",
                    )

    # ------------------------------------------------------------ at rest

    def replicas_are_equal(self) -> None:
        """Each replica has all that is alive, and no row that was never chosen."""
        for name, node in self._world.nodes.items():
            if node.tier != "storage":
                continue
            for timeline, history in sorted(self.truth.timelines.items()):
                if is_system(timeline) or name not in self._world.voters(timeline):
                    continue
                self.replica_has_all(name, timeline)
                found = self._world.replica(name)
                assert found is not None, "all replicas run when they are compared"
                self._no_stray_rows(name, found[1], timeline, history)

    def _no_stray_rows(self, name: str, engine: SimEngine, timeline: bytes, history: History) -> None:
        prefix = rows_prefix(timeline)
        for row in engine.peek_range(prefix, prefix_end(prefix)):
            key, version = row[len(prefix) : -VERSION_BYTES], version_of(row)
            entry = history.entries.get(version)
            if entry is None:
                # A request that was on its way for long, and has just been accepted: nobody can say yet.
                record = engine.peek(log_key(timeline, version))
                if record is not None and version == history.version + 1 and key in decode_record(record).keys:
                    continue
            if entry is None or (entry.keys is not None and key not in entry.keys):
                self._report(
                    "rows are what was written",
                    f"{name}: {show_timeline(timeline)} has a row of {show_key(key)} at version {version}, "
                    f"which no chosen entry wrote; that is {entry}",
                )


# ---------------------------------------------------------------- what is on disks


def chosen_of(replica: Replica, engine: SimEngine, timeline: bytes) -> int:
    """Version that a replica has applied, without making it load the timeline."""
    known = replica.core._timelines.get(timeline)
    if known is not None:
        return known.chosen
    row = engine.peek(meta_key(timeline))
    chosen = Meta.decode(row).chosen if row is not None else 0
    entries = [log_entry(key) for key in engine.peek_range(log_key(timeline, chosen), prefix_end(b"L" + timeline))]
    return max([chosen, *(entry - 1 for entry in entries)])


def _entry(engine: SimEngine, timeline: bytes, number: int, request_ids: list[bytes]) -> Entry:
    encoded = engine.peek(log_key(timeline, number))
    record = decode_record(encoded) if encoded is not None else None
    if record is None or not record.keys:
        return Entry(tuple(request_ids))
    values = []
    for key in record.keys:
        row = engine.peek(row_key(timeline, key, number)) if key else None
        values.append(decode_row(row)[2] if row is not None else b"")
    return Entry(
        tuple(record.request_ids), record.origin, record.written, record.kinds, tuple(record.keys), tuple(values)
    )


def noted_life(rows: dict[bytes, bytes], replica: int) -> Life | None:
    """The greatest life of a peer that is on a replica's disk."""
    row = rows.get(life_key(replica))
    return decode_life(row) if row is not None else None


def _meta(rows: dict[bytes, bytes], timeline: bytes) -> Meta:
    row = rows.get(meta_key(timeline))
    return Meta.decode(row) if row is not None else Meta()


def _is_durable(rows: dict[bytes, bytes], message: Accepted | Promise, chosen: Entry | None) -> bool:
    """Whether a disk holds what the message says, or something that has replaced it.

    A value that was fetched because it is chosen may stand there with the lower ballot at which it was chosen: no
    other value can win any more, so the vote of the higher ballot is not needed.
    """
    timeline, entry, ballot = message.timeline, message.entry, message.ballot
    meta = _meta(rows, timeline)
    if meta.chosen >= entry or log_key(timeline, entry + 1) in rows:
        return True
    encoded = rows.get(log_key(timeline, entry))
    if encoded is not None:
        record = decode_record(encoded)
        if record.ballot > ballot or (record.ballot == ballot and (record.vote or isinstance(message, Promise))):
            return True
        if chosen is not None and (tuple(record.request_ids), record.origin) == (chosen.request_ids, chosen.origin):
            return True
    return isinstance(message, Promise) and meta.promised_entry == entry and meta.promised >= ballot


def _knows_entry(rows: dict[bytes, bytes], timeline: bytes, entry: int) -> bool:
    if _meta(rows, timeline).chosen >= entry:
        return True
    return log_key(timeline, entry) in rows or log_key(timeline, entry + 1) in rows


def _holds_entry(rows: dict[bytes, bytes], timeline: bytes, entry: int, request_ids: list[bytes]) -> bool:
    """Whether a disk holds the entry with these requests, or says that it was chosen."""
    encoded = rows.get(log_key(timeline, entry))
    if encoded is not None and list(decode_record(encoded).request_ids) == request_ids:
        return True
    return _meta(rows, timeline).chosen >= entry or log_key(timeline, entry + 1) in rows


def _timeline_of_row(key: bytes) -> bytes:
    table_end = 6 + key[5]
    return key[1 : table_end + 1 + key[table_end]]


def _page_name(timeline: bytes, page: Page) -> str:
    return f"page [{show_key(page.low)}, {show_key(page.high)}) of {show_timeline(timeline)} at version {page.version}"


def _difference(found: dict[bytes, tuple[int, bytes]], wanted: dict[bytes, tuple[int, bytes]]) -> str:
    keys = [key for key in sorted(found.keys() | wanted.keys()) if found.get(key) != wanted.get(key)]
    return "; ".join(f"{show_key(key)}: {found.get(key)} instead of {wanted.get(key)}" for key in keys[:3])
