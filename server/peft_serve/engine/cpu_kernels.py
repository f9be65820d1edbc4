"""How a base on a CPU is made faster at start: kernels compiled for this machine, and weights packed for them.

The one place that decides between our own kernels, oneDNN's packed products and plain torch. It decides once; nothing
is chosen anew while requests run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from peft_serve.config import Settings
from peft_serve.kernels.attention import PagedAttention
from peft_serve.kernels.block_diagonal import BlockDiagonalKernel
from peft_serve.kernels.few_rows import FewRows
from peft_serve.kernels.layer import LayerKernel
from peft_serve.kernels.low_rank import LowRankKernel
from peft_serve.kernels.native import NativeCode, NativeError, cache_folder, find_compiler
from peft_serve.kernels.row_ops import RowOps
from peft_serve.model.base import ResidentBase
from peft_serve.model.gated_mlp import gated_forward
from peft_serve.model.known_layers import whole_layers
from peft_serve.model.packed_weight import WeightPlaces
from peft_serve.model.packing import can_pack, gains_from_kernels, is_worth_its_room
from peft_serve.model.paged import PagedDecode
from peft_serve.model.rotary_attention import RotaryAttention, rotary_attention
from peft_serve.model.terms.term import OtherKernels


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuKernels:
    """Our own kernels, loaded and tried out."""

    few_rows: FewRows
    attention: PagedAttention
    low_rank: LowRankKernel
    row_ops: RowOps
    blocks: BlockDiagonalKernel
    layer: LayerKernel


def make_kernels(code: NativeCode) -> CpuKernels:
    """Compile what is not compiled yet and load it. NativeError where that cannot be."""
    few_rows, attention, low_rank, row_ops = FewRows(code), PagedAttention(code), LowRankKernel(code), RowOps(code)
    blocks = BlockDiagonalKernel(code)
    layer = LayerKernel(code, few_rows=few_rows, low_rank=low_rank, attention=attention, row_ops=row_ops, blocks=blocks)
    return CpuKernels(
        few_rows=few_rows, attention=attention, low_rank=low_rank, row_ops=row_ops, blocks=blocks, layer=layer
    )


def speed_up(settings: Settings, base: ResidentBase, environ: Mapping[str, str], say: Callable[[str], None]) -> None:
    """Give the base the fastest products that the settings allow and this machine has.

    ValueError where the settings insist on kernels and there are none.
    """
    kernels = _wanted_kernels(settings, base.device, environ, say)
    if kernels is None:
        _pack(settings, base, None, say)
        return
    paged = PagedDecode(kernels.attention)
    base.runs.attention.paged = paged
    base.adapted.run_low_rank_by(kernels.low_rank)
    base.adapted.run_others_by(OtherKernels(mixing=kernels.blocks))
    known = _shorten(base, kernels.row_ops)
    _pack(settings, base, kernels, say)
    whole_layers(base, kernels.layer, paged, *known)


def _shorten(base: ResidentBase, ops: RowOps) -> tuple[dict[nn.Module, RotaryAttention], list[nn.Module]]:
    """Fewer calls between the products of a layer (docs/decisions/0012): gives the attention and the gated layers
    that have them now."""
    base.adapted.run_norms_by(ops)
    rotary = {}
    for module, site in base.adapted.beside_attention.items():
        attention = rotary_attention(module, base.runs.attention, ops)
        if attention is not None:
            site.run_by(attention.forward)
            rotary[module] = attention
    gated = []
    for module in base.model.modules():
        forward = gated_forward(module, ops)
        if forward is not None:
            module.__dict__["forward"] = forward
            gated.append(module)
    return rotary, gated


def _wanted_kernels(
    settings: Settings, device: torch.device, environ: Mapping[str, str], say: Callable[[str], None]
) -> CpuKernels | None:
    if settings.cpu_kernels == "off" or device.type != "cpu":
        return None
    try:
        return make_kernels(NativeCode(find_compiler(environ), cache_folder(environ), say=say))
    except NativeError as error:
        if settings.cpu_kernels == "on":
            raise ValueError(f"--cpu-kernels on: {error}; or leave the option out") from error
        say(f"no kernels of our own, so decoding takes 1.3 to 3 times as long on this CPU: {error}")
        return None


def _pack(settings: Settings, base: ResidentBase, kernels: CpuKernels | None, say: Callable[[str], None]) -> None:
    if settings.prepack == "off":
        return
    num_bytes = sum(p.numel() * p.element_size() for p in base.model.parameters())
    is_asked = settings.prepack == "on"
    has_tiles = kernels is not None and kernels.few_rows.has_tiles
    is_always = settings.cpu_kernels == "on"
    if kernels is not None and gains_from_kernels(base.device, base.dtype, has_tiles=has_tiles, is_always=is_always):
        base.adapted.pack(kernels.few_rows.linear, fewest=1, places=WeightPlaces(base.model))
        say("weights packed for our own kernels")
    elif can_pack(base.device, base.dtype) and (is_asked or is_worth_its_room(num_bytes, base.dtype)):
        base.adapted.pack()
        say("weights packed for this CPU")
