"""What a report says of the machine and of the versions that were measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

_PACKAGES = ("timetier", "ray", "numpy", "rocksdict", "redis", "hiredis", "python3-etcd3", "grpcio", "protobuf")


def describe_machine(folder: Path) -> dict[str, Any]:
    """Cores, memory and kernel, and on what kind of file system `folder` lies."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": _field(Path("/proc/cpuinfo"), "model name"),
        "memory": _field(Path("/proc/meminfo"), "MemTotal"),
        "kernel": platform.release(),
        "file_system": file_system(folder),
        "load_before": os.getloadavg()[0],
    }


def versions() -> dict[str, str]:
    """Of Python, of packages and of the servers; what is not installed is left out."""
    found = {"python": sys.version.split()[0]}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # an optional one
    for program in ("redis-server", "etcd"):
        try:
            told = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            continue  # missing, which is said elsewhere
        found[program] = told.stdout.splitlines()[0].strip()
    return found


def file_system(folder: Path) -> str:
    """Type of the file system that a folder lies on, such as `ext4`; "" if the system does not tell."""
    best = ("", "")
    path = str(folder.resolve()) + "/"
    try:
        mounts = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return ""
    for line in mounts:
        _, where, kind, *_ = line.split(" ")
        if path.startswith(where.rstrip("/") + "/") and len(where) >= len(best[0]):
            best = (where, kind)
    return best[1]


def _field(path: Path, name: str) -> str:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")
