"""A decoder layer of Llama's kind in one call of a kernel, or in parts around what the kernel does not do.

The forwards of transformers and of the sites around them cross from Python to a kernel some fifteen times a layer, and
beside a small product that is what costs (docs/decisions/0013-whole-layers.md). Here a layer's parts are told to the
kernel once, a step's tokens once a step, and what adapters add once for each manner in which they act.

The same kernels run in the same order, so the bits are those of the layer spelled out. That one stays in use for an
unusual pass. Which adapters' terms run in Python, between which stages, is `layer_parts`'s; whether a layer is of this
kind, `known_layers`'s; what a pass's layers know of one another, `passing`'s.

A layer that runs whole takes those along that follow it and run whole too: they are called later, with what they have
given by then. Python between two layers is slow, a layer's weights have driven it out of the caches.

Shapes: `T` tokens, `I` features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from peft_serve.kernels.layer import Here, KernelLayer, LayerRow, Stage, Step
from peft_serve.model.attention import Kind, Work
from peft_serve.model.layer_parts import WHOLE, Attending, Frame, Inside, Part, cut
from peft_serve.model.manner import Manner
from peft_serve.model.passing import Angles, StepBook
from peft_serve.model.pools import KVPool
from peft_serve.model.routing import Route
from peft_serve.model.sites import AdaptedSites

_MOST_MANNERS: Final = 64  # that a layer remembers


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Acting:
    """The layer in one memory and one manner: what its kernel is told, and its parts."""

    here: Here
    decoding: tuple[Part, ...]  # where the kernel attends
    reading: tuple[Part, ...]  # where it does not, as for prompts
    is_changed_behind: bool  # something acts on what leaves the layer


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Layers that run in one call."""

    members: tuple[WholeLayer, ...]
    run: LayerRow
    follower: WholeLayer | None  # of the last one, as far as it was known


class WholeLayer:
    """The forward of one decoder layer. `follower` is the one that a pass has shown to run on what this one gives,
    with the same angles."""

    follower: WholeLayer | None

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
        self.follower = None
        self._rows: dict[Acting, Row] = {}  # by this layer's own part in each

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
        passing = None if work is None else self._book.passing(work)
        if passing is not None and passing.has_run(self, hidden_states):
            return hidden_states
        if work is None or not self._serves(hidden_states, work, position_embeddings, past_key_values):
            return self._own(
                hidden_states,
                attention_mask=attention_mask,
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
                **kwargs,
            )
        assert passing is not None and position_embeddings is not None, "`_serves` has seen them"  # noqa: PT018
        passing.enter(self, hidden_states, position_embeddings)
        step = self._book.step(work, position_embeddings, self._layer, self._inside.attention, self._inside.lane.route)
        acting = self._in_pass(work)
        parts = acting.decoding if step.has_rows and acting.here.has_pages else acting.reading
        row = self._row(acting, work) if parts is WHOLE else None
        if row is None or len(row.members) == 1:
            return passing.leave((self,), self._in_parts(parts, acting.here, step, work, hidden_states))
        y = torch.empty_like(hidden_states)
        row.run.run(step, hidden_states, y)
        return passing.leave(row.members, y)

    def _row(self, acting: Acting, work: Work) -> Row:
        """This layer and those that run in one call with it, all decoding in `acting`'s manner."""
        found = self._rows.get(acting)
        if found is None or found.members[-1].follower is not found.follower:  # the first pass has yet to tell of it
            members, heres, last = [self], [acting.here], acting
            while not last.is_changed_behind and (then := members[-1].follower) is not None:
                last = then._in_pass(work)
                if last.decoding is not WHOLE or not last.here.has_pages:
                    break
                members.append(then)
                heres.append(last.here)
            run = LayerRow([each._layer for each in members], heres)
            found = self._rows[acting] = Row(members=tuple(members), run=run, follower=members[-1].follower)
        return found

    def is_alike(self, other: WholeLayer) -> bool:
        """Whether a step is told to both in the same words."""
        ours, its = self._inside, other._inside
        return (
            self._layer.sizes == other._layer.sizes
            and ours.attention.terms.window == its.attention.terms.window
            and ours.lane is its.lane
            and self._book is other._book
        )

    def _in_parts(self, parts: Sequence[Part], here: Here, step: Step, work: Work, x: Tensor) -> Tensor:
        y = torch.empty_like(x)
        frame = Frame(work, step.memory, x, y)
        for part in parts:
            if part.first < part.last:
                self._layer.run(step, here, x, y, part.first, part.last, frame.attended_TD)
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
            self._known, self._rows, self._pool = {}, {}, pool
        if manner not in self._known:
            if manner is not None:
                kept = (each for each in self._known if each is None or each.generation == manner.generation)
                self._known = {each: self._known[each] for each in list(kept)[:_MOST_MANNERS]}
                self._rows = {each: self._rows[each] for each in self._known.values() if each in self._rows}
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
        decoding = cut(deeds, attends=True) if deeds else WHOLE
        if inside.prompts is not None and inside.prompts in sites:
            decoding = reading
        return Acting(
            here=here, decoding=decoding, reading=reading, is_changed_behind=not inside.behind.isdisjoint(sites)
        )
