"""A decoder layer on a CPU by its stages, as many in one call as the step allows, by the kernels of its parts.

Owns the structures by which layer.cpp is told of a layer, a step, and the layer's keys, values and adapters in it, and
the memory between stages. Computes nothing of its own and knows no module: whether a layer is of this kind, and what
happens between which of its stages, is found out by those who ask for it.

Shapes: `T` tokens, `I` features, `H` query and `K` key/value heads, `D` head size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

import torch
from torch import Tensor

from peft_serve.kernels.attention import PagedAttention, Pages, Rows
from peft_serve.kernels.block_diagonal import BlockDiagonalKernel
from peft_serve.kernels.few_rows import FewRows, Product
from peft_serve.kernels.low_rank import LowRankKernel, Segments
from peft_serve.kernels.native import NativeCode
from peft_serve.kernels.row_ops import Norm, RowOps
from peft_serve.kernels.slot_numbers import SlotFactors

NUM_PROJECTIONS: Final = 7  # q, k, v, o, gate, up, down
NUM_NORMS: Final = 4  # before attention, of each head's queries and keys, after attention

_POINTER, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
_KERNELS: Final = (
    *("norm", "own_norm", "rotate", "gate", "add", "scale", "shift"),
    *("products", "products_with", "low_rank", "mix", "attend"),
)
_TERMS: Final = ("in_scale", "in_mix", "out_scale", "out_mix", "low_rank", "shift")
_MEMORY: Final = ("q", "k", "v", "attended", "normed", "gate", "up", "given")


class Stage(IntEnum):
    """What a layer does, one after the other; `Stage` of layer.cpp."""

    NORM_BEFORE = 0
    READ = 1  # queries, keys and values
    NORM_HEADS = 2
    ROTATE = 3  # and keep keys and values
    ATTEND = 4
    WRITE = 5  # the output projection
    ADD_WRITTEN = 6
    NORM_AFTER = 7
    OPEN = 8  # gate and up
    GATE_OPENED = 9
    CLOSE = 10  # down
    ADD_CLOSED = 11
    END = 12


class _Kernels(ctypes.Structure):
    """`Kernels` of layer.cpp."""

    _fields_ = tuple((name, _POINTER) for name in _KERNELS)


class _Norm(ctypes.Structure):
    """`Norm` of layer.cpp."""

    _fields_ = (("gain", _POINTER), ("epsilon", _FLOAT))


class _Layer(ctypes.Structure):
    """`Layer` of layer.cpp."""

    _fields_ = (
        ("kernels", _POINTER),
        ("products", _POINTER * NUM_PROJECTIONS),
        ("norms", _Norm * NUM_NORMS),
        ("scale", _FLOAT),
        ("num_bytes", ctypes.c_int),
        *((name, _LONG) for name in ("size", "heads", "kv_heads", "head", "inner")),
    )


class _Pass(ctypes.Structure):
    """`Pass` of layer.cpp."""

    _fields_ = (
        ("tokens", _LONG),
        *((n, _POINTER) for n in ("places", "cosines", "sines", "rows", "segments", "slots", *_MEMORY)),
    )


class _Terms(ctypes.Structure):
    """`Terms` of layer.cpp."""

    _fields_ = (*((name, _POINTER) for name in _TERMS), ("is_elsewhere", _LONG))


class _Here(ctypes.Structure):
    """`Here` of layer.cpp."""

    _fields_ = (
        *((name, _POINTER) for name in ("pages", "keys", "values")),
        ("terms", _Terms * NUM_PROJECTIONS),
        ("gains", _POINTER * NUM_NORMS),
    )


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
    """What a step's adapters do at a projection: y = mixed(out_scale * (W mixed(in_scale * x) + b)) + B A x + shift.

    Vectors stand in tables by slot, [S, D], neutral where a slot has none; None: no adapter of the step has one.
    A projection `is_elsewhere` if the kernel is to leave it out.
    """

    in_scale: Tensor | None = None
    in_mix: SlotFactors | None = None
    out_scale: Tensor | None = None
    out_mix: SlotFactors | None = None
    low_rank: SlotFactors | None = None
    shift: Tensor | None = None
    is_elsewhere: bool = False

    def addresses(self) -> tuple[int | None, ...]:
        """In the order in which the kernel has them."""
        return (*(_at(getattr(self, name)) for name in _TERMS), self.is_elsewhere)


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What lies between the stages of a step's layers, one layer after the other: [T, D] each, without gaps."""

    q: Tensor
    k: Tensor
    v: Tensor
    attended: Tensor  # where the kernel attends
    normed: Tensor  # what the last projection gives, too
    gate: Tensor
    up: Tensor
    given: Tensor  # what enters a product


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
        blocks: BlockDiagonalKernel,
    ) -> None:
        library = code.library("layer")
        self.run: Any = library.layer_run
        self.run.argtypes = [_POINTER] * 6 + [_LONG] * 2
        self.run.restype = None
        self.run_each: Any = library.layers_run
        self.run_each.argtypes = [_POINTER] * 2 + [_LONG] + [_POINTER] * 4
        self.run_each.restype = None
        self._kernels = {
            dtype: _Kernels(
                *(_address(each) for each in (ops.rms_norm, ops.own_rms_norm, ops.rotate, ops.gate, ops.add)),
                *(_address(each) for each in (ops.scale, ops.shift, few_rows.each)),
                _address(few_rows.each_with(dtype)) if low_rank.has_tiles else None,
                *(_address(each) for each in (low_rank.each(dtype), blocks.function(dtype), attention.function)),
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
        norms = (parts.before, *(parts.heads or (None, None)), parts.after)
        self._facts = _Layer(
            ctypes.addressof(kernels),
            (_POINTER * NUM_PROJECTIONS)(*(product.address for product in parts.products)),
            (_Norm * NUM_NORMS)(
                *(_Norm(None, 0.0) if n is None else _Norm(n.gain.data_ptr(), n.epsilon) for n in norms)
            ),
            parts.scaling,
            q.dtype.itemsize,
            q.num_in,
            q.num_out // parts.head,
            k.num_out // parts.head,
            parts.head,
            gate.num_out,
        )
        self._kept = (kernels, parts)  # what the addresses lead to
        self.kernel = kernel
        self.address = ctypes.addressof(self._facts)
        self.dtype = q.dtype
        self.num_heads, self.num_kv_heads, self.head = self._facts.heads, self._facts.kv_heads, parts.head
        self._widths = (
            *(q.num_out, k.num_out, k.num_out, q.num_out, q.num_in),
            *(gate.num_out, gate.num_out, max(q.num_in, q.num_out, gate.num_out)),
        )
        self.sizes = (self.dtype, *self._widths, parts.head)

    def step(self, facts: StepFacts) -> Step:
        """What this layer, and every other one of its sizes, is told of a step, with memory to compute in."""
        memory = (torch.empty(facts.num_tokens, width, dtype=self.dtype) for width in self._widths)
        return Step(facts, Memory(**dict(zip(_MEMORY, memory, strict=True))))

    def run(
        self, step: Step, here: Here, x: Tensor, y: Tensor, first: Stage, last: Stage, attended: Tensor | None = None
    ) -> None:
        """Stages [first, last) of the way from x [.., T, I] to y [.., T, I], both without gaps.

        `attended` [T, H D], without gaps, is what the output projection reads where the kernel has not attended.
        """
        given = (x.data_ptr(), (step.memory.attended if attended is None else attended).data_ptr(), y.data_ptr())
        self.kernel.run(self.address, step.address, here.address, *given, first, last)


class LayerRow:
    """Layers of the same sizes, whole and one after the other, in one call."""

    def __init__(self, layers: Sequence[KernelLayer], heres: Sequence[Here]) -> None:
        self._kept = (tuple(layers), tuple(heres))
        pointers = _POINTER * len(layers)
        self._layers = pointers(*(layer.address for layer in layers))
        self._heres = pointers(*(here.address for here in heres))
        self._kernel, self._count = layers[0].kernel, len(layers)

    def run(self, step: Step, x: Tensor, y: Tensor) -> None:
        """From x [.., T, I] to y [.., T, I], both without gaps."""
        between = torch.empty_like(x)
        places = (x.data_ptr(), between.data_ptr(), y.data_ptr())
        self._kernel.run_each(self._layers, self._heres, self._count, step.address, *places)


class Step:
    """`Pass` of layer.cpp, with the memory that a step's layers compute in, one after the other."""

    def __init__(self, facts: StepFacts, memory: Memory) -> None:
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
            *(getattr(memory, name).data_ptr() for name in _MEMORY),
        )
        self._kept = (facts, cosines, sines)
        self.num_tokens = facts.num_tokens
        self.has_rows = rows is not None
        self.memory = memory
        self.address = ctypes.addressof(self._pass)


class Here:
    """`Here` of layer.cpp: a layer's keys and values, what its adapters do by projection, and their own gains by norm,
    tables by slot [S, D] each.

    Holds for as long as none of them moves. Without pages, the layer's attention is computed elsewhere.
    """

    def __init__(
        self,
        pages: Pages | None,
        keys_values: tuple[Tensor, Tensor],
        terms: Sequence[SiteTerms],
        gains: Sequence[Tensor | None],
    ) -> None:
        keys, values = keys_values
        self._here = _Here(
            None if pages is None else ctypes.addressof(pages.facts),
            keys.data_ptr(),
            values.data_ptr(),
            (_Terms * NUM_PROJECTIONS)(*(_Terms(*each.addresses()) for each in terms)),
            (_POINTER * NUM_NORMS)(*map(_at, gains)),
        )
        self._kept = (pages, keys_values, tuple(terms), tuple(gains))
        self.has_pages = pages is not None
        self.address = ctypes.addressof(self._here)


def _at(told: Tensor | SlotFactors | None) -> int | None:
    """Where it lies."""
    if told is None:
        return None
    if isinstance(told, SlotFactors):
        return told.address
    assert told.is_contiguous(), "tables lie without gaps"
    return told.data_ptr()


def _address(function: Any) -> int | None:
    return None if function is None else ctypes.cast(function, _POINTER).value
