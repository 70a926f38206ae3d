"""Which lives of a replica came after which, and how a life is written down (*pure*).

A life is (replica, incarnation, boot): an incarnation begins with an empty folder, a boot with a start of the process
(`identity.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

from ..messages import Life, PeerBatch

PAST_LIVES = 64  # that a folder remembers; see `identity.py`


def follows(batch: PeerBatch, known: Life) -> bool:
    """Whether a batch is of the life that is known of its sender, or of a later one of the same folder."""
    if batch.life <= known:
        return batch.life == known
    return batch.life[1] > known[1] or is_of_past(known[2], batch.past)


def is_of_past(boot: int, past: Sequence[int]) -> bool:
    """Whether `boot` was a life of a folder with these last ones; of older ones nothing is known any more."""
    return boot in past or (len(past) >= PAST_LIVES and boot < past[0])


def encode_life(life: Life) -> bytes:
    """A life as a row on disk."""
    return b"".join(part.to_bytes(8, "big") for part in life)


def decode_life(row: bytes) -> Life:
    """The reverse of `encode_life`."""
    return tuple(int.from_bytes(row[at : at + 8], "big") for at in (0, 8, 16))  # type: ignore[return-value]
