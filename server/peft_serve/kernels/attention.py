"""Attention of one new token a row over blocks of keys and values, by a kernel of our own on a CPU.

The context is read where it lies: nothing is gathered, padded or masked. A row's result has the same bits alone and in
any batch. Knows neither pools nor plans: it is given tensors and says beforehand which sizes it covers.

Shapes: `R` rows, `H` query and `K` key/value heads, `D` head size, `P` places, `W` blocks of the longest row.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_serve.kernels.few_rows import DTYPES
from peft_serve.kernels.native import NativeCode


class _Pages(ctypes.Structure):
    """`Pages` of attention.cpp."""

    _fields_ = (
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("kv_heads", ctypes.c_long),
        ("head", ctypes.c_long),
        ("block_size", ctypes.c_long),
        ("is_bf16", ctypes.c_int),
    )


class _Rows(ctypes.Structure):
    """`Rows` of attention.cpp."""

    _fields_ = (
        ("blocks", ctypes.c_void_p),
        ("last", ctypes.c_void_p),
        ("rows", ctypes.c_long),
        ("width", ctypes.c_long),
        ("window", ctypes.c_long),
    )


@dataclass(frozen=True, slots=True)
class Pages:
    """One layer's keys and values, [P, K, D] twice, block after block."""

    facts: Any
    keys_PKD: Tensor
    values_PKD: Tensor


@dataclass(frozen=True, slots=True)
class Rows:
    """Whose context is read in a step: blocks [R * W], and each row's last position [R]."""

    facts: Any
    blocks: Tensor
    last_R: Tensor


class PagedAttention:
    """Raises NativeError where the library cannot be had."""

    def __init__(self, code: NativeCode) -> None:
        library = code.library("attention")
        long, pointer = ctypes.c_long, ctypes.c_void_p
        self._covers: Any = library.attention_covers
        self._covers.argtypes = [long, long]
        self.function: Any = library.attention
        """What `attend` calls, and others in C++; attention.cpp has its arguments."""
        self.function.argtypes = [pointer, pointer, pointer, long, long, pointer, long, ctypes.c_float]
        self.function.restype = None

    def covers(self, keys_PKD: Tensor, num_heads: int) -> bool:
        """Whether keys like these, on this device, are attended to here."""
        _, num_kv_heads, head = keys_PKD.shape
        if keys_PKD.device.type != "cpu" or keys_PKD.dtype not in DTYPES or not keys_PKD.is_contiguous():
            return False
        return bool(self._covers(head, num_heads // num_kv_heads))

    def pages(self, keys_PKD: Tensor, values_PKD: Tensor, block_size: int) -> Pages:
        """Says once where a layer's keys and values lie."""
        _, num_kv_heads, head = keys_PKD.shape
        where = keys_PKD.data_ptr(), values_PKD.data_ptr()
        facts = _Pages(*where, num_kv_heads, head, block_size, keys_PKD.dtype == torch.bfloat16)
        return Pages(facts, keys_PKD, values_PKD)

    def rows(self, blocks: Tensor, last_R: Tensor, window: int | None) -> Rows:
        """Says once a step which blocks its rows read; int64 both. A window counts the last position too."""
        num_rows = len(last_R)
        blocks, last_R = blocks.contiguous(), last_R.contiguous()
        width = blocks.numel() // num_rows
        facts = _Rows(blocks.data_ptr(), last_R.data_ptr(), num_rows, width, window or 0)
        return Rows(facts, blocks, last_R)

    def attend(self, pages: Pages, rows: Rows, q_RHD: Tensor, scaling: float) -> Tensor:
        """softmax(scaling q k^T) v, [R, H, D], a new tensor; q has the dtype of the keys and any strides of R and H."""
        if q_RHD.stride(2) != 1:
            q_RHD = q_RHD.contiguous()
        out_RHD = torch.empty(q_RHD.shape, dtype=q_RHD.dtype)
        self.function(
            ctypes.addressof(pages.facts),
            ctypes.addressof(rows.facts),
            q_RHD.data_ptr(),
            q_RHD.stride(0),
            q_RHD.stride(1),
            out_RHD.data_ptr(),
            q_RHD.shape[1],
            scaling,
        )
        return out_RHD
