"""Which decoder layers of a base are of Llama's kind, and so run by a kernel (see `whole_layer`).

Told by what a layer's forward names, by its parts, and by a trial.

Shapes: `T` tokens, `I` features, `D` head size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from peft_serve.adapters.base import SiteKind
from peft_serve.kernels.few_rows import Product
from peft_serve.kernels.layer import NUM_PROJECTIONS, LayerKernel, LayerParts
from peft_serve.model.attention import Kind, RaggedAttention, Work
from peft_serve.model.attention_site import AttentionSite
from peft_serve.model.base import ResidentBase
from peft_serve.model.gated_mlp import is_silu
from peft_serve.model.layer_parts import Inside
from peft_serve.model.paged import PagedDecode
from peft_serve.model.passing import StepBook
from peft_serve.model.pools import KVPool, KVShape
from peft_serve.model.ragged import Span, plan_self
from peft_serve.model.rotary_attention import RotaryAttention
from peft_serve.model.sites import AdaptedSites
from peft_serve.model.sites_forward import DenseSite, NormSite, Site
from peft_serve.model.sublayers import SublayerSite
from peft_serve.model.whole_layer import WholeLayer

_NAMES: Final = frozenset({"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"})
_PROJECTIONS: Final = (
    *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *(f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
)
_NORMS: Final = ("input_layernorm", "self_attn.q_norm", "self_attn.k_norm", "post_attention_layernorm")


def whole_layers(
    base: ResidentBase,
    kernel: LayerKernel,
    paged: PagedDecode,
    rotary: Mapping[nn.Module, RotaryAttention],
    gated: Collection[nn.Module],
) -> int:
    """Run the base's layers whole, wherever they are of this kind; gives how many. Their products are packed by now,
    and their attention and gated layers are among `rotary` and `gated`, the modules that are known already."""
    book = StepBook(base.runs.attention, paged)
    found = 0
    for path, module in base.model.named_modules():
        if not _looks_alike(module, rotary, gated):
            continue
        inside = _inside_of(path, module, base.adapted, rotary)
        parts = None if inside is None else _parts_of(path, inside, base.adapted)
        if inside is None or parts is None:
            continue
        whole = WholeLayer(module, kernel.layer(parts), inside, base.adapted, book)
        if _agree(module, whole, inside.attention, base.runs.attention):
            module.__dict__["forward"] = whole.forward
            found += 1
    return found


def _looks_alike(module: nn.Module, rotary: Mapping[nn.Module, RotaryAttention], gated: Collection[nn.Module]) -> bool:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)  # some versions wrap it for training
    parts = dict(module.named_children())
    return (
        code is not None
        and frozenset(code.co_names) == _NAMES == frozenset(parts)
        and "forward" not in module.__dict__
        and parts["self_attn"] in rotary
        and parts["mlp"] in gated
        and is_silu(parts["mlp"].act_fn)
        and not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules() if part is not module)
    )


def _inside_of(
    path: str, module: Any, adapted: AdaptedSites, rotary: Mapping[nn.Module, RotaryAttention]
) -> Inside | None:
    inner = {p: s for p, s in adapted.at.items() if p.startswith(f"{path}.")}
    projections = [site for name in _PROJECTIONS if isinstance(site := inner.get(f"{path}.{name}"), DenseSite)]
    norms = tuple(_norm_at(f"{path}.{name}", inner) for name in _NORMS)
    prompts = inner.get(f"{path}.self_attn")
    prompts = prompts if isinstance(prompts, AttentionSite) else None
    sublayers = [site for site in inner.values() if isinstance(site, SublayerSite)]
    attention = _between(sublayers, module.input_layernorm, module.self_attn)
    gated = _between(sublayers, module.post_attention_layernorm, module.mlp)
    # What acts on all that leaves a layer sees it behind this forward too.
    behind = frozenset(site for p, site in inner.items() if adapted.specs[p].kind is SiteKind.LAYER)
    here = frozenset(inner.values()) - behind
    known: set[Site | None] = {*projections, *norms, prompts, attention, gated}
    if len(projections) != NUM_PROJECTIONS or len({id(site.lane) for site in here}) != 1 or not here <= known:
        return None
    return Inside(
        attention=rotary[module.self_attn],
        projections=tuple(projections),
        norms=norms,
        prompts=prompts,
        sublayers=(attention, gated),
        behind=behind,
        lane=projections[0].lane,
    )


def _norm_at(path: str, inner: Mapping[str, Site]) -> NormSite | None:
    site = inner.get(path)
    return site if isinstance(site, NormSite) and site.by_kernel is not None else None


def _between(sublayers: Collection[SublayerSite], residual: nn.Module, output: nn.Module) -> SublayerSite | None:
    return next((site for site in sublayers if site.is_between(residual, output)), None)


def _parts_of(path: str, inside: Inside, adapted: AdaptedSites) -> LayerParts | None:
    products = [site.product for site in inside.projections if isinstance(site.product, Product)]
    before, q, k, after = (None if site is None else site.by_kernel for site in inside.norms)
    has_head_norms = f"{path}.self_attn.q_norm" in adapted.at
    if len(products) != NUM_PROJECTIONS or before is None or after is None or len({p.dtype for p in products}) != 1:
        return None
    if has_head_norms and (q is None or k is None):
        return None
    return LayerParts(
        products=tuple(products),
        before=before,
        after=after,
        heads=None if q is None or k is None else (q, k),
        head=inside.attention.head,
        scaling=inside.attention.terms.scaling,
    )


def _agree(module: nn.Module, whole: WholeLayer, part: RotaryAttention, attention: RaggedAttention) -> bool:
    """Whether both give the same bits for a step of two rows, and for one with a prompt in it."""
    with torch.inference_mode():
        for spans in (
            [Span(num_tokens=1, start=3, blocks=(1,)), Span(num_tokens=1, start=5, blocks=(2,))],
            [Span(num_tokens=3, start=0, blocks=(1,)), Span(num_tokens=1, start=5, blocks=(2,))],
        ):
            own, ours = (_tried(f, spans, module, part, attention) for f in (module.forward, whole.forward))
            if not all(torch.equal(a, b) for a, b in zip(own, ours, strict=True)):
                return False
    return True


def _tried(
    forward: Callable[..., Tensor], spans: list[Span], module: Any, part: RotaryAttention, attention: RaggedAttention
) -> tuple[Tensor, Tensor, Tensor]:
    """What comes of random tokens over random keys and values, and the keys and values behind them."""
    generator = torch.Generator().manual_seed(0)
    weight = module.self_attn.k_proj.weight
    shape = KVShape(num_layers=part.layer + 1, num_heads=len(weight) // part.head, head_dim=part.head)
    pool = KVPool(shape, num_blocks=3, block_size=8, dtype=weight.dtype, device=weight.device)
    for tensor in pool.layer(part.layer):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    num_tokens = sum(span.num_tokens for span in spans)
    x_1TI = torch.randn(1, num_tokens, weight.shape[1], generator=generator).to(weight.dtype)
    turns_1TD = (torch.randn(1, num_tokens, part.head, generator=generator).to(weight.dtype) for _ in range(2))
    work = Work(plan=plan_self(spans, block_size=8, device=pool.device), pool=pool)
    with attention.running({Kind.SELF: work}):
        out = forward(x_1TI, attention_mask=None, position_embeddings=tuple(turns_1TD), past_key_values=None)
    return out, *pool.layer(part.layer)
