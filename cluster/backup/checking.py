"""Checks a backup without restoring it: every byte of it is read, and everything that it names is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ..cold.link import RECORDS_AT, Link, decode_link
from ..errors import Corrupt, TimeTierError
from ..keys import is_system, split_item_key
from ..messages import PUT, TimelineState
from ..paxos.rows import VERSION_BYTES, decode_row
from .cold_files import check_cold_file, spool_file
from .format import REFERENCED, Manifest
from .reading import ColdSource, read_part
from .target import Target

MAX_ERRORS = 100


@dataclass(slots=True)
class CheckReport:
    """What was found. `errors`: what is damaged or missing, each with its name. `files_not_checked`: cold files that
    the backup only names, and that nobody said where to find."""

    name: str
    uri: str
    timelines: int = 0
    items: int = 0
    links: int = 0
    parts: int = 0
    files: int = 0
    files_not_checked: int = 0
    bytes: int = 0
    seconds: float = 0.0
    errors: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether the backup can be restored as it is."""
        return not self.errors

    def add_error(self, error: TimeTierError) -> None:
        """Note an error, up to a bound."""
        if len(self.errors) < MAX_ERRORS:
            self.errors.append(error.message)


def check_backup(
    target: Target,
    manifest: Manifest,
    *,
    elsewhere: Target | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> CheckReport:
    """Read all of a backup. `elsewhere`: where the cold files are that it only names. `progress`: bytes done, of all.

    Blocks. Memory: one part, and some 50 bytes for each cold block.
    """
    report = CheckReport(manifest.name, target.uri)
    total = sum(part.timelines.size + part.items.size for part in manifest.parts) + manifest.cold_bytes
    blocks: dict[str, set[tuple[int, int]]] = {}
    for part in manifest.parts:
        try:
            for state in read_part(target, part, manifest.buckets):
                report.timelines += not state.before
                report.items += len(state.rows)
                for link in links_of(state):
                    report.links += 1
                    for block in link.blocks:
                        blocks.setdefault(block.file, set()).add((block.offset, block.crc))
            report.parts += 1
        except TimeTierError as error:
            report.add_error(error)
        report.bytes += part.timelines.size + part.items.size
        progress(report.bytes, total)
    if not report.errors and (report.timelines, report.items) != (manifest.timelines, manifest.items):
        report.add_error(
            Corrupt(f"the parts hold {report.timelines} timelines, the manifest says {manifest.timelines}")
        )
    try:
        _check_cold(target, manifest, elsewhere, blocks, report, lambda: progress(report.bytes, total))
    except TimeTierError as error:
        report.add_error(error)
    return report


def _check_cold(
    target: Target,
    manifest: Manifest,
    elsewhere: Target | None,
    blocks: dict[str, set[tuple[int, int]]],
    report: CheckReport,
    tell: Callable[[], None],
) -> None:
    source = ColdSource(target, manifest, elsewhere)
    for name in sorted(blocks.keys() - source.files.keys()):
        report.add_error(Corrupt(f"links name cold file {name}, which is not among the files of the backup"))
    if manifest.cold == REFERENCED and elsewhere is None:
        report.files_not_checked = len(source.files)
        return
    source.require_all()
    for file in source.files.values():
        try:
            with spool_file() as spool:
                with spool.open("wb") as opened:
                    for piece in source.pieces(file):
                        opened.write(piece)
                missing = blocks.get(file.name, set()) - check_cold_file(spool, file.name).blocks
            if missing:
                raise Corrupt(f"cold file {file.name} has no such block at {min(missing)[0]} as a link names")
        except TimeTierError as error:
            report.add_error(error)
        report.files += 1
        report.bytes += file.size
        tell()


def links_of(state: TimelineState) -> Iterator[Link]:
    """The cold links in a state; none but in a bucket's own timeline."""
    if not is_system(state.timeline):
        return
    for name, row in zip(state.row_keys, state.rows, strict=True):
        _, kind, value = decode_row(row)
        if kind == PUT and split_item_key(name[:-VERSION_BYTES])[0] != RECORDS_AT:
            yield decode_link(value)
