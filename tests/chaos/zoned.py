"""A cluster over three zones of one machine, in a Ray of its own.

A zone is a Ray node in a network namespace where the machine allows that, else one at an address of 127.0.0.0/8.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from ..ray_zones import HEAD, RayZones
from .faults import ZONES
from .network import NoNetwork, ZoneNetwork
from .system import System

_HEALTH_CHECK_S = 3.0  # Ray gives a node up after five failed ones: later than any cut of a zone ends
_RAY_SETTINGS = {"RAY_worker_niceness": "0"}  # else whatever else runs on the machine comes before the store


class ZonedSystem(System):
    """Starts with `with`; its end ends every process and removes every file of it, except a folder that was given."""

    def __init__(self, folder: Path | None = None) -> None:
        """`folder`: for data, logs and histories, kept at the end; None = a temporary one."""
        self._kept = folder is not None
        made = (folder or Path(tempfile.mkdtemp(prefix="tt-chaos-"))).absolute()
        made.mkdir(parents=True, exist_ok=True)
        super().__init__(made, f"chaos-{made.name}".replace("_", "-"), {})
        self.no_network = ""
        self._zones: RayZones | None = None

    def __enter__(self) -> Self:
        try:
            os.environ.update(_RAY_SETTINGS)
            try:
                self.network = ZoneNetwork(ZONES, self.folder)
            except NoNetwork as error:
                self.no_network = str(error)
            self._zones = self._make_zones()
            self._zones.__enter__()
            self._zones.use()
            self.environment = self._zones.environment
            self.start(zones={"names": list(ZONES)}, cache={"nodes": len(ZONES)}, network={"tcp_host": "auto"})
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _make_zones(self) -> RayZones:
        folder = self.folder / "ray"
        if self.network is None:
            return RayZones(folder, ZONES, health_check_s=_HEALTH_CHECK_S)
        addresses = {**self.network.addresses, HEAD: self.network.gateway}
        return RayZones(folder, ZONES, addresses=addresses, wrap=self.network.command, health_check_s=_HEALTH_CHECK_S)

    def close(self) -> None:
        """End and remove everything."""
        self.let_go()
        if "ray" in sys.modules:
            import ray

            ray.shutdown()
        if self._zones is not None:
            self._zones.close()
        if self.network is not None:
            self.network.close()
        if not self._kept:
            shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def zones(self) -> RayZones:
        """The Ray of this system."""
        assert self._zones is not None, "it has been started"
        return self._zones

    def owns(self, pid: int) -> bool:
        return self.zones.zone_of(pid) is not None

    def kill_zone(self, zone: int) -> None:
        self.zones.kill(ZONES[zone])

    def start_zone(self, zone: int) -> None:
        self.zones.start(ZONES[zone])

    def revive_zones(self) -> list[str]:
        revived = [zone for zone in ZONES if not self._has_raylet(zone)]
        for zone in revived:
            self.zones.kill(zone)  # what is left of it
            self.zones.start(zone)
        return revived

    def _has_raylet(self, zone: str) -> bool:
        for pid in self.zones.processes(zone):
            with contextlib.suppress(OSError):  # it has just ended
                if Path(f"/proc/{pid}/comm").read_text().strip() == "raylet":
                    return True
        return False
