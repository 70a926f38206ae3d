"""The sample that ships with the package: the history of three open source projects, as a feed of events.

264,513 rows, one for each file that a commit of etcd, Apache Arrow or TiKV touched: `repository`, `author` (a
pseudonym; 3,196 of them), `timestamp_us` (microseconds since 1970), `commit`, `change` (added A, modified M, deleted
D, type changed T) and `path`. Commit and path together are unique.
"""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from .rows import Columns

SAMPLE = Path(str(importlib.resources.files(__package__).joinpath("commits.parquet")))
SAMPLE_TABLE = "commits"
SAMPLE_COLUMNS = Columns(owner="author", time="timestamp_us", id=("commit", "path"))
SAMPLE_ROWS = 264_513
SAMPLE_OWNERS = 3_196
