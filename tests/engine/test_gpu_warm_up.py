"""Steps at start compile what requests would wait for, and leave nothing behind. On a CPU, by the interpreter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from peft_serve.engine import gpu_warm_up
from peft_serve.engine.gpu_kernels import GpuKernels
from peft_serve.engine.gpu_warm_up import StepSizes, warm_up
from peft_serve.model.base import ResidentBase
from peft_serve.model.routing import Stream
from tests.kernels.triton.interpreter import IS_INTERPRETED
from tests.model.driver import Driver, Job
from tests.model.tiny_encoders import tiny_encoder
from tests.model.tiny_models import tiny

SIZES = StepSizes(max_rows=3, max_step_tokens=70, max_context=80, block_size=4)


class Ticks:
    """A clock that goes on by a second at every look."""

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self) -> float:
        self._now += 1.0
        return self._now


def warmed(base: ResidentBase, sizes: StepSizes = SIZES) -> list[str]:
    said: list[str] = []
    warm_up(base, sizes, said.append, clock=Ticks())
    return said


@pytest.mark.parametrize(
    "make", [lambda: tiny("llama"), lambda: tiny("t5"), lambda: tiny_encoder("bert")], ids=["llama", "t5", "bert"]
)
def test_every_kind_of_base_is_warmed_up_and_left_as_it_was(make: Callable[[], Any]) -> None:
    base = ResidentBase(make(), name="tiny")
    before = base.fingerprint()
    assert warmed(base, replace(SIZES, max_context=40)) == ["kernels compiled for this base in 1.0 s"]
    assert base.fingerprint() == before
    for slot in (1, 2):
        with pytest.raises(ValueError, match=f"slot {slot} is empty"):
            base.adapted.route(Stream.TARGET, [(slot, 1)])


def test_a_step_that_fails_is_told_and_the_server_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    base = ResidentBase(tiny("llama"), name="tiny")

    def short(*_: object) -> object:
        raise torch.OutOfMemoryError("no memory is left")

    monkeypatch.setattr(gpu_warm_up, "_run_all", short)
    (said,) = warmed(base)
    assert said.startswith("kernels are compiled when they are first used")
    assert said.endswith("no memory is left")
    job = Job(prompt=(3, 4), num_new=2)
    Driver(base, seed=1).finish([job])
    assert len(job.output) == 2


@pytest.mark.skipif(not IS_INTERPRETED, reason="the tiny model is on a CPU")
def test_short_and_long_runs_with_and_without_vectors_are_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from peft_serve.kernels.triton.attention import TiledAttention
    from peft_serve.kernels.triton.low_rank import LowRankKernel

    seen = set()

    def watched(self: Any, layer: Any, y: Any, given: Any, out_scale: Any, shift: Any) -> None:
        seen.add((given.tiles.height, out_scale is not None))

    monkeypatch.setattr(LowRankKernel, "expand", watched)
    monkeypatch.setattr(LowRankKernel, "_shrink", _unset)
    base = ResidentBase(tiny("llama"), name="tiny")
    kernels = GpuKernels(attention=TiledAttention(), low_rank=LowRankKernel(torch.device("cpu"), num_slots=4))
    base.adapted.run_low_rank_by(kernels.low_rank)
    warmed(base)
    assert seen == {(16, False), (16, True), (64, False), (64, True)}
    assert kernels.low_rank.memory.slabs.num_held == 0


def _unset(self: Any, layer: Any, x: Any, tiles: Any, width: int) -> Any:
    """A shrink that launches nothing: the interpreter is slow."""
    from peft_serve.kernels.triton.low_rank import Shrunk

    return Shrunk(
        x, tiles, layer.group, torch.zeros(1, len(layer.group.members), tiles.num_tokens, width), {layer.index}
    )
