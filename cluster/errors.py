"""Errors, sorted by what the caller may do about them. All of them survive pickling.

`Unavailable`      surely not applied: retry, after `retry_after_s` if it is given.
`OutcomeUnknown`   the write may or may not have been applied, and may still be: read before you retry.
`Rejected`         the request can't succeed as it is: change it.
`Corrupt`          stored bytes are damaged in every copy.
`WriteManyError`   some writes of one call did not succeed; it holds the outcome of each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
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
    """A conditional write met another version. `version`: one that the timeline has reached, maybe not its last."""

    version: int = -1


class InvalidRequest(Rejected):
    """An argument is wrong; the message names it and says what to pass instead."""


class TooLarge(Rejected):
    """A limit of size was exceeded. `limit`: that limit, in the unit that the message names."""

    limit: int = -1


class ConfigError(Rejected):
    """A configuration file can't be used; the message names file, field, value and remedy."""


class WriteManyError(TimeTierError):
    """Some items of a call that writes many did not succeed. What succeeded stays written.

    `results`: per item, in the order of the call, its version or its error. All items of one timeline share one
    outcome. Items that are `Unavailable` can be sent again as they are; read before you repeat an `OutcomeUnknown`
    one; a `Rejected` one has to be changed.
    """

    results: Sequence[int | TimeTierError] = ()

    @classmethod
    def of(cls, results: Sequence[int | TimeTierError]) -> WriteManyError:
        """Error for these results, with a message that counts them by reason.

        >>> WriteManyError.of([7, Unavailable("no majority"), Unavailable("no majority")])
        WriteManyError('2 of 3 items were not written: 2 Unavailable (first: no majority)')
        """
        failed = [result for result in results if isinstance(result, TimeTierError)]
        kinds = Counter(type(error).__name__ for error in failed)
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        message = f"{len(failed)} of {len(results)} items were not written: {counts} (first: {failed[0]})"
        return cls(message, results=list(results))

    @property
    def written(self) -> int:
        """Number of items that were written."""
        return sum(not isinstance(result, TimeTierError) for result in self.results)

    @property
    def unavailable(self) -> int:
        """Number of items that were surely not written and may be sent again as they are."""
        return sum(isinstance(result, Unavailable) for result in self.results)

    @property
    def unknown(self) -> int:
        """Number of items of which nobody knows whether they were written."""
        return sum(isinstance(result, OutcomeUnknown) for result in self.results)

    @property
    def rejected(self) -> int:
        """Number of items that can't be written as they are."""
        return sum(isinstance(result, Rejected) for result in self.results)


class Corrupt(TimeTierError):
    """Bytes on disk are damaged, and no good copy was found.

    `file`, `offset`: the cold block, "" and -1 if it is none. Where a call asked for several items or timelines,
    `results` has what was found of the others: for each, in the order of the call, what the call would have returned,
    or its error.
    """

    file: str = ""
    offset: int = -1
    results: Sequence[Any] = ()


class ProtocolError(TimeTierError):
    """A peer sent a frame that breaks the protocol. The connection it came by is closed."""
