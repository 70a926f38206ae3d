"""The fencing token of a cold node: the greatest epoch of a run of the sink that it has heard of.

Runs take their epochs through Paxos (`run_record.py`) and send them along with what they write and remove. A node
that has heard of a later one refuses: so once a run has told its epoch to all nodes, nothing that an earlier run still
does, or the network still carries, can add a file or remove one. That is a check more; what keeps data safe is that
links are written under a condition. So an epoch file that is damaged, or lost with its disk, counts as none, and the
next run tells its epoch again.

The epoch is on disk before anything is done by it: a text file of the number and its CRC32C.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import Unavailable, VersionConflict
from .block import checksum
from .files import Files

EPOCH_FILE = "sink-epoch"
_PART = ".part"
_MAX_BYTES = 64
_WAIT_S = 30.0  # for work of earlier epochs to end


class EpochFence:
    """Admits work by epoch. All methods block and may be called from several threads."""

    def __init__(self, files: Files, folder: Path) -> None:
        """`folder`: of the node. The last epoch is read at the first use."""
        self._files = files
        self._folder = folder
        self._epoch: int | None = None
        self._changed = threading.Condition()
        self._at_work: dict[int, int] = {}

    @property
    def epoch(self) -> int:
        """The greatest epoch heard of, 0 for none."""
        with self._changed:
            return self._known()

    @contextmanager
    def admitted(self, epoch: int) -> Iterator[None]:
        """Do work of an epoch; 0 for work of no run. A later epoch is first written down.

        Work of earlier epochs that is under way ends before. Raises VersionConflict when a later epoch is known,
        Unavailable when the epoch can't be written down.
        """
        if not epoch:
            yield
            return
        self._admit(epoch)
        try:
            yield
        finally:
            with self._changed:
                self._at_work[epoch] -= 1
                if not self._at_work[epoch]:
                    del self._at_work[epoch]
                self._changed.notify_all()

    def _admit(self, epoch: int) -> None:
        with self._changed:
            known = self._known()
            if epoch < known:
                raise VersionConflict(f"a run of the sink with epoch {known} has begun, this is {epoch}", version=known)
            if epoch > known:
                self._epoch = epoch  # from here on earlier ones are refused
                self._write(epoch)
                if not self._changed.wait_for(lambda: min(self._at_work, default=epoch) >= epoch, _WAIT_S):
                    raise Unavailable("a disk hangs at work of an earlier run of the sink", retry_after_s=1.0)
            self._at_work[epoch] = self._at_work.get(epoch, 0) + 1

    def _known(self) -> int:
        if self._epoch is None:
            self._epoch = self._read()
        return self._epoch

    def _read(self) -> int:
        try:
            with self._files.open(self._folder / EPOCH_FILE) as opened:
                number, _, crc = opened.read(_MAX_BYTES, 0).partition(b" ")
            return int(number) if int(crc, 16) == checksum(number) else 0
        except (OSError, ValueError):
            return 0  # none, or damaged: see above

    def _write(self, epoch: int) -> None:
        number = str(epoch).encode()
        part = self._folder / (EPOCH_FILE + _PART)
        try:
            self._files.make_folder(self._folder)
            with self._files.open(part, create=True, empty=True) as opened:
                opened.write(number + b" " + f"{checksum(number):08x}".encode(), 0)
                opened.sync()
            self._files.rename(part, self._folder / EPOCH_FILE)
            self._files.sync_folder(self._folder)
        except OSError as error:
            self._epoch = None  # what is on disk counts
            reason = f"the epoch of the sink can't be written to {self._folder}: {error.strerror}"
            raise Unavailable(reason, retry_after_s=1.0) from error
