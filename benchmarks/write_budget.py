"""Where the CPU time of a call with 1,000 writes goes, step by step.

    python -m benchmarks.write_budget [--calls 40] [--owners 2000]
    python -m benchmarks.write_budget --items 1 --calls 3000

A client and three replicas in one thread: the production code of each step (arguments, scripts, codec, replicas,
RocksDB) without sockets, event loop and fsync, so that each step can be timed by itself. Steps of the replicas are
summed over all three. Printed: microseconds of CPU an item, and messages between replicas for each 1,000 items.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from timetier.cluster.client.items import put_requests
from timetier.cluster.client.scripts import write
from timetier.cluster.client.view import View
from timetier.cluster.collecting import collect_rarely
from timetier.cluster.config import Config
from timetier.cluster.counters import Counters
from timetier.cluster.messages import Accepts, Message, PeerBatch, decode, encode
from timetier.cluster.paxos.core import Settings
from timetier.cluster.paxos.replica import JOIN_S, VOTING, Replica
from timetier.cluster.storage.engine import RocksEngine
from timetier.cluster.storage.version_cache import Owner, VersionCache

ITEMS_PER_CALL = 1_000
WARM_UP_ITEMS = 300
VALUE_BYTES = 200
WARM_UP_CALLS = 5
END_OF_STEP = "replica: end a step (messages, version cache, timers)"
CALL_S = 0.02  # by the replicas' clocks
SHOWN = ("peer_batches", "peer_messages", "prepares", "flights")


class Budget:
    """Client and replicas. `spent_s`: CPU seconds by step."""

    def __init__(self, folder: Path, owners: int, items: int, seed: int) -> None:
        self.spent_s: defaultdict[str, float] = defaultdict(float)
        self.now = 0.0
        self._random = random.Random(seed)
        self._items = items
        self._owners = [f"owner-{number}" for number in range(owners)]
        config = Config.from_json(json.dumps({"data_dir": str(folder), "default_table": {}}))
        self._topology = config.topology(cluster_id="c", namespace="n", epoch=1, addresses={}, secret="00" * 16)
        self.replicas = [self._replica(folder, number, config) for number in range(3)]
        self._view = View(self._topology, now=lambda: self.now, random=random.Random(seed))
        self._frames: list[tuple[int, int, bytes, str]] = []  # (source, target, frame, what it is)
        self._answers: dict[int, bytes] = {}
        self._token = 0
        self._settle()
        self.now += JOIN_S
        self._settle()
        assert all(replica.state == VOTING for replica in self.replicas), "the replicas do not vote"

    def _replica(self, folder: Path, number: int, config: Config) -> Replica:
        storage = config.storage
        return Replica(
            replica=number,
            replicas=3,
            life=(number, 1, 1),
            buckets=config.buckets,
            owned=range(config.buckets),
            engine=RocksEngine(
                folder / str(number),
                create=True,
                cache_mb=storage.engine_cache_mb,
                write_buffer_mb=storage.engine_write_buffer_mb,
            ),
            settings=Settings(),
            rng=random.Random(number),
            wall_us=lambda: time.time_ns() // 1000,
            counters=Counters(),
            versions=VersionCache(
                bytearray(storage.version_cache_mb << 20), Owner(b"", life=number + 1, past=None, seed=0)
            ),
        )

    def call(self) -> None:
        """Write one item to each of some timelines."""
        names = self._random.sample(self._owners, self._items)
        items = [(name, self._random.randrange(10**15), b"v" * VALUE_BYTES) for name in names]
        writes = self._timed("client: arguments", put_requests, b"t", self._topology.buckets, items)
        script = write(self._view, writes.requests, 10.0)
        calls = self._timed("client: plan and message", next, script)
        tokens = []
        for one in calls:
            frame = self._timed("client: codec", encode, one.message)
            number = int(one.node.rpartition("-")[2])
            self._token += 1
            tokens.append(self._token)
            message = self._timed("replica: codec", decode, frame)
            self._timed(
                "first replica: check, propose, rows", self.replicas[number].write, self.now, tokens[-1], message
            )
            self._pump(number)
        self._settle()
        self.now += CALL_S  # peers are told what was chosen
        self._settle()
        answers = [self._timed("client: codec", decode, self._answers.pop(token)) for token in tokens]
        outcomes = self._timed("client: take the answers", _last, script, answers)
        assert all(isinstance(outcome, int) for outcome in outcomes), "a write failed"

    def _timed(self, step: str, work: Callable[..., Any], *arguments: Any) -> Any:
        began = time.thread_time()
        result = work(*arguments)
        self.spent_s[step] += time.thread_time() - began
        return result

    def _step_taken(self, number: int) -> None:
        """What a node does after each message: it ends the step only where there is something to do."""
        replica = self.replicas[number]
        self._reply(self._timed(END_OF_STEP, replica.answers))
        if self._timed(END_OF_STEP, replica.is_stirred, self.now):
            self._pump(number)

    def _reply(self, answers: list[tuple[int, Message]]) -> None:
        for token, answer in answers:
            self._answers[token] = self._timed("replica: codec", encode, answer)

    def _pump(self, number: int) -> None:
        """End a step of a replica, as its node does."""
        replica = self.replicas[number]
        self._timed(END_OF_STEP, replica.tick, self.now)
        output = self._timed(END_OF_STEP, replica.take, self.now)
        self._reply(output.replies)
        for peer, batch in output.peers:
            self._frames.append((number, peer, self._timed("replica: codec", encode, batch), _step_of(batch)))
        self._timed("RocksDB: write, and its journal row", replica.core.engine.commit)

    def _settle(self) -> None:
        """Deliver and make durable until nothing is left."""
        for number in range(3):
            self._pump(number)
        while True:
            while self._frames:
                source, target, frame, step = self._frames.pop(0)
                message = self._timed("replica: codec", decode, frame)
                self._timed(step, self.replicas[target].peer, self.now, source, message)
                self._step_taken(target)
            waiting = [number for number, replica in enumerate(self.replicas) if replica.waits_for_disk]
            if not waiting:
                return
            for number in waiting:
                replica = self.replicas[number]
                batch = replica.core.engine.commit()
                self._timed("first replica: count votes, apply, answer", replica.durable, self.now, batch)
                self._pump(number)


def _step_of(batch: PeerBatch) -> str:
    kinds = {type(message).__name__ for message in batch.messages}
    if kinds & {Accepts.__name__, "Accept"}:
        return "peers: accept, rows"
    if kinds & {"AcceptedAll", "Accepted"}:
        return "first replica: count votes, apply, answer"
    return "peers: apply"


def _last(script: Any, answers: list[Any]) -> Any:
    """Result of a script that ends with these answers."""
    try:
        script.send(answers)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("the script goes on")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calls", type=int, default=40, help="calls that are measured (default: 40)")
    parser.add_argument("--owners", type=int, default=2_000, help="timelines, 1,000 at least (default: 2,000)")
    parser.add_argument("--items", type=int, default=ITEMS_PER_CALL, help="items of a call (default: 1,000)")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    if not 1 <= arguments.items <= ITEMS_PER_CALL:
        parser.error(f"--items: 1 to {ITEMS_PER_CALL:,}")
    with tempfile.TemporaryDirectory(prefix="timetier-budget-") as folder:
        owners = max(arguments.owners, ITEMS_PER_CALL)
        budget = Budget(Path(folder), owners, arguments.items, arguments.seed)
        for _ in range(max(WARM_UP_CALLS, WARM_UP_ITEMS // arguments.items)):
            budget.call()
        collect_rarely()
        budget.spent_s.clear()
        counted = [sum(r.core.counters.totals.get(name, 0) for r in budget.replicas) for name in SHOWN]
        for _ in range(arguments.calls):
            budget.call()
        items = arguments.calls * arguments.items
        for step, seconds in sorted(budget.spent_s.items(), key=lambda row: -row[1]):
            print(f"{step:55s} {seconds / items * 1e6:7.2f} us an item")
        print(f"{'all':55s} {sum(budget.spent_s.values()) / items * 1e6:7.2f}")
        for name, before in zip(SHOWN, counted, strict=True):
            now = sum(r.core.counters.totals.get(name, 0) for r in budget.replicas)
            print(f"{name} for 1,000 items: {(now - before) / items * 1_000:.2f}")
        for replica in budget.replicas:
            replica.core.engine.abandon()  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
