"""How interaction scripts write things down: lives, ballots, items, entries and messages as short, stable text.

r1.i1.b2                life: replica 1, incarnation 1, boot 2
3.r1.i1.b2              ballot: round 3 of that life
alice/4                 entry 4 of alice's timeline; `links(alice)` is the system timeline of alice's bucket
[a] @10=hi, @11 gone    a value: the requests that it serves, and its mutations (put, delete, or `wipe`)
"""

from __future__ import annotations

from timetier.cluster.cold.link import RECORDS_AT, decode_link
from timetier.cluster.errors import ProtocolError
from timetier.cluster.keys import bucket_of, is_system, split_item_key, split_timeline, timeline_key
from timetier.cluster.messages import (
    DELETE,
    NO_BALLOT,
    WIPE,
    Accept,
    Accepted,
    AcceptedAll,
    Accepts,
    Ballot,
    Chosen,
    ChosenAll,
    Entries,
    Fetch,
    Life,
    Nack,
    PeerMessage,
    Prepare,
    Promise,
    State,
    Unheard,
    Value,
)

BUCKETS = 64
TABLE = b"moments"
_NAMES: dict[bytes, str] = {}  # of system timelines, which have no owner: named after the timeline that was used first


def owner_key(owner: str) -> bytes:
    """Timeline of an owner. In the scripts' table alice's replica of first priority is r0, and bob's is r1."""
    key = timeline_key(TABLE, owner.encode(), BUCKETS)
    _NAMES.setdefault(key[:4], owner)
    return key


def timeline_text(key: bytes) -> str:
    if is_system(key):
        return f"links({_NAMES.get(key[:4], bucket_of(key))})"
    return split_timeline(key)[2].decode()


def life_text(life: Life) -> str:
    return f"r{life[0]}.i{life[1]}.b{life[2]}" if life[0] >= 0 else "nobody"


def ballot_text(ballot: Ballot) -> str:
    return f"{ballot[0]}.{life_text(ballot[1])}" if ballot != NO_BALLOT else "-"


def id_text(request_id: bytes) -> str:
    return request_id.rstrip(b"\0").decode()


def item_text(key: bytes) -> str:
    timestamp, name = split_item_key(key)
    return f"@{timestamp}" + (f":{name.decode()}" if name else "")


def mutation_text(kind: int, key: bytes, content: bytes) -> str:
    """One mutation, or one item of an answer."""
    if kind == WIPE:
        return "wipe"
    if kind == DELETE:
        return f"{item_text(key)} gone"
    if split_item_key(key)[0] != RECORDS_AT:
        try:
            link = decode_link(content)
            return f"link {link.window_start}..{link.window_end} gen {link.generation}"
        except ProtocolError:
            pass  # an ordinary item
    return f"{item_text(key)}={content.decode()}"


def value_text(value: Value) -> str:
    """A log entry's value: `[request ids] mutations`."""
    ids = ",".join(map(id_text, value.request_ids))
    if not value.keys:
        return f"[{ids}] (values trimmed)"
    items = zip(value.kinds, value.keys, value.values, strict=True)
    return f"[{ids}] " + ", ".join(mutation_text(*item) for item in items)


def message_text(message: PeerMessage | None) -> str:
    """One message between replicas; None is a batch without messages, which only tells of the sender's life."""
    if message is None:
        return "Hello"
    if isinstance(message, Accepts | AcceptedAll | ChosenAll | Unheard):
        return f"{type(message).__name__} {message.number} of {life_text(message.life)}"
    name = timeline_text(message.timeline)
    match message:
        case Prepare(entry=entry, ballot=ballot):
            return f"Prepare {name}/{entry} at {ballot_text(ballot)}"
        case Promise(entry=entry, ballot=ballot, accepted=accepted, value=value):
            had = "accepted nothing"
            if value is not None:
                had = f"accepted {value_text(value)} at {ballot_text(accepted)} (origin {life_text(value.origin)})"
            return f"Promise {name}/{entry} at {ballot_text(ballot)}, {had}"
        case Accept(entry=entry, ballot=ballot, before=before, value=value):
            origin = "" if value.origin == ballot[1] else f" (origin {life_text(value.origin)})"
            proof = f"; {entry - 1} was chosen at {ballot_text(before)}" if before != NO_BALLOT else ""
            return f"Accept {name}/{entry} at {ballot_text(ballot)}: {value_text(value)}{origin}{proof}"
        case Accepted(entry=entry, ballot=ballot) | Chosen(entry=entry, ballot=ballot):
            return f"{type(message).__name__} {name}/{entry} at {ballot_text(ballot)}"
        case Nack(entry=entry, ballot=ballot, promised=promised):
            return f"Nack {name}/{entry} at {ballot_text(ballot)}, because of {ballot_text(promised)}"
        case Fetch(first=first, cursor=cursor, state_version=version):
            on = f", of the state of {version} go on at {item_text(cursor[:-8])}" if cursor else ""
            return f"Fetch {name} from {first}{on}"
        case Entries():
            return _entries_text(name, message)
        case State():
            return _state_text(name, message)
        case _:
            fields = [f"{field}={getattr(message, field)!r}" for field in message.__struct_fields__[1:]]
            return f"{type(message).__name__} {name} {' '.join(fields)}"


def _entries_text(name: str, message: Entries) -> str:
    if not message.values:
        return f"Entries {name}: none from {message.first} on; sender has {message.chosen}"
    listed = "; ".join(f"{entry} {value_text(value)}" for entry, value in enumerate(message.values, message.first))
    last = f", the last chosen at {ballot_text(message.ballot)}" if message.ballot != NO_BALLOT else ""
    return f"Entries {name}: {listed}{last}; sender has {message.chosen}"


def _state_text(name: str, message: State) -> str:
    parts = [f"{len(message.rows)} rows" + (f" from {item_text(message.cursor[:-8])} on" if message.cursor else "")]
    if message.next:
        parts.append(f"goes on at {item_text(message.next[:-8])}")
    else:
        at = ballot_text(message.ballot)
        parts += [f"last chosen at {at}" if at != "-" else "without its ballot", f"origin {life_text(message.origin)}"]
        parts.append("ids of " + ",".join(str(entry) for entry, _ in message.request_ids))
    if message.wiped:
        parts.append(f"wiped up to {message.wiped}")
    if message.needs_system:
        parts.append(f"needs links up to {message.needs_system}")
    return f"State {name} as of {message.version}: " + ", ".join(parts)
