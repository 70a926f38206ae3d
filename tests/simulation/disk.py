"""Disks that outlive the processes that use them, and lose what was not fsync'd.

`SimDisk` is the disk of one node. It counts operations, so that a crash can fall before or after any of them; it may
be full, slow or broken. On it lie the storage engine's folder (`EngineFolder`), the node's identity, and the cold
tier's files (`cold_files.py`).
"""

from __future__ import annotations

import copy
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

from timetier.cluster.errors import Corrupt
from timetier.cluster.identity import _FIELDS, Identity, Refused
from timetier.cluster.storage.engine import EngineDamaged, EngineFailed

from .loop import Crashed, Life

Batch = list[tuple[bytes, bytes | None]]

ROOMY_BYTES = 1 << 40


class SimDisk:
    """The disk of one node. `on_crash` ends the life that uses it; what was not synced is lost by `power_off`."""

    def __init__(self, name: str, random: Random) -> None:
        self.name = name
        self.random = random
        self.life: Life | None = None
        self.on_crash: Callable[[str], None] = lambda _: None
        self.crash_after: int | None = None  # points of operations until the planned crash
        self.full = False
        self.failing = False
        self.operations = 0
        self.engines: dict[Path, EngineFolder] = {}
        self.engine = EngineFolder()  # the one that was opened last
        self.identity: dict[str, Any] | None = None
        self.losable: list[Callable[[], None]] = []  # other residents that lose what is not synced

    def point(self, life: Life, what: str) -> None:
        """A point right before or after an operation. Raises Crashed if the life ends here, or has ended before."""
        if life.dead or self.life is not life:
            raise Crashed
        if self.crash_after is not None:
            self.crash_after -= 1
            if self.crash_after <= 0:
                self.crash_after = None
                self.on_crash(what)
                raise Crashed

    def check(self, life: Life, what: str, *, writes: bool = True) -> None:
        """A point before an operation that fails on a broken or a full disk. Raises EngineFailed, Crashed."""
        self.operations += 1
        self.point(life, what)
        if self.failing:
            raise EngineFailed(f"simulated I/O error: {what}")
        if writes and self.full:
            raise EngineFailed(f"simulated full disk: {what}")

    def power_off(self) -> None:
        """Lose what was not synced; any prefix of it may have reached the disk."""
        for folder in self.engines.values():
            folder.crash(self.random)
        for lose in self.losable:
            lose()

    def free_bytes(self, _: Path) -> int:
        """Room on the disk."""
        return 0 if self.full else ROOMY_BYTES

    def copy_folder(self) -> Folder:
        """The durable content of a storage node's folder, as a backup would take it."""
        return {path: folder.copy() for path, folder in self.engines.items()}, copy.deepcopy(self.identity)

    def put_folder(self, saved: Folder) -> None:
        """Put an earlier copy in the place of the folder."""
        self.engines, self.identity = saved

    def wipe(self) -> None:
        """Lose everything."""
        self.engines, self.identity = {}, None

    def remove_engine(self, path: Path) -> None:
        """Remove the engine in a folder, if there is one."""
        self.operations += 1
        if self.life is not None:
            self.point(self.life, "remove engine")
        self.engines.pop(path, None)


class EngineFolder:
    """What an engine has on its disk. `unsynced`: batches that were handed over and not yet synced.

    `damaged`: a record of the log is, so it can't be opened. `damaged_rows`: can't be read.
    """

    def __init__(self) -> None:
        self.damaged = False
        self.damaged_rows: set[bytes] = set()
        self.synced: dict[bytes, bytes] = {}
        self.logged = 0  # batches in the log behind which nothing was lost
        self.unsynced: list[Batch] = []

    def copy(self) -> EngineFolder:
        """The durable part."""
        copied = EngineFolder()
        copied.damaged, copied.damaged_rows = self.damaged, set(self.damaged_rows)
        copied.synced, copied.logged = dict(self.synced), self.logged
        return copied

    def settle(self, batches: int) -> None:
        """The first `batches` unsynced ones have reached the disk."""
        synced = self.synced
        for batch in self.unsynced[:batches]:
            self.logged += 1
            for key, value in batch:
                if value is None:
                    synced.pop(key, None)
                else:
                    synced[key] = value
        del self.unsynced[:batches]

    def crash(self, random: Random) -> None:
        """Any prefix of what was not synced has reached the disk; a record that is torn is dropped by the engine."""
        if self.unsynced:
            self.settle(random.randint(0, len(self.unsynced)))
            self.unsynced = []

    def flip_bit(self) -> bool:
        """Flip a bit in a record of the log that is not its last one. False if there is none."""
        if self.logged >= 2:
            self.damaged = True
        return self.damaged

    def flip_row_bit(self, random: Random) -> bool:
        """Flip a bit where a row lies. False if there is none."""
        if self.synced:
            self.damaged_rows.add(random.choice(sorted(self.synced)))
        return bool(self.damaged_rows)


Folder = tuple[dict[Path, EngineFolder], dict[str, Any] | None]
"""A storage node's folder: engines by path, and the identity."""


class SimEngine:
    """Implements `DurableEngine` on an `EngineFolder`, for one life."""

    def __init__(self, disk: SimDisk, life: Life, path: Path, *, create: bool) -> None:
        disk.check(life, "open engine")
        folder = disk.engines.get(path)
        if folder is None:
            folder = EngineFolder()
            if create:
                disk.engines[path] = folder
        if path not in disk.engines:
            raise Corrupt(f"{disk.name} holds no database, but this replica has been formatted before")
        if folder.damaged:
            raise Corrupt(f"the database of {disk.name} can't be opened: checksum mismatch in the log")
        disk.engine = folder
        self.sequence = 1
        self._disk = disk
        self._life = life
        self._folder = folder
        self._pending: Batch = []
        self._rows = dict(folder.synced)
        for batch in folder.unsynced:  # of an engine that was abandoned; the operating system still has them
            for key, value in batch:
                if value is None:
                    self._rows.pop(key, None)
                else:
                    self._rows[key] = value
        self._names = sorted(self._rows)
        self._open = True
        self.on_commit: Callable[[Batch], None] | None = None  # for checks
        self.before_commit: Callable[[], None] = lambda: None
        self._under_way = 0  # batches that the flush under way will make durable
        disk.point(life, "opened engine")

    def put(self, key: bytes, value: bytes) -> None:
        self._pending.append((key, value))

    def put_all(self, keys: Iterable[bytes], values: Iterable[bytes]) -> None:
        self._pending.extend(zip(keys, values, strict=True))

    def delete(self, key: bytes) -> None:
        self._pending.append((key, None))

    def commit(self) -> int:
        self.before_commit()
        if self._pending:
            self._use("write")
            if self.on_commit is not None:
                self.on_commit(self._pending)
            rows, names = self._rows, self._names
            for key, value in self._pending:
                if value is None:
                    if rows.pop(key, None) is not None:
                        del names[bisect_left(names, key)]
                else:
                    if key not in rows:
                        insort(names, key)
                    rows[key] = value
            self._folder.unsynced.append(self._pending)
            self._pending = []
            self.sequence += 1
            self._disk.point(self._life, "written")
        return self.sequence - 1

    def work_begins(self, what: str) -> None:
        """A thread begins with one of the methods: a flush covers only what was committed before it began."""
        if what == "sync":
            self._under_way = len(self._folder.unsynced)

    def sync(self) -> None:
        batches, self._under_way = self._under_way or len(self._folder.unsynced), 0
        self._use("sync")
        self._folder.settle(batches)
        self._disk.point(self._life, "synced")

    def get(self, key: bytes) -> bytes | None:
        self.commit()
        self._may_read([key])
        return self._rows.get(key)

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        self.commit()
        self._may_read(keys)
        return [self._rows.get(key) for key in keys]

    def scan(self, low: bytes, high: bytes, *, reverse: bool = False) -> Iterator[tuple[bytes, bytes]]:
        self.commit()
        names = self._names[bisect_left(self._names, low) : bisect_left(self._names, high)]
        if reverse:
            names.reverse()
        self._may_read(names)
        rows = self._rows
        return iter([(name, rows[name]) for name in names])

    def peek(self, key: bytes) -> bytes | None:
        """Value of one row, pending writes included; unlike `get` it changes nothing."""
        for name, value in reversed(self._pending):
            if name == key:
                return value
        return self._rows.get(key)

    def peek_range(self, low: bytes, high: bytes) -> dict[bytes, bytes]:
        """Rows with low <= key < high, pending writes included; unlike `scan` it changes nothing."""
        names = self._names[bisect_left(self._names, low) : bisect_left(self._names, high)]
        rows = {name: self._rows[name] for name in names}
        for name, value in self._pending:
            if low <= name < high:
                if value is None:
                    rows.pop(name, None)
                else:
                    rows[name] = value
        return rows

    def size_bytes(self) -> int:
        return sum(len(key) + len(value) for key, value in self._rows.items())

    def abandon(self) -> None:
        """Let go of the folder. What could not be synced may be gone: a failed fsync promises nothing."""
        if self._open:
            self._open = False
            self._disk.point(self._life, "abandon engine")
            self._folder.crash(self._disk.random)

    def close(self) -> None:
        self.commit()
        self.sync()
        self._open = False

    def _use(self, what: str) -> None:
        if not self._open:
            raise EngineFailed("the engine is closed")
        self._disk.check(self._life, what)

    def _may_read(self, keys: Sequence[bytes]) -> None:
        if self._life.dead:
            raise Crashed
        if not self._open:
            raise EngineFailed("the engine is closed")
        if self._folder.damaged_rows and not self._folder.damaged_rows.isdisjoint(keys):
            raise EngineDamaged("simulated damage: a row's checksum is wrong")


class SimIdentity(Identity):
    """The production identity, kept on a `SimDisk`."""

    def __init__(self, disk: SimDisk, life: Life, folder: Path, fields: dict[str, Any], *, fresh: bool) -> None:
        super().__init__(folder, -1, fields, fresh=fresh)
        self._lock = None
        self._disk = disk
        self._life = life
        self._random_bits = disk.random.getrandbits

    def _save(self) -> None:
        self._disk.operations += 1
        self._disk.point(self._life, "save identity")
        if self._disk.failing or self._disk.full:
            raise OSError("simulated I/O error: save identity")
        self._disk.identity = {name: copy.copy(getattr(self, name)) for name in _FIELDS}
        self._disk.point(self._life, "saved identity")


def open_sim_identity(
    disk: SimDisk, life: Life, cluster_id: str, *, may_format: bool, may_learn: bool = False
) -> SimIdentity:
    """As `identity.open_identity`, on a simulated disk. Raises Refused, OSError."""
    fields = copy.deepcopy(disk.identity)
    if fields is None and not (may_format or may_learn):
        raise Refused(f"the folder of {disk.name} is empty, but it has been formatted before")
    learning = not may_format
    fresh: dict[str, Any] = {
        "cluster_id": cluster_id,
        "node": disk.name,
        "incarnation": 0 if learning else 1,
        "boot": 0,
        "token": 0,
        "past": [],
        "formatted": False,
        "learning": learning,
    }
    identity = SimIdentity(disk, life, Path("/") / disk.name, fields or fresh, fresh=fields is None)
    identity.begin_life()
    return identity
