"""Zones of one machine that can be cut off: a network namespace each, joined by a bridge.

A zone is cut off by taking its port from the bridge: packets vanish without a word, and connections stay open, as
when a switch dies. Inside a namespace the machine has a boot id of its own, so nodes of different zones take each
other for different machines and speak TCP, although Unix sockets would reach across.

Needs root and `ip`. Everything has a name of this run's own, so that two runs at once don't meet.
"""

from __future__ import annotations

import ipaddress
import os
import shlex
import shutil
import subprocess
import uuid
from collections.abc import Sequence
from pathlib import Path

_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_BRIDGE_MAC = "02:74:69:6d:65:01"  # fixed: else it would change with the ports
_COMMAND_S = 10.0
_SUBNETS = [f"10.{second}.{third}.0/24" for second in range(201, 250) for third in range(256)]


class NoNetwork(Exception):
    """This machine can't cut off a zone; the message says why."""


class ZoneNetwork:
    """A bridge with one namespace a zone. `gateway`: address of the machine itself, which is in no zone."""

    def __init__(self, zones: Sequence[str], folder: Path) -> None:
        """Make the namespaces. `folder`: for small files. Raises NoNetwork, with nothing left behind."""
        if shutil.which("ip") is None:
            raise NoNetwork("the command `ip` (iproute2) is not installed")
        if os.geteuid() != 0:
            raise NoNetwork("network namespaces need root")
        self._folder = folder
        self._zones = list(zones)
        self._name = f"tt{os.getpid() % 10_000_000:x}"
        self._bridge = f"{self._name}b"
        self.cut_off: set[str] = set()
        try:
            subnet = self._make_bridge()
            self.gateway = str(subnet[1])
            self.addresses = {zone: str(subnet[2 + number]) for number, zone in enumerate(self._zones)}
            for number, zone in enumerate(self._zones):
                self._make_zone(number, zone, subnet.prefixlen)
        except (OSError, subprocess.SubprocessError) as error:
            self.close()
            reason = getattr(error, "stderr", None) or str(error)
            raise NoNetwork(f"network namespaces can't be made: {reason.strip()}") from None

    def command(self, zone: str, command: Sequence[str]) -> list[str]:
        """The same command, run inside a zone. The process that it becomes has the pid of the one that is started."""
        boot_id = shlex.quote(str(self._boot_id(zone)))
        inner = f'mount --bind {boot_id} {_BOOT_ID} && exec "$@"'
        return ["ip", "netns", "exec", self._namespace(zone), "sh", "-c", inner, "sh", *command]

    def cut(self, zone: str) -> None:
        """Let no packet into or out of a zone."""
        _ip("link", "set", self._port(self._zones.index(zone)), "nomaster")
        self.cut_off.add(zone)

    def heal(self, zone: str) -> None:
        """Let packets pass again."""
        _ip("link", "set", self._port(self._zones.index(zone)), "master", self._bridge)
        self.cut_off.discard(zone)

    def close(self) -> None:
        """Remove everything. Processes inside the zones must have ended."""
        for number, zone in enumerate(self._zones):
            _ip("link", "delete", self._port(number), check=False)
            _ip("netns", "delete", self._namespace(zone), check=False)
        _ip("link", "delete", self._bridge, check=False)

    def _make_bridge(self) -> ipaddress.IPv4Network:
        """The bridge, with the first subnet that nobody uses, looked for from a place of this process's own."""
        routes = _ip("-4", "route", "show").stdout
        addresses = _ip("-4", "address", "show").stdout
        start = os.getpid() % len(_SUBNETS)
        for text in _SUBNETS[start:] + _SUBNETS[:start]:
            prefix = text.rpartition(".")[0] + "."
            if prefix not in routes and prefix not in addresses:
                break
        else:
            raise OSError("every subnet is in use")
        subnet = ipaddress.IPv4Network(text)
        _ip("link", "add", self._bridge, "address", _BRIDGE_MAC, "type", "bridge")
        _ip("address", "add", f"{subnet[1]}/{subnet.prefixlen}", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")
        return subnet

    def _make_zone(self, number: int, zone: str, prefix_length: int) -> None:
        namespace, port = self._namespace(zone), self._port(number)
        self._boot_id(zone).write_text(f"{uuid.uuid4()}\n")
        _ip("netns", "add", namespace)
        _ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        _ip("link", "set", port, "master", self._bridge)
        _ip("link", "set", port, "up")
        _ip("-n", namespace, "address", "add", f"{self.addresses[zone]}/{prefix_length}", "dev", "eth0")
        _ip("-n", namespace, "link", "set", "eth0", "up")
        _ip("-n", namespace, "link", "set", "lo", "up")
        _ip("-n", namespace, "route", "add", "default", "via", self.gateway)

    def _namespace(self, zone: str) -> str:
        return f"{self._name}-{zone}"

    def _port(self, number: int) -> str:
        return f"{self._name}p{number}"

    def _boot_id(self, zone: str) -> Path:
        return self._folder / f"boot-id-{zone}"


def _ip(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run `ip`. Raises CalledProcessError or TimeoutExpired."""
    return subprocess.run(["ip", *arguments], check=check, capture_output=True, text=True, timeout=_COMMAND_S)
