"""What a run of the sink did, in figures."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

MAX_ERRORS = 100
_KIB = 1_024
_UNITS = ("KiB", "MiB", "GiB", "TiB")


@dataclass(slots=True)
class SinkReport:
    """What a run did.

    `epoch`: 0 if it could not take one. `fenced`: which later run made it stop, "" for none.
    `rows`: rows that left the storage tier, tombstones included. `raw_bytes`, `cold_bytes`: of the rows in the blocks
    that were linked, before and after encoding. `fenced_buckets`: links of the bucket had changed since it was scanned.
    `skipped_timelines`: no strong snapshot was to be had. `waiting_windows`, `waiting_rows`: too few to sink yet.
    `orphans_removed`: files of runs that crashed, which no link ever named. `removed_files`, `removed_bytes`: those,
    and files whose last block was replaced or expired. `waiting_files`: of the latter, not yet old enough to go.
    `rewritten_files`, `rewritten_bytes`: files that gave up their last live blocks to this run, and those blocks.
    `block_sizes`, `file_sizes`: how many were written of less than each size. `missing_copies`: of files that links
    name, found by a comparison of all files (`check_files`).
    `calls`: messages sent; `waited_s`: pauses for the rate limits; `step_seconds`: where the time went.
    """

    run: str
    epoch: int = 0
    fenced: str = ""
    rows: int = 0
    raw_bytes: int = 0
    cold_bytes: int = 0
    blocks: int = 0
    files: int = 0
    buckets: int = 0
    fenced_buckets: int = 0
    skipped_timelines: int = 0
    waiting_windows: int = 0
    waiting_rows: int = 0
    orphans_removed: int = 0
    removed_files: int = 0
    removed_bytes: int = 0
    waiting_files: int = 0
    rewritten_files: int = 0
    rewritten_bytes: int = 0
    missing_copies: int = 0
    block_sizes: dict[str, int] = field(default_factory=dict)
    file_sizes: dict[str, int] = field(default_factory=dict)
    calls: int = 0
    waited_s: float = 0.0
    seconds: float = 0.0
    step_seconds: dict[str, float] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    def add_error(self, text: str) -> None:
        """Note an error; beyond a bound only that there were more."""
        if len(self.errors) < MAX_ERRORS:
            self.errors.append(text)
        elif len(self.errors) == MAX_ERRORS:
            self.errors.append("further errors are not listed")

    def to_json(self) -> str:
        """One JSON object with the fields."""
        return json.dumps(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """The fields, with sizes in order and seconds in milliseconds' precision."""
        fields = asdict(self)
        for name in ("block_sizes", "file_sizes"):
            fields[name] = {label: fields[name][label] for label in sorted(fields[name], key=_label_bytes)}
        fields["step_seconds"] = {step: round(spent, 3) for step, spent in self.step_seconds.items()}
        return fields


@dataclass(frozen=True, slots=True)
class SinkProgress:
    """How far a run is. Buckets are counted over all its tables."""

    table: str
    buckets_done: int
    buckets_total: int
    rows: int
    raw_bytes: int


def count_sizes(histogram: dict[str, int], sizes: Iterable[int]) -> None:
    """Count sizes (bytes) by the least power of two that is above them: `<64 KiB`."""
    for size in sizes:
        label = _label(max(_KIB, 1 << size.bit_length()))
        histogram[label] = histogram.get(label, 0) + 1


def _label(bound: int) -> str:
    unit = 0
    number = bound // _KIB
    while number >= _KIB and unit < len(_UNITS) - 1:
        number //= _KIB
        unit += 1
    return f"<{number} {_UNITS[unit]}"


def _label_bytes(label: str) -> int:
    number, unit = label[1:].split(" ")
    return int(number) * int(_KIB ** (_UNITS.index(unit) + 1))
