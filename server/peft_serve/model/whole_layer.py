"""A decoder layer of Llama's kind in one call of a kernel, or in parts around what the kernel does not do.

The forwards of transformers and of the sites around them cross from Python to a kernel some fifteen times a layer, and
beside a small product that is what costs (docs/decisions/0013-whole-layers.md). Here a layer's parts are told to the
kernel once, a step's tokens once a step, and what adapters add once for each manner in which they act.

The same kernels run in the same order, so the bits are those of the layer spelled out. That one stays in use for an
unusual pass. Which adapters' terms run in Python, between which stages, is `layer_parts`'s; whether a layer is of this
kind, `known_layers`'s.

Shapes: `T` tokens, `I` features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from peft_serve.kernels.layer import Here, KernelLayer, Stage, Step, StepFacts
from peft_serve.model.attention import Kind, RaggedAttention, Work
from peft_serve.model.layer_parts import WHOLE, Attending, Frame, Inside, Part, cut
from peft_serve.model.manner import Manner
from peft_serve.model.paged import PagedDecode
from peft_serve.model.pools import KVPool
from peft_serve.model.rotary_attention import RotaryAttention
from peft_serve.model.routing import Route
from peft_serve.model.sites import AdaptedSites

Angles = tuple[Tensor, Tensor]

_MOST_MANNERS: Final = 64  # that a layer remembers


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
class Acting:
    """The layer in one memory and one manner: what its kernel is told, and its parts."""

    here: Here
    decoding: tuple[Part, ...]  # where the kernel attends
    reading: tuple[Part, ...]  # where it does not, as for prompts


class WholeLayer:
    """The forward of one decoder layer."""

    def __init__(
        self, module: nn.Module, layer: KernelLayer, inside: Inside, adapted: AdaptedSites, book: StepBook
    ) -> None:
        self._own: Callable[..., Tensor] = partial(type(module).forward, module)
        self._attending = Attending(
            attention=book.attention,
            module=module.self_attn,  # type: ignore[arg-type]  # it is there: `inside` is of it
            rotary=inside.attention,
            site=inside.prompts,
        )
        self._layer = layer
        self._inside = inside
        self._adapted = adapted
        self._book = book
        self._pool: KVPool | None = None
        self._known: dict[Manner | None, Acting] = {}  # in this pool, since adapters last came or went

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
            return self._own(
                hidden_states,
                attention_mask=attention_mask,
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
                **kwargs,
            )
        assert position_embeddings is not None, "`_serves` has seen them"
        step = self._book.step(work, position_embeddings, self._layer, self._inside.attention, self._inside.lane.route)
        return self._run(self._in_pass(work), step, work, hidden_states)

    def _run(self, acting: Acting, step: Step, work: Work, x: Tensor) -> Tensor:
        y = torch.empty_like(x)
        parts = acting.decoding if step.has_rows and acting.here.has_pages else acting.reading
        if parts is WHOLE:
            self._layer.run(step, acting.here, x, y, Stage.NORM_BEFORE, Stage.END)
            return y
        frame = Frame(work, step.memory, x, y)
        for part in parts:
            if part.first < part.last:
                self._layer.run(step, acting.here, x, y, part.first, part.last, frame.attended_TD)
            for deed in part.deeds:
                deed(frame)
        return y

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

    def _in_pass(self, work: Work) -> Acting:
        """The layer's memory and adapters under the current route.

        Tables by slot are told of, and they reach to the last slot in use: whose tokens a step has is told with the
        step, so that all routes of one manner share what is made for the first.
        """
        route, pool = self._inside.lane.route, work.pool
        assert pool is not None, "the attention has seen it"
        manner = self._adapted.manner(route)
        if pool is not self._pool:
            self._known, self._pool = {}, pool
        if manner not in self._known:
            if manner is not None:
                kept = (each for each in self._known if each is None or each.generation == manner.generation)
                self._known = {each: self._known[each] for each in list(kept)[:_MOST_MANNERS]}
            self._known[manner] = self._made(route, pool)
        return self._known[manner]

    def _made(self, route: Route | None, pool: KVPool) -> Acting:
        inside, at = self._inside, self._inside.attention.layer
        sites = frozenset() if route is None else self._adapted.acting(route)
        parts, gains = inside.parts(route, sites), inside.gains(route)
        pages = self._book.paged.pages(pool, at, self._layer.num_heads, self._layer.dtype)
        here = Here(pages, pool.layer(at), [part.terms for part in parts], gains)
        deeds = inside.deeds(parts, sites)
        reading = cut(deeds | {Stage.ATTEND: [self._attending]}, attends=False)
        if inside.prompts is not None and inside.prompts in sites:
            return Acting(here=here, decoding=reading, reading=reading)
        return Acting(here=here, decoding=cut(deeds, attends=True) if deeds else WHOLE, reading=reading)
