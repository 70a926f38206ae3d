"""What it costs a node to count reads by age (`cluster/memory/read_ages.py`), without the reads themselves.

    python -m benchmarks.read_ages [--json]

For messages of some sizes: CPU a message and a read while the first reads of a minute are counted one by one, and
afterwards, when a sample is taken.
"""

from __future__ import annotations

import argparse
import json
import time
from random import Random

from timetier.cluster.keys import item_key, timeline_key
from timetier.cluster.memory.read_ages import ReadAgeCounter
from timetier.cluster.topology import TablePolicy

SIZES = (1, 64, 1_000)
_ROUNDS = 5
_ROUND_S = 0.1


def measure(reads: int, *, exact: bool) -> dict[str, float | int | bool]:
    """Cost of messages with so many reads: the best of some rounds."""
    policy = TablePolicy(1_000_000, 1, 1)
    counter = ReadAgeCounter(
        lambda table: policy,
        clock=time.monotonic,
        wall_us=lambda: time.time_ns() // 1_000,
        random=Random(1),
        exact_reads=1 << 62 if exact else 0,
    )
    now_us = time.time_ns() // 1_000
    timelines = [timeline_key(b"moments", b"owner-%d" % number, 1_024) for number in range(reads)]
    keys = [item_key(now_us - number * 10**9) for number in range(reads)]
    best_s = float("inf")
    for _ in range(_ROUNDS):
        messages, began_s = 0, time.process_time()
        while (spent_s := time.process_time() - began_s) < _ROUND_S:
            for _ in range(100):
                weight = counter.wants(reads)
                if weight:
                    counter.note_items(weight, timelines, keys)
            messages += 100
        best_s = min(best_s, spent_s / messages)
    return {
        "reads_a_message": reads,
        "exact": exact,
        "us_a_message": round(best_s * 1e6, 3),
        "ns_a_read": round(best_s / reads * 1e9, 2),
    }


def main() -> None:
    """Print the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    arguments = parser.parse_args()
    found = [measure(reads, exact=exact) for exact in (False, True) for reads in SIZES]
    if arguments.json:
        print(json.dumps({"read_ages": found}))
        return
    for one in found:
        what = "one by one" if one["exact"] else "a sample"
        print(f"{one['reads_a_message']:>5} reads a message, {what:>10}: {one['us_a_message']:>8} us a message")


if __name__ == "__main__":
    main()
