"""A decoder layer of Llama's kind in one call of a kernel, or in two around an attention that is not the kernel's.

The forwards of transformers and of the sites around them cross from Python to a kernel some fifteen times a layer, and
beside a small product that is what costs (docs/decisions/0013-whole-layers.md). Here a layer's parts are told to the
kernel once, a step's tokens once a step, and what adapters add once for each manner in which they act.

The same kernels run in the same order, so the bits are those of the layer spelled out. That one stays in use wherever
something else happens inside the layer: adapters that do more than low-rank terms, scales and shifts, an unusual pass.
Whether a layer is of this kind is told by what its forward names, by its parts, and by a trial.

Shapes: `T` tokens, `I` features, `D` head size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from peft_serve.adapters.base import SiteKind
from peft_serve.kernels.few_rows import Product
from peft_serve.kernels.layer import (
    NUM_PROJECTIONS,
    Here,
    KernelLayer,
    LayerKernel,
    LayerParts,
    SiteTerms,
    Step,
    StepFacts,
)
from peft_serve.kernels.row_ops import Norm
from peft_serve.model.attention import Kind, RaggedAttention, Work
from peft_serve.model.base import ResidentBase
from peft_serve.model.gated_mlp import is_silu
from peft_serve.model.manner import Manner
from peft_serve.model.paged import PagedDecode
from peft_serve.model.pools import KVPool, KVShape
from peft_serve.model.ragged import Span, plan_self
from peft_serve.model.rotary_attention import RotaryAttention
from peft_serve.model.routing import Lane, Route
from peft_serve.model.sites import AdaptedSites
from peft_serve.model.sites_forward import DenseSite, NormSite, Site

Angles = tuple[Tensor, Tensor]

_NAMES: Final = frozenset({"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"})
_PROJECTIONS: Final = (
    *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *(f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
)
_MOST_MANNERS: Final = 64  # that a layer remembers
_NO_TERMS: Final = (SiteTerms(),) * NUM_PROJECTIONS


class StepBook:
    """What the layers of one base are told of the pass that runs; gone with it."""

    def __init__(self, attention: RaggedAttention, paged: PagedDecode) -> None:
        self.attention = attention
        self.paged = paged
        self._steps: WeakKeyDictionary[Work, dict[tuple[object, ...], Step]] = WeakKeyDictionary()

    def step(self, work: Work, angles: Angles, layer: KernelLayer, part: RotaryAttention, route: Route | None) -> Step:
        """The pass, as layers of these sizes, this attention and these angles see it."""
        steps = self._steps.setdefault(work, {})
        key = (id(angles[0]), part.terms.window, layer.sizes)  # the step holds the angles: no others have their id
        if key not in steps:
            steps[key] = layer.step(self._facts(work, angles, part, route))
        return steps[key]

    def _facts(self, work: Work, angles: Angles, part: RotaryAttention, route: Route | None) -> StepFacts:
        plan = work.plan
        assert plan.writes_T is not None, "a decoder keeps what it reads"
        return StepFacts(
            num_tokens=len(plan.writes_T),
            places_T=plan.writes_T,
            angles=angles,
            rows=self.paged.rows(plan.cached[0], part.terms) if plan.is_one_group else None,
            segments=None if route is None else route.segments,
            slot_T=None if route is None else route.slot_of_token,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Inside:
    """What is inside of a layer."""

    attention: RotaryAttention
    projections: tuple[DenseSite, ...]  # in the kernel's order
    others: frozenset[Site]
    lane: Lane  # of all of them


class WholeLayer:
    """The forward of one decoder layer."""

    def __init__(
        self, module: nn.Module, layer: KernelLayer, inside: Inside, adapted: AdaptedSites, book: StepBook
    ) -> None:
        self._own: Callable[..., Tensor] = partial(type(module).forward, module)
        self._attention: nn.Module = module.self_attn  # type: ignore[assignment]  # `_inside_of` has seen it
        self._layer = layer
        self._inside = inside
        self._adapted = adapted
        self._book = book
        self._pool: KVPool | None = None
        self._heres: dict[Manner | None, Here | None] = {}  # in this pool, since adapters last came or went

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Angles | None = None,
        past_key_values: object = None,
        **kwargs: Any,
    ) -> Tensor:
        """As the module's own; where a pass asks for something unusual, it is the module's own."""
        work = self._book.attention.work(Kind.SELF)
        if work is None or not self._serves(hidden_states, work, position_embeddings, past_key_values):
            return self._spelled_out(hidden_states, attention_mask, position_embeddings, past_key_values, kwargs)
        here = self._in_pass(work)
        if here is None:
            return self._spelled_out(hidden_states, attention_mask, position_embeddings, past_key_values, kwargs)
        assert position_embeddings is not None, "`_serves` has seen them"
        part = self._inside.attention
        step = self._book.step(work, position_embeddings, self._layer, part, self._inside.lane.route)
        if step.has_rows and here.has_pages:
            return self._layer.whole(step, here, hidden_states)
        q, k, v = self._layer.before(step, here, hidden_states)
        attended = self._book.attention.run(self._attention, work, part.layer, q, k, v, part.terms)
        return self._layer.after(step, here, hidden_states, attended)

    def _spelled_out(
        self, x: Tensor, mask: Tensor | None, angles: Angles | None, cache: object, kwargs: Mapping[str, Any]
    ) -> Tensor:
        return self._own(x, attention_mask=mask, position_embeddings=angles, past_key_values=cache, **kwargs)

    def _serves(self, x: Tensor, work: Work, angles: Angles | None, cache: object) -> bool:
        route = self._inside.lane.route
        return (
            self._inside.attention.serves(work, angles, cache)
            and not self._book.attention.is_reference
            and x.dtype is self._layer.dtype
            and x.shape[:-1] == (1, len(work.plan.writes_T))  # type: ignore[arg-type]  # the attention has seen it
            and x.is_contiguous()
            and (route is None or route.num_tokens == x.shape[1])  # else the sites say whose tokens are missing
        )

    def _in_pass(self, work: Work) -> Here | None:
        """The layer's memory and adapters under the current route; None where they do more than the kernel.

        Tables by slot are told of, and they reach to the last slot in use: whose tokens a step has is told with the
        step, so that all routes of one manner share what is made for the first.
        """
        route, pool = self._inside.lane.route, work.pool
        assert pool is not None, "the attention has seen it"
        manner = self._adapted.manner(route)
        if pool is not self._pool:
            self._heres, self._pool = {}, pool
        if manner not in self._heres:
            if manner is not None:
                kept = (each for each in self._heres if each is None or each.generation == manner.generation)
                self._heres = {each: self._heres[each] for each in list(kept)[:_MOST_MANNERS]}
            self._heres[manner] = self._made(route, pool)
        return self._heres[manner]

    def _made(self, route: Route | None, pool: KVPool) -> Here | None:
        terms = _NO_TERMS if route is None else self._terms(route)
        if terms is None:
            return None
        layer = self._inside.attention.layer
        pages = self._book.paged.pages(pool, layer, self._layer.num_heads, self._layer.dtype)
        return Here(pages, pool.layer(layer), terms)

    def _terms(self, route: Route) -> tuple[SiteTerms, ...] | None:
        acting = self._adapted.acting(route)
        if not acting.isdisjoint(self._inside.others):
            return None
        each = tuple(site.in_kernel(route) if site in acting else SiteTerms() for site in self._inside.projections)
        found = tuple(terms for terms in each if terms is not None)
        return found if len(found) == len(each) else None


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
    path: str, module: nn.Module, adapted: AdaptedSites, rotary: Mapping[nn.Module, RotaryAttention]
) -> Inside | None:
    inner = {p: s for p, s in adapted.at.items() if p.startswith(f"{path}.")}
    projections = [site for name in _PROJECTIONS if isinstance(site := inner.get(f"{path}.{name}"), DenseSite)]
    # What acts on all that leaves a layer sees it behind this forward too.
    around = {site for p, site in inner.items() if adapted.specs[p].kind is SiteKind.LAYER}
    others = frozenset(inner.values()) - around - frozenset(projections)
    lanes = {id(site.lane) for site in (*projections, *others)}
    if len(projections) != NUM_PROJECTIONS or len(lanes) != 1:
        return None
    return Inside(
        attention=rotary[module.self_attn],  # type: ignore[index]  # `_looks_alike` has seen it
        projections=tuple(projections),
        others=others,
        lane=projections[0].lane,
    )


def _parts_of(path: str, inside: Inside, adapted: AdaptedSites) -> LayerParts | None:
    products = [site.product for site in inside.projections if isinstance(site.product, Product)]
    before, after = (_norm_at(f"{path}.{name}", adapted) for name in ("input_layernorm", "post_attention_layernorm"))
    q, k = (_norm_at(f"{path}.self_attn.{name}", adapted) for name in ("q_norm", "k_norm"))
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


def _norm_at(path: str, adapted: AdaptedSites) -> Norm | None:
    site = adapted.at.get(path)
    return site.by_kernel if isinstance(site, NormSite) else None


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
