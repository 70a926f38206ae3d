"""Fills the folder of a storage group at once, with the rows that its replicas would have written.

Loading ten million items through the group takes minutes that no figure is about. So the rows of one replica are
written straight into an engine, by the code that a replica uses, and its folder is copied for the others. A node that
starts on it finds what it would find after a life in which all was written, marked and compared.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
from timetier.cluster.config import Config
from timetier.cluster.identity import open_identity
from timetier.cluster.keys import item_key, priority, timeline_key
from timetier.cluster.messages import PUT, Value
from timetier.cluster.paxos.journal import JOURNAL_KEY
from timetier.cluster.paxos.rows import Meta, encode_record, encode_row, log_key, meta_key, record_of, row_key
from timetier.cluster.routing import Routing
from timetier.cluster.storage.engine import RocksEngine
from timetier.cluster.storage.home import ENGINE_FOLDER
from timetier.cluster.topology import Topology
from timetier.jobs.bench_data import Dataset

_ROWS_A_BATCH = 20_000
_BOOT = 1


def fill(folder: Path, topology: Topology, config: Config, table: str, data: Dataset, *, replicas: int) -> None:
    """Fill `FOLDER/storage-G-R` of all groups and the first `replicas` replicas; one item is one log entry.

    The folders must not exist. The log keeps as many entries of a timeline as a replica would.
    """
    routing = Routing(topology)
    keys = [timeline_key(table.encode(), name.encode(), topology.buckets) for name in data.names]
    groups = routing.storage_groups(keys)
    for group in range(topology.storage_groups):
        own = sorted((key, number) for number, key in enumerate(keys) if groups[number] == group)
        names = [topology.storage_node(group, replica) for replica in range(replicas)]
        for name in names:
            open_identity(folder / name, topology.cluster_id, name, may_format=True).close()
        first, *others = [folder / name / ENGINE_FOLDER for name in names]
        _fill_engine(first, config, data, own)
        for other in others:
            shutil.copytree(first, other)


def _fill_engine(folder: Path, config: Config, data: Dataset, own: list[tuple[bytes, int]]) -> None:
    folder.mkdir(parents=True)
    storage = config.storage
    engine = RocksEngine(
        folder, create=True, cache_mb=storage.engine_cache_mb, write_buffer_mb=storage.engine_write_buffer_mb
    )
    pending = 0
    for key, number in own:
        for name, row in _rows_of(key, number, data, storage.log_keep_entries):
            engine.put(name, row)
            pending += 1
        if pending >= _ROWS_A_BATCH:
            engine.commit()
            pending = 0
    # Nothing was trimmed and all marks are right: what the journal of a life without peers to tell would say.
    engine.put(JOURNAL_KEY, msgspec.msgpack.encode(((0, 0), (0, 0), 0)))
    engine.commit()
    engine._db.compact_range(None, None)  # in a life it is done by and by, not right after a start
    engine.close()


def _rows_of(key: bytes, number: int, data: Dataset, log_keep: int) -> Iterator[tuple[bytes, bytes]]:
    owner = data.names[number]
    life = (priority(key, 3)[0], 1, _BOOT)
    ballot = (0, life)
    log_low = max(1, data.per_owner - log_keep + 1)
    for entry in range(1, data.per_owner + 1):
        timestamp = data.base + (entry - 1) * data.step
        content = data.value(owner, timestamp)
        item = item_key(timestamp)
        written = timestamp
        yield row_key(key, item, entry), encode_row(written, PUT, content)
        if entry >= log_low:
            request_id = number.to_bytes(8, "big") + entry.to_bytes(8, "big")
            value = Value(life, written, [request_id], bytes((PUT,)), [item], [content])
            yield log_key(key, entry), encode_record(record_of(ballot, value))
    meta = Meta(chosen=data.per_owner, floor=log_low - 1, log_low=log_low, log_mark=data.per_owner + 1)
    yield meta_key(key), meta.encode()
