"""The tests' own tiny models, drivers and checkpoints, for checks on a device: they travel with the repository."""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any, Final

import torch
from transformers import PreTrainedModel

from peft_serve.engine.gpu_kernels import Mode, speed_up
from peft_serve.model.base import ResidentBase

_TESTS: Final = Path(__file__).resolve().parents[2] / "tests"


def module(name: str) -> Any:
    """``tests.<name>`` of this repository, whatever else is installed under the name ``tests``."""
    found = find_spec("tests")
    places = [] if found is None else [Path(place) for place in found.submodule_search_locations or ()]
    if _TESTS not in places:
        spec = spec_from_loader("tests", loader=None, is_package=True)
        assert spec is not None, "a package without a loader has a spec"
        package = module_from_spec(spec)
        package.__path__ = [str(_TESTS)]
        sys.modules["tests"] = package
    return import_module(f"tests.{name}")


def has_triton() -> bool:
    """Whether kernels of our own can be had at all."""
    return find_spec("triton") is not None


def base_on(
    make: Callable[[], PreTrainedModel],
    device: torch.device,
    *,
    kernels: Mode = "auto",
    dtype: torch.dtype | None = None,
) -> ResidentBase:
    """The model of `make` on a device, run as a server would run it, or without kernels of our own. ValueError where a
    GPU is to have kernels and cannot though Triton is there: plain torch must not pass for them."""
    model = make()
    base = ResidentBase(model.to(device=device, dtype=dtype or model.dtype), name=model.config.model_type)
    insists = kernels == "auto" and device.type == "cuda" and has_triton()
    speed_up("on" if insists else kernels, base, lambda _: None)
    return base


def worst(found: Sequence[Sequence[float]], expected: Sequence[Sequence[float]]) -> float:
    """The largest difference of two ragged tables of numbers."""
    pairs = (pair for ours, own in zip(found, expected, strict=True) for pair in zip(ours, own, strict=True))
    return max((abs(ours - own) for ours, own in pairs), default=0.0)
