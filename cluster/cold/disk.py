"""One disk of a cold node: its folder, its state, and when it is taken out.

A disk that fails to read or write is taken out at once and as a whole, whatever the operation was: its peers have the
same files, and a disk that has begun to fail must not be asked about each of them. A full disk has not failed, nor has
one with a damaged block, nor the process that has too many open files.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..errors import Unavailable
from ..messages.cold import DISK_ABSENT, DISK_FAILED, DISK_REPLACING, DISK_SERVES
from .disk_marks import MARK_FILE, Mark
from .files import Files

STATES = {DISK_SERVES: "serving", DISK_FAILED: "failed", DISK_ABSENT: "absent", DISK_REPLACING: "replacing"}
"""Names of the states, as `status` shows them."""

DISK_REASON = "disk"
"""Field `reason` of the Unavailable of a disk that is out: the node itself is well, another replica has the file."""

RETRY_AFTER_S = 1.0  # after an error that passes
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_NOT_THE_DISK = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EINTR, errno.EAGAIN, errno.EISDIR, errno.ELOOP}
)

logger = logging.getLogger(__name__)


class StoredFile(NamedTuple):
    """A file of this node. `disk`: ordinal; `modified`: seconds since 1970."""

    disk: int
    size: int
    modified: float


@dataclass(slots=True)
class Part:
    """A file that is being written. `touched`: monotonic seconds."""

    disk: int
    size: int
    touched: float


class Disk:
    """A disk and what is known of it. `on_failure(disk)`: called once when it is taken out.

    `state`: one of `STATES`; `reason`: why it does not serve, "" if it does. `away`: names of files that lie on it, or
    should, and can't be read; None when nobody knows. `parts`: files being written, guarded by `writing`.
    `free_bytes`: as last measured.
    """

    def __init__(self, ordinal: int, folder: Path, files: Files, on_failure: Callable[[Disk], None]) -> None:
        self.ordinal = ordinal
        self.folder = folder
        self.state = DISK_ABSENT
        self.reason = "it is being opened"
        self.mark: Mark | None = None
        self.files = 0
        self.nbytes = 0
        self.free_bytes = 0
        self.away: set[str] | None = None
        self.writing = threading.Lock()  # one writer at a time: pieces of a file come in order
        self.parts: dict[str, Part] = {}
        self._system = files
        self._on_failure = on_failure
        self._judging = threading.Lock()

    @property
    def readable(self) -> bool:
        """Whether files that are on it may be read."""
        return self.state in (DISK_SERVES, DISK_REPLACING)

    def set_state(self, state: int, reason: str = "") -> None:
        """Change what the disk does."""
        self.state, self.reason = state, reason

    def out(self) -> Unavailable:
        """The error of whoever needs this disk while it does not serve."""
        return Unavailable(f"disk {self.ordinal} is {STATES[self.state]}: {self.reason}", reason=DISK_REASON)

    def require(self, *, filling: bool = False) -> None:
        """Raises Unavailable unless the disk takes files. `filling`: also while it is being filled."""
        if self.state != DISK_SERVES and not (filling and self.state == DISK_REPLACING):
            raise self.out()

    def check_mounted(self) -> None:
        """Raises OSError (ENODEV) unless the marker is there: else nothing may be written to the folder."""
        if not self._system.exists(self.folder / MARK_FILE):
            raise OSError(errno.ENODEV, "its marker has vanished: it is not mounted any more")

    def fail(self, reason: str) -> None:
        """Take the disk out."""
        with self._judging:
            if self.state == DISK_FAILED:
                return
            self.set_state(DISK_FAILED, reason)
        logger.error("disk %d (%s) is taken out: %s", self.ordinal, self.folder, reason)
        self._on_failure(self)

    @contextmanager
    def work(self, what: str, *, may_miss: bool = False) -> Iterator[None]:
        """Around what needs the disk: an OSError becomes Unavailable, and takes the disk out if it is the disk's.

        `what`: in words, after "can't". `may_miss`: a FileNotFoundError goes on as it is while the disk is there.
        """
        if not self.readable:
            raise self.out()
        try:
            yield
        except OSError as error:
            cause = self._cause(error)
            if not isinstance(cause, FileNotFoundError):
                raise self._judge(what, cause) from error
            if may_miss:
                raise
            raise Unavailable(f"can't {what}: {cause.strerror}", retry_after_s=RETRY_AFTER_S) from error

    def _cause(self, error: OSError) -> OSError:
        """The same error, or where a file is not there the reason why nothing is."""
        if isinstance(error, FileNotFoundError):
            try:
                self.check_mounted()
            except OSError as vanished:
                return vanished
        return error

    def _judge(self, what: str, error: OSError) -> Unavailable:
        told = error.strerror or str(error)
        if error.errno in _FULL:
            reason = f"can't {what} in {self.folder}: the disk is full: free some space or add disks"
            return Unavailable(reason, retry_after_s=RETRY_AFTER_S)
        if error.errno in _NOT_THE_DISK:
            return Unavailable(f"can't {what} in {self.folder}: {told}", retry_after_s=RETRY_AFTER_S)
        self.fail(f"I/O error: {told} (when it was to {what})")
        return self.out()
