"""Asks cold nodes to check all their files, follows them, and words how far they are."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

from ..cluster.carriers.base import CallError, Carrier
from ..cluster.client.store import AsyncStore
from ..cluster.errors import InvalidRequest, Unavailable
from ..cluster.messages import Pong, ScrubNow, raise_failure

_CALL_TIMEOUT_S = 10.0
_POLL_S = 0.2
_SILENT_POLLS = 50  # after so many a node that does not answer is given up


def nodes_of(store: AsyncStore, node: str | None) -> list[str]:
    """Names of the cold nodes that are meant: one, or all. Raises InvalidRequest for a name that none has."""
    topology = store.view.routing.topology
    names = [name for name in topology.node_names() if name.startswith("cold-")]
    if node is None:
        return names
    if node not in names:
        raise InvalidRequest(f"node={node!r} is no cold node: pass one of {', '.join(names)}")
    return [node]


async def scrub_states(store: AsyncStore, nodes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What each node tells of its scrubbing and its repairs; only `reason` of one that does not answer."""
    found = (await store.status())["nodes"]
    return {
        name: {"scrub": found[name]["scrub"], "repairs": found[name]["repairs"]}
        if "scrub" in found[name]
        else {"reason": found[name].get("reason") or found[name]["state"]}
        for name in nodes
    }


async def start_rounds(carrier: Carrier, nodes: Sequence[str], mb_per_s: float) -> None:
    """Have a round begin on each node. Raises Unavailable when one does not answer."""
    for name in nodes:
        try:
            answer = await carrier.call(name, ScrubNow(mb_per_s), _CALL_TIMEOUT_S)
        except (CallError, TimeoutError) as error:
            raise Unavailable(f"{name} does not answer: {error or 'time is over'}") from None
        raise_failure(answer)
        if not isinstance(answer, Pong):
            raise Unavailable(f"{name} sent an unfit answer")


async def follow_rounds(
    store: AsyncStore, nodes: Sequence[str], progress: Callable[[int, int], None]
) -> dict[str, dict[str, Any]]:
    """Wait until the rounds are over; what each node tells then. `progress(bytes done, bytes in all)`.

    Raises Unavailable when a node stays silent.
    """
    silent = dict.fromkeys(nodes, 0)
    while True:
        states = await scrub_states(store, nodes)
        done = total = open_rounds = 0
        for name, state in states.items():
            silent[name] = silent[name] + 1 if "scrub" not in state else 0
            if silent[name] > _SILENT_POLLS:
                raise Unavailable(f"{name} does not answer any more ({state['reason']}); its round goes on with it")
            scrub = state.get("scrub") or {}
            going, last = scrub.get("round"), scrub.get("last") or {}
            open_rounds += going is not None or silent[name] > 0
            done += going["bytes"] if going else last.get("bytes", 0)
            total += going["bytes_total"] if going else last.get("bytes", 0)
        progress(done, total)
        if not open_rounds:
            return states
        await asyncio.sleep(_POLL_S)


HEADINGS = ["scrub", "state", "files", "MB", "MB/s", "found", "repaired", "to repair", "failing", "last round", "next"]


def scrub_row(node: str, scrub: dict[str, Any], repairs: dict[str, Any]) -> list[str]:
    """A node's line of a table with `HEADINGS`: the round under way, or else the last one."""
    going, last = scrub.get("round"), scrub.get("last")
    shown = going or last or {}
    files, size = f"{shown.get('files', 0):,}", f"{shown.get('bytes', 0) / 1e6:,.1f}"
    if going:
        files, size = f"{files} of {going['files_total']:,}", f"{size} of {going['bytes_total'] / 1e6:,.1f}"
        speed = f"{going['mb_per_s']:,.1f}"
    else:
        speed = f"{shown['bytes'] / 1e6 / max(shown['seconds'], 1e-3):,.1f}" if shown else ""
    return [
        node,
        scrub["state"],
        files,
        size,
        speed,
        str(shown.get("found", 0)),
        str(shown.get("repaired", 0)),
        str(repairs["queued"]),
        str(repairs["failing"]),
        f"{_time(last['ended_at'])} ({last['seconds']:,.0f} s)" if last else "never",
        _time(scrub["next_at"]) if scrub.get("next_at") else "by hand",
    ]


def _time(seconds: float) -> str:
    """Local time of seconds since 1970."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
