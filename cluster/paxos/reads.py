"""What a replica answers to readers: versions, deltas, ranges and points, all from one instant.

A replica alone never knows whether its version is the newest: that takes a majority, which the reader asks. It only
says what it has: `chosen`, whether entry chosen+1 is open here, and data as of `chosen`. Rows, links, horizon and
`wiped` of one answer belong together, because a step of the replica is never interrupted.
"""

from __future__ import annotations

from collections.abc import Set

from ..cold.link import Link
from ..errors import InvalidRequest, TooLarge
from ..keys import (
    MAX_TIMESTAMP,
    MIN_TIMESTAMP,
    bucket_of,
    bucket_prefix,
    split_item_key,
    split_timeline,
    system_timeline,
    timeline_hash,
    timestamp_floor,
)
from ..messages import (
    DELETE,
    DELTA,
    NO_BALLOT,
    POINT,
    RANGE,
    SAME,
    WIPE,
    AskChosen,
    AskSame,
    AskVersions,
    Check,
    Checked,
    ChosenList,
    LinkRef,
    Links,
    Open,
    Same,
    Versions,
    pack_i64,
    pack_u32,
    unpack_i64,
    unpack_u32,
)
from ..storage.version_cache import DIRTY
from .acceptor import Acceptor
from .core import Core
from .links import NO_LINKS, LinkIndex, TableLinks
from .quiet import place_of
from .rows import VERSION_BYTES, Meta, decode_record, decode_row, log_key, prefix_end, rows_prefix, version_of
from .standings import NO_STANDING
from .timeline import Timeline

TIMESTAMP_BYTES = 8  # the least that an item key, or a bound between two, begins with
MAX_LINKS = 64  # blocks that one answer names for one timeline
MAX_ANSWER_BYTES = 16 << 20  # of one timeline; of all of a message twice as much
ROWS_AT_ONCE = 128
MAX_DELTA_ITEMS = 2_000
CHOSEN_PER_ANSWER = 5_000


class _Answer:
    """Columns of a `Checked` while it grows."""

    def __init__(self) -> None:
        self.chosen: list[int] = []
        self.opens: list[Open] = []
        self.payloads = bytearray()
        self.counts: list[int] = []
        self.kinds = bytearray()
        self.keys: list[bytes] = []
        self.values: list[bytes] = []
        self.versions: list[int] = []
        self.written: list[int] = []
        self.wiped: list[int] = []
        self.horizons: list[int] = []
        self.floors: list[bytes] = []
        self.links: list[Links] = []
        self.size = 0
        self.after = 0

    def add_row(self, key: bytes, version: int, written: int, kind: int, value: bytes) -> None:
        self.kinds.append(kind)
        self.keys.append(key)
        self.values.append(value)
        self.versions.append(version)
        self.written.append(written)
        self.size += len(key) + len(value) + 32

    def add_nothing(self, want: int) -> None:
        """Answer that this replica can't tell: neither a vote nor data."""
        self.chosen.append(-1)
        self.payloads.append(POINT if want == POINT else RANGE)
        self.counts.append(0)
        self.wiped.append(0)
        self.horizons.append(MIN_TIMESTAMP)
        self.floors.append(b"")

    def message(self, incarnations: list[int], mark: int) -> Checked:
        return Checked(
            pack_i64(self.chosen),
            self.opens,
            bytes(self.payloads),
            pack_u32(self.counts),
            bytes(self.kinds),
            self.keys,
            self.values,
            pack_i64(self.versions),
            pack_i64(self.written),
            pack_i64(self.wiped),
            pack_i64(self.horizons),
            self.floors,
            self.links,
            incarnations,
            mark,
        )


class Reads:
    """Answers of one replica to readers and to peers that compare themselves."""

    def __init__(self, core: Core, acceptor: Acceptor, links: LinkIndex) -> None:
        self.core = core
        self.acceptor = acceptor
        self.links = links
        self._doubted: set[int] = set()  # buckets of which a reader was told that their horizon is not known

    # ---- versions

    def same(self, message: AskSame) -> tuple[Same, int]:
        """Answer from the version cache alone; what that says is durable, so there is nothing to wait for."""
        others = self.core.versions.others(message.digests, message.versions)
        self.core.counters.add("same_questions", len(message.versions) // 8)
        self.core.counters.add("same_others", len(others))
        return Same(pack_u32(others), self.core.versions.mark, self.core.incarnations()), 0

    def versions(self, message: AskVersions) -> tuple[Versions, int]:
        """Answer, and the engine batch that must be durable before it leaves."""
        absent = [key for key in message.timelines if not self.core.holds(key)]
        cached = dict(zip(absent, self.core.versions.look_up(absent), strict=True)) if absent else {}
        chosen: list[int] = []
        opens: list[Open] = []
        after = 0
        horizons, unsure = self._horizons(message.timelines)
        for index, key in enumerate(message.timelines):
            version = cached.get(key, DIRTY)
            if version != DIRTY:
                chosen.append(version)
                continue
            timeline = self.core.timeline(key)
            self.core.versions.missed(timeline)
            chosen.append(timeline.chosen)
            if timeline.accepted != NO_BALLOT:
                opens.append(_open(index, timeline))
            after = max(after, timeline.dirty)
        self.core.counters.add("version_questions", len(chosen))
        told = pack_i64(horizons) if horizons else b"", pack_u32(unsure), self.core.versions.mark
        return Versions(pack_i64(chosen), opens, self.core.incarnations(), *told), after

    def _horizons(self, timelines: list[bytes]) -> tuple[list[int], list[int]]:
        """Horizons of the timelines, none if no table has any, and indices of those of which it is in doubt."""
        standings = self.core.standings
        if not standings.known and not standings.stirred:
            return [], []
        horizons: list[int] = []
        unsure: list[int] = []
        for index, key in enumerate(timelines):
            bucket = bucket_of(key)
            if bucket in standings.stirred:
                table = split_timeline(key)[1]
                if self._is_in_doubt(bucket, table):
                    unsure.append(index)
                horizons.append(self.links.standing(bucket, table).horizon)
            else:
                horizons.append(standings.known.get(place_of(key), NO_STANDING).horizon)
        return horizons if max(horizons, default=MIN_TIMESTAMP) > MIN_TIMESTAMP else [], unsure

    def _is_in_doubt(self, bucket: int, table: bytes) -> bool:
        """Whether this replica can't tell the horizon; somebody will settle it (`doubts`)."""
        if not self.core.standings.in_doubt(bucket, table):
            return False
        self.core.counters.add("horizons_in_doubt")
        self._doubted.add(bucket)
        return True

    def doubts(self, now: float) -> list[Timeline]:
        """System timelines that should be settled: readers have been told for a while that a horizon is in doubt."""
        doubted, self._doubted = self._doubted, set()
        late = [bucket for bucket in sorted(doubted) if self.core.standings.doubted(bucket, now)]
        return [self.core.timeline(system_timeline(bucket)) for bucket in late]

    def chosen_list(self, message: AskChosen, owned: Set[int]) -> ChosenList:
        """How far this replica has applied the timelines of `owned` buckets, from (bucket, cursor) on."""
        self.core.mark_all()
        names: list[bytes] = []
        chosen: list[int] = []
        start = b"M" + (message.cursor or bucket_prefix(max(message.bucket, 0)))
        for seen, (name, row) in enumerate(self.core.engine.scan(start, b"N")):
            if seen >= CHOSEN_PER_ANSWER:
                return ChosenList(names, pack_i64(chosen), bucket_of(name[1:]), name[1:])
            if bucket_of(name[1:]) in owned:
                names.append(name[1:])
                chosen.append(Meta.decode(row).chosen)
        return ChosenList(names, pack_i64(chosen), -1, b"")

    # ---- data

    def check(self, message: Check, now: float) -> tuple[Checked, int]:
        """Answer, and the engine batch that must be durable before it leaves."""
        answer = _Answer()
        have = unpack_i64(message.have)
        limits = unpack_u32(message.limits)
        if not len(message.timelines) == len(have) == len(limits) == len(message.wants) == len(message.bounds):
            raise InvalidRequest("a Check whose columns are not of one length")
        for want, bound in zip(message.wants, message.bounds, strict=True):
            if len(bound) < TIMESTAMP_BYTES and (bound or want == POINT):
                raise InvalidRequest(f"a Check with bound {bound!r}, which is no item key")
        proofs = {known.index: known for known in message.known}
        for index, key in enumerate(message.timelines):
            timeline = self.core.timeline(key)
            self.core.versions.missed(timeline)
            proof = proofs.get(index)
            if (
                proof is not None
                and proof.entry == timeline.chosen + 1
                and proof.ballot == timeline.accepted != NO_BALLOT
            ):
                self.acceptor.choose(timeline)
            answer.after = max(answer.after, timeline.dirty)
            if self._is_behind_its_links(timeline, now) or self._is_in_doubt(*split_timeline(key)[:2]):
                answer.add_nothing(message.wants[index])
                continue
            answer.chosen.append(timeline.chosen)
            if timeline.accepted != NO_BALLOT:
                answer.opens.append(_open(index, timeline))
            answer.wiped.append(timeline.wiped)
            before = len(answer.keys)
            self._answer_one(
                answer, index, timeline, have[index], message.wants[index], message.bounds[index], limits[index]
            )
            answer.counts.append(len(answer.keys) - before)
            if answer.size > 2 * MAX_ANSWER_BYTES and len(have) > 1:
                # Found out before the rest is read: so many large values would fill memory, and then fit no frame.
                raise TooLarge(
                    f"the answer to {len(have)} checks exceeds {2 * MAX_ANSWER_BYTES} bytes: ask for less at once",
                    limit=2 * MAX_ANSWER_BYTES,
                )
        self.core.counters.add("checks", len(have))
        return answer.message(self.core.incarnations(), self.core.versions.mark), answer.after

    def _is_behind_its_links(self, timeline: Timeline, now: float) -> bool:
        """Whether a block holds newer rows of the timeline than this replica has applied; then it fetches.

        What it could answer would be torn: old hot rows beside a block from which deleted items are gone already.
        """
        bucket, table, owner = split_timeline(timeline.key)
        links = self.links.of_bucket(bucket)
        if timeline.linked_at != links.version:
            owner_hash = timeline_hash(table, owner)
            known = links.tables.get(table, NO_LINKS).links
            rules = [rule.version for link in known for rule in link.rules_of(owner_hash)]
            timeline.linked, timeline.linked_at = max(rules, default=0), links.version
        if timeline.linked <= timeline.chosen:
            return False
        for peer in self.core.peers:
            self.acceptor.fetch(timeline, peer, now)
        return True

    def _answer_one(
        self, answer: _Answer, index: int, timeline: Timeline, have: int, want: int, bound: bytes, limit: int
    ) -> None:
        _, table, owner = split_timeline(timeline.key)
        links = self.links.of_table(bucket_of(timeline.key), table)
        answer.horizons.append(links.horizon)
        if want == POINT:
            answer.payloads.append(POINT)
            answer.floors.append(b"")
            self._point(answer, index, timeline, links, owner, bound)
        elif want == DELTA and have == timeline.chosen:
            answer.payloads.append(SAME)
            answer.floors.append(b"")
        elif want == DELTA and timeline.floor <= have < timeline.chosen and self._delta(answer, timeline, have):
            answer.payloads.append(DELTA)
            answer.floors.append(b"")
        else:
            answer.payloads.append(RANGE)
            self._range(answer, index, timeline, links, owner, b"" if want == DELTA else bound, max(limit, 1))

    def _delta(self, answer: _Answer, timeline: Timeline, have: int) -> bool:
        """Append the items of entries have+1 .. chosen in log order. False if a range is the better answer."""
        key = timeline.key
        entries = []
        items = 0
        first = have + 1
        for number, (_, encoded) in enumerate(
            self.core.engine.scan(log_key(key, first), log_key(key, timeline.chosen + 1)), first
        ):
            record = decode_record(encoded)
            items += len(record.keys)
            if items > MAX_DELTA_ITEMS:
                return False
            entries.append((number, record))
        prefix = rows_prefix(key)
        names = [
            prefix + item + number.to_bytes(8, "big") for number, record in entries for item in record.keys if item
        ]
        found = self._rows_within(names, MAX_ANSWER_BYTES - answer.size)
        if found is None:
            return False
        rows = iter(found)
        for number, record in entries:
            for kind, item in zip(record.kinds, record.keys, strict=True):
                if kind == WIPE:
                    answer.add_row(b"", number, record.written, WIPE, b"")
                    continue
                row = next(rows)
                assert row is not None, f"a row of entry {number} above the floor {timeline.floor} is gone"
                written, _, value = decode_row(row)
                answer.add_row(item, number, written, kind, value)
        return True

    def _rows_within(self, names: list[bytes], limit_bytes: int) -> list[bytes | None] | None:
        """Rows by name, None if they exceed `limit_bytes` together."""
        rows: list[bytes | None] = []
        for start in range(0, len(names), ROWS_AT_ONCE):
            part = self.core.engine.get_many(names[start : start + ROWS_AT_ONCE])
            limit_bytes -= sum(len(row) for row in part if row is not None)
            if limit_bytes < 0:
                return None
            rows += part
        return rows

    def _range(
        self,
        answer: _Answer,
        index: int,
        timeline: Timeline,
        links: TableLinks,
        owner: bytes,
        before: bytes,
        limit: int,
    ) -> None:
        """Append visible rows newest first, tombstones too, until `limit` live ones; then the links beside them."""
        prefix = rows_prefix(timeline.key)
        high = _end_of_rows(prefix, before)
        start = len(answer.keys)
        last = floor = b""
        live = 0
        for name, row in self.core.engine.scan(prefix, high, reverse=True):
            key = name[len(prefix) : -VERSION_BYTES]
            version = version_of(name)
            if version > timeline.chosen or key == last:
                continue  # not chosen yet, or superseded: versions of a key come newest first
            if live >= limit or (live and answer.size >= MAX_ANSWER_BYTES):
                floor = last
                break
            last = key
            if version <= timeline.wiped:
                continue
            written, kind, value = decode_row(row)
            answer.add_row(key, version, written, kind, value)
            live += kind != DELETE
        refs, floor = self._link_refs(links, owner, floor, before)
        answer.floors.append(floor)
        if refs:
            answer.links.append(Links(index, refs))
        while len(answer.keys) > start and answer.keys[-1] < floor:
            for column in (answer.kinds, answer.keys, answer.values, answer.versions, answer.written):
                column.pop()

    def _link_refs(self, links: TableLinks, owner: bytes, floor: bytes, before: bytes) -> tuple[list[LinkRef], bytes]:
        """Blocks between `floor` and `before`, newest window first, and the floor that they are complete to."""
        if not links.links:
            return [], floor
        low = split_item_key(floor)[0] if floor else MIN_TIMESTAMP
        high = split_item_key(before)[0] if before else MAX_TIMESTAMP
        refs: list[LinkRef] = []
        for link in links.overlapping(low, high):
            found = self._refs_of(link, owner, floor, before)
            if refs and len(refs) + len(found) > MAX_LINKS:
                return refs, max(floor, timestamp_floor(link.window_end))
            refs += found
        return refs, floor

    @staticmethod
    def _refs_of(link: Link, owner: bytes, floor: bytes, before: bytes) -> list[LinkRef]:
        return [
            LinkRef(
                link.bucket,
                link.window_start,
                link.format,
                block.file,
                block.offset,
                block.length,
                block.crc,
                block.low,
                block.high,
            )
            for block in link.blocks_of(owner)
            if block.high > floor and (not before or block.low < before)
        ]

    def _point(
        self, answer: _Answer, index: int, timeline: Timeline, links: TableLinks, owner: bytes, key: bytes
    ) -> None:
        """Append the newest chosen row of one item; if there is none, name the blocks that may hold it."""
        prefix = rows_prefix(timeline.key) + key
        for name, row in self.core.engine.scan(prefix, prefix + b"\xff" * VERSION_BYTES, reverse=True):
            version = version_of(name)
            if len(name) != len(prefix) + VERSION_BYTES or version > timeline.chosen:
                continue
            written, kind, value = decode_row(row)
            if version > timeline.wiped:
                answer.add_row(key, version, written, kind, value)
                return
            break
        timestamp = split_item_key(key)[0]
        refs = [
            ref
            for link in links.overlapping(timestamp, timestamp)
            for ref in self._refs_of(link, owner, b"", b"")
            if ref.low <= key < ref.high
        ]
        if refs:
            answer.links.append(Links(index, refs[:MAX_LINKS]))


def _end_of_rows(prefix: bytes, before: bytes) -> bytes:
    """Where the rows of all items below `before` end.

    A bound may lie right above an item key (the upper end of a block does). The rows of that item belong to the range,
    but their names go on with a version, and so would sort behind the bound.
    """
    if not before:
        return prefix_end(prefix)
    key_end = before.find(b"\x00\x01", TIMESTAMP_BYTES) + 2
    if TIMESTAMP_BYTES < key_end < len(before):
        return prefix + before[:key_end] + b"\xff"
    return prefix + before


def _open(index: int, timeline: Timeline) -> Open:
    """The open entry of a timeline, as a vote of this replica or as knowledge, which has no round."""
    return Open(index, (-1, timeline.accepted[1]) if timeline.learned else timeline.accepted)
