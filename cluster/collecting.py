"""The garbage collector in the process of a node.

What a node makes for a request is freed by reference counts; cycles are rare. But each write and each page makes some
ten objects that the collector counts, and with Python's own thresholds it looks at the young ones after every 700: a
quarter of a storage node's time in a load of writes.
"""

from __future__ import annotations

import gc

YOUNG_OBJECTS = 50_000  # some 5 MB, at most, that wait for the collector


def collect_rarely() -> None:
    """Have the collector run after so many more objects, and never look at those that are there at the start."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, 20, 20)
