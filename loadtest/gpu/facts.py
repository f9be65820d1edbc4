"""What the machine is: the GPU, the versions that decide, what is not installed, and the ceilings of this very call."""

import platform
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Final

import torch

from loadtest.bound import MachineRates
from loadtest.gpu.ground import Ground
from loadtest.gpu.results import Check, Figures, Found, Value
from loadtest.gpu.timing import in_turns
from loadtest.machine import machine

_PACKAGES: Final = ("torch", "triton", "transformers", "peft", "safetensors", "tokenizers", "numpy")
_OF_THE_SERVER: Final = {
    "fastapi": "fastapi",
    "uvicorn": "uvicorn",
    "python-multipart": "python_multipart",
    "prometheus-client": "prometheus_client",
    "pydantic": "pydantic",
    "pydantic-settings": "pydantic_settings",
    "typer": "typer",
    "rich": "rich",
    "llguidance": "llguidance",
    "httpx": "httpx",
    "pyyaml": "yaml",
}
"""What the server needs beside these and this check does not, by the name of its package and of its module."""

_COPY_BYTES: Final = 2**31
_MATRIX: Final = 8192
_MEASURE_S: Final = 1.0


def facts(ground: Ground) -> Found:
    """Names, versions, memory, and the rates that the parts behind this one are held against."""
    what: list[tuple[str, Value]] = [("machine", machine()), ("Python", platform.python_version())]
    what += [(name, _version(name)) for name in _PACKAGES]
    missing = [name for name, module in _OF_THE_SERVER.items() if find_spec(module) is None]
    if missing:
        what.append(("not installed", f"{', '.join(missing)}: the HTTP server needs them, and nothing here does"))
    if ground.is_gpu:
        what += _gpu(ground)
    rates = ceilings(ground)
    rows = (
        ("copy, bytes read and written", rates.copy_bytes_per_s / 1e9, "GB/s"),
        ("sum of two arrays into a third", rates.triad_bytes_per_s / 1e9, "GB/s"),
        ("reading alone", rates.read_bytes_per_s / 1e9, "GB/s"),
        (f"matrix product, {_dtype(ground)}", rates.flops_per_s / 1e12, "TFLOP/s"),
    )
    here = Figures(title="Ceilings of this machine, measured in this call", columns=("what", "rate", ""), rows=rows)
    return Found(facts=tuple(what), checks=_importable(), figures=(here,))


def ceilings(ground: Ground) -> MachineRates:
    """The rates of this device, measured once in a process, by the median and not by the luckiest call."""
    if ground.rates is None:
        ground.rates = _measured(ground)
    return ground.rates


def _measured(ground: Ground) -> MachineRates:
    dtype, size = _dtype(ground), 2**16 if ground.is_quick else _COPY_BYTES // 2
    a, b, c = (torch.ones(size, dtype=dtype, device=ground.device) for _ in range(3))
    moved = size * dtype.itemsize
    side = 64 if ground.is_quick else _MATRIX
    # Numbers of all kinds: a GPU draws less power on zeros and ones, and is faster then than it will be.
    left, right = (torch.randn(side, side, device=ground.device).to(dtype) for _ in range(2))

    def seconds(act: Callable[[], object]) -> float:
        return in_turns(ground, {"": act}, most_s=_MEASURE_S, fewest=5)[""].median_s

    return MachineRates(
        copy_bytes_per_s=2 * moved / seconds(lambda: a.copy_(b)),
        triad_bytes_per_s=3 * moved / seconds(lambda: torch.add(b, c, out=a)),
        read_bytes_per_s=moved / seconds(lambda: a.view(-1, 1024).amax(1)),
        flops_per_s=2 * side**3 / seconds(lambda: left @ right),
    )


def _dtype(ground: Ground) -> torch.dtype:
    return torch.bfloat16 if ground.is_gpu else torch.float32


def _gpu(ground: Ground) -> list[tuple[str, Value]]:
    about = torch.cuda.get_device_properties(ground.device)
    free, total = torch.cuda.mem_get_info(ground.device)
    return [
        ("GPU", f"{about.name}, {about.multi_processor_count} multiprocessors, sm_{about.major}{about.minor}"),
        ("driver", _driver()),
        ("CUDA of torch", torch.version.cuda),
        ("free memory, GiB", free / 2**30),
        ("memory, GiB", total / 2**30),
    ]


def _driver() -> str:
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "nvidia-smi does not tell"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _importable() -> tuple[Check, ...]:
    """What runs steps must be importable without what serves HTTP."""
    needed = [name for name in ("torch", "transformers", "safetensors", "tokenizers", "numpy") if not find_spec(name)]
    return (Check(name="what runs steps is installed", passed=not needed, note=", ".join(needed)),)
