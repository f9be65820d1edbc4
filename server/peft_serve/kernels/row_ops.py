"""What a layer does to each token by itself, one call each, by a kernel of our own on a CPU.

An RMS norm, and the rotation of queries and keys with the storing of keys and values. A token's numbers have the same
bits alone and in any batch. Knows neither modules nor plans: whether a module computes this formula is found out by
those who ask for it.

Shapes: `T` tokens, `I` features, `H` query and `K` key/value heads, `D` head size, `P` places of the pool.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peft_serve.kernels.native import NativeCode


class RowOps:
    """Float32 alone, on the CPU. Raises NativeError where the library cannot be had."""

    def __init__(self, code: NativeCode) -> None:
        library = code.library("row_ops")
        long, pointer = ctypes.c_long, ctypes.c_void_p
        self._rms_norm: Any = library.row_rms_norm
        self._rms_norm.argtypes = [pointer, pointer, pointer, long, long, ctypes.c_float]
        self._rms_norm.restype = None
        self._rotate: Any = library.row_rotate
        self._rotate.argtypes = [pointer] * 8 + [long] * 4
        self._rotate.restype = None

    def rms_norm(self, gain_I: Tensor, epsilon: float) -> Callable[[Tensor], Tensor]:
        """x [.., I] -> gain * x / sqrt(mean(x^2) + epsilon), a new tensor (arXiv:1910.07467)."""
        gain = gain_I.detach().contiguous()
        assert gain.device.type == "cpu" and gain.dtype is torch.float32, "the kernel computes float32 on a CPU"  # noqa: PT018
        size, at = len(gain), gain.data_ptr()
        run, empty_like, dtype = self._rms_norm, torch.empty_like, torch.float32

        def norm(x: Tensor) -> Tensor:
            assert x.dtype is dtype and x.shape[-1] == size and gain is not None, f"a norm of float32 [.., {size}]"  # noqa: PT018
            if not x.is_contiguous():
                x = x.contiguous()
            y = empty_like(x)
            run(x.data_ptr(), at, y.data_ptr(), x.numel() // size, size, epsilon)
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
        and write k and v to their places of keys and values. Everything lies without gaps; places are int64."""
        tokens, heads, head = q_THD.shape
        cosines, sines = angles_TD
        keys, values = pages_PKD
        self._rotate(
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
