"""How nodes and clients speak to the Router: by Ray calls, with its absence as a normal state."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import ray

from ..cluster.errors import TimeTierError, Unavailable
from ..cluster.topology import FORMAT, Topology

_POLL_S = 30.0
_SLACK_S = 15.0  # a long poll that is this late is lost
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 3.0

_topologies = msgspec.msgpack.Decoder(Topology)
_topology_files = msgspec.json.Decoder(Topology)


def decode_topology(data: bytes) -> Topology:
    """Topology of its bytes. Raises Unavailable when it is none, or of a later format."""
    return _decode(data, _topologies)


def decode_topology_file(data: bytes) -> Topology:
    """Topology of a file that a node keeps beside its data. Raises as `decode_topology`."""
    return _decode(data, _topology_files)


def _decode(data: bytes, decoder: msgspec.msgpack.Decoder[Topology] | msgspec.json.Decoder[Topology]) -> Topology:
    try:
        topology = decoder.decode(data)
    except msgspec.MsgspecError as error:
        raise Unavailable(f"malformed topology: {error}") from None
    if topology.format > FORMAT:
        raise Unavailable(f"the topology has format {topology.format}, this program reads up to {FORMAT}: upgrade it")
    return topology


class Pauses:
    """Pauses between attempts: they double, up to a limit, with jitter."""

    def __init__(self) -> None:
        self._next_s = _FIRST_PAUSE_S

    def next_s(self) -> float:
        """Seconds to wait before the next attempt."""
        pause_s = self._next_s * random.uniform(0.5, 1.0)
        self._next_s = min(self._next_s * 2, _LONGEST_PAUSE_S)
        return pause_s

    def reset(self) -> None:
        """An attempt went well."""
        self._next_s = _FIRST_PAUSE_S


class RouterLink:
    """Calls the Router of one namespace and follows its topology. All methods run on one event loop."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._handle: Any = None

    async def call(self, method: str, *arguments: Any, timeout_s: float = 10.0) -> Any:
        """Result of one method of the Router.

        Raises Unavailable when there is no answer (a change may have been made all the same), and whatever
        TimeTierError the Router raises.
        """
        try:
            async with asyncio.timeout(timeout_s):
                if self._handle is None:
                    self._handle = await asyncio.to_thread(find_router, self._namespace)
                return await getattr(self._handle, method).remote(*arguments)
        except TimeoutError:
            raise Unavailable(f"the Router did not answer {method} within {timeout_s} s") from None
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, TimeTierError):
                raise error.cause from None
            raise Unavailable(f"the Router failed at {method}: {error.cause}") from None
        except (ray.exceptions.RayError, ConnectionError) as error:
            self._handle = None
            raise Unavailable(f"the Router is away ({type(error).__name__})") from None

    async def topology(self) -> Topology:
        """The present topology. Raises as `call`."""
        return decode_topology(await self.call("topology", -1, 1.0))

    async def follow(
        self, known_epoch: int, take: Callable[[Topology], None], greet: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        """Hand each newer topology to `take`, for ever. `greet` runs at the start and after each absence."""
        pauses = Pauses()
        present = False
        while True:
            try:
                if not present and greet is not None:
                    await greet()
                present = True
                data = await self.call("topology", known_epoch, _POLL_S, timeout_s=_POLL_S + _SLACK_S)
                pauses.reset()
                if data is not None:
                    topology = decode_topology(data)
                    known_epoch = topology.epoch
                    take(topology)
            except TimeTierError:
                # An absent Router is a normal state: everybody goes on with the topology that they have.
                present = False
                await asyncio.sleep(pauses.next_s())


def find_router(namespace: str) -> Any:
    """Handle of the Router. Blocks for a moment. Raises Unavailable when the namespace has none."""
    from .router import NAME

    try:
        return ray.get_actor(NAME, namespace=namespace)
    except ValueError:
        raise Unavailable(f"no cluster runs in the Ray namespace {namespace!r}: start one with `timetier up`") from None
