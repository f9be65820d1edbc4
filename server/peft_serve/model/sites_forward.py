"""The forward of one adapted module: the base op, and around it what the current route asks for.

A site reads its lane once. Without a route, or when no active adapter touches the site, it is the module's
own forward and nothing else. The ops of a route are gathered at the site's first call under it and kept until
the route changes: a route is frozen, and `AdaptedSites` replaces it whenever adapters or stacks change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from peft_serve.adapters.base import SiteKind, SiteSpec
from peft_serve.kernels.row_ops import Norm, RowOps
from peft_serve.model.norms import kernel_norm, norm_forward, run_by
from peft_serve.model.packing import Pack, Places
from peft_serve.model.quantised import is_quantised
from peft_serve.model.routing import Lane, Personal, Route
from peft_serve.model.site_ops import dense_terms
from peft_serve.model.terms.own import OwnNorm, token_axis
from peft_serve.model.terms.shared import SharedFactors
from peft_serve.model.terms.term import InOp, OutOp, OutTerm, OwnOp, Term


class Site(Protocol):
    """What is bound to a module in place of its forward."""

    lane: Lane
    terms: tuple[Term, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Any: ...

    def forget(self) -> None:
        """Let go of what was gathered for a route: an adapter of it is leaving, and its memory with it."""
        ...


@dataclass(frozen=True, slots=True)
class _DensePlan:
    """What a dense site does under one route."""

    num_tokens: int
    before: tuple[InOp, ...]
    own: tuple[Personal, ...]
    is_all_own: bool  # nobody is served by the base's parameters
    rows: OutOp | None
    after: tuple[OutOp, ...]
    alone: OutOp | None  # all there is, and it takes x and y as they come


class DenseSite:
    """A Linear, a Conv1D or an Embedding."""

    def __init__(self, spec: SiteSpec, module: nn.Module, lane: Lane, shared: SharedFactors, like: Tensor) -> None:
        self.lane = lane
        self.dense = dense_terms(spec, module, shared, like)
        self.terms: tuple[Term, ...] = self.dense.all()
        self._spec = spec
        self._module = module
        self._base: Callable[..., Any] = module.forward
        self.product: object = None  # what `pack` gave
        self._planned: Route | None = None
        self._plan: _DensePlan | None = None
        self._finishing: tuple[Route | None, tuple[OutOp, ...]] = (None, ())

    @property
    def num_packable(self) -> int:
        """How many weights can be packed here."""
        is_matrix = self._spec.kind in (SiteKind.LINEAR, SiteKind.CONV1D) and not is_quantised(self._module)
        return self._spec.out_features * self._spec.in_features if is_matrix else 0

    def pack(self, pack: Pack, places: Places = None) -> None:
        """Run the base op of a Linear or Conv1D from a packed copy of its weight."""
        weight, bias = self._module.weight, self._module.bias
        assert isinstance(weight, Tensor)
        assert bias is None or isinstance(bias, Tensor)
        is_transposed = self._spec.kind is SiteKind.CONV1D
        self._base = packed = pack(weight.t() if is_transposed else weight, bias)
        self.product = packed
        if places is not None:
            places.replace(weight, packed, is_turned=is_transposed)

    def forget(self) -> None:
        self._plan, self._planned = None, None
        self._finishing = (None, ())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        route = self.lane.route
        if route is None:
            return self._base(*args, **kwargs)
        plan = self._under(route)
        if plan is None:
            return self._base(*args, **kwargs)
        (x,) = args or kwargs.values()
        alone = plan.alone
        if alone is None:
            return self._adapted(x, plan)
        expect_tokens(self._spec.path, x.numel() // self._spec.in_features, plan.num_tokens)
        y = self._base(x)  # a new tensor
        alone(y, x)
        return y

    def finish_(self, y_TO: Tensor, x_TI: Tensor, left: tuple[OutTerm, ...]) -> None:
        """What the current route asks of some terms: those that a layer's kernel leaves of the route's manner."""
        route = self.lane.route
        assert route is not None, "somebody has a term here"
        if route is not self._finishing[0]:
            self._finishing = route, tuple(op for op in (term.op(route) for term in left) if op is not None)
        for op in self._finishing[1]:
            op(y_TO, x_TI)

    def _under(self, route: Route) -> _DensePlan | None:
        if route is not self._planned:
            self._plan, self._planned = self._plan_of(route), route
        return self._plan

    def _plan_of(self, route: Route) -> _DensePlan | None:
        before = tuple(op for op in (term.op(route) for term in self.dense.before) if op is not None)
        ops = self.dense.ops_after(route)
        after = tuple(op for _, op in ops)
        own = self.dense.own.parts(route)
        rows = self.dense.rows.op(route)
        if not (before or after or own or rows):
            return None
        is_alone = len(ops) == 1 and not (before or own or rows) and ops[0][0] is self.dense.delta
        alone = after[0] if is_alone and self.dense.delta.is_direct else None
        is_all_own = bool(own) and route.has_no_others(self.dense.own.slots)
        return _DensePlan(route.num_tokens, before, own, is_all_own, rows, after, alone)

    def _adapted(self, x: Tensor, plan: _DensePlan) -> Tensor:
        is_lookup = self._spec.kind is SiteKind.EMBEDDING
        x_T = x.reshape(-1) if is_lookup else x.reshape(-1, x.shape[-1])
        expect_tokens(self._spec.path, x_T.shape[0], plan.num_tokens)
        given_T = x_T
        for in_op in plan.before:
            given_T = in_op(given_T)
        if plan.is_all_own:
            y_TO = torch.cat([self.dense.own.of(one.slot, one.tokens.take(x_T)) for one in plan.own])
        else:
            y_TO = self._base(given_T)  # a new tensor: what follows may change it
            for one in plan.own:
                one.tokens.put_(y_TO, self.dense.own.of(one.slot, one.tokens.take(x_T)))
        if plan.rows is not None:
            plan.rows(y_TO, given_T)
        for out_op in plan.after:
            out_op(y_TO, x_T)
        return y_TO.view(*(x.shape if is_lookup else x.shape[:-1]), -1)


class NormSite:
    """A layer norm or an RMS norm."""

    def __init__(self, spec: SiteSpec, module: nn.Module, lane: Lane) -> None:
        self.lane = lane
        self._module = module
        self._own = OwnNorm(module)
        self.terms: tuple[Term, ...] = (self._own,)
        self._spec = spec
        self._base = norm_forward(module)
        self.by_kernel: Norm | None = None  # the base's norm, where a kernel computes it
        self._planned: Route | None = None
        self._op: OwnOp | None = None

    def run_by(self, ops: RowOps) -> None:
        """Run the base's norm and adapters' own by a kernel, where it is one the kernel computes. No adapter is here
        yet."""
        self.by_kernel = kernel_norm(self._module, self._base, ops)
        if self.by_kernel is not None:
            self._base = run_by(self.by_kernel, ops)
            self._own.run_by(self.by_kernel, ops)

    def gains(self, route: Route) -> Tensor | None:
        """[S, D] What the kernel multiplies with by slot; None where no adapter of the route has a norm of its own."""
        return self._own.gains(route)

    def forget(self) -> None:
        self._op, self._planned = None, None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        route = self.lane.route
        if route is None:
            return self._base(*args, **kwargs)
        if route is not self._planned:
            self._op, self._planned = self._own.op(route), route
        if self._op is None:
            return self._base(*args, **kwargs)
        (x,) = args or kwargs.values()
        if x.ndim == 3 and x.shape[0] > 1:  # padded rows: one line of tokens as everywhere else
            return self.forward(x.reshape(1, -1, x.shape[-1])).view(x.shape)
        expect_tokens(self._spec.path, x.shape[token_axis(x)], route.num_tokens)
        return self._op(x)


def expect_tokens(path: str, num_seen: int, num_routed: int) -> None:
    """Refuse to guess whose tokens these are."""
    if num_seen != num_routed:
        raise ValueError(
            f"site '{path}' got {num_seen} tokens and its stream was routed for {num_routed}; route the stream for "
            f"exactly the tokens of the pass, or leave this module out of the adapter"
        )
