"""Memory: the most that a process and those it started have held in RAM, as the kernel counts it.

A process's peak resident set is ``VmHWM`` of Linux's ``/proc/PID/status``; pages of files that it has mapped (a
model's weights) are in it. Peaks of several processes are added up: an upper bound, exact for one.
"""

import re
from math import nan
from pathlib import Path

FIELD = re.compile(r"^(PPid|VmHWM):\s+(\d+)", re.MULTILINE)


def peak_mib(pid: int, *, processes: Path = Path("/proc")) -> float:
    """MiB at the peak of process `pid` and of those it started that still live; NaN where the system does not say."""
    known = {int(page.parent.name): _fields(page) for page in processes.glob("[0-9]*/status")}
    family = {pid}
    for one in sorted(known):  # a child's number is mostly above its parent's; where numbers wrapped, it is not counted
        if known[one].get("PPid") in family:
            family.add(one)
    peaks = [known[one]["VmHWM"] for one in family if "VmHWM" in known.get(one, {})]
    return sum(peaks) / 1024 if peaks else nan


def _fields(page: Path) -> dict[str, int]:
    try:
        text = page.read_text()
    except OSError:  # it ended meanwhile
        return {}
    return {name: int(value) for name, value in FIELD.findall(text)}
