"""Finds the Ray cluster to work with, and connects this process to it."""

from __future__ import annotations

import logging
import os
import socket
import sys
from pathlib import Path
from typing import Any

from ..cluster.errors import InvalidRequest, Unavailable
from .local_ray import find_local_ray, use_local_ray

DATA_DIR_VARIABLE = "TIMETIER_DATA"

_KNOCK_S = 10.0
_ATTEMPTS = 3  # to open a session of Ray Client

logger = logging.getLogger(__name__)


def default_data_dir() -> Path:
    """Data folder when none is named: `TIMETIER_DATA`, or `.timetier` in the home folder."""
    return Path(os.environ.get(DATA_DIR_VARIABLE) or "~/.timetier").expanduser().absolute()


def connect_ray(address: str | None = None, *, data_dir: Path | None = None) -> None:
    """Connect this process to Ray, unless it is connected.

    `address`: as in `ray.init`; None = `RAY_ADDRESS`, or else the local Ray of `data_dir` (default: see
    `default_data_dir`). Raises Unavailable when there is none, InvalidRequest when this process is connected to
    another Ray than `address`.
    """
    if not isinstance(address, str | None):
        raise InvalidRequest(f"address={address!r} is a {type(address).__name__}: pass str, or None")
    if address is None and not os.environ.get("RAY_ADDRESS"):
        if _is_connected():
            return
        folder = data_dir or default_data_dir()
        found = find_local_ray(folder)
        if found is None:
            raise Unavailable(
                f"no Ray address was given, and no local cluster runs in {folder}: start one with `timetier up`, "
                "or set --address or RAY_ADDRESS"
            )
        use_local_ray(folder)
        address = found.address
    if _is_connected():
        _check_same(address)
        return
    import ray

    where = address or os.environ["RAY_ADDRESS"]
    _knock(where)
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
            return
        except ConnectionAbortedError as error:
            # Ray Client starts a server for each session, which now and then does not come up; another one may.
            if attempt == _ATTEMPTS:
                raise _cannot_connect(where, error) from None
            logger.warning("%s", _cannot_connect(where, error))
        except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
            raise _cannot_connect(where, error) from None


def _cannot_connect(where: str, error: Exception) -> Unavailable:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # Ray Client puts a traceback of the server behind its first line; the last one says what it was.
    reason = lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}"
    return Unavailable(f"can't connect to Ray at {where}: {reason}")


def _knock(address: str) -> None:
    """Raises Unavailable when nothing listens at `[ray://]HOST:PORT`: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return  # some other kind of address, which is Ray's business
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_S).close()
    except (OSError, OverflowError) as error:
        raise Unavailable(
            f"can't connect to Ray at {address}: {error}: check --address and RAY_ADDRESS, and whether that Ray runs"
        ) from None


def _check_same(address: str | None) -> None:
    """Raises InvalidRequest when the connected Ray is surely not the one at `address`, which may be any name of it."""
    import ray

    if address is None or address == "auto" or "://" in address or is_ray_client():
        return
    connected = ray.get_runtime_context().gcs_address
    if address.rpartition(":")[2] != connected.rpartition(":")[2]:
        raise InvalidRequest(
            f"address={address!r}: this process is connected to the Ray at {connected}, and can be in one at a time: "
            "call ray.shutdown() first, or pass None"
        )


def is_ray_client() -> bool:
    """Whether this process is connected through Ray Client (`ray://`): it reaches actors by Ray calls only."""
    import ray.util.client

    client: Any = ray.util.client.ray
    return bool(client.is_connected())


def _is_connected() -> bool:
    """Without importing Ray too early: its settings may have to be made first."""
    if "ray" not in sys.modules:
        return False
    import ray

    return bool(ray.is_initialized())
