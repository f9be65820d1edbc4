"""The machine and the commit a figure belongs to: without them an absolute number says nothing."""

import os
import platform
import shlex
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where a result comes from. `base` is the model (as ``--base`` names it), `others` the cores that
    others kept busy when the run began; neither is known of old results."""

    date: str
    machine: str
    software: str
    commit: str
    command: str
    base: str = ""
    others: float | None = None

    @property
    def is_busy(self) -> bool:
        """Whether the machine did something else when the run began: more than a fifth of a core."""
        return self.others is not None and self.others > 0.2

    @property
    def is_quick(self) -> bool:
        """Whether it was a quick run, which proves nothing."""
        return "--quick" in self.command.split()


def _first_line(path: Path, key: str) -> str | None:
    if not path.exists():
        return None
    lines = (line for line in path.read_text().splitlines() if line.startswith(key))
    found = next(lines, None)
    return found.partition(":")[2].strip() if found else None


def machine() -> str:
    """Processor, cores, memory and, if there is one, the accelerator."""
    processor = _first_line(Path("/proc/cpuinfo"), "model name") or platform.processor() or platform.machine()
    parts = [processor, f"{os.cpu_count()} cores"]
    memory = _first_line(Path("/proc/meminfo"), "MemTotal")
    if memory:
        parts.append(f"{int(memory.split()[0]) / 2**20:.0f} GiB")
    import torch  # a second's worth of import that the client-only commands do without

    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join(parts)


def others_cores(
    *, seconds: float = 1.0, sleep: Callable[[float], None] = time.sleep, page: Path = Path("/proc/stat")
) -> float | None:
    """How many cores are busy while this process sleeps for `seconds`: what others take from a measurement. None
    where the system does not say."""
    before = _ticks(page)
    sleep(seconds)
    after = _ticks(page)
    if before is None or after is None or sum(after) == sum(before):
        return None
    idle = sum(after[3:5]) - sum(before[3:5])  # idle, and waiting for the disk
    return round((os.cpu_count() or 1) * (1 - idle / (sum(after) - sum(before))), 2)


def _ticks(page: Path) -> list[int] | None:
    if not page.exists():
        return None
    first = page.read_text().splitlines()[0].split()
    return [int(ticks) for ticks in first[1:9]]  # the guests' share after these is counted in them already


def software() -> str:
    """Versions that decide speed."""
    parts = [f"Python {platform.python_version()}"]
    for package in ("torch", "transformers", "peft"):
        try:
            parts.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    threads = os.environ.get("OMP_NUM_THREADS")
    return ", ".join([*parts, f"OMP_NUM_THREADS={threads}"] if threads else parts)


def commit() -> str:
    """The short revision of the working tree, with ``+ changes`` if it differs from it."""
    try:
        revision = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{revision} + changes" if changed else revision


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def command_line(arguments: list[str]) -> str:
    """The command as it can be repeated from the repository root: paths under it are made relative."""
    here = f"{Path.cwd()}{os.sep}"
    return f"python -m loadtest {shlex.join(argument.replace(here, '') for argument in arguments)}".rstrip()
