"""What adapters do at one site: an ordered list of terms, each of which knows one kind of edit.

A dense site computes in-terms -> base op (or the adapter's own parameters) -> out-terms, in the order of

    y = s_out * (W (s_in * x) + b) + B A x + c

A term keeps its part of every installed adapter's edit and, for a route, gives an op on the tokens, or None
when no active adapter has such a part here. A further kind of edit is a further term in `dense_terms`; the
others do not learn of it. Which tokens belong to whom is `routing`'s, where low-rank rows lie is `stacks`'.

Shapes: `T` tokens of the stream, `I` in and `O` out features (`D` either), `S` slots. At an embedding x is
the ids [T] and `I` counts the vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn
from torch.nn.functional import embedding, layer_norm, linear, rms_norm

from peft_serve.adapters.base import SiteKind, SiteSpec
from peft_serve.adapters.primitives import Affine, Edit, LowRank, Replace
from peft_serve.kernels import grouped
from peft_serve.kernels.grids import add_low_rank_grids_
from peft_serve.model.routing import Route, Run, Way
from peft_serve.model.stacks import Place, SiteStack

BaseOp = Callable[..., Tensor]
InOp = Callable[[Tensor], Tensor]
"""x -> x', a new tensor."""
OutOp = Callable[[Tensor, Tensor], object]
"""(y [T, O], x) -> y changed in place; x is what the site was given, before any in-term."""
OwnOp = Callable[[Tensor], Tensor]


class Term(Protocol):
    """One kind of edit at one site."""

    def put(self, slot: int, edit: Edit) -> None:
        """Keep what concerns this term; often nothing."""
        ...

    def drop(self, slot: int) -> None: ...


class InTerm(Term, Protocol):
    def op(self, route: Route) -> InOp | None: ...


class OutTerm(Term, Protocol):
    def op(self, route: Route) -> OutOp | None: ...


class SlotTable:
    """A vector for each slot, [S, D]; slots without one, the base among them, have the neutral row."""

    def __init__(self, neutral_D: Tensor) -> None:
        self._neutral_D = neutral_D
        self._table_SD: Tensor | None = None
        self.slots: set[int] = set()

    @property
    def rows(self) -> Tensor:
        """[S, D]"""
        assert self._table_SD is not None, "read only where a slot has a row"
        return self._table_SD

    def put(self, slot: int, vector_D: Tensor) -> None:
        self._reach(slot)
        self.rows[slot] = vector_D
        self.slots.add(slot)

    def drop(self, slot: int) -> None:
        if slot in self.slots:
            self.slots.discard(slot)
            self.rows[slot] = self._neutral_D

    def _reach(self, slot: int) -> None:
        """Make room up to `slot` and beyond, so that slots in use index the table whoever they belong to."""
        old = self._table_SD
        if old is not None and slot < old.shape[0]:
            return
        self._table_SD = self._neutral_D.repeat(max(2 * slot, 8), 1)
        if old is not None:
            self._table_SD[: old.shape[0]] = old

    def index(self, route: Route) -> Tensor | None:
        """The row of every token, or None if no active adapter has a row."""
        if self.slots.isdisjoint(route.active):
            return None
        self._reach(max(route.active))
        return route.slot_of_token


class VectorTerm:
    """A term that is one vector of the normal form; `field` is its name there."""

    def __init__(self, field: str, neutral_D: Tensor) -> None:
        self._field = field
        self._table = SlotTable(neutral_D)

    def put(self, slot: int, edit: Edit) -> None:
        vector_D = getattr(edit, self._field, None)
        if vector_D is not None:
            self._table.put(slot, vector_D)

    def drop(self, slot: int) -> None:
        self._table.drop(slot)


class InScale(VectorTerm):
    """x -> s_in * x."""

    def op(self, route: Route) -> InOp | None:
        slot_T = self._table.index(route)
        if slot_T is None:
            return None
        rows_SI = self._table.rows
        return lambda x_TI: grouped.scaled_by_token(x_TI, rows_SI, slot_T)


class IdScale(VectorTerm):
    """s_in at an embedding: the input is one-hot, so the scale of its id goes to the looked-up row."""

    def op(self, route: Route) -> OutOp | None:
        slot_T = self._table.index(route)
        if slot_T is None:
            return None
        rows_SV = self._table.rows
        return lambda y_TO, ids_T: grouped.scale_by_id_(y_TO, rows_SV, slot_T, ids_T)


class OutScale(VectorTerm):
    """y -> s_out * y, bias included."""

    def op(self, route: Route) -> OutOp | None:
        slot_T = self._table.index(route)
        if slot_T is None:
            return None
        rows_SO = self._table.rows
        return lambda y_TO, _: grouped.scale_by_token_(y_TO, rows_SO, slot_T)


class Shift(VectorTerm):
    """y -> y + c."""

    def op(self, route: Route) -> OutOp | None:
        slot_T = self._table.index(route)
        if slot_T is None:
            return None
        rows_SO = self._table.rows
        return lambda y_TO, _: grouped.add_by_token_(y_TO, rows_SO, slot_T)


class LowRankDelta:
    """y -> y + B A x, from the site's hot stack. A scaled embedding's scale is in B since it was compiled."""

    def __init__(self, spec: SiteSpec, like: Tensor) -> None:
        self._like = like
        self._is_lookup = spec.kind is SiteKind.EMBEDDING
        self._width = spec.out_features + (1 if self._is_lookup else spec.in_features)
        self._factors: dict[int, LowRank] = {}
        self._stack = SiteStack(spec.in_features, spec.out_features)

    def put(self, slot: int, edit: Edit) -> None:
        if isinstance(edit, Affine) and edit.delta is not None:
            a_RI, b_OR = (t.to(self._like) for t in (edit.delta.a_RI, edit.delta.b_OR))
            self._factors[slot] = LowRank(a_RI, b_OR)

    def drop(self, slot: int) -> None:
        self._factors.pop(slot, None)

    def reset(self) -> None:
        """The layout has another size."""
        self._stack.reset()

    def write(self, slot: int, place: Place, capacity: int) -> None:
        """The slot has a new place in the layout."""
        if slot in self._factors:
            factors = self._factors[slot]
            self._stack.write(place, capacity, factors.a_RI, factors.b_OR)
        else:
            self._stack.blank(place)

    def op(self, route: Route) -> OutOp | None:
        slots = route.active.intersection(self._factors)
        if not slots:
            return None
        span = route.span(slots)
        a_RI, b_RO = self._stack.rows(span.first, span.last)
        way = span.way(self._width)
        if way is Way.GRIDS and span.grids is not None and not self._is_lookup:
            grid_parts = tuple((grid, grid.rows(a_RI), grid.rows(b_RO)) for grid in span.grids)
            return lambda y_TO, x: add_low_rank_grids_(y_TO, x, grid_parts)
        if way is not Way.MASKED:
            parts = grouped.parts_of(a_RI, b_RO, span.pieces)
            runs = grouped.add_low_rank_lookup_runs_ if self._is_lookup else grouped.add_low_rank_runs_
            return lambda y_TO, x: runs(y_TO, x, parts)
        foreign_TR = span.foreign
        masked = grouped.add_low_rank_lookup_ if self._is_lookup else grouped.add_low_rank_
        return lambda y_TO, x: masked(y_TO, x, a_RI, b_RO, foreign_TR)


class OwnParameters:
    """The adapter's own weight and bias instead of the base's, on its own tokens."""

    def __init__(self, spec: SiteSpec, module: nn.Module) -> None:
        self._spec = spec
        self._module = module
        self._states: dict[int, dict[str, Tensor]] = {}

    def put(self, slot: int, edit: Edit) -> None:
        if isinstance(edit, Replace):
            own = dict(self._module.named_parameters(recurse=False))
            self._states[slot] = {name: t.to(own[name]) for name, t in edit.state.items()}

    def drop(self, slot: int) -> None:
        self._states.pop(slot, None)

    def runs(self, route: Route) -> tuple[Run, ...]:
        return route.runs_of(self._states)

    def of(self, slot: int, x: Tensor) -> Tensor:
        """The site's op with the slot's parameters where it has them, with the base's where not."""
        state = self._states[slot]
        weight = state.get("weight", self._module.weight)
        bias = state.get("bias", getattr(self._module, "bias", None))
        assert isinstance(weight, Tensor)
        if self._spec.kind is SiteKind.EMBEDDING:
            rows = embedding(x, weight)
            return rows if self._spec.embed_scale == 1.0 else rows * self._spec.embed_scale
        return linear(x, weight.t() if self._spec.kind is SiteKind.CONV1D else weight, bias)


class OwnNorm:
    """A tuned norm: every token is normalised with its adapter's parameters, all adapters at once.

    torch's own norms take the affine part apart; every other norm (RMS norms, with or without Gemma's 1 + w)
    is run as it is, on a twin whose parameters are one row for each token.
    """

    def __init__(self, module: nn.Module) -> None:
        parameters = dict(module.named_parameters(recurse=False))
        self._tables = {name: SlotTable(parameter.detach()) for name, parameter in parameters.items()}
        self._module = module
        self._twin = copy.copy(module)
        self._twin.__dict__.pop("forward", None)
        self._twin._parameters = dict(module._parameters)

    def put(self, slot: int, edit: Edit) -> None:
        if isinstance(edit, Replace):
            for name, vector in edit.state.items():
                self._tables[name].put(slot, vector)

    def drop(self, slot: int) -> None:
        for table in self._tables.values():
            table.drop(slot)

    def op(self, route: Route) -> OwnOp | None:
        indices = {name: table.index(route) for name, table in self._tables.items()}
        tables = {name: self._tables[name].rows for name, i in indices.items() if i is not None}
        if not tables:
            return None
        slot_T = route.slot_of_token
        return lambda x: self._run(x, {name: rows_SD[slot_T] for name, rows_SD in tables.items()})

    def _run(self, x: Tensor, own_TD: dict[str, Tensor]) -> Tensor:
        """x is [T, d], [1, T, d], or, where heads are normalised one by one, [1, T, heads, d] or [1, heads, T, d]."""
        shape = [1] * x.ndim
        axis = token_axis(x)
        shape[axis], shape[-1] = x.shape[axis], x.shape[-1]
        return self._apply(x, {name: t.view(shape) for name, t in own_TD.items()})

    def _apply(self, x: Tensor, own: dict[str, Tensor]) -> Tensor:
        parameters = {**self._module._parameters, **own}
        weight, bias = parameters.get("weight"), parameters.get("bias")
        if isinstance(self._module, (nn.LayerNorm, nn.RMSNorm)):
            y = _plain_norm(self._module, x)
            y = y if weight is None else y * weight
            return y if bias is None else y + bias
        self._twin._parameters.update(own)  # type: ignore[arg-type]  # plain tensors for the length of a call
        try:
            y = self._twin.forward(x)
        finally:
            self._twin._parameters.update(self._module._parameters)
        assert isinstance(y, Tensor)
        return y


def token_axis(x: Tensor) -> int:
    """Which axis of a norm's input counts tokens; see `OwnNorm`.

    Models split a projection into heads by a view and may then swap heads and tokens, which swaps the strides
    too: memory stays in the order of tokens.
    """
    if x.ndim < 4:
        return x.ndim - 2
    return 1 if x.stride(1) >= x.stride(2) else 2


def _plain_norm(module: nn.LayerNorm | nn.RMSNorm, x: Tensor) -> Tensor:
    shape = list(module.normalized_shape)
    if isinstance(module, nn.LayerNorm):
        return layer_norm(x, shape, eps=module.eps)
    return rms_norm(x, shape, eps=module.eps)


@dataclass(frozen=True, slots=True)
class DenseTerms:
    """The terms of a dense site, in the order in which they act."""

    before: tuple[InTerm, ...]
    own: OwnParameters
    delta: LowRankDelta
    after: tuple[OutTerm, ...]  # `delta` is one of them

    def all(self) -> tuple[Term, ...]:
        return (*self.before, self.own, *self.after)


def dense_terms(spec: SiteSpec, module: nn.Module) -> DenseTerms:
    """The terms of a Linear, a Conv1D or an Embedding."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    like = weight.detach()
    scale_in = like.new_ones(spec.in_features)
    scale_out = OutScale("out_scale", like.new_ones(spec.out_features))
    shift = Shift("shift", like.new_zeros(spec.out_features))
    delta = LowRankDelta(spec, like)
    own = OwnParameters(spec, module)
    if spec.kind is SiteKind.EMBEDDING:
        return DenseTerms((), own, delta, (IdScale("in_scale", scale_in), scale_out, delta, shift))
    return DenseTerms((InScale("in_scale", scale_in),), own, delta, (scale_out, delta, shift))
