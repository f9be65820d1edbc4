"""A whole decoder layer in one call, by the kernels that compute its parts, on a CPU.

Owns the structures by which layer.cpp is told of a layer, a step, and the layer's keys, values and adapters in it.
Computes nothing of its own and knows no module: whether a layer is of this kind is found out by those who ask for it.

Shapes: `T` tokens, `I` features, `H` query and `K` key/value heads, `D` head size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from peft_serve.kernels.attention import PagedAttention, Pages, Rows
from peft_serve.kernels.few_rows import FewRows, Product
from peft_serve.kernels.low_rank import LowRankKernel, Segments, SlotFactors
from peft_serve.kernels.native import NativeCode
from peft_serve.kernels.row_ops import Norm, RowOps

NUM_PROJECTIONS: Final = 7  # q, k, v, o, gate, up, down

_POINTER, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
_KERNELS: Final = ("norm", "rotate", "gate", "add", "scale", "shift", "products", "low_rank", "attend")
_TERMS: Final = ("in_scale", "out_scale", "low_rank", "shift")


class _Kernels(ctypes.Structure):
    """`Kernels` of layer.cpp."""

    _fields_ = tuple((name, _POINTER) for name in _KERNELS)


class _Layer(ctypes.Structure):
    """`Layer` of layer.cpp."""

    _fields_ = (
        ("kernels", _POINTER),
        ("products", _POINTER * NUM_PROJECTIONS),
        *((name, _POINTER) for name in ("gain_before", "gain_after", "gain_q", "gain_k")),
        *((name, _FLOAT) for name in ("epsilon_before", "epsilon_after", "epsilon_q", "epsilon_k", "scale")),
        ("num_bytes", ctypes.c_int),
        *((name, _LONG) for name in ("size", "heads", "kv_heads", "head", "inner")),
    )


class _Pass(ctypes.Structure):
    """`Pass` of layer.cpp."""

    _fields_ = (
        ("tokens", _LONG),
        *((n, _POINTER) for n in ("places", "cosines", "sines", "rows", "segments", "slots", "scratch")),
    )


class _Terms(ctypes.Structure):
    """`Terms` of layer.cpp."""

    _fields_ = tuple((name, _POINTER) for name in _TERMS)


class _Here(ctypes.Structure):
    """`Here` of layer.cpp."""

    _fields_ = (*((name, _POINTER) for name in ("pages", "keys", "values")), ("terms", _Terms * NUM_PROJECTIONS))


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerParts:
    """What a layer is made of: its products in the order q, k, v, o, gate, up, down, and its norms."""

    products: tuple[Product, ...]
    before: Norm
    after: Norm
    heads: tuple[Norm, Norm] | None  # of each head's queries and keys
    head: int
    scaling: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFacts:
    """The tokens of a step, as all layers of one dtype and size read them. `rows` are those whose attention the kernel
    computes; None: it is computed elsewhere, for all of them."""

    num_tokens: int
    places_T: Tensor
    angles: tuple[Tensor, Tensor]  # cosines and sines, [1, T, D] each
    rows: Rows | None
    segments: Segments | None
    slot_T: Tensor | None  # of each token, int64; with the segments


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteTerms:
    """What a step's adapters do at a projection: y = out_scale * (W (in_scale * x) + b) + B A x + shift.

    Vectors stand in tables by slot, [S, D], neutral where a slot has none; None: no adapter of the step has one.
    """

    in_scale: Tensor | None = None
    out_scale: Tensor | None = None
    low_rank: SlotFactors | None = None
    shift: Tensor | None = None

    def addresses(self) -> tuple[int | None, ...]:
        """In the order in which the kernel has them."""
        vectors = (self.in_scale, self.out_scale, self.shift)
        assert all(v is None or v.is_contiguous() for v in vectors), "tables lie without gaps"
        in_scale, out_scale, shift = (None if v is None else v.data_ptr() for v in vectors)
        return in_scale, out_scale, None if self.low_rank is None else self.low_rank.address, shift


class LayerKernel:
    """Makes layers of the kernels of one process. Raises NativeError where the library cannot be had."""

    def __init__(
        self,
        code: NativeCode,
        *,
        few_rows: FewRows,
        low_rank: LowRankKernel,
        attention: PagedAttention,
        row_ops: RowOps,
    ) -> None:
        library = code.library("layer")
        self.scratch: Any = _function(library.layer_scratch, 1, _LONG)
        self.before: Any = _function(library.layer_before, 4)
        self.after: Any = _function(library.layer_after, 6)
        self.whole: Any = _function(library.layer_whole, 5)
        self._kernels = {
            dtype: _Kernels(
                *(_address(each) for each in (ops.rms_norm, ops.rotate, ops.gate, ops.add, ops.scale, ops.shift)),
                *(_address(each) for each in (few_rows.each, low_rank.each(dtype), attention.function)),
            )
            for dtype, ops in row_ops.functions.items()
        }

    def layer(self, parts: LayerParts) -> KernelLayer:
        """A layer of these parts, all of one dtype."""
        return KernelLayer(self, parts, self._kernels[parts.products[0].dtype])


class KernelLayer:
    """One layer: its facts, and its runs over the tokens of a step."""

    def __init__(self, kernel: LayerKernel, parts: LayerParts, kernels: _Kernels) -> None:
        q, k, _, _, gate, _, _ = parts.products
        norms = (parts.before, parts.after, *(parts.heads or ()))
        gains = [norm.gain.data_ptr() for norm in norms]
        epsilons = [norm.epsilon for norm in norms]
        missing = 4 - len(norms)
        self._facts = _Layer(
            ctypes.addressof(kernels),
            (_POINTER * NUM_PROJECTIONS)(*(product.address for product in parts.products)),
            *gains,
            *([None] * missing),
            *epsilons,
            *([0.0] * missing),
            parts.scaling,
            q.dtype.itemsize,
            q.num_in,
            q.num_out // parts.head,
            k.num_out // parts.head,
            parts.head,
            gate.num_out,
        )
        self._kept = (kernels, parts)  # what the addresses lead to
        self._kernel = kernel
        self._at = ctypes.addressof(self._facts)
        self._numbers = int(kernel.scratch(self._at))
        self.dtype = q.dtype
        self.num_heads, self.num_kv_heads, self.head = self._facts.heads, self._facts.kv_heads, parts.head
        self.sizes = (self.dtype, self._numbers, q.num_in, self.num_heads, self.num_kv_heads, parts.head)

    def step(self, facts: StepFacts) -> Step:
        """What this layer, and every other one of its sizes, is told of a step, with memory to compute in."""
        return Step(facts, torch.empty(facts.num_tokens * self._numbers, dtype=self.dtype))

    def whole(self, step: Step, here: Here, x: Tensor) -> Tensor:
        """[.., T, I] from x [.., T, I], which lies without gaps: everything, with the kernel's attention."""
        y = torch.empty_like(x)
        self._kernel.whole(self._at, step.address, here.address, x.data_ptr(), y.data_ptr())
        return y

    def before(self, step: Step, here: Here, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, H, D], keys and values [T, K, D] of x; keys and values are in their places too.

        They lie in the step's memory, until the next layer runs.
        """
        self._kernel.before(self._at, step.address, here.address, x.data_ptr())
        tokens, heads, kv_heads, head = step.num_tokens, self.num_heads, self.num_kv_heads, self.head
        behind_q, behind_k = tokens * heads * head, tokens * (heads + kv_heads) * head
        q = step.scratch[:behind_q].view(tokens, heads, head)
        k = step.scratch[behind_q:behind_k].view(tokens, kv_heads, head)
        v = step.scratch[behind_k : 2 * behind_k - behind_q].view(tokens, kv_heads, head)
        return q, k, v

    def after(self, step: Step, here: Here, x: Tensor, attended_THD: Tensor) -> Tensor:
        """[.., T, I] from x and what attention gave."""
        y, attended_THD = torch.empty_like(x), attended_THD.contiguous()
        given = x.data_ptr(), attended_THD.data_ptr(), y.data_ptr()
        self._kernel.after(self._at, step.address, here.address, *given)
        return y


class Step:
    """`Pass` of layer.cpp, with the memory that a step's layers compute in, one after the other."""

    def __init__(self, facts: StepFacts, scratch: Tensor) -> None:
        rows, segments = facts.rows, facts.segments
        cosines, sines = (angle.contiguous() for angle in facts.angles)
        self._pass = _Pass(
            facts.num_tokens,
            facts.places_T.data_ptr(),
            cosines.data_ptr(),
            sines.data_ptr(),
            None if rows is None else ctypes.addressof(rows.facts),
            None if segments is None else segments.address,
            None if facts.slot_T is None else facts.slot_T.data_ptr(),
            scratch.data_ptr(),
        )
        self._kept = (facts, cosines, sines)
        self.num_tokens = facts.num_tokens
        self.has_rows = rows is not None
        self.scratch = scratch
        self.address = ctypes.addressof(self._pass)


class Here:
    """`Here` of layer.cpp: a layer's keys and values, and what its adapters do by projection.

    Holds for as long as none of them moves. Without pages, the layer's attention is computed elsewhere.
    """

    def __init__(self, pages: Pages | None, keys_values: tuple[Tensor, Tensor], terms: Sequence[SiteTerms]) -> None:
        keys, values = keys_values
        self._here = _Here(
            None if pages is None else ctypes.addressof(pages.facts),
            keys.data_ptr(),
            values.data_ptr(),
            (_Terms * NUM_PROJECTIONS)(*(_Terms(*each.addresses()) for each in terms)),
        )
        self._kept = (pages, keys_values, tuple(terms))
        self.has_pages = pages is not None
        self.address = ctypes.addressof(self._here)


def _function(function: Any, num_pointers: int, result: Any = None) -> Any:
    function.argtypes = [_POINTER] * num_pointers
    function.restype = result
    return function


def _address(function: Any) -> int | None:
    return ctypes.cast(function, _POINTER).value
