"""Commands about the cluster itself: up, down, status, map."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click

from ..actors.local_ray import find_local_ray, start_local_ray, stop_local_ray
from ..actors.ray_session import default_data_dir
from ..cluster.config import load_config
from ..cluster.durable_file import make_folder_durably
from ..cluster.errors import ConfigError
from .cli_common import (
    NAMESPACE,
    cluster_options,
    enter,
    json_option,
    note,
    progress,
    show,
    timeout_option,
)
from .status_text import describe

_ROOM_BYTES = 1 << 20  # a folder without that much room can't hold a cluster


@click.command()
@click.option(
    "--config",
    "config_file",
    type=click.Path(exists=True, dir_okay=False, resolve_path=True, path_type=Path),
    help="Configuration (YAML).  [default: what the data folder was created with, or the embedded default]",
)
@timeout_option("all nodes")
@cluster_options
def up(
    config_file: Path | None,
    timeout_s: float,
    data_dir: Path | None,
    address: str | None,
    namespace: str | None,
    as_json: bool,
) -> int:
    """Start the cluster, or what of it does not run; it goes on running.

    Without an address it starts a Ray on this machine, for the data folder.
    """
    config = None if config_file is None else load_config(config_file, data_dir=data_dir)
    folder = data_dir or (Path(config.data_dir) if config is not None else default_data_dir())
    if address is None:
        _make_data_folder(folder)
        note(f"starting Ray in {folder}" if find_local_ray(folder) is None else f"using the Ray of {folder}")
        start_local_ray(folder)
    try:
        enter(folder, address)
        from ..actors.launch import start_cluster

        with progress("starting nodes") as tell:
            found = start_cluster(
                config,
                namespace=namespace,
                data_dir=folder,
                timeout_s=timeout_s,
                progress=lambda done, total, what: tell(done, total),
            )
    except BaseException:
        note("what runs goes on running: `timetier up` again starts the rest, `timetier down` ends it")
        raise
    show({**found, "data_dir": str(folder)}, describe(found), as_json=as_json)
    return 0 if found["state"] == "serving" else 1


def _make_data_folder(folder: Path) -> None:
    """Raises ConfigError when nothing can be written there."""
    try:
        make_folder_durably(folder)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_ROOM_BYTES))
    except OSError as error:
        raise ConfigError(
            f"the data folder {folder} can't be written ({error.strerror}): mend that, or name another by --data-dir"
        ) from None


@click.command()
@cluster_options
def down(data_dir: Path | None, address: str | None, namespace: str | None, as_json: bool) -> None:
    """End the actors of the cluster, and its local Ray if there is one. Data stays."""
    folder = data_dir or default_data_dir()
    if address is None and find_local_ray(folder) is None:
        stop_local_ray(folder)  # the remains of one that was killed
        show({"stopped": [], "ray_stopped": False}, f"nothing runs in {folder}", as_json=as_json)
        return
    enter(folder, address)
    from ..actors.launch import stop_cluster

    stopped = stop_cluster(namespace or NAMESPACE)
    ray_stopped = address is None and _stop_own_ray(folder)
    text = f"ended {len(stopped)} actors" + (" and the local Ray" if ray_stopped else "") + "; data stays"
    show({"stopped": stopped, "ray_stopped": ray_stopped}, text, as_json=as_json)


def _stop_own_ray(folder: Path) -> bool:
    """End the local Ray, unless somebody else's named actors live in it."""
    import ray
    from ray.util import list_named_actors

    others = {actor["namespace"] for actor in list_named_actors(all_namespaces=True)}
    if others:
        note(f"the local Ray stays: it has actors in {', '.join(sorted(others))}")
        return False
    ray.shutdown()
    return stop_local_ray(folder)


@click.command()
@cluster_options
def status(data_dir: Path | None, address: str | None, namespace: str | None, as_json: bool) -> int:
    """Show the state and figures of every actor. The exit status is 0 if all of them serve."""
    folder = data_dir or default_data_dir()
    if address is None and find_local_ray(folder) is None:
        found: dict[str, Any] = {"namespace": namespace or NAMESPACE, "state": "down", "router": None, "nodes": []}
        show(found, f"no cluster runs in {folder}: start it with `timetier up`", as_json=as_json)
        return 1
    enter(folder, address)
    from ..actors.launch import cluster_status

    found = cluster_status(namespace or NAMESPACE)
    show(found, describe(found), as_json=as_json)
    return 0 if found["state"] == "serving" else 1


@click.command("map")
@json_option
def map_command(as_json: bool) -> None:
    """Measure the shipped map of buckets to groups: how even it is, and what each step moves."""
    from ..cluster.static_map import StaticMap

    measured = StaticMap.load(131_072).measure()
    text = "\n".join(f"{name}: {value}" for name, value in measured.items())
    show(measured, text, as_json=as_json)
