"""Carries out the faults of a plan, and notes when each one began, ended and was over.

began ---- the fault lasts ---- removed ---- nodes come back ---- healed
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from random import Random
from typing import Any

import msgspec

from .plan import Fault
from .system import System

ZONES = ("a", "b", "c")
HEAL_S = 120.0
_WAIT = threading.Event()  # never set: its `wait` lets a fault last
_UP_POLL_S = 0.1
_SINK_LEAD_S = 2.0


class Window(msgspec.Struct):
    """A fault that happened. Times are monotonic seconds; see the top of this file.

    `passes`: it passes by itself, and so lasts until all nodes serve again. `note`: anything else of it.
    """

    kind: str
    target: str
    began: float
    removed: float = 0.0
    healed: float = 0.0
    passes: bool = False
    note: str = ""


class Faults:
    """Does to a system what a plan says, one fault at a time."""

    def __init__(self, system: System, sink: Callable[[], object], tell: Callable[[str], None]) -> None:
        """`sink` starts a run of the sink beside everything else. `tell`: says something to people."""
        self._system = system
        self._sink = sink
        self._tell = tell

    def inflict(self, fault: Fault) -> Window:
        """Let a fault happen and pass; the rest is healing. Raises what a broken run raises: TimeoutError and such."""
        window = Window(fault.kind.name, self._target(fault), 0.0, passes=not fault.hold_s)
        action = {
            "kill": self._kill,
            "pause": self._pause,
            "wipe": self._wipe,
            "restart": self._restart,
            "cut": self._cut,
            "flap": self._flap,
        }[fault.kind.name.partition("-")[0]]
        if fault.kind.name == "kill-cold":
            self._sink()
            _WAIT.wait(_SINK_LEAD_S)
        action(fault, window)
        window.removed = time.monotonic()
        return window

    def heal(self, window: Window) -> None:
        """Wait until all nodes serve again; start Ray nodes that Ray itself has given up."""
        revived = self._system.revive_zones()
        if revived:
            window.note = f"Ray gave zone {', '.join(revived)} up; it was started again"
        self._system.wait_until_serving(HEAL_S, self._tell)
        window.healed = time.monotonic()
        if window.passes:
            window.removed = window.healed

    @staticmethod
    def _target(fault: Fault) -> str:
        tier = fault.kind.tier
        if tier == "router":
            return tier
        return f"zone {ZONES[fault.target]}" if tier == "zone" else f"{tier}-0-{fault.target}"

    def _kill(self, fault: Fault, window: Window) -> None:
        if fault.kind.tier != "zone":
            window.began = time.monotonic()
            self._system.kill(window.target)
            return
        window.began = time.monotonic()
        self._system.kill_zone(fault.target)
        _WAIT.wait(fault.hold_s)
        self._system.start_zone(fault.target)

    def _wipe(self, fault: Fault, window: Window) -> None:
        window.began = time.monotonic()
        self._system.wipe(window.target)

    def _restart(self, fault: Fault, window: Window) -> None:
        window.began = time.monotonic()
        self._system.restart(window.target)
        # Ray takes a moment to end it; until then it would seem to serve already.
        _WAIT.wait(1.0)

    def _pause(self, fault: Fault, window: Window) -> None:
        process = self._system.process(window.target)
        window.began = time.monotonic()
        self._system.pause(process)
        try:
            _WAIT.wait(fault.hold_s)
        finally:
            self._system.go_on(process)

    def _cut(self, fault: Fault, window: Window) -> None:
        network = self._system.network
        assert network is not None, "the plan was told that nothing can be cut"
        zone = ZONES[fault.target]
        window.began = time.monotonic()
        network.cut(zone)
        try:
            _WAIT.wait(fault.hold_s)
        finally:
            network.heal(zone)

    def _flap(self, fault: Fault, window: Window) -> None:
        random = Random(fault.seed)
        once = {"flap": self._flap_pause, "flap-kill": self._flap_kill, "flap-cut": self._flap_cut}[fault.kind.name]
        state: dict[str, Any] = {}
        window.began = time.monotonic()
        turns = 0
        while time.monotonic() - window.began < fault.hold_s:
            once(fault, window, random, state)
            turns += 1
        window.note = f"{turns} times"

    def _flap_pause(self, fault: Fault, window: Window, random: Random, state: dict[str, Any]) -> None:
        process = state.setdefault("process", None) or self._system.process(window.target)
        state["process"] = process
        self._system.pause(process)
        try:
            _WAIT.wait(_beat(fault, random))
        finally:
            self._system.go_on(process)
        _WAIT.wait(_beat(fault, random))

    def _flap_kill(self, fault: Fault, window: Window, random: Random, state: dict[str, Any]) -> None:
        self._system.kill(window.target)
        ends = time.monotonic() + HEAL_S
        while window.target in self._system.troubles():
            if time.monotonic() > ends:
                raise TimeoutError(f"{window.target} does not come back")
            _WAIT.wait(_UP_POLL_S)
        _WAIT.wait(_beat(fault, random))

    def _flap_cut(self, fault: Fault, window: Window, random: Random, state: dict[str, Any]) -> None:
        network = self._system.network
        assert network is not None, "the plan was told that nothing can be cut"
        zone = ZONES[fault.target]
        network.cut(zone)
        try:
            _WAIT.wait(_beat(fault, random))
        finally:
            network.heal(zone)
        _WAIT.wait(_beat(fault, random))


def _beat(fault: Fault, random: Random) -> float:
    return random.uniform(fault.kind.shortest_s, fault.kind.longest_s)


def stop_signals() -> None:
    """Have SIGTERM end a run as Ctrl-C does: with everything cleaned up."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
