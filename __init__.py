"""TimeTier: a strongly consistent, tiered store for timelines, at home in a Ray cluster.

    import timetier

    store = timetier.connect()
    moments = store.table("moments")
    moments.put("alice", 1_700_000_000_000_000, b"good morning")
    page = moments.timeline("alice", limit=20)  # newest first: page.items, page.version, page.next

`connect_async()` gives the same under asyncio.
"""

from __future__ import annotations

__version__ = "0.1.0"  # before the imports: parts of the package ask for it

from .cluster.client.faces import Store, Table
from .cluster.client.items import Item, Page, Put
from .cluster.client.store import AsyncStore, AsyncTable
from .cluster.errors import (
    ConfigError,
    Corrupt,
    InvalidRequest,
    OutcomeUnknown,
    Rejected,
    TimeTierError,
    TooLarge,
    Unavailable,
    VersionConflict,
    WriteManyError,
)
from .cluster.explanation import Explanation

__all__ = [
    "AsyncStore",
    "AsyncTable",
    "ConfigError",
    "Corrupt",
    "Explanation",
    "InvalidRequest",
    "Item",
    "OutcomeUnknown",
    "Page",
    "Put",
    "Rejected",
    "Store",
    "Table",
    "TimeTierError",
    "TooLarge",
    "Unavailable",
    "VersionConflict",
    "WriteManyError",
    "__version__",
    "connect",
    "connect_async",
]


def connect(address: str | None = None, *, namespace: str = "timetier") -> Store:
    """Connect to a running cluster.

    `address`: of the Ray cluster, as `ray.init` takes it ("ray://head:10001" from outside); None: the Ray cluster that
    this process is in or that `RAY_ADDRESS` names. `namespace`: the Ray namespace of TimeTier's actors.
    Raises `Unavailable` if no TimeTier runs there.
    """
    from .actors.connecting import connect_async as open_async

    return Store.open(lambda: open_async(address, namespace=namespace))


async def connect_async(address: str | None = None, *, namespace: str = "timetier") -> AsyncStore:
    """Connect to a running cluster, for use on the running event loop. Arguments and errors as in `connect`."""
    from .actors.connecting import connect_async as open_async

    return await open_async(address, namespace=namespace)
