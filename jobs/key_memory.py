"""Which keys a file has held so far, in bounded memory, so that repeated keys are noticed. *Pure*.

A key is remembered as 127 bits of its hash beside 64 bits of its value's hash, in one open-addressing table that is
filled by whole batches (NumPy, linear probing). That is 25 bytes a slot and 33 to 67 bytes a key. Two different keys
share 127 bits with a probability below 1e-18 even for ten billion rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

_FIRST_SLOTS = 1 << 12
_LENGTH_BYTES = [bytes((length,)) for length in range(256)]


def key_digests(owners: Sequence[bytes], timestamps: Sequence[int], ids: Sequence[bytes]) -> npt.NDArray[np.uint64]:
    """Hashes of item keys: uint64[n, 2]. `timestamps`: int64. The last bit of each hash is set."""
    digest = xxhash.xxh3_128_digest
    times = np.asarray(timestamps, dtype="<i8").tobytes()
    joined = b"".join(
        [
            digest(b"".join((_LENGTH_BYTES[len(owner)], owner, times[8 * row : 8 * row + 8], item_id)))
            for row, (owner, item_id) in enumerate(zip(owners, ids, strict=True))
        ]
    )
    return _as_pairs(joined)


def owner_digests(owners: Sequence[bytes]) -> npt.NDArray[np.uint64]:
    """Hashes of owners: uint64[n, 2]. The last bit of each hash is set."""
    return _as_pairs(b"".join([xxhash.xxh3_128_digest(owner) for owner in owners]))


def value_digests(values: Sequence[bytes]) -> npt.NDArray[np.uint64]:
    """Hashes of values: uint64[n]."""
    return np.array([xxhash.xxh3_64_intdigest(value) for value in values], dtype=np.uint64)


def _as_pairs(joined: bytes) -> npt.NDArray[np.uint64]:
    pairs = np.frombuffer(joined, dtype="<u8").reshape(-1, 2).copy()
    pairs[:, 1] |= np.uint64(1)  # so that no hash is all zero, which marks an empty slot
    return pairs


@dataclass(frozen=True)
class Repeats:
    """What one batch added. `duplicates`: rows equal to what its key held; `overwritten`: rows whose value a later
    row of the same key replaced; `conflicting`: indices of the rows that replaced a different value."""

    duplicates: int
    overwritten: int
    conflicting: list[int]


class KeyMemory:
    """Remembers for each key its last value, and whether it ever held two different ones.

    `keys`: number of keys. `conflicting_keys`: how many of them held different values.
    """

    def __init__(self) -> None:
        self.keys = 0
        self.conflicting_keys = 0
        self._allocate(_FIRST_SLOTS)

    def note(self, digests: npt.NDArray[np.uint64], values: npt.NDArray[np.uint64]) -> Repeats:
        """Note the rows of a batch in their order. `digests`: uint64[n, 2], `values`: uint64[n]."""
        self._reserve(len(digests))
        slots, fresh = self._slots_of(digests)
        self.keys += len(np.unique(slots[fresh]))
        order = np.argsort(slots, kind="stable")  # rows of one key side by side, in the order of the file
        same_key = np.zeros(len(order), dtype=bool)
        same_key[1:] = slots[order[1:]] == slots[order[:-1]]
        before = self._values[slots[order]]
        before[1:][same_key[1:]] = values[order[:-1]][same_key[1:]]
        known = same_key | ~fresh[order]
        equal = before == values[order]
        replaced = order[known & ~equal]
        self._values[slots[order]] = values[order]  # of several rows with one key the last in the file stays
        conflicting = np.unique(slots[replaced])
        self.conflicting_keys += int((self._flags[conflicting] == 0).sum())
        self._flags[conflicting] = 1
        return Repeats(int((known & equal).sum()), len(replaced), sorted(replaced.tolist()))

    def take_final(self, digests: npt.NDArray[np.uint64], values: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Which rows of a batch hold their key's last value: one row for each key, over all calls together.

        bool[n]. Raises KeyError if a row was not noted before.
        """
        slots, fresh = self._slots_of(digests)
        if fresh.any():
            raise KeyError("a key was not noted before")
        final = (self._values[slots] == values) & (self._flags[slots] < 2)
        rows = np.flatnonzero(final)
        first_rows = rows[np.unique(slots[rows], return_index=True)[1]]
        self._flags[slots[first_rows]] = 2
        chosen = np.zeros(len(slots), dtype=bool)
        chosen[first_rows] = True
        return chosen

    def _allocate(self, slots: int) -> None:
        self._mask = slots - 1
        self._digests = np.zeros((slots, 2), dtype=np.uint64)
        self._values = np.zeros(slots, dtype=np.uint64)
        self._flags = np.zeros(slots, dtype=np.uint8)  # 1: held different values, 2: taken

    def _reserve(self, more: int) -> None:
        """Room for `more` keys, the table at most three quarters full."""
        slots = self._mask + 1
        while (self.keys + more) * 4 > slots * 3:
            slots *= 2
        if slots == self._mask + 1:
            return
        digests, values, flags = self._digests, self._values, self._flags
        self._allocate(slots)
        for start in range(0, len(digests), 1 << 20):
            piece = slice(start, start + (1 << 20))
            used = np.flatnonzero(digests[piece, 1]) + start
            places, _ = self._slots_of(digests[used])
            self._values[places] = values[used]
            self._flags[places] = flags[used]

    def _slots_of(self, digests: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Slot of each row's key, and whether the key was put there by this call (for all rows of that key)."""
        places = (digests[:, 0] & np.uint64(self._mask)).astype(np.int64)
        fresh = np.zeros(len(digests), dtype=bool)
        pending = np.arange(len(digests))
        while len(pending):
            at = places[pending]
            empty = self._digests[at, 1] == 0
            self._digests[at[empty]] = digests[pending[empty]]  # of several that want one slot, one gets it
            settled = (self._digests[at] == digests[pending]).all(axis=1)
            fresh[pending[settled & empty]] = True
            pending = pending[~settled]
            places[pending] = (places[pending] + 1) & self._mask
        return places, fresh
