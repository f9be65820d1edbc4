"""Block-diagonal maps by our own kernel: right for blocks of any size, and the same bits for a token in any step."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from peft_serve.kernels.block_diagonal import BlockDiagonalKernel, LayerBlocks
from peft_serve.kernels.low_rank import Segments
from peft_serve.kernels.native import NativeCode, NativeError, cache_folder, find_compiler

needs_compiler = pytest.mark.skipif(find_compiler(os.environ) is None, reason="this machine has no C++ compiler")
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
SIDES = {1: 1, 2: 4, 3: 7, 4: 12, 6: 28, 7: 42, 9: 84}  # by slot; slots 5 and 8 have nothing here
STEPS = [
    (((1, 0, 1),), 1),
    (tuple((slot, slot, slot + 1) for slot in range(1, 10)), 11),
    (((9, 1, 4), (2, 4, 9), (7, 9, 11), (5, 11, 13), (6, 13, 40), (3, 41, 47)), 50),
]


@pytest.fixture(scope="module")
def kernel() -> BlockDiagonalKernel:
    return BlockDiagonalKernel(NativeCode(find_compiler(os.environ), cache_folder(os.environ)))


@pytest.fixture(params=[1, 2])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def _random(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def _layer(kernel: BlockDiagonalKernel, dtype: torch.dtype, times: int) -> tuple[LayerBlocks, dict[int, Tensor]]:
    """Adapters at a layer of 84 features, so many times as wide."""
    layer = kernel.layer(84 * times, dtype)
    blocks = {slot: _random(84 * times // side, side, side, seed=slot).to(dtype) for slot, side in SIDES.items()}
    for slot, blocks_NKK in blocks.items():
        layer.put(slot, blocks_NKK)
    return layer, blocks


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("times", [1, 5])
def test_every_token_is_mixed_by_its_adapter_with_the_bits_it_has_alone(
    kernel: BlockDiagonalKernel, dtype: torch.dtype, times: int, num_threads: int
) -> None:
    layer, blocks = _layer(kernel, dtype, times)
    for runs, num_tokens in STEPS:
        x_TD = _random(num_tokens, 84 * times, seed=num_tokens).to(dtype)
        exact_TD, alone_TD, together_TD = x_TD.double(), x_TD.clone(), x_TD.clone()
        for slot, first, last in runs:
            if slot in blocks:
                own_TNK = x_TD[first:last].double().view(last - first, len(blocks[slot]), -1)
                exact_TD[first:last] = torch.einsum("tnk,nkj->tnj", own_TNK, blocks[slot].double()).flatten(1)
            for token in range(first, last):
                layer.op(Segments(((slot, 0, 1),), 1))(alone_TD[token, None], x_TD[token, None])
        layer.op(Segments(runs, num_tokens))(together_TD, x_TD)
        assert float((together_TD - exact_TD).abs().max() / exact_TD.abs().max()) < DTYPES[dtype]
        assert torch.equal(together_TD, alone_TD)
        layer.op(Segments(runs, num_tokens))(x_TD, x_TD)  # in place
        assert torch.equal(together_TD, x_TD)


@needs_compiler
def test_a_dropped_slot_mixes_nothing_and_a_used_one_what_is_new(kernel: BlockDiagonalKernel) -> None:
    layer, _ = _layer(kernel, torch.float32, 1)
    x_TD = _random(3, 84)
    layer.drop(4)
    y_TD = x_TD.clone()
    layer.op(Segments(((4, 0, 2), (5, 2, 3)), 3, num_slots=40))(y_TD, x_TD)
    assert torch.equal(y_TD, x_TD)
    layer.put(4, 2 * torch.eye(2).expand(42, 2, 2))
    layer.op(Segments(((4, 0, 2), (5, 2, 3)), 3))(y_TD, x_TD)
    assert torch.equal(y_TD, torch.cat([2 * x_TD[:2], x_TD[2:]]))


@needs_compiler
def test_tokens_of_another_step_are_refused(kernel: BlockDiagonalKernel) -> None:
    layer, _ = _layer(kernel, torch.float32, 1)
    with pytest.raises(ValueError, match=r"blocks for \[2, 84\] got x"):
        layer.op(Segments(((1, 0, 2),), 2))(_random(3, 84), _random(3, 84))


@needs_compiler
def test_what_has_gaps_or_another_dtype_is_mixed_too(kernel: BlockDiagonalKernel) -> None:
    layer, _ = _layer(kernel, torch.float32, 1)
    x_TD, wide = _random(4, 84), torch.zeros(4, 168)
    y_TD = x_TD.clone()
    mix = layer.op(Segments(((3, 0, 4),), 4))
    mix(y_TD, x_TD)
    mix(wide[:, ::2], x_TD.double())
    assert torch.equal(wide[:, ::2], y_TD)


@needs_compiler
def test_a_kernel_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    code = NativeCode(find_compiler(os.environ), cache_folder(os.environ))
    good = BlockDiagonalKernel(code)

    class Wrong(LayerBlocks):
        def put(self, slot: int, blocks_NKK: Tensor) -> None:
            super().put(slot, blocks_NKK + (1e-2 if slot == 3 else 0))

    monkeypatch.setattr(good, "layer", lambda size, dtype: Wrong(good, size, dtype))
    with pytest.raises(NativeError, match="wrongly"):
        good._try_out(torch.float32, 1e-5)
