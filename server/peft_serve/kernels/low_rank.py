"""Low-rank terms of many adapters at one linear layer, y[t] += B_k (A_k x[t]), by a kernel of our own on a CPU.

One call does all adapters of a step, whatever their ranks, and reads their factors where they lie. Sums are float32,
and a result is rounded once. A token's term has the same bits alone and in any step, because the order of its sums
depends on the rank and the number of inputs alone; nothing of one adapter meets another's tokens.

Shapes: `T` tokens, `I` in and `O` out features, `R` rank.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Iterable
from typing import Any, Final, Protocol, runtime_checkable

import torch
from torch import Tensor

from peft_serve.kernels.native import NativeCode, NativeError
from peft_serve.kernels.slot_numbers import SlotFactors, SlotNumbers

DTYPES: Final = (torch.float32, torch.bfloat16)

Add = Callable[[Tensor, Tensor], object]
"""(y [.., O], x [.., I]) -> y changed in place."""


class Factors(Protocol):
    """The factors of one layer's adapters by slot, and the ops that read them; on a CPU and on a GPU."""

    @property
    def fuses_vectors(self) -> bool:
        """Whether ops take tables of vectors by slot, [S, O]: y = out_scale * y + B A x + shift in one call."""
        ...

    def put(self, slot: int, a_RI: Tensor, b_OR: Tensor) -> None: ...

    def put_early(self, slot: int, a_RI: Tensor, b_OR: Tensor, wait: Callable[[], None]) -> None:
        """`put` factors that are on their way to the device; `wait` has it wait for them, before anything reads them.

        They are to lie still until `drop`.
        """
        ...

    def drop(self, slot: int) -> None: ...

    def op(self, segments: Segments, out_scale: Tensor | None = None, shift: Tensor | None = None) -> Add: ...


class LowRankKernels(Protocol):
    """Who makes them. Layers of one parent, a module's path, may be given the same inputs."""

    def serves(self, like: Tensor) -> bool: ...

    def layer(self, num_in: int, num_out: int, dtype: torch.dtype, parent: str | None = None) -> Factors: ...


@runtime_checkable
class LooksUp(Protocol):
    """A kernel for layers that are given ids: A has a column for each."""

    def lookup(self, num_ids: int, num_out: int, dtype: torch.dtype) -> Factors:
        """Ops take the ids [T] in place of x."""
        ...


class Segments:
    """Tokens [first, last) and the slot of their adapter, (slot, first, last) each, in the order of the tokens, as the
    kernel reads them.

    Made once for a step; serves every layer.
    """

    def __init__(self, each: Iterable[tuple[int, int, int]], num_tokens: int, *, num_slots: int = 0) -> None:
        """`num_slots`: for so many slots at least a layer's table has room behind this."""
        rows = tuple(each)
        ends = (0, *(last for _, _, last in rows))
        assert all(end <= first < last for end, (_, first, last) in zip(ends, rows, strict=False)), rows
        assert ends[-1] <= num_tokens, (rows, num_tokens)
        self.each = rows
        self.num_tokens = num_tokens
        self.num_slots = max(num_slots, 1 + max((slot for slot, _, _ in rows), default=0))
        self._numbers = array("q", (len(rows), *(number for row in rows for number in row)))
        self.address = self._numbers.buffer_info()[0]


class LayerFactors:
    """The factors of one layer's adapters by slot, and where they lie."""

    fuses_vectors: Final = False

    def __init__(self, kernel: LowRankKernel, num_in: int, num_out: int, dtype: torch.dtype) -> None:
        self._run = kernel.function(dtype)
        self._dtype = dtype
        self._num_in, self._num_out = num_in, num_out
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._table = SlotNumbers(num_in, num_out, each=3)  # the addresses of A and B, and the rank

    def put(self, slot: int, a_RI: Tensor, b_OR: Tensor) -> None:
        """Keep an adapter's factors: A as it is, B turned, so that both are read along their rows.

        Those that lie so, in the layer's type, are kept as they are, in the memory they came in.
        """
        a_RI, b_RO = a_RI.to(self._dtype).contiguous(), b_OR.to(self._dtype).t().contiguous()
        rank = len(a_RI)
        assert a_RI.shape == (rank, self._num_in), "a factor fits its layer"
        assert b_RO.shape == (rank, self._num_out), "a factor fits its layer"
        self._kept[slot] = a_RI, b_RO
        self._table.write(slot, a_RI.data_ptr(), b_RO.data_ptr(), rank)

    def put_early(self, slot: int, a_RI: Tensor, b_OR: Tensor, wait: Callable[[], None]) -> None:
        """`put`, behind what has to come first."""
        wait()
        self.put(slot, a_RI, b_OR)

    def drop(self, slot: int) -> None:
        """Forget the slot, if it has something here. Ops that were made before are not to be called again."""
        if self._kept.pop(slot, None) is not None:
            self._table.clear(slot)

    def op(self, segments: Segments, out_scale: Tensor | None = None, shift: Tensor | None = None) -> Add:
        """Adds the terms of a step's adapters; those that have none here are passed over."""
        assert out_scale is None and shift is None, "vectors are terms of their own here"  # noqa: PT018
        factors, run = self._table.reaching(segments.num_slots), self._run
        layer, steps = factors.address, segments.address
        num_x, num_y = segments.num_tokens * self._num_in, segments.num_tokens * self._num_out
        dtype = self._dtype

        def add(y: Tensor, x: Tensor, _alive: object = (factors, segments)) -> None:  # for as long as it is read
            if x.numel() != num_x or y.numel() != num_y:
                raise ValueError(f"factors for {segments.num_tokens} tokens got x {x.shape} and y {y.shape}")
            if x.dtype is not dtype or not x.is_contiguous():
                x = x.to(dtype).contiguous()
            if y.dtype is dtype and y.is_contiguous():
                run(layer, steps, y.data_ptr(), x.data_ptr())
                return
            own = y.to(dtype).contiguous()
            run(layer, steps, own.data_ptr(), x.data_ptr())
            y.copy_(own)

        return add

    def by_slot(self, segments: Segments) -> SlotFactors:
        """The factors that the kernel reads for the adapters of a step, for a caller in C++."""
        return self._table.reaching(segments.num_slots)


class LowRankKernel:
    """The compiled kernel. Raises NativeError where it cannot be had or does not compute what it should."""

    def __init__(self, code: NativeCode, *, tiles: bool = True) -> None:
        """`tiles` False: do without the CPU's matrix unit."""
        library = code.library("low_rank")
        self._functions = {torch.float32: library.low_rank_f32, torch.bfloat16: library.low_rank_bf16}
        self._each = {torch.float32: library.low_rank_each_f32, torch.bfloat16: library.low_rank_each_bf16}
        self.has_tiles = tiles and bool(library.low_rank_has_tiles())
        """Whether bfloat16 terms are computed by the CPU's matrix unit."""
        if self.has_tiles:
            self._functions[torch.bfloat16] = library.low_rank_by_tiles
            self._each[torch.bfloat16] = library.low_rank_each_by_tiles
        for function in self._functions.values():
            function.argtypes = [ctypes.c_void_p] * 4
            function.restype = None
        with torch.inference_mode():
            for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
                self._try_out(dtype, tolerance)

    def function(self, dtype: torch.dtype) -> Any:
        """What `LayerFactors` calls: (layer, segments, y, x), addresses all."""
        return self._functions[dtype]

    def each(self, dtype: torch.dtype) -> Any:
        """For a caller in C++: (layers, their number, segments, ys, x), one to three layers that read the same x."""
        return self._each[dtype]

    def serves(self, like: Tensor) -> bool:
        """Whether it computes with tensors of this kind."""
        return like.dtype in DTYPES and like.device.type == "cpu"

    def layer(self, num_in: int, num_out: int, dtype: torch.dtype, parent: str | None = None) -> LayerFactors:  # noqa: ARG002  # inputs are shared by `layer.cpp` here
        """A layer without factors yet."""
        return LayerFactors(self, num_in, num_out, dtype)

    def _try_out(self, dtype: torch.dtype, tolerance: float) -> None:
        """A compiler's mistake is found here rather than in an answer."""
        generator = torch.Generator().manual_seed(0)

        def small(*size: int) -> Tensor:
            return torch.randn(size, generator=generator).to(dtype)

        layer, x_TI, y_TO = self.layer(75, 70, dtype), small(12, 75), small(12, 70)
        exact_TO = y_TO.double()
        for slot, (rank, first, last) in enumerate(((13, 0, 1), (8, 1, 9), (3, 9, 12)), start=1):
            a_RI, b_OR = small(rank, 75), small(70, rank)
            layer.put(slot, a_RI, b_OR)
            exact_TO[first:last] += x_TI[first:last].double() @ a_RI.double().t() @ b_OR.double().t()
        together_TO, alone_TO = y_TO.clone(), y_TO.clone()
        layer.op(Segments(((1, 0, 1), (2, 1, 9), (3, 9, 12)), 12))(together_TO, x_TI)
        for token, slot in enumerate((1, *[2] * 8, *[3] * 3)):
            layer.op(Segments(((slot, 0, 1),), 1))(alone_TO[token], x_TI[token])
        if float((together_TO - exact_TO).abs().max() / exact_TO.abs().max()) > tolerance:
            raise NativeError(f"low_rank.cpp computes {dtype} wrongly as this compiler translates it")
        if not torch.equal(together_TO, alone_TO):
            raise NativeError("low_rank.cpp sums a token in another order in another step; use another compiler")
