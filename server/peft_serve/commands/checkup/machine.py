"""The few facts of a machine and an installation that a checkup asks for. `Machine` is what tests replace."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import sys
from importlib import metadata
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CGROUP_MEMORY = Path("/sys/fs/cgroup/memory.max")
_CGROUP_CPU = Path("/sys/fs/cgroup/cpu.max")
_NVIDIA = Path("/proc/driver/nvidia/version")


class Machine:
    """This machine. Sizes in bytes; None where it cannot be told."""

    def python(self) -> tuple[int, int]:
        return sys.version_info[:2]

    def requirements(self) -> list[str]:
        """What peft-serve says it needs, in the words of its package."""
        try:
            return list(metadata.requires("peft-serve") or ())
        except metadata.PackageNotFoundError:
            return []

    def version(self, package: str) -> str | None:
        """The installed version of a package."""
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    def num_cores(self) -> int:
        """Cores that this process may use, a container's share counted."""
        allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        try:
            quota, period = _CGROUP_CPU.read_text().split()
            return max(1, min(allowed, round(int(quota) / int(period))))
        except (OSError, ValueError):  # no cgroup, or "max"
            return allowed

    def free_memory(self) -> int | None:
        """Memory that a new process can take, a container's limit counted."""
        try:
            lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
            free = int(lines["MemAvailable"].split()[0]) * 1024
        except (OSError, KeyError, ValueError):
            return None
        try:
            return min(free, int(_CGROUP_MEMORY.read_text()))
        except (OSError, ValueError):
            return free

    def free_disk(self, path: Path) -> int | None:
        """Free bytes where `path` is, or would be."""
        try:
            return shutil.disk_usage(existing(path)).free
        except OSError:
            return None

    def can_write(self, path: Path) -> bool:
        """Whether this user may make files in the folder, or may make the folder."""
        return os.access(existing(path), os.W_OK | os.X_OK)

    def is_locked(self, path: Path) -> bool:
        """Whether a process that runs holds the lock file."""
        try:
            descriptor = os.open(path, os.O_RDWR)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(descriptor)
        return False

    def can_listen(self, host: str, port: int) -> str:
        """Empty when a server could listen there, else what the system says."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, port))
        except OSError as error:
            return error.strerror or str(error)
        return ""

    def has_nvidia(self) -> bool:
        """Whether a driver for NVIDIA's accelerators is loaded."""
        return _NVIDIA.exists()

    def torch_cuda(self) -> tuple[str | None, bool]:
        """The CUDA version that torch was built for, and whether it finds a device."""
        import torch

        return torch.version.cuda, torch.cuda.is_available()


def existing(path: Path) -> Path:
    """The nearest folder above `path` (or `path`) that is there."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path
