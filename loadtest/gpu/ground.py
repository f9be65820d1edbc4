"""What every part stands on: the device, the clock, how much time is left, and the bases that parts share."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

import torch

from loadtest.bound import MachineRates
from loadtest.gpu.shapes import Shape, make
from peft_serve.engine.gpu_graphs import capturing_by, why_not
from peft_serve.engine.gpu_kernels import GpuKernels, speed_up
from peft_serve.model.base import ResidentBase
from peft_serve.model.cuda_graphs import CudaRecorder
from peft_serve.model.step_graphs import Capturing

_MAX_RANK: Final = 256  # a server's --max-rank: captured steps have room for it, whatever ranks there are


@dataclass(slots=True, kw_only=True)
class Bases:
    """The large bases of one process, made on the device; one at a time, since two may not fit."""

    device: torch.device
    _kept: tuple[Shape, ResidentBase, str, GpuKernels | None] | None = field(default=None)

    def get(self, shape: Shape) -> ResidentBase:
        """A base of this shape with random weights, run by the kernels that a server would use."""
        if self._kept is None or self._kept[0] != shape:
            self.drop()
            base, said = ResidentBase(make(shape, self.device), name=shape.name), list[str]()
            kernels = speed_up("auto", base, said.append)
            self._kept = shape, base, "; ".join(said) or "plain torch", kernels
        return self._kept[1]

    @property
    def runs_by(self) -> str:
        """What runs the base that is there, in words."""
        assert self._kept is not None, "a base is there"
        return self._kept[2]

    def capturing(self, *, max_rows: int, told: Callable[[str], None] = lambda _: None) -> Capturing | None:
        """How a server captures decode steps of the base that is there, None where they cannot be. Its attention is
        our own kernel from then on. `told` hears what becomes of each step."""
        assert self._kept is not None, "a base is there"
        _, base, _, kernels = self._kept
        if kernels is None or why_not(base, kernels) is not None:
            return None
        recorder = CudaRecorder(base.device)
        return capturing_by(recorder, base, kernels, max_rows=max_rows, max_rank=_MAX_RANK, told=told)

    def capturing_at_once(self, *, max_rows: int, told: Callable[[str], None] = lambda _: None) -> Capturing | None:
        """The same, for steps that are run again and again: each is captured when it is first seen."""
        capturing = self.capturing(max_rows=max_rows, told=told)
        return None if capturing is None else replace(capturing, seen=1)

    def drop(self) -> None:
        """Give its memory back."""
        self._kept = None
        if self.device.type == "cuda":
            gc.collect()  # a base and its sites refer to each other
            torch.cuda.empty_cache()


@dataclass(slots=True, kw_only=True)
class Ground:
    """One part's view of it all. With `is_quick` shapes are tiny and figures mean nothing."""

    device: torch.device
    is_quick: bool
    until_s: float = float("inf")
    clock: Callable[[], float] = time.perf_counter
    rates: MachineRates | None = None  # measured by the first part that asks for them
    bases: Bases = field(init=False)

    def __post_init__(self) -> None:
        self.bases = Bases(device=self.device)

    @property
    def is_gpu(self) -> bool:
        """Whether the device is one."""
        return self.device.type == "cuda"

    @property
    def left_s(self) -> float:
        """Seconds that the part still has."""
        return self.until_s - self.clock()

    def settle(self) -> None:
        """Wait until the device has done everything."""
        if self.is_gpu:
            torch.cuda.synchronize(self.device)
