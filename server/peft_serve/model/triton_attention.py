"""Attention of a whole plan by the Triton kernel, on a GPU.

Decides which plans the kernel serves; the others stay on `attend`'s path, group by group. Owns what the kernel is told
of the plans of the pass that runs: their rows, cut into tiles, once for all layers. Imports no Triton: the kernel is
given.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from peft_serve.kernels.capture import NotCapturable
from peft_serve.kernels.triton.attention_terms import Memory, Scores
from peft_serve.kernels.triton.attention_tiles import Reader, Sizes, Tables, lay_out
from peft_serve.model.attend import Terms
from peft_serve.model.held_plan import HeldPlan, placed, readers_of
from peft_serve.model.pools import KVPool
from peft_serve.model.ragged import Front, Plan, RelativeBias, SlopeBias

if TYPE_CHECKING:
    from peft_serve.kernels.triton.attention import TiledAttention

Fronts = tuple[Front, ...]
"""What stands in front of an encoder's rows at a layer, each once."""


class PlanAttention:
    """Attention of all rows of a plan in a launch or two a layer."""

    def __init__(self, kernel: TiledAttention) -> None:
        self._kernel = kernel
        self._tables: dict[tuple[int, int | None, int, Fronts], Tables] = {}
        self._slopes: dict[SlopeBias, Tensor] = {}  # side by side, for as long as there is a model with them
        self._held: WeakValueDictionary[int, HeldPlan] = WeakValueDictionary()  # by the plan

    def forget(self) -> None:
        """The pass is over: its plans are gone."""
        self._tables.clear()

    @property
    def sizes(self) -> Sizes:
        """How the kernel cuts rows."""
        return self._kernel.sizes

    def hold(self, plan: Plan, pool: KVPool, *, parts: int) -> HeldPlan:
        """Have the tables of a plan stay where they are for as long as the answer is kept, with room for other rows of
        one token each. `parts` is what `parts_for` says of the largest."""
        held = HeldPlan(plan, pool, self.sizes, parts=parts, is_causal=not _is_cross(plan))
        self._held[id(plan)] = held
        return held

    def attend(
        self, plan: Plan, pool: KVPool | None, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, layer: int, terms: Terms
    ) -> Tensor | None:
        """[T, H, D] of all tokens of a plan, or None where the kernel does not cover what is asked.

        With a pool, the step's keys and values are in it already. Raises `NotCapturable` where it does not cover a
        plan that is held, of which nobody else knows the rows.
        """
        keys = k_TKD if pool is None else pool.layer(layer)[0]
        if not self._kernel.covers(q_THD, keys) or not _is_covered(plan, pool, terms):
            if id(plan) in self._held:
                raise NotCapturable("attention that our kernel does not cover is laid out anew for each step")
            return None
        group = q_THD.shape[1] // keys.shape[1]
        if pool is None:
            fronts = _fronts(plan, layer)
            tables = self._of_sources(plan, fronts, group, q_THD.device)
            memory = _beside(fronts, layer, k_TKD, v_TKD)
        else:
            tables = self._of_blocks(plan, pool, group, terms.window)
            keys, values = pool.layer(layer)
            memory = Memory(keys_PKD=keys, values_PKD=values, block_size=pool.block_size)
        return self._kernel.attend(tables, self._scores(terms), q_THD, memory, layer)

    def _of_blocks(self, plan: Plan, pool: KVPool, group: int, window: int | None) -> Tables:
        held = self._held.get(id(plan))
        if held is not None:
            return held.tables(group, window)
        key = (id(plan), window, group, ())
        if key not in self._tables:
            layout = lay_out(
                [*readers_of(plan.spans, pool.block_size)],
                group=group,
                sizes=self._kernel.sizes,
                window=window,
                is_causal=not _is_cross(plan),
                num_layers=pool.shape.num_layers,
            )
            self._tables[key] = Tables(layout, pool.device)
        return self._tables[key]

    def _of_sources(self, plan: Plan, fronts: Fronts, group: int, device: torch.device) -> Tables:
        key = (id(plan), None, group, fronts)
        if key not in self._tables:
            readers = [*_source_readers(plan, fronts)]
            layout = lay_out(readers, group=group, sizes=self._kernel.sizes, is_causal=False)
            self._tables[key] = Tables(layout, device)
        return self._tables[key]

    def _scores(self, terms: Terms) -> Scores:
        bias = terms.bias
        return Scores(
            scaling=terms.scaling,
            softcap=terms.softcap,
            by_distance_HX=bias.table_HX if isinstance(bias, RelativeBias) else None,
            slopes_H=self._slopes_of(bias) if isinstance(bias, SlopeBias) else None,
            divisor=bias.divisor if isinstance(bias, SlopeBias) else 1.0,
            sinks_H=terms.sinks_H,
        )

    def _slopes_of(self, bias: SlopeBias) -> Tensor:
        if bias not in self._slopes:
            self._slopes[bias] = bias.slopes_H.contiguous()
        return self._slopes[bias]


def _is_covered(plan: Plan, pool: KVPool | None, terms: Terms) -> bool:
    """Whether the kernel knows what these terms mean for the plan."""
    bias = terms.bias
    if isinstance(bias, RelativeBias) and (bias.far < 1 or not bias.table_HX.is_contiguous()):
        return False
    if terms.sinks_H is not None and not terms.sinks_H.is_contiguous():
        return False
    if pool is None:
        return terms.window is None and not any(fresh.is_causal for fresh in plan.fresh)
    if _is_cross(plan):
        # Nothing says where a token stands in a source that is not its own.
        return terms.window is None and bias is None and all(span.num_source for span in plan.spans)
    return True


def _is_cross(plan: Plan) -> bool:
    return any(span.num_source for span in plan.spans)


def _fronts(plan: Plan, layer: int) -> Fronts:
    here = (span.front for span in plan.spans if span.front is not None and layer not in span.front.absent)
    return tuple(dict.fromkeys(here))


def _source_readers(plan: Plan, fronts: Fronts) -> Iterator[Reader]:
    """Rows that read the step's own keys behind what is in front of them: in blocks of one position each."""
    begins, end = {}, sum(span.num_tokens for span in plan.spans)
    for front in fronts:
        begins[front] = end
        end += front.num_tokens
    for at, span in placed(plan.spans):
        own = range(at, at + span.num_tokens)
        first = begins.get(span.front) if span.front is not None else None
        num_front = 0 if span.front is None or first is None else span.front.num_tokens
        yield Reader(
            token=at,
            num_tokens=span.num_tokens,
            place=num_front,
            stop=num_front + span.num_tokens,
            blocks=own if first is None else (*range(first, first + num_front), *own),
            num_unplaced=num_front,
        )


def _beside(fronts: Fronts, layer: int, k_TKD: Tensor, v_TKD: Tensor) -> Memory:
    """The step's keys and values, and behind them what is in front of rows."""
    if fronts:
        k_TKD = torch.cat((k_TKD, *(front.keys_LHPD[layer].transpose(0, 1) for front in fronts)))
        v_TKD = torch.cat((v_TKD, *(front.values_LHPD[layer].transpose(0, 1) for front in fronts)))
    if k_TKD.stride() != v_TKD.stride() or k_TKD.stride(2) != 1:
        k_TKD, v_TKD = k_TKD.contiguous(), v_TKD.contiguous()
    return Memory(keys_PKD=k_TKD, values_PKD=v_TKD, block_size=1)
