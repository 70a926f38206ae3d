"""Files and links of a run: blocks are added to the file of their cold group, and linked when it is safe. *Pure*.

When a file is full, or its storage group is done, it is copied to its cold nodes, one after the other, and only when
all of them have it verified on disk the links are written. All links of a bucket go in one conditional write on the
bucket's system timeline, with the version at which it was scanned.

Before each copy and each batch of links the run makes sure that no later one has begun. That keeps a stale run from
working in vain; what keeps it from doing harm, also when it is paused right after the question, is that cold nodes
refuse its epoch and that its links are conditional.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ..client.scripts import WriteRequest, write
from ..effects import Script
from ..errors import TimeTierError, TooLarge, Unavailable, VersionConflict
from ..keys import MAX_VALUE_BYTES, system_timeline
from ..messages import PUT
from .block import FileBuilder, checksum
from .cold_calls import choose_disk, copy_to_node
from .garbage import Garbage
from .link import Link, encode_link
from .rows import Rows
from .run_record import Fenced
from .sink_report import count_sizes
from .sink_run import SinkRun, TableSink
from .sinking import CutOffs, Window, make_link

_WRITES_AT_ONCE = 256
_WRITE_BYTES = 4 << 20  # of one conditional write
_WRITE_ITEMS = 1_000
_PENDING_FILES = 4  # files' worth of blocks held in memory, over all cold groups

Mutation = tuple[int, bytes, bytes]  # kind, item key, value


@dataclass(slots=True)
class Pending:
    """Links of a bucket whose file is not yet written. `replaced`: files that lose blocks to them."""

    bucket: int
    system_version: int
    links: list[Link]
    mutations: list[Mutation]
    rows: int = 0
    replaced: set[str] = field(default_factory=set)
    rewritten_bytes: int = 0


@dataclass(slots=True)
class _Open:
    """The file of one cold group that is being filled, and the links that wait for it."""

    builder: FileBuilder
    pending: list[Pending] = field(default_factory=list)


class Filing:
    """Files and links of one run."""

    def __init__(self, run: SinkRun, garbage: Garbage) -> None:
        self.refused: set[int] = set()  # cold groups that did not take a file
        self._run = run
        self._garbage = garbage
        self._open: dict[int, _Open] = {}
        self._files = 0

    # ------------------------------------------------------------ filling

    def add_window(self, task: TableSink, cold_group: int, pending: Pending, window: Window, rows: Rows) -> None:
        """Add a window's next generation. Raises TooLarge, InvalidRequest."""
        settings = self._run.settings
        builder = self._file_of(task, cold_group).builder
        blocks = builder.add(
            rows,
            bucket=pending.bucket,
            window_start=window.start,
            window_end=window.end,
            generation=window.generation,
            block_rows=settings.block_rows,
            block_bytes=settings.block_bytes,
        )
        cut_offs = task.cut_offs
        if window.old is not None and not window.parts:  # nothing was read for it
            cut_offs = CutOffs(window.old.event_before, window.old.written_before)
        link = make_link(
            window,
            bucket=pending.bucket,
            table=task.table,
            cut_offs=cut_offs,
            run=self._run.run,
            rows=rows,
            blocks=blocks,
        )
        value = encode_link(link)
        if len(value) > MAX_VALUE_BYTES:
            raise TooLarge(
                f"its link has {len(value)} bytes, the limit is {MAX_VALUE_BYTES}: make the table's window shorter",
                limit=MAX_VALUE_BYTES,
            )
        pending.links.append(link)
        pending.mutations.append((PUT, link.key, value))
        pending.rows += sum(high - low for _, low, high in window.parts)
        if window.old is not None:
            pending.replaced.update(block.file for block in window.old.blocks)
            if any(block.file in self._garbage.rewrite for block in window.old.blocks):
                pending.rewritten_bytes += sum(block.length for block in window.old.blocks)

    def add(self, task: TableSink, cold_group: int, pending: Pending) -> Script[None]:
        """A bucket's windows are complete. Writes files that are full. Raises Fenced."""
        if pending.mutations:
            self._file_of(task, cold_group).pending.append(pending)
        opened = self._open.get(cold_group)
        if opened is None:
            return
        file_bytes = self._run.settings.file_bytes
        if opened.builder.size >= file_bytes:
            yield from self._flush(task, cold_group)
        elif sum(file.builder.size for file in self._open.values()) >= _PENDING_FILES * file_bytes:
            yield from self._flush(task, max(self._open, key=lambda group: self._open[group].builder.size))

    def flush_all(self, task: TableSink) -> Script[None]:
        """Write all files and links that wait. Raises Fenced."""
        for cold_group in sorted(self._open):
            yield from self._flush(task, cold_group)

    def _file_of(self, task: TableSink, cold_group: int) -> _Open:
        opened = self._open.get(cold_group)
        if opened is None:
            self._files += 1
            run = self._run
            name = f"{run.epoch.prefix}-{self._files:05d}.arrow"
            builder = FileBuilder(
                name, table=task.table, per_second=task.policy.per_second, cold_group=cold_group, run=run.run
            )
            opened = self._open[cold_group] = _Open(builder)
        return opened

    # ------------------------------------------------------------ copying and linking

    def _flush(self, task: TableSink, cold_group: int) -> Script[None]:
        """Copy the file to its cold nodes, then write the links that wait for it."""
        run, opened = self._run, self._open.pop(cold_group)
        builder = opened.builder
        if builder.entries:
            try:
                size = yield from run.timed("copy", self._copy(builder, cold_group))
            except TimeTierError as error:
                self.refused.add(cold_group)
                run.unclean = True  # some of the nodes may have it
                run.report.add_error(f"cold group {cold_group} did not take {builder.file}: {error.message}")
                return
        named = True
        for start in range(0, len(opened.pending), _WRITES_AT_ONCE):
            part = opened.pending[start : start + _WRITES_AT_ONCE]
            named &= yield from run.timed("link", self._link_safely(part, cold_group))
        if not builder.entries:
            return
        if named:
            self._garbage.note_small(builder.file, task.table, cold_group, size)
        else:
            try:
                yield from self._garbage.note({builder.file: cold_group})
            except TimeTierError as error:
                run.unclean = True
                run.report.add_error(f"{builder.file} may be garbage that is not noted: {error.message}")

    def _copy(self, builder: FileBuilder, cold_group: int) -> Script[int]:
        """Copy a file to all nodes of its group; its size. Raises TimeTierError, Fenced."""
        run = self._run
        data = builder.finish()
        nodes = run.cold_nodes(cold_group)
        disk = yield from choose_disk(run.view, nodes, builder.file, len(data), run.settings)
        crc = checksum(data)
        for node in nodes:
            yield from run.epoch.check()
            try:
                yield from copy_to_node(run.view, node, builder.file, disk, data, crc, run.epoch.number, run.settings)
            except VersionConflict as conflict:
                raise Fenced(f"fenced: {conflict.message}") from None
        run.report.files += 1
        count_sizes(run.report.file_sizes, [len(data)])
        return len(data)

    def _link_safely(self, waiting: list[Pending], cold_group: int) -> Script[bool]:
        """Note what the links replace, and write them. Whether all were written. Raises Fenced."""
        replaced = {file: cold_group for pending in waiting for file in sorted(pending.replaced)}
        try:
            yield from self._garbage.note(replaced)
        except TimeTierError as error:
            self._run.report.add_error(f"links of {len(waiting)} buckets were not written: {error.message}")
            return False
        return (yield from self._link(waiting))

    def _link(self, waiting: list[Pending]) -> Script[bool]:
        """Write the links of some buckets; a bucket's go in one write, or in a chain of them if they are many."""
        run = self._run
        chains = [(pending, list(_parts(pending.mutations))) for pending in waiting]
        named = True
        while chains:
            requests = [
                WriteRequest(
                    system_timeline(pending.bucket),
                    bytes(kind for kind, _, _ in parts[0]),
                    [key for _, key, _ in parts[0]],
                    [value for _, _, value in parts[0]],
                    if_version=pending.system_version,
                )
                for pending, parts in chains
            ]
            outcomes = yield from write(run.view, requests, run.settings.write_timeout_s)
            rest = []
            for (pending, parts), outcome in zip(chains, outcomes, strict=True):
                if isinstance(outcome, VersionConflict):
                    run.report.fenced_buckets += 1
                elif isinstance(outcome, TimeTierError):
                    run.unclean |= not isinstance(outcome, Unavailable)
                    run.report.add_error(
                        f"bucket {pending.bucket}: its links may not have been written: {outcome.message}"
                    )
                elif len(parts) > 1:
                    pending.system_version = outcome
                    rest.append((pending, parts[1:]))
                else:
                    self._count(pending)
                    continue
                named &= len(parts) > 1 and isinstance(outcome, int)
            chains = rest
        return named

    def _count(self, pending: Pending) -> None:
        report = self._run.report
        report.buckets += bool(pending.links)
        report.rows += pending.rows
        report.rewritten_bytes += pending.rewritten_bytes
        for link in pending.links:
            report.raw_bytes += link.raw_bytes
            report.blocks += len(link.blocks)
            report.cold_bytes += sum(block.length for block in link.blocks)
            count_sizes(report.block_sizes, [block.length for block in link.blocks])


def _parts(mutations: list[Mutation]) -> Iterator[list[Mutation]]:
    """Mutations in parts that one write takes."""
    part: list[Mutation] = []
    size = 0
    for mutation in mutations:
        more = len(mutation[1]) + len(mutation[2])
        if part and (size + more > _WRITE_BYTES or len(part) == _WRITE_ITEMS):
            yield part
            part, size = [], 0
        part.append(mutation)
        size += more
    if part:
        yield part
