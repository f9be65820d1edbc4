"""Block-diagonal maps of many adapters at one layer, x -> concat_j(x_j R_j), by a kernel of our own on a CPU.

One call does all adapters of a step, whatever the sizes of their blocks, and reads the blocks where they lie. Sums are
float32, and a result is rounded once. A token has the same bits alone and in any step.

Shapes: `T` tokens, `D` features, `n` blocks of size `k`, n k = D.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from peft_serve.kernels.low_rank import DTYPES, Segments
from peft_serve.kernels.mixing import Mix
from peft_serve.kernels.native import NativeCode, NativeError
from peft_serve.kernels.slot_numbers import SlotFactors, SlotNumbers


class LayerBlocks:
    """The blocks of one layer's adapters by slot, and where they lie."""

    def __init__(self, kernel: BlockDiagonalKernel, num_features: int, dtype: torch.dtype) -> None:
        self._run = kernel.function(dtype)
        self._num_features, self._dtype = num_features, dtype
        self._kept: dict[int, Tensor] = {}
        self._table = SlotNumbers(num_features, each=3)  # where its blocks lie, their size, and how many they are

    def put(self, slot: int, blocks_NKK: Tensor) -> None:
        """Keep an adapter's blocks."""
        num_blocks, size = blocks_NKK.shape[:2]
        assert blocks_NKK.shape == (num_blocks, size, size), "blocks are squares"
        assert num_blocks * size == self._num_features, "blocks fit their layer"
        own_NKK = blocks_NKK.to(self._dtype).contiguous()
        self._kept[slot] = own_NKK
        self._table.write(slot, own_NKK.data_ptr(), size, num_blocks)

    def drop(self, slot: int) -> None:
        """Forget the slot, if it has something here. Ops that were made before are not to be called again."""
        if self._kept.pop(slot, None) is not None:
            self._table.clear(slot)

    def op(self, segments: Segments) -> Mix:
        """Mixes the tokens of a step's adapters; those that have nothing here are passed over."""
        blocks, run, dtype = self._table.reaching(segments.num_slots), self._run, self._dtype
        shape = (segments.num_tokens, self._num_features)

        def mix(y_TD: Tensor, x_TD: Tensor) -> None:
            if x_TD.shape != shape or y_TD.shape != shape:
                raise ValueError(f"blocks for {list(shape)} got x {x_TD.shape} and y {y_TD.shape}")
            x_TD = x_TD.to(dtype).contiguous()
            own_TD = y_TD.to(dtype).contiguous()  # y itself, as a rule
            run(blocks.address, segments.address, own_TD.data_ptr(), x_TD.data_ptr())
            if own_TD is not y_TD:
                y_TD.copy_(own_TD)

        return mix

    def by_slot(self, segments: Segments) -> SlotFactors:
        """The blocks that the kernel reads for the adapters of a step, for a caller in C++."""
        return self._table.reaching(segments.num_slots)


class BlockDiagonalKernel:
    """The compiled kernel. Raises NativeError where it cannot be had or does not compute what it should."""

    def __init__(self, code: NativeCode) -> None:
        library = code.library("block_diagonal")
        self._functions = {torch.float32: library.block_diagonal_f32, torch.bfloat16: library.block_diagonal_bf16}
        for function in self._functions.values():
            function.argtypes = [ctypes.c_void_p] * 4
            function.restype = None
        with torch.inference_mode():
            for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
                self._try_out(dtype, tolerance)

    def function(self, dtype: torch.dtype) -> Any:
        """(layer, segments, y, x), addresses all."""
        return self._functions[dtype]

    def serves(self, like: Tensor) -> bool:
        """Whether it computes with tensors of this kind."""
        return like.dtype in DTYPES and like.device.type == "cpu"

    def layer(self, num_features: int, dtype: torch.dtype) -> LayerBlocks:
        """A layer without blocks yet."""
        return LayerBlocks(self, num_features, dtype)

    def _try_out(self, dtype: torch.dtype, tolerance: float) -> None:
        """A compiler's mistake is found here rather than in an answer."""
        generator = torch.Generator().manual_seed(0)
        layer, x_TD = self.layer(84, dtype), torch.randn(9, 84, generator=generator).to(dtype)
        exact_TD, runs = x_TD.double(), ((1, 0, 1), (2, 1, 7), (3, 7, 9))
        for (slot, first, last), size in zip(runs, (42, 12, 7), strict=True):
            blocks_NKK = torch.randn(84 // size, size, size, generator=generator).to(dtype)
            layer.put(slot, blocks_NKK)
            own_TNK = x_TD[first:last].double().view(last - first, -1, size)
            exact_TD[first:last] = torch.einsum("tnk,nkj->tnj", own_TNK, blocks_NKK.double()).flatten(1)
        together_TD, alone_TD = x_TD.clone(), x_TD.clone()
        layer.op(Segments(runs, 9))(together_TD, together_TD)
        for token, slot in enumerate((1, *[2] * 6, *[3] * 2)):
            one_TD = x_TD[token : token + 1]
            layer.op(Segments(((slot, 0, 1),), 1))(alone_TD[token : token + 1], one_TD)
        if float((together_TD - exact_TD).abs().max() / exact_TD.abs().max()) > tolerance:
            raise NativeError(f"block_diagonal.cpp computes {dtype} wrongly as this compiler translates it")
        if not torch.equal(together_TD, alone_TD):
            raise NativeError("block_diagonal.cpp sums a token in another order in another step; use another compiler")
