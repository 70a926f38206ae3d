"""The Ray carrier: frames as calls of Ray actors.

For clients behind `ray://`, for control, and where ports are closed. It needs a connected Ray in this process and
actors with one method, `async call(frame: bytes) -> bytes` (see `answer_frame`).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from ..cluster.carriers.base import Address, CallError, Then, begin_task, decode_answer
from ..cluster.counters import Counters
from ..cluster.errors import ProtocolError
from ..cluster.messages import Message, encode

MAX_OUTSTANDING_CALLS = 1024  # to one node
MAX_WAITING_SENDS = 256  # to one node; further one-way messages are dropped
SEND_TIMEOUT_S = 5.0  # of one one-way message; the next one waits for its end
LOOK_UP_TIMEOUT_S = 10.0


class RayCarrier:
    """Implements `Carrier` over actors of one Ray namespace.

    A node's actor is named by its address (`actor`), or like the node. Handles are looked up once and forgotten
    when the actor fails. Ray repeats no call on its own: the sender knows better which ones may be.

    Counters: calls, timeouts, failed_calls, dropped_frames.
    """

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        self.counters = Counters()
        self._actor_names: dict[str, str] = {}
        self._nodes: dict[str, _Node] = {}
        self._closed = False

    async def call(self, node: str, message: Message, timeout_s: float) -> Message:
        """Answer of `node`. Raises CallError when none came in time."""
        frame = encode(message)
        if self._closed:
            raise CallError("the carrier is closed", sent=False)
        self.counters.add("calls")
        return await self._node(node).call(frame, timeout_s)

    def begin(self, node: str, message: Message, timeout_s: float, then: Then) -> None:
        """Begin a `call`."""
        begin_task(self.call(node, message, timeout_s), then)

    def send(self, node: str, message: Message) -> bool:
        """Send one way, in order per node. False when too many are on their way."""
        frame = encode(message)
        if not self._closed and self._node(node).send(frame):
            return True
        self.counters.add("dropped_frames")
        return False

    def update(self, addresses: Mapping[str, Address]) -> None:
        """Replace the actors' names; handles of nodes whose actor has another name are forgotten."""
        self._actor_names = {name: address.actor for name, address in addresses.items() if address.actor}
        for name, node in list(self._nodes.items()):
            if self._actor_names.get(name, name) != node.actor_name:
                del self._nodes[name]  # calls in flight run to their end

    async def close(self) -> None:
        """End calls in flight with CallError, and drop the one-way messages that wait."""
        self._closed = True
        nodes = list(self._nodes.values())
        self._nodes.clear()
        await asyncio.gather(*(node.close() for node in nodes))

    def _node(self, name: str) -> _Node:
        node = self._nodes.get(name)
        if node is None:
            actor_name = self._actor_names.get(name, name)
            node = self._nodes[name] = _Node(name, actor_name, self.namespace, self.counters)
        return node


class _Node:
    """One actor: its handle, the calls under way, and the one-way frames that wait."""

    def __init__(self, name: str, actor_name: str, namespace: str, counters: Counters) -> None:
        self.actor_name = actor_name
        self._name = name
        self._namespace = namespace
        self._counters = counters
        self._method: Any = None  # bound `call` of the actor's handle, once looked up
        self._look_up: asyncio.Task[str] | None = None
        self._calls: set[asyncio.Future[bytes]] = set()
        self._waiting: deque[bytes] = deque()  # one-way frames; the first is on its way
        self._sender: asyncio.Task[None] | None = None
        self._closed = False

    async def call(self, frame: bytes, timeout_s: float) -> Message:
        """Answer to a frame. Raises CallError."""
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + timeout_s
        await self._find(timeout_s)
        left_s = deadline_s - loop.time()
        if left_s <= 0:
            raise CallError(f"no time was left to ask {self._name}", sent=False)
        if len(self._calls) >= MAX_OUTSTANDING_CALLS:
            raise CallError(f"{len(self._calls)} calls of {self._name} are under way already", sent=False)
        answer = self._submit(frame)
        self._calls.add(answer)
        try:
            done, _ = await asyncio.wait({answer}, timeout=left_s)
            if not done:
                self._counters.add("timeouts")
                raise CallError(f"no answer of {self._name} within {timeout_s:.3f} s", sent=True)
            return decode_answer(answer.result())
        except asyncio.CancelledError:
            if self._closed and answer.cancelled():
                raise CallError("the carrier is closed", sent=True) from None
            raise
        except ProtocolError as error:
            raise CallError(f"{self._name}: {error}", sent=True) from None
        except Exception as error:
            raise self._failed(error) from error
        finally:
            self._calls.discard(answer)
            answer.cancel()  # only the waiting for it; without effect when it is done

    def send(self, frame: bytes) -> bool:
        """Send a frame one way, after those that wait."""
        if len(self._waiting) >= MAX_WAITING_SENDS:
            return False
        self._waiting.append(frame)
        if self._sender is None:
            self._sender = asyncio.get_running_loop().create_task(self._send_waiting())
        return True

    async def close(self) -> None:
        """Give up everything that is under way."""
        self._closed = True
        self._waiting.clear()
        pending = [future for future in (*self._calls, self._sender, self._look_up) if future is not None]
        for future in pending:
            future.cancel()
        await asyncio.gather(*pending, return_exceptions=True)

    # ------------------------------------------------------------ handle

    async def _find(self, timeout_s: float) -> None:
        """Have the handle looked up; all callers share one look-up. Raises CallError(sent=False)."""
        if self._method is not None:
            return
        look_up = self._look_up or self._start_look_up()
        done, _ = await asyncio.wait({look_up}, timeout=max(timeout_s, 0.0))
        if self._method is None:
            reason = "its look-up takes too long"
            if done:
                reason = "the carrier is closed" if look_up.cancelled() else look_up.result()
            raise CallError(f"{self._name} can't be reached: {reason}", sent=False)

    def _start_look_up(self) -> asyncio.Task[str]:
        self._look_up = asyncio.get_running_loop().create_task(self._do_look_up())
        return self._look_up

    async def _do_look_up(self) -> str:
        """Look the actor up. Gives the reason when there is none."""
        try:
            # Ray asks its control store synchronously, so this must not happen on the event loop.
            async with asyncio.timeout(LOOK_UP_TIMEOUT_S):
                self._method = await asyncio.to_thread(_find_method, self.actor_name, self._namespace)
            return ""
        except TimeoutError:
            return f"Ray did not find its actor within {LOOK_UP_TIMEOUT_S} s"
        except Exception as error:  # Ray raises errors of many unrelated classes here
            return f"{type(error).__name__}: {error}"
        finally:
            self._look_up = None

    # ------------------------------------------------------------ calls

    def _submit(self, frame: bytes) -> asyncio.Future[bytes]:
        """Hand a frame to Ray. Raises CallError if Ray does not take it."""
        try:
            reference = self._method.remote(frame)
        except Exception as error:
            raise self._failed(error) from error
        answer: asyncio.Future[bytes] = asyncio.wrap_future(reference.future())
        return answer

    async def _send_waiting(self) -> None:
        """Send what waits, each frame after the end of the one before: else Ray's async actors may swap them."""
        try:
            while self._waiting:
                try:
                    await self.call(self._waiting[0], SEND_TIMEOUT_S)
                    self._waiting.popleft()
                except CallError as error:
                    lost = 1 if error.sent else len(self._waiting)  # nobody is there: the others have no chance either
                    self._counters.add("dropped_frames", lost)
                    for _ in range(lost):
                        self._waiting.popleft()
        finally:
            self._sender = None

    def _failed(self, error: Exception) -> CallError:
        """What a caller is told about an error of Ray; the handle is forgotten if the actor or the client failed."""
        if isinstance(error, CallError):
            return error
        self._counters.add("failed_calls")
        if isinstance(error, RayActorError) or not isinstance(error, RayError):
            self._method = None
        first_line = (str(error) or "no further text").splitlines()[0]
        return CallError(f"{self._name}: {type(error).__name__}: {first_line}", sent=True)


def _find_method(actor_name: str, namespace: str) -> Any:
    """The method `call` of a named actor. Raises ValueError when there is none."""
    if not ray.is_initialized():
        raise ValueError("this process is not connected to Ray; call ray.init first")
    return ray.get_actor(actor_name, namespace=namespace).call.options(max_task_retries=0)
