"""Instants, durations and sizes as people say them (*pure*)."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LONGEST_UNITS = (("year", 365 * 86_400), ("day", 86_400), ("hour", 3_600), ("minute", 60), ("second", 1))


def instant(time_us: int) -> str:
    """A time in microseconds since 1970 in UTC, or the number where the calendar has no such year.

    >>> instant(1_700_000_000_000_000)
    '2023-11-14 22:13:20 UTC'
    """
    try:
        return (_EPOCH + timedelta(microseconds=time_us)).strftime("%Y-%m-%d %H:%M:%S UTC")
    except OverflowError:
        return f"{time_us} us since 1970"


def duration(seconds: float) -> str:
    """A duration in its largest unit, or two of them where the first is small.

    >>> duration(3 * 3_600), duration(100), duration(45 * 86_400)
    ('3 hours', '1 minute 40 seconds', '45 days')
    """
    left = round(abs(seconds))
    parts: list[str] = []
    for name, length in _LONGEST_UNITS:
        count, left = divmod(left, length)
        if count:
            parts.append(f"{count:,} {name}{'s' * (count > 1)}")
        if parts and (count >= 10 or len(parts) == 2 or not left):
            break
        if parts and not count:
            break  # "2 days", not "2 days 5 minutes"
    return " ".join(parts) or "0 seconds"


def size(nbytes: float) -> str:
    """Bytes in a unit of 1,000.

    >>> size(512), size(2_345_000)
    ('512 B', '2.35 MB')
    """
    for unit, one in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= one:
            return f"{nbytes / one:.3g} {unit}"
    return f"{nbytes:.0f} B"
