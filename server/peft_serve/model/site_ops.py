"""The terms of a dense site, in the order of the normal form (see `adapters.primitives`):

y = M_out( s_out * ( W M_in( s_in * x ) + b ) ) + B A x + sum_k D_k x + c

in-terms -> base op, or the adapter's own parameters -> exchanged rows -> out-terms. A further kind of edit is a
further term here; the others do not learn of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile

from torch import Tensor, nn

from peft_serve.adapters.base import SiteKind, SiteSpec
from peft_serve.kernels.layer import SiteTerms
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
class SitePart:
    """What a layer's kernel does at a site, and the terms behind the product that it leaves."""

    terms: SiteTerms
    left: tuple[OutTerm, ...] = ()


@dataclass(frozen=True, slots=True)
class DenseTerms:
    """The terms of a dense site, in the order in which they act."""

    before: tuple[InTerm, ...]
    own: OwnParameters
    rows: OutTerm  # reads what the in-terms made of x; the terms of `after` read x as it came
    delta: LowRankDelta
    after: tuple[OutTerm, ...]  # `delta`, `out_scale` and `shift` are among them
    in_scale: VectorTerm  # one of `before`, or of `after` at an embedding
    in_mix: InMix  # one of `before`, but at an embedding
    out_mix: OutMix  # one of `after`
    out_scale: VectorTerm
    shift: VectorTerm

    def all(self) -> tuple[Term, ...]:
        return (*self.before, self.own, self.rows, *self.after)

    def part(self, route: Route) -> SitePart:
        """How a layer's kernel and the ops here share the work, for this route and all others of its manner: the
        kernel takes the terms in front of the product, and those behind it up to the first that it does not know."""
        factors = {term: term.by_slot(route) for term in (self.in_mix, self.out_mix, self.delta)}
        readable = (term for term, its in factors.items() if its is not None)
        known: set[Term] = {self.in_scale, self.out_scale, self.shift, *readable}
        before: list[Term] = [term for term in self.before if term.op(route) is not None]
        if self.own.parts(route) or self.rows.op(route) is not None or not known.issuperset(before):
            return SitePart(SiteTerms(is_elsewhere=True))
        behind = [term for term in self.after if term.op(route) is not None]
        done: list[Term] = list(takewhile(known.__contains__, behind))
        terms = SiteTerms(
            in_scale=self.in_scale.table(route),
            in_mix=factors[self.in_mix] if self.in_mix in before else None,
            out_scale=self.out_scale.table(route),  # it is the first
            out_mix=factors[self.out_mix] if self.out_mix in done else None,
            low_rank=factors[self.delta] if self.delta in done else None,
            shift=self.shift.table(route) if self.shift in done else None,
        )
        return SitePart(terms, tuple(behind[len(done) :]))

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
    like = like if is_quantised(module) else weight.new_empty(0)  # not the weight: it may be packed, and let go of
    ones_in, ones_out = like.new_ones(spec.in_features), like.new_ones(spec.out_features)
    own = OwnParameters(spec, module)
    delta = LowRankDelta(spec, like)
    out_scale, shift = OutScale("out_scale", ones_out), Shift("shift", like.new_zeros(spec.out_features))
    in_mix, out_mix = InMix(like), OutMix(like)
    after: tuple[OutTerm, ...] = (
        out_scale,
        out_mix,
        OutPairs(ones_out),
        delta,
        RescaledMaps(spec, like, shared),
        BasesMaps(spec, like, shared),
        Maps(spec, like),
        shift,
    )
    if spec.kind is SiteKind.EMBEDDING:
        of_ids, rows = IdScale("in_scale", ones_in), LookupRows(spec, like)
        return DenseTerms((), own, rows, delta, (of_ids, *after), of_ids, in_mix, out_mix, out_scale, shift)
    in_scale = InScale("in_scale", ones_in)
    before, own_rows = (in_scale, in_mix), HeadRows(module, like)
    return DenseTerms(before, own, own_rows, delta, after, in_scale, in_mix, out_mix, out_scale, shift)
