"""Finds the Ray cluster to work with, and connects this process to it."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

from ..cluster.errors import Unavailable
from .local_ray import find_local_ray, use_local_ray

DATA_DIR_VARIABLE = "TIMETIER_DATA"


def default_data_dir() -> Path:
    """Data folder when none is named: `TIMETIER_DATA`, or `.timetier` in the home folder."""
    return Path(os.environ.get(DATA_DIR_VARIABLE) or "~/.timetier").expanduser().absolute()


def connect_ray(address: str | None = None, *, data_dir: Path | None = None) -> None:
    """Connect this process to Ray, unless it is connected.

    `address`: as in `ray.init`; None = `RAY_ADDRESS`, or else the local Ray of `data_dir` (default: see
    `default_data_dir`). Raises Unavailable when there is none.
    """
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
        return
    import ray

    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
        where = address or os.environ["RAY_ADDRESS"]
        reason = str(error).strip().splitlines()
        raise Unavailable(f"can't connect to Ray at {where}: {reason[0] if reason else type(error).__name__}") from None


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
