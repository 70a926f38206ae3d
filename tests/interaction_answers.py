"""How interaction scripts write down what a replica answers to clients, readers and learners."""

from __future__ import annotations

from interaction_text import ballot_text, mutation_text, timeline_text, value_text
from timetier.cluster.messages import (
    CONFLICT,
    DELTA,
    INVALID,
    NO_BALLOT,
    OK,
    POINT,
    RANGE,
    SAME,
    STALE,
    UNAVAILABLE,
    UNKNOWN,
    AcceptedList,
    Ballot,
    Checked,
    Digests,
    Message,
    Settled,
    Versions,
    Written,
    unpack_i64,
)

OUTCOMES = {
    OK: "OK",
    CONFLICT: "CONFLICT",
    STALE: "STALE",
    UNAVAILABLE: "UNAVAILABLE",
    UNKNOWN: "UNKNOWN",
    INVALID: "INVALID",
}
PAYLOADS = {SAME: "SAME", DELTA: "DELTA", RANGE: "RANGE", POINT: "POINT"}


def version_and_open(answer: Versions) -> tuple[int, Ballot | None]:
    """Of an answer about one timeline: its version, and the ballot at which the next entry is open."""
    return unpack_i64(answer.chosen)[0], answer.opens[0].ballot if answer.opens else None


def answer_text(message: Message) -> str:
    """An answer about one timeline, or all that a learner is told."""
    match message:
        case Written() | Settled():
            return f"{OUTCOMES[message.outcomes[0]]} at version {unpack_i64(message.versions)[0]}"
        case Versions():
            version, ballot = version_and_open(message)
            return f"version {version}{_open_text(version, ballot)}"
        case Checked():
            return _checked_text(message)
        case AcceptedList():
            return _accepted_text(message)
        case Digests():
            versions = zip(message.timelines, unpack_i64(message.versions), strict=True)
            return "; ".join(f"{timeline_text(key)} as of {version}" for key, version in versions)
        case _:
            return type(message).__name__


def _open_text(version: int, ballot: Ballot | None) -> str:
    """What is said of the open entry: an acceptance at a ballot, or knowledge, which comes without a round."""
    if ballot is None:
        return ""
    return f"; has accepted {version + 1} at {ballot_text(ballot)}" if ballot[0] >= 0 else f"; knows of {version + 1}"


def _checked_text(message: Checked) -> str:
    """Version, payload with its items, and the blocks to look into."""
    version = unpack_i64(message.chosen)[0]
    if version < 0:
        return "can't tell"
    columns = zip(message.kinds, message.keys, message.values, unpack_i64(message.versions), strict=True)
    items = [f"{mutation_text(kind, key, value)} (v{at})" for kind, key, value, at in columns]
    parts = [f"version {version}, {PAYLOADS[message.payloads[0]]}"]
    parts += [", ".join(items)] if items else []
    for found in message.links:
        parts += [f"block of {ref.file}" for ref in found.refs]
    wiped = unpack_i64(message.wiped)[0]
    parts += [f"wiped up to {wiped}"] if wiped else []
    return "; ".join(parts) + "".join(_open_text(version, found.ballot) for found in message.opens)


def _accepted_text(message: AcceptedList) -> str:
    parts = []
    columns = zip(message.promised, message.accepted, message.values, strict=True)
    for key, chosen, (promised, accepted, value) in zip(
        message.timelines, unpack_i64(message.chosen), columns, strict=True
    ):
        facts = [f"{timeline_text(key)} chosen {chosen}"]
        facts += [f"promised {ballot_text(promised)}"] if promised != NO_BALLOT else []
        facts += [f"accepted {value_text(value)} at {ballot_text(accepted)}"] if value is not None else []
        parts.append(", ".join(facts))
    return "; ".join(parts) or "nothing"
