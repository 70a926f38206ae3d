"""Figures of a benchmark from its slices: medians with the least and the greatest, and what merging saved."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from .bench_workloads import Timing

MICROSECONDS = 1e6


def spread(values: Iterable[float], digits: int = 1) -> dict[str, float]:
    """`median`, `min`, `max`."""
    found = sorted(values)
    return {
        "median": round(statistics.median(found), digits),
        "min": round(found[0], digits),
        "max": round(found[-1], digits),
    }


def figures(timings: list[Timing]) -> dict[str, Any]:
    """`per_s` (items or pages), `p50_us` and `p99_us` of a call, `cpu_us` of an item in all, and by part."""
    parts = timings[0].cpu_s
    return {
        "per_s": spread((timing.items_per_s for timing in timings), 0),
        "p50_us": spread(timing.latency_us["p50"] for timing in timings),
        "p99_us": spread(timing.latency_us["p99"] for timing in timings),
        "cpu_us": spread((sum(timing.cpu_s.values()) / timing.items * MICROSECONDS for timing in timings), 2),
        "cpu_us_by_part": {
            part: round(statistics.median(t.cpu_s[part] / t.items for t in timings) * MICROSECONDS, 2) for part in parts
        },
    }


def sample(timing: Timing) -> dict[str, Any]:
    """One slice, for JSON."""
    found = dataclasses.asdict(timing)
    found["seconds"] = round(timing.seconds, 6)
    found["cpu_s"] = {part: round(used, 6) for part, used in timing.cpu_s.items()}
    return {**found, "items_per_s": round(timing.items_per_s, 1)}


def storage_counters(nodes: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Figures of the storage nodes, from the status of all nodes by name."""
    return {name: dict(node.get("figures", {})) for name, node in nodes.items() if name.startswith("storage-")}


def merging(
    before: Mapping[str, Mapping[str, float]], after: Mapping[str, Mapping[str, float]], *, replicas: int
) -> dict[str, float]:
    """What writes cost the storage nodes, from their figures before and after.

    A *batch* is one message of a client to one replica (a call of many timelines makes one for each replica, since
    each is first for its share). `fsyncs_per_batch`: of one replica. `messages_per_batch`: to one peer in one
    direction, whatever they carry: values, votes, what was chosen. `prepares_per_1000`: of a thousand items.
    `replicas`: of each group.
    """

    def grown(name: str, usual: float | None = None) -> float:
        # A counter that must have grown is asked for by its name, so that a renamed one is not taken for zero.
        now = [figures[name] if usual is None else figures.get(name, usual) for figures in after.values()]
        return sum(now) - sum(before.get(node, {}).get(name, 0.0) for node in after)

    batches, items = max(1.0, grown("write_batches")), max(1.0, grown("items_written"))
    directions = max(1, 2 * (replicas - 1))
    return {
        "items_per_batch": round(items / batches, 1),
        "fsyncs_per_batch": round(grown("fsyncs") / replicas / batches, 3),
        "messages_per_batch": round(grown("peer_batches", 0.0) / directions / batches, 3),
        "prepares_per_1000": round(grown("prepares", 0.0) / items * 1_000, 3),
    }
