"""The command that adds and removes cache nodes of a running cluster."""

from __future__ import annotations

from pathlib import Path

import click

from .cli_common import NAMESPACE, cluster_options, enter, progress, show, timeout_option


@click.command()
@click.option(
    "--cache-nodes",
    type=click.IntRange(1, 64),
    required=True,
    help="Cache nodes per storage group that there shall be.",
)
@timeout_option("added nodes")
@cluster_options
def scale(
    cache_nodes: int,
    timeout_s: float,
    data_dir: Path | None,
    address: str | None,
    namespace: str | None,
    as_json: bool,
) -> int:
    """Add or remove cache nodes while the cluster works; no data is moved.

    The number stays over `timetier down` and `up`, until it is scaled again or another cache.nodes is configured.
    """
    enter(data_dir, address)
    from ..actors.scaling import scale_cluster

    with progress("starting nodes") as tell:
        found = scale_cluster(
            namespace or NAMESPACE,
            cache_nodes=cache_nodes,
            timeout_s=timeout_s,
            progress=lambda done, total, what: tell(done, total),
        )
    changes = [f"{what}: {', '.join(found[what])}" for what in ("added", "removed") if found[what]]
    text = "\n".join([f"{cache_nodes} cache nodes per storage group", *(changes or ["nothing had to be changed"])])
    show(found, text, as_json=as_json)
    return 0 if found["state"] == "serving" else 1
