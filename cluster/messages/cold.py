"""Whoever reads, writes or mends cold files -> cold node."""

from __future__ import annotations

from .base import Request

# States of a disk.
DISK_SERVES = 0
DISK_FAILED = 1  # it did not read or write, and was taken out
DISK_ABSENT = 2  # its folder is empty or not its own: nothing is mounted there, or another disk
DISK_REPLACING = 3  # it is being filled from a peer; takes no files of the sink


class BlockRead(Request):
    """Read `length` bytes at `offset` of `file` and check them against `crc` (CRC32C).

    `owner`: only the rows of this owner are wanted, of a block of `format`; b"" for the block as it is. `timeout_ms`:
    how long whoever asks waits for it in all; what no disk thread has taken by then is not read. 0: for ever.
    """

    file: str
    offset: int
    length: int
    crc: int
    owner: bytes = b""
    format: int = 0
    timeout_ms: int = 0


class BlockBytes(Request):
    """`part`: the data is a block of its own, with the rows of the owner that was asked for; `crc`: its CRC32C."""

    data: bytes
    part: bool = False
    crc: int = 0


class FileWrite(Request):
    """A piece of a new file at `offset`. The last piece makes it durable under its name, if `crc` agrees.

    `epoch`: of the run of the sink that writes it, 0 for whoever is none. A node refuses epochs lower than one it
    has seen.
    """

    file: str
    disk: int
    offset: int
    data: bytes
    last: bool
    crc: int  # CRC32C of the whole file, as the writer computed it
    epoch: int = 0


class FileWritten(Request):
    """`crc`: CRC32C of the whole file as re-read from the disk (0 before the last piece)."""

    size: int
    crc: int


class FileList(Request):
    """Ask for the files of a cold node whose names come after `cursor`."""

    cursor: str


class Files(Request):
    """Names, sizes (int64), ages in seconds (int64); `more` tells that the list goes on."""

    names: list[str]
    sizes: bytes
    ages_s: bytes
    more: bool


class FileRemove(Request):
    """Remove files. Answered by `Pong`; a file that is not there is no error. `epoch`: as in `FileWrite`; without
    files it makes the epoch known."""

    files: list[str]
    epoch: int = 0


class FileInfo(Request):
    """Ask what a cold file holds, as its own footer says."""

    file: str


class FileFacts(Request):
    """Answer to `FileInfo`. `table`: whose rows they are; `buckets`: uint32, increasing; `blocks`: how many."""

    size: int
    disk: int
    table: bytes
    buckets: bytes
    blocks: int


class FileRead(Request):
    """Read a piece of a file as it is, to copy the file as a whole."""

    file: str
    offset: int
    length: int


class FilePiece(Request):
    """Answer to `FileRead`. `size`: of the whole file, `disk`: the ordinal of its disk, `crc`: of `data`."""

    size: int
    disk: int
    crc: int
    data: bytes


class AskDisks(Request):
    """How are your disks?"""


class Disks(Request):
    """Answer to `AskDisks`, by ordinal. `states`: a byte each, `DISK_SERVES` or why not; `free`: int64, bytes.

    `reasons`: in words, "" for a disk that serves.
    """

    states: bytes
    free: bytes
    reasons: list[str]


class AskPlaces(Request):
    """Where do these files lie? For whoever runs on the node's own machine, and may read them in place."""

    files: list[str]


class Places(Request):
    """Answer to `AskPlaces`. `host`: identity of the node's machine; `paths`: absolute, "" where there is none."""

    host: str
    paths: list[str]


class DiskList(Request):
    """Ask for the files of one disk whose names come after `cursor`. Answered by `Files` while the disk serves."""

    disk: int
    cursor: str


class DiskReplace(Request):
    """Format the folder of a disk and copy all its files from the peers. Answered by `Pong` once it has begun.

    `erase`: remove what is there first.
    """

    disk: int
    erase: bool


class DiskRetry(Request):
    """Look again at a disk that is out. Answered by `Disks`."""

    disk: int


class ScrubNow(Request):
    """Read all files at once and check them, at so many MB/s (0 = as configured). Answered by `Pong` when it has begun.

    A round that is under way goes on, at this rate. `StatusRequest` tells how far it is.
    """

    mb_per_s: float
