"""Factors that have not come yet: the kernels read them where they will lie, and not before they are there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from peft_serve.kernels.low_rank import Segments
from tests.kernels.triton.interpreter import DEVICE

pytest.importorskip("triton", reason="Triton is not installed")

from peft_serve.kernels.triton.low_rank import LongRuns, LowRankKernel

SEGMENTS = Segments(((1, 0, 2), (2, 2, 3)), 4)


class Coming:
    """A tensor's place on the device, no number in it before somebody waits."""

    def __init__(self, source: Tensor) -> None:
        self.source = source
        self.place = torch.full_like(source, float("nan"))
        self.num_waits = 0

    def wait(self) -> None:
        self.num_waits += 1
        self.place.copy_(self.source)


def added(op: Callable[[Tensor, Tensor], object], x: Tensor) -> Tensor:
    y = torch.zeros(len(x), 32, device=DEVICE)
    op(y, x)
    return y


@pytest.mark.parametrize("long_runs", list(LongRuns))
def test_they_are_waited_for_where_another_layer_has_them_read(long_runs: LongRuns) -> None:
    """Layers that read one tensor share a product: the first of them reads what only the second has."""
    kernel = LowRankKernel(torch.device(DEVICE), long_runs=long_runs)
    first, second = (kernel.layer(48, 32, torch.float32, "attention") for _ in range(2))
    a, b, own_a, own_b = (torch.randn(size, device=DEVICE) for size in ((3, 48), (3, 32), (2, 48), (2, 32)))
    x = torch.randn(4, 48, device=DEVICE)
    for layer in (first, second):
        layer.put(1, a, b.t())
    for layer in (first, second):  # they are seen to share
        added(layer.op(SEGMENTS), x)
    coming_a, coming_b = Coming(own_a), Coming(own_b)

    def wait() -> None:
        coming_a.wait()
        coming_b.wait()

    second.put_early(2, coming_a.place, coming_b.place.t(), wait)
    used = kernel.memory.slabs.num_used
    assert coming_a.num_waits == 0, "putting them there reads nothing"
    ops = [layer.op(SEGMENTS) for layer in (first, second)]
    assert torch.allclose(added(ops[0], x)[2:], torch.zeros(2, 32, device=DEVICE))
    found = added(ops[1], x)
    assert torch.allclose(found[2], x[2] @ own_a.t() @ own_b, atol=1e-5)
    assert torch.allclose(found[:2], x[:2] @ a.t() @ b, atol=1e-5)
    assert coming_a.num_waits == 1, "once"
    assert kernel.memory.slabs.num_used == used, "they are nowhere else"
    second.drop(2)
    assert not kernel.awaiting


def test_what_lies_otherwise_is_copied_when_it_has_come() -> None:
    kernel = LowRankKernel(torch.device(DEVICE))
    layer = kernel.layer(48, 32, torch.float32)
    coming, b = Coming(torch.randn(2, 48, device=DEVICE)), torch.randn(32, 2, device=DEVICE)
    layer.put_early(2, coming.place, b, coming.wait)
    assert coming.num_waits == 1
    coming.place.fill_(float("nan"))
    x = torch.randn(4, 48, device=DEVICE)
    assert torch.allclose(added(layer.op(SEGMENTS), x)[2], x[2] @ coming.source.t() @ b.t(), atol=1e-5)


def test_who_leaves_before_anybody_read_it_is_not_waited_for() -> None:
    kernel = LowRankKernel(torch.device(DEVICE))
    layer = kernel.layer(48, 32, torch.float32)
    coming, b = Coming(torch.randn(2, 48, device=DEVICE)), torch.randn(2, 32, device=DEVICE)
    layer.put_early(2, coming.place, b.t(), coming.wait)
    layer.drop(2)
    assert not added(layer.op(SEGMENTS), torch.randn(4, 48, device=DEVICE)).any()
    assert coming.num_waits == 0
