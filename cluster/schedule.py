"""When the sink is due: at intervals, or by a cron expression. *Pure*: whoever asks says what time it is."""

from __future__ import annotations

from datetime import UTC, datetime, tzinfo
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError

_FIELDS = 5
LATE_S = 600.0
"""A run by a cron expression that was missed, because nobody was there to start it, is made up for so long. After
that it waits for its next time: who names an hour has a reason for it."""


def check_cron(expression: str) -> str:
    """The expression, if it is one of five fields that comes true some day. Raises ValueError."""
    try:
        if len(expression.split()) == _FIELDS:
            next(CronSim(expression, datetime(2024, 1, 1, tzinfo=UTC)))
            return expression
    except (CronSimError, StopIteration):
        pass  # told below, as a wrong number of fields is
    raise ValueError(
        f"{expression!r} is no cron expression, or no time that ever comes: write minute, hour, day of month, month "
        "and day of week, such as 30 3 * * * for each day at 03:30"
    )


def time_zone(name: str) -> tzinfo:
    """A time zone by its IANA name. Raises ValueError."""
    if name == "UTC":
        return UTC  # also where the machine has no list of zones
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(
            f"{name!r} is no time zone that this machine knows: write an IANA name such as Europe/Berlin "
            "(and install the package tzdata where the system has none), or UTC"
        ) from None


class Schedule:
    """When runs are due. `every_s`: seconds between the starts of two runs. `cron`: expression of five fields.

    Exactly one of them is given. `zone`: IANA name, for `cron`. All times are seconds since 1970.
    """

    def __init__(self, *, every_s: float | None = None, cron: str | None = None, zone: str = "UTC") -> None:
        if (every_s is None) == (cron is None):
            raise ValueError("every_s, cron: give one of them")
        self.every_s = every_s
        self.cron = cron
        self.zone = zone
        self._tzinfo = time_zone(zone)

    def __str__(self) -> str:
        """In words."""
        return f"cron {self.cron} ({self.zone})" if self.cron is not None else f"every {_duration(self.every_s or 0)}"

    def next_after(self, now: float, last_start: float | None) -> float:
        """When the next run is due; at or before `now`: at once.

        `last_start`: of the last run by this schedule, None before the first.
        """
        if self.every_s is not None:
            return (now if last_start is None else last_start) + self.every_s
        since = now if last_start is None else max(last_start, now - LATE_S)
        return next(CronSim(self.cron or "", datetime.fromtimestamp(since, self._tzinfo))).timestamp()

    def is_overdue(self, now: float, last_start: float | None) -> bool:
        """Whether a run should have begun so long ago that something must be wrong."""
        if last_start is None:
            return False
        if self.every_s is not None:
            return now > last_start + 2 * self.every_s + LATE_S
        due = next(CronSim(self.cron or "", datetime.fromtimestamp(last_start, self._tzinfo))).timestamp()
        return now > due + 2 * LATE_S


def _duration(seconds: float) -> str:
    for unit, length in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds >= length and seconds % length == 0:
            return f"{seconds / length:.15g}{unit}"
    return f"{seconds:.15g}s"
