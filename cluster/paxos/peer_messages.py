"""What peers send one another: whether a message can be worked with, and frames of bounded size (*pure*)."""

from __future__ import annotations

from ..messages import (
    NO_BALLOT,
    Accept,
    AcceptedAll,
    Accepts,
    Ballot,
    Entries,
    Nack,
    PeerMessage,
    Prepare,
    Promise,
    State,
)
from .core import MAX_ENTRY
from .flights import is_sound as flights_fit


def is_sound(message: PeerMessage) -> bool:
    """Whether a peer's message can be worked with: columns that fit one another, numbers that the disk can hold."""
    match message:
        case Prepare(ballot=ballot) | Nack(promised=ballot):
            return _is_real(ballot)
        case Accept(value=value, ballot=ballot):
            return _is_real(ballot) and len(value.kinds) == len(value.keys) == len(value.values)
        case Promise(value=value, accepted=accepted):
            if value is None:
                return accepted == NO_BALLOT
            return len(value.kinds) == len(value.keys) == len(value.values)
        case Entries(values=values):
            return all(len(value.kinds) == len(value.keys) == len(value.values) for value in values)
        case State(version=version, row_keys=row_keys, rows=rows):
            return 0 <= version < MAX_ENTRY and len(row_keys) == len(rows) and all(len(key) >= 18 for key in row_keys)
        case Accepts():
            return flights_fit(message)
        case AcceptedAll(others=others):
            return len(others) % 4 == 0
        case _:
            return True


def _is_real(ballot: Ballot) -> bool:
    return 0 <= ballot[0] < MAX_ENTRY and min(ballot[1]) >= 0 and max(ballot[1]) < MAX_ENTRY


def parts_of(messages: list[PeerMessage], max_bytes: int) -> list[list[PeerMessage]]:
    """Messages in order, as frames of some `max_bytes`, or of one message that is larger; normally one frame."""
    if len(messages) == 1:
        return [messages]
    parts: list[list[PeerMessage]] = [[]]
    size = 0
    for message in messages:
        weight = _weight(message)
        if parts[-1] and size + weight > max_bytes:
            parts.append([])
            size = 0
        parts[-1].append(message)
        size += weight
    return parts


def _weight(message: PeerMessage) -> int:
    match message:
        case Accept(value=value) | Promise(value=value) if value is not None:
            return 64 + sum(map(len, value.values)) + sum(map(len, value.keys))
        case Accepts(timelines=timelines, keys=keys, values=column):
            return 64 + 64 * len(timelines) + sum(map(len, keys)) + sum(map(len, column))
        case Entries(values=values):
            return 64 + sum(sum(map(len, value.values)) + sum(map(len, value.keys)) for value in values)
        case State(rows=rows, row_keys=row_keys):
            return 64 + sum(map(len, rows)) + sum(map(len, row_keys))
        case _:
            return 64
