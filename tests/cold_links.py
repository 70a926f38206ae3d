"""Cold links of one timeline, written to a storage group (`replica_group.Group`) as the sink would."""

from __future__ import annotations

import numpy as np
from replica_group import Group, key_of, write_message
from timetier.cluster.cold.link import FORMAT, Block, Link, encode_link
from timetier.cluster.keys import bucket_of, item_key, priority, system_timeline, timeline_hash
from timetier.cluster.messages import OK, PUT, pack_i64, pack_u32
from timetier.cluster.paxos.core import Settings

OWNER = b"alice"
ALICE = key_of("alice")
BUCKET = bucket_of(ALICE)
SYSTEM = system_timeline(BUCKET)
FIRST, SECOND, THIRD = priority(ALICE, 3)
SMALL = Settings(request_id_entries=8, log_keep_entries=8)
FOREVER = (1 << 63) - 1


def rid(number: int) -> bytes:
    return number.to_bytes(16, "big")


def link_of(version: int, *, window: tuple[int, int] = (0, 100), event_before: int = 100, generation: int = 1) -> Link:
    """A link that claims all of alice's items of a window as of `version`."""
    owner = timeline_hash(b"t", OWNER)
    block = Block("f", 8, 10, 0, 1, item_key(window[0]), item_key(window[1]), OWNER, OWNER)
    return Link(
        FORMAT,
        BUCKET,
        b"t",
        window[0],
        window[1],
        generation,
        event_before,
        FOREVER,
        np.array([owner], dtype="<u8").tobytes(),
        pack_i64([version]),
        1,
        1,
        "run",
        [block],
    )


def commit(group: Group, number: int, link: Link, request: int, system_version: int) -> None:
    message = write_message(SYSTEM, rid(request), [], if_version=system_version, seen=system_version)
    message.kinds = bytes((PUT,))
    message.keys.append(link.key)
    message.values.append(encode_link(link))
    message.counts = pack_u32([1])
    answer = group.call(number, message)
    assert answer.outcomes[0] == OK  # type: ignore[union-attr]
