"""How a compiled adapter lies in memory: all of it in one piece, each tensor as a step reads it.

One piece, since hundreds of small ones between what a compile throws away would leave memory full of holes. As a step
reads it, so that what has a slot on a CPU refers to the very tensors that the host keeps: a factor B is read along
its rows turned, and lies so, whatever its shape says. Factors that many adapters share stay outside, each in memory of
its own, and so do numbers of tokens and the like.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from peft_serve.adapters.own_memory import own_memory
from peft_serve.adapters.primitives import Adapter, Affine, mapped
from peft_serve.adapters.shared_primitives import SharedMap

ALIGNMENT: Final = 64  # of every tensor in the piece: a line of a CPU's cache


def laid_out(adapter: Adapter, dtype: torch.dtype) -> Adapter:
    """The adapter in the compute type, in memory that holds nothing else.

    A tensor that several sites share is rounded once and stays shared.
    """
    affine = [edit for edit in adapter.sites.values() if isinstance(edit, Affine)]
    turned = {id(edit.delta.b_OR) for edit in affine if edit.delta is not None}
    shared = {id(t) for edit in affine for each in edit.maps if isinstance(each, SharedMap) for t in each.factors}
    floats = {id(tensor): tensor for tensor in adapter.tensors() if tensor.is_floating_point()}
    inside = {name: tensor for name, tensor in floats.items() if name not in shared}
    places = _in_one_piece(inside, dtype, turned)
    places |= {name: _own(tensor, dtype) for name, tensor in floats.items() if name in shared}
    return mapped(adapter, lambda tensor: places[id(tensor)])


def _in_one_piece(tensors: dict[int, Tensor], dtype: torch.dtype, turned: set[int]) -> dict[int, Tensor]:
    step = ALIGNMENT // dtype.itemsize
    starts, end = {}, 0
    for name, tensor in tensors.items():
        starts[name] = end
        end += -(-tensor.numel() // step) * step
    piece = own_memory(end, dtype)
    places = {}
    for name, tensor in tensors.items():
        flat = piece[starts[name] : starts[name] + tensor.numel()]
        placed = flat.view(tensor.t().shape).t() if name in turned else flat.view(tensor.shape)
        places[name] = placed.copy_(tensor)
    return places


def _own(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in the compute type, contiguous, in memory that holds nothing else: a view keeps its whole file."""
    rounded = tensor.to(dtype).contiguous()
    is_whole = rounded.untyped_storage().nbytes() == rounded.numel() * rounded.element_size()
    return rounded if is_whole else rounded.clone()
