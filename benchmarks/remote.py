"""The comparison's end of a worker: starts the client process of a system, gives orders, takes answers."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import time
from pathlib import Path
from typing import Any

from .processes import start_module

_OPEN_S = 180.0
_END_S = 15.0
_PIECE_BYTES = 1 << 16


class WorkerError(Exception):
    """An order failed, or the worker did not answer; the text says how."""


class Remote:
    """A worker of one system. Its own output goes to a file in `folder`."""

    def __init__(self, system: str, client: dict[str, Any], data: dict[str, Any], seed: int, folder: Path) -> None:
        """Start it. `client`: where the system is; `data`: arguments of data sets by name."""
        spec = {"system": system, "client": client, "data": data, "seed": seed}
        self._system = system
        self._log = folder / f"worker-{system}.log"
        self._process = start_module("benchmarks.worker", [json.dumps(spec)], self._log)
        self._unread = b""
        assert self._process.stdout is not None, "a pipe was asked for"
        os.set_blocking(self._process.stdout.fileno(), False)

    def open(self) -> dict[str, Any]:
        """Wait until it is connected; what it tells of the system. Raises WorkerError."""
        told: dict[str, Any] = self.call("hello", timeout_s=_OPEN_S)
        return told

    def call(self, order: str, *, timeout_s: float = 120.0, **arguments: Any) -> Any:
        """Give an order and wait for the answer. Raises WorkerError."""
        assert self._process.stdin is not None, "a pipe was asked for"
        with contextlib.suppress(BrokenPipeError):  # it has ended; what it said before is read below
            self._process.stdin.write(json.dumps({"do": order, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
        answer = json.loads(self._line(order, time.monotonic() + timeout_s))
        if "error" in answer:
            raise WorkerError(f"{self._system}, {order}: {answer['error']}")
        return answer["answer"]

    def close(self) -> None:
        """End the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # by an order that it never read
                    pipe.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _line(self, order: str, deadline: float) -> bytes:
        assert self._process.stdout is not None, "a pipe was asked for"
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise WorkerError(f"{self._system}, {order}: no answer in time")
                piece = os.read(self._process.stdout.fileno(), _PIECE_BYTES)
                if not piece:
                    raise WorkerError(f"{self._system}, {order}: the client ended: {self._last_words()}")
                self._unread += piece
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _last_words(self) -> str:
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else "it said nothing"
