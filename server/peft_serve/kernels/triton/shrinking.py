"""A step's x A^T for the adapters of one layer or of several that read one x: how its launch is cut into programs.
And what is in its place where x is ids.
"""

from __future__ import annotations

from typing import Any, Final, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_serve.kernels.triton.entries import Entries
from peft_serve.kernels.triton.low_rank_kernels import look_up, shrink
from peft_serve.kernels.triton.near import near
from peft_serve.kernels.triton.tiles import Tiles

_ELEMENTS: Final = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
DTYPES: Final = tuple(_ELEMENTS)

_GRAIN: Final = 16  # ranks that are multiplied at once, at least
_MOST_PARTS: Final = 16
_ENOUGH_PROGRAMS: Final = 256  # that keep a large GPU busy: no need to divide the inputs among more


def width_for(rank: int) -> int:
    """Room for the numbers of one token."""
    return max(1, -(-rank // _GRAIN)) * _GRAIN


def shrunk(x_TI: Tensor, layers_M: Tensor, entries: Entries, tiles: Tiles, *, width: int, part: int) -> Tensor:
    """[parts, M, T, width] float32, the parts yet to be added up, of x without gaps; what has no adapter is not set.

    Inputs are summed up `part` at a time, or more where there are very many; that and their number fix the order.
    """
    entries.publish()
    num_tokens, num_in = tiles.num_tokens, x_TI.shape[-1]
    step = 64 if x_TI.dtype is torch.float32 else 128
    part = -(-max(part, num_in // _MOST_PARTS) // step) * step
    is_whole = len(tiles) * len(layers_M) >= _ENOUGH_PROGRAMS
    shape = 1 if is_whole else -(-num_in // part), len(layers_M), num_tokens, width
    low = torch.empty(shape, dtype=torch.float32, device=x_TI.device)
    with near(x_TI):
        shrink[len(tiles), shape[0], shape[1]](
            x_TI,
            low,
            entries.table,
            tiles.table_N3,
            layers_M,
            entries.num_layers,
            num_in,
            num_tokens,
            width,
            HEIGHT=tiles.height,
            STEP=step,
            PART=part,
            IS_WHOLE=is_whole,
            OPERAND=operand(x_TI.dtype),
        )
    return low


class Lookup(Protocol):
    """A layer that is given ids."""

    @property
    def index(self) -> int: ...

    @property
    def num_in(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype: ...


def looked_up(ids_T: Tensor, layer: Lookup, entries: Entries, tiles: Tiles, *, width: int) -> Tensor:
    """[1, 1, T, width] float32: the columns of A that belong to ids; what has no adapter is not set."""
    entries.publish()
    low = torch.empty((1, 1, tiles.num_tokens, width), dtype=torch.float32, device=ids_T.device)
    with near(ids_T):
        look_up[len(tiles), triton.cdiv(width, _GRAIN)](
            ids_T.contiguous(),
            low,
            entries.table,
            tiles.table_N3,
            layer.index,
            entries.num_layers,
            layer.num_in,
            width,
            HEIGHT=tiles.height,
            RANKS=_GRAIN,
            ELEMENT=_ELEMENTS[layer.dtype],
        )
    return low


def is_same(kept: Tensor, x: Tensor) -> bool:
    """Whether this is the memory of a tensor that is still held, read in the same way."""
    return kept is x or (
        kept.data_ptr() == x.data_ptr()
        and kept.dtype is x.dtype
        and kept.numel() == x.numel()
        and kept.is_contiguous()
        and x.is_contiguous()
    )


def operand(dtype: torch.dtype) -> Any:
    """What factors are multiplied as: as they are, but for bfloat16 under Triton's interpreter, which multiplies
    none."""
    if dtype is torch.float32 or (dtype is torch.bfloat16 and not isinstance(shrink, triton.JITFunction)):
        return tl.float32
    return tl.bfloat16 if dtype is torch.bfloat16 else tl.float16
