"""Products of a few rows with a weight, y = x W^T + b, by a kernel of our own on a CPU.

Owns the packed copy of each weight: panels in the order in which they are read, float32 or bfloat16 as the weight is,
in bfloat16 for the CPU's matrix unit where it has one. A row's result has the same bits alone and in any batch, because
the order of its sum depends on the weight's size alone. Sums are float32; bfloat16 is rounded once, at the end. Knows
no layer and no model.

Shapes: `M` rows, `I` in and `O` out features.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from peft_serve.kernels.large_pages import LargePages
from peft_serve.kernels.native import NativeCode, NativeError

DTYPES: Final = (torch.float32, torch.bfloat16)
_FLOAT32, _BFLOAT16, _BFLOAT16_TILES = range(3)  # `Kind` of few_rows.cpp


class _Layer(ctypes.Structure):
    """`Layer` of few_rows.cpp."""

    _fields_ = (
        ("panels", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("num_out", ctypes.c_long),
        ("num_in", ctypes.c_long),
        ("kind", ctypes.c_int),
        ("by_vectors", ctypes.c_int),
    )


@dataclass(frozen=True, slots=True)
class Product:
    """x [..., I] -> x W^T + b [..., O], a new tensor, from a packed copy of W. x has W's dtype."""

    run: Any
    given: Any  # the kernel's function that gives rows of W back
    address: int  # of what the kernel knows as a layer
    num_out: int
    num_in: int
    dtype: torch.dtype
    kept: tuple[object, ...]  # what the address leads to lives as long as this

    def __call__(self, x: Tensor) -> Tensor:
        shape = x.shape
        assert x.dtype is self.dtype and shape[-1] == self.num_in, f"a product of {self.dtype} [.., {self.num_in}]"  # noqa: PT018
        if not x.is_contiguous():
            x = x.contiguous()
        y = torch.empty((*shape[:-1], self.num_out), dtype=self.dtype)
        self.run(self.address, x.data_ptr(), y.data_ptr(), x.numel() // self.num_in)
        return y

    def take(self, numbers_N: Tensor) -> Tensor:
        """Rows of W by number, [N, I], a new tensor with the bits that were packed; raises IndexError."""
        numbers_N = numbers_N.to(torch.int64).contiguous()
        if len(numbers_N) and not 0 <= int(numbers_N.min()) <= int(numbers_N.max()) < self.num_out:
            raise IndexError(f"a weight has rows 0 to {self.num_out - 1}; asked for is {numbers_N}")
        rows_NI = torch.empty(len(numbers_N), self.num_in, dtype=self.dtype)
        self.given(self.address, numbers_N.data_ptr(), len(numbers_N), rows_NI.data_ptr())
        return rows_NI


class FewRows:
    """Makes products. Raises NativeError where the library cannot be had or does not compute what it should."""

    def __init__(self, code: NativeCode, *, tiles: bool = True) -> None:
        """`tiles` False: do without the CPU's matrix unit."""
        library = code.library("few_rows")
        self.has_tiles = tiles and bool(library.few_rows_has_tiles())
        """Whether bfloat16 is multiplied by the CPU's matrix unit."""
        self._pack: Any = library.few_rows_pack
        self._pack.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long, ctypes.c_long]
        self._pack.restype = None
        self._run: Any = library.few_rows
        self._run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long]
        self._run.restype = None
        self._take: Any = library.few_rows_take
        self._take.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long, ctypes.c_void_p]
        self._take.restype = None
        self.each: Any = library.few_rows_each
        """Up to three products of the same rows at once: (addresses, count, x, addresses of results, rows)."""
        self._each_with: Any = getattr(library, "few_rows_each_with", None) if self.has_tiles else None
        self._memory = LargePages()
        self._size: Any = library.few_rows_size
        self._size.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_int]
        self._size.restype = ctypes.c_long
        self._by_vectors = self.has_tiles  # where there are one or two rows
        self._kinds = {
            torch.float32: _FLOAT32,
            torch.bfloat16: _BFLOAT16_TILES if self.has_tiles else _BFLOAT16,
        }
        self._try_out()

    def linear(self, weight_OI: Tensor, bias_O: Tensor | None) -> Product:
        """The product with a copy of W: as many bytes as W has, to the panel (and, in tiles, to 32 of I).

        W is float32 or bfloat16, on the CPU, of any strides.
        """
        weight = weight_OI.detach()
        (num_out, num_in), dtype = weight.shape, weight.dtype
        assert weight.device.type == "cpu", f"the kernel runs on a CPU, not on {weight.device}"
        assert dtype in DTYPES, f"the kernel computes {DTYPES}, not {dtype}"
        kind = self._kinds[dtype]
        panels = self._memory.empty(self._size(num_out, num_in, kind), dtype)
        bias = None if bias_O is None else bias_O.detach().float().clone()
        layer = _Layer(
            panels.data_ptr(), None if bias is None else bias.data_ptr(), num_out, num_in, kind, self._by_vectors
        )
        at = ctypes.addressof(layer)
        self._pack(at, weight.data_ptr(), weight.stride(0), weight.stride(1))
        return Product(self._run, self._take, at, num_out, num_in, dtype, (layer, panels, bias))

    def each_with(self, dtype: torch.dtype) -> Any:
        """`each` with low-rank terms on the same rows in one call: (.., addresses of their factors, each or null,
        segments). The bits are those of one behind the other. None where no kernel does both."""
        return self._each_with if dtype == torch.bfloat16 else None

    def _try_out(self) -> None:
        """A compiler's mistake is found here rather than in an answer."""
        generator = torch.Generator().manual_seed(0)
        with torch.inference_mode():
            for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
                x_MI, w_OI, b_O = (torch.randn(size, generator=generator) for size in ((35, 300), (67, 300), (67,)))
                x_MI, w_OI, b_O = x_MI.to(dtype), w_OI.to(dtype), b_O.to(dtype)
                product = self.linear(w_OI, b_O)
                y_MO, exact_MO = product(x_MI), x_MI.double() @ w_OI.double().t() + b_O.double()
                if self._by_vectors and any(not torch.equal(product(x_MI[:n])[-1], y_MO[n - 1]) for n in (1, 2)):
                    self._by_vectors = False  # a unit that sums in another order than the vectors: it multiplies all
                    product = self.linear(w_OI, b_O)
                if float((y_MO - exact_MO).abs().max() / exact_MO.abs().max()) > tolerance:
                    raise NativeError(f"few_rows.cpp computes {dtype} wrongly as this compiler translates it")
                if any(not torch.equal(product(x_MI[:n])[-1], y_MO[n - 1]) for n in range(1, len(x_MI))):
                    raise NativeError("few_rows.cpp sums a row in another order in another batch; use another compiler")
                if not torch.equal(product.take(torch.arange(len(w_OI))), w_OI):
                    raise NativeError(f"few_rows.cpp does not give {dtype} back as it was packed; use another compiler")
