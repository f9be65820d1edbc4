"""The terms of a dense site, in the order of the normal form (see `adapters.primitives`):

y = M_out( s_out * ( W M_in( s_in * x ) + b ) ) + B A x + sum_k D_k x + c

in-terms -> base op, or the adapter's own parameters -> exchanged rows -> out-terms. A further kind of edit is a
further term here; the others do not learn of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from peft_serve.adapters.base import SiteKind, SiteSpec
from peft_serve.model.quantised import is_quantised
from peft_serve.model.routing import Route
from peft_serve.model.terms.bases import BasesMaps
from peft_serve.model.terms.low_rank import LowRankDelta
from peft_serve.model.terms.maps import Maps
from peft_serve.model.terms.mixers import InMix, OutMix, OutPairs
from peft_serve.model.terms.own import OwnParameters
from peft_serve.model.terms.rescaled import RescaledMaps
from peft_serve.model.terms.rows import HeadRows, LookupRows
from peft_serve.model.terms.shared import SharedFactors
from peft_serve.model.terms.term import InTerm, OutOp, OutTerm, Term
from peft_serve.model.terms.vectors import IdScale, InScale, OutScale, Shift, VectorTerm


@dataclass(frozen=True, slots=True)
class DenseTerms:
    """The terms of a dense site, in the order in which they act."""

    before: tuple[InTerm, ...]
    own: OwnParameters
    rows: OutTerm  # reads what the in-terms made of x; the terms of `after` read x as it came
    delta: LowRankDelta
    after: tuple[OutTerm, ...]  # `delta`, `out_scale` and `shift` are among them
    in_scale: VectorTerm  # one of `before`, or of `after` at an embedding
    out_scale: VectorTerm
    shift: VectorTerm

    def all(self) -> tuple[Term, ...]:
        return (*self.before, self.own, self.rows, *self.after)

    def ops_after(self, route: Route) -> tuple[tuple[OutTerm, OutOp], ...]:
        """What the terms of `after` do. Vectors go with the low-rank term in one op, where its kernel takes them and
        nothing else acts."""
        ops = tuple((term, op) for term in self.after if (op := term.op(route)) is not None)
        acting = {id(term) for term, _ in ops}
        fusable = {id(self.delta), id(self.out_scale), id(self.shift)}
        if len(ops) < 2 or id(self.delta) not in acting or not acting <= fusable or not self.delta.fuses_vectors:
            return ops
        fused = self.delta.op(route, self.out_scale.table(route), self.shift.table(route))
        assert fused is not None, "the low-rank term acts"
        return ((self.delta, fused),)


def dense_terms(spec: SiteSpec, module: nn.Module, shared: SharedFactors, like: Tensor) -> DenseTerms:
    """The terms of a Linear, a Conv1D or an Embedding.

    They are in the dtype of its weight, or in that of `like`, a weight of the model that is not quantised.
    """
    weight = module.weight
    assert isinstance(weight, Tensor)
    like = like if is_quantised(module) else weight.detach()
    ones_in, ones_out = like.new_ones(spec.in_features), like.new_ones(spec.out_features)
    own = OwnParameters(spec, module)
    delta = LowRankDelta(spec, like)
    out_scale, shift = OutScale("out_scale", ones_out), Shift("shift", like.new_zeros(spec.out_features))
    after: tuple[OutTerm, ...] = (
        out_scale,
        OutMix(like),
        OutPairs(ones_out),
        delta,
        RescaledMaps(spec, like, shared),
        BasesMaps(spec, like, shared),
        Maps(spec, like),
        shift,
    )
    if spec.kind is SiteKind.EMBEDDING:
        of_ids, rows = IdScale("in_scale", ones_in), LookupRows(spec, like)
        return DenseTerms((), own, rows, delta, (of_ids, *after), of_ids, out_scale, shift)
    in_scale = InScale("in_scale", ones_in)
    return DenseTerms((in_scale, InMix(like)), own, HeadRows(module, like), delta, after, in_scale, out_scale, shift)
