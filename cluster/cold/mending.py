"""How one damaged block, or one file that is damaged or lost, is made whole again.

First the node finds out what the file should be: its *anatomy* (`pieces.py`), from its own copy or from the first
replica whose tail is right and bears the file's name. With that every piece can be judged alone, so each is taken from
whoever has it right: this node's own copy, or any of its peers. Copies that are damaged in different places still give
a whole file. What differs is written in place; a file that is not here, has another size or is another file is
assembled beside and then put in its place.

A file without a seal (an old one) can't be judged alone: of its head and tail those count that two copies agree on, or
that the only copy has which holds the block that a link names.

A peer is asked for raw bytes, which has no side effects there: two nodes that both lack a file do not send each other
in circles.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import google_crc32c

from ..carriers.base import CallError, Carrier
from ..errors import Corrupt, TimeTierError, Unavailable
from ..messages import FilePiece, FileRead, raise_failure
from .block import checksum
from .disk_lane import DiskLanes
from .pieces import GUESSED_TAIL_BYTES, Anatomy, Piece, parse_end, parts_to_read
from .store import ColdStore

MISSING = "missing"  # `reason` of the Corrupt of a node that has no such file
_RUN_BYTES = 4 << 20  # that are asked for at a time
_PEER_TIMEOUT_S = 10.0
_DISK_TIMEOUT_S = 60.0  # of one step: a disk that hangs holds up nobody but itself
_SLOWEST_BYTES_PER_S = 2e6  # of a disk that is busy otherwise
T = TypeVar("T")

BLOCK, FILE, NOTHING = "blocks_repaired", "files_repaired", "repairs_needless"
"""What a repair has done, named as it is counted."""


class Gone(Exception):
    """No peer has the file: it was removed, or nobody can help."""


class Repair(NamedTuple):
    """Bytes that are damaged here, and what they should be.

    `whole`: the file as such is missing, truncated or another one; then `offset`, `length` and `crc` are those of a
    block that it must have, or `length` is 0. `sure`: the file should be here; else that is only guessed from what the
    peers have, and it is not brought back when one of them has it no more.
    """

    file: str
    offset: int
    length: int
    crc: int
    whole: bool
    sure: bool = True

    @classmethod
    def of_file(cls, file: str, *, sure: bool = True) -> Repair:
        """Of a file of which nothing is known but its name."""
        return cls(file, 0, 0, 0, True, sure)

    @property
    def place(self) -> tuple[str, int]:
        """What is repaired: repairs of one place are one."""
        return self.file, -1 if self.whole else self.offset

    def is_met_by(self, anatomy: Anatomy) -> bool:
        """Whether a file with this anatomy is the one that is meant."""
        known = [anatomy.head, *anatomy.blocks]
        return not self.length or any(p[:2] == self[1:3] and p.crc in (None, self.crc) for p in known)


class DiskWork:
    """Upkeep of the files of `store`, in threads of its own for each disk."""

    def __init__(self, store: ColdStore, lanes: DiskLanes) -> None:
        self.store = store
        self._lanes = lanes

    async def on(self, disk: int, work: Callable[[ColdStore], T], nbytes: int = 0) -> T:
        """Result of `work` in a thread of this disk. Raises Unavailable if that takes too long.

        `nbytes`: that it reads in one go, for which it has time.
        """
        timeout_s = _DISK_TIMEOUT_S + nbytes / _SLOWEST_BYTES_PER_S
        try:
            return await asyncio.wait_for(self._lanes.run(lambda: work(self.store), disk=disk), timeout_s)
        except TimeoutError:
            error = Unavailable(f"disk {disk} does not answer in {timeout_s:.0f} s")
            if not self.store.disk(disk).readable:  # it was taken out: its thread may never come back
                self._lanes.release(disk, error)
            raise error from None

    async def on_file(self, file: str, work: Callable[[ColdStore], T]) -> T:
        """The same on the disk that has the file. Raises Corrupt with reason "missing", too."""
        return await self.on(self.store.find(file).disk, work)


class _Source(Protocol):
    """One copy of a file. All methods raise TimeTierError."""

    name: str

    async def read(self, offset: int, length: int) -> bytes:
        """Bytes of it as they are, fewer at its end."""

    async def size(self) -> int:
        """Bytes that it has."""


class OwnCopy:
    """The copy of this node."""

    name = "this node"

    def __init__(self, work: DiskWork, file: str) -> None:
        self._work, self._file = work, file

    async def read(self, offset: int, length: int) -> bytes:
        return (await self._read(offset, length))[1]

    async def size(self) -> int:
        return (await self._read(0, 1))[0]

    async def write(self, offset: int, data: bytes) -> None:
        """Put good bytes in place of damaged ones."""
        await self._work.on_file(self._file, lambda store: store.restore(self._file, offset, data))

    async def _read(self, offset: int, length: int) -> tuple[int, bytes]:
        return await self._work.on_file(self._file, lambda store: store.read_from_disk(self._file, offset, length))


class _Peer:
    """The copy of another replica. `disk`: the ordinal of its disk, -1 until it has answered."""

    def __init__(self, carrier: Carrier, name: str, file: str, silent: set[str]) -> None:
        self.name = name
        self.disk = -1
        self._carrier, self._file, self._silent = carrier, file, silent

    async def read(self, offset: int, length: int) -> bytes:
        return (await self._piece(offset, length)).data

    async def size(self) -> int:
        return (await self._piece(0, 1)).size

    async def _piece(self, offset: int, length: int) -> FilePiece:
        """Bytes of a peer's file, intact as sent."""
        try:
            answer = await self._carrier.call(self.name, FileRead(self._file, offset, length), _PEER_TIMEOUT_S)
        except (CallError, TimeoutError) as error:
            self._silent.add(self.name)
            raise Unavailable(f"{self.name} does not answer: {error or 'time is over'}") from None
        self._silent.discard(self.name)
        raise_failure(answer)
        if not isinstance(answer, FilePiece) or checksum(answer.data) != answer.crc:
            raise CallError(f"{self.name} sent an unfit answer to FileRead")
        self.disk = answer.disk
        return answer


@dataclass(slots=True)
class _Plan:
    """What the file should be, and where its pieces may be found. `disk`: where it goes if it is nowhere here. `own`,
    `own_size`: of this node's copy, None where its tail is not right, -1 where there is none."""

    anatomy: Anatomy
    sources: list[_Source]
    disk: int
    own: Anatomy | None
    own_size: int


class Mender:
    """Restores what a `Repair` names. `peers`: names of the other replicas; those that failed lately come last."""

    def __init__(self, carrier: Carrier, *, peers: Callable[[], Sequence[str]]) -> None:
        self._carrier = carrier
        self._names = peers
        self._silent: set[str] = set()  # peers that did not answer when they were asked last

    def _peers(self, file: str) -> list[_Peer]:
        """Copies of the others, in the order in which to ask for them."""
        names = sorted(self._names(), key=lambda name: name in self._silent)
        return [_Peer(self._carrier, name, file, self._silent) for name in names]

    async def mend(self, work: DiskWork, repair: Repair, wanted: Callable[[], bool]) -> str:
        """Make the bytes right; tells what was done. `wanted`: False once the file is to be removed.

        Raises Gone, Corrupt (no copy has some piece right, `offset` says which), Unavailable.
        """
        own = OwnCopy(work, repair.file)
        anatomy, size = await self._own_anatomy(own, repair)
        if anatomy is not None and not repair.whole:
            return await _mend_piece(repair, own, self._peers(repair.file))
        plan = await self._plan(repair, own, anatomy, size)
        if plan.own is not None or plan.own_size == plan.anatomy.size:
            return await _mend_in_place(repair.file, own, plan)
        await _assemble(work, repair.file, plan, wanted)
        return FILE

    async def compare(self, work: DiskWork, file: str) -> str:
        """What is wrong with head and tail of a file without a seal, by what the peers have; "" if nothing is known."""
        own = OwnCopy(work, file)
        mine = await self._ends(own, await anatomy_of(own, file))
        found = Counter[tuple[int, bytes, bytes]]()
        for source in self._peers(file):
            try:
                found[await self._ends(source, await anatomy_of(source, file))] += 1
            except TimeTierError:
                continue  # it has nothing to compare with
        most = found.most_common(1)
        differs = bool(most) and most[0][0] != mine and most[0][1] > 1 and not found[mine]
        return "the other replicas agree on another content" if differs else ""

    # ------------------------------------------------------------ what the file should be

    async def _own_anatomy(self, own: OwnCopy, repair: Repair) -> tuple[Anatomy | None, int]:
        """(anatomy of this node's copy if it can be trusted, its size), (None, -1) if there is none."""
        try:
            size = await own.size()
        except Corrupt:
            return None, -1
        try:
            anatomy = await anatomy_of(own, repair.file, size)
        except Corrupt as error:
            return None, -1 if error.fields.get("reason") == "name" else size
        trusted = anatomy.sealed or not repair.whole
        return (anatomy if trusted and repair.is_met_by(anatomy) else None), size

    async def _plan(self, repair: Repair, own: OwnCopy, mine: Anatomy | None, own_size: int) -> _Plan:
        """Raises Gone, Corrupt, Unavailable."""
        found: list[tuple[_Source, Anatomy]] = [] if mine is None else [(own, mine)]
        peers = self._peers(repair.file)
        sources: list[_Source] = [*([own] if own_size >= 0 else []), *peers]
        errors: list[TimeTierError] = []
        for source in peers:
            try:
                anatomy = await anatomy_of(source, repair.file)
            except TimeTierError as error:
                errors.append(error)
                if error.fields.get("reason") == "name":
                    sources.remove(source)
                continue
            if repair.is_met_by(anatomy):
                found.append((source, anatomy))
                if anatomy.sealed and (repair.sure or own_size >= 0):
                    break  # the others need not be asked before their bytes are
        missing = sum(error.fields.get("reason") == MISSING for error in errors)
        if peers and (missing == len(peers) or (missing and own_size < 0 and not repair.sure)):
            raise Gone(f"other replicas have no {repair.file}")
        if not peers:
            raise Unavailable(f"{repair.file}: there is no other replica")
        disk = max(peer.disk for peer in peers)
        anatomy = await self._chosen(repair.file, found, errors)
        return _Plan(anatomy, sources, disk, mine, own_size)

    async def _chosen(self, file: str, found: list[tuple[_Source, Anatomy]], errors: list[TimeTierError]) -> Anatomy:
        """The anatomy to go by, with a checksum of the head."""
        for _, anatomy in found:
            if anatomy.sealed:
                return anatomy
        ends: list[tuple[tuple[int, bytes, bytes], Anatomy]] = []
        for source, anatomy in found:
            try:
                ends.append((await self._ends(source, anatomy), anatomy))
            except TimeTierError as error:
                errors.append(error)
        if not ends:
            raise next((e for e in errors if not isinstance(e, Corrupt)), None) or Corrupt(
                f"no replica has a readable footer of {file} ({'; '.join(map(str, errors))})", file=file, offset=0
            )
        (most, votes), *others = Counter(end for end, _ in ends).most_common()
        if others and votes == 1:
            raise Unavailable(f"the copies of {file} differ, and a third one is needed to tell which is right")
        anatomy = next(anatomy for end, anatomy in ends if end == most)
        return anatomy._replace(head=anatomy.head._replace(crc=checksum(most[1])))

    async def _ends(self, source: _Source, anatomy: Anatomy) -> tuple[int, bytes, bytes]:
        """(size, head, tail) of a copy."""
        return anatomy.size, await source.read(0, anatomy.head.length), anatomy.tail


async def _mend_piece(repair: Repair, own: OwnCopy, peers: Sequence[_Source]) -> str:
    """Restore one block (or the head) in place."""
    piece = Piece(repair.offset, repair.length, repair.crc)
    if piece.fits(await own.read(piece.offset, piece.length)):
        return NOTHING
    await own.write(piece.offset, await _gather(repair.file, peers, [piece]))
    return BLOCK


async def _mend_in_place(file: str, own: OwnCopy, plan: _Plan) -> str:
    """Restore what differs of a file that has the right size."""
    anatomy, done = plan.anatomy, NOTHING
    others = [source for source in plan.sources if source is not own]
    for run in parts_to_read(anatomy, _RUN_BYTES):
        start = run[0].offset
        data = memoryview(await own.read(start, run[-1].end - start))
        for piece in run:
            if not piece.fits(data[piece.offset - start : piece.end - start]):
                await own.write(piece.offset, await _gather(file, others, [piece]))
                done = FILE
    if await own.read(anatomy.tail_at, len(anatomy.tail)) != anatomy.tail:
        await own.write(anatomy.tail_at, anatomy.tail)
        done = FILE
    return done


async def _assemble(work: DiskWork, file: str, plan: _Plan, wanted: Callable[[], bool]) -> None:
    """Put the file together beside its place, and then in it."""
    anatomy, crc = plan.anatomy, 0
    ordinal = work.store.copies.disk(file, plan.disk).ordinal

    async def add(offset: int, data: bytes) -> None:
        nonlocal crc
        crc = int(google_crc32c.extend(crc, data))
        await work.on(ordinal, lambda store: store.copies.add(file, ordinal, offset, data))
        if not wanted():
            raise Gone(f"{file} was removed meanwhile")

    try:
        for run in parts_to_read(anatomy, _RUN_BYTES):
            await add(run[0].offset, await _gather(file, plan.sources, run))
        await add(anatomy.tail_at, anatomy.tail)
        checked = await work.on(ordinal, lambda store: store.copies.check(file, ordinal), anatomy.size)
        if (checked.size, checked.crc) != (anatomy.size, crc):
            raise Unavailable(f"disk {ordinal} does not keep what is written to a copy of {file}")
        if not wanted():
            raise Gone(f"{file} was removed meanwhile")
        await work.on(ordinal, lambda store: store.copies.keep(file, ordinal, _modified_s(store, file)))
    finally:
        await work.on(ordinal, lambda store: _drop(store, file, ordinal))
    if not wanted():  # the removal came between the last look and the renaming
        await work.on(ordinal, lambda store: store.remove(file))
        raise Gone(f"{file} was removed meanwhile")


def _modified_s(store: ColdStore, file: str) -> float | None:
    """When the file was written that is to be replaced, None if it is not here: its age is that of its rows."""
    try:
        return store.find(file).modified
    except TimeTierError:
        return None


def _drop(store: ColdStore, file: str, disk: int) -> None:
    try:
        store.copies.drop(file, disk)
    except TimeTierError:
        return  # the disk is out: the next start drops it


async def anatomy_of(source: _Source, file: str, size: int = -1) -> Anatomy:
    """What a copy says of itself, under the name that it should have."""
    if size < 0:
        size = await source.size()
    want = GUESSED_TAIL_BYTES
    while True:
        start = max(0, size - want)
        found = parse_end(size, await source.read(start, size - start) if size > start else b"")
        if isinstance(found, Anatomy):
            found.check_name(file)
            return found
        want = found


async def _gather(file: str, sources: Sequence[_Source], run: list[Piece]) -> bytes:
    """Bytes of neighbouring pieces, each from the first source that has it right. Raises Corrupt, Unavailable."""
    start = run[0].offset
    data = bytearray(run[-1].end - start)
    lacking = list(run)
    unreached: TimeTierError | None = None
    for source in sources:
        for part in list(_neighbours(lacking)):
            at = part[0].offset
            try:
                found = memoryview(await source.read(at, part[-1].end - at))
            except TimeTierError as error:
                if not isinstance(error, Corrupt):
                    unreached = error
                break
            for piece in part:
                bytes_of_piece = found[piece.offset - at : piece.end - at]
                if piece.fits(bytes_of_piece):
                    data[piece.offset - start : piece.end - start] = bytes_of_piece
                    lacking.remove(piece)
        if not lacking:
            return bytes(data)
    if unreached is not None:
        raise unreached
    at = lacking[0].offset
    raise Corrupt(f"{file}: the bytes at {at} are damaged on every replica", reason="checksum", file=file, offset=at)


def _neighbours(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """Runs of pieces without a gap between them."""
    run: list[Piece] = []
    for piece in pieces:
        if run and run[-1].end != piece.offset:
            yield run
            run = []
        run.append(piece)
    if run:
        yield run
