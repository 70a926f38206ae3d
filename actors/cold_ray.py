"""Cold data as a `ray.data.Dataset`: each read task gets the names of its blocks, and reads them by itself.

A task runs anywhere in the Ray cluster. It connects to the TimeTier cluster of the namespace, once a process, and reads
blocks in place where its machine has a copy, else from the cold nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pyarrow as pa

from ..cluster.client.cold_data import LiveData, source_of
from ..cluster.client.faces import Store
from ..cluster.cold.dataset import fragment_file
from ..cluster.errors import ConfigError, InvalidRequest

_DECODED = 4  # times as large as encoded, about: Ray plans its memory by that


def ray_dataset(data: LiveData, namespace: str, parallelism: int) -> Any:
    """A dataset of live rows, read by `parallelism` tasks (-1: as many as Ray thinks right).

    `namespace`: of the cluster that has the blocks. Raises InvalidRequest, ConfigError without Ray Data.
    """
    if isinstance(parallelism, bool) or not isinstance(parallelism, int) or not (parallelism > 0 or parallelism == -1):
        raise InvalidRequest(f"parallelism={parallelism!r}: pass the number of read tasks, or -1")
    try:
        import ray.data
    except ImportError as error:
        raise ConfigError(f"cold_ray_dataset() needs Ray Data ({error}): pip install 'ray[data]'") from None
    return ray.data.read_datasource(_datasource(data, namespace), override_num_blocks=max(parallelism, 0) or None)


def _datasource(data: LiveData, namespace: str) -> Any:
    from ray.data import Datasource, ReadTask
    from ray.data.block import BlockMetadata

    class ColdData(Datasource):
        """The live rows of a table."""

        def get_name(self) -> str:
            return f"TimeTier {data.table}"

        def estimate_inmemory_data_size(self) -> int:
            return _DECODED * sum(fragment.nbytes for fragment in data.fragments)

        def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[Any]:
            tasks = []
            for part in np.array_split(np.arange(len(data.fragments)), max(1, min(parallelism, len(data.fragments)))):
                mine = data._replace(fragments=[data.fragments[at] for at in part])
                size = _DECODED * sum(fragment.nbytes for fragment in mine.fragments)
                rows = None if any(not f.is_whole for f in mine.fragments) else sum(f.rows for f in mine.fragments)
                metadata = BlockMetadata(num_rows=rows, size_bytes=size, exec_stats=None, input_files=None)
                tasks.append(ReadTask(partial(_read, mine, namespace), metadata, schema=data.shape.schema))
            return tasks

    return ColdData()  # type: ignore[no-untyped-call]


def _read(data: LiveData, namespace: str) -> Iterator[pa.Table]:
    """The rows of one task, a fragment at a time."""
    if not data.fragments:
        yield data.shape.schema.empty_table()
        return
    read = _source(namespace, data.table)
    for fragment in data.fragments:
        with pa.ipc.open_file(fragment_file(fragment, data.shape, read)) as reader:
            yield reader.read_all()


@lru_cache(maxsize=8)
def _source(namespace: str, table: str) -> Callable[..., list[bytes]]:
    """Reads blocks of a table by the connection of this process."""
    store = _store(namespace)
    return source_of(store.table(table).asynchronous, store.run).read


@lru_cache(maxsize=2)
def _store(namespace: str) -> Store:
    from .connecting import connect_async

    return Store.open(lambda: connect_async(namespace=namespace))
