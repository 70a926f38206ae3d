"""The folder of a storage node: which engine in it belongs to which incarnation.

Each incarnation has an engine of its own. So what an old one holds is removed only after its successor votes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from ..config import StorageConfig
from ..errors import Corrupt
from ..identity import Identity, Refused
from ..paxos.rows import IDENTITY_KEY
from .engine import DurableEngine, RocksEngine

ENGINE_FOLDER = "engine"

OpenEngine = Callable[[Path, bool], DurableEngine]
"""Opens the engine in a folder; True to create it. Raises Corrupt when it is damaged or missing."""


def rocks_opener(config: StorageConfig) -> OpenEngine:
    """Opens RocksDB as the configuration says."""

    def open_rocks(folder: Path, create: bool) -> DurableEngine:
        return RocksEngine(
            folder, create=create, cache_mb=config.engine_cache_mb, write_buffer_mb=config.engine_write_buffer_mb
        )

    return open_rocks


def remove_engine(folder: Path) -> None:
    """Remove the engine in a folder, if there is one. Raises OSError."""
    if folder.exists():
        shutil.rmtree(folder)


class EngineHome:
    """`folder` of a node with this `identity`."""

    def __init__(
        self, folder: Path, identity: Identity, open_engine: OpenEngine, remove: Callable[[Path], None]
    ) -> None:
        self.folder = folder
        self._identity = identity
        self._open_engine = open_engine
        self._remove = remove

    def open(self) -> DurableEngine:
        """The engine of the present incarnation, with its identity written in.

        Raises Corrupt when it is damaged or its rows are gone, Refused when it belongs to another node, EngineFailed.
        """
        identity = self._identity
        engine = self._open_engine(self._folder_of(identity.incarnation), identity.learning or not identity.formatted)
        try:
            self._check(engine)
            engine.put(IDENTITY_KEY, self._row())
            engine.commit()
            engine.sync()
        except Exception:
            engine.abandon()  # else its lock would keep every later life out
            raise
        return engine

    def remove(self, incarnation: int) -> None:
        """Remove the engine of an incarnation, if there is one. Raises OSError."""
        self._remove(self._folder_of(incarnation))

    def _folder_of(self, incarnation: int) -> Path:
        return self.folder / (ENGINE_FOLDER if incarnation <= 1 else f"{ENGINE_FOLDER}-{incarnation}")

    def _row(self) -> bytes:
        return f"{self._identity.cluster_id} {self._identity.node} {self._identity.incarnation}".encode()

    def _check(self, engine: DurableEngine) -> None:
        identity = self._identity
        found = engine.get(IDENTITY_KEY)
        place = self._folder_of(identity.incarnation)
        if found is None and identity.formatted and not identity.learning:
            raise Corrupt(f"{place} holds an empty database, but {identity.node} has been formatted before")
        if found is not None and found != self._row():
            raise Refused(
                f"{place} holds the database of {found.decode()}, not of {self._row().decode()}: put each folder back "
                "in its place"
            )
