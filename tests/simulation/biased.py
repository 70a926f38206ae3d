"""Plans that lean towards some kind of trouble, for planted bugs that plans for everything meet too seldom.

Each takes a seed and gives a plan like `make_plan`, with other shares of operations and faults; nothing in it is
arranged for a certain bug.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

from .plan import _OPERATIONS, BASE_US, Fault, Plan, Planned, Shape, make_plan, stream

Planner = Callable[[int], Plan]


def duels(seed: int) -> Plan:
    """One timeline, written through all replicas at once, which crash, stand still and lose messages all the time."""
    random = stream(seed, "duels")
    shape = _small(seed, random)
    operations = _operations(random, shape, 60, {"put": 10, "put_if": 2, "put_many": 3, "get": 2, "page": 4, "wipe": 1})
    clients = [f"client-{number}" for number in range(shape.clients)]
    kinds = random.sample(["crash", "crash at disk", "pause", "cut", "one-way cut", "isolate", "weather"], 4)
    faults = [_fault(random, number, random.choice(kinds), shape, clients) for number in range(40)]
    return Plan(seed, shape, operations, faults)


def restarts(seed: int) -> Plan:
    """One timeline, and replicas that are restarted, one or all of them, in the middle of its writes."""
    random = stream(seed, "restarts")
    shape = _small(seed, random)
    operations = _operations(random, shape, 60, {"put": 10, "put_many": 4, "page": 5, "wipe": 1})
    clients = [f"client-{number}" for number in range(shape.clients)]
    kinds = ["crash", "crash at disk", "crash at disk", "crash all", "one-way cut", "weather"]
    faults = [_fault(random, number, random.choice(kinds), shape, clients) for number in range(30)]
    return Plan(seed, shape, operations, faults)


def transfers(seed: int) -> Plan:
    """Short logs and long outages: replicas catch up by the timeline's state, and clients ask again for long."""
    random = stream(seed, "transfers")
    shape = replace(_small(seed, random), log_keep_entries=4, request_id_entries=3, timeout_s=4.0)
    operations = _operations(
        random, shape, 80, {"put": 10, "put_many": 3, "put_if": 2, "delete": 3, "wipe": 1, "page": 3}
    )
    clients = [f"client-{number}" for number in range(shape.clients)]
    faults = []
    for number in range(16):
        kind = random.choice(["crash", "isolate", "one-way cut", "slow link", "weather"])
        faults.append(replace(_fault(random, number, kind, shape, clients), lasts_s=random.uniform(0.1, 0.8)))
    return Plan(seed, shape, operations, faults)


def sinks(seed: int) -> Plan:
    """Everything sinks at once and is written again, by many runs of the sink, while replicas fall behind."""
    random = stream(seed, "sinks first")
    shape = replace(_small(seed, random), cold_after_us=100_000, window_us=8_000_000, duration_s=3.0)
    kinds = {"put": 10, "put_many": 3, "delete": 6, "wipe": 1, "page": 4, "walk": 4, "get": 3}
    operations = _operations(random, shape, 80, kinds)
    clients = [f"client-{number}" for number in range(shape.clients)]
    faults = []
    for number in range(24):
        kind = random.choice(["crash", "isolate", "one-way cut", "pause", "sink", "sink", "sink"])
        fault = _fault(random, number, kind, shape, clients)
        if kind == "sink":
            fault = replace(fault, node="", other="", lasts_s=random.choice([0.0, 0.0, 0.0, random.uniform(0.01, 0.2)]))
        faults.append(fault)
    return Plan(seed, shape, operations, faults)


def retention(seed: int) -> Plan:
    """Items expire by many runs of the sink, also those that are written late, and timelines are wiped, while replicas
    are cut off and crash. Everything is read all the time, through caches that hold it."""
    random = stream(seed, "retention")
    shape = replace(_small(seed, random), cold_after_us=100_000, window_us=random.choice([300_000, 2_000_000]))
    shape = replace(shape, retention_us=random.choice([300_000, 1_000_000]), duration_s=3.0, caches=2)
    shape = replace(shape, cache_bytes=1 << 20, page_items=8, timeout_s=2.0)
    kinds = {"put": 8, "put_many": 2, "delete": 2, "wipe": 1, "page": 14, "walk": 2, "get": 6}
    operations = _operations(random, shape, 120, kinds)
    clients = [f"client-{number}" for number in range(shape.clients)]
    faults = []
    for number in range(20):
        kind = random.choice(["crash", "isolate", "one-way cut", "pause", "slow link", "sink", "sink", "sink", "sink"])
        fault = _fault(random, number, kind, shape, clients)
        if kind == "sink":
            fault = replace(fault, node="", other="", lasts_s=random.choice([0.0, 0.0, 0.0, random.uniform(0.01, 0.2)]))
        faults.append(fault)
    return Plan(seed, shape, operations, faults)


def crowds(seed: int) -> Plan:
    """Many clients at one timeline at the same moments, over slow links and slow disks; nothing crashes."""
    random = stream(seed, "crowds")
    shape = replace(_small(seed, random), clients=10, timeout_s=4.0, attempt_timeout_s=0.5)
    shape = replace(shape, cache_bytes=random.choice([0, 1 << 20]), chore_rows=1)
    kinds = {"put": 6, "put_many": 3, "put_if": 8, "wipe": 2, "get": 6, "page": 12}
    operations = _operations(random, shape, 100, kinds)
    operations = [replace(one, limit=5 if one.kind == "page" else 0, at_s=round(one.at_s, 1)) for one in operations]
    nodes = [*shape.storage_nodes(), "cache-0-0"]
    faults = []
    for number in range(24):
        node, other = random.sample(nodes, 2)
        kind = random.choice(["slow link", "slow link", "slow disk"])
        amount = random.choice([0.02, 0.1])
        faults.append(Fault(number, random.uniform(0, shape.duration_s), kind, node, other, 0.3, amount))
    return Plan(seed, shape, operations, faults)


def losses(seed: int) -> Plan:
    """Replicas that lose their data, or come back with an old folder, in the middle of duels."""
    random = stream(seed, "losses")
    shape = replace(_small(seed, random), duration_s=4.0)
    operations = _operations(random, shape, 80, {"put": 10, "put_if": 2, "put_many": 3, "get": 2, "page": 4})
    clients = [f"client-{number}" for number in range(shape.clients)]
    kinds = ["wipe", "wipe", "old folder", "crash", "pause", "one-way cut", "one-way cut", "slow link", "weather"]
    faults = [_fault(random, number, random.choice(kinds), shape, clients) for number in range(30)]
    return Plan(seed, shape, operations, faults)


def _small(seed: int, random: Random) -> Shape:
    shape = make_plan(seed, 1).shape
    return replace(
        shape,
        clients=4,
        caches=1,
        groups=1,
        owners=shape.owners[:1],
        disk_high_s=random.choice([0.0005, 0.005]),
        attempt_timeout_s=random.choice([0.03, 0.1]),
        timeout_s=random.choice([0.1, 0.5, 2.0]),
        duration_s=1.5,
    )


def _operations(random: Random, shape: Shape, count: int, weights: dict[str, int]) -> list[Planned]:
    moments = sorted(random.uniform(0, shape.duration_s) for _ in range(count))
    keys = [(BASE_US + number * 500_000, b"") for number in range(-4, 4)]
    planned = []
    kinds = random.choices(list(weights), list(weights.values()), k=count)
    for number, (at_s, kind) in enumerate(zip(moments, kinds, strict=True)):
        drawn = _OPERATIONS[kind](random, number, shape.owners * 5, [random.choice(keys) for _ in range(5)])
        planned.append(replace(drawn, client=random.randrange(shape.clients), at_s=at_s))
    return planned


def _fault(random: Random, number: int, kind: str, shape: Shape, clients: list[str]) -> Fault:
    storage = shape.storage_nodes()
    node = random.choice(storage)
    others = [*storage, *clients] if kind != "slow link" else list(storage)
    other = random.choice([name for name in others if name != node])
    if kind == "one-way cut" and random.random() < 0.5:
        node, other = other, node
    at_s = random.uniform(0, shape.duration_s)
    amount = {"crash at disk": float(random.randint(1, 12)), "slow link": 0.3}.get(kind, 0.0)
    return Fault(number, at_s, kind, node, other, random.choice([0.01, 0.05, 0.3]) * random.uniform(0.5, 1.5), amount)


PLANS: dict[str, Planner] = {
    "everything": make_plan,
    "duels": duels,
    "restarts": restarts,
    "crowds": crowds,
    "transfers": transfers,
    "sinks": sinks,
    "retention": retention,
    "losses": losses,
}
