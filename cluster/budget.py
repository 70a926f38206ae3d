"""How much memory a node may take at the very most, as its configuration says, and how much it takes.

The budget is the sum of all bounds; usually a node takes far less, because they are not all reached at once. All have
192 MiB for the process itself (interpreter, libraries, buffers of the allocator), and besides:

- a storage node: `engine_cache_mb`; four times `engine_write_buffer_mb`; `version_cache_mb`; `timelines_in_memory`
  with eight request ids each; what is known of each table in each bucket; what waits to be sent to each peer; and six
  times `max_queued_mb`, once each for writes under way, for answers that wait for the disk, for pages that it reads
  while no cache node serves, for replies that nobody reads, for states and for early messages of its peers;
- a cache node: `budget_mb`; `block_cache_mb`; its queue of reads; `max_fetched_mb`; twice `max_queued_mb`,
  for answers under way and for replies that nobody reads;
- a cold node: `block_cache_mb`; for each of its disks 64 MiB for each of its `read_threads`, for a block and what is
  decoded of it; 128 MiB of pieces to be written, or one of 32 MiB for each disk; 256 MiB of replies that nobody reads;
  160 MiB for a block that is repaired (as sent, as read, as written) and one that is scrubbed.
"""

from __future__ import annotations

import resource
from pathlib import Path

from .config import Config

PROCESS_MB = 192
TIMELINE_BYTES = 800
ID_BYTES = 200
IDS_PER_TIMELINE = 8  # request ids in memory for each timeline in memory, on average
CARRIER_QUEUE_MB = 64  # what may wait to be sent to one node
COLD_REPLIES_MB = 256
COLD_WRITES_MB = 128
COLD_PIECE_MB = 32
COLD_READ_MB = 64
COLD_UPKEEP_MB = 160
READ_BYTES = 400
PLACE_BYTES = 640  # that it is quiet, its horizon and its oldest window: for each table in each bucket


def queued_mb(tier: str, config: Config) -> int:
    """MiB of replies that may wait for a node's peers to read them."""
    if tier == "storage":
        return config.storage.max_queued_mb
    return config.cache.max_queued_mb if tier == "cache" else COLD_REPLIES_MB


def sends_mb(tier: str, config: Config) -> int:
    """MiB that may wait to be sent to one other node."""
    return min(config.storage.max_queued_mb, CARRIER_QUEUE_MB) if tier == "storage" else CARRIER_QUEUE_MB


def budget_mb(tier: str, config: Config) -> int:
    """MiB of memory that a node of `tier` (storage, cache or cold) may take at the most."""
    queued = queued_mb(tier, config)
    if tier == "storage":
        storage = config.storage
        timeline_bytes = TIMELINE_BYTES + IDS_PER_TIMELINE * ID_BYTES
        kept = storage.engine_cache_mb + 4 * storage.engine_write_buffer_mb + storage.version_cache_mb
        kept += storage.timelines_in_memory * timeline_bytes >> 20
        kept += config.buckets // storage.groups * max(1, len(config.tables)) * PLACE_BYTES >> 20
        peers = storage.replicas - 1
        return PROCESS_MB + kept + 6 * queued + peers * sends_mb(tier, config)
    if tier == "cache":
        cache = config.cache
        kept = cache.budget_mb + cache.block_cache_mb
        reads = cache.max_queued_requests * READ_BYTES >> 20
        return PROCESS_MB + kept + reads + 2 * queued + cache.max_fetched_mb + sends_mb(tier, config)
    kept = config.cold.block_cache_mb
    reads = config.cold.disks * config.cold.read_threads * COLD_READ_MB
    writes = max(COLD_WRITES_MB, config.cold.disks * COLD_PIECE_MB)
    return PROCESS_MB + kept + reads + writes + queued + COLD_UPKEEP_MB + sends_mb(tier, config)


def resident_mb() -> int:
    """MiB of memory that this process has in use."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # a system without /proc tells only the greatest use so far
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    return pages * resource.getpagesize() >> 20
