"""Decoded blocks, or the parts of them that one owner has, in memory (*pure*)."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    """Something that knows how much memory it occupies."""

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""
        ...


BlockT = TypeVar("BlockT", bound=Sized)


class BlockCache(Generic[BlockT]):
    """Decoded cold blocks by (file, offset, owner), least recently used first out, within `budget_bytes`.

    `owner`: whose rows they are, b"" for a block with all of its rows. A file is never rewritten under its name, so a
    block that is kept can't become wrong.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.hits = 0
        self.misses = 0
        self.nbytes = 0
        self._blocks: OrderedDict[tuple[str, int, bytes], BlockT] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def get(self, file: str, offset: int, owner: bytes = b"") -> BlockT | None:
        """The block of `file` at `offset`, if it is kept."""
        block = self._blocks.get((file, offset, owner))
        if block is None:
            self.misses += 1
            return None
        self._blocks.move_to_end((file, offset, owner))
        self.hits += 1
        return block

    def put(self, file: str, offset: int, block: BlockT, owner: bytes = b"") -> None:
        """Keep a block, if it fits into the budget at all."""
        place = file, offset, owner
        if place in self._blocks or block.nbytes > self.budget_bytes:
            return
        self._blocks[place] = block
        self.nbytes += block.nbytes
        while self.nbytes > self.budget_bytes:
            self.nbytes -= self._blocks.popitem(last=False)[1].nbytes
