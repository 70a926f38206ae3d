"""The cold tier and a reader for interaction scripts: the production `Reader`, whose questions a script lets arrive.

A file is made as the sink makes it: from a replica's answer to `Scan`, merged with the generation before. The reader is
a script of `effects.py`; each of its calls waits until the interaction script has it answered, or fail.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable

import numpy as np
from interaction_calls import HandAnswered
from interaction_group import HandDriven
from interaction_text import BUCKETS, TABLE, item_text
from timetier.cluster.cold.block import DecodedBlock, FileBuilder, decode_block
from timetier.cluster.cold.block_cache import BlockCache
from timetier.cluster.cold.link import FORMAT, Link
from timetier.cluster.cold.rows import Rows
from timetier.cluster.effects import Script
from timetier.cluster.errors import Corrupt, TimeTierError
from timetier.cluster.keys import bucket_of, item_key, split_timeline, timeline_hash
from timetier.cluster.memory.page_cache import PageCache
from timetier.cluster.memory.reading import Reader
from timetier.cluster.memory.requests import PageAnswer, Read
from timetier.cluster.memory.steps import Step
from timetier.cluster.messages import (
    DELETE,
    BlockBytes,
    BlockRead,
    Message,
    Scan,
    Scanned,
    failure,
    pack_i64,
    unpack_i64,
    unpack_u32,
)
from timetier.cluster.routing import Routing
from timetier.cluster.topology import Topology

FOREVER = (1 << 63) - 1
FAR_S = 1_000_000.0
MAX_PAGE_BYTES = 1 << 20


class Shelf:
    """Cold files by name, equal on all three cold nodes."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self._links: dict[tuple[bytes, int], Link] = {}

    def sink(self, group: HandDriven, number: int, timeline: bytes, window: tuple[int, int]) -> Link:
        """Write what a replica has of one timeline in one window to a file; the link to it."""
        before = self._links.get((timeline, window[0]))
        generation = before.generation + 1 if before else 1
        _, _, owner = split_timeline(timeline)
        rows = self._rows(group, number, timeline, window, before)
        file = f"file{generation}"
        builder = FileBuilder(file, table=TABLE, per_second=1, cold_group=0, run="run")
        blocks = builder.add(
            rows,
            bucket=bucket_of(timeline),
            window_start=window[0],
            window_end=window[1],
            generation=generation,
            block_rows=100,
        )
        self.files[file] = builder.finish()
        link = Link(
            FORMAT,
            bucket_of(timeline),
            TABLE,
            *window,
            generation,
            window[1],
            FOREVER,
            np.array([timeline_hash(TABLE, owner)], dtype="<u8").tobytes(),
            pack_i64([group.replica(number).core.timeline(timeline).chosen]),
            len(rows),
            rows.raw_bytes(),
            "run",
            blocks,
        )
        self._links[timeline, window[0]] = link
        return link

    def _rows(
        self, group: HandDriven, number: int, timeline: bytes, window: tuple[int, int], before: Link | None
    ) -> Rows:
        _, _, owner = split_timeline(timeline)
        merged: dict[bytes, tuple[bytes, int, int]] = {}
        for block in before.blocks if before else []:
            known = decode_block(self.files[block.file][block.offset : block.offset + block.length])
            for key, value, version, at_us in zip(*known.rows_of(owner), strict=True):
                merged[key] = (value, version, at_us)
        answer, _ = group.replica(number).scans.scan(
            Scan(bucket_of(timeline), TABLE, window[1], FOREVER, b"", 1 << 20), range(BUCKETS)
        )
        assert isinstance(answer, Scanned)
        start = 0
        versions, written = unpack_i64(answer.versions), unpack_i64(answer.written)
        for name, count in zip(answer.timelines, unpack_u32(answer.counts), strict=True):
            for at in range(start, start + count):
                if name != timeline or answer.keys[at] < item_key(window[0])[:8]:
                    continue
                merged.pop(answer.keys[at], None)
                if answer.kinds[at] != DELETE:
                    merged[answer.keys[at]] = (answer.values[at], versions[at], written[at])
            start += count
        rows = Rows()
        for key in sorted(merged):
            rows.append(owner, key, *merged[key])
        return rows

    def read(self, message: BlockRead) -> Message:
        """A cold node's answer."""
        data = self.files.get(message.file)
        if data is None:
            return failure(Corrupt(f"{message.file} is missing", reason="missing"))
        return BlockBytes(data[message.offset : message.offset + message.length])


class ScriptedReader(HandAnswered):
    """A reader without a cache to begin with. What it keeps, its next read starts from."""

    def __init__(self, replicas: int, say: Callable[[str], None]) -> None:
        super().__init__("reader", say)
        shape = Topology("c", "n", 1, BUCKETS, 1, replicas, 1, 3, 1, 1, {}, None, {}, "00")
        self._time_s = 0.0
        self._reader = Reader(
            Routing(shape),
            PageCache(1 << 20),
            BlockCache[DecodedBlock](1 << 20),
            clock=lambda: self._time_s,
            random=random.Random(1),
        )
        self._jobs: deque[Script[Step]] = deque()

    def get(self, timeline: bytes, limit: int) -> None:
        """Begin to read the newest items of a timeline."""
        self._jobs.append(self._reader.batch([Read(timeline, b"", limit, FAR_S, MAX_PAGE_BYTES)]))
        self.go_on()

    def next_script(self) -> Script[Step] | None:
        return self._jobs.popleft() if self._jobs else None

    def slept(self, seconds: float) -> float | None:
        self._time_s += seconds
        self.say("reader pauses")
        return self._time_s

    def ended(self, result: Step) -> None:
        for read in result.done:
            if isinstance(read.answer, PageAnswer):
                page = read.answer.items
                items = [
                    f"{item_text(item_key(item.timestamp, item.id))}={item.value.decode()}" for item in page.unpacked()
                ]
                self.say(f"reader has version {read.answer.version}: {', '.join(items) or 'nothing'}")
            elif isinstance(read.answer, TimeTierError):
                self.say(f"reader fails: {type(read.answer).__name__}: {read.answer.message}")
        self._jobs.extend(job.script for job in result.then)
