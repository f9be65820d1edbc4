"""A mixture's experts as a site: each adapter's tokens through its own experts, all others through the module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peft_serve.adapters.base import SiteKind, SiteSpec
from peft_serve.kernels.subsets import Tokens
from peft_serve.model.routing import Lane, Route
from peft_serve.model.sites_forward import expect_tokens
from peft_serve.model.terms.experts import ExpertDeltas, is_stack_of_experts
from peft_serve.model.terms.term import Term

_Plan = tuple[tuple[int | None, Tokens], ...]
"""(slot, its tokens); None for the tokens that the module itself serves."""


class ExpertsSite:
    """The fused experts of a layer. Arguments are the tokens [T, d] and their routing, [T, ...] each."""

    def __init__(self, spec: SiteSpec, module: nn.Module, lane: Lane) -> None:
        self.lane = lane
        self._deltas = ExpertDeltas(spec, module)
        self.terms: tuple[Term, ...] = (self._deltas,)
        self._path = spec.path
        self._base = module.forward
        self._planned: Route | None = None
        self._plan: _Plan = ()

    def forget(self) -> None:
        self._plan, self._planned = (), None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        route = self.lane.route
        if route is None:
            return self._base(*args, **kwargs)
        if route is not self._planned:
            self._plan, self._planned = self._plan_of(route), route
        if not self._plan:
            return self._base(*args, **kwargs)
        x_TD = args[0] if args else next(iter(kwargs.values()))
        expect_tokens(self._path, x_TD.shape[0], route.num_tokens)
        y_TD = torch.empty_like(x_TD)
        for slot, subset in self._plan:
            own_args = [_part(value, subset) for value in args]
            own_kwargs = {name: _part(value, subset) for name, value in kwargs.items()}
            run = self._base if slot is None else self._deltas.of
            first = () if slot is None else (slot,)
            subset.put_(y_TD, run(*first, *own_args, **own_kwargs))
        return y_TD

    def _plan_of(self, route: Route) -> _Plan:
        slots = route.active & self._deltas.slots
        if not slots:
            return ()
        route.asks_host("experts are gone through one by one, those that some token chose")
        plan: list[tuple[int | None, Tokens]] = [(slot, route.subset(frozenset({slot}))) for slot in sorted(slots)]
        rest = route.rest(slots)
        return (*plan, (None, rest)) if rest is not None else tuple(plan)


def _part(value: Any, tokens: Tokens) -> Any:
    return tokens.take(value) if isinstance(value, Tensor) else value


def expert_spec(path: str, module: nn.Module) -> SiteSpec | None:
    """The site, if this is a stack of experts that can be run expert by expert."""
    if not is_stack_of_experts(module):
        return None
    parameters = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
    is_transposed = bool(getattr(module, "is_transposed", False))
    down = parameters.get("down_proj", ())
    hidden_size = down[2 if is_transposed else 1] if len(down) == 3 else 0
    return SiteSpec(
        path=path,
        kind=SiteKind.EXPERTS,
        out_features=hidden_size,
        in_features=hidden_size,
        parameters=parameters,
        is_transposed=is_transposed,
    )
