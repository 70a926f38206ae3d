"""Connects a client to a cluster: finds Ray and the Router, checks versions, chooses the carrier."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Literal

from ..cluster import in_words
from ..cluster.carriers.base import Carrier
from ..cluster.carriers.direct import DirectCarrier, host_id
from ..cluster.client.store import AsyncStore
from ..cluster.client.view import ClientSettings, settings_of
from ..cluster.config import Config, SinkConfig
from ..cluster.errors import ConfigError, InvalidRequest, TimeTierError
from ..cluster.explanation import SinkOutlook
from ..cluster.topology import Topology
from .ray_session import connect_ray, is_ray_client

if TYPE_CHECKING:
    from ..cluster.client.cold_data import LiveData

_SLACK_S = 5.0  # beyond the time that the Router may wait itself


class RouterSource:
    """Topology for a client, by long poll from the Router (see `cluster/following.py`)."""

    def __init__(self, link: Any) -> None:
        self._link = link

    async def fetch(self, known_epoch: int, timeout_s: float) -> Topology | None:
        """The topology once its epoch is above `known_epoch`; None after `timeout_s` seconds. Raises Unavailable."""
        from .router_link import decode_topology

        data = await self._link.call("topology", known_epoch, timeout_s, timeout_s=timeout_s + _SLACK_S)
        return None if data is None else decode_topology(data)


class ClusterStore(AsyncStore):
    """An `AsyncStore` of a cluster in Ray, with the Router at hand for jobs.

    `config`: the cluster's configuration as of the connection.
    """

    def __init__(
        self, carrier: Carrier, topology: Topology, link: Any, config: Config, settings: ClientSettings
    ) -> None:
        super().__init__(carrier, topology, RouterSource(link), settings=settings)
        self.config = config
        self._link = link

    async def router_report(self, report: dict[str, Any]) -> None:
        """Tell the Router of the progress of a sink run: `run` (id), `state` and figures. Raises Unavailable."""
        await self._link.call("report_run", report)

    async def ray_dataset(self, data: LiveData, parallelism: int) -> Any:
        """A `ray.data.Dataset` of live rows; its tasks connect to this cluster by themselves."""
        from .cold_ray import ray_dataset

        return await asyncio.to_thread(ray_dataset, data, self.view.routing.topology.namespace, parallelism)

    async def router_call(self, method: str, *arguments: Any, timeout_s: float = 10.0) -> Any:
        """Call a method of the Router. Raises Unavailable when it does not answer."""
        return await self._link.call(method, *arguments, timeout_s=timeout_s)

    async def sink_outlook(self) -> SinkOutlook:
        """When the sink runs next, and how its last run ended, as the Router tells."""
        try:
            status = await self._link.call("status")
        except TimeTierError as error:
            return SinkOutlook(reason=f"the Router does not answer: {error.message}")
        return outlook_of(status, self.config.sink)


def outlook_of(status: dict[str, Any], config: SinkConfig) -> SinkOutlook:
    """What the Router's status tells of the sink."""
    sink, runs = status.get("sink", {}), status.get("runs", [])
    last = runs[-1] if runs else {}
    failed = [run for run in runs if run.get("errors")]
    error = str(failed[-1]["errors"][0]).strip() if failed else ""
    waits = ""
    if config.min_block_kb:
        waits = (
            f"a window sinks when it has {config.min_block_kb} KiB of rows that may sink, or when its oldest one has "
            f"waited for {in_words.duration(config.max_wait)}"
        )
    return SinkOutlook(
        schedule=sink.get("schedule") or "by hand only: `timetier sink`",
        next_at_us=_us(sink.get("next_at")),
        last_run=str(last.get("run", "")),
        last_state=str(last.get("state", "")),
        last_ended_us=_us(last.get("ended_at")),
        last_error=f"{failed[-1]['run']}: {error}" if failed else "",
        waits=waits,
        reason=str(sink.get("alarm", "")),
    )


def _us(time_s: float | None) -> int | None:
    return None if time_s is None else round(time_s * 1_000_000)


async def connect_async(
    address: str | None = None,
    *,
    namespace: str = "timetier",
    carrier: Literal["auto", "direct", "ray"] = "auto",
) -> ClusterStore:
    """Connect to the cluster of a Ray namespace.

    `address`: as in `ray.init`, also `ray://host:port`. None = the Ray that this process is connected to, or
    `RAY_ADDRESS`, or the local one that `timetier up` has started. `carrier`: `direct` speaks to nodes by sockets,
    `ray` by Ray calls, which need no open ports; `auto` takes Ray calls only for `ray://`.

    Raises Unavailable when there is no such Ray or no such cluster, ConfigError when versions differ.
    """
    if carrier not in ("auto", "direct", "ray"):
        raise InvalidRequest(f"carrier={carrier!r}: pass 'auto', 'direct' or 'ray'")
    if not isinstance(namespace, str) or not namespace:
        raise InvalidRequest(f"namespace={namespace!r}: pass the name of the cluster's Ray namespace")
    connect_ray(address)
    # What imports Ray comes after connect_ray, which makes Ray's settings.
    from .launch import check_version
    from .ray_carrier import RayCarrier
    from .router_link import RouterLink
    from .tls import client_tls

    link = RouterLink(namespace)
    hello = await link.call("hello")
    check_version(hello["version"])
    if hello["reason"]:
        raise ConfigError(f"the Router of namespace {namespace!r} refuses to serve: {hello['reason']}")
    config = Config.from_json(await link.call("config"))
    topology = await link.topology()
    chosen: Carrier
    if carrier == "ray" or (carrier == "auto" and is_ray_client()):
        chosen = RayCarrier(namespace)
    else:
        secret = bytes.fromhex(topology.secret)
        chosen = DirectCarrier(secret, host_id=host_id(), tls=client_tls(config.network))
    return ClusterStore(chosen, topology, link, config, settings_of(config.client))
