"""Errors, sorted by what the caller may do about them. All of them survive pickling.

`Unavailable`      surely not applied: retry, after `retry_after_s` if it is given.
`OutcomeUnknown`   the write may or may not have been applied, and may still be: read before you retry.
`Rejected`         the request can't succeed as it is: change it.
`Corrupt`          stored bytes are damaged in every copy.
"""

from __future__ import annotations

from typing import Any


class TimeTierError(Exception):
    """Base of all errors that TimeTier raises on purpose."""

    def __init__(self, message: str, **fields: Any) -> None:
        super().__init__(message)
        self.message = message
        self.fields = fields
        for name, value in fields.items():
            setattr(self, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.fields)

    def __str__(self) -> str:
        return self.message


def _rebuild(kind: type[TimeTierError], message: str, fields: dict[str, Any]) -> TimeTierError:
    return kind(message, **fields)


class Unavailable(TimeTierError):
    """No majority, no node or no capacity at this moment. Surely not applied: retry.

    `retry_after_s`: a hint in seconds, or None.
    """

    retry_after_s: float | None = None


class OutcomeUnknown(TimeTierError):
    """A write was sent out, but its fate was not learnt in time. It may still be applied."""


class Rejected(TimeTierError):
    """The request as it stands can't be carried out."""


class VersionConflict(Rejected):
    """A conditional write met another version. `version`: the version that the timeline has now."""

    version: int = -1


class InvalidRequest(Rejected):
    """An argument is wrong; the message names it and says what to pass instead."""


class TooLarge(Rejected):
    """A limit of size was exceeded. `limit`: that limit, in the unit that the message names."""

    limit: int = -1


class ConfigError(Rejected):
    """A configuration file can't be used; the message names file, field, value and remedy."""


class Corrupt(TimeTierError):
    """Bytes on disk are damaged, and no good copy was found."""


class ProtocolError(TimeTierError):
    """A peer sent a frame that breaks the protocol. The connection it came by is closed."""
