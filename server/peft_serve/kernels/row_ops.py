"""What a layer does to each token by itself, one call each, by a kernel of our own on a CPU.

An RMS norm, the rotation of queries and keys with the storing of keys and values, a gate, the residual's addition. A
token's numbers have the same bits alone and in any batch. Knows neither modules nor plans: whether a module computes
this formula is found out by those who ask for it.

Shapes: `T` tokens, `I` features, `H` query and `K` key/value heads, `D` head size, `P` places of the pool.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor

from peft_serve.kernels.native import NativeCode

DTYPES: Final = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class RowFunctions:
    """The compiled functions for one dtype; they take addresses and sizes, as row_ops.cpp says."""

    rms_norm: Any
    own_rms_norm: Any
    rotate: Any
    gate: Any
    add: Any
    scale: Any
    shift: Any


@dataclass(frozen=True, slots=True)
class Norm:
    """gain * x / sqrt(mean(x^2) + epsilon), the gain being a weight + `offset` (Gemma's is 1)."""

    gain: Tensor
    epsilon: float
    offset: int = 0


class RowOps:
    """Float32 and bfloat16, on the CPU. Raises NativeError where the library cannot be had."""

    def __init__(self, code: NativeCode) -> None:
        library = code.library("row_ops")
        names = {torch.float32: "f32", torch.bfloat16: "bf16"}
        self.functions: Mapping[torch.dtype, RowFunctions] = MappingProxyType(
            {dtype: _functions(library, name) for dtype, name in names.items()}
        )

    def rms_norm(self, gain_I: Tensor, epsilon: float) -> Callable[[Tensor], Tensor]:
        """x [.., I] -> gain * x / sqrt(mean(x^2) + epsilon), a new tensor (arXiv:1910.07467)."""
        gain = gain_I.detach().contiguous()
        assert gain.device.type == "cpu" and gain.dtype in DTYPES, f"the kernel computes {DTYPES} on a CPU"  # noqa: PT018
        size, at, dtype = len(gain), gain.data_ptr(), gain.dtype
        run, empty_like = self.functions[dtype].rms_norm, torch.empty_like

        def norm(x: Tensor) -> Tensor:
            assert x.dtype is dtype and x.shape[-1] == size and gain is not None, f"a norm of {dtype} [.., {size}]"  # noqa: PT018
            if not x.is_contiguous():
                x = x.contiguous()
            y = empty_like(x)
            run(x.data_ptr(), at, y.data_ptr(), x.numel() // size, size, epsilon)
            return y

        return norm

    def own_rms_norm(self, gains_SI: Tensor, slot_T: Tensor, epsilon: float) -> Callable[[Tensor], Tensor]:
        """The same with the gain of each token's slot, for x [.., T, I] or x [.., T, H, I] without gaps, as many tokens
        as there are slots. A token's bits are those of `rms_norm` with its gain."""
        assert gains_SI.is_contiguous() and slot_T.dtype is torch.int64, "tables lie without gaps"  # noqa: PT018
        tokens, size, dtype = len(slot_T), gains_SI.shape[-1], gains_SI.dtype
        run, slots, empty_like = self.functions[dtype].own_rms_norm, slot_T.contiguous(), torch.empty_like

        def norm(x: Tensor) -> Tensor:
            assert x.dtype is dtype and x.shape[-1] == size, f"a norm of {dtype} [.., {size}]"  # noqa: PT018
            x = x.contiguous()
            y = empty_like(x)
            each = x.numel() // (tokens * size)
            run(x.data_ptr(), gains_SI.data_ptr(), slots.data_ptr(), y.data_ptr(), tokens, each, size, epsilon)
            return y

        return norm

    def rotate_and_store(
        self,
        q_THD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        angles_TD: tuple[Tensor, Tensor],
        places_T: Tensor,
        pages_PKD: tuple[Tensor, Tensor],
    ) -> None:
        """Turn q and k in place by the cosines and sines of their tokens (arXiv:2104.09864, halves of a head paired)
        and write k and v to their places of keys and values. Everything lies without gaps and is of one dtype; places
        are int64."""
        tokens, heads, head = q_THD.shape
        cosines, sines = angles_TD
        keys, values = pages_PKD
        self.functions[q_THD.dtype].rotate(
            q_THD.data_ptr(),
            k_TKD.data_ptr(),
            v_TKD.data_ptr(),
            cosines.data_ptr(),
            sines.data_ptr(),
            places_T.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            tokens,
            heads,
            k_TKD.shape[1],
            head,
        )

    def gate_(self, x: Tensor, up: Tensor) -> Tensor:
        """x <- silu(x) * up, in place, and returned (arXiv:2002.05202). Both lie without gaps and are of one dtype."""
        assert x.dtype is up.dtype and x.shape == up.shape, f"a gate of {x.shape} opens {up.shape}"  # noqa: PT018
        assert x.is_contiguous() and up.is_contiguous(), "both lie without gaps"  # noqa: PT018
        self.functions[x.dtype].gate(x.data_ptr(), up.data_ptr(), x.numel())
        return x


def _functions(library: ctypes.CDLL, dtype: str) -> RowFunctions:
    long, pointer = ctypes.c_long, ctypes.c_void_p
    return RowFunctions(
        rms_norm=_function(library, f"row_rms_norm_{dtype}", [pointer] * 3 + [long, long, ctypes.c_float]),
        own_rms_norm=_function(library, f"row_own_rms_norm_{dtype}", [pointer] * 4 + [long] * 3 + [ctypes.c_float]),
        rotate=_function(library, f"row_rotate_{dtype}", [pointer] * 8 + [long] * 4),
        gate=_function(library, f"row_gate_{dtype}", [pointer, pointer, long]),
        add=_function(library, f"row_add_{dtype}", [pointer, pointer, long]),
        scale=_function(library, f"row_scale_{dtype}", [pointer] * 4 + [long, long]),
        shift=_function(library, f"row_shift_{dtype}", [pointer] * 3 + [long, long]),
    )


def _function(library: ctypes.CDLL, name: str, argument_types: list[Any]) -> Any:
    function: Any = getattr(library, name)
    function.argtypes = argument_types
    function.restype = None
    return function
