"""A mixture's router as a site: each adapter's tokens through a router of its own, all others through the module."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from peft_serve.adapters.base import SiteKind, SiteSpec
from peft_serve.kernels.subsets import Tokens
from peft_serve.model.routing import Lane, Route
from peft_serve.model.sites_forward import expect_tokens
from peft_serve.model.terms.router import RouterDeltas
from peft_serve.model.terms.term import Term

_Plan = tuple[tuple[int | None, Tokens], ...]
"""(slot, its tokens); None for the tokens that the module itself serves."""


class RouterSite:
    """The router of a layer: tokens [T, d] or [1, T, d] in, one tensor or several [.., T, k] out."""

    def __init__(self, spec: SiteSpec, module: nn.Module, lane: Lane) -> None:
        self.lane = lane
        self._deltas = RouterDeltas(module)
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
        (x,) = args or kwargs.values()
        expect_tokens(self._path, x.numel() // x.shape[-1], route.num_tokens)
        return self._divided(x)

    def _divided(self, x: Tensor) -> Any:
        x_TD = x.reshape(-1, x.shape[-1])
        whole: tuple[Tensor, ...] = ()
        is_single = False
        for slot, subset in self._plan:
            part = subset.take(x_TD)
            part = part if x.ndim == 2 else part[None]
            given = self._base(part) if slot is None else self._deltas.of(slot, part)
            is_single = isinstance(given, Tensor)
            outputs: tuple[Tensor, ...] = (given,) if is_single else tuple(given)
            whole = whole or tuple(_empty(output, len(x_TD)) for output in outputs)
            for all_tokens, output in zip(whole, outputs, strict=True):
                subset.put_(_lines(all_tokens), _lines(output))
        return whole[0] if is_single else whole

    def _plan_of(self, route: Route) -> _Plan:
        slots = route.active & self._deltas.slots
        if not slots:
            return ()
        plan: list[tuple[int | None, Tokens]] = [(slot, route.subset(frozenset({slot}))) for slot in sorted(slots)]
        rest = route.rest(slots)
        return (*plan, (None, rest)) if rest is not None else tuple(plan)


def _empty(like: Tensor, num_tokens: int) -> Tensor:
    """Room for the output of all tokens, where `like` is that of some."""
    return like.new_empty((*like.shape[:-2], num_tokens, like.shape[-1]))


def _lines(output: Tensor) -> Tensor:
    return output.view(-1, output.shape[-1])


def router_spec(path: str, module: nn.Module) -> SiteSpec | None:
    """The site, if this is a router that transformers writes as a bare weight [experts, d] with a forward of its own.

    Routers that are linear layers are sites of that kind; those that read more than the tokens are none.
    """
    parameters = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
    weight = parameters.get("weight", ())
    num_experts = getattr(module, "num_experts", None)
    if not type(module).__name__.endswith("Router") or isinstance(module, nn.Linear) or len(weight) != 2:
        return None
    reads_tokens_alone = len(inspect.signature(type(module).forward).parameters) == 2  # and itself
    if weight[0] != num_experts or any(module.children()) or not reads_tokens_alone:
        return None
    return SiteSpec(
        path=path, kind=SiteKind.ROUTER, out_features=weight[0], in_features=weight[1], parameters=parameters
    )
