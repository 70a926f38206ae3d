"""Columns of fixed length: packed little-endian arrays."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ProtocolError

# Short columns go without NumPy: a single read has a dozen of them, and waking NumPy for each costs more than all else.
_SHORT = 32
_I64 = [struct.Struct(f"<{count}q") for count in range(_SHORT + 1)]
_U32 = [struct.Struct(f"<{count}I") for count in range(_SHORT + 1)]


def pack_i64(values: Iterable[int] | npt.NDArray[Any]) -> bytes:
    """int64 column as bytes."""
    if not isinstance(values, np.ndarray):
        values = values if isinstance(values, list) else list(values)
        if len(values) <= _SHORT:
            return _I64[len(values)].pack(*values)
    return np.asarray(values, dtype="<i8").tobytes()


def unpack_i64(column: bytes) -> list[int]:
    """int64 column as a list. Raises ProtocolError when the length is off."""
    if len(column) % 8:
        raise ProtocolError(f"an int64 column of {len(column)} bytes")
    if len(column) <= 8 * _SHORT:
        return list(_I64[len(column) // 8].unpack(column))
    values: list[int] = np.frombuffer(column, dtype="<i8").tolist()
    return values


def pack_u32(values: Iterable[int]) -> bytes:
    """uint32 column as bytes."""
    values = values if isinstance(values, list) else list(values)
    if len(values) <= _SHORT:
        return _U32[len(values)].pack(*values)
    return np.asarray(values, dtype="<u4").tobytes()


def unpack_u32(column: bytes) -> list[int]:
    """uint32 column as a list. Raises ProtocolError when the length is off."""
    if len(column) % 4:
        raise ProtocolError(f"a uint32 column of {len(column)} bytes")
    if len(column) <= 4 * _SHORT:
        return list(_U32[len(column) // 4].unpack(column))
    values: list[int] = np.frombuffer(column, dtype="<u4").tolist()
    return values
