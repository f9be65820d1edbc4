"""The trial of the kernels for mixers, bottlenecks and gated prompts, in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from peft_serve.engine import gpu_terms
from peft_serve.kernels.low_rank import Segments
from peft_serve.kernels.mixing import Mix
from peft_serve.model.base import ResidentBase
from peft_serve.model.terms.term import OtherKernels
from tests.kernels.triton.interpreter import IS_INTERPRETED
from tests.model.tiny_models import tiny

pytest.importorskip("triton", reason="Triton is not installed")

pytestmark = pytest.mark.skipif(not IS_INTERPRETED, reason="the tiny model is on a CPU")


class DoesNothing:
    """A kernel that leaves its tokens as they are."""

    def serves(self, like: Tensor) -> bool:
        return True

    def layer(self, *_: object) -> DoesNothing:
        return self

    def put(self, *_: object) -> None: ...

    def drop(self, slot: int) -> None: ...

    def op(self, segments: Segments) -> Mix:
        return lambda *_: None


@pytest.mark.parametrize("kind", ["mixing", "gated"])
def test_the_kernels_are_right_and_one_that_is_not_is_found(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    from peft_serve.kernels.triton.memory import DeviceMemory

    base, memory = ResidentBase(tiny("llama"), name="tiny"), DeviceMemory(torch.device("cpu"))
    assert gpu_terms.others_error(memory, base) < 1e-5
    assert memory.slabs.num_held == 0, "nothing is left of the trial"
    right = gpu_terms.other_kernels

    def wrong(memory: DeviceMemory) -> OtherKernels:
        return replace(right(memory), **{kind: DoesNothing()})

    monkeypatch.setattr(gpu_terms, "other_kernels", wrong)
    assert gpu_terms.others_error(memory, base) > 0.1
