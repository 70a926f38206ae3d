"""The disks of one cold node: where they are, which of them are its own, formatting and replacing them.

What a disk may be used for is decided by its marker and the node's register (`disk_marks.py`) alone; files are the
business of `store.py`. All methods block.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import InvalidRequest, Unavailable
from ..messages.cold import DISK_ABSENT, DISK_FAILED, DISK_REPLACING, DISK_SERVES
from .disk import RETRY_AFTER_S, Disk
from .disk_marks import (
    ERASE,
    FILL,
    NOTHING,
    TAKE,
    Damaged,
    Mark,
    Owner,
    Slot,
    first_register,
    new_disk_id,
    read_mark,
    read_register,
    write_mark,
    write_register,
)
from .files import Files

FILLING = "its files are being copied from the other replicas"


class NotOurs(Exception):
    """The folder of a disk must not be used; the message says why and what to do."""


def disk_folders(folder: Path, disks: int, disk_dirs: Sequence[Path] | None = None) -> list[Path]:
    """Folder of each disk of a cold node by ordinal. `folder`: its data folder, whose name is that of the node.

    `disk_dirs`: one for each disk, shared by the nodes of a machine; None for folders below `folder`.
    """
    if disk_dirs is None:
        return [folder / f"disk-{ordinal}" for ordinal in range(disks)]
    return [Path(place) / folder.name for place in disk_dirs]


class DiskSet:
    """Disks by ordinal. `on_failure(disk)`: told of each one that is taken out."""

    def __init__(
        self,
        folder: Path,
        disks: int,
        disk_dirs: Sequence[Path] | None,
        owner: Owner,
        files: Files,
        on_failure: Callable[[Disk], None],
    ) -> None:
        """`folder`: the node's data folder, for the register. Raises InvalidRequest."""
        if disks < 1:
            raise InvalidRequest(f"disks={disks}: pass 1 or more")
        if disk_dirs is not None and len(disk_dirs) != disks:
            raise InvalidRequest(
                f"disk_dirs names {len(disk_dirs)} folders, but there are {disks} disks: name each one"
            )
        self._folder = folder
        self._own_folders = disk_dirs is None
        self._owner = owner
        self._files = files
        self._on_failure = on_failure
        self._lock = threading.Lock()  # guards the register
        self._slots: list[Slot] = []
        self.disks = [
            Disk(n, place, files, on_failure) for n, place in enumerate(disk_folders(folder, disks, disk_dirs))
        ]

    def __getitem__(self, ordinal: int) -> Disk:
        """The disk of an ordinal. Raises InvalidRequest."""
        if not 0 <= ordinal < len(self.disks):
            raise InvalidRequest(f"disk={ordinal}: this node has disks 0 to {len(self.disks) - 1}")
        return self.disks[ordinal]

    def begin(self, *, lost: bool) -> None:
        """Read the register, or make it. `lost`: as in `first_register`. Raises Unavailable, InvalidRequest."""
        try:
            slots = read_register(self._files, self._folder)
            if slots is None:
                folders = [disk.folder for disk in self.disks]
                self._files.make_folder(self._folder)
                slots = first_register(self._files, self._owner, folders, lost=lost)
                write_register(self._files, self._folder, slots)
        except Damaged as error:
            raise InvalidRequest(f"{error}: restore it from a copy, or remove it while all disks are mounted") from None
        except OSError as error:
            reason = f"can't keep the list of disks in {self._folder}: {error.strerror}"
            raise Unavailable(reason, retry_after_s=RETRY_AFTER_S) from error
        if len(slots) != len(self.disks):
            raise InvalidRequest(
                f"{self._folder} belongs to a node with {len(slots)} disks, the configuration has {len(self.disks)}: "
                "cold.disks can't change"
            )
        self._slots = slots

    def renew(self, ordinal: int) -> Disk:
        """Another object for a disk: threads that hang in the former one keep its locks."""
        old = self[ordinal]
        fresh = Disk(ordinal, old.folder, self._files, self._on_failure)
        fresh.away = old.away
        fresh.free_bytes = old.free_bytes
        self.disks[ordinal] = fresh
        return fresh

    def identify(self, disk: Disk) -> int:
        """Find out whether the disk is the node's own, and format it if that is pending.

        The state in which it may be used: DISK_SERVES or DISK_REPLACING. Raises NotOurs, Damaged, OSError.
        """
        slot = self._slots[disk.ordinal]
        mark = read_mark(self._files, disk.folder)
        if slot.pending == ERASE:
            if mark is None or mark.disk_id != slot.disk_id:
                self._empty(disk)
                mark = None
        elif mark is not None:
            self._check_mark(disk, mark, slot)
        elif slot.pending == NOTHING:
            raise NotOurs(
                f"{disk.folder} has no marker of this disk: nothing is mounted there, or an empty disk. Mount the disk "
                f"and `timetier disk retry {self._owner.node} {disk.ordinal}`; if it is lost, "
                f"`timetier disk replace {self._owner.node} {disk.ordinal}`"
            )
        if mark is None:
            mark = self._format(disk, slot)
        if slot.pending != NOTHING or slot.disk_id != mark.disk_id:
            self._settle(disk.ordinal, mark.disk_id)
        disk.mark = mark
        return DISK_REPLACING if mark.rebuilding else DISK_SERVES

    def take_in(self, disk: Disk) -> bool:
        """Identify a disk and give it its state. Whether it may be used; if not, its `reason` says why."""
        try:
            state = self.identify(disk)
        except NotOurs as error:
            disk.set_state(DISK_ABSENT, str(error))
        except Damaged as error:
            disk.set_state(DISK_FAILED, f"{error}: `timetier disk replace` formats and fills it again")
        except Unavailable as error:
            disk.set_state(DISK_FAILED, error.message)
        except OSError as error:
            disk.fail(f"I/O error: {error.strerror or error} (when it was opened)")
        else:
            disk.set_state(state, FILLING if state == DISK_REPLACING else "")
            return True
        return False

    def replace(self, ordinal: int, *, erase: bool) -> Disk:
        """Have another disk in the place of the former one: `identify` will format it and ask for it to be filled.

        `erase`: remove what is in its folder. Raises InvalidRequest when the folder holds files, or the disk serves,
        and they were not to be erased; Unavailable.
        """
        disk = self[ordinal]
        if disk.state == DISK_SERVES and not erase:
            raise InvalidRequest(f"disk {ordinal} serves: --erase removes what is on it and copies everything again")
        try:
            self._require_mount(disk)
            present = self._names(disk)
            if present and not erase:
                raise InvalidRequest(
                    f"{disk.folder} holds {len(present)} files, such as {present[0]}: --erase removes them"
                )
            self._note(ordinal, Slot(new_disk_id(), ERASE if erase else FILL))
        except NotOurs as error:
            raise InvalidRequest(str(error)) from None
        except OSError as error:
            told = error.strerror or str(error)
            raise Unavailable(f"disk {ordinal} can't be replaced: {disk.folder}: {told}") from error
        return self.renew(ordinal)

    def end_rebuild(self, disk: Disk) -> None:
        """Note durably that all files are there. Raises OSError."""
        assert disk.mark is not None, "a disk that is filled has a marker"
        mark = Mark(*self._owner, disk.ordinal, disk.mark.disk_id, False)
        disk.check_mounted()
        write_mark(self._files, disk.folder, mark)
        disk.mark = mark

    # ------------------------------------------------------------ steps

    def _check_mark(self, disk: Disk, mark: Mark, slot: Slot) -> None:
        if not mark.is_of(self._owner, disk.ordinal):
            whose = f"disk {mark.ordinal} of {mark.node}"
            if mark.cluster_id != self._owner.cluster_id:
                whose += f" of the cluster {mark.cluster_id}"
            raise NotOurs(
                f"{disk.folder} is {whose}, not disk {disk.ordinal} of {self._owner.node}: mount the right one, or "
                "mend cold.disk_dirs"
            )
        if slot.disk_id not in ("", mark.disk_id) and slot.pending != TAKE:
            raise NotOurs(
                f"{disk.folder} is an earlier disk {disk.ordinal} of {self._owner.node}, which was replaced: mount the "
                f"right one, or `timetier disk replace {self._owner.node} {disk.ordinal} --erase`"
            )

    def _format(self, disk: Disk, slot: Slot) -> Mark:
        self._require_mount(disk)
        self._files.make_folder(disk.folder)
        filling = slot.pending != TAKE
        if filling and (present := self._names(disk)):
            raise NotOurs(
                f"{disk.folder} is to be filled from the other replicas, but holds {len(present)} files, such as "
                f"{present[0]}: `timetier disk replace {self._owner.node} {disk.ordinal} --erase` removes them"
            )
        mark = Mark(*self._owner, disk.ordinal, slot.disk_id, filling)
        write_mark(self._files, disk.folder, mark)
        self._files.sync_folder(disk.folder.parent)
        return mark

    def _require_mount(self, disk: Disk) -> None:
        """A folder that the operator named must be there: it may be a mount point."""
        if not self._own_folders and not self._files.exists(disk.folder.parent):
            raise NotOurs(f"{disk.folder.parent} does not exist: mount a disk there, or mend cold.disk_dirs")

    def _names(self, disk: Disk) -> list[str]:
        try:
            return self._files.list_files(disk.folder)
        except FileNotFoundError:
            return []

    def _empty(self, disk: Disk) -> None:
        for name in self._names(disk):
            self._files.remove(disk.folder / name)

    def _settle(self, ordinal: int, disk_id: str) -> None:
        self._note(ordinal, Slot(disk_id))

    def _note(self, ordinal: int, slot: Slot) -> None:
        with self._lock:
            slots = list(self._slots)
            slots[ordinal] = slot
            write_register(self._files, self._folder, slots)
            self._slots = slots
