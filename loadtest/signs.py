"""Signs of life: what a server's process holds now, as the kernel and its own ``/metrics`` tell it."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import nan
from pathlib import Path

from loadtest.server import RunningServer

STATUS = re.compile(r"^(VmRSS|Threads):\s+(\d+)", re.MULTILINE)
TIER = re.compile(r'tier="(\w+)"')


@dataclass(frozen=True, slots=True, kw_only=True)
class Signs:
    """One look. NaN where the system does not say; counts of requests and adapters are the server's own."""

    at_s: float
    rss_mib: float
    descriptors: float
    threads: float
    kv_usage: float
    running: float
    waiting: float
    on_device: float
    on_host: float
    store_mib: float


def look(server: RunningServer, store: Path, at_s: float, *, processes: Path = Path("/proc")) -> Signs:
    """Take a look. `store` is the folder of the server's uploads."""
    samples = server.metrics()
    status = _status(processes / str(server.pid) / "status")
    return Signs(
        at_s=at_s,
        rss_mib=status.get("VmRSS", nan) / 1024,
        descriptors=_count(processes / str(server.pid) / "fd"),
        threads=status.get("Threads", nan),
        kv_usage=total(samples, "vllm:kv_cache_usage_perc"),
        running=total(samples, "vllm:num_requests_running"),
        waiting=total(samples, "vllm:num_requests_waiting"),
        on_device=_resident(samples, "device"),
        on_host=_resident(samples, "host"),
        store_mib=folder_bytes(store) / 2**20,
    )


def total(samples: Mapping[str, float], name: str) -> float:
    """The sum of a metric's series."""
    return sum(value for series, value in samples.items() if series.split("{")[0] == name)


def folder_bytes(folder: Path) -> int:
    """Bytes of the files below a folder; one that goes meanwhile counts nothing."""
    num_bytes = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                num_bytes += os.stat(os.path.join(root, name)).st_size
            except OSError:
                continue
    return num_bytes


def _resident(samples: Mapping[str, float], tier: str) -> float:
    found = [(TIER.search(series), value) for series, value in samples.items() if "adapter_resident{" in series]
    return sum(value for match, value in found if match is not None and match[1] == tier)


def _status(page: Path) -> dict[str, float]:
    try:
        return {name: float(value) for name, value in STATUS.findall(page.read_text())}
    except OSError:
        return {}


def _count(folder: Path) -> float:
    try:
        return float(len(os.listdir(folder)))
    except OSError:
        return nan
