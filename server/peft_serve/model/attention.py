"""The attention that replaces every attention of the resident model.

Owns the step's plans while a pass runs, and knows of each attention module what kind it is. It is registered
with transformers under a name of its own, once for every base: two bases in one process share nothing. What
the rows of a step are is for `ragged`, the arithmetic for `attend`, the memory for `pools`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from peft_serve.model.attend import Terms, attend_cached, attend_fresh, attend_reference
from peft_serve.model.pools import KVPool
from peft_serve.model.ragged import Bias, Cached, Plan


class Kind(StrEnum):
    """What an attention module reads."""

    SELF = "self"  # the row's own past
    SOURCE = "source"  # the row's own source, both directions (an encoder)
    CROSS = "cross"  # the row's encoded source


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where an attention module stands in the model."""

    kind: Kind
    layer: int
    bias: Bias | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class Work:
    """What one kind of attention does in the pass that runs."""

    plan: Plan
    pool: KVPool | None = None  # None: an encoder, nothing is kept


class Watcher(Protocol):
    """Somebody who adds to what an attention module gives."""

    def beside_(self, q_TQD: Tensor, attended_TQD: Tensor) -> None:
        """Given the queries, change what attention gave, [T, H, D], in place."""
        ...


class DecodeKernel(Protocol):
    """Attention of groups with one token a row, where it is covered."""

    def forget(self) -> None:
        """The pass is over."""
        ...

    def attend(self, group: Cached, q_THD: Tensor, pool: KVPool, layer: int, terms: Terms) -> Tensor | None:
        """[R, H, D], or None where it covers not what is asked."""
        ...


class PlanKernel(Protocol):
    """Attention of all rows of a plan together, where it is covered."""

    def forget(self) -> None:
        """The pass is over."""
        ...

    def attend(
        self, plan: Plan, pool: KVPool | None, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, layer: int, terms: Terms
    ) -> Tensor | None:
        """[T, H, D], or None where it covers not what is asked. With a pool, k and v are in it already."""
        ...


class RaggedAttention:
    """Attention over rows side by side, called by the model's own layers.

    Modules that are not in `places` are a decoder's self-attention at their `layer_idx`. With
    `is_reference` the slow path computes everything, for tests.
    """

    def __init__(self, places: Mapping[nn.Module, Place], *, is_reference: bool = False) -> None:
        self._places = dict(places)
        self._work: Mapping[Kind, Work] = {}
        self.is_reference = is_reference
        self.paged: DecodeKernel | None = None
        self.whole: PlanKernel | None = None
        self.watched: Mapping[nn.Module, Watcher] = {}
        self.name = f"peft_serve_{id(self):x}"

    def install(self, model: PreTrainedModel) -> None:
        """Make the model use this attention.

        The library's registry outlives every model, so it holds a weak reference. No mask function is
        registered with it: for a name without one the library makes no mask at all, and none is needed.
        """
        method = weakref.WeakMethod(self._attend)

        def attention(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
            attend = method()
            assert attend is not None, "the base this attention belongs to is gone"
            return attend(*args, **kwargs)

        AttentionInterface.register(self.name, attention)
        for module in model.modules():
            if not isinstance(module, PreTrainedModel):
                continue
            if module.config._attn_implementation != self.name:
                # Each stack is asked by itself: not every version passes the wish on to stacks of T5.
                module.set_attn_implementation(self.name)
            if module.config._attn_implementation != self.name:
                raise ValueError(
                    f"{type(module).__name__} does not let its attention be replaced, so its rows cannot be "
                    "served side by side; use a model whose attention goes through transformers' "
                    "AttentionInterface"
                )

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *, scaling: float, window: int | None = None
    ) -> Tensor:
        """For modules that never ask the library: q [1, H, T, D], k and v [1, K, T, D]. Gives [1, T, H, D]."""
        return self._attend(module, query, key, value, None, scaling=scaling, sliding_window=window)[0]

    @contextmanager
    def running(self, work: Mapping[Kind, Work]) -> Iterator[None]:
        """The pass inside the block does this work."""
        assert not self._work, "a pass runs inside another one"
        self._work = work
        try:
            yield
        finally:
            self._work = {}
            for kernel in (self.paged, self.whole):
                if kernel is not None:
                    kernel.forget()

    def _attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        _mask: Tensor | None,
        *,
        scaling: float | None = None,
        softcap: float | None = None,
        sliding_window: int | None = None,
        s_aux: Tensor | None = None,
        **_: object,
    ) -> tuple[Tensor, None]:
        """The library's call: q [1, H, T, D], k and v [1, K, T, D]. Gives [1, T, H, D].

        Masks and position biases that the model passes are not read: the plan and the module's place say
        both. At a cross-attention without new rows, k and v are dummies.
        """
        place = self.place(module)
        terms = Terms(
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
            softcap=softcap,
            window=sliding_window,
            bias=place.bias,
            sinks_H=s_aux,
        )
        q, k, v = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
        work = self._work[place.kind]
        if work.pool is not None and work.plan.writes_T is not None:
            work.pool.write(place.layer, work.plan.writes_T, k, v)
        return self.run(module, work, place.layer, q, k, v, terms)[None], None

    def work(self, kind: Kind) -> Work | None:
        """What the pass that runs has to do for this kind of attention."""
        return self._work.get(kind)

    def place(self, module: nn.Module) -> Place:
        """Where this module stands."""
        return self._places.get(module) or Place(kind=Kind.SELF, layer=module.layer_idx)  # type: ignore[arg-type]

    def run(self, module: nn.Module, work: Work, layer: int, q: Tensor, k: Tensor, v: Tensor, terms: Terms) -> Tensor:
        """[T, H, D] from q [T, H, D] and k, v [T, K, D], which are in their blocks already."""
        out = self._run(work, layer, q, k, v, terms)
        watcher = self.watched.get(module)
        if watcher is not None:
            watcher.beside_(q, out)
        return out

    def _run(self, work: Work, layer: int, q: Tensor, k: Tensor, v: Tensor, terms: Terms) -> Tensor:
        plan, pool = work.plan, work.pool
        if self.is_reference:
            return attend_reference(plan, q, k, v, pool, layer, terms)
        if self.whole is not None:
            out = self.whole.attend(plan, pool, q, k, v, layer, terms)
            if out is not None:
                return out
        if plan.is_one_group:  # the common step, all rows decode: nothing to put together
            assert pool is not None, "rows with blocks need a pool"
            return self._cached(plan.cached[0], q, pool, layer, terms)
        parts = torch.empty((q.shape[0], q.shape[1], v.shape[2]), dtype=q.dtype, device=q.device)
        for fresh in plan.fresh:
            parts[fresh.where] = attend_fresh(fresh, q, k, v, layer, terms)
        for cached in plan.cached:
            assert pool is not None, "rows with blocks need a pool"
            parts[cached.where] = self._cached(cached, q, pool, layer, terms)
        return parts

    def _cached(self, group: Cached, q: Tensor, pool: KVPool, layer: int, terms: Terms) -> Tensor:
        out = None if self.paged is None else self.paged.attend(group, q, pool, layer, terms)
        return attend_cached(group, q, pool, layer, terms) if out is None else out
