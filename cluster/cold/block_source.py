"""Bytes of live blocks for readers that are no node: from a copy on this very machine, else from the cold nodes.

`BlockSource` is called from threads (Arrow's, or a Ray task's), while the store's calls run on an event loop. A copy on
this machine is read in place, without the loop: one positioned read, and the CRC is checked as always. What is damaged
or not there is asked of the cold nodes one after the other, the one with the damaged copy first: so it notices.

A file that is on no cold node was replaced by a later generation, unless the links still name it. So they are looked
at again before an error says which.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from ..carriers.base import Carrier
from ..carriers.connection import host_id
from ..client.view import View
from ..drive import drive
from ..effects import Call, CallFailed, Script, Sleep
from ..errors import Corrupt, Unavailable
from ..messages import AskPlaces, BlockBytes, BlockRead, Failure, Places
from .block import checksum
from .live import LiveBlock
from .overlays import LookSettings, look
from .sink_calls import why_not

T = TypeVar("T")

MAX_PARALLEL_READS = 4  # of one fragment from the cold nodes
_CALL_TIMEOUT_S = 10.0
_ATTEMPTS = 3
_BACK_OFF_S = 0.1
_MISSING = "missing"  # `reason` of a cold node's Corrupt: it has no such file
_MAX_PLACES = 10_000  # files of which is known where they lie

Place = tuple[str, str]  # node, path


class BlockSource:
    """Reads live blocks of one table, from any number of threads."""

    def __init__(
        self,
        view: View,
        carrier: Carrier,
        run: Callable[[Coroutine[Any, Any, Any]], Any],
        table: bytes,
        *,
        host: str = "",
    ) -> None:
        """`run`: runs a coroutine on the loop of `view` and `carrier`, and waits for its result. `host`: identity of
        this machine, "" to have it found out."""
        self._view = view
        self._carrier = carrier
        self._run = run
        self._table = table
        self._host = host or host_id()
        self._lock = threading.Lock()
        self._places: OrderedDict[str, list[Place]] = OrderedDict()
        self.read_in_place = 0
        self.read_from_nodes = 0

    def read(self, blocks: Sequence[LiveBlock]) -> list[bytes]:
        """The blocks' bytes, checked. Raises Unavailable, Corrupt."""
        files = {block.file: block for block in blocks}
        unknown = [block for file, block in files.items() if file not in self._places]
        if unknown:
            self._note(self._run(drive(self._find(unknown), self._carrier)))
        found: list[bytes | None] = []
        damaged: dict[int, str] = {}
        for at, block in enumerate(blocks):
            data, node = self._read_in_place(block)
            found.append(data)
            if data is None and node:
                damaged[at] = node
        wanted = [at for at, data in enumerate(found) if data is None]
        for start in range(0, len(wanted), MAX_PARALLEL_READS):
            part = wanted[start : start + MAX_PARALLEL_READS]
            script = self._fetch([blocks[at] for at in part], [damaged.get(at, "") for at in part])
            for at, data in zip(part, self._run(drive(script, self._carrier)), strict=True):
                found[at] = data
        with self._lock:
            self.read_in_place += len(blocks) - len(wanted)
            self.read_from_nodes += len(wanted)
        return [data for data in found if data is not None]

    # ------------------------------------------------------------ in place

    def _find(self, blocks: Sequence[LiveBlock]) -> Script[dict[str, list[Place]]]:
        """Where on this machine the files of these blocks lie."""
        found: dict[str, list[Place]] = {block.file: [] for block in blocks}
        files: dict[str, list[str]] = {}
        for block in blocks:
            for node in self._view.routing.cold_order(block.bucket, block.window_start):
                address = self._view.routing.topology.addresses.get(node)
                if address is None or address.host == self._host:
                    files.setdefault(node, []).append(block.file)
        if files:
            answers = yield [Call(node, AskPlaces(names), _CALL_TIMEOUT_S) for node, names in files.items()]
            for (node, names), answer in zip(files.items(), answers, strict=True):
                if isinstance(answer, Places) and answer.host == self._host and len(answer.paths) == len(names):
                    for file, path in zip(names, answer.paths, strict=True):
                        if path:
                            found[file].append((node, path))
        return found

    def _note(self, places: dict[str, list[Place]]) -> None:
        with self._lock:
            self._places.update(places)
            while len(self._places) > _MAX_PLACES:
                self._places.popitem(last=False)

    def _read_in_place(self, block: LiveBlock) -> tuple[bytes | None, str]:
        """The block from a copy here, and the node whose copy is damaged, if one is."""
        damaged = ""
        for node, path in self._places.get(block.file, []):
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    data = os.pread(descriptor, block.length, block.offset)
                finally:
                    os.close(descriptor)
            except OSError:
                continue  # not ours to read, on a disk that fails, or gone: the node knows more
            if len(data) == block.length and checksum(data) == block.crc:
                return data, damaged
            damaged = damaged or node
        return None, damaged

    # ------------------------------------------------------------ from the cold nodes

    def _fetch(self, blocks: Sequence[LiveBlock], first: Sequence[str]) -> Script[list[bytes]]:
        """Blocks from whichever nodes have them intact, at the same time. `first`: nodes to be asked first, or ""."""
        view = self._view
        orders = []
        for block, node in zip(blocks, first, strict=True):
            order = view.suspicion.last(view.routing.cold_order(block.bucket, block.window_start))
            orders.append(sorted(order, key=lambda name, node=node: name != node))  # type: ignore[misc]
        found: list[bytes | None] = [None] * len(blocks)
        for attempt in range(_ATTEMPTS):
            if attempt:
                yield Sleep(_BACK_OFF_S * 2 ** (attempt - 1))
            reasons: list[list[Failure | CallFailed]] = [[] for _ in blocks]
            for turn in range(max(map(len, orders))):
                open_ones = [at for at, data in enumerate(found) if data is None and turn < len(orders[at])]
                calls = []
                for at in open_ones:
                    block = blocks[at]
                    question = BlockRead(block.file, block.offset, block.length, block.crc)
                    calls.append(Call(orders[at][turn], question, _CALL_TIMEOUT_S))
                answers = (yield calls) if calls else []
                for at, answer in zip(open_ones, answers, strict=True):
                    block, node = blocks[at], orders[at][turn]
                    if isinstance(answer, BlockBytes) and not answer.part and checksum(answer.data) == block.crc:
                        found[at] = answer.data
                        view.trust(node)
                    elif isinstance(answer, CallFailed):
                        view.suspect(node)
                        reasons[at].append(answer)
                    elif isinstance(answer, Failure):
                        reasons[at].append(answer)
                    else:
                        reasons[at].append(Failure(Corrupt.__name__, f"{node} sent other bytes"))
            for at, data in enumerate(found):
                if data is None and all(_is_corrupt(reason) for reason in reasons[at]):
                    yield from self._give_up(blocks[at], reasons[at])
            if all(data is not None for data in found):
                return [data for data in found if data is not None]
        at = found.index(None)
        words = "; ".join(why_not(reason) for reason in reasons[at])
        raise Unavailable(f"no cold node gave the block of {blocks[at].file} at {blocks[at].offset}: {words}")

    def _give_up(self, block: LiveBlock, reasons: Sequence[Failure | CallFailed]) -> Script[None]:
        """Raise what it means that no copy can be read."""
        if all(isinstance(reason, Failure) and reason.fields.get("reason") == _MISSING for reason in reasons):
            group = self._view.routing.storage_group_of(block.bucket)
            (facts,) = yield from look(self._view, self._table, group, [block.bucket], LookSettings())
            if block.file not in {known.file for link in facts.links for known in link.blocks}:
                raise Unavailable(
                    f"{block.file} was replaced since this dataset was made, and is gone: take the dataset again",
                    reason="replaced",
                )
        raise Corrupt(
            f"the block of {block.file} at {block.offset} ({block.length} bytes) is damaged on every replica "
            f"({'; '.join(why_not(reason) for reason in reasons)})",
            file=block.file,
            offset=block.offset,
        )


def _is_corrupt(reason: Failure | CallFailed) -> bool:
    return isinstance(reason, Failure) and reason.kind == Corrupt.__name__
