"""What will happen in a run, drawn from its seed before it begins: the cluster, the operations and the faults.

Each part comes from a random stream of its own, and operations and faults are listed one by one: so a run can be
repeated without some of them, which is how a failing seed is shrunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random

from timetier.cluster.keys import timeline_hash

BUCKETS = 128  # the least that two groups can share
TABLE = "t"
BASE_US = 1_700_000_000_000_000
DEFAULT_OPERATIONS = 100

STORAGE_NODES = ("storage-0-0", "storage-0-1", "storage-0-2")
COLD_NODES = ("cold-0-0", "cold-0-1", "cold-0-2")


@dataclass(frozen=True)
class Shape:
    """The cluster and its settings, small enough for everything to happen within some hundred operations."""

    clients: int
    caches: int
    owners: tuple[str, ...]
    timelines_in_memory: int
    log_keep_entries: int
    request_id_entries: int
    transfer_bytes: int
    chore_rows: int
    page_items: int
    cache_bytes: int
    cold_after_us: int
    window_us: int
    block_rows: int
    scan_bytes: int
    orphan_grace_s: float
    disk_low_s: float
    disk_high_s: float
    timeout_s: float
    attempt_timeout_s: float
    duration_s: float
    dropped: float
    doubled: float
    straggling: float
    groups: int = 1
    flight_entries: int = 2  # from so many on, entries of one step travel together
    retention_us: int = 0  # 0: nothing expires

    def storage_nodes(self) -> tuple[str, ...]:
        """Names of all storage nodes."""
        return tuple(f"storage-{group}-{replica}" for group in range(self.groups) for replica in range(3))


@dataclass(frozen=True)
class Planned:
    """One operation of one client, not before `at_s`. `keys`: (timestamp, id); `owners`: one a key, or one for all.

    `condition`: for a conditional write, what it names: "seen", the version that the client saw last, "old", one
    before that, or "" for none.
    """

    number: int
    client: int
    at_s: float
    kind: str
    owners: tuple[str, ...]
    keys: tuple[tuple[int, bytes], ...] = ()
    values: tuple[bytes, ...] = ()
    limit: int = 0
    pages: int = 1
    condition: str = ""


@dataclass(frozen=True)
class Fault:
    """One fault, or one run of the sink. `lasts_s`: until it ends; `amount`: of what the kind counts."""

    number: int
    at_s: float
    kind: str
    node: str = ""
    other: str = ""
    lasts_s: float = 0.0
    amount: float = 0.0

    def __str__(self) -> str:
        parts = [self.kind, self.node, self.other and f"- {self.other}"]
        if self.amount:
            parts.append(f"amount {self.amount:g}")
        if self.lasts_s:
            parts.append(f"for {self.lasts_s:.3f} s")
        return " ".join(part for part in parts if part)


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before a run begins."""

    seed: int
    shape: Shape
    operations: list[Planned] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    def without(self, *, operations: set[int] = frozenset(), faults: set[int] = frozenset()) -> Plan:  # type: ignore[assignment]
        """The same without some of its operations and faults, by number."""
        return replace(
            self,
            operations=[one for one in self.operations if one.number not in operations],
            faults=[one for one in self.faults if one.number not in faults],
        )


def stream(seed: int, name: str) -> Random:
    """A random stream of a run."""
    return Random(f"{seed}/{name}")


def make_plan(seed: int, operations: int = DEFAULT_OPERATIONS) -> Plan:
    """The plan of a seed with about so many operations."""
    shape = _shape(stream(seed, "shape"), operations)
    return Plan(seed, shape, _operations(stream(seed, "operations"), shape, operations), _faults(seed, shape))


def _shape(random: Random, operations: int) -> Shape:
    request_ids = random.choice([3, 4, 8, 16])
    return Shape(
        clients=random.randint(2, 4),
        caches=random.choice([1, 1, 2]),
        owners=_owners(random),
        timelines_in_memory=random.choice([1, 2, 4, 100]),
        log_keep_entries=request_ids + random.choice([0, 1, 4]),
        request_id_entries=request_ids,
        transfer_bytes=random.choice([100, 300, 1 << 20]),
        chore_rows=random.choice([1, 3, 500]),
        page_items=random.choice([1, 3, 8]),
        cache_bytes=random.choice([0, 2_000, 20_000, 1 << 20]),
        cold_after_us=random.choice([300_000, 1_000_000, 3_000_000]),
        window_us=random.choice([500_000, 2_000_000, 8_000_000]),
        block_rows=random.choice([2, 5, 64]),
        scan_bytes=random.choice([100, 500, 1 << 20]),
        orphan_grace_s=random.choice([0.0, 1.0, 3.0]),
        disk_low_s=0.0001,
        disk_high_s=random.choice([0.0005, 0.002, 0.01]),
        timeout_s=random.choice([1.0, 2.0, 4.0]),
        attempt_timeout_s=random.choice([0.1, 0.3]),
        duration_s=operations * random.choice([0.02, 0.04, 0.08]),
        dropped=random.choice([0.0, 0.0, 0.005, 0.02]),
        doubled=random.choice([0.0, 0.0, 0.01]),
        straggling=random.choice([0.0, 0.0, 0.02]),
        groups=random.choice([1, 1, 1, 1, 1, 2]),
        flight_entries=random.choice([1, 1, 2]),
        retention_us=random.choice([0, 0, 1_500_000, 5_000_000]),
    )


def _owners(random: Random) -> tuple[str, ...]:
    """Two to four owners; the first two share a bucket, so their rows sink together."""
    names = [f"o{number}" for number in range(2_000)]
    first = random.choice(names)
    bucket = timeline_hash(TABLE.encode(), first.encode()) % BUCKETS
    same = [n for n in names if n != first and timeline_hash(TABLE.encode(), n.encode()) % BUCKETS == bucket]
    return (first, random.choice(same), *random.sample([n for n in names if n != first and n not in same], 2))[
        : random.randint(2, 4)
    ]


# ---------------------------------------------------------------- operations

_KINDS = {
    "put": 26,
    "put_many": 10,
    "put_if": 8,
    "delete": 6,
    "delete_if": 2,
    "wipe": 2,
    "get": 12,
    "get_many": 6,
    "page": 18,
    "walk": 10,
}


def _operations(random: Random, shape: Shape, count: int) -> list[Planned]:
    kinds, weights = list(_KINDS), list(_KINDS.values())
    if random.random() < 0.3:
        weights = [weight * random.choice([0, 1, 3]) + (kind == "put") for kind, weight in _KINDS.items()]
    moments = sorted(random.uniform(0, shape.duration_s) for _ in range(count))
    if random.random() < 0.5:  # bursts
        moments = sorted(round(moment * 4) / 4 + random.uniform(0, 0.01) for moment in moments)
    keys = [
        (BASE_US + random.randrange(-8, 4 + int(shape.duration_s)) * 500_000, random.choice([b"", b"", b"x", b"\x00"]))
        for _ in range(random.choice([6, 20, 60]))
    ]
    owner_weights = [random.choice([1, 3, 6]) for _ in shape.owners]
    planned = []
    for number, at_s in enumerate(moments):
        kind = random.choices(kinds, weights)[0]
        draw = _OPERATIONS[kind]
        owners = tuple(random.choices(shape.owners, owner_weights, k=5))
        drawn = draw(random, number, owners, [random.choice(keys) for _ in range(5)])
        planned.append(replace(drawn, client=random.randrange(shape.clients), at_s=at_s))
    return planned


Drawn = Callable[[Random, int, tuple[str, ...], list[tuple[int, bytes]]], Planned]


def _put(random: Random, number: int, owners: tuple[str, ...], keys: list[tuple[int, bytes]]) -> Planned:
    return Planned(number, 0, 0, "put", owners[:1], (keys[0],), (_value(random, number, 0),))


def _put_if(random: Random, number: int, owners: tuple[str, ...], keys: list[tuple[int, bytes]]) -> Planned:
    condition = random.choice(["seen", "seen", "seen", "old"])
    return replace(_put(random, number, owners, keys), condition=condition)


def _put_many(random: Random, number: int, owners: tuple[str, ...], keys: list[tuple[int, bytes]]) -> Planned:
    count = random.randint(2, 5)
    values = tuple(_value(random, number, at) for at in range(count))
    several = owners[:count] if random.random() < 0.6 else owners[:1] * count
    return Planned(number, 0, 0, "put_many", several, tuple(keys[:count]), values)


def _delete(random: Random, number: int, owners: tuple[str, ...], keys: list[tuple[int, bytes]]) -> Planned:
    return Planned(number, 0, 0, "delete", owners[:1], (keys[0],))


def _delete_if(random: Random, number: int, owners: tuple[str, ...], keys: list[tuple[int, bytes]]) -> Planned:
    return replace(_delete(random, number, owners, keys), condition=random.choice(["seen", "old"]))


def _wipe(random: Random, number: int, owners: tuple[str, ...], keys: list[tuple[int, bytes]]) -> Planned:
    return Planned(number, 0, 0, "wipe", owners[:1], condition=random.choice(["", "", "seen"]))


def _get(random: Random, number: int, owners: tuple[str, ...], keys: list[tuple[int, bytes]]) -> Planned:
    return Planned(number, 0, 0, "get", owners[:1], (keys[0],))


def _get_many(random: Random, number: int, owners: tuple[str, ...], keys: list[tuple[int, bytes]]) -> Planned:
    count = random.randint(2, 5)
    return Planned(number, 0, 0, "get_many", owners[:count], tuple(keys[:count]))


def _page(random: Random, number: int, owners: tuple[str, ...], keys: list[tuple[int, bytes]]) -> Planned:
    before = (keys[0],) if random.random() < 0.2 else ()
    return Planned(number, 0, 0, "page", owners[:1], before, limit=random.choice([1, 2, 5, 50]))


def _walk(random: Random, number: int, owners: tuple[str, ...], keys: list[tuple[int, bytes]]) -> Planned:
    return Planned(number, 0, 0, "walk", owners[:1], limit=random.choice([1, 2, 4]), pages=random.randint(2, 6))


_OPERATIONS: dict[str, Drawn] = {
    "put": _put,
    "put_many": _put_many,
    "put_if": _put_if,
    "delete": _delete,
    "delete_if": _delete_if,
    "wipe": _wipe,
    "get": _get,
    "get_many": _get_many,
    "page": _page,
    "walk": _walk,
}


def _value(random: Random, number: int, at: int) -> bytes:
    """A value that no other operation writes."""
    return f"v{number}.{at}".encode() + b"." * random.choice([0, 0, 10, 200])


# ---------------------------------------------------------------- faults

_FAULTS = {
    "crash": 10,
    "crash at disk": 14,
    "crash all": 2,
    "pause": 8,
    "isolate": 5,
    "cut": 5,
    "one-way cut": 6,
    "slow link": 4,
    "weather": 6,
    "slow disk": 3,
    "full disk": 3,
    "broken disk": 3,
    "clock jump": 5,
    "kill client": 3,
    "flip cold": 3,
    "lose cold": 2,
    "wipe": 4,
    "old folder": 4,
    "flip log": 3,
    "flip row": 3,
}
_OF_STORAGE = frozenset({"broken disk", "wipe", "old folder", "flip log", "flip row"})


def _faults(seed: int, shape: Shape) -> list[Fault]:
    random = stream(seed, "faults")
    storage = shape.storage_nodes()
    caches = tuple(f"cache-{group}-{number}" for group in range(shape.groups) for number in range(shape.caches))
    nodes = (*storage * 3, *caches, *COLD_NODES)
    clients = tuple(f"client-{number}" for number in range(shape.clients))
    weak_cold = random.choice(COLD_NODES)  # whatever damages cold files hits one node only: two copies stay
    # Each seed has some kinds of faults only (Groce et al., "Swarm testing", 2012).
    kinds = [kind for kind in _FAULTS if random.random() < 0.5] or ["crash"]
    weights = [_FAULTS[kind] for kind in kinds]
    many = random.choice([0, 3, 6, 12, 20, 30])
    faults = []
    for number in range(many):
        kind = random.choices(kinds, weights)[0]
        node = random.choice(storage if kind in _OF_STORAGE else nodes)
        other = random.choice([name for name in (*nodes, *clients) if name != node])
        at_s = random.uniform(0, shape.duration_s)
        lasts_s = random.choice([0.02, 0.2, 1.0, 2.5]) * random.uniform(0.5, 1.5)
        amount = 0.0
        if kind == "crash at disk":
            node = random.choice((*storage * 3, *COLD_NODES))
            amount = float(random.choice([1, 2, 3, 5, 10, 30, 100]))
        elif kind == "clock jump":
            amount = random.choice([-1, 1]) * random.choice([0.01, 1.0, 60.0])
        elif kind == "slow link":
            amount = random.choice([0.01, 0.1, 0.5])
        elif kind == "kill client":
            node = random.choice(clients)
        elif kind in ("flip cold", "lose cold"):
            node, amount = weak_cold, float(random.randrange(1 << 30))
        faults.append(Fault(number, at_s, kind, node, other, lasts_s, amount))
    faults += _cold_disks(stream(seed, "cold disks"), shape, weak_cold, len(faults))
    return faults + _sinks(stream(seed, "sinks"), shape, len(faults))


def _cold_disks(random: Random, shape: Shape, node: str, number: int) -> list[Fault]:
    """Disks of one cold node that fail; each works again after a while, or is changed for an empty one."""
    faults: list[Fault] = []
    for _ in range(random.choice([0, 0, 0, 1, 2])):
        at_s = random.uniform(0.2, 1.0) * shape.duration_s
        lasts_s = random.choice([0.2, 1.0, 2.5]) * random.uniform(0.5, 1.5)
        amount = float(random.randrange(4))  # ordinal and whether it is changed
        faults.append(Fault(number + len(faults), at_s, "fail cold disk", node, lasts_s=lasts_s, amount=amount))
    return faults


def _sinks(random: Random, shape: Shape, number: int) -> list[Fault]:
    """Runs of the sink, each of which may be killed; sometimes two at once."""
    runs: list[Fault] = []
    for _ in range(random.choice([0, 2, 3, 5])):
        at_s = random.uniform(0.2, 1.0) * shape.duration_s
        for _ in range(random.choice([1, 1, 2])):
            killed_after_s = random.choice([0.0, 0.0, random.uniform(0.001, 0.05), random.uniform(0.01, 0.5)])
            runs.append(Fault(number + len(runs), at_s, "sink", lasts_s=killed_after_s))
            at_s += random.uniform(0, 0.05)
    return runs
