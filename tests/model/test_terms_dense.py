"""Every term of a dense site, alone and together, in mixed batches, against plain matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from peft_serve.adapters.base import SiteKind, SiteSpec
from peft_serve.adapters.primitives import (
    Adapter,
    Affine,
    BlockDiagonal,
    Dense,
    Edit,
    Kronecker,
    LowRank,
    Paired,
    Rows,
    Sparse,
    mapped,
)
from peft_serve.adapters.shared_primitives import Rescaled, SharedBases
from peft_serve.adapters.transform_primitives import Circulant, Spectrum
from peft_serve.core import AdapterId
from peft_serve.model.routing import Stream
from peft_serve.model.sites import AdaptedSites
from tests.model.dense_algebra import LINEAR_TERMS, LOOKUP_TERMS, Dice, edit_of, expected

Division = Sequence[tuple[int, int]]

DECODE: Division = [(0, 2), (1, 1), (2, 1), (3, 1), (5, 1), (6, 1)]
PREFILL: Division = [(0, 3), (1, 4), (2, 4), (3, 9), (5, 4), (6, 2)]
BETWEEN: Division = [(0, 1), (1, 2), (0, 3), (1, 2), (3, 1), (0, 2), (3, 4), (6, 2), (0, 1), (5, 3)]
ALONE: Division = [(2, 5)]


class One(nn.Module):
    """A model of one dense module."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.site: nn.Module
        if kind in ("linear", "unbiased"):
            self.site = nn.Linear(8, 12, bias=kind == "linear")
        elif kind == "narrow":
            self.site = nn.Linear(12, 8)
        elif kind == "conv1d":
            self.site = Conv1D(12, 8)
            nn.init.normal_(self.site.bias)
        elif kind == "embedding":
            self.site = nn.Embedding(20, 12)
        else:
            self.site = Gemma2TextScaledWordEmbedding(20, 12, 0, embed_scale=12**0.5)
        self.requires_grad_(False)


LINEAR_KINDS = ["linear", "unbiased", "narrow", "conv1d"]
LOOKUP_KINDS = ["embedding", "scaled"]
CASES = [(kind, term) for kind in LINEAR_KINDS for term in (*LINEAR_TERMS, "all")]
CASES += [(kind, term) for kind in LOOKUP_KINDS for term in (*LOOKUP_TERMS, "all")]


class Bench:
    """One site, its adapters, and what their tokens should get."""

    def __init__(self, kind: str, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.model = One(kind).to(dtype)
        self.plain = One(kind).to(dtype)
        self.sites = AdaptedSites(self.model, stream_of=lambda _: Stream.TARGET)
        self.spec: SiteSpec = self.sites.specs["site"]
        self.edits: dict[int, Edit] = {}

    def install(self, slot: int, edit: Edit) -> None:
        self.sites.install(slot, Adapter(id=AdapterId(f"sha256:{slot}"), method="TEST", sites={"site": edit}))
        self.edits[slot] = edit

    def remove(self, slot: int) -> None:
        self.sites.remove(slot)
        del self.edits[slot]

    def tokens(self, num_tokens: int, seed: int = 1) -> Tensor:
        dice = Dice(seed)
        if self.spec.kind is SiteKind.EMBEDDING:
            return dice.below(20, num_tokens)
        return dice.normal(num_tokens, self.spec.in_features, scale=1.0).to(self.dtype)

    def run(self, division: Division, x_T: Tensor) -> Tensor:
        self.sites.route(Stream.TARGET, division)
        with torch.inference_mode():
            y: Tensor = self.model.site(x_T[None])[0]
        self.sites.clear()
        return y

    def check(self, division: Division, *, seed: int = 1, tolerance: float = 1e-5) -> None:
        x_T = self.tokens(sum(count for _, count in division), seed)
        y_TO = self.run(division, x_T)
        weight = self.plain.site.weight
        weight = weight if self.spec.kind is SiteKind.LINEAR else weight.T
        bias = getattr(self.plain.site, "bias", None)
        with torch.inference_mode():
            base_TO = self.plain.site(x_T[None])[0]
        at = 0
        for slot, count in division:
            here = slice(at, at + count)
            want = expected(self.spec, weight, bias, self.edits.get(slot), x_T[here])
            torch.testing.assert_close(
                y_TO[here].double(), want, rtol=tolerance, atol=tolerance, msg=lambda m, s=slot: f"{s}: {m}"
            )
            if slot not in self.edits:
                assert torch.equal(y_TO[here], base_TO[here]), "a base row is not touched at all"
            at += count


@pytest.mark.parametrize(("kind", "term"), CASES)
def test_one_term(kind: str, term: str) -> None:
    """Adapters of one kind and of different sizes, in ragged runs; slot 5 is an adapter without this site's terms."""
    bench = Bench(kind)
    for slot in (1, 2, 3, 6):
        bench.install(slot, edit_of(term, bench.spec, slot))
    bench.install(5, Affine())
    for division in (DECODE, PREFILL, BETWEEN, ALONE):
        bench.check(division)


@pytest.mark.parametrize("kind", LINEAR_KINDS + LOOKUP_KINDS)
def test_different_terms_in_one_batch(kind: str) -> None:
    bench = Bench(kind)
    terms = [*(LOOKUP_TERMS if kind in LOOKUP_KINDS else LINEAR_TERMS), "all", "all", "delta", "rescaled"]
    terms += [] if kind in LOOKUP_KINDS else ["bases"]
    for slot, term in enumerate(terms, 1):
        bench.install(slot, edit_of(term, bench.spec, slot))
    slots = range(len(terms) + 1)
    for turn in range(4):
        bench.check([(slot, 1) for slot in slots], seed=turn)
        bench.check([(slot, 1 + (slot + turn) % 5) for slot in slots], seed=turn)
        bench.check([pair for slot in slots for pair in ((0, 1 + slot % 2), (slot, 1 + turn))], seed=turn)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["linear", "narrow", "conv1d", "embedding"])
def test_half_precision(kind: str, dtype: torch.dtype) -> None:
    bench = Bench(kind, dtype)
    for slot, term in enumerate([*(LOOKUP_TERMS if kind == "embedding" else LINEAR_TERMS), "all"], 1):
        bench.install(slot, mapped(edit_of(term, bench.spec, slot), lambda t: t.to(dtype)))
    for division in ([(slot, 1) for slot in (0, *bench.edits)], [(slot, 2 + slot % 3) for slot in (0, *bench.edits)]):
        bench.check(division, tolerance=8e-2)


@pytest.mark.parametrize("kind", LINEAR_KINDS + LOOKUP_KINDS)
def test_a_slot_used_again_has_nothing_of_its_last_adapter(kind: str) -> None:
    bench = Bench(kind)
    terms = [*(LOOKUP_TERMS if kind in LOOKUP_KINDS else LINEAR_TERMS), "all"]
    bench.install(2, edit_of("all", bench.spec, 2))
    for turn, term in enumerate([*terms, *reversed(terms)]):
        bench.install(1, edit_of(term, bench.spec, turn))
        bench.check([(0, 1), (1, 3), (2, 2)], seed=turn)
        bench.remove(1)
        bench.install(1, Affine())
        bench.check([(0, 1), (1, 3), (2, 2)], seed=turn)
        bench.remove(1)


@pytest.mark.parametrize("term", ["rescaled", "bases"])
def test_shared_factors_are_held_once_and_given_back(term: str) -> None:
    bench = Bench("linear")
    for slot in (2, 4, 6):
        bench.install(slot, edit_of(term, bench.spec, slot))
    assert len(bench.sites._factors) == 1
    bench.install(3, edit_of(term, bench.spec, 3))
    assert len(bench.sites._factors) == 2
    for slot in (2, 4):
        bench.remove(slot)
    bench.check([(0, 2), (3, 1), (6, 4)])
    bench.remove(6)
    assert len(bench.sites._factors) == 1
    bench.remove(3)
    assert len(bench.sites._factors) == 0


@pytest.mark.parametrize("term", ["rescaled", "bases"])
def test_an_adapter_may_have_two_maps_of_one_key(term: str) -> None:
    """As a combination of two adapters has; beside it stands one of them alone."""
    bench = Bench("linear")
    first, second, alone = (edit_of(term, bench.spec, seed) for seed in (2, 8, 4))
    assert isinstance(first, Affine)
    assert isinstance(second, Affine)
    bench.install(1, Affine(maps=first.maps + second.maps))
    bench.install(2, alone)
    for division in ([(0, 1), (1, 2), (2, 1)], [(1, 7), (2, 8), (1, 1)]):
        bench.check(division)
    bench.remove(2)
    bench.check([(1, 3), (0, 2)])
    bench.remove(1)
    assert len(bench.sites._factors) == 0


def test_an_overflowing_neighbour_leaves_no_trace() -> None:
    """Infinities of one adapter stay with its own tokens, whatever the term."""
    bench = Bench("linear")
    huge = torch.full((12,), 3e38)
    loud: Mapping[int, Edit] = {
        1: Affine(out_scale=huge),
        2: Affine(maps=(Dense(huge[:, None].expand(12, 8).contiguous()),)),
        3: Affine(out_mix=Paired(huge, huge, 4)),
        4: Affine(out_mix=BlockDiagonal(torch.full((3, 4, 4), 3e38))),
        5: Affine(maps=(Rescaled("k", torch.ones(3, 8), torch.ones(12, 3), torch.full((3,), 3e38), huge),)),
        6: Affine(in_mix=BlockDiagonal(torch.full((2, 4, 4), 3e38))),
        7: Affine(maps=(bases(gains_QS=torch.full((3, 8), 3e38)),)),
    }
    for slot, edit in loud.items():
        bench.install(slot, edit)
    neighbour, quiet = 8, 9
    bench.install(neighbour, Affine(maps=(bases(),)))
    bench.install(quiet, edit_of("all", bench.spec, 3))
    for division in ([(slot, 1) for slot in range(10)], [(slot, 2 + slot % 3) for slot in range(10)]):
        x_T = bench.tokens(sum(count for _, count in division))
        y_TO = bench.run(division, x_T)
        count, last = division[-1][1], len(x_T)
        want = expected(bench.spec, bench.plain.site.weight, bench.plain.site.bias, bench.edits[quiet], x_T[-count:])
        torch.testing.assert_close(y_TO[last - count :].double(), want, rtol=1e-5, atol=1e-5)
        assert y_TO[: division[0][1]].isfinite().all()
        assert y_TO[-count - division[-2][1] : -count].isfinite().all(), "one of the same shared bases"
        assert not y_TO.isfinite().all(), "the others did overflow"


def rescaled(**changes: Tensor) -> Rescaled:
    parts = {"a_RI": torch.ones(3, 9), "b_OR": torch.ones(13, 3), "inner_R": torch.ones(3), "outer_O": torch.ones(12)}
    return Rescaled("k", **{**parts, **changes})


def bases(**changes: Tensor) -> SharedBases:
    parts = {"a_RS": torch.ones(2, 9), "b_LC": torch.ones(13, 7), "weights_RQ": torch.ones(2, 3)}
    return SharedBases("bases", **{**parts, "gains_QS": torch.ones(3, 8), **changes}, is_transposed=False)


REFUSED: list[tuple[str, Edit, str]] = [
    ("linear", Affine(in_mix=BlockDiagonal(torch.ones(3, 3, 3))), "do not divide 8"),
    ("linear", Affine(in_mix=BlockDiagonal(torch.ones(3, 2, 2))), "in_mix has shape"),
    ("linear", Affine(out_mix=BlockDiagonal(torch.ones(4, 3, 2))), "out_mix has shape"),
    ("linear", Affine(out_mix=Paired(torch.ones(12), torch.ones(11), 4)), "out_mix.other has shape"),
    ("linear", Affine(out_mix=Paired(torch.ones(12), torch.ones(12), 8)), "groups of 8"),
    ("linear", Affine(out_mix=Paired(torch.ones(12), torch.ones(12), 3)), "groups of 3"),
    ("linear", Affine(maps=(Dense(torch.ones(8, 12)),)), "maps.weight has shape"),
    ("linear", Affine(maps=(Kronecker(torch.ones(2, 2), torch.ones(6, 3)),)), "the site's is"),
    ("linear", Affine(maps=(Kronecker(torch.ones(2), torch.ones(6, 4)),)), "must be a matrix"),
    ("linear", Affine(maps=(Sparse(torch.tensor([12]), torch.tensor([0]), torch.ones(1)),)), "the site has 12"),
    ("linear", Affine(maps=(Sparse(torch.tensor([0]), torch.tensor([-1]), torch.ones(1)),)), "from -1"),
    ("linear", Affine(maps=(Sparse(torch.tensor([0.0]), torch.tensor([1]), torch.ones(1)),)), "whole numbers"),
    ("linear", Affine(maps=(Sparse(torch.tensor([0, 1]), torch.tensor([1]), torch.ones(1)),)), "maps.out has shape"),
    ("linear", Affine(maps=(rescaled(a_RI=torch.ones(3, 7)),)), "maps.a has shape"),
    ("linear", Affine(maps=(rescaled(b_OR=torch.ones(11, 3)),)), "maps.b has shape"),
    ("linear", Affine(maps=(rescaled(inner_R=torch.ones(4)),)), "maps.a has shape"),
    ("linear", Affine(maps=(rescaled(outer_O=torch.ones(11)),)), "maps.outer has shape"),
    ("linear", Affine(maps=(bases(a_RS=torch.ones(2, 7)),)), "maps.a has shape"),
    ("linear", Affine(maps=(bases(a_RS=torch.ones(3, 9)),)), "maps.a has shape"),
    ("linear", Affine(maps=(bases(b_LC=torch.ones(13, 5)),)), "maps.b has shape"),
    ("linear", Affine(maps=(bases(b_LC=torch.ones(11, 7)),)), "maps.b has shape"),
    ("linear", Affine(maps=(bases(b_LC=torch.ones(13)),)), "must be a matrix"),
    ("linear", Affine(maps=(bases(gains_QS=torch.ones(2, 8)),)), "maps.gains has shape"),
    ("linear", Affine(maps=(bases(gains_QS=torch.ones(3, 9)),)), "maps.gains has shape"),
    ("narrow", Affine(maps=(bases(),)), "maps.gains has shape"),
    ("embedding", Affine(maps=(bases(gains_QS=torch.ones(3, 20)),)), "neither weighed"),
    ("linear", Affine(maps=(Circulant(torch.ones(2, 2, 3)),)), "circulants of 3"),
    ("linear", Affine(maps=(Circulant(torch.ones(2, 3, 4)),)), "maps.kernel has shape"),
    ("linear", Affine(maps=(Circulant(torch.ones(3, 4)),)), "maps.kernel has shape"),
    ("embedding", Affine(maps=(Circulant(torch.ones(3, 5, 4)),)), "nor transformed"),
    ("linear", Affine(maps=(Spectrum(torch.tensor([12]), torch.tensor([0]), torch.ones(1)),)), "the site has 12"),
    ("linear", Affine(maps=(Spectrum(torch.tensor([1]), torch.tensor([8]), torch.ones(1)),)), "the site has 8"),
    ("embedding", Affine(maps=(Spectrum(torch.tensor([1]), torch.tensor([8]), torch.ones(1)),)), "nor transformed"),
    ("linear", Affine(maps=(rescaled(outer_O=torch.full((12,), torch.nan)),)), "not finite"),
    ("linear", Affine(rows=Rows(torch.tensor([12]), torch.ones(1, 8))), "the site has 12"),
    ("linear", Affine(rows=Rows(torch.tensor([1, 1]), torch.ones(2, 8))), "names a row twice"),
    ("linear", Affine(rows=Rows(torch.tensor([1]), torch.ones(1, 12))), "rows.values has shape"),
    ("embedding", Affine(rows=Rows(torch.tensor([20]), torch.ones(1, 12))), "the site has 20"),
    ("embedding", Affine(in_mix=BlockDiagonal(torch.ones(10, 2, 2))), "cannot be mixed"),
    ("linear", Affine(delta=LowRank(torch.ones(2, 7), torch.ones(12, 2))), "delta.a has shape"),
]


@pytest.mark.parametrize(("kind", "edit", "reason"), REFUSED)
def test_what_does_not_fit_is_refused_and_leaves_the_slot_empty(kind: str, edit: Edit, reason: str) -> None:
    bench = Bench(kind)
    with pytest.raises(ValueError, match=reason):
        bench.install(1, edit)
    bench.install(1, edit_of("all", bench.spec, 1))
    bench.check([(0, 2), (1, 3)])


def test_factors_of_one_key_have_one_size() -> None:
    bench = Bench("linear")
    bench.install(1, Affine(maps=(rescaled(),)))
    with pytest.raises(ValueError, match="different sizes 'k'"):
        bench.install(2, Affine(shift=torch.ones(12), maps=(rescaled(a_RI=torch.ones(3, 10)),)))
    bench.check([(0, 1), (1, 3)])
    bench.install(2, Affine())
    bench.check([(0, 1), (1, 3), (2, 2)])
