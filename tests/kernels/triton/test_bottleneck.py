"""Bottlenecks in Triton, by its interpreter: of any size in one step, with every activation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peft_serve.adapters.adapterhub.schemas import ACTIVATIONS as HUB_ACTIVATIONS
from peft_serve.kernels.bottleneck import Squeeze
from peft_serve.kernels.low_rank import Segments
from peft_serve.model.terms.bottlenecks import activation_of
from tests.kernels.triton.interpreter import DEVICE

pytest.importorskip("triton", reason="Triton is not installed")

from peft_serve.kernels.triton.bottleneck import ACTIVATIONS, BottleneckKernel, LayerSqueezes
from peft_serve.kernels.triton.memory import DeviceMemory

HERE = torch.device(DEVICE)
NUM_FEATURES = 40
ROWS = [(1, 0, 2), (2, 2, 20), (9, 21, 22), (1, 22, 23)]
OWN = [token for _, first, last in ROWS for token in range(first, last)]


def _layer(dtype: torch.dtype) -> tuple[LayerSqueezes, dict[int, Squeeze]]:
    make = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=make).to(HERE, dtype)

    layer = BottleneckKernel(DeviceMemory(HERE, num_slots=2)).layer(NUM_FEATURES, dtype)
    squeezes = {
        slot: Squeeze(
            down_BD=0.3 * random(size, NUM_FEATURES),
            down_bias_B=random(size),
            up_DB=random(NUM_FEATURES, size),
            up_bias_D=random(NUM_FEATURES),
            scale_D=random(NUM_FEATURES),
        )
        for slot, size in ((1, 3), (2, 70), (9, 16))
    }
    for slot, squeeze in squeezes.items():
        layer.put(slot, squeeze)
    return layer, squeezes


def _expected(x_TD: Tensor, squeezes: dict[int, Squeeze], activation: str) -> Tensor:
    y_TD = torch.zeros_like(x_TD, dtype=torch.float64)
    for slot, first, last in ROWS:
        its = squeezes[slot]
        low = x_TD[first:last].double() @ its.down_BD.double().t() + its.down_bias_B.double()
        high = activation_of(activation)(low) @ its.up_DB.double().t() + its.up_bias_D.double()
        y_TD[first:last] = its.scale_D.double() * high
    return y_TD


def test_it_knows_what_adapterhub_knows() -> None:
    assert frozenset(HUB_ACTIVATIONS) == ACTIVATIONS


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy says where exp is too large, which is meant
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_every_activation(activation: str) -> None:
    layer, squeezes = _layer(torch.float32)
    x_TD = torch.randn(24, NUM_FEATURES, generator=torch.Generator().manual_seed(4)).to(HERE)
    x_TD[2] *= 12  # where they bend
    expected_TD = _expected(x_TD, squeezes, activation)[2:9]
    y_TD = layer.op(Segments([(2, 2, 9)], 24), activation)(x_TD)[2:9]
    torch.testing.assert_close(y_TD.double(), expected_TD, rtol=1e-5, atol=1e-5 * float(expected_TD.max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types(dtype: torch.dtype) -> None:
    layer, squeezes = _layer(dtype)
    x_TD = torch.randn(24, NUM_FEATURES, generator=torch.Generator().manual_seed(4)).to(HERE, dtype)
    expected_TD = _expected(x_TD, squeezes, "gelu")
    y_TD = layer.op(Segments(ROWS, 24), "gelu")(x_TD)
    room = (2e-2 if dtype is torch.bfloat16 else 3e-3) * float(expected_TD.abs().max())
    torch.testing.assert_close(y_TD[OWN].double(), expected_TD[OWN], rtol=0, atol=room)


def test_slots_change_hands_and_other_lengths_are_refused() -> None:
    layer, squeezes = _layer(torch.float32)
    x_TD = torch.randn(24, NUM_FEATURES, device=HERE)
    layer.drop(5)  # had nothing
    layer.put(2, squeezes[9])
    op = layer.op(Segments(ROWS, 24), "relu")
    expected_TD = _expected(x_TD, squeezes | {2: squeezes[9]}, "relu")
    torch.testing.assert_close(op(x_TD)[OWN].double(), expected_TD[OWN], rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match=r"bottlenecks for \[24, 40\] got x"):
        op(x_TD[1:])
